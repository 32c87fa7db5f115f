"""Registration: pairs in the field's layouts, the world in mm, warping, what is measured of a map, the task's recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paperzoo.data.registration_pairs import AllOrdered, BentBodies, Pair, bent_body, jacobians, open_pairs
from paperzoo.data.volumes import Volume, read_volume, write_volume
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.tasks import registration_measures as measure
from paperzoo.tasks.registration import Config, RegistrationRecipe
from paperzoo.tasks.registration_pictures import checkerboard
from paperzoo.tasks.registration_volumes import PreparedPairs, aligned, as_pair, moving_indices, prepare, scaled

FACTS = {"labels": ["background", "a"], "channels": ["CT"], "spacing": [1.0, 1.0, 1.0]}


def volume(image, mask=None, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), name="v") -> Volume:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    image = torch.as_tensor(image, dtype=torch.float32)
    return Volume(image[None], affine, None if mask is None else torch.as_tensor(mask, dtype=torch.uint8), name)


def ball(size=(12, 12, 12), centre=(6, 6, 6), radius=3.0, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    lines = np.meshgrid(*(np.arange(n) * s for n, s in zip(size, spacing, strict=True)), indexing="ij")
    return (sum((line - c) ** 2 for line, c in zip(lines, centre, strict=True)) < radius**2).astype(np.uint8)


def write(path: Path, array, affine=None) -> Path:
    write_volume(path, np.asarray(array), np.eye(4) if affine is None else affine)
    return path


class Fixed(nn.Module):
    """A network that always answers the same displacement."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.as_tensor(value, dtype=torch.float32))

    def forward(self, moving, fixed):
        shape = (len(moving), len(self.value), *moving.shape[2:])
        return self.value.view(1, -1, *[1] * (moving.ndim - 2)).expand(shape)


class Given(RegistrationRecipe):
    """A recipe of pairs that are handed over, with a network that is too."""

    def __init__(self, pairs, network, **changes) -> None:
        self.__dict__["train_set"] = self.__dict__["test_set"] = pairs
        self.network = network
        super().__init__(Config(**{"size": (12, 12, 12), "spacing": (1.0, 1.0, 1.0), **changes}), Runtime(seed=0))

    def build(self) -> nn.Module:
        return self.network


class Listed(list):
    labels, channels = ["background", "a"], ["CT"]

    def path(self, i: int) -> str:
        return f"pair {i}"


def shifted_ball(by=(2, 0, -1)) -> Pair:
    fixed, moving = ball(), ball(centre=tuple(6 + b for b in by))
    return Pair(volume(100.0 * moving, moving), volume(100.0 * fixed, fixed), "shifted")


# -- generated pairs -----------------------------------------------------------------------------------------------------


def test_bodies_are_deterministic_and_their_maps_true():
    pair = bent_body("bodies", "test", 0)
    bent_body.cache_clear()
    again = bent_body("bodies", "test", 0)
    assert torch.equal(pair.fixed.image, again.fixed.image) and torch.equal(pair.moving.mask, again.moving.mask)
    known = pair.field.nan_to_num()
    at = moving_indices(known, pair.fixed.affine, pair.moving.affine)
    moved = measure.read_at(pair.moving.mask[None].float(), at, "nearest")[0]
    inside = (pair.fixed.mask > 0) & ~pair.field.isnan().any(0)
    before, after = (pair.moving.mask == pair.fixed.mask)[inside], (moved == pair.fixed.mask)[inside]
    assert after.float().mean() > 0.9 > before.float().mean() + 0.1
    assert float(jacobians(known.where(pair.field.isnan(), known), pair.fixed.spacing)[3:-3, 3:-3, 3:-3].min()) < 1


def test_splits_share_no_pair_and_slices_have_one_slice():
    train, test = BentBodies("slices", "train"), BentBodies("slices", "test")
    assert not torch.equal(train[0].fixed.image, test[0].fixed.image)
    assert test[0].fixed.size[2] == 1 and float(test[0].field[2].nan_to_num().abs().max()) == 0


def test_all_ordered_pairs_once():
    pairs = [AllOrdered(4)[k] for k in range(12)]
    assert len(set(pairs)) == 12 and all(i != j for i, j in pairs) and len(AllOrdered(4)) == 12


