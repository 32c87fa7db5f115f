"""Geometric matching: bent photographs, readers of the real layouts, places, metrics, learning from points, prediction, CNNGeo's weights."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.blocks.warping import read_maps
from paperzoo.data.keypoint_pairs import (
    KINDS,
    POINTS,
    bent_photographs,
    mirror,
    open_matches,
    open_photographs,
)
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.papers.correspondence.cnngeometric import model as cnngeo
from paperzoo.papers.correspondence.cnngeometric.recipe import CNNGeoRecipe
from paperzoo.papers.correspondence.cnngeometric.recipe import Config as CNNGeoConfig
from paperzoo.papers.correspondence.cnngeometric.technique import random_affine, random_moves, training_pairs
from paperzoo.tasks.geometric_matching import (
    Config,
    MatchingRecipe,
    TrainingMatches,
    padded,
    to_pair,
    to_pixels,
    to_unit,
)
from paperzoo.tasks.matching_metrics import MatchingMetrics

SMALL = {"model": "cnngeo_slim", "image_size": 64, "steps": 2, "batch_size": 2}
PASCAL = "source_image,target_image,class,XA,YA,XB,YB"


def picture(path, size=(16, 20), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pascal(root, *rows, header=PASCAL, name="test_pairs.csv"):
    for i in range(3):
        picture(root / f"JPEGImages/{i}.jpg", (16 + i, 20), i)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return root


# -- bent photographs ----------------------------------------------------------------------------------------------------


def test_bent_photographs_follow_from_the_seed_and_the_splits_differ():
    a, b = bent_photographs(4, 48), bent_photographs(4, 48, seed=1)
    assert torch.equal(a.source, bent_photographs.__wrapped__(4, 48).source)
    assert a.source.shape == (4, 3, 48, 48) and a.target.dtype == torch.uint8 and a.places.shape == (4, 2, 48, 48)
    assert not torch.equal(a.places, b.places)
    assert not torch.equal(a.source, bent_photographs(4, 48, split="test").source)


def test_the_source_read_at_the_places_is_the_target_but_for_its_light():
    pairs = bent_photographs(16, 48, split="test")
    built = read_maps(pairs.source.float(), pairs.places)
    shown = ((pairs.places >= 0) & (pairs.places <= 47)).all(1)
    for one, target, inside in zip(built.mean(1), pairs.target.float().mean(1), shown, strict=True):
        assert np.corrcoef(one[inside], target[inside])[0, 1] > 0.9


def test_points_of_bent_photographs_lie_on_their_map_and_in_both_pictures():
    pairs = bent_photographs(8, 48)
    at = pairs.target_points.long()
    rows = torch.arange(8)[:, None]
    assert torch.equal(pairs.places[rows, :, at[..., 1], at[..., 0]], pairs.source_points)
    assert pairs.source_points.shape == (8, POINTS, 2)
    assert pairs.source_points.min() >= 0 and pairs.source_points.max() <= 47


def test_without_strength_nothing_moves():
    pairs = bent_photographs(len(KINDS), 32, strength=0.0)
    assert (pairs.source_points - pairs.target_points).abs().max() < 1e-3


# -- files ---------------------------------------------------------------------------------------------------------------


def test_lists_of_pf_pascal_count_pixels_from_one(tmp_path):
    pascal(tmp_path, "JPEGImages/0.jpg,JPEGImages/1.jpg,3,1;5.5,1;9,2;6,3;10")
    data = open_matches(tmp_path, "test")
    item = data[0]
    assert item["source_points"].tolist() == [[0, 0], [4.5, 8]] and item["target_points"].tolist() == [[1, 2], [5, 9]]
    assert item["source"].shape == (3, 16, 20) and item["target"].shape == (3, 17, 20)
    assert float(item["extent"]) == 8 and data.kind(0) == "3" and data.has_points


def test_lists_of_pf_willow_have_ten_points(tmp_path):
    numbers = [str(i + 1) for i in range(40)]
    header = ",".join(["imageA", "imageB", *(f"{k}{i}" for k in ("XA", "YA", "XB", "YB") for i in range(10))])
    pascal(tmp_path, "JPEGImages/0.jpg,JPEGImages/1.jpg," + ",".join(numbers), header=header, name="test_pairs_pf.csv")
    item = open_matches(tmp_path, "test")[0]
    assert item["source_points"][:2].tolist() == [[0, 10], [1, 11]]
    assert item["target_points"][-1].tolist() == [29, 39]


def test_training_lists_may_be_mirrored_and_may_have_no_points(tmp_path):
    header = "source_image,target_image,class,flip"
    pascal(
        tmp_path, "JPEGImages/0.jpg,JPEGImages/1.jpg,1,0", "JPEGImages/0.jpg,JPEGImages/1.jpg,1,1",
        header=header, name="image_pairs/train_pairs.csv",
    )  # fmt: skip
    data = open_matches(tmp_path, "train")
    assert not data.has_points and set(data[0]) == {"source", "target"}
    assert torch.equal(data[0]["source"].flip(-1), data[1]["source"])
    with pytest.raises(PaperZooError, match="no matching points"):
        MatchingRecipe(Config(**SMALL, data=str(tmp_path)), Runtime())


def test_points_are_mirrored_with_their_pictures(tmp_path):
    item = bent_photographs(1, 32)
    pair = {name: getattr(item, name)[0] for name in ("source", "target", "source_points", "target_points")}
    found = mirror(pair)
    x, y = pair["target_points"][0].long().tolist()
    assert torch.equal(found["target"][:, y, int(found["target_points"][0, 0])], pair["target"][:, y, x])


def test_a_list_may_lie_beside_the_folder_of_pictures(tmp_path):
    row = "JPEGImages/0.jpg,JPEGImages/1.jpg,3,1;5,1;9,2;6,3;10"
    data = open_matches(pascal(tmp_path, row, name="image_pairs/some.csv") / "image_pairs/some.csv", "test")
    assert data[0]["source"].shape == (3, 16, 20)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("JPEGImages/0.jpg,JPEGImages/1.jpg,3,1;2,1;9,2,3", "the same count"),
        ("JPEGImages/0.jpg,JPEGImages/1.jpg,3,1;x,1;9,2;3,3;4", "numbers"),
        ("JPEGImages/0.jpg,JPEGImages/1.jpg,3,nan,1,2,3", "not finite"),
        ("JPEGImages/0.jpg,JPEGImages/1.jpg,3", "has 3 columns"),
    ],
)
def test_wrong_rows_are_named_with_their_line(tmp_path, row, problem):
    good = "JPEGImages/0.jpg,JPEGImages/1.jpg,3,1;5,1;9,2;6,3;10"
    with pytest.raises(DataError, match=problem) as error:
        open_matches(pascal(tmp_path, good, row), "test")
    assert "test_pairs.csv:3" in str(error.value)


def test_pictures_of_a_list_that_are_not_there_are_named(tmp_path):
    data = open_matches(pascal(tmp_path, "JPEGImages/0.jpg,JPEGImages/9.jpg,3,1;5,1;9,2;6,3;10"), "test")
    with pytest.raises(DataError, match="9.jpg: no such file"):
        data[0]


def test_spair_asks_the_other_way_round_and_has_boxes(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"JPEGImages/cat/{name}.jpg")
    pair = {
        "src_imname": "a.jpg", "trg_imname": "b.jpg", "category": "cat", "src_kps": [[1, 2], [3, 4]],
        "trg_kps": [[5, 6], [7, 8]], "src_bndbox": [0, 0, 4, 4], "trg_bndbox": [2, 1, 17, 9],
    }  # fmt: skip
    folder = tmp_path / "PairAnnotation/test"
    folder.mkdir(parents=True)
    (folder / "0.json").write_text(json.dumps(pair), encoding="utf-8")
    item = open_matches(tmp_path, "test")[0]
    assert item["source_points"].tolist() == [[5, 6], [7, 8]] and float(item["extent"]) == 15
    (folder / "1.json").write_text(json.dumps(pair | {"src_kps": [[1, 2]]}), encoding="utf-8")
    with pytest.raises(DataError, match="1.json"):
        open_matches(tmp_path, "test")


def test_folders_are_paired_by_name(tmp_path):
    for side in ("source", "target"):
        picture(tmp_path / f"val/{side}/a.png")
        picture(tmp_path / f"train/{side}/a.png")
    assert not open_matches(tmp_path, "test").has_points
    picture(tmp_path / "val/source/b.png")
    with pytest.raises(DataError, match=r"b\.png: has no partner"):
        open_matches(tmp_path, "test")


def test_photographs_come_from_folders_and_lists(tmp_path):
    for i in range(2):
        picture(tmp_path / f"pictures/{i}.png", seed=i)
    assert open_photographs(tmp_path / "pictures")[1].shape == (3, 16, 20)
    (tmp_path / "train.csv").write_text("image\npictures/0.png\npictures/7.png\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.csv:3"):
        open_photographs(tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text("image\npictures/0.png\n", encoding="utf-8")
    assert len(open_photographs(tmp_path / "train.csv")) == 1


def test_unknown_places_and_splits(tmp_path):
    with pytest.raises(UnknownName, match="bent_photographs"):
        open_matches("bent_photograph")
    with pytest.raises(PaperZooError, match="split 'val'"):
        open_matches("bent_photographs", "val")
    with pytest.raises(DataError, match="no such file"):
        open_photographs(tmp_path / "none")
    with pytest.raises(DataError, match="has no pairs"):
        open_matches(tmp_path, "test")


# -- places and metrics --------------------------------------------------------------------------------------------------


def test_pixels_and_units_are_each_others_way_back():
    points = torch.tensor([[0.0, 0.0], [19, 15], [9.5, 3]])
    unit = to_unit(points, (16, 20))
    assert unit[0].tolist() == [-1, -1] and unit[1].tolist() == [1, 1]
    assert torch.allclose(to_pixels(unit, (16, 20)), points)
    assert torch.isfinite(to_unit(points, (1, 1))).all()


def test_pck_is_a_mean_over_pairs_and_a_pair_without_extent_does_not_count():
    metrics = MatchingMetrics(0.1)
    metrics.update(torch.tensor([[0.5, 0.0], [3, 4]]), torch.zeros(2, 2), 10.0)
    metrics.update(torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2), 10.0)
    metrics.update(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)
    metrics.update(torch.zeros(0, 2), torch.zeros(0, 2), 10.0)
    found = metrics.compute()
    assert found["pck"] == 0.75 and found["pck_points"] == pytest.approx(2 / 3)
    assert MatchingMetrics().compute() == {}


class Still(torch.nn.Module):
    """Answers no motion on a coarse grid, moved by what it learns."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def forward(self, source, target):
        at = torch.linspace(-1, 1, 5)
        grid = torch.stack([at.expand(5, 5), at[:, None].expand(5, 5)], 2)
        return (grid + self.shift).expand(len(source), -1, -1, -1)


