"""nnU-Net: fingerprint, plans, a file of them, preparing and the way back, folds, the cascade, the choice by cross-validation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from paperzoo.data.phantoms import Phantoms
from paperzoo.data.volumes import Volume, write_volume
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.papers.medical.nnunet import recipe as nnunet
from paperzoo.papers.medical.nnunet.planning import Fingerprint, Plans, cropped, fingerprint, make_plans, nonzero_box
from paperzoo.papers.medical.nnunet.preprocessing import on_own_voxels, prepared, resampled, thick_axis
from paperzoo.papers.medical.nnunet.recipe import PRESETS, Config, NNUNetRecipe, Some, folds, largest_pieces
from paperzoo.papers.medical.nnunet.selection import choose, pieces_that_help

TINY = replace(PRESETS["embedded"], base_features=2, memory=0.0002, steps=2, batch_size=1, patience=1)


class Listed(list):
    labels, channels = ["background", "a"], ["MRI"]

    def path(self, i: int) -> str:
        return f"case {i}"

    def spacing(self, i: int):
        return self[i].spacing


def case(size=(10, 12, 8), spacing=(1.0, 1.0, 2.0), border=2, seed=0, name="case") -> Volume:
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(seed)) + 0.5
    for axis in range(3):
        for part in (slice(0, border), slice(size[axis] - border, None)):
            image.select(0, 0)[tuple(part if a == axis else slice(None) for a in range(3))] = 0
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[3:6, 4:7, 3:5] = 1
    return Volume(image, np.diag([*spacing, 1.0]), mask, name)


def print_of(sizes, spacings, channels=("CT",), classes=3, kept=1.0) -> Fingerprint:
    facts = {key: [0.0] * len(channels) for key in ("low", "high", "mean", "deviation")}
    labels = [str(k) for k in range(classes)]
    return Fingerprint(
        sizes=sizes, spacings=spacings, kept=kept, labels=labels, channels=list(channels), connected=[], intensity=facts
    )


# -- fingerprint, plans --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_cropped_cases():
    found = fingerprint(Listed([case(), case(size=(10, 12, 9))]))
    assert found.sizes == [(6, 8, 4), (6, 8, 5)] and found.spacings == [(1.0, 1.0, 2.0)] * 2
    assert found.kept == pytest.approx(np.median([6 * 8 * 4 / 960, 6 * 8 * 5 / 1080])) and found.connected == [1]
    inside = torch.cat(
        [case().image[0][case().mask == 1], case(size=(10, 12, 9)).image[0][case(size=(10, 12, 9)).mask == 1]]
    )
    assert found.intensity["mean"][0] == pytest.approx(float(inside.mean()), rel=1e-5)


def test_cropping_keeps_the_place_in_mm_and_empty_volumes_whole():
    part, box = cropped(case())
    assert part.size == (6, 8, 4) and np.allclose(part.affine[:3, 3], (2, 2, 4)) and box[2] == slice(2, 6)
    assert nonzero_box(torch.zeros(1, 3, 4, 5)) == (slice(0, 3), slice(0, 4), slice(0, 5))


def test_thick_slices_are_resampled_to_the_tenth_percentile_of_their_distance():
    spacings = [(0.8, 0.8, s) for s in (3.0, 5.0, 5.0, 5.0, 6.0)]
    sizes = [(500, 500, 60)] * 5
    thick = make_plans(print_of(sizes, spacings)).configurations["3d_fullres"]
    assert thick.spacing[2] == pytest.approx(3.8) and thick.axis == 2
    assert make_plans(print_of(sizes, spacings), thick=50.0).configurations["3d_fullres"].spacing[2] == pytest.approx(
        5.0
    )
    even = make_plans(print_of(sizes, [(2.0, 0.8, 0.8)] * 5)).configurations["3d_fullres"]
    assert even.spacing == pytest.approx((2.0, 0.8, 0.8)) and even.axis == 0


def test_large_cases_get_a_cascade_and_small_ones_none():
    plans = make_plans(print_of([(512, 512, 480)] * 100, [(0.8, 0.8, 1.0)] * 100))
    full, low = plans.configuration("3d_fullres"), plans.configuration("3d_lowres")
    assert full.patch == [128, 128, 128] and full.batch_size == 2 and full.batch_dice
    covered = np.prod(low.median) / np.prod(low.patch)
    assert covered <= 4.1 and min(low.spacing) > 1.0 and max(low.spacing) / min(low.spacing) < 2
    small = make_plans(print_of([(36, 50, 35)] * 260, [(1.0, 1.0, 1.0)] * 260, ("MRI",)))
    assert set(small.configurations) == {"2d", "3d_fullres"} and small.normalise == ["zscore"]
    assert (
        small.configurations["3d_fullres"].patch == [40, 56, 40] and small.configurations["3d_fullres"].batch_size == 9
    )
    with pytest.raises(PaperZooError, match="'3d_lowres' is not planned for this set"):
        small.configuration("3d_lowres")


def test_plans_fit_their_budget_and_their_strides():
    for factor in (1.0, 0.1, 0.01):
        plans = make_plans(print_of([(300, 280, 60)] * 20, [(0.7, 0.7, 5.0)] * 20), memory_factor=factor)
        plan = plans.configurations["3d_fullres"]
        assert plan.memory <= 520_000_000 * factor
        assert all(n % int(np.prod([s[a] for s in plan.strides])) == 0 for a, n in enumerate(plan.patch))
        assert plan.kernels[0][2] == 1 and plan.kernels[-1] == [
            3,
            3,
            3,
        ]  # no convolution across slices that lie far apart


def test_anisotropic_patches_are_turned_within_slices():
    plan = make_plans(print_of([(320, 319, 20)] * 32, [(0.62, 0.62, 3.6)] * 32)).configurations["3d_fullres"]
    assert plan.anisotropic and plan.patch[2] == 20


def test_pictures_of_one_slice_are_planned_in_2d():
    plans = make_plans(print_of([(200, 180, 1)] * 10, [(1.0, 1.0, 1.0)] * 10))
    assert "2d" in plans.configurations and plans.configurations["3d_fullres"].patch[2] == 1


def test_plans_are_written_edited_and_read(tmp_path):
    path = tmp_path / "plans.json"
    first = NNUNetRecipe(replace(TINY, plans=str(path)), Runtime(seed=0))
    stored = json.loads(path.read_text())
    assert Plans.read(path) == first.plans
    stored["configurations"]["3d_fullres"]["patch"] = [16, 16, 8]
    path.write_text(json.dumps(stored))
    assert NNUNetRecipe(replace(TINY, plans=str(path)), Runtime(seed=0)).config.window == (16, 16, 8)
    with pytest.raises(PaperZooError, match="is of another set"):
        NNUNetRecipe(replace(TINY, plans=str(path), data="organs"), Runtime(seed=0))
    path.write_text('{"fingerprint": 1}')
    with pytest.raises(DataError, match="not plans of nnU-Net: fingerprint"):
        Plans.read(path)


def test_a_decathlon_folder_plans_itself(tmp_path):
    pytest.importorskip("nibabel")
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    for i in range(5):
        volume = case((14, 16, 9), seed=i)
        write_volume(tmp_path / "imagesTr" / f"c_{i}.nii.gz", volume.image[0].numpy(), affine)
        write_volume(tmp_path / "labelsTr" / f"c_{i}.nii.gz", volume.mask.numpy(), affine)
    listed = [{"image": f"./imagesTr/c_{i}.nii.gz", "label": f"./labelsTr/c_{i}.nii.gz"} for i in range(5)]
    facts = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a"}, "training": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    recipe = NNUNetRecipe(replace(TINY, data=str(tmp_path), plans=str(tmp_path / "plans.json")), Runtime(seed=0))
    assert recipe.facts["spacing"] == pytest.approx([1.0, 1.0, 3.0]) and (tmp_path / "plans.json").exists()
    recipe.runtime.begin()
    assert torch.isfinite(recipe.step(recipe.batch())["loss"])
    result = recipe.predict([str(tmp_path / "imagesTr" / "c_0.nii.gz")])[0]
    assert result.mask.shape == (14, 16, 9)


# -- preparing -----------------------------------------------------------------------------------------------------------

FACTS = {"spacing": [1.0, 1.0, 2.0], "schemes": ["zscore"], "within_mask": True, "intensity": {}}


def test_prepared_cases_and_the_way_back():
    volume = case()
    ready, box, size = prepared(volume, FACTS)
    assert ready.image.shape == (1, 6, 8, 4) and size == (6, 8, 4) and ready.mask.sum() == volume.mask.sum()
    assert float(ready.image.mean()) == pytest.approx(0, abs=1e-5) and float(
        ready.image.std(correction=0)
    ) == pytest.approx(1, abs=1e-4)
    wanted = torch.nn.functional.one_hot(ready.mask.long(), 2).movedim(-1, 0).float()
    back = on_own_voxels(wanted, volume, box, size, None)
    assert torch.equal(back.argmax(0), volume.mask.long()) and float((back.sum(0) - 1).abs().max()) < 1e-5


def test_a_missing_modality_becomes_zeros_and_a_constant_one_too():
    volume = case()
    both = torch.cat([volume.image, torch.full_like(volume.image, torch.nan)])
    ready, *_ = prepared(replace(volume, image=both), {**FACTS, "schemes": ["zscore", "zscore"]})
    assert float(ready.image[1].abs().max()) == 0 and torch.isfinite(ready.image).all()


def test_thick_slices_take_the_nearest_slice():
    assert thick_axis((1.0, 1.0, 4.0), (1.0, 1.0, 1.0)) == 2 and thick_axis((1.0, 1.0, 2.0), (1.0, 1.0, 1.0)) is None
    assert thick_axis((0.2, 1.0, 1.0)) is None  # two coarse axes: none is separate
    stack = np.stack([np.full((4, 4), float(k)) for k in range(3)], 2)
    out = resampled(stack, (4, 4, 6), 3, 2)
    assert np.array_equal(out[0, 0], [0, 0, 1, 1, 2, 2])


def test_gamma_keeps_mean_and_deviation_and_flat_patches_stay_in_their_slices():
    recipe = NNUNetRecipe(replace(TINY, gamma_share=1.0, gamma=(1.4, 1.4)), Runtime(seed=0))
    patches = recipe.patches
    torch.manual_seed(0)
    image = torch.rand(2, 6, 6, 6)
    bent = patches.intensities(image.clone())
    assert not torch.allclose(bent, image) and torch.allclose(bent.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=1e-4)
    assert torch.allclose(bent.std((1, 2, 3)), image.std((1, 2, 3)), atol=1e-4)
    patches.flat, patches.config = 2, replace(recipe.config, rotate=30.0, scale=(0.8, 0.8), elastic=2.0)
    field = patches.field((1.0, 1.0, 3.0))
    lines = torch.arange(patches.window[2]) - (patches.window[2] - 1) / 2
    assert torch.allclose(field[..., 2], lines.expand(field.shape[:3]), atol=1e-4)


# -- folds, pieces, mirroring --------------------------------------------------------------------------------------------


def test_folds_leave_every_case_out_once():
    parts = folds(13)
    assert sorted(i for part in parts for i in part) == list(range(13)) and parts == folds(13)
    with pytest.raises(PaperZooError, match="4 training case"):
        folds(4)
    recipe = NNUNetRecipe(replace(TINY, fold=1), Runtime(seed=0))
    held = {recipe.validation_set.path(i) for i in range(len(recipe.validation_set))}
    kept = {recipe.train_set.path(i) for i in range(len(recipe.train_set))}
    assert not held & kept and len(held | kept) == len(Phantoms("lesions", "train"))
    with pytest.raises(PaperZooError, match="without a fold"):
        NNUNetRecipe(TINY, Runtime(seed=0)).validation_set  # noqa: B018


def test_only_the_largest_piece_stays():
    mask = torch.zeros(9, 3, 3, dtype=torch.uint8)
    mask[:4], mask[6:8], mask[8, 0, 0] = 1, 1, 2
    out = largest_pieces(mask, [1, 2])
    assert out[:4].eq(1).all() and out[6:8].eq(0).all() and out[8, 0, 0] == 2
    assert torch.equal(largest_pieces(mask, []), mask)


def test_mirrored_predictions_are_averaged():
    recipe = NNUNetRecipe(replace(TINY, mirror_test=True), Runtime(seed=0))
    image = torch.randn(2, *recipe.config.window)
    with torch.no_grad():
        out = recipe.probabilities(image)
        flipped = recipe.probabilities(image.flip(1)).flip(1)
    assert torch.allclose(out, flipped, atol=1e-5) and torch.allclose(
        out.sum(0), torch.ones(image.shape[1:]), atol=1e-5
    )


def test_networks_see_slices_across_the_coarsest_axis_in_2d():
    recipe = NNUNetRecipe(replace(TINY, configuration="2d"), Runtime(seed=0))
    images, masks = recipe.batch()
    assert recipe.axis == 2 and images.shape == (1, 2, *recipe.config.window) and masks.shape[1:] == images.shape[2:]
    mask, confidence = recipe.segment(recipe.test_set[0])
    assert mask.shape == recipe.test_set[0].size and float(confidence.max()) <= 1


def test_volumes_of_other_channels_are_refused():
    recipe = NNUNetRecipe(TINY, Runtime(seed=0))
    with pytest.raises(PaperZooError, match=r"has 1 channel\(s\), the network needs 2 \(T1, FLAIR\)"):
        recipe.predict([np.zeros((5, 6, 7))])
    one = recipe.predict([np.random.default_rng(0).random((2, 20, 24, 1))])[0]
    assert one.mask.shape == (20, 24, 1)


# -- the cascade, the choice ---------------------------------------------------------------------------------------------


class First:
    """Stands for a finished run of 3d_lowres that knows the truth."""

    def __init__(self, labels) -> None:
        self.facts = {"labels": labels}

    def segment(self, volume):
        return volume.mask.clone(), None


def test_the_cascade_sees_the_first_networks_answer(monkeypatch):
    import paperzoo.engine.run

    monkeypatch.setattr(paperzoo.engine.run, "load", lambda *_, **__: First(["background", "lesion"]))
    recipe = NNUNetRecipe(replace(TINY, configuration="3d_cascade", low="runs/low"), Runtime(seed=0))
    assert recipe.inputs == 3 and recipe.example()[0].shape[1] == 3
    ready = recipe.patches.cases[0]
    assert torch.equal(ready.image[2] > 0.5, ready.mask == 1)
    recipe.runtime.begin()
    assert torch.isfinite(recipe.step(recipe.batch())["loss"])
    assert recipe.soft(recipe.test_set[0]).shape[1:] == recipe.test_set[0].size
    assert not any(k.startswith("coarse") for k in recipe.stateful())
    monkeypatch.setattr(paperzoo.engine.run, "load", lambda *_, **__: First(["background", "other"]))
    with pytest.raises(PaperZooError, match="knows other classes"):
        NNUNetRecipe(replace(TINY, configuration="3d_cascade", low="runs/low"), Runtime(seed=0))
    with pytest.raises(PaperZooError, match="3d_cascade needs low"):
        NNUNetRecipe(replace(TINY, configuration="3d_cascade"), Runtime(seed=0))


class Trained:
    """A network whose answer is right in one half of the volume and unsure in the other."""

    def __init__(self, cases, half: slice, certain: float = 0.9) -> None:
        self.validation_set, self.half, self.certain = cases, half, certain

    def soft(self, volume):
        truth = torch.nn.functional.one_hot(volume.mask.long(), 2).movedim(-1, 0).float()
        out = 0.52 * (1 - truth) + 0.48 * truth
        out[:, self.half] = (self.certain * truth + (1 - self.certain) * (1 - truth))[:, self.half]
        return out


def test_two_that_complete_each_other_are_chosen_together():
    cases = Listed([case(seed=k) for k in range(2)])
    left, right = Trained(cases, slice(0, 4)), Trained(cases, slice(4, None))
    chosen = choose({"2d": [left], "3d_fullres": [right]})
    assert chosen.names == ("2d", "3d_fullres") and chosen.scores["2d + 3d_fullres"] == 1 > max(
        chosen.scores["2d"], chosen.scores["3d_fullres"]
    )
    mask, _ = chosen.segment(cases[0])
    assert torch.equal(mask, cases[0].mask)
    perfect = Trained(cases, slice(None))
    assert choose({"2d": [perfect], "3d_fullres": [right]}).names == ("2d",)


def test_pieces_are_removed_where_that_helps():
    truth = torch.zeros(9, 3, 3, dtype=torch.uint8)
    truth[:4] = 1
    noisy = truth.clone()
    noisy[7] = 1
    assert pieces_that_help([(noisy, truth)], 2) == [1] and pieces_that_help([(truth, truth)], 2) == []
    assert pieces_that_help([(noisy, noisy)], 2) == []


def test_some_cases_of_a_set():
    part = Some(Phantoms("lesions", "train"), [3, 5])
    assert len(part) == 2 and part[1].name == "lesions_train_05" and part.path(0) == "lesions train 3"


def test_config_is_what_the_plans_leave_open():
    recipe = NNUNetRecipe(replace(TINY, window=(16, 16, 8), batch_size=0), Runtime(seed=0))
    assert recipe.config.window == (16, 16, 8) and recipe.config.batch_size == recipe.plan.batch_size
    assert isinstance(PRESETS["published"], Config) and nnunet.FOLDS == 5
    assert Path(nnunet.__file__).exists()