# -- layouts -------------------------------------------------------------------------------------------------------------


def learn2reg(root: Path, **changes) -> Path:
    for i in range(5):
        write(root / "imagesTr" / f"X_{i:04d}_0000.nii.gz", np.full((4, 5, 6), float(i)))
        write(root / "labelsTr" / f"X_{i:04d}_0000.nii.gz", ball((4, 5, 6), (2, 2, 2), 1.5))
    facts = {
        "modality": {"0": "MR"},
        "labels": {"0": {"0": "background", "2": "b", "1": "a"}},
        "training": [{"image": f"./imagesTr/X_{i:04d}_0000.nii.gz"} for i in range(5)],
        "registration_val": [{"fixed": "./imagesTr/X_0003_0000.nii.gz", "moving": "./imagesTr/X_0004_0000.nii.gz"}],
    }
    (root / "dataset.json").write_text(json.dumps({**facts, **changes}))
    return root


def test_learn2reg_trains_on_all_pairs_beside_those_held_out(tmp_path):
    pytest.importorskip("nibabel")
    root = learn2reg(tmp_path)
    train, test = open_pairs(root, "train"), open_pairs(root, "test")
    assert (len(train), len(test)) == (6, 1) and train.labels == ["background", "a", "b"] and train.channels == ["MR"]
    pair = test[0]
    assert float(pair.moving.image.max()) == 4 and float(pair.fixed.image.max()) == 3 and pair.fixed.mask.max() == 1
    used = {float(v.image.max()) for i in range(6) for v in (train[i].moving, train[i].fixed)}
    assert used == {0.0, 1.0, 2.0}


