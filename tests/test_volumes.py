"""Volumes: files of the field's formats, orientation and spacing, patches, metrics in mm, windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paperzoo.data import volumes as data
from paperzoo.data.phantoms import Cells, Phantoms
from paperzoo.data.volumes import Volume, from_ras, open_volumes, orientation, read_volume, to_ras, write_volume
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName
from paperzoo.tasks import volume_metrics as measure
from paperzoo.tasks.volume_patches import (
    Patches,
    PreparedCases,
    normalised,
    prepare,
    resampled,
    resampled_mask,
    smooth_field,
)
from paperzoo.tasks.volume_segmentation import Config, VolumeSegmentationRecipe, coarser, metrics

OBLIQUE = np.array([[-1.9, 0.2, 0.1, 30], [0.1, 0.3, 2.9, -40], [0.2, 1.4, -0.3, 7], [0, 0, 0, 1.0]])


@pytest.fixture
def numbers() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


# -- orientation, NIfTI ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([-2.0, -1, 3, 1]), np.diag([1.0, 1, 1, 1])[[2, 0, 1, 3]]])
def test_orientation_is_nibabels(affine, numbers, tmp_path):
    import nibabel

    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(numbers, affine))
    turned, new = to_ras(numbers, affine)
    assert np.array_equal(turned, expected.get_fdata(dtype=np.float32)) and np.allclose(new, expected.affine)
    assert orientation(affine) == "".join(nibabel.aff2axcodes(affine))
    assert np.array_equal(from_ras(turned, affine), numbers)


def test_nifti_keeps_spacing_and_scaling(numbers, tmp_path):
    import nibabel

    image = nibabel.Nifti1Image((numbers * 100).astype(np.int16), np.diag([-2.0, 3, 4, 1]))
    image.header.set_slope_inter(0.5, 10)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.spacing == (2, 3, 4) and volume.name == "a" and volume.image.dtype == torch.float32
    assert np.allclose(
        volume.image[0].numpy(), nibabel.as_closest_canonical(nibabel.load(tmp_path / "a.nii")).get_fdata()
    )


def test_a_fourth_axis_holds_channels_and_a_picture_is_one_slice(tmp_path):
    many = np.random.default_rng(1).normal(size=(4, 5, 6, 3)).astype(np.float32)
    assert read_volume(nifti(tmp_path / "m.nii.gz", many, np.eye(4))).image.shape == (3, 4, 5, 6)
    flat = read_volume(nifti(tmp_path / "p.nii.gz", many[:, :, 0, 0], np.eye(4)))
    assert flat.size == (4, 5, 1)


def test_a_volume_beyond_memory_is_read_by_slices_and_mapped(numbers, tmp_path, monkeypatch):
    path = nifti(tmp_path / "a.nii.gz", numbers)
    expected = read_volume(path)
    monkeypatch.setattr(data, "IN_MEMORY", 100)
    assert torch.equal(read_volume(path).image, expected.image)


def test_infinite_voxels_become_the_smallest_value(tmp_path):
    array = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    array[0, 0, 1] = np.nan
    array[1, 1, 1] = np.inf
    image = read_volume(nifti(tmp_path / "a.nii.gz", array, np.eye(4))).image
    assert image[0, 0, 0, 1] == 0 and image[0, 1, 1, 1] == 0 and image[0, 1, 1, 0] == 6


def test_broken_files_are_named(numbers, tmp_path):
    path = nifti(tmp_path / "a.nii.gz", numbers)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="a.nii.gz: not a readable NIfTI"):
        read_volume(path)
    (tmp_path / "b.nrrd").write_text("NRRD")
    with pytest.raises(DataError, match="NIfTI"):
        read_volume(tmp_path / "b.nrrd")
    with pytest.raises(DataError, match="no such file"):
        read_volume(tmp_path / "c.nii")
    np.savez(tmp_path / "d.npz", image=numbers, spacing=(1.0, 0.0, 1.0))
    with pytest.raises(DataError, match="spacings must be above 0"):
        read_volume(tmp_path / "d.npz")
    with pytest.raises(DataError, match="several|shape"):
        read_volume(nifti(tmp_path / "e.nii.gz", np.zeros((2, 2, 2, 2, 3), np.float32)))


def test_arrays_and_wrong_values():
    assert read_volume(np.zeros((3, 4, 5))).size == (3, 4, 5)
    assert read_volume(torch.zeros(2, 3, 4, 5)).image.shape == (2, 3, 4, 5)
    with pytest.raises(PaperZooError, match="shape"):
        read_volume(np.zeros((3, 4)))
    with pytest.raises(PaperZooError, match="not int"):
        read_volume(3)


def test_missing_packages_are_asked_for(monkeypatch, tmp_path):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("nibabel", "pydicom"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "a.nii").write_bytes(b"x")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"paperzoo\[medical\]"):
        read_volume(tmp_path / "a.nii")
    with pytest.raises(MissingExtra, match="pydicom"):
        read_volume(tmp_path)


# -- DICOM -------------------------------------------------------------------------------------------------------------


def dicom_series(folder: Path, array: np.ndarray, spacing=(2.0, 3.0, 4.0), heights=None, uid="1.2.3") -> Path:
    """(columns, rows, slices) int16 as a series whose file names are in another order than its slices."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    folder.mkdir(parents=True, exist_ok=True)
    heights = [100 + spacing[2] * k for k in range(array.shape[2])] if heights is None else heights
    for k, height in enumerate(heights):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = f"{uid}.{k + 1}"
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        path = folder / f"{(k * 7) % 11:02d}_{k}.dcm"
        slice_ = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        slice_.SeriesInstanceUID, slice_.SeriesDescription, slice_.Modality = uid, f"series {uid}", "CT"
        slice_.Rows, slice_.Columns = array.shape[1], array.shape[0]
        slice_.PixelSpacing = [spacing[1], spacing[0]]  # between rows, between columns
        slice_.SliceThickness = spacing[2]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient = [-50, -60, height]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.RescaleSlope, slice_.RescaleIntercept = 2, -1000
        slice_.PixelData = np.ascontiguousarray(array[:, :, k].T).tobytes()
        slice_.save_as(path, enforce_file_format=True)
    return folder


