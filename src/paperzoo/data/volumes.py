"""Volumes with masks: NIfTI, DICOM series, the Medical Segmentation Decathlon's and nnU-Net's folders, plain folders, embedded phantoms.

    open_volumes("organs", "train")            generated CT-like bodies, always there (see `paperzoo.data.phantoms`)
    open_volumes("Task03_Liver", "train")      dataset.json with imagesTr/ and labelsTr/: the Decathlon, or nnU-Net (case_0000.nii.gz)
    open_volumes("path/to/folder", "test")     images/ and masks/ with equal names: .nii.gz, .nii, .npz, or a DICOM series a folder

An item is a `Volume`. Whatever way a file lies, its array is turned so that the axes run to the patient's right, front and top (RAS+, as
NIfTI counts; DICOM's left-back-top is converted). Voxel spacing and oblique angles stay in the affine. What is predicted is turned back, so
that a written mask lies on the original voxels with the original affine.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.images import HELD_OUT
from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName

IGNORE = 255
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid")}
NIFTI = (".nii.gz", ".nii")
READ = (*NIFTI, ".npz", ".npy", ".dcm", ".ima")
IN_MEMORY = 2**32  # bytes; a larger volume is kept in a temporary file that is mapped into memory
APART = 0.5  # voxels by which an image and its mask may lie apart

Missing = Literal["refuse", "zero"]


@dataclass(frozen=True)
class Volume:
    """One case.

    image: float32 (C, X, Y, Z), a channel a modality, NaN throughout in a modality that is missing; axes run right, front, top.
    affine: float64 (4, 4), from the indices of `image` to mm.
    mask: uint8 (X, Y, Z), class ids and 255 for "does not count"; None where it is unknown.
    original: the affine of the file's own voxels, on which predictions are written; None: `affine`.
    """

    image: Tensor
    affine: np.ndarray
    mask: Tensor | None = None
    name: str = ""
    original: np.ndarray | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distances of neighbouring voxels along the three axes, mm."""
        return spacing_of(self.affine)

    @property
    def size(self) -> tuple[int, int, int]:
        return tuple(self.image.shape[1:])

    def __str__(self) -> str:
        return self.name or "volume"


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(n) for n in np.linalg.norm(affine[:3, :3], axis=0))


# -- orientation -----------------------------------------------------------------------------------------------------


