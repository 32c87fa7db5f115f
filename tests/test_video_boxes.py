"""Videos with boxes: ImageNet VID, COCO-like files, MOT Challenge, and the embedded blurred digits."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from paperzoo.data.blurred_digits import SHARP, BlurredDigits, draw_videos
from paperzoo.data.video_boxes import VID_CLASSES, open_stills, open_video_boxes
from paperzoo.errors import DataError, PaperZooError

SMALL = {"videos": 4, "frames": 6, "size": 48}


def picture(path, width=40, height=30, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, 0, 0)).save(path)


# -- ImageNet VID --------------------------------------------------------------------------------------------------------


def vid(root, split="val", part="", frames=3, objects=None):
    """One video in ImageNet VID's layout; `objects` of a frame: (track, WordNet number, x1, y1, x2, y2)."""
    objects = objects or {}
    for t in range(frames):
        name = f"VID/{split}/{part}ILSVRC2015_{split}_00000000/{t:06d}"
        picture(root / "Data" / f"{name}.JPEG")
        note = root / "Annotations" / f"{name}.xml"
        note.parent.mkdir(parents=True, exist_ok=True)
        entries = "".join(
            f"<object><trackid>{k}</trackid><name>{n}</name><bndbox><xmax>{x2}</xmax><xmin>{x1}</xmin><ymax>{y2}</ymax><ymin>{y1}</ymin></bndbox></object>"
            for k, n, x1, y1, x2, y2 in objects.get(t, [])
        )
        note.write_text(f"<annotation>{entries}</annotation>")
    return root


def test_imagenet_vid_is_read_with_tracks(tmp_path):
    vid(tmp_path, objects={1: [(0, "n02084071", 3, 4, 12, 9), (5, "n02391049", 20, 0, 60, 10)]})
    data = open_video_boxes(tmp_path, "test")
    truth = data.truth(0, 1)
    assert (len(data), data.length(0), data.image(0, 2).shape) == (1, 3, (3, 30, 40))
    assert truth["boxes"].tolist() == [[3, 4, 13, 10], [20, 0, 40, 11]]  # inclusive there, and cut to the picture
    assert [data.labels[k] for k in truth["labels"]] == ["dog", "zebra"]
    assert truth["tracks"].tolist() == [0, 5]
    assert truth["area"].tolist() == [60, 220]


def test_imagenet_vid_has_a_frame_without_objects(tmp_path):
    truth = open_video_boxes(vid(tmp_path), "test").truth(0, 0)
    assert {k: tuple(v.shape) for k, v in truth.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "tracks": (0,),
        "crowd": (0,),
        "area": (0,),
    }


def test_imagenet_vid_trains_in_parts_of_a_thousand(tmp_path):
    data = open_video_boxes(vid(tmp_path, "train", "ILSVRC2015_VID_train_0000/"), "train")
    assert len(data) == 1 and data.path(0, 1).endswith("000001.JPEG")


def test_imagenet_vid_passes_over_other_classes(tmp_path):
    data = open_video_boxes(vid(tmp_path, objects={0: [(0, "n00000001", 1, 1, 5, 5)]}), "test")
    assert len(data.truth(0, 0)["boxes"]) == 0


def test_there_are_thirty_classes():
    assert len(VID_CLASSES) == len(set(VID_CLASSES.values())) == 30


def test_a_box_that_is_none_names_file_and_object(tmp_path):
    data = open_video_boxes(vid(tmp_path, objects={0: [(0, "n02084071", 9, 1, 5, 5)]}), "test")
    with pytest.raises(DataError, match=r"000000\.xml: object 1 .* that is no box"):
        data.truth(0, 0)


def test_a_missing_annotation_is_named(tmp_path):
    data = open_video_boxes(vid(tmp_path), "test")
    next((tmp_path / "Annotations").rglob("000001.xml")).unlink()
    with pytest.raises(DataError, match=r"000001\.xml"):
        data.truth(0, 1)


def test_a_frame_of_another_size_is_named(tmp_path):
    data = open_video_boxes(vid(tmp_path), "test")
    picture(next((tmp_path / "Data").rglob("000002.JPEG")), 20, 20)
    with pytest.raises(DataError, match=r"000002\.JPEG: is 20x20 pixels, its video 40x30"):
        data.image(0, 2)