class StillRecipe(MatchingRecipe):
    def build(self, fresh):
        return Still()


def test_no_motion_is_measured_as_the_points_own_distance():
    recipe = StillRecipe(Config(**SMALL, length="image"), Runtime())
    pairs = bent_photographs(96, split="test")
    distance = (pairs.source_points - pairs.target_points).norm(dim=2)
    assert recipe.evaluate()["pck"] == pytest.approx(float((distance <= 6.4).float().mean()), abs=1e-6)


def test_the_default_recipe_learns_a_shift_from_points_alone():
    recipe = StillRecipe(Config(**SMALL | {"batch_size": 8}), Runtime())
    recipe.runtime.begin()
    batch = recipe.batch()
    wanted = torch.tensor([0.2, -0.1])
    batch["source_points"] = batch["target_points"] + wanted
    batch["source_points"][0, 3:] = batch["target_points"][0, 3:] = float("nan")
    loss = recipe.step(batch)["loss"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.square().sum()), rel=1e-4)
    assert torch.allclose(recipe.model.shift.grad, -2 * wanted, atol=1e-4)


def test_batches_are_filled_up_with_nan(tmp_path):
    rows = ("JPEGImages/0.jpg,JPEGImages/1.jpg,3,1;5,1;9,2;6,3;10", "JPEGImages/0.jpg,JPEGImages/2.jpg,3,1,1,2,3")
    data = TrainingMatches(open_matches(pascal(tmp_path, *rows), "test"), 32)
    batch = padded([data[0], data[1]])
    assert batch["source"].shape == (2, 3, 32, 32) and batch["source_points"].shape == (2, 2, 2)
    assert batch["source_points"].isnan().any(2).tolist() == [[False, False], [False, True]]


