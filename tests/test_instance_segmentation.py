"""Instance segmentation: COCO's masks, samples and batches, masks at the image's resolution, the metric, pictures."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from torch import nn

from paperzoo.data.instance_masks import CocoInstances, draw_polygons, from_counts, open_instances, read_counts
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.instance_segmentation import (
    CollateInstances,
    Config,
    InstanceSegmentation,
    InstanceSegmentationRecipe,
    PreparedInstances,
    as_size,
    overlaid,
    place_masks,
    resample_masks,
)

HEIGHT, WIDTH = 24, 32
SQUARE = [4.0, 4.0, 12.0, 4.0, 12.0, 14.0, 4.0, 14.0]


def blob() -> np.ndarray:
    """A disc with a hole, touching the right border."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(y - 12, x - 25)
    return (distance < 9) & (distance > 3)


def compressed(mask: np.ndarray) -> dict:
    stored = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": stored["size"], "counts": stored["counts"].decode()}


def annotation(number: int, segmentation, box=(4, 4, 8, 10), **more) -> dict:
    entry = {"id": number, "image_id": 7, "category_id": 3, "bbox": list(box), "area": 80, "iscrowd": 0} | more
    return entry if segmentation is None else entry | {"segmentation": segmentation}


def write(folder, annotations: list[dict], split: str = "train"):
    """A set in COCO's layout: two pictures, the second without objects."""
    pictures = folder / split
    pictures.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)).save(pictures / name)
    images = [{"id": n, "file_name": f, "width": WIDTH, "height": HEIGHT} for n, f in ((7, "a.png"), (9, "b.png"))]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]}
    (folder / "annotations").mkdir(exist_ok=True)
    file = folder / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(content))
    return file


# -- reading -----------------------------------------------------------------------------------------------------------


def test_polygons_run_lengths_and_compressed_run_lengths_are_read(tmp_path):
    runs = [len(list(run)) for _, run in itertools.groupby(blob().T.ravel())]  # begins with zeros
    plain = {"size": [HEIGHT, WIDTH], "counts": runs}
    entries = [
        annotation(1, [SQUARE, [20.0, 2.0, 26.0, 2.0, 23.0, 8.0]]),
        annotation(2, plain, (17, 4, 15, 17), iscrowd=1),
        annotation(3, compressed(blob()), (17, 4, 15, 17)),
    ]
    write(tmp_path, entries)
    item = open_instances(tmp_path, "train")[0]
    assert item["masks"].shape == (3, HEIGHT, WIDTH) and item["masks"].dtype == torch.bool
    assert torch.equal(item["masks"][1], torch.from_numpy(blob())) and torch.equal(item["masks"][2], item["masks"][1])
    assert item["masks"][0, 4:14, 4:12].all() and item["masks"][0, 3, 23]
    assert item["masks"][0].sum() < 80 + 40
    assert item["crowd"].tolist() == [False, True, False]


def test_polygons_are_drawn_as_pycocotools_draws_them():
    rng = np.random.default_rng(0)
    polygons = [rng.uniform(0, 30, 12) for _ in range(3)]
    expected = coco.decode(coco.merge(coco.frPyObjects([p.tolist() for p in polygons], HEIGHT, WIDTH)))
    assert np.array_equal(draw_polygons(polygons, HEIGHT, WIDTH), expected.astype(bool))


def test_compressed_text_is_read_as_pycocotools_reads_it():
    rng = np.random.default_rng(1)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((37, 300)) < share
        counts = read_counts(compressed(mask)["counts"])
        assert np.array_equal(from_counts(counts, 37, 300), mask)


