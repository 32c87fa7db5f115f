"""Text detection: rendered words, polygons, readers of the field's files, ICDAR's measure, crops, the recipe."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.blocks import polygons as geometry
from paperzoo.data import rendered_text, text_annotations
from paperzoo.data.rendered_text import ALPHABET, Style, Warp, fonts, render_word, text_scene, word_sample, words
from paperzoo.data.text_regions import item, open_text_regions
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks import text_detection
from paperzoo.tasks.text_detection import Collate, Config, Prepared, TextMatches, TextRegions, match_regions

SQUARE = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])


def polygon(*points):
    return torch.tensor(points, dtype=torch.float32).reshape(-1, 2)


def box(x1, y1, x2, y2):
    return polygon(x1, y1, x2, y1, x2, y2, x1, y2)


# -- rendered text ---------------------------------------------------------------------------------------------------


def test_splits_share_no_word_no_string_and_no_face():
    assert not set(words("train")) & set(words("test"))
    assert len(words("train")) > 1000 and len(words("test")) > 250
    assert not set(fonts("train")) & set(fonts("test")) and len(fonts("test")) >= 2
    strings = {
        split: {rendered_text.random_string(np.random.RandomState(i), split).lower() for i in range(200)}
        for split in ("train", "test")
    }
    assert not strings["train"] & strings["test"]


@pytest.mark.parametrize("face", fonts(), ids=lambda face: face.name)
def test_every_face_has_every_character(face):
    drawn = {character: render_word(character, face, 32)[0] for character in ALPHABET}
    assert all(ink.max() > 0.5 and 3 <= ink.shape[0] <= 48 for ink in drawn.values())
    shapes = {ink.shape + (round(float(ink.sum()), 3),) for ink in drawn.values()}
    assert len(shapes) > 50  # not one box for all of them


def test_characters_stand_side_by_side_over_the_ink():
    ink, boxes = render_word("Waves", fonts("train")[0], 40)
    assert boxes.shape == (5, 4) and (boxes[1:, 0] > boxes[:-1, 0]).all()
    assert boxes[:, 2].max() <= ink.shape[1] and boxes[:, 1].min() >= 0
    for x1, y1, x2, y2 in boxes.round().astype(int):
        assert ink[y1:y2, x1:x2].max() > 0.9


@pytest.mark.parametrize(
    "warp",
    [
        Warp(60, 20),
        Warp(60, 20, "arc", 1.8),
        Warp(60, 20, "arc", -1.2),
        Warp(60, 20, "wave", 5.0, 0.7, 1.3),
    ],
    ids=["straight", "up", "down", "wave"],
)
def test_a_warp_and_its_way_back(warp):
    points = np.random.RandomState(0).uniform(0, 1, (50, 2)) * (60, 20)
    tilted = warp.then(np.array([[0.9, -0.3, 40], [0.2, 1.1, 30], [0.002, -0.003, 1]]))
    for w in (warp, tilted):
        np.testing.assert_allclose(w.back(w(points)), points, atol=1e-8)
        outline = w.outline(1.0)
        assert len(outline) == (4 if warp.kind == "straight" else 14)
        assert geometry.signed_area(outline) > 0  # clockwise


def test_pictures_are_functions_of_their_index():
    for make in (text_scene, word_sample):
        one, two, other = make(5, "train"), make(5, "train"), make(6, "train")
        assert torch.equal(one["image"], two["image"])
        assert one["image"].shape != other["image"].shape or not torch.equal(one["image"], other["image"])
    assert not torch.equal(text_scene(5, "train", seed=1)["image"], text_scene(5, "train")["image"])
    with pytest.raises(ValueError, match="'val'"):
        text_scene(0, "val")


def test_scenes_have_separate_texts_inside_the_picture():
    texts = set()
    for index in range(30):
        scene = text_scene(index, "test", 128, unreadable=0.2)
        assert scene["image"].shape == (3, 128, 128) and scene["image"].dtype == torch.uint8
        assert len(scene["polygons"]) == len(scene["texts"]) == len(scene["ignore"]) == len(scene["characters"]) >= 1
        overlap = geometry.polygon_iou(scene["polygons"], scene["polygons"])
        assert (overlap - np.eye(len(overlap)) < 1e-6).all()
        for p, text, ignored, characters in zip(
            scene["polygons"], scene["texts"], scene["ignore"].tolist(), scene["characters"], strict=True
        ):
            assert p.min() >= 0 and p.max() <= 128 and len(p) in (4, 14)
            assert ignored == (text == "###")
            assert ignored or len(characters) == len(text)
            texts.add(text)
    assert len(texts) > 20


def test_a_word_at_two_heights_says_the_same():
    small, large = word_sample(3, height=16, width=50), word_sample(3, height=32, width=100)
    assert small["text"] == large["text"] and small["image"].shape == (3, 16, 50)
    torch.testing.assert_close(small["polygon"] * 2, large["polygon"], atol=0.5, rtol=0.0)
    halved = torch.nn.functional.avg_pool2d(large["image"].float()[None], 2)[0]
    assert (halved - small["image"].float()).abs().mean() < 25


def test_styles_choose_case_and_lines():
    plain = Style(case="lower", strings=0.0, curved=0.0, longest=5)
    for index in range(20):
        sample = word_sample(index, style=plain)
        assert sample["text"].islower() and len(sample["text"]) <= 5 and len(sample["polygon"]) == 4
    lines = dataclasses.replace(plain, lines=1.0)
    assert all(word_sample(i, style=lines)["text"].count(" ") == 1 for i in range(5))


# -- polygons --------------------------------------------------------------------------------------------------------


def test_overlap_of_polygons_by_hand():
    half, corner = SQUARE + (5, 0), np.array([[0.0, 0], [10, 0], [0, 10]])
    crossed = SQUARE[[0, 2, 1, 3]]  # two triangles of 25
    np.testing.assert_allclose(geometry.polygon_iou([SQUARE], [half, corner, crossed]), [[50 / 150, 0.5, 0.5]])
    np.testing.assert_allclose(geometry.polygon_areas([SQUARE, corner, crossed]), [100, 50, 50])
    assert geometry.polygon_iou([], [SQUARE]).shape == (0, 1)


def test_shrinking_moves_the_outline_inwards():
    kernel = geometry.shrink_polygon(SQUARE, 0.5)  # 100 * 0.75 / 40 = 1.875
    np.testing.assert_allclose(
        sorted(map(tuple, kernel)), [(1.875, 1.875), (1.875, 8.125), (8.125, 1.875), (8.125, 8.125)]
    )
    np.testing.assert_allclose(geometry.polygon_areas([geometry.shrink_polygon(SQUARE, 0.5, most=1.0)]), [64])
    dumbbell = np.array(
        [[0, 0], [8, 0], [8, 3], [12, 3], [12, 0], [20, 0], [20, 8], [12, 8], [12, 5], [8, 5], [8, 8], [0, 8]]
    )
    assert len(geometry.offset_polygon(dumbbell, -1.5)) == 2
    assert geometry.offset_polygon(SQUARE, -6) == []
    assert geometry.offset_polygon(SQUARE, 1)[0].shape[1] == 2


def test_pixels_inside_and_back():
    shape = np.array([[3.0, 2], [17, 2], [17, 9], [10, 9], [10, 14], [3, 14]])
    mask = np.zeros((20, 24), dtype=bool)
    mask[geometry.pixels_inside(shape, mask.shape)] = True
    assert mask.sum() == 14 * 7 + 7 * 5 and mask[2:9, 3:17].all()
    outline = geometry.outline_of(mask)
    assert geometry.polygon_iou([outline], [shape])[0, 0] > 0.97 and geometry.signed_area(outline) > 0
    assert geometry.outline_of(mask & False) is None
    assert len(geometry.pixels_inside(shape + 100, mask.shape)[0]) == 0


def test_smallest_rectangle_and_suppression():
    turned = np.array([[0.0, 5], [5, 0], [10, 5], [5, 10]])
    np.testing.assert_allclose(geometry.polygon_areas([geometry.rectangle_around(np.vstack([turned, [[5, 5]]]))]), [50])
    kept = geometry.polygon_nms([SQUARE, SQUARE + 1, SQUARE + 30], [0.5, 0.9, 0.1], 0.5)
    assert kept.tolist() == [1, 2]


def test_tidying_annotations():
    assert geometry.tidy_polygon([[0, 0], [5, 5], [10, 10]]) is None  # no area
    assert geometry.tidy_polygon([[0, 0], [5, 5]]) is None
    np.testing.assert_array_equal(geometry.tidy_polygon(SQUARE[[0, 3, 2, 1]]), SQUARE)  # turned round
    np.testing.assert_array_equal(geometry.tidy_polygon(SQUARE[[0, 2, 1, 3]]), SQUARE)  # crossed
    np.testing.assert_array_equal(geometry.tidy_polygon(np.vstack([SQUARE, SQUARE[:1]])), SQUARE)  # closed


# -- files -----------------------------------------------------------------------------------------------------------


def picture(path, width=40, height=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 120, np.uint8)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_icdar_2015(tmp_path):
    for number in (2, 10):
        picture(tmp_path / "ch4_training_images" / f"img_{number}.jpg")
    gt = tmp_path / "ch4_training_localization_transcription_gt"
    write(gt / "gt_img_2.txt", "\ufeff1,2,21,2,21,12,1,12,Hello, world\r\n5,15,15,15,15,20,5,20,###\r\n\r\n")
    write(gt / "gt_img_10.txt", "")
    data = open_text_regions(tmp_path, "train")
    assert len(data) == 2 and data.path(0).endswith("img_2.jpg")
    first, second = data[0], data[1]
    assert first["texts"] == ["Hello, world", "###"] and first["ignore"].tolist() == [False, True]
    assert torch.equal(first["polygons"][0], box(1, 2, 21, 12))
    assert first["image"].shape == (3, 30, 40)
    assert second["polygons"] == [] and second["ignore"].shape == (0,)
    with pytest.raises(DataError, match="split 'test'.*ch4_test_images"):
        open_text_regions(tmp_path, "test")


def test_icdar_2017_and_2013(tmp_path):
    mlt, focused = tmp_path / "mlt", tmp_path / "focused"
    picture(mlt / "ch8_training_images" / "img_1.png")
    gt = mlt / "ch8_training_localization_transcription_gt_v2" / "gt_img_1.txt"
    write(gt, "1,2,21,2,21,12,1,12,Latin,a,b\n1,15,9,15,9,20,1,20,Arabic,###\n")
    found = open_text_regions(mlt)[0]
    assert found["texts"] == ["a,b", "###"] and found["ignore"].tolist() == [False, True]
    picture(focused / "Challenge2_Test_Task12_Images" / "img_1.jpg")
    write(focused / "Challenge2_Test_Task1_GT" / "gt_img_1.txt", '3, 4, 20, 14, "Tiredness"\n5 16 30 25 "kills"\n')
    found = open_text_regions(focused, "test")[0]
    assert found["texts"] == ["Tiredness", "kills"] and torch.equal(found["polygons"][1], box(5, 16, 30, 25))


def test_total_text_in_both_forms(tmp_path):
    from scipy.io import savemat

    line = "x: [[ 2 12 22\n 22 12  2]], y: [[ 4  2  4 14 12 14]], ornt: [u'c'], transcriptions: [u'it''s']\n"
    dropped = "x: [[1 5 5 1]], y: [[20 20 25 25]], ornt: [u'#'], transcriptions: [u'#']\n"
    picture(tmp_path / "text" / "Images" / "Train" / "img11.jpg")
    write(tmp_path / "text" / "Groundtruth" / "Polygon" / "Train" / "poly_gt_img11.txt", line + dropped)
    found = open_text_regions(tmp_path / "text")[0]
    outline = polygon(2, 4, 12, 2, 22, 4, 22, 14, 12, 12, 2, 14)
    assert torch.equal(found["polygons"][0], outline)
    assert found["texts"] == ["it''s", "#"] and found["ignore"].tolist() == [False, True]

    rows = np.empty((3, 6), dtype=object)
    x, y = np.array([[2, 12, 22, 22, 12, 2]]), np.array([[4, 2, 4, 14, 12, 14]])
    rows[0] = ["x:", x, "y:", y, np.array(["text"]), np.array(["c"])]
    rows[1] = ["x:", x + 5, "y:", y + 9, np.array(["#"]), np.array(["#"])]
    rows[2] = ["x:", np.array([[3]]), "y:", np.array([[3]]), np.array(["#"]), np.array(["#"])]
    picture(tmp_path / "mat" / "Images" / "Test" / "img1.jpg")
    folder = tmp_path / "mat" / "Groundtruth" / "Polygon" / "Test"
    folder.mkdir(parents=True)
    savemat(folder / "poly_gt_img1.mat", {"polygt": rows})
    found = open_text_regions(tmp_path / "mat", "test")[0]
    assert torch.equal(found["polygons"][0], outline) and found["texts"] == ["text", "#"]
    assert found["ignore"].tolist() == [False, True]


def test_ctw1500_in_all_forms(tmp_path):
    upper, lower = [(i * 3, 0) for i in range(7)], [(i * 3, 9) for i in reversed(range(7))]
    points = [v for p in upper + lower for v in p]
    old, new = tmp_path / "old", tmp_path / "new"
    picture(old / "train" / "text_image" / "1.jpg")
    write(old / "train" / "text_label_curve" / "1.txt", ",".join(map(str, [4, 5, 22, 14, *points])))
    shifted = torch.tensor(points, dtype=torch.float32).reshape(-1, 2) + torch.tensor([4.0, 5.0])
    assert torch.equal(open_text_regions(old)[0]["polygons"][0], shifted)

    absolute = ",".join(str(int(v)) for v in shifted.flatten())
    picture(new / "train_images" / "0001.jpg")
    entry = f'<box height="9" left="4" top="5" width="18"><label>curved &amp; long</label><segs>{absolute}</segs></box>'
    write(new / "ctw1500_train_labels" / "0001.xml", f"<Annotations><image>{entry}</image></Annotations>")
    picture(new / "test_images" / "1001.jpg")
    write(new / "gt_ctw1500" / "0001001.txt", f"{absolute},####two words\n{absolute},#######\n")
    train, test = open_text_regions(new)[0], open_text_regions(new, "test")[0]
    assert torch.equal(train["polygons"][0], shifted) and train["texts"] == ["curved & long"]
    assert test["texts"] == ["two words", "###"] and test["ignore"].tolist() == [False, True]


def test_msra_td500(tmp_path):
    picture(tmp_path / "train" / "IMG_0030.JPG")
    write(tmp_path / "train" / "IMG_0030.gt", "0 0 5 6 20 10 0.0\n1 1 10 10 8 4 1.5707963\n")
    found = open_text_regions(tmp_path)[0]
    assert torch.equal(found["polygons"][0], box(5, 6, 25, 16)) and found["ignore"].tolist() == [False, True]
    torch.testing.assert_close(
        found["polygons"][1].amax(0), torch.tensor([16.0, 16.0])
    )  # 8 x 4 about (14, 12), upright


def test_coco_text_and_synth_text(tmp_path):
    from scipy.io import savemat

    coco, synth = tmp_path / "coco", tmp_path / "synth"
    picture(coco / "train2014" / "a.jpg")
    content = {
        "imgs": {
            "7": {"id": 7, "file_name": "a.jpg", "set": "train"},
            "8": {"id": 8, "file_name": "b.jpg", "set": "val"},
        },
        "anns": {
            "1": {"image_id": 7, "mask": [1, 2, 9, 2, 9, 8, 1, 8], "legibility": "legible", "utf8_string": "go"},
            "2": {"image_id": 7, "mask": [11, 2, 19, 2, 19, 8], "legibility": "illegible"},
            "3": {"image_id": 8, "mask": [1, 2, 9, 2, 9, 8]},
        },
    }
    write(coco / "cocotext.v2.json", json.dumps(content))
    found = open_text_regions(coco)[0]
    assert found["texts"] == ["go", ""] and found["ignore"].tolist() == [False, True] and len(found["polygons"][1]) == 3
    content["anns"]["2"]["mask"] = [1, 2, 3]
    write(coco / "cocotext.v2.json", json.dumps(content))
    with pytest.raises(DataError, match="annotation 2: 3 coordinates"):
        open_text_regions(coco)

    picture(synth / "8" / "ballet.jpg")
    boxes, names, texts = (np.empty((1, 1), dtype=object) for _ in range(3))
    boxes[0, 0] = np.stack([box(1, 2, 9, 8).numpy().T, box(11, 2, 19, 8).numpy().T], -1)
    names[0, 0], texts[0, 0] = np.array(["8/ballet.jpg"]), np.array(["one\n two"])
    savemat(synth / "gt.mat", {"wordBB": boxes, "imnames": names, "txt": texts})
    found = open_text_regions(synth)[0]
    assert found["texts"] == ["one", "two"] and torch.equal(found["polygons"][1], box(11, 2, 19, 8))


def test_a_csv_file(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    path = tmp_path / "texts.csv"
    with path.open("w", newline="") as file:
        rows = [
            ["image", "polygon", "text", "ignore", "split"],
            ["a.png", "1 1 9 1 9 5", "abc", "", "train"],
            ["a.png", "1 11 9 11 9 15", "x", "1", "train"],
            ["b.png", "", "", "", "test"],
        ]
        csv.writer(file).writerows(rows)
    found = open_text_regions(path)[0]
    assert found["texts"] == ["abc", "x"] and found["ignore"].tolist() == [False, True]
    assert open_text_regions(path, "test")[0]["polygons"] == []
    write(path, "image,polygon\na.png,1 1 9 1 nine 5\n")
    with pytest.raises(DataError, match="texts.csv: line 2: 'nine' is not a number"):
        open_text_regions(path)
    write(path, "image,outline\n")
    with pytest.raises(DataError, match="columns image and polygon"):
        open_text_regions(path)


@pytest.mark.parametrize(
    ("reader", "content", "problem"),
    [
        ("icdar_lines", "1,2,3,4,5,6,7,8,a\n1,2,3,x,5,6,7,8,b\n", "line 2: 'x' is not a number"),
        ("icdar_lines", "1,2,3,4\n", "line 1: 4 fields"),
        ("icdar_lines", "1,2,nan,4,5,6,7,8,a\n", "line 1: a coordinate is not a finite number"),
        ("icdar_boxes", "1,2,3\n", "line 1: 3 fields"),
        ("ctw_lines", "1,2,3,4\n", "line 1: 4 numbers"),
        ("ctw_lines", "1,2,3,4,5,####a\n", "line 1: 5 coordinates"),
        ("ctw_boxes", "<a><box><segs>1,2,x</segs></box></a>", "box 1: segs"),
        ("ctw_boxes", "<a><box>", "no XML"),
        ("total_text_lines", "x: [[1 2 3]], y: [[1 2]], ornt: [u'c'], transcriptions: [u'a']", "line 1: 3 x and 2 y"),
        ("total_text_lines", "1,2,3\n", "line 1: not of the form"),
        ("total_text_arrays", "nonsense", "no Matlab file"),
        ("td500_lines", "0 0 1 2 3\n", "line 1: 5 numbers"),
    ],
)
def test_wrong_lines_are_named(tmp_path, reader, content, problem):
    path = write(tmp_path / "gt.txt", content)
    with pytest.raises(DataError, match=f"gt.txt: .*{problem}"):
        getattr(text_annotations, reader)(path)


def test_missing_places_are_named(tmp_path):
    picture(tmp_path / "ch4_test_images" / "img_1.jpg")
    picture(tmp_path / "ch4_test_images" / "img_2.jpg")
    write(tmp_path / "Challenge4_Test_Task1_GT" / "gt_img_1.txt", "1,2,3,4,5,6,7,8,a\n")
    with pytest.raises(DataError, match="gt_img_2.txt: no such file; img_2.jpg"):
        open_text_regions(tmp_path, "test")
    with pytest.raises(DataError, match="no such folder"):
        open_text_regions(tmp_path / "nowhere")
    with pytest.raises(PaperZooError, match="split 'dev'"):
        open_text_regions(tmp_path, "dev")
    write(tmp_path / "latin.txt", "").write_bytes(b"1,2,3,4,5,6,7,8,\xe9\n")
    with pytest.raises(DataError, match="no UTF-8"):
        text_annotations.icdar_lines(tmp_path / "latin.txt")


def test_odd_outlines_are_dropped_or_put_in_order():
    regions = [
        text_annotations.Region(np.array([[5.0, 5], [9, 9], [13, 13]]), "flat", False),
        text_annotations.Region(SQUARE + 100, "outside", False),
        text_annotations.Region(SQUARE - 5, "across the edge", True),
        text_annotations.Region(SQUARE[[0, 2, 1, 3]] + 10, "crossed", False),
    ]
    found = item(torch.zeros(3, 30, 40, dtype=torch.uint8), regions, 3)
    assert found["texts"] == ["across the edge", "crossed"] and found["ignore"].tolist() == [True, False]
    assert torch.equal(found["polygons"][1], box(10, 10, 20, 20)) and found["polygons"][0].min() == -5


# -- the measure -----------------------------------------------------------------------------------------------------


def test_the_measure_by_hand():
    truth = [box(0, 0, 10, 10), box(20, 0, 30, 10), box(40, 0, 60, 10)]
    ignore = torch.tensor([False, False, True])
    found = [box(1, 0, 11, 10), box(0, 0, 10, 9), box(41, 0, 50, 10), box(20, 0, 24, 10)]
    # the first covers 90 of 110; the second too, but the text is taken; the third lies in what is ignored; the fourth has 0.4
    matches = TextMatches()
    matches.update(found, truth, ignore)
    assert matches.compute() == {"precision": 1 / 3, "recall": 1 / 2, "hmean": pytest.approx(0.4)}
    matches.update([], [], torch.zeros(0, dtype=torch.bool))
    matches.update([box(0, 0, 5, 5)], [], torch.zeros(0, dtype=torch.bool))
    assert matches.compute()["precision"] == 1 / 4


def test_an_overlap_of_just_a_half_does_not_match():
    pairs, counted = match_regions([box(0, 0, 5, 10)], [box(0, 0, 10, 10)], torch.tensor([False]))
    assert pairs == [] and counted.tolist() == [True]
    assert match_regions([box(0, 0, 5.1, 10)], [box(0, 0, 10, 10)], torch.tensor([False]))[0] == [(0, 0)]
    # half inside of something ignored: still counted
    assert match_regions([box(0, 0, 10, 10)], [box(5, 0, 20, 10)], torch.tensor([True]))[1].tolist() == [True]
    assert match_regions([box(0, 0, 10, 10)], [box(4.9, 0, 20, 10)], torch.tensor([True]))[1].tolist() == [False]


def test_nothing_found_and_nothing_there():
    assert TextMatches().compute() == {"precision": 0.0, "recall": 0.0, "hmean": 0.0}
    matches = TextMatches()
    matches.update([], [box(0, 0, 4, 4)], torch.tensor([False]))
    assert matches.compute()["recall"] == 0.0


def clipped_area(a, b):
    """The area of the intersection of two convex clockwise polygons, by cutting the one along the sides of the other."""
    points = [tuple(p) for p in a]
    for (x1, y1), (x2, y2) in zip(b, np.roll(b, -1, axis=0), strict=True):
        kept = []
        for p, q in zip(points, points[1:] + points[:1], strict=True):
            sp, sq = ((x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) for x, y in (p, q))
            if sp >= 0:
                kept.append(p)
            if sp * sq < 0:
                t = sp / (sp - sq)
                kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        points = kept
        if not points:
            return 0.0
    return geometry.signed_area(np.array(points))


def slow_measure(pictures):
    """The official script, line by line: areas by clipping."""
    matched = texts = findings = 0
    for found, truth, ignore in pictures:
        dont_care = set()
        for d, detection in enumerate(found):
            for t, region in enumerate(truth):
                if ignore[t] and clipped_area(detection, region) / geometry.signed_area(detection) > 0.5:
                    dont_care.add(d)
        taken_truth, taken_found = set(), set()
        for t, region in enumerate(truth):
            for d, detection in enumerate(found):
                if t in taken_truth or d in taken_found or ignore[t] or d in dont_care:
                    continue
                shared = clipped_area(detection, region)
                if shared / (geometry.signed_area(detection) + geometry.signed_area(region) - shared) > 0.5:
                    taken_truth.add(t)
                    taken_found.add(d)
                    matched += 1
        texts += len(truth) - sum(ignore)
        findings += len(found) - len(dont_care)
    precision, recall = matched / findings, matched / texts
    return {"precision": precision, "recall": recall, "hmean": 2 * precision * recall / (precision + recall)}


def test_the_measure_against_the_official_script_written_out():
    rng, matches, pictures = np.random.RandomState(0), TextMatches(), []
    for _ in range(25):
        corners = rng.uniform(0, 60, (rng.randint(1, 6), 1, 2))
        truth = corners + (SQUARE * (2, 1) + rng.uniform(-2, 2, (len(corners), 4, 2)))
        near = truth + rng.uniform(-4, 4, (len(truth), 1, 2))
        found = np.concatenate([near, near[: len(near) // 2] + 1, rng.uniform(0, 60, (2, 1, 2)) + SQUARE])
        ignore = (rng.rand(len(truth)) < 0.3).tolist()
        pictures.append((found, truth, ignore))
        matches.update([torch.tensor(p) for p in found], [torch.tensor(p) for p in truth], torch.tensor(ignore))
    expected = slow_measure(pictures)
    assert 0.2 < expected["hmean"] < 0.9
    assert matches.compute() == pytest.approx(expected)


# -- crops, batches, the recipe --------------------------------------------------------------------------------------


def test_a_crop_moves_the_polygons_with_the_picture():
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    image[:, 30:60, 40:90] = 255
    config = Config(image_size=90, crop_size=96, scale=(0.8, 1.2), rotate=20.0)
    for seed in range(12):
        torch.manual_seed(seed)
        cut, (moved,) = text_detection.random_crop(image, [box(40, 30, 90, 60)], config)
        assert cut.shape == (3, 96, 96)
        inside = torch.zeros(96, 96, dtype=torch.bool)
        inside[geometry.pixels_inside(moved, (96, 96))] = True
        assert ((cut[0] > 127) != inside).sum() < 90  # the outline's pixels
        assert geometry.signed_area(moved.numpy()) > 0


def test_a_crop_without_chance_is_the_picture_itself():
    scene = text_scene(0, size=64)
    config = Config(image_size=64, crop_size=64, scale=(1.0, 1.0), rotate=0.0, flip=0.0)
    cut, polygons = text_detection.random_crop(scene["image"], scene["polygons"], config)
    assert torch.equal(cut, scene["image"])
    torch.testing.assert_close(polygons, scene["polygons"])


def test_a_crop_drops_what_it_does_not_show(tmp_path):
    picture(tmp_path / "a.png", 100, 30)
    write(
        tmp_path / "t.csv",
        "image,polygon,text,split\na.png,1 1 9 1 9 9 1 9,left,train\na.png,91 1 99 1 99 9,right,train\n",
    )
    config = Config(image_size=30, crop_size=32, scale=(1.0, 1.0), rotate=0.0, flip=0.0, aim=0.0, jitter=False)
    data = Prepared(
        open_text_regions(tmp_path / "t.csv"), config, {"mean": [0.0] * 3, "deviation": [1.0] * 3}, train=True
    )
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        sample = data[0]
        assert len(sample["polygons"]) == len(sample["texts"]) == len(sample["ignore"]) <= 1
        seen |= set(sample["texts"])
    assert seen == {"left", "right"}


def test_batches_hold_what_the_network_encodes():
    def encode(target, canvas):
        return {"count": torch.tensor(len(target["polygons"])), "canvas": torch.tensor(canvas)}

    samples = [
        {
            "image": torch.ones(3, 20, 40),
            "polygons": [box(1, 1, 5, 5)],
            "ignore": torch.tensor([True]),
            "texts": ["###"],
        },
        {"image": torch.ones(3, 33, 10), "polygons": [], "ignore": torch.zeros(0, dtype=torch.bool), "texts": []},
    ]
    batch = Collate(32, encode)(samples)
    assert batch["images"].shape == (2, 3, 64, 64) and batch["sizes"].tolist() == [[20, 40], [33, 10]]
    assert [int(t["count"]) for t in batch["targets"]] == [1, 0] and batch["targets"][0]["canvas"].tolist() == [64, 64]


def test_predictions_can_be_cut_and_drawn():
    regions = TextRegions(
        [[(1.0, 1.0), (30.0, 2.0), (30.0, 12.0)], [(0.0, 0.0), (2.0, 0.0), (2.0, 2.0)]], [0.9, 0.2], ["go", ""]
    )
    assert regions.above(0.5) == TextRegions(regions.polygons[:1], [0.9], ["go"])
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    assert text_detection.drawn(image, regions.polygons, regions.texts, [False, True]).size == (320, 160)
    assert text_detection.drawn(image, []).size == (320, 160)


def test_the_recipe_on_a_picture_without_text(tmp_path):
    from paperzoo.engine.runtime import Runtime

    for name, text in (("a", "2 2 30 2 30 12 2 12"), ("b", "")):
        picture(tmp_path / f"{name}.png", 64, 48)
        with (tmp_path / "t.csv").open("a") as file:
            file.write(("image,polygon,split\n" if name == "a" else "") + f"{name}.png,{text},train\n")
    write(tmp_path / "v.csv", (tmp_path / "t.csv").read_text().replace("train", "test"))
    config = Config(
        model="pan",
        model_arguments={"backbone": "mobilenetv1_025", "channels": 8, "min_score": 0.1},
        data=str(tmp_path / "t.csv"),
        image_size=48,
        crop_size=64,
        batch_size=2,
        steps=2,
    )
    recipe = text_detection.TextDetectionRecipe(config, Runtime())
    recipe.runtime.begin()
    losses = recipe.step(recipe.batch())
    assert torch.isfinite(losses["loss"]) and set(losses) >= {"text_loss", "kernel_loss", "aggregation_loss"}
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in recipe.model.parameters() if p.grad is not None)
    (found,) = recipe.predict([np.zeros((31, 50, 3), np.uint8)])
    assert isinstance(found, TextRegions) and len(found.polygons) == len(found.scores)
    assert recipe.rate(0) == 1.0 and recipe.rate(1) == pytest.approx(0.5**0.9)
    recipe.__dict__["test_data"] = Prepared(
        open_text_regions(tmp_path / "v.csv", "test"), config, recipe.facts, train=False
    )
    assert set(recipe.evaluate()) == {"precision", "recall", "hmean"}