@pytest.fixture
def stored() -> np.ndarray:
    return np.random.default_rng(2).integers(-100, 1000, (4, 5, 6)).astype(np.int16)


def test_a_dicom_series_is_sorted_scaled_and_turned(stored, tmp_path):
    volume = read_volume(dicom_series(tmp_path / "ct", stored))
    assert orientation(volume.original) == "LPS" and np.allclose(volume.spacing, (2, 3, 4))
    expected = stored[::-1, ::-1].astype(np.float32) * 2 - 1000
    assert np.array_equal(volume.image[0].numpy(), expected)
    first = volume.affine @ [3, 4, 0, 1]  # the corner that DICOM counts from: left -50, back -60
    assert np.allclose(first[:3], (50, 60, 100))


def test_a_single_dicom_file_is_a_slice(stored, tmp_path):
    folder = dicom_series(tmp_path / "ct", stored[:, :, :1])
    volume = read_volume(next(folder.iterdir()))
    assert volume.size == (4, 5, 1) and np.allclose(volume.spacing, (2, 3, 4))


def test_dicom_problems_are_named(stored, tmp_path):
    gap = dicom_series(tmp_path / "gap", stored, heights=[0, 4, 8, 16, 20, 24])
    with pytest.raises(DataError, match="is a slice missing"):
        read_volume(gap)
    twice = dicom_series(tmp_path / "twice", stored, heights=[0, 4, 8, 8, 12, 16])
    with pytest.raises(DataError, match="same place"):
        read_volume(twice)
    both = dicom_series(tmp_path / "both", stored)
    dicom_series(both / "x", stored[:, :, :2], uid="9.9")
    for file in (both / "x").iterdir():
        file.rename(both / f"other_{file.name}")
    (both / "x").rmdir()
    with pytest.raises(DataError, match="holds 2 series"):
        read_volume(both)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match="no DICOM images"):
        read_volume(tmp_path / "none")