def test_a_prediction_is_at_the_pictures_own_sizes(tmp_path):
    recipe = StillRecipe(Config(**SMALL), Runtime())
    recipe.model.shift.data = torch.tensor([1.0, 0.0])  # half of the source's width to the right
    source, target = picture(tmp_path / "a.png", (20, 41)), picture(tmp_path / "b.png", (30, 25), 1)
    found = recipe.predict([f"{source} :: {target}"])[0]
    assert found.places.shape == (2, 30, 25) and found.warped.shape == (3, 30, 25)
    assert found.places[:, 0, 0].tolist() == [20, 0] and found.covered == pytest.approx(13 / 25)
    assert found.affine == pytest.approx((40 / 24, 0, 20, 0, 19 / 29, 0), abs=1e-4)
    assert torch.allclose(found.carry(torch.tensor([[0.0, 29.0]])), torch.tensor([[20.0, 19.0]]), atol=1e-4)
    assert not found.inside[:, 13:].any() and bool((found.warped[:, ~found.inside] == 96).all())
    assert recipe.draw((str(source), str(target)), found).width > 400


def test_what_is_no_pair_is_refused():
    for value in ("a.png", ("a.png",), 3):
        with pytest.raises(PaperZooError, match="a pair is"):
            to_pair(value)


# -- CNNGeo --------------------------------------------------------------------------------------------------------------