def test_learn2reg_with_given_pairs_and_broken_lists(tmp_path):
    pytest.importorskip("nibabel")
    given = [{"fixed": "imagesTr/X_0000_0000.nii.gz", "moving": "imagesTr/X_0001_0000.nii.gz"}]
    assert len(open_pairs(learn2reg(tmp_path / "a", training_paired_images=given), "train")) == 1
    broken = learn2reg(
        tmp_path / "b", registration_val=[{"fixed": "imagesTr/none.nii.gz", "moving": "imagesTr/X_0001_0000.nii.gz"}]
    )
    with pytest.raises(DataError, match="of pair 1 in dataset.json is not there"):
        open_pairs(broken, "test")
    with pytest.raises(DataError, match="pair 1 has no 'moving'"):
        open_pairs(learn2reg(tmp_path / "c", registration_val=[{"fixed": "a"}]), "test")
    (tmp_path / "c" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not a readable dataset.json"):
        open_pairs(tmp_path / "c", "test")


def test_lists_of_pairs(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.npz", ball())
    table = tmp_path / "pairs.csv"
    table.write_text(
        "moving,fixed,moving_labels,fixed_labels,split\na.npz,b.npz,a.npz,b.npz,train\nb.npz,c.npz,,,test\n"
    )
    train, test = open_pairs(table, "train"), open_pairs(table, "test")
    assert len(train) == len(test) == 1 and train[0].moving.mask.sum() == ball().sum() and test[0].fixed.mask is None
    table.write_text("moving,fixed\na.npz,nothing.npz\n")
    with pytest.raises(DataError, match="line 2: .*nothing.npz is not there"):
        open_pairs(table, "train")
    table.write_text("moving,fixed,split\na.npz,b.npz,later\n")
    with pytest.raises(DataError, match="line 2: split is 'later'"):
        open_pairs(table, "train")
    table.write_text("first,second\na.npz,b.npz\n")
    with pytest.raises(DataError, match="needs the columns moving and fixed"):
        open_pairs(table, "train")


def test_folders_of_equal_names_and_wrong_labels(tmp_path):
    for i in range(5):
        for folder in ("moving", "fixed", "fixed_labels"):
            write(tmp_path / folder / f"{i}.npz", ball())
    train = open_pairs(tmp_path, "train")
    assert len(train) == 4 and len(open_pairs(tmp_path, "test")) == 1
    assert train[0].fixed.mask is not None and train[0].moving.mask is None
    write(tmp_path / "fixed_labels" / "0.npz", ball() * 0.5)
    with pytest.raises(DataError, match=r"0.npz: holds the value 0.5"):
        train[0]
    write(tmp_path / "moving" / "more.npz", ball())
    with pytest.raises(DataError, match="more: has no partner"):
        open_pairs(tmp_path, "train")


def test_sets_of_single_volumes_and_an_atlas():
    train, test = open_pairs("organs", "train"), open_pairs("organs", "test")
    assert len(train) == 24 * 23 and len(test) == 6 and test[5].fixed.name == test[0].moving.name
    to_atlas = open_pairs("organs", "test", "organs train 0")
    assert len(to_atlas) == 6 and to_atlas[2].fixed.name == "organs_train_00"
    assert len(open_pairs("organs", "train", "organs train 0")) == 23
    with pytest.raises(PaperZooError, match="atlas 'nobody'"):
        open_pairs("organs", "train", "nobody")


def test_unknown_names_and_splits(tmp_path):
    with pytest.raises(UnknownName, match="bodies"):
        open_pairs("bodis")
    with pytest.raises(PaperZooError, match="split 'all'"):
        open_pairs("bodies", "all")
    with pytest.raises(DataError, match="no such file or folder"):
        open_pairs(tmp_path / "nothing")
    with pytest.raises(PaperZooError, match="consists of pairs"):
        open_pairs("bodies", "train", "x")


# -- maps ----------------------------------------------------------------------------------------------------------------


def test_warping_by_whole_voxels_moves_them():
    image = torch.rand(1, 2, 5, 6, 7)
    move = torch.tensor([1.0, 0, -2]).view(1, 3, 1, 1, 1).expand(1, 3, 5, 6, 7)
    out = measure.warp(image, move)
    assert (
        torch.allclose(out[..., :-1, :, 2:], image[..., 1:, :, :-2], atol=1e-5)
        and float(out[..., :2].abs().max()) < 1e-5
    )


def test_folds_are_counted_and_uniform_growth_is_not_one():
    x = torch.stack(torch.meshgrid(*(torch.arange(6.0),) * 3, indexing="ij"))
    assert measure.folds(0.5 * x)[0] == 0 and abs(float(jacobians(0.5 * x, (1, 1, 1))[2, 2, 2]) - 1.5**3) < 1e-4
    assert measure.folds(-1.5 * x)[0] == 100
    assert (
        measure.folds(torch.cat([2.0 * x[:1], 0 * x[1:]]), (2.0, 1.0, 1.0))[1] < 1e-6
    )  # the same stretch everywhere, in mm
    flat = torch.zeros(3, 5, 5, 1)
    assert measure.folds(flat) == (0.0, 0.0)


def test_maps_in_mm_know_spacing_and_orientation():
    turned = np.array([[0.0, 2, 0, 5], [-1.5, 0, 0, 9], [0, 0, 3, -4], [0, 0, 0, 1]])
    found = torch.zeros(3, 4, 5, 6)
    found[1] = 4.0  # two voxels along the second axis
    at = moving_indices(found, turned, turned)
    expected = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(5.0), torch.arange(6.0), indexing="ij"))
    expected[1] += 2
    assert torch.allclose(at, expected, atol=1e-4)


def test_a_true_answer_scores_and_the_identity_does_not():
    pairs = Listed([shifted_ball()])
    still, right = Given(pairs, Fixed([0.0, 0, 0])).evaluate(), Given(pairs, Fixed([2.0, 0, -1])).evaluate()
    assert right["dice"] == 1 and right["hd95_mm"] == 0 and right["correlation"] == pytest.approx(1, abs=1e-3)
    assert still["dice"] == still["dice_before"] == right["dice_before"] < 0.5 and still["hd95_mm"] > 1


