"""Detection: box coding and matching, anchors, the task's samples and recipe."""

# ruff: noqa: F811  fixtures are imported from the file beside, and pytest finds them by their names

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

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
from paperzoo.data.coco import CocoDetection, open_detection
from paperzoo.data.scenes import digit_scenes
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.detection import (
    Collate,
    Config,
    Detection,
    Mosaics,
    Prepared,
    at_side,
    coco_numbers,
    drawn,
    resized,
    to_network,
)
from test_detection_data import Half, Shapes, coco, yolo  # noqa: F401

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


def test_without_augmentation_samples_are_as_the_transforms_would_leave_them(coco):
    from torchvision.transforms import v2

    from paperzoo.tasks.detection import augmentation

    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    small = content["annotations"][2] | {"id": 9, "bbox": [3, 3, 0.5, 4]}
    content["annotations"] += [small, small | {"id": 10, "bbox": [7, 7, 1, 1]}]
    (coco / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    plain = type("Plain", (Half,), {"config": Config(image_sizes=(60,), longest_side=70, augment="none")})
    data = Prepared(open_detection(coco, "train"), plain, train=True)
    short = [data[i] for i in range(3)]
    data.config = type("Slow", (), vars(plain.config) | {"augment": "as the transforms"})
    data.transform = v2.Compose(augmentation("none"))
    for a, b in zip(short, (data[i] for i in range(3)), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "boxes", "labels"))
    assert len(short[1]["boxes"]) == 3  # the box of half a pixel is gone, that of one pixel is not


def test_normalisation_is_before_padding():
    image = to_network(torch.full((3, 30, 40), 255, dtype=torch.uint8), Half.config, Half.facts)
    torch.testing.assert_close(image, torch.ones_like(image))


def test_batch_of_images_without_any_object_can_be_collated(coco):
    data = Prepared(open_detection(coco, "train"), Half, train=True)
    batch = Collate(32)([data[2], data[2]])
    assert [t["boxes"].shape for t in batch["targets"]] == [(0, 4)] * 2
    assert at_side(batch, 32)["targets"][0]["boxes"].shape == (0, 4)


def test_batch_at_another_side():
    images, boxes = torch.zeros(2, 3, 64, 128), torch.tensor([[0.0, 0, 128, 64]])
    batch = {"images": images, "sizes": torch.tensor([[64, 128], [32, 100]]), "targets": [{"boxes": boxes}] * 2}
    small = at_side(batch, 64)
    assert small["images"].shape == (2, 3, 32, 64) and small["sizes"].tolist() == [[32, 64], [16, 50]]
    assert small["targets"][1]["boxes"].tolist() == [[0, 0, 64, 32]]


def test_mosaics_are_square_have_boxes_inside_and_pass_empty_images():
    torch.manual_seed(0)
    plain = Prepared(open_detection("shape_scenes", "train", count=64, size=64), Shapes, train=True)
    data = Mosaics(plain, share=1.0, mixed=0.5, scale=(0.5, 1.5))
    counts = []
    for i in range(24):
        sample = data[i]
        assert sample["image"].shape == (3, 64, 64) and sample["image"].isfinite().all()
        boxes = sample["boxes"]
        assert bool((boxes >= 0).all()) and bool((boxes <= 64).all()) and bool((boxes[:, 2:] > boxes[:, :2]).all())
        assert len(sample["labels"]) == len(boxes)
        counts.append(len(boxes))
    assert max(counts) > 4  # more than any scene has


def test_without_mosaics_the_samples_are_the_plain_ones():
    plain = Prepared(open_detection("shape_scenes", "train", count=4, size=64), Shapes, train=True)
    torch.manual_seed(0)
    torch.rand(())
    expected = plain[1]["image"]
    torch.manual_seed(0)
    assert torch.equal(Mosaics(plain, share=0.0, mixed=1.0, scale=(0.5, 1.5))[1]["image"], expected)