def test_a_picture_without_objects_and_objects_without_area(tmp_path):
    far = annotation(2, [SQUARE], (40, 40, 5, 5))  # outside of the picture: dropped, with its mask
    write(tmp_path, [annotation(1, [SQUARE]), far, annotation(3, [[1.0, 1.0, 2.0, 2.0]], (1, 1, 1, 1))])
    data = open_instances(tmp_path, "train")
    assert data[0]["boxes"].shape == (2, 4) and data[0]["masks"].shape == (2, HEIGHT, WIDTH)
    assert not data[0]["masks"][1].any()  # two corners have no area
    assert data[1]["masks"].shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        (None, "annotation 5 has no segmentation"),
        ([], "annotation 5 has no segmentation"),
        ([[1.0, 2.0, 3.0, 4.0, 5.0]], "annotation 5: its segmentation is no list of polygons"),
        ([[1.0, 2.0, 3.0, 4.0, float("nan"), 6.0]], "annotation 5: its segmentation is no list of polygons"),
        ([[1.0, 2.0, 3.0, 4.0, 5e9, 6.0]], "annotation 5: its segmentation is no list of polygons"),
        (["a"], "annotation 5: its segmentation is no list of polygons"),
    ],
)
def test_a_wrong_segmentation_is_named_when_the_file_is_opened(tmp_path, segmentation, says):
    file = write(tmp_path, [annotation(1, [SQUARE]), annotation(5, segmentation)])
    with pytest.raises(DataError, match=says) as caught:
        open_instances(tmp_path, "train")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": [5, 3]}, f"not those of a picture of {WIDTH} x {HEIGHT}"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, "not those of a picture"),
        ({"size": [HEIGHT, WIDTH], "counts": [-4, HEIGHT * WIDTH + 4]}, "not those of a picture"),
        ({"size": [HEIGHT, WIDTH], "counts": "éé"}, "no run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": "o"}, "cut off"),
        ({"counts": [HEIGHT * WIDTH]}, "no run lengths with size and counts"),
    ],
)
def test_wrong_run_lengths_are_named_when_they_are_asked_for(tmp_path, segmentation, says):
    write(tmp_path, [annotation(5, segmentation)])
    with pytest.raises(DataError, match=f"annotation 5: .*{says}"):
        open_instances(tmp_path, "train")[0]


def test_annotations_in_any_order_keep_their_masks(tmp_path):
    late = annotation(1, [SQUARE]) | {"image_id": 9}
    file = write(tmp_path, [late, annotation(2, compressed(blob()), (17, 4, 15, 17))])
    data = CocoInstances(file, tmp_path / "train")
    assert torch.equal(data[0]["masks"][0], torch.from_numpy(blob()))
    assert data[1]["masks"][0, 8, 8]


def test_places_without_masks_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_instances(tmp_path / "nothing")
    with pytest.raises(PaperZooError, match="train or test"):
        open_instances("digit_scenes", "validation")


@pytest.mark.parametrize("name", ["digit_scenes", "shape_scenes"])
def test_the_embedded_scenes_have_masks_inside_of_their_boxes(name):
    data = open_instances(name, "train", count=8, size=48)
    for i in range(8):
        item = data[i]
        assert len(item["masks"]) == len(item["boxes"]) == len(item["labels"])
        for box, mask in zip(item["boxes"].tolist(), item["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == [float(v) for v in tight]


# -- samples -----------------------------------------------------------------------------------------------------------


class Guess(nn.Module):
    """Finds, in every picture, what it was told to."""

    def __init__(self, found: dict) -> None:
        super().__init__()
        self.found, self.num_classes = found, 2
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images, targets=None):
        return images.mean((1, 2, 3)) + self.weight

    def postprocess(self, outputs, sizes, canvas):
        return [{key: value.clone() for key, value in self.found.items()} for _ in range(len(outputs))]


class TwoPictures:
    """In memory: a picture with two objects of classes 1 and 0, the second a crowd; and an empty one."""

    labels = ["left", "right"]

    def __init__(self, height: int = 20, width: int = 30) -> None:
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 2:10, 3:13], masks[1, 12:, 15:] = True, True
        boxes = torch.tensor([[3.0, 2, 13, 10], [15, 12, width, height]])
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[0] = masks[0] * 200
        crowd = torch.tensor([False, True])
        first = {"image": image, "boxes": boxes, "labels": torch.tensor([1, 0]), "crowd": crowd, "masks": masks}
        first |= {"area": masks.flatten(1).sum(1).float(), "id": 0}
        empty = {key: value[:0] for key, value in first.items() if key not in ("image", "id")}
        self.items = [first, empty | {"image": image, "id": 1}]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return dict(self.items[index])

    def path(self, index: int) -> str:
        return f"picture {index}"