def test_spacings_and_sizes_of_the_two_may_differ():
    fine = ball((24, 24, 8), (12, 12, 12), 8.5, (1.0, 1.0, 3.0))
    coarse = ball((14, 16, 14), (16, 12, 12), 8.5, (2.0, 2.0, 2.0))
    pair = Pair(volume(100.0 * coarse, coarse, (2, 2, 2)), volume(100.0 * fine, fine, (1, 1, 3)))
    recipe = Given(Listed([pair]), Fixed([2.0, 0, 0]), spacing=(2.0, 2.0, 2.0))  # two voxels of 2 mm
    measured = recipe.evaluate()
    assert measured["dice"] > 0.85 and measured["dice_before"] < 0.75
    result = recipe.predict([(pair.moving, pair.fixed)])[0]
    assert result.displacement.shape == (3, 24, 24, 8) and result.mean_mm == pytest.approx(4, abs=1e-3)
    assert result.warped.shape == (1, 24, 24, 8) and result.correlation_after > result.correlation_before


def test_middle_on_middle_where_coordinates_disagree():
    a, b = ball(), ball()
    pair = Pair(volume(1.0 * a, a, origin=(500, 0, 0)), volume(1.0 * b, b))
    recipe = Given(Listed([pair]), Fixed([0.0, 0, 0]), align="centre")
    assert recipe.evaluate()["dice"] == 1 and Given(Listed([pair]), Fixed([0.0, 0, 0])).evaluate()["dice"] == 0
    result = recipe.predict([pair])[0]
    assert result.shift == (-500.0, 0.0, 0.0)
    assert torch.equal(result.warp(pair.moving, labels=True)[0] > 0, torch.from_numpy(b > 0))


def test_results_are_written_on_the_fixed_files_voxels(tmp_path):
    pytest.importorskip("nibabel")
    affine = np.diag([-1.0, 1, 2, 1])
    for name, centre in (("m", (7, 6, 6)), ("f", (5, 6, 6))):
        write(tmp_path / f"{name}.nii.gz", 50.0 * ball(centre=centre), affine)
    recipe = Given(Listed([shifted_ball()]), Fixed([0.0, 0, 0]))
    result = recipe.predict([f"{tmp_path / 'm.nii.gz'} :: {tmp_path / 'f.nii.gz'}"])[0]
    assert result.stored_as == "LAS"
    result.save(tmp_path / "out.nii.gz")
    again = read_volume(tmp_path / "out.nii.gz")
    assert np.allclose(again.original, affine) and torch.allclose(again.image, result.warped, atol=1e-3)
    assert read_volume(tmp_path / "out_field.nii.gz").image.shape == (3, 12, 12, 12)


def test_labels_that_are_missing_leave_dice_out():
    pair = shifted_ball()
    bare = Pair(replace(pair.moving, mask=None), replace(pair.fixed, mask=None))
    measured = Given(Listed([bare]), Fixed([0.0, 0, 0])).evaluate()
    assert "dice" not in measured and measured["folds_percent"] == 0 and "correlation" in measured


def test_ignored_voxels_do_not_count():
    pair = shifted_ball()
    mask = pair.fixed.mask.clone()
    mask[pair.moving.mask != pair.fixed.mask] = 255
    pair = replace(pair, fixed=replace(pair.fixed, mask=mask))
    assert Given(Listed([pair]), Fixed([0.0, 0, 0])).evaluate()["dice"] == 1


def test_pictures_of_one_slice_with_a_2d_network():
    a, b = (ball((12, 12, 1), (6 + d, 6, 0)) for d in (0, 2))
    pair = Pair(volume(1.0 * b, b, origin=(0, 0, 40)), volume(1.0 * a, a))
    recipe = Given(Listed([pair]), Fixed([2.0, 0.0]), size=(12, 12), dimensions=2, similarity="mse")
    assert recipe.evaluate()["dice"] == 1
    assert recipe.predict([pair])[0].displacement.shape == (3, 12, 12, 1)
    assert recipe.draw(pair, recipe.predict([pair])[0]).width > 100
    with pytest.raises(PaperZooError, match="with dimensions 2 a volume has one slice"):
        recipe.predict([shifted_ball()])


# -- preparing, learning -------------------------------------------------------------------------------------------------