def axes_of(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """For right, front and top: which array axis runs most nearly that way, and whether it runs against it."""
    from scipy.optimize import linear_sum_assignment

    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    _, order = linear_sum_assignment(-np.abs(directions))
    return tuple(int(i) for i in order), tuple(bool(directions[w, a] < 0) for w, a in enumerate(order))


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(…, three spatial axes) and its affine, turned to right, front, top; no voxel is interpolated."""
    order, against = axes_of(affine)
    sizes = array.shape[-3:]
    turned = np.zeros((4, 4))
    turned[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, against, strict=True)):
        turned[old, new] = -1 if flip else 1
        turned[old, 3] = sizes[old] - 1 if flip else 0
    lead = array.ndim - 3
    array = array.transpose(*range(lead), *(lead + old for old in order))
    array = np.flip(array, tuple(lead + i for i, flip in enumerate(against) if flip))
    return array, affine @ turned


def from_ras(array: np.ndarray, original: np.ndarray) -> np.ndarray:
    """The inverse of `to_ras`: (…, X, Y, Z) as the voxels lay with the affine `original`."""
    order, against = axes_of(original)
    lead = array.ndim - 3
    array = np.flip(array, tuple(lead + i for i, flip in enumerate(against) if flip))
    return array.transpose(*range(lead), *(lead + i for i in np.argsort(order)))


def orientation(affine: np.ndarray) -> str:
    """Where the array axes run to, in three letters as nibabel writes them: "RAS", "LPS", "PIR" …"""
    order, against = axes_of(affine)
    letters = [""] * 3
    for pair, axis, flip in zip(("RL", "AP", "SI"), order, against, strict=True):
        letters[axis] = pair[flip]
    return "".join(letters)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_volume(value: Any) -> Volume:
    """Whatever a user may call a volume.

    A path (NIfTI, a folder of one DICOM series or one of its files, .npz with `image` and optionally `affine` or `spacing`, .npy); a list of
    paths, one a modality, None for one that is missing; an array (X, Y, Z) or (C, X, Y, Z), of spacing 1 mm; or a `Volume`.

    Raises:
        DataError: for a file that is missing, broken or no volume. MissingExtra: without the package that reads it.
    """
    if isinstance(value, Volume):
        return value
    if isinstance(value, list | tuple):
        return _stacked(list(value))
    if isinstance(value, str | Path):
        array, affine = _read(Path(value).expanduser())
        name = file_name(Path(value))
    elif isinstance(value, Tensor | np.ndarray):
        array, affine, name = np.asarray(value, dtype=np.float32), np.eye(4), "array"
        array = array[None] if array.ndim == 3 else array
        if array.ndim != 4 or 0 in array.shape:
            raise PaperZooError(f"a volume has the shape (X, Y, Z) or (C, X, Y, Z), not {tuple(value.shape)}")
    else:
        raise PaperZooError(f"a volume is a path, a list of paths, an array or a tensor, not {type(value).__name__}")
    turned, new = to_ras(array, affine)
    return Volume(_finite(turned), new, name=name, original=affine)


def _stacked(paths: list) -> Volume:
    """One volume from a file a modality; a None becomes a channel of NaN."""
    volumes = [None if path is None else read_volume(path) for path in paths]
    first = next((v for v in volumes if v is not None), None)
    if first is None:
        raise PaperZooError("a volume needs at least one modality; every path is None")
    for path, volume in zip(paths, volumes, strict=True):
        if volume is None:
            continue
        if len(volume.image) != 1:
            raise DataError(path, f"has {len(volume.image)} channels; one file a modality is expected")
        problem = elsewhere(volume, first)
        if problem:
            raise DataError(path, f"{problem}; the modalities of a case must lie on the same voxels")
    images = [torch.full_like(first.image, math.nan) if v is None else v.image for v in volumes]
    return Volume(torch.cat(images), first.affine, name=first.name, original=first.original)


def elsewhere(a: Volume, b: Volume) -> str:
    """In what two volumes lie differently; empty if their voxels are the same to half a voxel."""
    if a.size != b.size:
        sizes = " and ".join(" x ".join(map(str, v.size)) for v in (a, b))
        return f"sizes are {sizes} voxels (right, front, top)"
    corners = np.array([[i, j, k, 1] for i in (0, a.size[0]) for j in (0, a.size[1]) for k in (0, a.size[2])]).T
    apart = np.linalg.norm(((a.affine - b.affine) @ corners)[:3], axis=0).max()
    return f"they lie {apart:.1f} mm apart" if apart > APART * min(a.spacing) else ""


def file_name(path: Path) -> str:
    """A file's name without the ending of its format."""
    ending = next((e for e in READ if path.name.lower().endswith(e)), "")
    return path.name[: len(path.name) - len(ending)] if ending else path.name


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """float32 (C, three axes as stored) and the affine."""
    if path.is_dir():
        from paperzoo.data.dicom import read_series

        return read_series(path)
    if not path.is_file():
        raise DataError(path, "no such file")
    name = path.name.lower()
    if name.endswith(NIFTI):
        return read_nifti(path)
    if name.endswith((".npz", ".npy")):
        return _read_numpy(path)
    with path.open("rb") as file:
        file.seek(128)
        dicom = file.read(4) == b"DICM"
    if dicom or name.endswith((".dcm", ".ima")):
        from paperzoo.data.dicom import read_series

        return read_series(path)
    raise DataError(path, "not a volume that is read here; they are NIfTI (.nii, .nii.gz), DICOM, .npz and .npy")


def nibabel() -> Any:
    try:
        import nibabel
    except ImportError:
        raise MissingExtra("nibabel", "medical", "reading NIfTI") from None
    return nibabel


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI file as float32 (C, three axes as stored), scaled as its header says, and its affine. A fourth axis holds the channels."""
    library = nibabel()
    try:
        image = library.load(path)
        shape, affine = tuple(image.shape), np.array(image.affine, dtype=np.float64)
        shape3 = (*shape, 1, 1)[:3] if len(shape) < 3 else shape[:3]
        channels = [n for n in shape[3:] if n != 1]
        if len(channels) > 1 or len(shape) < 2 or 0 in shape:
            raise DataError(path, f"has the shape {shape}; a volume has three axes, or four with the modalities last")
        count = channels[0] if channels else 1
        _check_affine(path, affine)
        array = empty((count, *shape3))
        if array.nbytes <= IN_MEMORY:
            values = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
            array[:] = values.reshape(*shape3, count).transpose(3, 0, 1, 2)
        else:
            for z in range(shape3[2]):  # a slice at a time
                array[..., z] = np.asarray(image.dataobj[:, :, z]).reshape(*shape3[:2], count).transpose(2, 0, 1)
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DataError(path, f"not a readable NIfTI file ({type(error).__name__}: {str(error)[:120]})") from None
    return array, affine


def _read_numpy(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        stored = np.load(path, allow_pickle=False)
        values = dict(stored) if isinstance(stored, np.lib.npyio.NpzFile) else {"image": stored}
    except Exception as error:
        raise DataError(path, f"not a readable NumPy file ({type(error).__name__}: {str(error)[:120]})") from None
    key = next((k for k in ("image", "mask", "label") if k in values), None)
    if key is None:
        raise DataError(path, f"needs an array 'image' (or 'mask'); it holds {', '.join(values) or 'nothing'}")
    array = values[key].astype(np.float32)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or 0 in array.shape:
        raise DataError(path, f"'{key}' has the shape {values[key].shape}; (X, Y, Z) or (C, X, Y, Z) is needed")
    affine = values.get("affine", np.diag([*values.get("spacing", (1.0, 1.0, 1.0)), 1.0])).astype(np.float64)
    _check_affine(path, affine)
    return array, affine


def _check_affine(path: Path, affine: np.ndarray) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(path, "its affine gives no size to a voxel; spacings must be above 0")


def empty(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """An array for a volume: in memory, or mapped from a temporary file (which goes with it) where it is larger than `IN_MEMORY`."""
    if math.prod(shape) * np.dtype(dtype).itemsize <= IN_MEMORY:
        return np.empty(shape, dtype)
    return np.memmap(tempfile.TemporaryFile(), dtype, "w+", shape=tuple(shape))


def _finite(array: np.ndarray) -> Tensor:
    """A tensor without NaN and infinities inside: they become the channel's smallest value."""
    array = np.ascontiguousarray(array) if array.nbytes <= IN_MEMORY else _copied(array)
    for channel in array:
        bad = ~np.isfinite(channel)
        if bad.any():
            channel[bad] = channel[~bad].min() if not bad.all() else 0.0
    return torch.from_numpy(array)


def _copied(array: np.ndarray) -> np.ndarray:
    """Contiguous without being in memory."""
    copy = empty(array.shape, array.dtype)
    for z in range(array.shape[-1]):
        copy[..., z] = array[..., z]
    return copy


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (X, Y, Z), or (C, X, Y, Z) with the channels as a fourth axis, as NIfTI; as .npz with `image` and `affine` where the name says so.

    Raises:
        PaperZooError: if the folder cannot be written. MissingExtra: without nibabel.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez_compressed(path, image=array, affine=affine)
            return
        library = nibabel()
        library.save(library.Nifti1Image(array if array.ndim == 3 else np.moveaxis(array, 0, -1), affine), path)
    except OSError as error:
        raise PaperZooError(f"{path}: cannot be written ({error.strerror})") from None


# -- sets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A case's files: one image, or one a modality (None: missing), and the mask."""

    name: str
    images: tuple[Path | None, ...]
    mask: Path


class VolumeFiles(Dataset):
    """Volumes with masks, read when asked for.

    Args:
        labels: class names, the background first.
        channels: names of the modalities, "CT" for Hounsfield units.
        ids: stored value -> class id, or 255 for what does not count.
    """

    def __init__(
        self, cases: Sequence[Case], labels: Sequence[str], channels: Sequence[str], ids: dict[int, int]
    ) -> None:
        self.cases, self.labels, self.channels, self.ids = list(cases), list(labels), list(channels), dict(ids)

    def __len__(self) -> int:
        return len(self.cases)

    def path(self, i: int) -> str:
        return str(next(path for path in self.cases[i].images if path is not None))

    def __getitem__(self, i: int) -> Volume:
        case = self.cases[i]
        volume = read_volume(case.images[0] if len(case.images) == 1 else list(case.images))
        if len(volume.image) != len(self.channels):
            raise DataError(
                self.path(i),
                f"has {len(volume.image)} channel(s); the set has {len(self.channels)} ({', '.join(self.channels)})",
            )
        stored = read_volume(case.mask)
        problem = "it has several channels" if len(stored.image) != 1 else elsewhere(stored, volume)
        if problem:
            raise DataError(case.mask, f"does not fit its image {self.path(i)}: {problem}")
        return Volume(volume.image, volume.affine, self.known(stored.image[0], case.mask), case.name, volume.original)

    def spacing(self, i: int) -> tuple[float, float, float]:
        """Of a case, right, front, top, from the header alone where it has one."""
        first = Path(self.path(i))
        if not first.name.endswith(NIFTI):
            return read_volume(first).spacing
        try:
            affine = nibabel().load(first).affine
        except Exception as error:
            raise DataError(first, f"not a readable NIfTI file ({type(error).__name__}: {str(error)[:120]})") from None
        order, _ = axes_of(affine)
        return tuple(spacing_of(affine)[a] for a in order)

    def known(self, stored: Tensor, path: Path) -> Tensor:
        """Stored values as class ids, uint8."""
        mask = torch.full(stored.shape, IGNORE, dtype=torch.uint8)
        left = torch.ones(stored.shape, dtype=torch.bool)
        for value, meaning in self.ids.items():
            here = stored == value
            mask[here] = meaning
            left &= ~here
        if left.any():
            values = ", ".join(f"{v} ({meaning})" for v, meaning in self._meanings())
            raise DataError(path, f"holds the value {float(stored[left][0]):g}; known are {values}")
        return mask

    def _meanings(self) -> list[tuple[int, str]]:
        return [(v, "ignored" if k == IGNORE else self.labels[k]) for v, k in self.ids.items()]


def open_volumes(data: str | Path, split: str = "train", missing: Missing = "refuse") -> Dataset:
    """A set of volumes by name or folder; see the module's docstring.

    Args:
        split: "train" or "test". Every fifth case is held out where the data says nothing (nnU-Net's splits_final.json, folders
            train/ and val/): the Decathlon's own test cases have no masks.
        missing: "refuse" a case that lacks the file of a modality, or take "zero" for it.

    Raises:
        DataError: if the folder has none of the layouts, or a case lacks a file.
        UnknownName: if `data` is neither a set's name nor a path.
    """
    from paperzoo.data.phantoms import EMBEDDED, Phantoms

    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
    if str(data) in EMBEDDED:
        return Phantoms(str(data), split)
    root = Path(data).expanduser()
    if not root.is_dir():
        if len(root.parts) > 1 or root.suffix:
            raise DataError(
                root, "no such folder; dataset.json with imagesTr/, or images/ and masks/ are expected in it"
            )
        raise UnknownName("set of volumes or folder", str(data), EMBEDDED)
    if (root / "dataset.json").is_file():
        return _open_decathlon(root, split, missing)
    return _open_folders(root, split)


def held_out(cases: list[Case], split: str, place: Path) -> list[Case]:
    """Every fifth case is for testing."""
    chosen = [c for i, c in enumerate(cases) if (i % HELD_OUT == HELD_OUT - 1) == (split == "test")]
    if not chosen:
        raise DataError(place, f"has {len(cases)} case(s); at least {HELD_OUT} are needed to hold any out for testing")
    return chosen


def _open_decathlon(root: Path, split: str, missing: Missing) -> VolumeFiles:
    """dataset.json of the Decathlon (labels by number, cases listed) or of nnU-Net v2 (labels by name, files found by their names)."""
    place = root / "dataset.json"
    try:
        facts = json.loads(place.read_text(encoding="utf-8"))
        channels = [str(v) for _, v in sorted((facts.get("channel_names") or facts["modality"]).items(), key=_number)]
        stored = facts["labels"]
    except KeyError as error:
        raise DataError(place, f"has no {error}; 'modality' (or 'channel_names') and 'labels' are needed") from None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(place, f"not a readable dataset.json ({str(error)[:120]})") from None
    labels, ids = _labels(place, stored)
    ending = facts.get("file_ending", ".nii.gz")
    if isinstance(facts.get("training"), list) and facts["training"]:
        cases = [_listed(root, place, n, row) for n, row in enumerate(facts["training"], 1)]
    else:
        masks = sorted((root / "labelsTr").glob(f"*{ending}"))
        cases = [Case(p.name.removesuffix(ending), _modalities(root, p, ending, channels), p) for p in masks]
    cases = [_complete(case, channels, missing) for case in cases]
    if not cases:
        raise DataError(root, f"has no training cases: labelsTr/*{ending} are expected")
    folds = root / "splits_final.json"
    if folds.is_file():
        try:
            names = set(json.loads(folds.read_text(encoding="utf-8"))[0]["train" if split == "train" else "val"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(folds, f"not nnU-Net's list of folds with 'train' and 'val' ({error})") from None
        chosen = [c for c in cases if c.name in names]
        if not chosen:
            raise DataError(folds, f"names no case of {root} for the split '{split}'")
    else:
        chosen = held_out(sorted(cases, key=lambda c: c.name), split, root)
    return VolumeFiles(chosen, labels, channels, ids)


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _labels(place: Path, stored: dict) -> tuple[list[str], dict[int, int]]:
    """Class names and stored value -> class id, from {"0": "background", …} or {"background": 0, …, "ignore": 3}."""
    try:
        pairs = [(int(k), str(v)) if str(k).isdigit() else (int(v), str(k)) for k, v in stored.items()]
    except (TypeError, ValueError):
        raise DataError(
            place, "its labels are not one number a class; regions of several numbers are not read"
        ) from None
    classes = sorted((value, name) for value, name in pairs if name.lower() != "ignore")
    ids = {value: k for k, (value, _) in enumerate(classes)}
    ids |= {value: IGNORE for value, name in pairs if name.lower() == "ignore"}
    if len(classes) < 2:
        raise DataError(place, "needs at least two labels, the background and a structure")
    return [name for _, name in classes], ids


def _listed(root: Path, place: Path, number: int, row: Any) -> Case:
    try:
        image, mask = root / row["image"], root / row["label"]
    except (KeyError, TypeError):
        raise DataError(place, f"training case {number} has no 'image' or no 'label'") from None
    return Case(file_name(image), (image,), mask)


def _modalities(root: Path, mask: Path, ending: str, channels: list[str]) -> tuple[Path | None, ...]:
    name = mask.name.removesuffix(ending)
    return tuple(root / "imagesTr" / f"{name}_{i:04d}{ending}" for i in range(len(channels)))


def _complete(case: Case, channels: list[str], missing: Missing) -> Case:
    """A case whose files are there; a missing modality is refused or becomes None."""
    if not case.mask.exists():
        raise DataError(case.mask, f"the mask of the case '{case.name}' is not there")
    there = tuple(path if path.exists() else None for path in case.images)
    lacking = [path for path, found in zip(case.images, there, strict=True) if found is None]
    if lacking and (missing == "refuse" or len(lacking) == len(there)):
        what = f"the modality '{channels[case.images.index(lacking[0])]}'" if len(there) > 1 else "the image"
        hint = "; with missing=zero it is taken as zeros" if len(lacking) < len(there) else ""
        raise DataError(lacking[0], f"{what} of the case '{case.name}' is not there{hint}")
    return Case(case.name, there, case.mask)


def _open_folders(root: Path, split: str) -> VolumeFiles:
    """images/ and masks/ (or labels/), with train/ and val/ inside or every fifth case held out; labels.txt names the classes 0, 1, …"""
    images = next((root / n for n in ("images", "volumes") if (root / n).is_dir()), None)
    masks = next((root / n for n in ("masks", "labels") if (root / n).is_dir()), None)
    if images is None or masks is None:
        raise DataError(root, "needs dataset.json with imagesTr/ and labelsTr/, or the folders images/ and masks/")
    inside = {s: next((n for n in names if (images / n).is_dir()), None) for s, names in SPLITS.items()}
    split_by_folder = inside["train"] is not None
    if split_by_folder and inside["test"] is None:
        raise DataError(images, "has train/, but no val/ or test/")
    parts = (
        {s: _pairs(images / inside[s], masks / inside[s]) for s in SPLITS}
        if split_by_folder
        else {"": _pairs(images, masks)}
    )
    every = [case for cases in parts.values() for case in cases]
    cases = parts[split] if split_by_folder else held_out(every, split, images)
    listed = root / "labels.txt"
    if listed.is_file():
        labels = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
        ids = {k: k for k in range(len(labels))}
    else:
        found = {int(v) for case in every for v in read_volume(case.mask).image.unique().tolist()} - {IGNORE}
        ids = {value: k for k, value in enumerate(sorted(found | {0}))}
        labels = ["background", *(f"class {value}" for value in sorted(found - {0}))]
    if len(labels) < 2:
        raise DataError(listed if listed.is_file() else masks, "at least two classes are needed, the background first")
    count = len(read_volume(every[0].images[0]).image)
    channels = [f"channel {i}" for i in range(count)]
    return VolumeFiles(cases, labels, channels, ids | {IGNORE: IGNORE})


def _pairs(images: Path, masks: Path) -> list[Case]:
    by_name = {file_name(p): p for p in sorted(masks.iterdir()) if not p.name.startswith(".")}
    cases = []
    for path in sorted(images.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.name.lower().endswith(READ)):
            continue
        mask = by_name.get(file_name(path))
        if mask is None:
            raise DataError(path, f"has no mask; expected {masks / (file_name(path) + '.nii.gz')}")
        cases.append(Case(file_name(path), (path,), mask))
    if not cases:
        raise DataError(images, f"has no volumes ({', '.join(READ)}, or a folder of DICOM files each)")
    return cases