class Recipe(InstanceSegmentationRecipe):
    def __init__(self, found: dict | None = None, **changes) -> None:
        self.found, self.data = {} if found is None else found, TwoPictures()
        changes = {"image_sizes": (20,), "multiple": 16, "augment": "none", "normalise": "none"} | changes
        super().__init__(Config(steps=1, batch_size=2, **changes), Runtime())

    def open(self, split):
        return self.data

    def build(self):
        return Guess(self.found)


def truth_as_found(height: int = 20, width: int = 30) -> dict:
    """The first picture's object, in pixels of a canvas of the same scale."""
    item = TwoPictures(height, width)[0]
    return {
        "boxes": item["boxes"][:1],
        "scores": torch.tensor([0.9]),
        "labels": item["labels"][:1],
        "masks": torch.ones(1, 4, 4),
        "frames": item["boxes"][:1],
    }


def test_a_batch_has_padded_masks_and_no_crowds():
    batch = Recipe().batch()
    assert batch["images"].shape == (2, 3, 32, 32)
    masks = sorted((t["masks"] for t in batch["targets"]), key=len)
    assert [tuple(m.shape) for m in masks] == [(0, 32, 32), (1, 32, 32)]
    assert torch.equal(masks[1][0, :20, :30], TwoPictures()[0]["masks"][0]) and masks[1].sum() == 80


def test_flipping_and_resizing_move_masks_with_the_picture():
    recipe = Recipe(augment="flip", image_sizes=(40,), longest_side=100)
    data = PreparedInstances(recipe.data, recipe, train=True)
    torch.manual_seed(0)
    samples = [data[0] for _ in range(24)]
    assert {float(s["boxes"][0, 0]) for s in samples} == {6.0, 34.0}
    for sample in samples:
        assert sample["masks"].shape == (1, 40, 60)
        x1, y1, x2, y2 = (int(v) for v in sample["boxes"][0])
        assert sample["masks"][0, y1:y2, x1:x2].all() and sample["masks"].sum() == (x2 - x1) * (y2 - y1)


def test_a_batch_of_another_side_takes_its_masks_along():
    batch = Recipe(batch_sizes=(64,), multiple=32).batch()
    assert batch["images"].shape[-2:] == (64, 64)
    assert {tuple(t["masks"].shape[1:]) for t in batch["targets"]} == {(64, 64)}


def test_samples_of_different_size_share_a_canvas():
    collate = CollateInstances(8)
    sample = {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}
    sizes = ((10, 20), (17, 5))
    batch = collate([sample | {"image": torch.ones(3, *s), "masks": torch.ones(1, *s).bool()} for s in sizes])
    assert [int(t["masks"].sum()) for t in batch["targets"]] == [200, 85]
    assert {tuple(t["masks"].shape) for t in batch["targets"]} == {(1, 24, 24)}


def test_masks_of_another_size_are_bool():
    assert as_size(torch.eye(2).bool()[None], (4, 4)).sum() == 8
    assert as_size(torch.zeros(0, 2, 2).bool(), (4, 4)).shape == (0, 4, 4)


# -- masks at the image's resolution -----------------------------------------------------------------------------------


def test_a_mask_fills_its_frame_and_fades_at_the_border():
    soft = resample_masks(torch.ones(1, 4, 4), torch.tensor([[2.0, 3, 10, 11]]), (16, 16))
    assert soft[0, 5:9, 4:8].eq(1).all() and soft[0, :2].eq(0).all() and 0 < soft[0, 3, 6] < 1
    hard = place_masks(torch.ones(1, 4, 4), torch.tensor([[2.0, 3, 10, 11]]), (16, 16))
    assert hard.sum() > 50 and hard.dtype == torch.bool