# -- sets --------------------------------------------------------------------------------------------------------------


def decathlon(root: Path, cases: int = 6, channels: int = 1, **facts) -> Path:
    rng = np.random.default_rng(3)
    rows = []
    for i in range(cases):
        shape = (6, 5, 4) if channels == 1 else (6, 5, 4, channels)
        nifti(root / "imagesTr" / f"case_{i}.nii.gz", rng.normal(size=shape).astype(np.float32))
        nifti(root / "labelsTr" / f"case_{i}.nii.gz", rng.integers(0, 3, (6, 5, 4)).astype(np.uint8))
        rows.append({"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"})
    names = {str(i): f"M{i}" for i in range(channels)}
    stored = {"modality": names, "labels": {"0": "background", "1": "liver", "2": "tumour"}, "training": rows}
    (root / "dataset.json").write_text(json.dumps({**stored, **facts}))
    return root


def test_the_decathlons_layout(tmp_path):
    root = decathlon(tmp_path, channels=2)
    train, test = open_volumes(root, "train"), open_volumes(root, "test")
    assert (len(train), len(test)) == (5, 1) and train.labels == ["background", "liver", "tumour"]
    assert train.channels == ["M0", "M1"]
    volume = train[0]
    assert volume.image.shape[0] == 2 and volume.mask.dtype == torch.uint8 and volume.mask.shape == volume.size
    assert np.allclose(train.spacing(0), volume.spacing)


