"""Detection's data: readers of COCO, Pascal VOC and YOLO's text files, digit scenes, shape scenes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou, masks_to_boxes

from paperzoo.data.coco import VocDetection, open_detection
from paperzoo.data.scenes import digit_scans, digit_scenes
from paperzoo.data.shape_scenes import LABELS, ShapeScenes, shape_scenes
from paperzoo.data.yolo_text import YoloText, label_file
from paperzoo.errors import DataError, MissingExtra, PaperZooError
from paperzoo.tasks.detection import Config, Prepared


class Half:
    """Just enough of a recipe for `Prepared`."""

    config = Config(image_sizes=(60, 60), longest_side=70, augment="flip")
    facts = {"labels": ["dog", "cup"], "mean": [0.5] * 3, "deviation": [0.5] * 3}


class Shapes(Half):
    config = Config(image_sizes=(64,), longest_side=64)
    facts = Half.facts | {"labels": LABELS}


# -- folders on disk -------------------------------------------------------------------------------------------------


def picture(path, width=40, height=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 120, np.uint8)).save(path)


def coco_content():
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "empty.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 10, 5], "area": 33.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [30, 20, 20, 20], "area": 400, "iscrowd": 1},
            {"id": 3, "image_id": 3, "category_id": 5, "bbox": [0, 0, 4, 4]},
            {"id": 4, "image_id": 3, "category_id": 5, "bbox": [5, 5, 0, 4], "area": 0, "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "cup"}, {"id": 5, "name": "dog"}],
    }


@pytest.fixture
def coco(tmp_path):
    for name in ("a", "b", "empty"):
        picture(tmp_path / "train2017" / f"{name}.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(coco_content()))
    return tmp_path


@pytest.fixture
def voc(tmp_path):
    objects = """<object><name>dog</name><difficult>0</difficult>
        <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>30</ymax></bndbox></object>
        <object><name>cat</name><difficult>1</difficult>
        <bndbox><xmin>5</xmin><ymin>5</ymin><xmax>6.0</xmax><ymax>9</ymax></bndbox></object>"""
    (tmp_path / "Annotations").mkdir()
    for name in ("one", "two"):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("one\n")
    (lists / "val.txt").write_text("two\n")
    return tmp_path


def write(root, content):
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


# -- COCO ------------------------------------------------------------------------------------------------------------


def test_coco_boxes_labels_crowd_and_area(coco):
    data = open_detection(coco, "train")
    assert data.labels == ["dog", "cup"] and data.category_ids == [5, 90]
    item = data[1]
    assert item["id"] == 3 and item["image"].shape == (3, 30, 40)
    assert item["boxes"].tolist() == [[1, 2, 11, 7], [0, 0, 4, 4]]  # the box without width is dropped
    assert item["labels"].tolist() == [1, 0]
    assert item["area"].tolist() == [33.5, 16.0]
    crowd = data[0]
    assert crowd["crowd"].tolist() == [True]
    assert crowd["boxes"].tolist() == [[30, 20, 40, 30]]  # cut to the image


def test_coco_image_without_objects_is_an_empty_sample(coco):
    item = open_detection(coco, "train")[2]
    assert item["boxes"].shape == (0, 4) and item["labels"].dtype == torch.int64


def test_coco_export_with_annotations_beside_the_images(coco):
    (coco / "valid").mkdir()
    (coco / "valid" / "_annotations.coco.json").write_text(json.dumps(coco_content()))
    assert len(open_detection(coco, "test")) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 1: has no 'bbox'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1: bbox [1, 2, 3]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "annotation 1: bbox"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "annotation 1: bbox"),
        (lambda c: c["annotations"][1].update(category_id=6), "annotation 2: category_id 6"),
        (lambda c: c["annotations"][1].update(image_id=[7]), "annotation 2: image_id [7]"),
        (lambda c: c["annotations"].append("x"), "annotation number 5: is 'x'"),
        (lambda c: c["images"][0].pop("file_name"), "file_name"),
        (lambda c: c["images"][0].update(id=3), "two image entries"),
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c.update(images=[], annotations=[]), "lists no images"),
    ],
)
def test_coco_mistake_is_named(coco, change, words):
    content = coco_content()
    change(content)
    write(coco, content)
    with pytest.raises(DataError) as caught:
        open_detection(coco, "train")
    assert words in str(caught.value) and "instances_train2017.json" in str(caught.value)


def test_coco_file_that_is_no_json_names_the_line(coco):
    (coco / "annotations" / "instances_train2017.json").write_text('{"images": [\n,')
    with pytest.raises(DataError, match="line 2"):
        open_detection(coco, "train")


def test_coco_broken_missing_and_mis_sized_pictures_raise_when_asked_for(coco):
    data = open_detection(coco, "train")
    (coco / "train2017" / "a.png").write_bytes(b"no picture")
    (coco / "train2017" / "b.png").unlink()
    picture(coco / "train2017" / "empty.png", 30, 40)
    for row, name in ((0, "b.png"), (1, "a.png"), (2, "empty.png")):
        with pytest.raises(DataError, match=name):
            data[row]


@pytest.mark.parametrize("bbox", [[0, 0, 0, 9], [3, 4, 9, 0], [50, 5, 9, 9], [-20, 5, 10, 10], [5, 40, 3, 3]])
def test_coco_annotations_without_area_or_outside_of_the_image_are_dropped(coco, bbox):
    content = coco_content()
    content["annotations"] = [content["annotations"][0] | {"bbox": bbox}]
    write(coco, content)
    item = open_detection(coco, "train")[1]
    assert all(len(item[key]) == 0 for key in ("boxes", "labels", "crowd", "area"))


def test_coco_boxes_of_a_pixel_and_across_the_border_are_kept_and_cut(coco):
    content = coco_content()
    content["annotations"] = [
        content["annotations"][2] | {"id": i, "bbox": box} for i, box in enumerate(([7, 8, 1, 1], [-5, 25, 10, 90]))
    ]
    write(coco, content)
    data = open_detection(coco, "train")
    assert data[1]["boxes"].tolist() == [[7, 8, 8, 9], [0, 25, 5, 30]]
    assert Prepared(data, Half, train=True)[1]["boxes"].shape == (2, 4)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "I;16"])
def test_coco_pictures_of_every_kind_become_rgb(coco, mode):
    values = np.full((30, 40), 128, np.uint8)
    if mode == "I;16":
        image, name = Image.fromarray(values.astype(np.uint16) * 257), "a.png"
    else:
        image = Image.fromarray(np.stack([values] * 3, -1)).convert(mode, palette=Image.Palette.ADAPTIVE)
        name = "a.tif" if mode == "CMYK" else "a.png"
    image.save(coco / "train2017" / name)
    content = coco_content()
    content["images"][1]["file_name"] = name
    write(coco, content)
    picture = open_detection(coco, "train")[1]["image"]
    assert picture.shape == (3, 30, 40) and picture.dtype == torch.uint8
    if mode != "1":
        assert (picture.float() - 128).abs().max() <= 2


def test_coco_picture_is_turned_upright_and_boxes_of_the_lying_one_are_refused(coco):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    lying = Image.fromarray(np.full((40, 30, 3), 99, np.uint8))
    lying.save(coco / "train2017" / "a.png", exif=exif)
    assert open_detection(coco, "train")[1]["image"].shape == (3, 30, 40)
    content = coco_content()
    content["images"][1] |= {"width": 30, "height": 40}
    write(coco, content)
    with pytest.raises(DataError, match=r"a\.png: is 40x30 pixels, but instances_train2017\.json says 30x40") as caught:
        open_detection(coco, "train")[1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["missing", "annotations"])
def test_folder_that_is_no_data_set(coco, place):
    with pytest.raises(DataError, match=place):
        open_detection(coco / place, "train")


def test_coco_split_that_is_not_there(coco):
    with pytest.raises(DataError, match="instances_val"):
        open_detection(coco, "test")


def test_unknown_split():
    with pytest.raises(PaperZooError, match="train or test"):
        open_detection("digit_scenes", "half")


# -- Pascal VOC ------------------------------------------------------------------------------------------------------


def test_voc_counts_from_one_and_marks_difficult(voc):
    data = open_detection(voc, "train")
    assert data.names == ["one"] and data.labels[11] == "dog" and len(data.labels) == 20
    item = data[0]
    assert item["boxes"].tolist() == [[0, 1, 10, 30], [4, 4, 6, 9]]
    assert [data.labels[k] for k in item["labels"]] == ["dog", "cat"]
    assert item["crowd"].tolist() == [False, True]
    assert open_detection(voc, "test").names == ["two"]


def test_voc_own_classes_are_found(voc):
    (voc / "Annotations" / "two.xml").write_text("<annotation><object><name>crab</name></object></annotation>")
    data = VocDetection(voc, ["one", "two"], None)
    assert data.labels == ["cat", "crab", "dog"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation><object>", "is no XML"),
        ("<annotation><object><name>dog</name></object></annotation>", "no bndbox"),
        ("<annotation><object><name>yeti</name></object></annotation>", "yeti"),
        (
            "<annotation><object><name>dog</name><bndbox><xmin>9</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax></bndbox>"
            "</object></annotation>",
            "no box",
        ),
    ],
)
def test_voc_mistake_is_named(voc, text, words):
    (voc / "Annotations" / "one.xml").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        VocDetection(voc, ["one"], ["dog", "cat"])[0]
    assert "one.xml" in str(caught.value)


# -- YOLO's text files -----------------------------------------------------------------------------------------------


@pytest.fixture
def yolo(tmp_path):
    rows = {"a": "1 0.5 0.5 0.25 0.2\n\n0 0.1 0.1 0.4 0.4\n", "b": "0 0.25 0.2 0.75 0.2 0.75 0.8\n", "c": None, "d": ""}
    for name, text in rows.items():
        picture(tmp_path / "images" / "train" / f"{name}.jpg")
        if text is not None:
            path = tmp_path / "labels" / "train" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    picture(tmp_path / "images" / "val" / "e.png")
    (tmp_path / "labels" / "val").mkdir()
    (tmp_path / "labels" / "val" / "e.txt").write_text("1 0.5 0.5 1 1")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: dog, 1: cup}\n")
    return tmp_path


def test_yolo_boxes_polygons_and_images_without_objects(yolo):
    data = open_detection(yolo, "train")
    assert isinstance(data, YoloText) and data.labels == ["dog", "cup"] and len(data) == 4
    boxes, polygon, missing, empty = (data[i] for i in range(4))
    torch.testing.assert_close(boxes["boxes"], torch.tensor([[15.0, 12, 25, 18], [0, 0, 12, 9]]))  # the second is cut
    assert boxes["labels"].tolist() == [1, 0] and not boxes["crowd"].any()
    torch.testing.assert_close(polygon["boxes"], torch.tensor([[10.0, 6, 30, 24]]))
    assert float(polygon["area"]) == pytest.approx(180)  # half of 20 by 18 pixels
    assert len(missing["boxes"]) == len(empty["boxes"]) == 0
    assert open_detection(yolo / "data.yaml", "test")[0]["boxes"].tolist() == [[0, 0, 40, 30]]


def test_yolo_lists_of_places_relative_exports_and_lists_of_names(yolo):
    (yolo / "list.txt").write_text("./images/train/b.jpg\n./images/train/a.jpg\n")
    (yolo / "data.yaml").rename(yolo / "data.yml")
    text = "path: /made/on/another/machine\ntrain: [list.txt, ../images/val]\nvalid: images/val\nnc: 2\nnames: [dog, cup]\n"
    (yolo / "data.yml").write_text(text)
    data = open_detection(yolo, "train")
    assert [p.name for p in data.images] == ["b.jpg", "a.jpg", "e.png"] and len(open_detection(yolo, "test")) == 1
    assert label_file(data.images[0]).is_file()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.2", "4 numbers"),
        ("0 0.5 0.5 0.2 0.2 0.9", "6 numbers"),
        ("2 0.5 0.5 0.2 0.2", "class 2; the 2 classes"),
        ("-1 0.5 0.5 0.2 0.2", "class -1"),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5"),
        ("0 20 14 10 5", "leaves 0 … 1"),
        ("0 0.5 0.5 -0.2 0.2", "leaves 0 … 1"),
        ("0 0.5 nan 0.2 0.2", "not finite"),
        ("dog 0.5 0.5 0.2 0.2", "not all numbers"),
    ],
)
def test_yolo_wrong_line_is_named_with_its_file(yolo, line, words):
    (yolo / "labels" / "train" / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    data = open_detection(yolo, "train")
    with pytest.raises(DataError, match="line 2") as caught:
        data[0]
    assert words in str(caught.value) and "a.txt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: images/train\nval: images/val\n", "no 'names'"),
        ("train: images/train\nnames: {0: dog, 2: cup}\n", "without a gap"),
        ("train: images/train\nnc: 3\nnames: [dog, cup]\n", "nc is 3"),
        ("val: images/val\nnames: [dog, cup]\n", "no entry for the split 'train'"),
        ("train: images/gone\nnames: [dog, cup]\n", "does not exist"),
        ("train: labels\nnames: [dog, cup]\n", "no images in labels"),
        ("train: [images/train\nnames: [dog", "line 2"),
        ("- 1\n", "no mapping"),
    ],
)
def test_yolo_mistake_in_data_yaml_is_named(yolo, text, words):
    (yolo / "data.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        open_detection(yolo, "train")
    assert words in str(caught.value) and "data.yaml" in str(caught.value)


def test_yolo_images_without_any_text_file_are_refused(yolo):
    (yolo / "labels").rename(yolo / "elsewhere")
    with pytest.raises(DataError, match=r"labels.train.a\.txt"):
        open_detection(yolo, "train")


def test_yolo_without_the_yaml_package_names_the_extra(yolo, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtra, match=r"paperzoo\[detection\]"):
        open_detection(yolo, "train")


# -- digit scenes ----------------------------------------------------------------------------------------------------


def test_scenes_boxes_are_tight_around_masks():
    for scene in digit_scenes(20, size=64, seed=3):
        inclusive = masks_to_boxes(scene["masks"])
        assert torch.equal(scene["boxes"], inclusive + torch.tensor([0, 0, 1, 1]))
        assert len(scene["labels"]) == len(scene["boxes"]) >= 1
        assert scene["masks"].sum(0).max() == 1  # no pixel belongs to two digits


def test_scenes_follow_from_the_seed_and_do_not_depend_on_the_count():
    few, many = digit_scenes(3, size=64, seed=5), digit_scenes(70, size=64, seed=5)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(few, many[:3], strict=True))
    assert not torch.equal(few[0]["image"], digit_scenes(1, size=64, seed=6)[0]["image"])


def test_scenes_splits_share_no_scan():
    train, test = digit_scans("train")[0], digit_scans("test")[0]
    assert len(train) + len(test) == 1797
    same = (train.flatten(1)[:, None] == test.flatten(1)[None]).all(-1)
    assert not same.any()


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"size": 8}, {"split": "all"}, {"scale": (0.5, 0.2)}, {"max_objects": 0}]
)
def test_scenes_refuse(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        digit_scenes(**{"count": 1} | wrong)


# -- shape scenes ----------------------------------------------------------------------------------------------------


def test_shapes_boxes_are_tight_around_what_is_visible():
    for scene in shape_scenes(40, size=64, seed=3):
        count = len(scene["boxes"])
        assert all(len(scene[key]) == count for key in ("labels", "masks", "crowd"))
        if count:
            assert torch.equal(scene["boxes"], masks_to_boxes(scene["masks"]) + torch.tensor([0, 0, 1, 1]))
            assert scene["masks"].sum(0).max() == 1  # no pixel belongs to two objects


def test_shapes_have_every_special_case_in_both_splits():
    for split in ("train", "test"):
        scenes = shape_scenes(128, size=96, split=split)
        extent = torch.cat([s["boxes"][:, 2:] - s["boxes"][:, :2] for s in scenes])
        labels = torch.cat([s["labels"] for s in scenes])
        assert sum(len(s["boxes"]) == 0 for s in scenes) >= 5
        assert sum(bool(s["crowd"].any()) for s in scenes) >= 10
        assert int((extent == 1).all(1).sum()) >= 5
        assert set(labels.tolist()) == set(range(len(LABELS)))
        pairs = [box_iou(s["boxes"], s["boxes"]).fill_diagonal_(0).flatten() for s in scenes]
        assert int((torch.cat(pairs) > 0.02).sum()) >= 20  # objects hide parts of one another


def test_shapes_have_the_area_of_their_equations():
    from paperzoo.data.shape_scenes import _shapes

    at = (torch.arange(400) + 0.5) / 200 - 1
    v, u = torch.meshgrid(at, at, indexing="ij")
    inside = _shapes(u.expand(6, -1, -1), v.expand(6, -1, -1), torch.arange(6)) < 0
    area = inside.float().mean((1, 2)) * 4
    star = 10 * 0.5 * 0.45 * np.sin(np.pi / 5)
    cross = 2 * 1.9 * 0.56 - 0.56**2
    expected = [np.pi, 3 * np.sqrt(3) / 4, 2, star, cross, np.pi * (1 - 0.55**2)]
    torch.testing.assert_close(area, torch.tensor(expected, dtype=torch.float32), rtol=0.02, atol=0)


def test_shapes_follow_from_the_seed_and_do_not_depend_on_the_count():
    few, many = shape_scenes(3, size=64, seed=5), shape_scenes(70, size=64, seed=5)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(few, many[:3], strict=True))
    assert not torch.equal(few[0]["image"], shape_scenes(1, size=64, seed=6)[0]["image"])
    assert not torch.equal(few[0]["image"], shape_scenes(1, size=64, seed=5, split="test")[0]["image"])


def test_shapes_as_data_say_which_regions_are_crowds():
    data = open_detection("shape_scenes", "train", count=64, size=64)
    assert isinstance(data, ShapeScenes) and data.labels == LABELS
    crowd = next(i for i in range(64) if data[i]["crowd"].any())
    item = data[crowd]
    assert (
        item["area"][item["crowd"]].item() < (item["boxes"][:, 2:] - item["boxes"][:, :2]).prod(1)[item["crowd"]].item()
    )
    assert len(Prepared(data, Shapes, train=True)[crowd]["boxes"]) == int((~item["crowd"]).sum())


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"size": 8}, {"split": "all"}, {"scale": (0.5, 0.2)}, {"max_objects": 0}]
)
def test_shapes_refuse(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        shape_scenes(**{"count": 1} | wrong)
