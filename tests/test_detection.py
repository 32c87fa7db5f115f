"""Detection: readers of COCO and Pascal VOC, digit scenes, box coding and matching, the task's recipe."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou, masks_to_boxes

from paperzoo.blocks.boxes import (
    BACKGROUND,
    IGNORED,
    AnchorGenerator,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    flatten_predictions,
    join_boxes,
    match_anchors,
    pad_images,
    sample_anchors,
)
from paperzoo.data.coco import CocoDetection, VocDetection, open_detection
from paperzoo.data.scenes import digit_scans, digit_scenes
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.detection import Collate, Config, Detection, Prepared, coco_numbers, drawn, resized, to_network

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


# -- boxes -----------------------------------------------------------------------------------------------------------


def random_boxes(*shape):
    corner = torch.rand(*shape, 2) * 50
    return torch.cat([corner, corner + torch.rand(*shape, 2) * 40 + 2], dim=-1)


def test_box_coding_round_trip_with_weights():
    torch.manual_seed(0)
    boxes, anchors, weights = random_boxes(2, 30), random_boxes(30), (10.0, 10.0, 5.0, 5.0)
    again = decode_boxes(encode_boxes(boxes, anchors, weights), anchors, weights)
    torch.testing.assert_close(again, boxes, rtol=1e-4, atol=1e-3)


def test_box_coding_by_hand():
    anchor, box = torch.tensor([0.0, 0, 10, 20]), torch.tensor([5.0, 10, 25, 20])
    expected = torch.tensor([1.0, 0.25, np.log(2), np.log(0.5)], dtype=torch.float32)
    torch.testing.assert_close(encode_boxes(box, anchor), expected)


def test_decoded_boxes_stay_finite():
    assert decode_boxes(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 8, 8]])).isfinite().all()


def slow_match(boxes, anchors, high, low):
    overlap = box_iou(boxes, anchors)
    result = []
    for j in range(len(anchors)):
        value, row = overlap[:, j].max(0)
        result.append(int(row) if value >= high else BACKGROUND if value < low else IGNORED)
    for i in range(len(boxes)):
        for j in range(len(anchors)):
            if overlap[i, j] == overlap[i].max() and overlap[i, j] > 0:
                result[j] = int(overlap[:, j].argmax())
    return result


def test_matching_a_batch_equals_the_slow_version():
    torch.manual_seed(1)
    anchors = random_boxes(60)
    targets = [{"boxes": random_boxes(n)} for n in (3, 0, 5)]
    boxes, owner = join_boxes(targets)
    matched = match_anchors(boxes, owner, 3, anchors, 0.5, 0.4)
    first = 0
    for row, target in zip(matched.tolist(), targets, strict=True):
        if not len(target["boxes"]):
            assert set(row) == {BACKGROUND}
            continue
        slow = slow_match(target["boxes"], anchors, 0.5, 0.4)
        assert row == [k + first if k >= 0 else k for k in slow]
        first += len(target["boxes"])


def test_matching_without_any_box():
    boxes, owner = join_boxes([{"boxes": torch.zeros(0, 4)}] * 2)
    assert match_anchors(boxes, owner, 2, random_boxes(5), 0.5, 0.4).tolist() == [[BACKGROUND] * 5] * 2


def test_sampling_fills_up_with_background_and_respects_the_part():
    torch.manual_seed(0)
    matched = torch.full((2, 500), BACKGROUND)
    matched[0, :300], matched[1, :10], matched[1, 10:20] = 4, 2, IGNORED
    positive, negative = sample_anchors(matched, 256, 0.5)
    assert positive.sum(1).tolist() == [128, 10] and negative.sum(1).tolist() == [128, 246]
    assert bool((matched[positive] >= 0).all()) and bool((matched[negative] == BACKGROUND).all())


def test_anchors_cover_every_level_in_order():
    anchors = AnchorGenerator((8, 16), [(16,), (32,)], ratios=(1.0,))
    assert anchors.counts(20, 33) == [3 * 5, 2 * 3]
    made = anchors(20, 33)
    assert made[0].tolist() == [-8, -8, 8, 8] and made[15].tolist() == [-16, -16, 16, 16]
    with pytest.raises(ValueError, match="levels"):
        AnchorGenerator((8,), [(1,), (2,)])


def test_clipping_uses_each_images_own_size():
    boxes = torch.tensor([[[-5.0, -5, 99, 99]], [[-5.0, -5, 99, 99]]])
    clipped = clip_boxes(boxes, torch.tensor([[20, 30], [40, 10]]))
    assert clipped[:, 0].tolist() == [[0, 0, 30, 20], [0, 0, 10, 40]]


def test_flattened_predictions_go_row_by_row_then_anchor_by_anchor():
    level = torch.arange(2 * 6 * 2 * 3).reshape(2, 6, 2, 3).float()  # 3 anchors of 2 values
    flat = flatten_predictions([level], 2)
    assert flat.shape == (2, 18, 2)
    assert flat[0, 4].tolist() == level[0, 2:4, 0, 1].tolist()  # second cell, second anchor


def test_padding():
    batch = pad_images([torch.ones(3, 30, 40), torch.ones(3, 33, 10)], 32)
    assert batch.shape == (2, 3, 64, 64) and batch[1, :, :, 10:].abs().sum() == 0


# -- the task --------------------------------------------------------------------------------------------------------


class Half:
    """Just enough of a recipe for `Prepared`."""

    config = Config(image_sizes=(60, 60), longest_side=70, augment="flip")
    facts = {"labels": ["dog", "cup"], "mean": [0.5] * 3, "deviation": [0.5] * 3}


def test_samples_leave_crowds_out_of_learning_and_keep_them_for_evaluation(coco):
    data = open_detection(coco, "train")
    learn, judge = Prepared(data, Half, train=True)[0], Prepared(data, Half, train=False)[0]
    assert len(learn["boxes"]) == 0
    assert judge["truth"]["iscrowd"].tolist() == [1] and judge["truth"]["size"].tolist() == [30, 40]


def test_samples_resize_boxes_with_the_image(coco):
    sample = Prepared(open_detection(coco, "train"), Half, train=False)
    image = sample[1]["image"]
    assert image.shape == (3, 52, 70)  # 30x40 by 1.75, as 60 / 30 would make the long side 80
    learned = Prepared(open_detection(coco, "train"), Half, train=True)[1]
    assert learned["boxes"][:, 2:].max() <= 70 and learned["boxes"].dtype == torch.float32
    torch.testing.assert_close(learned["boxes"][0, 3], torch.tensor(7 * 52 / 30))


def test_batches_are_padded_and_say_how_large_images_are(coco):
    data = Prepared(open_detection(coco, "train"), Half, train=True)
    batch = Collate(32)([data[0], data[1], data[2]])
    assert batch["images"].shape == (3, 3, 64, 96) and batch["sizes"].tolist() == [[52, 70]] * 3
    assert [len(t["boxes"]) for t in batch["targets"]] == [0, 2, 0]


def test_class_that_was_not_learned_is_refused(coco):
    half = type("Other", (Half,), {"facts": Half.facts | {"labels": ["dog"]}})
    with pytest.raises(DataError, match="cup"):
        Prepared(open_detection(coco, "train"), half, train=False)


def test_square_resizing():
    assert resized(torch.rand(3, 30, 40), "square", 64, 999).shape == (3, 64, 64)


def test_normalisation_is_before_padding():
    image = to_network(torch.full((3, 30, 40), 255, dtype=torch.uint8), Half.config, Half.facts)
    torch.testing.assert_close(image, torch.ones_like(image))


def test_perfect_detections_have_full_precision_and_wrong_ones_none():
    from torchmetrics.detection import MeanAveragePrecision

    truth = [{k: s[k] for k in ("boxes", "labels")} for s in digit_scenes(6, size=64)]
    right = [t | {"scores": torch.ones(len(t["labels"]))} for t in truth]
    wrong = [r | {"labels": (r["labels"] + 1) % 10} for r in right]
    for found, expected in ((right, 1.0), (wrong, 0.0)):
        metric = MeanAveragePrecision(backend="pycocotools")
        metric.update(found, truth)
        assert coco_numbers(metric.compute())["mAP"] == pytest.approx(expected)


def test_detection_above_a_score_and_its_picture():
    found = Detection([(1, 1, 9, 9), (0, 0, 5, 5)], ["dog", "cup"], [0.9, 0.3], [0, 1])
    assert found.above(0.5).labels == ["dog"]
    assert drawn(torch.zeros(3, 30, 40, dtype=torch.uint8), found.boxes, found.labels, found.indices).size == (240, 180)


@pytest.fixture(scope="module")
def tiny():
    from dataclasses import replace

    from paperzoo.engine.runtime import Runtime
    from paperzoo.papers.detection.retinanet.recipe import PRESETS, RECIPE

    config = replace(PRESETS["embedded"], scenes=16, batch_size=4, steps=2)
    return RECIPE(config, Runtime())


def test_recipe_learns_from_a_batch_with_an_empty_image(tiny):
    batch = tiny.batch()
    batch["targets"][0] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    out = tiny.step(batch)
    assert out["loss"].requires_grad and out["loss"].isfinite()


def test_recipe_evaluates_and_predicts_in_pixels_of_the_original(tiny):
    assert 0 <= tiny.evaluate()["mAP50"] <= 1
    result = tiny.predict([np.zeros((50, 80, 3), np.uint8), Image.new("L", (33, 20))])
    assert len(result) == 2 and all(x2 <= 80.01 for *_, x2, _ in result[0].boxes)


def test_frozen_parts_do_not_learn(tiny):
    from dataclasses import replace

    config = replace(tiny.config, freeze=("backbone.body.conv1",), freeze_norms=True)
    frozen = type(tiny)(config, tiny.runtime)
    assert not frozen.model.backbone.body.conv1.weight.requires_grad
    before = frozen.model.backbone.body.bn1.running_mean.clone()
    frozen.step(frozen.batch())
    assert torch.equal(before, frozen.model.backbone.body.bn1.running_mean)
    with pytest.raises(PaperZooError, match="neck"):
        type(tiny)(replace(tiny.config, freeze=("neck",)), tiny.runtime)


def test_detector_learns_other_classes(tiny):
    from paperzoo.papers.detection.retinanet.model import retinanet_tiny_fpn

    model = retinanet_tiny_fpn(num_classes=10)
    model.reset_classifier(3)
    assert model(torch.zeros(1, 3, 64, 64))[0].shape[-1] == 3


def test_recipe_of_coco_data_ends_to_end(coco, tiny):
    from dataclasses import replace

    assert isinstance(open_detection(coco, "train"), CocoDetection)
    recipe = type(tiny)(replace(tiny.config, data=str(coco), batch_size=2), tiny.runtime)
    assert recipe.facts["labels"] == ["dog", "cup"]
    assert recipe.step(recipe.batch())["loss"].isfinite()