def test_nnunets_layout_with_ignored_voxels_and_folds(tmp_path):
    facts = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "core": 1, "ignore": 2},
        "training": [],
    }
    root = decathlon(tmp_path, **facts)
    for path in list((root / "imagesTr").iterdir()):
        name = path.name.removesuffix(".nii.gz")
        for channel in range(2):
            (root / "imagesTr" / f"{name}_{channel:04d}.nii.gz").write_bytes(path.read_bytes())
        path.unlink()
    (root / "splits_final.json").write_text(json.dumps([{"train": ["case_0", "case_1"], "val": ["case_2"]}]))
    train = open_volumes(root, "train")
    assert len(train) == 2 and train.labels == ["background", "core"]
    assert set(train[0].mask.unique().tolist()) == {0, 1, 255}
    assert [case.name for case in open_volumes(root, "test").cases] == ["case_2"]

    (root / "imagesTr" / "case_0_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="the modality 'T2' of the case 'case_0' is not there"):
        open_volumes(root, "train")
    volume = open_volumes(root, "train", missing="zero")[0]
    assert torch.isnan(volume.image[1]).all() and torch.isfinite(volume.image[0]).all()
    assert (normalised(volume.image, "zscore", {})[1] == 0).all()


def test_plain_folders_with_a_dicom_series(stored, tmp_path):
    for i in range(5):
        folder = dicom_series(tmp_path / "images" / f"p{i}", stored)
        volume = read_volume(folder)
        mask = (volume.image > 0).numpy().astype(np.uint8)[0]
        write_volume(tmp_path / "masks" / f"p{i}.nii.gz", from_ras(mask, volume.original), volume.original)
    train = open_volumes(tmp_path, "train")
    assert len(train) == 4 and train.labels == ["background", "class 1"]
    assert torch.equal(train[0].mask == 1, train[0].image[0] > 0)


def test_wrong_sets_are_named(tmp_path):
    root = decathlon(tmp_path / "a")
    (root / "labelsTr" / "case_3.nii.gz").unlink()
    with pytest.raises(DataError, match="the mask of the case 'case_3' is not there"):
        open_volumes(root)
    root = decathlon(tmp_path / "b", labels={"0": "background", "1": "liver"})
    with pytest.raises(DataError, match=r"case_0.nii.gz: holds the value 2; known are 0 \(background\), 1 \(liver\)"):
        open_volumes(root)[0]
    root = decathlon(tmp_path / "c")
    nifti(root / "labelsTr" / "case_0.nii.gz", np.zeros((6, 5, 3), np.uint8))
    with pytest.raises(DataError, match="does not fit its image"):
        open_volumes(root)[0]
    moved = OBLIQUE.copy()
    moved[0, 3] += 10
    nifti(root / "labelsTr" / "case_1.nii.gz", np.zeros((6, 5, 4), np.uint8), moved)
    with pytest.raises(DataError, match="10.0 mm apart"):
        open_volumes(root)[1]
    root = decathlon(tmp_path / "d", modality={"0": "T1", "1": "T2"})
    with pytest.raises(DataError, match=r"has 1 channel\(s\); the set has 2 \(T1, T2\)"):
        open_volumes(root)[0]
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not a readable dataset.json"):
        open_volumes(tmp_path / "e")
    with pytest.raises(DataError, match="needs dataset.json"):
        open_volumes(tmp_path)
    with pytest.raises(UnknownName, match="organs"):
        open_volumes("organ")


def test_phantoms_are_the_same_everywhere_and_share_nothing():
    train, test = Phantoms("organs", "train"), Phantoms("organs", "test")
    again = Phantoms("organs", "train")[3]
    assert torch.equal(train[3].image, again.image) and not torch.equal(
        train[0].image.flatten()[:99], test[0].image.flatten()[:99]
    )
    assert sorted(train[0].mask.unique().tolist()) == [0, 1, 2, 3, 4, 5]
    assert len({orientation(train[i].original) for i in range(5)}) == 5
    assert not (Phantoms("lesions", "train")[5].mask > 0).any()
    right = torch.nonzero(train[0].mask == 2)[:, 0].float().mean()
    assert right > train[0].size[0] / 2  # the liver


def test_cells_are_divided_by_background():
    from scipy.ndimage import label

    image, mask = Cells("train")[0]
    assert image.shape == (3, 96, 96) and image.dtype == torch.uint8 and label(mask.numpy())[1] > 10


# -- preparing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 5, 20), (3, 8, 4), (5, 6, 7)])
def test_resampling_is_interpolate(numbers, size):
    values = torch.from_numpy(numbers)[None]
    expected = nn.functional.interpolate(values[None], size=size, mode="trilinear", align_corners=False)[0]
    assert torch.allclose(resampled(values, size), expected, atol=1e-5)
    mask = (values[0] > 0).to(torch.uint8)
    expected = nn.functional.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    assert torch.equal(resampled_mask(mask, size).float(), expected)


def test_preparing_brings_to_the_sets_spacing_and_scale():
    volume = Phantoms("organs", "train")[0]
    facts = {"spacing": [5.0, 5.0, 5.0], "normalise": "zscore", "intensity": {}}
    case = prepare(volume, facts)
    assert case.image.shape[1:] == case.mask.shape
    assert all(abs(s - 5) < 0.2 for s in case.spacing)
    assert abs(float(case.image.mean())) < 0.1
    single = Volume(torch.randn(1, 8, 9, 1), np.diag([1.0, 1, 8, 1]))
    assert prepare(single, {**facts, "spacing": [2.0, 1.0, 1.0]}).image.shape == (1, 4, 9, 1)


def test_splines_reproduce_constants_and_are_smooth():
    constant = smooth_field(torch.full((1, 3, 4, 4, 4), 2.5), (9, 7, 1))
    assert constant.shape == (1, 3, 9, 7, 1) and torch.allclose(constant, torch.tensor(2.5))
    field = smooth_field(torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)), (40, 8, 8))
    assert field.diff(dim=2).abs().max() < 0.3