def test_a_corrupt_frame_is_named(tmp_path):
    data = open_video_boxes(vid(tmp_path), "test")
    next((tmp_path / "Data").rglob("000000.JPEG")).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"000000\.JPEG: not a readable image"):
        data.truth(0, 0)


def test_imagenet_det_gives_pictures_beside_the_videos(tmp_path):
    name = "train/ILSVRC2013_train/n02084071/n02084071_1"
    picture(tmp_path / "Data" / "DET" / f"{name}.JPEG")
    note = tmp_path / "Annotations" / "DET" / f"{name}.xml"
    note.parent.mkdir(parents=True)
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    entries = "".join(f"<object><name>{n}</name>{box}</object>" for n in ("n02084071", "n00000001"))
    note.write_text(f"<annotation>{entries}</annotation>")
    with pytest.raises(DataError, match=r"DET_train_30classes\.txt: cannot be read"):
        open_stills(tmp_path)
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "DET_train_30classes.txt").write_text(f"{name} 1\n")
    item = open_stills(tmp_path)[0]
    assert (item["boxes"].tolist(), item["labels"].tolist()) == ([[1, 2, 10, 10]], [8])


# -- COCO's format with videos -------------------------------------------------------------------------------------------


def coco(root, **changes):
    content = {
        "videos": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}],
        "images": [
            {"id": 1, "video_id": 3, "frame_index": 20, "file_name": "a/2.png", "width": 40, "height": 30},
            {"id": 2, "video_id": 3, "frame_index": 10, "file_name": "a/1.png", "width": 40, "height": 30},
            {"id": 9, "video_id": 7, "frame_index": 0, "file_name": "b/1.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 4, "name": "cat"}, {"id": 2, "name": "bat"}],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 4, "track_id": 11, "bbox": [1, 2, 3, 4]},
            {"id": 2, "image_id": 1, "category_id": 2, "track_id": 12, "bbox": [5, 6, 7, 8], "iscrowd": 1},
            {"id": 3, "image_id": 2, "category_id": 2, "track_id": 12, "bbox": [0, 0, 9, 9]},
            {"id": 4, "image_id": 1, "category_id": 4, "track_id": 11, "bbox": [0, 0, 0, 9]},
        ],
    } | changes  # fmt: skip
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        picture(root / "frames" / name)
    (root / "annotations").mkdir()
    (root / "annotations" / "validation.json").write_text(json.dumps(content))
    return root


def test_coco_videos_are_read_in_the_order_of_their_frames(tmp_path):
    data = open_video_boxes(coco(tmp_path), "test")
    assert [data.length(v) for v in range(len(data))] == [1, 2]
    assert [data.path(1, t)[-7:] for t in (0, 1)] == ["a/1.png", "a/2.png"]


def test_coco_videos_keep_each_box_with_its_track(tmp_path):
    data = open_video_boxes(coco(tmp_path), "test")
    first, second = data.truth(1, 0), data.truth(1, 1)
    assert first["boxes"].tolist() == [[1, 2, 4, 6], [0, 0, 9, 9]]
    assert ([data.labels[k] for k in first["labels"]], first["tracks"].tolist()) == (["cat", "bat"], [11, 12])
    assert (second["tracks"].tolist(), second["crowd"].tolist()) == ([12], [True])  # the box without area is dropped
    assert len(data.truth(0, 0)["boxes"]) == 0


def test_an_annotation_without_a_track_is_named(tmp_path):
    annotation = {"id": 8, "image_id": 2, "category_id": 4, "bbox": [1, 2, 3, 4]}
    with pytest.raises(DataError, match=r"validation\.json: annotation 8 has no track_id"):
        open_video_boxes(coco(tmp_path, annotations=[annotation]), "test")


def test_an_image_of_an_unknown_video_is_named(tmp_path):
    with pytest.raises(DataError, match="video_id 3 of an image is not among"):
        open_video_boxes(coco(tmp_path, videos=[{"id": 7}]), "test")


def test_pictures_that_are_not_there_are_missed_at_once(tmp_path):
    root = coco(tmp_path)
    (root / "frames" / "a" / "2.png").unlink()
    with pytest.raises(DataError, match=r"a/2\.png, is not in frames/"):
        open_video_boxes(root, "test")


# -- MOT Challenge -------------------------------------------------------------------------------------------------------