def test_prepared_pairs_lie_in_the_middle_of_the_fixed_volume():
    pair = shifted_ball()
    config = Config(size=(8, 8, 8), spacing=(1.0, 1.0, 1.0), intensity_range=(0.0, 100.0))
    ready = prepare(pair, config, FACTS)
    assert torch.allclose(ready.fixed[0], pair.fixed.image[0, 2:10, 2:10, 2:10] / 100, atol=1e-5)
    assert torch.equal(ready.fixed_mask, pair.fixed.mask[2:10, 2:10, 2:10])
    larger = prepare(pair, replace(config, size=(14, 14, 14)), FACTS)
    assert float(larger.fixed[0, 0].abs().max()) == 0 and larger.fixed[0].sum() == pytest.approx(
        float(ball().sum()), rel=1e-4
    )


def test_intensities_become_zero_to_one_and_missing_modalities_zero():
    image = torch.stack(
        [torch.linspace(-5, 5, 1000).view(10, 10, 10), torch.full((10, 10, 10), torch.nan), torch.ones(10, 10, 10)]
    )
    out = scaled(image, None)
    assert float(out[0].min()) == 0 and float(out[0].max()) == 1 and float(out[1:].abs().max()) == 0
    assert torch.allclose(scaled(image[:1], (-5.0, 5.0)), (image[:1] + 5) / 10)


def test_the_loss_is_similarity_plus_smoothness():
    recipe = Given(
        Listed([shifted_ball()]), Fixed([0.0, 0, 0]), similarity="mse", smoothness=2.0, intensity_range=(0.0, 100.0)
    )
    moving, fixed, *_ = (x[None] for x in PreparedPairs(recipe.train_set, recipe.config, recipe.facts)[0])
    bend = torch.zeros(1, 3, 12, 12, 12)
    bend[:, 0, 6:] = 1.0  # one step of one voxel along x
    total, parts = recipe.objective(moving, fixed, bend)
    rough = 1 * 12 * 12 / (3 * 11 * 12 * 12) / 3
    assert float(parts["roughness"]) == pytest.approx(rough, rel=1e-4)
    alike = float((measure.warp(moving, bend) - fixed).square().mean())
    assert float(total) == pytest.approx(alike + 2 * rough, rel=1e-4)


def test_gradient_steps_find_a_shift():
    recipe = Given(
        Listed([shifted_ball((1, 0, 0))]), Fixed([0.0, 0, 0]), similarity="mse", learning_rate=0.1, batch_size=1
    )
    for _ in range(40):
        recipe.runtime.begin()
        out = recipe.step(recipe.batch())
        recipe.runtime.update(recipe.optimizer, out["loss"])
        recipe.runtime.finish()
    assert abs(float(recipe.model.value[0].detach()) - 1) < 0.4 and recipe.evaluate()["dice"] > 0.9


def test_wrong_settings_and_values_are_named():
    pairs = Listed([shifted_ball()])
    with pytest.raises(PaperZooError, match="it has 2 extents, dimensions is 3"):
        Given(pairs, Fixed([0.0]), size=(4, 4))
    with pytest.raises(PaperZooError, match="must be odd"):
        Given(pairs, Fixed([0.0]), ncc_window=8)
    with pytest.raises(PaperZooError, match="a pair is"):
        as_pair("moving.nii.gz")
    recipe = Given(pairs, Fixed([0.0, 0, 0]))
    with pytest.raises(PaperZooError, match=r"has 2 channel\(s\), the network needs 1 \(CT\)"):
        recipe.predict([(np.zeros((2, 4, 4, 4)), np.zeros((4, 4, 4)))])


def test_empty_masks_and_constant_volumes_are_legal():
    nothing = volume(np.zeros((6, 6, 6)), np.zeros((6, 6, 6)))
    measured = Given(Listed([Pair(nothing, nothing)]), Fixed([0.0, 0, 0])).evaluate()
    assert measured["correlation"] == 0 and "dice" not in measured


def test_alignment_that_moves_nothing_keeps_the_known_map():
    pair = bent_body("bodies", "test", 1)
    assert aligned(pair, Config(align="centre")).field is not None and aligned(pair, Config()) is pair


def test_a_checkerboard_takes_turns():
    board = checkerboard(torch.zeros(12, 12, 12), torch.ones(12, 12, 12))
    assert board[0, 0, 0] == 0 and board[2, 0, 0] == 1 and board[2, 2, 0] == 0