def patches(config: Config, window) -> Patches:
    volumes = Phantoms("organs", "train")
    facts = {"spacing": [4.0, 4.0, 5.0], "normalise": "zscore", "intensity": {}}
    return Patches(PreparedCases(volumes, facts, 1.0), window, config)


def test_a_warp_by_nothing_is_a_crop():
    torch.manual_seed(0)
    plain = patches(Config(foreground=1.0), (13, 11, 9))[0]
    torch.manual_seed(0)
    warped = patches(Config(foreground=1.0, rotate=1e-9), (13, 11, 9))[0]
    assert torch.allclose(plain[0], warped[0], atol=1e-3) and torch.equal(plain[1], warped[1])


def test_patches_beyond_the_volume_do_not_count_there():
    image, mask = patches(Config(), (60, 11, 9))[0]
    assert image.shape == (1, 60, 11, 9) and (mask[0] == 255).all() and (mask[30] != 255).any()


def test_mirrored_patches_mirror_both():
    torch.manual_seed(1)
    given = patches(Config(foreground=1.0), (12, 12, 12))
    image, mask = given[0]
    for seed in range(6):
        torch.manual_seed(1)
        other = Patches(given.cases, given.window, Config(foreground=1.0, flip=("x",)))
        torch.manual_seed(1)
        flipped_image, flipped_mask = other[0]
        assert torch.equal(flipped_image, image) == torch.equal(flipped_mask, mask), seed
        assert torch.equal(flipped_mask, mask) or torch.equal(flipped_mask.flip(0), mask)


# -- metrics -----------------------------------------------------------------------------------------------------------


def blobs(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(rng.normal(size=(14, 12, 10)), 2) > 0.02


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 5.0)])
def test_distances_are_monais(spacing):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    a, b = blobs(0), blobs(1)
    ours = measure.surface_distances(a, b, spacing)
    pair = [torch.from_numpy(m)[None, None].float() for m in (a, b)]
    hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
    mean = compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing)
    assert measure.hausdorff_95(ours) == pytest.approx(float(hd95), abs=1e-4)
    assert measure.average_surface_distance(ours) == pytest.approx(float(mean), abs=1e-4)


def test_distances_by_hand():
    a, b = np.zeros((2, 8, 4, 4), bool)
    a[2, 1, 1] = b[5, 1, 1] = True
    assert measure.hausdorff_95(measure.surface_distances(a, b, (2.0, 1.0, 1.0))) == 6
    assert measure.surface_distances(a, np.zeros_like(a), (1.0, 1.0, 1.0)) is None
    slice_a, slice_b = a[:, :, 1:2], b[:, :, 1:2]  # a volume of one slice
    slice_a[1:4, 0:3] = slice_b[4:7, 0:3] = True
    assert measure.average_surface_distance(measure.surface_distances(slice_a, slice_a, (1.0, 1.0, 9.0))) == 0
    assert measure.hausdorff_95(measure.surface_distances(slice_a, slice_b, (1.0, 1.0, 9.0))) == 3


def test_dice_is_monais_and_empty_structures_do_not_count():
    from monai.metrics import compute_dice

    rng = torch.Generator().manual_seed(0)
    found, true = (torch.randint(0, 3, (6, 5, 4), generator=rng) for _ in range(2))
    ours = measure.dice_of(measure.overlap_counts(found, true, 4))
    one_hot = [nn.functional.one_hot(m, 4).movedim(-1, 0)[None] for m in (found, true)]
    assert torch.allclose(ours[:3].float(), compute_dice(*one_hot, ignore_empty=True)[0, :3].float())
    assert ours[3].isnan()
    true[0] = 255
    assert measure.overlap_counts(found, true, 3)[:, 1:].sum() == 2 * 5 * 5 * 4