def test_a_frame_may_lie_outside_of_the_picture_or_have_no_extent():
    frames = torch.tensor([[-20.0, -20, -4, -4], [30, 30, 60, 60], [5, 5, 5, 5], [-8, -8, 24, 24]])
    hard = place_masks(torch.ones(4, 8, 8), frames, (16, 16))
    assert hard.flatten(1).sum(1).tolist()[:2] == [0, 0] and hard[3].all()
    assert place_masks(torch.ones(0, 8, 8), frames[:0], (16, 16)).shape == (0, 16, 16)


def test_masks_of_the_canvas_reach_its_border():
    whole = torch.tensor([[0.0, 0, 16, 16]])
    assert place_masks(torch.full((1, 4, 4), 0.6), whole, (16, 16), 0.5, extend=True).all()


# -- recipe ------------------------------------------------------------------------------------------------------------


def test_a_perfect_answer_has_ap_1_and_an_empty_one_0():
    perfect = Recipe(truth_as_found())
    perfect.data.items = [perfect.data.items[0]]  # the second picture has nothing to find
    metrics = perfect.evaluate()
    assert metrics["mask_AP"] == pytest.approx(1.0) and metrics["box_AP50"] == pytest.approx(1.0)
    nothing = {key: value[:0] for key, value in truth_as_found().items()}
    assert Recipe(nothing).evaluate()["mask_AP"] == 0.0


def test_masks_are_judged_apart_from_boxes():
    half = truth_as_found()
    half["masks"] = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    metrics = Recipe(half).evaluate()
    assert metrics["box_AP75"] > 0.4 and metrics["mask_AP75"] == 0.0


def test_a_crowd_counts_neither_way():
    found = {key: torch.cat([value, value]) for key, value in truth_as_found().items()}
    found["boxes"] = found["frames"] = torch.tensor([[3.0, 2, 13, 10], [16, 13, 29, 19]])
    found["labels"], found["scores"] = torch.tensor([1, 0]), torch.tensor([0.9, 0.8])
    assert Recipe(found).evaluate()["mask_AR100"] == 1.0


def test_predictions_are_in_pixels_of_the_picture():
    found = truth_as_found()
    small, large = Recipe(found).predict([TwoPictures()[0]["image"], torch.zeros(3, 40, 60, dtype=torch.uint8)])
    assert isinstance(small, InstanceSegmentation) and small.masks.shape == (1, 20, 30)
    assert large.masks.shape == (1, 40, 60) and large.boxes == [(6.0, 4.0, 26.0, 20.0)]
    assert large.masks[0, 5:19, 8:24].all()
    assert len(small.above(0.95).masks) == 0 and small.above(0.5).labels == ["right"]


def test_masks_of_a_canvas_are_cut_to_the_image():
    found = truth_as_found() | {"masks": torch.zeros(1, 32, 32)}
    del found["frames"]
    found["masks"][0, :20, :15] = 1.0  # the left half of the image in its canvas of 32 x 32
    result = Recipe(found).predict([torch.zeros(3, 40, 60, dtype=torch.uint8)])[0]
    assert result.masks[0, :, :29].all() and not result.masks[0, :, 32:].any()


def test_a_picture_shows_masks_and_a_legend():
    image = torch.full((3, 20, 30), 128, dtype=torch.uint8)
    picture = overlaid(image, TwoPictures()[0]["masks"], ["a long name of 30 characters 97%", "another such name 95%"])
    assert picture.width == 240 and picture.height > 160 + 14
    pixels = np.asarray(picture)
    assert (pixels[40, 60] != 128).any() and (pixels[4, 4] == 128).all()
    assert overlaid(image, torch.zeros(0, 20, 30).bool(), []).size == (240, 174)
