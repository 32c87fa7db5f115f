"""Panoptic segmentation: samples and batches, the metrics, predictions, other categories, Cityscapes' layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from paperzoo.blocks.panoptic import PanopticMap, ids_to_rgb, panoptic_map
from paperzoo.data.cityscapes_panoptic import open_panoptic_data
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.panoptic_segmentation import (
    CollatePanoptic,
    Config,
    PanopticSegmentation,
    PanopticSegmentationRecipe,
    PreparedPanoptic,
    cropped,
    segments,
    targets_of,
    zoomed,
)

LABELS, THINGS = ["cat", "sky", "dog", "road"], [0, 2]
HEIGHT, WIDTH = 8, 12


def first_map() -> PanopticMap:
    """A cat and a crowd of dogs on sky and road, with a column in no segment."""
    ids = torch.full((HEIGHT, WIDTH), 10)
    ids[5:] = 20
    ids[1:4, 2:5], ids[6:8, 6:11], ids[:, 11] = 30, 40, 0
    return panoptic_map(ids, {10: 1, 20: 3, 30: 0, 40: 2}, THINGS, crowds=[40])


def second_map() -> PanopticMap:
    """Road alone."""
    return panoptic_map(torch.full((HEIGHT, WIDTH), 5), {5: 3}, THINGS)


class TwoPictures:
    """Two pictures whose pixels tell their place: column, row, number."""

    labels, things = LABELS, frozenset(THINGS)

    def __len__(self) -> int:
        return 2

    def path(self, index: int) -> str:
        return f"picture {index}"

    def __getitem__(self, index: int) -> dict:
        y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
        image = torch.stack([x, y, torch.full_like(x, index)]).to(torch.uint8)
        return {"image": image, "map": first_map() if index == 0 else second_map(), "id": index}


class Guess(nn.Module):
    """A network that answers what it was told, picture by picture."""

    num_classes, things = len(LABELS), tuple(THINGS)

    def __init__(self, maps: list[PanopticMap]) -> None:
        super().__init__()
        self.maps, self.bias, self.paperzoo = maps, nn.Parameter(torch.zeros(1)), {"arguments": {}}

    def forward(self, images):
        return images + self.bias

    def postprocess(self, outputs, sizes, canvas, originals):
        numbers = (outputs[:, 2, 0, 0] * 255).round().int().tolist()
        maps = [self.maps[i] for i in numbers]
        assert [tuple(m.ids.shape) for m in maps] == originals
        return maps


class Recipe(PanopticSegmentationRecipe):
    def __init__(self, network: nn.Module | None = None, data=None, **changes) -> None:
        self.network, self.data = network or Guess([first_map(), second_map()]), data or TwoPictures()
        changes = {"image_sizes": (HEIGHT,), "multiple": 16, "augment": "none", "normalise": "none"} | changes
        super().__init__(Config(steps=1, batch_size=2, **changes), Runtime())

    def open(self, split):
        return self.data

    def build(self):
        return self.network


def prepared(index: int = 0, data=None, **changes) -> dict:
    return PreparedPanoptic(data or TwoPictures(), Recipe(**changes), train=True)[index]


# -- samples -----------------------------------------------------------------------------------------------------------


def test_things_that_are_no_crowds_have_masks_and_boxes_and_every_pixel_its_category():
    sample = prepared()
    assert sample["labels"].tolist() == [0] and sample["boxes"].tolist() == [[2.0, 1.0, 5.0, 4.0]]
    assert sample["masks"].sum() == 9 and sample["masks"][0, 1:4, 2:5].all()
    semantic = sample["semantic"]
    assert semantic[2, 3] == 0 and semantic[0, 0] == 1 and semantic[7, 7] == 2 and semantic[5, 0] == 3
    assert (semantic[:, 11] == 255).all()


def test_a_picture_without_things_has_no_boxes():
    sample = prepared(1)
    assert sample["boxes"].shape == (0, 4) and sample["masks"].shape == (0, HEIGHT, WIDTH)
    assert (sample["semantic"] == 3).all()


def test_a_thing_of_one_pixel_has_a_box_of_one_pixel():
    rows = torch.zeros(4, 4, dtype=torch.int64)
    rows[3, 2] = 1
    found = targets_of(rows, panoptic_map(rows * 7, {7: 2}, THINGS))
    assert found["boxes"].tolist() == [[2.0, 3.0, 3.0, 4.0]] and found["labels"].tolist() == [2]


def test_a_thing_that_a_crop_leaves_out_is_no_target():
    rows = torch.ones(4, 4, dtype=torch.int64)
    ids = torch.where(torch.arange(4)[:, None] == 0, 9, 7).expand(4, 4)
    found = targets_of(rows, panoptic_map(ids, {7: 0, 9: 2}, THINGS))
    assert found["labels"].tolist() == [0]


def test_transforms_move_the_picture_and_its_segments_together():
    mirrored = 0
    for seed in range(8):
        torch.manual_seed(seed)
        sample = prepared(augment="flip")
        columns = (sample["image"][0, 0] * 255).round().int()
        mirrored += int(columns[0] == WIDTH - 1)
        cat = (sample["semantic"] == 0).nonzero()[:, 1]
        assert sorted(set(columns[cat].tolist())) == [2, 3, 4]
    assert 0 < mirrored < 8


def test_crops_are_padded_with_nothing():
    torch.manual_seed(1)
    sample = prepared(crop=(6, 20))
    assert sample["image"].shape == (3, 6, 20) and sample["semantic"].shape == (6, 20)
    assert (sample["semantic"][:, WIDTH:] == 255).all() and (sample["image"][:, :, WIDTH:] == 0).all()
    place = torch.arange(6 * 5).reshape(6, 5)
    image, rows = cropped(place[None].float(), place, (3, 3))
    assert torch.equal(image[0].long(), rows) and rows.shape == (3, 3)


def test_a_random_part_keeps_picture_and_segments_together():
    picture = torch.zeros(3, 40, 60)
    picture[0] = torch.arange(60).repeat_interleave(1) // 30
    for seed in range(4):
        torch.manual_seed(seed)
        image, rows = zoomed(picture, picture[0].long())
        assert 384 <= min(image.shape[1:]) and max(image.shape[1:]) <= 600
        assert ((image[0].round().long() != rows).sum(1) <= 12).all()  # the border is smooth in the picture alone


def test_random_scales_change_the_size():
    torch.manual_seed(0)
    shapes = {prepared(scale=(0.5, 2.0), longest_side=100)["image"].shape for _ in range(4)}
    assert len(shapes) > 1


def test_batches_are_padded():
    samples = [prepared(), prepared(1, image_sizes=(16,), longest_side=100)]
    batch = CollatePanoptic(16)(samples)
    assert batch["images"].shape == (2, 3, 16, 32) and batch["sizes"].tolist() == [[8, 12], [16, 24]]
    first, second = batch["targets"]
    assert (first["semantic"][8:] == 255).all() and (first["semantic"][:, 12:] == 255).all()
    assert first["masks"].shape == (1, 16, 32) and first["masks"].sum() == 9
    assert second["masks"].shape == (0, 16, 32)


def test_a_batch_that_is_resized_takes_its_targets_along():
    batch = Recipe(batch_sizes=(64,)).batch()
    for target in batch["targets"]:
        assert target["semantic"].shape == batch["images"].shape[-2:] == target["masks"].shape[-2:]


def test_segments_are_things_and_then_each_kind_of_stuff():
    masks, labels = segments(prepared(), THINGS)
    assert labels.tolist() == [0, 1, 3]  # the crowd of dogs is none
    assert [int(m.sum()) for m in masks] == [9, 5 * 11 - 9, 3 * 11 - 10]
    # without countable categories each is one region
    assert segments(prepared(), [])[1].tolist() == [0, 1, 2, 3]


class Renamed(TwoPictures):
    """The same set with its categories in another order."""

    labels, things = ["road", "dog", "sky", "cat"], frozenset([1, 3])

    def __getitem__(self, index: int) -> dict:
        ids = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
        ids[:4], ids[4:] = 1, 2
        return super().__getitem__(index) | {"map": panoptic_map(ids, {1: 3, 2: 0}, self.things)}


def test_categories_are_known_by_their_names():
    recipe = Recipe()
    sample = PreparedPanoptic(Renamed(), recipe, train=True)[0]
    assert sample["labels"].tolist() == [0] and sample["semantic"][7, 0] == 3
    truth = PreparedPanoptic(Renamed(), recipe, train=False)[0]["truth"]["map"]
    assert [s.category for s in truth.segments] == [0, 3]
    other = Renamed()
    other.labels = ["road", "dog", "sky", "horse"]
    with pytest.raises(DataError, match="class 'horse'"):
        PreparedPanoptic(other, recipe, train=True)


# -- the metrics and predictions ---------------------------------------------------------------------------------------


def test_the_truth_has_the_best_quality():
    numbers = Recipe().evaluate()
    assert numbers["PQ"] == numbers["PQ_things"] == numbers["PQ_stuff"] == numbers["mIoU"] == 1.0


def test_quality_and_miou_are_those_counted_by_hand():
    right = first_map()
    guess = torch.where(right.ids == 10, 0, right.ids)  # no sky
    found = panoptic_map(guess, {20: 3, 30: 0, 40: 2}, THINGS)
    numbers = Recipe(Guess([found, second_map()])).evaluate()
    # cat and road are right, sky is missed; the crowd of dogs does not count, but its pixels do
    assert numbers["PQ"] == pytest.approx(2 / 3) and numbers["PQ_stuff"] == 0.5 and numbers["PQ_things"] == 1.0
    assert numbers["mIoU"] == pytest.approx(3 / 4)


def test_miou_is_of_the_networks_own_map_where_it_has_one():
    class Both(Guess):
        def semantic(self, outputs, sizes, canvas, originals):
            return [torch.full(size, 3) for size in originals]

    numbers = Recipe(Both([first_map(), second_map()])).evaluate()
    labelled = HEIGHT * (WIDTH - 1)
    road = 3 * 11 - 10 + HEIGHT * WIDTH
    assert numbers["PQ"] == 1.0 and numbers["mIoU"] == pytest.approx(road / (labelled + HEIGHT * WIDTH) / 4)


def test_predictions_have_the_pictures_size_and_names():
    recipe = Recipe(image_sizes=(16,), longest_side=100)
    image = TwoPictures()[0]["image"].permute(1, 2, 0).numpy()
    (found,) = recipe.predict([image])
    assert isinstance(found, PanopticSegmentation) and found.ids.shape == (HEIGHT, WIDTH)
    assert found.labels == ("sky", "road", "cat", "dog")
    assert recipe.draw(image, found).width >= 240
    assert recipe.figures().keys() == {"There, found", "By category"}


def test_wrong_settings_are_refused():
    with pytest.raises(PaperZooError, match="smaller factor comes first"):
        Recipe(scale=(2.0, 0.5))
    with pytest.raises(PaperZooError, match="things is not chosen"):
        Recipe(model_arguments={"things": [1]}).model_arguments()


def test_a_network_learns_other_categories_from_its_weights(tmp_path):
    import paperzoo
    from paperzoo.engine.weights import save_weights

    path = tmp_path / "weights.safetensors"
    save_weights(path, paperzoo.create("panoptic_fpn_tiny"))

    class Real(Recipe):
        build = PanopticSegmentationRecipe.build

    recipe = Real(model="panoptic_fpn_tiny", weights=str(path), image_sizes=(32,), multiple=32)
    assert recipe.model.num_classes == 4 and recipe.model.things == (0, 2) and recipe.model.stuff == (1, 3)
    assert recipe.model.paperzoo["arguments"]["things"] == [0, 2]
    losses = recipe.step(recipe.batch())
    assert torch.isfinite(losses["loss"]) and "semantic_loss" in losses


# -- Cityscapes --------------------------------------------------------------------------------------------------------


def write(folder) -> None:
    """Cityscapes' layout with one picture."""
    maps, pictures = folder / "gtFine" / "cityscapes_panoptic_val", folder / "leftImg8bit" / "val" / "ulm"
    maps.mkdir(parents=True)
    pictures.mkdir(parents=True)
    frame = "ulm_000003_000019"
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(pictures / f"{frame}_leftImg8bit.png")
    ids = torch.full((HEIGHT, WIDTH), 7)
    ids[2:4, 2:4] = 26_001
    Image.fromarray(ids_to_rgb(ids).permute(1, 2, 0).numpy()).save(maps / f"{frame}_gtFine_panoptic.png")
    found = [{"id": 7, "category_id": 7, "iscrowd": 0}, {"id": 26_001, "category_id": 26, "iscrowd": 0}]
    content = {
        "categories": [{"id": 26, "name": "car", "isthing": 1}, {"id": 7, "name": "road", "isthing": 0}],
        "images": [{"id": frame, "file_name": f"{frame}_gtFine_leftImg8bit.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [{"image_id": frame, "file_name": f"{frame}_gtFine_panoptic.png", "segments_info": found}],
    }
    (folder / "gtFine" / "cityscapes_panoptic_val.json").write_text(json.dumps(content))


def test_cityscapes_layout_is_read(tmp_path):
    write(tmp_path)
    data = open_panoptic_data(tmp_path, "test")
    item = data[0]
    assert data.labels == ["road", "car"] and data.things == {1} and item["id"] == 0
    assert item["map"].semantic[2, 2] == 1 and item["map"].semantic[0, 0] == 0
    assert data.path(0).endswith("ulm/ulm_000003_000019_leftImg8bit.png")


def test_what_does_not_fit_cityscapes_layout_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="no panoptic annotations for the split 'train'"):
        open_panoptic_data(tmp_path, "train")
    file = tmp_path / "gtFine" / "cityscapes_panoptic_val.json"
    file.write_text(json.dumps({"categories": [], "images": [], "annotations": []}))
    with pytest.raises(DataError, match="cityscapes_panoptic_val.json.*no annotations"):
        open_panoptic_data(tmp_path, "test")
    file.write_text("{}")
    with pytest.raises(DataError, match="no panoptic file"):
        open_panoptic_data(tmp_path, "test")


def test_the_embedded_scenes_have_the_same_door():
    assert len(open_panoptic_data("panoptic_scenes", "train", count=8, size=48)) == 8