def test_pairs_are_the_crop_and_what_the_map_makes_of_it():
    rows = torch.linspace(0, 1, 64).expand(2, 3, 48, 64)
    maps = cnngeo.cnngeo_slim().maps
    truths = [random_affine(2, shift=0.0, turn=0.0, slant=0.0, zoom=0.0), random_moves(maps[1], 2, 0.0)]
    source, targets = training_pairs(rows, maps, truths, 32)
    assert torch.allclose(source, targets[0], atol=1e-5) and torch.allclose(source, targets[1], atol=1e-5)
    assert source[0, 0, 0, 0] == pytest.approx(0.5 - 9 / 32, abs=0.01)  # the crop's left border


def test_only_the_regression_learns_unless_asked():
    frozen = CNNGeoRecipe(CNNGeoConfig(**SMALL, photograph_size=(112, 112)), Runtime())
    learning = CNNGeoRecipe(CNNGeoConfig(**SMALL, photograph_size=(112, 112), train_features=True), Runtime())
    for recipe, learns in ((frozen, False), (learning, True)):
        before = {n: p.clone() for n, p in recipe.model.state_dict().items()}
        recipe.runtime.begin()
        recipe.runtime.update(recipe.optimizer, recipe.step(recipe.batch())["loss"])
        changed = {n.split(".")[0] for n, p in recipe.model.state_dict().items() if not torch.equal(p, before[n])}
        assert ("FeatureExtraction" in changed) == learns
        assert {"FeatureRegression", "FeatureRegression2"} <= changed


def test_two_released_files_make_a_network_of_two_stages():
    with torch.no_grad():
        affine, spline = (cnngeo.cnngeo_slim(k).eval() for k in ("affine", "tps"))
        spline.FeatureExtraction.load_state_dict(affine.FeatureExtraction.state_dict())
        old = {k.replace("FeatureExtraction.model", "FeatureExtraction.vgg"): v for k, v in affine.state_dict().items()}
        both = cnngeo.cnngeo_slim().eval()
        both.load_state_dict(cnngeo.combined(old, spline.state_dict()))
        pictures = torch.rand(2, 2, 3, 64, 64)
        thetas = both.estimate(*pictures)
        assert torch.equal(thetas[0], affine.estimate(*pictures)[0])
        spline.FeatureExtraction.model[0].weight += 1
        with pytest.raises(ValueError, match="different features"):
            cnngeo.combined(affine.state_dict(), spline.state_dict())


def test_a_classifiers_weights_become_features():
    from torchvision.models import resnet101, vgg16

    with torch.device("meta"):
        networks = [cnngeo.cnngeo("affine"), cnngeo.cnngeo_resnet101("affine")]
        classifiers = [vgg16(), resnet101()]
    for ours, theirs in zip(networks, classifiers, strict=True):
        state = {k: torch.zeros(()).expand(v.shape) for k, v in theirs.state_dict().items()}
        ours.FeatureExtraction.to_empty(device="cpu")
        ours.load_backbone(state)
        assert all(not p.any() for p in ours.FeatureExtraction.parameters())
        with pytest.raises(ValueError, match="lacks"):
            ours.load_backbone({"features.99.weight": torch.zeros(1)})


@pytest.mark.parametrize("wrong", [{"transform": "tps_affine"}, {"transform": "rigid"}, {"image_size": 40}])
def test_wrong_networks_are_refused(wrong):
    with pytest.raises(ValueError, match="transform|image_size"):
        cnngeo.cnngeo_slim(**wrong)


def test_the_size_is_the_recipes_own_setting():
    with pytest.raises(PaperZooError, match="image_size"):
        CNNGeoRecipe(dataclasses.replace(CNNGeoConfig(**SMALL), model_arguments={"image_size": 96}), Runtime())