def mot(root, lines, frames=4):
    for t in range(1, frames + 1):
        picture(root / "train" / "MOT17-02" / "img1" / f"{t:06d}.jpg")
    gt = root / "train" / "MOT17-02" / "gt" / "gt.txt"
    gt.parent.mkdir(parents=True)
    gt.write_text("\n".join(lines))
    return root


def test_mot_halves_each_sequence(tmp_path):
    root = mot(tmp_path, ["1,5,3,4,10,12,1,1,0.9", "3,5,5,4,10,12,1,1,0.9"])
    train, test = (open_video_boxes(root, split) for split in ("train", "test"))
    assert (train.length(0), test.length(0)) == (2, 2)
    assert train.truth(0, 0)["boxes"].tolist() == [[2, 3, 12, 15]]  # counted from 1 there
    assert test.truth(0, 0)["boxes"].tolist() == [[4, 3, 14, 15]]
    assert test.truth(0, 0)["tracks"].tolist() == [5]


def test_mot_ignores_what_is_not_considered(tmp_path):
    root = mot(tmp_path, ["1,1,3,4,10,12,0,1,1", "1,2,3,4,10,12,1,8,1", "1,3,3,4,10,12,1,3,1", "1,4,3,4,10,12,1,1,1"])
    truth = open_video_boxes(root, "train").truth(0, 0)
    assert (truth["tracks"].tolist(), truth["crowd"].tolist()) == ([1, 2, 4], [True, True, False])  # 3 is a car


def test_mot_names_the_line_that_is_wrong(tmp_path):
    data = open_video_boxes(mot(tmp_path, ["1,1,3,4,10,12,1,1,1", "", "1,2,x,4,10,12,1,1,1"]), "train")
    with pytest.raises(DataError, match=r"gt\.txt: line 3 is not frame,track"):
        data.truth(0, 0)


# -- finding files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, message", [("nowhere", "no such folder"), ("", "no videos with boxes in it")])
def test_a_place_without_videos_says_what_would_be_right(tmp_path, place, message):
    with pytest.raises(DataError, match=message):
        open_video_boxes(tmp_path / place / "x" if place else tmp_path, "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(PaperZooError, match="it is train or test"):
        open_video_boxes("blurred_digits", "val")


# -- the embedded digits -------------------------------------------------------------------------------------------------


def test_digits_are_the_same_every_time():
    first = {k: v.clone() for k, v in draw_videos(3, "test", 5, 48).items()}
    draw_videos.cache_clear()
    again = draw_videos(2, "test", 5, 48)
    assert all(torch.equal(first[k][:2], again[k]) for k in again)


def test_digits_of_the_splits_differ():
    train, test = (draw_videos(2, split, 5, 48)["frames"] for split in ("train", "test"))
    assert not torch.equal(train, test)


def test_boxes_of_digits_hold_what_moves():
    """Where nothing is in the way, a sharp frame differs from the video's other frames mostly inside of its boxes."""
    data = BlurredDigits("train", **SMALL | {"share": 0.0, "objects": 1})
    assert not torch.stack([data.degraded(v) for v in range(len(data))]).any()
    truth = [data.truth(0, t) for t in range(6)]
    assert all(len(t["boxes"]) == 1 and t["tracks"].tolist() == [0] for t in truth)
    assert len({int(t["labels"][0]) for t in truth}) == 1
    for video in range(len(data)):
        x1, y1, x2, y2 = data.truth(video, 0)["boxes"][0].int().tolist()
        image = data.image(video, 0).float()
        inside = image[:, y1:y2, x1:x2]
        assert inside.std((1, 2)).mean() > image.std((1, 2)).mean()  # the ink stands out


def test_degraded_frames_are_smoother():
    videos = draw_videos(32, "test", 16, 64)
    frames, blur = videos["frames"].float(), videos["blur"]
    frames = torch.nn.functional.avg_pool3d(frames, (1, 3, 3))  # the camera's noise is in all of them
    rough = (frames[..., 1:] - frames[..., :-1]).abs().mean((2, 3, 4))
    assert rough[blur != SHARP].mean() < 0.75 * rough[blur == SHARP].mean()
    assert bool((videos["degraded"] | (blur == SHARP)).all())
    assert 0.3 < float(videos["degraded"].float().mean()) < 0.6


def test_digits_refuse_arguments_out_of_range():
    with pytest.raises(PaperZooError, match="digits is 11"):
        BlurredDigits("train", digits=11)
    with pytest.raises(PaperZooError, match="20 pixels"):
        BlurredDigits("train", size=20)