def test_metrics_of_a_table_by_hand():
    table = torch.full((2, 3, 5), torch.nan, dtype=torch.float64)
    table[0, 1] = torch.tensor([4, 5, 5, 2.0, 1.0])  # Dice 0.8
    table[1, 1] = torch.tensor([0, 3, 0, 50.0, 50.0])  # invented: Dice 0
    table[:, 2, :3] = torch.tensor([[6, 6, 6], [0, 0, 0]])  # Dice 1, and nothing on either side
    table[0, 2, 3:] = 0
    found = metrics(table, ["background", "a", "b c"])
    assert found["dice_a"] == pytest.approx(0.4) and found["dice_b_c"] == 1 and found["dice"] == pytest.approx(0.7)
    assert found["dice_pooled"] == pytest.approx((8 / 13 + 1) / 2)
    assert found["hd95_mm"] == pytest.approx(13) and found["missed_or_invented"] == 1
    nothing = torch.zeros(1, 2, 5, dtype=torch.float64)
    nothing[..., 3:] = torch.nan
    assert metrics(nothing, ["background", "a"])["dice"] == 1


# -- the recipe --------------------------------------------------------------------------------------------------------


class Thresholds(VolumeSegmentationRecipe):
    """A network of one 3x3 convolution, with the task's own steps."""

    def build(self) -> nn.Module:
        kind = nn.Conv3d if self.config.dimensions == 3 else nn.Conv2d
        return kind(len(self.facts["channels"]), len(self.facts["labels"]), 3, padding=1)


def recipe(**changes) -> Thresholds:
    config = Config(data="organs", window=(16, 16, 16), spacing=(8.0, 8.0, 10.0), steps=4)
    return Thresholds(replace(config, **changes), Runtime())


@pytest.mark.parametrize("kind", ["dice", "cross_entropy", "dice_cross_entropy"])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_where_nothing_counts_the_loss_is_0(kind, batch_dice):
    made = recipe(loss=kind, batch_dice=batch_dice)
    logits = torch.randn(2, 6, 4, 4, 4, requires_grad=True)
    loss = made.loss(logits, torch.full((2, 4, 4, 4), 255))
    loss.backward()
    assert float(loss) == 0 and torch.isfinite(logits.grad).all()
    empty = made.loss(logits, torch.zeros(2, 4, 4, 4, dtype=torch.int64))
    assert torch.isfinite(empty) and float(empty) > 0


def test_ignored_voxels_do_not_matter():
    made = recipe()
    logits, masks = torch.randn(1, 6, 4, 4, 4), torch.randint(0, 6, (1, 4, 4, 4))
    masks[:, 2:] = 255
    changed = logits.clone()
    changed[:, :, 2:] = 9
    assert torch.equal(made.loss(logits, masks), made.loss(changed, masks))


def test_windows_and_the_whole_volume_agree():
    """A network that sees one voxel's neighbours: by windows with Gaussian weights, each voxel gets nearly the same."""
    made = recipe()
    case = prepare(made.test_set[0], made.facts)
    with torch.no_grad():
        whole = made.model(case.image[None])[0]
    inner = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    assert (made.logits(case.image)[inner] - whole[inner]).abs().mean() < 0.05


def test_answers_beyond_memory_are_gathered_in_a_file(monkeypatch):
    from paperzoo.tasks import volume_segmentation

    made = recipe()
    case = prepare(made.test_set[0], made.facts)
    expected = made.logits(case.image)
    monkeypatch.setattr(volume_segmentation, "IN_MEMORY", 100)
    assert torch.equal(made.logits(case.image), expected)