def test_crowds_are_ignored_in_evaluation():
    from paperzoo.tasks.detection import DetectionRecipe

    one, crowd = [10.0, 10, 20, 20], [40.0, 40, 90, 90]
    inside = [[x, x, x + 10.0, x + 10.0] for x in range(41, 80, 8)]
    found = [
        {"boxes": torch.tensor([*inside, one]), "scores": torch.linspace(1, 0.5, 6), "labels": torch.zeros(6).long()}
    ]
    values = {}
    for flag in (0, 1):
        truth = {
            "boxes": torch.tensor([one, crowd]),
            "labels": torch.zeros(2).long(),
            "iscrowd": torch.tensor([0, flag]),
        }
        recipe = type("Bare", (), {"runtime": type("Here", (), {"device": "cpu"})})()
        metric = DetectionRecipe.metric(recipe)
        metric.update(found, [truth | {"area": torch.tensor([100.0, 2500.0])}])
        values[flag] = coco_numbers(metric.compute())["mAP"]
    assert values[1] == pytest.approx(1.0) and values[0] < 0.2


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


def test_recipe_of_yolo_data_learns_with_mosaics_and_ends_plain(yolo, tiny):
    from dataclasses import replace

    config = replace(
        tiny.config, data=str(yolo), batch_size=2, steps=2, plain_steps=1, augment="mosaic_mixup", scenes=1
    )
    recipe = type(tiny)(replace(config, batch_sizes=(32, 96)), tiny.runtime)
    tiny.runtime.step = 0
    sides = {recipe.batch()["images"].shape[-1]}
    assert recipe.step(recipe.batch())["loss"].isfinite() and sides <= {32, 96}
    tiny.runtime.step = 1
    try:
        assert recipe.plain and recipe.batch()["images"].shape[-1] not in (32,)
    finally:
        tiny.runtime.step = 0


def test_side_of_a_batch_is_kept_for_so_many_steps(tiny):
    from dataclasses import replace

    config = replace(tiny.config, batch_size=1, steps=100, batch_sizes=(32, 64, 96), batch_sizes_every=3)
    recipe, sides = type(tiny)(config, tiny.runtime), []
    for step in range(18):
        tiny.runtime.step = step
        sides.append(recipe.batch()["images"].shape[-1])
    tiny.runtime.step = 0
    assert all(len(set(sides[k : k + 3])) == 1 for k in range(0, 18, 3)) and len(set(sides)) > 1


def test_arguments_of_the_model_are_handed_on_and_stored(tiny):
    from dataclasses import replace

    from paperzoo.engine.configure import dump, restore

    config = replace(tiny.config, model_arguments={"score_threshold": 0.25})
    recipe = type(tiny)(config, tiny.runtime)
    assert recipe.model.score_threshold == 0.25
    assert recipe.model.paperzoo["arguments"] == {"num_classes": 10, "score_threshold": 0.25}
    assert restore(type(config), dump(config)) == config
    again = type(tiny)(restore(type(config), dump(config)), tiny.runtime, facts=recipe.facts)
    assert again.model.score_threshold == 0.25


@pytest.mark.parametrize(("arguments", "words"), [({"num_classes": 3}, "num_classes"), ({"colour": "red"}, "colour")])
def test_wrong_arguments_of_the_model_are_named(tiny, arguments, words):
    from dataclasses import replace

    with pytest.raises(PaperZooError, match=words):
        type(tiny)(replace(tiny.config, model_arguments=arguments), tiny.runtime)


def test_proposals_in_another_order_are_aligned():
    from paperzoo.papers.detection.faster_rcnn.model import FasterRCNN

    generator = torch.Generator().manual_seed(0)
    expected = [torch.rand(2, 100, 4, generator=generator) * 64, torch.rand(2, 100, 3, generator=generator)]
    order = torch.randperm(100, generator=generator)
    found = [a[:, order] + 1e-5 for a in expected]
    for a, b in zip(expected, FasterRCNN.aligned(expected, found), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_wrong_proposals_stay_wrong():
    from paperzoo.papers.detection.faster_rcnn.model import FasterRCNN

    expected = [torch.rand(2, 100, 4, generator=torch.Generator().manual_seed(0)) * 64]
    found = [expected[0].clone()]
    found[0][0, :5] += 3.0  # five of two hundred
    assert (FasterRCNN.aligned(expected, found)[0] - expected[0]).abs().max() > 1