@pytest.mark.parametrize("plane,axis", [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_networks_of_two_dimensions_go_slice_by_slice(plane, axis):
    made = recipe(dimensions=2, window=(60, 60), plane=plane)
    images, masks = made.batch()
    assert images.shape == (2, 1, 60, 60) and masks.shape == (2, 60, 60)
    case = prepare(made.test_set[0], made.facts)
    out = made.logits(case.image)
    with torch.no_grad():
        expected = made.model(case.image.select(1 + axis, 3)[None])[0]
    inner = (slice(None), slice(1, -1), slice(1, -1))
    assert torch.allclose(out.select(1 + axis, 3)[inner], expected[inner], atol=1e-4)


def test_auxiliary_logits_may_be_coarser():
    made = recipe()

    class WithAuxiliary(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            out = self.net(x)
            return {"out": out, "aux": [nn.functional.avg_pool3d(out, 2), nn.functional.avg_pool3d(out, 4)]}

    made.model = WithAuxiliary(made.model)
    made.config = replace(made.config, aux_weights=(0.5, 0.25))
    found = made.step(made.batch())
    assert float(found["loss"]) > float(found["out_loss"])
    masks = torch.arange(64).view(1, 4, 4, 4)
    assert coarser(masks, (2, 2, 2)).flatten().tolist() == masks[0, 1::2, 1::2, 1::2].flatten().tolist()


def test_predictions_lie_on_the_voxels_of_the_file(tmp_path):
    import nibabel

    made = recipe()
    volume = made.test_set[1]
    files = made.samples(tmp_path)
    assert all(name.endswith(".nii.gz") for name in files)
    result = made.predict([files[1]])[0]
    assert result.mask.shape == volume.size and result.stored_as == orientation(volume.original)
    assert torch.equal(result.mask, made.predict([volume])[0].mask)
    saved = nibabel.load(result.save(tmp_path / "mask.nii.gz"))
    given = nibabel.load(files[1])
    assert saved.shape == given.shape and np.allclose(saved.affine, given.affine, atol=1e-4)
    assert torch.equal(read_volume(tmp_path / "mask.nii.gz").image[0].to(torch.uint8), result.mask)
    voxel = np.prod(volume.spacing) / 1000
    for name, size in result.volumes_ml.items():
        count = int((result.mask == made.facts["labels"].index(name)).sum())
        assert size == pytest.approx(count * voxel, abs=1e-2)


def test_a_slice_and_odd_sizes_are_segmented():
    made = recipe()
    for shape in ((9, 7, 1), (5, 33, 2), (3, 3, 3)):
        result = made.predict([np.random.default_rng(0).normal(size=shape) * 500])[0]
        assert result.mask.shape == shape and torch.isfinite(result.confidence).all()


def test_wrong_channels_and_settings_are_named():
    with pytest.raises(PaperZooError, match=r"has 2 channel\(s\), the network needs 1 \(CT\)"):
        recipe().predict([np.zeros((2, 4, 4, 4))])
    with pytest.raises(PaperZooError, match="window"):
        recipe(window=(16, 16))
    with pytest.raises(PaperZooError, match="smaller factor"):
        recipe(scale=(1.2, 0.8))


def test_several_files_are_channels_and_none_is_missing(tmp_path, numbers):
    one, two = (nifti(tmp_path / f"{i}.nii.gz", numbers + i) for i in range(2))
    assert read_volume([one, two]).image.shape[0] == 2
    assert torch.isnan(read_volume([None, two]).image[0]).all()
    other = nifti(tmp_path / "o.nii.gz", numbers[:4])
    with pytest.raises(DataError, match="same voxels"):
        read_volume([one, other])


def test_evaluation_counts_every_case_once():
    made = recipe()
    table = made.table()
    assert table.shape == (6, 6, 5)
    for i in range(6):
        volume = made.test_set[i]
        assert float(table[i, :, 2].sum()) == volume.mask.numel()
    assert set(made.evaluate()) >= {"dice", "dice_pooled", "hd95_mm", "surface_distance_mm", "dice_liver"}


def test_pictures():
    made = recipe()
    volume = made.test_set[0]
    picture = made.draw(volume, made.predict([volume])[0])
    assert picture.width > 500 and len(picture.getcolors(10**6)) > 20
    assert all(p.width > 100 for p in made.figures().values())
