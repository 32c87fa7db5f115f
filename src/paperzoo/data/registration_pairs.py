"""Pairs of volumes to be registered: Learn2Reg folders, lists of pairs, sets of volumes, embedded bodies that were bent by known maps.

    open_pairs("bodies", "train")             generated bodies, each with a bent copy and the map between them; always there
    open_pairs("slices", "test")              the same in two dimensions: one axial slice of each
    open_pairs("OASIS", "train")              Learn2Reg: dataset.json with `registration_val` (and `training_paired_images` where pairs are given)
    open_pairs("pairs.csv", "train")          a table with the columns moving and fixed, and where there are any moving_labels, fixed_labels, split
    open_pairs("path/to/folder", "test")      moving/ and fixed/ with equal names (moving_labels/ and fixed_labels/ beside them)
    open_pairs("organs", "train")             any set that `paperzoo.data.volumes` opens: every case is moved to every other

An item is a `Pair`. Of a set of single volumes training takes all ordered pairs of its training cases and testing each held-out case with the
next one; with an `atlas`, a case's name or a file, that is always the fixed one.
"""

from __future__ import annotations

import csv
import functools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.phantoms import BODY, BODY_VALUE, ORGANS, SHAPES, STOMACH
from paperzoo.data.phantoms import EMBEDDED as VOLUMES
from paperzoo.data.volumes import (
    HELD_OUT,
    IGNORE,
    READ,
    SPLITS,
    Volume,
    elsewhere,
    file_name,
    open_volumes,
    read_volume,
)
from paperzoo.errors import DataError, PaperZooError, UnknownName

EMBEDDED = ("bodies", "slices")


@dataclass(frozen=True)
class Pair:
    """Two volumes; `moving` is to be bent until it lies on `fixed`. Masks where they are known.

    field: the true map where it is known: float32 (3, X, Y, Z) on the voxels of `fixed`, mm right, front, top from a voxel to where its
    anatomy lies in `moving`; NaN where nothing is known.
    """

    moving: Volume
    fixed: Volume
    name: str = ""
    field: Tensor | None = None


class VolumePairs(Dataset):
    """Ordered pairs (i, j) of a set of volumes: i is moved to j; all share the set's class names and modalities."""

    def __init__(self, volumes: Any, pairs: Sequence[tuple[int, int]], fixed: Volume | None = None) -> None:
        self.volumes, self.pairs, self.fixed = volumes, pairs, fixed
        self.labels, self.channels = list(volumes.labels), list(volumes.channels)

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> str:
        moving, fixed = self.pairs[i]
        return f"{self.volumes.path(moving)} to {self.volumes.path(fixed) if fixed >= 0 else self.fixed}"

    def __getitem__(self, i: int) -> Pair:
        a, b = self.pairs[i]
        moving, fixed = self.volumes[a], self.volumes[b] if b >= 0 else self.fixed
        return Pair(moving, fixed, f"{moving} to {fixed}")


class AllOrdered(Sequence):
    """(i, j) for all i other than j below a number, without a list of them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count * (self.count - 1)

    def __getitem__(self, k: int) -> tuple[int, int]:
        if not 0 <= k < len(self):
            raise IndexError(k)
        i, j = divmod(k, self.count - 1)
        return i, j + (j >= i)


@dataclass(frozen=True)
class Files:
    """The files of a pair; masks are None where there are none. `line` says where it is listed."""

    moving: Path
    fixed: Path
    moving_labels: Path | None = None
    fixed_labels: Path | None = None
    line: str = ""


class PairFiles(Dataset):
    """Pairs that are listed file by file, read when asked for."""

    def __init__(self, files: Sequence[Files], labels: Sequence[str] | None, channels: Sequence[str] | None) -> None:
        self.files = files
        self.labels = list(labels) if labels is not None else self._labels()
        first = read_volume(self.files[0].fixed)
        self.channels = list(channels) if channels else [f"channel {i}" for i in range(len(first.image))]

    def _labels(self) -> list[str]:
        """Class names where no file has them: the largest value in the masks of the first pairs."""
        masks = [p for f in self.files[:8] for p in (f.moving_labels, f.fixed_labels) if p is not None]
        values = [int(v) for path in masks for v in read_volume(path).image.unique().tolist() if v != IGNORE]
        return ["background", *(f"class {k}" for k in range(1, max(values, default=0) + 1))]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> str:
        return f"{self.files[i].moving} to {self.files[i].fixed}"

    def __getitem__(self, i: int) -> Pair:
        f = self.files[i]
        moving, fixed = self.volume(f.moving, f.moving_labels), self.volume(f.fixed, f.fixed_labels)
        return Pair(moving, fixed, f"{moving} to {fixed}")

    def volume(self, path: Path, labels: Path | None) -> Volume:
        volume = read_volume(path)
        if len(volume.image) != len(self.channels):
            raise DataError(path, f"has {len(volume.image)} channel(s); the set has {len(self.channels)}")
        if labels is None:
            return volume
        stored = read_volume(labels)
        problem = "it has several channels" if len(stored.image) != 1 else elsewhere(stored, volume)
        if problem:
            raise DataError(labels, f"does not fit its image {path}: {problem}")
        values = stored.image[0]
        wrong = (values != values.round()) | (values < 0) | ((values >= len(self.labels)) & (values != IGNORE))
        if wrong.any():
            raise DataError(
                labels, f"holds the value {float(values[wrong][0]):g}; known are 0 to {len(self.labels) - 1} and 255"
            )
        return replace(volume, mask=values.to(torch.uint8))


def open_pairs(data: str | Path, split: str = "train", atlas: str | None = None) -> Dataset:
    """A set of pairs by name, folder or list; see the module's docstring.

    Raises:
        DataError: for a file that is missing, broken or of another layout. UnknownName: if `data` is neither a set's name nor a path.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
    if str(data) in EMBEDDED:
        if atlas is not None:
            raise PaperZooError(f"the set '{data}' consists of pairs; atlas is for sets of single volumes")
        return BentBodies(str(data), split)
    root = Path(data).expanduser()
    if str(data) not in VOLUMES and not root.exists():
        if len(root.parts) > 1 or root.suffix:
            raise DataError(
                root, "no such file or folder; a list of pairs, dataset.json, or moving/ and fixed/ are expected"
            )
        raise UnknownName("set of pairs, folder or list", str(data), (*EMBEDDED, *VOLUMES))
    opened = None
    if root.is_file():
        opened = _listed(root, split)
    elif (root / "moving").is_dir() or (root / "fixed").is_dir():
        opened = _folders(root, split)
    elif (root / "dataset.json").is_file():
        opened = _learn2reg(root, split)
    if opened is not None:
        if atlas is not None:
            raise PaperZooError(f"{root} lists pairs; atlas is for sets of single volumes")
        return opened
    return paired(open_volumes(data, split), split, atlas, data)


def paired(volumes: Any, split: str, atlas: str | None, data: str | Path) -> VolumePairs:
    """Pairs of a set of single volumes."""
    count = len(volumes)
    if atlas is not None:
        fixed, inside = _atlas(volumes, atlas, data)
        return VolumePairs(volumes, [(i, -1) for i in range(count) if i != inside], fixed)
    if count < 2:
        raise DataError(data, f"has one volume for the split '{split}'; a pair needs two, or an atlas")
    pairs = AllOrdered(count) if split == "train" else [(i, (i + 1) % count) for i in range(count)]
    return VolumePairs(volumes, pairs)


def _atlas(volumes: Any, atlas: str, data: str | Path) -> tuple[Volume, int | None]:
    """The volume that is called so, and its number if it is one of these."""
    path = Path(atlas).expanduser()
    if path.exists():
        return read_volume(path), None
    sets = [volumes, *(open_volumes(data, s) for s in SPLITS)]
    for number, cases in enumerate(sets):
        for i in range(len(cases)):
            if file_name(Path(cases.path(i))) == atlas or cases.path(i) == atlas:
                return cases[i], i if number == 0 else None
    raise PaperZooError(f"atlas '{atlas}' is neither a file nor the name of a case of {data}")


# -- lists and folders ---------------------------------------------------------------------------------------------------


def _listed(path: Path, split: str) -> PairFiles:
    """A table of pairs (.csv, or .tsv); paths are relative to it. Without a column `split` every fifth pair is held out."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise DataError(path, "a list of pairs is .csv or .tsv with the columns moving and fixed")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, f"not a readable table ({error})") from None
    columns = set(rows[0]) if rows else set()
    if not {"moving", "fixed"} <= columns:
        raise DataError(
            path, f"needs the columns moving and fixed; it has {', '.join(sorted(filter(None, columns))) or 'no rows'}"
        )
    files, chosen = [], []
    for number, row in enumerate(rows, 2):
        found = {}
        for key in ("moving", "fixed", "moving_labels", "fixed_labels"):
            text = (row.get(key) or "").strip()
            if not text and key in ("moving", "fixed"):
                raise DataError(path, f"line {number}: has no '{key}'")
            found[key] = path.parent / text if text else None
            if text and not found[key].exists():
                raise DataError(path, f"line {number}: {found[key]} is not there")
        said = (row.get("split") or "").strip().lower()
        if said and said not in {name for names in SPLITS.values() for name in names}:
            raise DataError(path, f"line {number}: split is '{said}'; it is train or test")
        files.append(Files(**found, line=f"line {number}"))
        chosen.append(said)
    if any(chosen):
        kept = [
            f for f, said in zip(files, chosen, strict=True) if said in SPLITS[split] or (not said and split == "train")
        ]
    else:
        kept = [f for i, f in enumerate(files) if (i % HELD_OUT == HELD_OUT - 1) == (split == "test")]
    if not kept:
        raise DataError(
            path, f"has no pair for the split '{split}'; without a column split every fifth one is held out"
        )
    return PairFiles(kept, None, None)


def _folders(root: Path, split: str) -> PairFiles:
    """moving/ and fixed/ with equal names, moving_labels/ and fixed_labels/; every fifth pair is held out."""
    named = {}
    for key in ("moving", "fixed", "moving_labels", "fixed_labels"):
        folder = root / key
        if folder.is_dir():
            listed = [p for p in sorted(folder.iterdir()) if p.is_dir() or p.name.lower().endswith(READ)]
            named[key] = {file_name(p): p for p in listed if not p.name.startswith(".")}
        elif key in ("moving", "fixed"):
            raise DataError(root, f"needs the folders moving/ and fixed/; {key}/ is not there")
    lacking = sorted(named["moving"].keys() ^ named["fixed"].keys())
    if lacking:
        there = "moving" if lacking[0] in named["moving"] else "fixed"
        raise DataError(root / there / lacking[0], "has no partner of the same name in the other folder")
    if not named["moving"]:
        raise DataError(root / "moving", f"has no volumes ({', '.join(READ)})")
    files = [
        Files(*(named.get(k, {}).get(n) for k in ("moving", "fixed", "moving_labels", "fixed_labels")))
        for n in named["moving"]
    ]
    kept = [f for i, f in enumerate(files) if (i % HELD_OUT == HELD_OUT - 1) == (split == "test")]
    if not kept:
        raise DataError(root, f"has {len(files)} pair(s); at least {HELD_OUT} are needed to hold any out for testing")
    return PairFiles(kept, None, None)


def _learn2reg(root: Path, split: str) -> Dataset | None:
    """dataset.json of Learn2Reg; None where it is of a segmentation challenge. Masks lie in labelsTr/ under the image's name."""
    place = root / "dataset.json"
    try:
        facts = json.loads(place.read_text(encoding="utf-8"))
        held = facts.get("registration_val") or facts.get("registration_test")
        given = facts.get("training_paired_images") or []
        if not held and not given:
            return None
        listed = facts.get("training") or []
        listed = [row for rows in listed.values() for row in rows] if isinstance(listed, dict) else listed
        names = facts.get("labels") or {}
        names = next(iter(names.values())) if names and isinstance(next(iter(names.values())), dict) else names
        labels = None
        if names:
            pairs = [(int(k), str(v)) if str(k).isdigit() else (int(v), str(k)) for k, v in names.items()]
            by_value = dict(pairs)
            labels = [by_value.get(k, "background" if k == 0 else f"class {k}") for k in range(max(by_value) + 1)]
        channels = [str(next(iter((facts.get("modality") or {"0": "channel 0"}).values())))]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(place, f"not a readable dataset.json ({str(error)[:120]})") from None
    if split == "test" or given:
        rows = given if split == "train" else held
        if not rows:
            raise DataError(place, "lists no pairs for testing: registration_val or registration_test is needed")
        return PairFiles([_entry(root, place, n, row) for n, row in enumerate(rows, 1)], labels, channels)
    away = {str(row.get(key)) for row in held for key in ("moving", "fixed")}
    kept = [
        str(row["image"])
        for row in listed
        if isinstance(row, dict) and "image" in row and str(row["image"]) not in away
    ]
    if len(kept) < 2:
        raise DataError(place, f"lists {len(kept)} training image(s) beside those of registration_val; two are needed")
    return PairFiles(_Ordered(root, place, kept), labels, channels)


class _Ordered(Sequence):
    """All ordered pairs of listed images, without a list of them."""

    def __init__(self, root: Path, place: Path, images: list[str]) -> None:
        self.root, self.place, self.images, self.order = root, place, images, AllOrdered(len(images))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, k: int | slice) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        i, j = self.order[k]
        return _entry(self.root, self.place, k + 1, {"moving": self.images[i], "fixed": self.images[j]})


def _entry(root: Path, place: Path, number: int, row: Any) -> Files:
    try:
        images = [root / row[key] for key in ("moving", "fixed")]
    except (KeyError, TypeError):
        raise DataError(place, f"pair {number} has no 'moving' or no 'fixed'") from None
    for path in images:
        if not path.exists():
            raise DataError(path, f"of pair {number} in {place.name} is not there")
    masks = [p.parent.parent / p.parent.name.replace("images", "labels") / p.name for p in images]
    return Files(
        *images, *(m if m.exists() and m != p else None for m, p in zip(masks, images, strict=True)), f"pair {number}"
    )


# -- generated ---------------------------------------------------------------------------------------------------------

BODIES = {"bodies": (64, 8), "slices": (128, 16)}  # pairs for training, for testing
SIZE, SPACING = (36, 28, 28), (4.2, 4.2, 5.4)  # voxels and mm of a body
SLICE, SLICE_SPACING = (56, 44), 2.7
BEND = 8.0  # mm, standard deviation at the control points of a map
CONTROL = (5, 4, 5)


class BentBodies(Dataset):
    """Pairs of CT-like bodies. `fixed` shows the anatomy of `moving` after a smooth one-to-one map, with noise of its own; the map is known.

    Organs lie and measure differently in every pair. "slices" are axial ones through the middle, bent within their plane.
    """

    labels, channels = list(ORGANS), ["CT"]

    def __init__(self, name: str, split: str) -> None:
        self.name, self.split = name, split

    def __len__(self) -> int:
        return BODIES[self.name][self.split == "test"]

    def path(self, i: int) -> str:
        return f"{self.name} {self.split} {i}"

    def __getitem__(self, i: int) -> Pair:
        return bent_body(self.name, self.split, i)


@functools.lru_cache(maxsize=256)
def bent_body(name: str, split: str, i: int) -> Pair:
    """One pair; treat its tensors as read-only. A map that folds is drawn again."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {split} {i}".encode()))
    torch_rng = torch.Generator().manual_seed(int(rng.integers(2**31)))
    size, spacing = (SIZE, SPACING) if name == "bodies" else ((*SLICE, 1), (SLICE_SPACING, SLICE_SPACING, 5.0))
    lines = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing, strict=True)]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij"))
    if name == "slices":
        places[2] = -12.0  # where liver, spleen, stomach and spine are cut
    while True:
        bend = torch.randn(1, 3, *CONTROL, generator=torch_rng) * BEND
        field = F.interpolate(bend, size=size, mode="trilinear", align_corners=True)[0]
        field = _smoothed(field)
        if name == "slices":
            field[2] = 0
        if float(jacobians(field, spacing).min()) > 0.1:
            break
    anatomy = _anatomy(rng)
    images, masks = zip(
        *(_painted(at, anatomy, torch_rng, name == "slices") for at in (places, places + field)), strict=True
    )
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    moving, fixed = (
        Volume(image[None], affine, mask, f"{name}_{split}_{i:02d}_{which}")
        for image, mask, which in zip(images, masks, ("moving", "fixed"), strict=True)
    )
    return Pair(moving, fixed, f"{name} {split} {i}", field.where(images[1] > -500, torch.nan))


def _smoothed(field: Tensor) -> Tensor:
    """Averaged with its neighbours twice: a map between control points without kinks."""
    kernel = [3 if n > 3 else 1 for n in field.shape[1:]]
    pads = [k // 2 for k in reversed(kernel) for _ in range(2)]
    for _ in range(2):
        field = F.avg_pool3d(F.pad(field[None], pads, mode="replicate"), kernel, 1)[0]
    return field


def jacobians(field: Tensor, spacing: Sequence[float]) -> Tensor:
    """det(1 + du/dx) of a field (3, X, Y, Z) in mm: (X, Y, Z). Along an axis of one voxel nothing changes."""
    rows = []
    for a in range(3):
        flat = field.shape[1 + a] == 1
        rows.append(torch.zeros_like(field) if flat else torch.gradient(field, spacing=spacing[a], dim=1 + a)[0])
    return torch.linalg.det(torch.stack(rows, 0).permute(2, 3, 4, 1, 0) + torch.eye(3))


def _anatomy(rng: np.random.Generator) -> list[tuple[tuple, tuple, float, int]]:
    """Ellipsoids (centre, radii, value, label) in the order in which they are painted."""
    grown = float(rng.uniform(0.92, 1.05))
    parts = [((0.0, 0.0, 0.0), tuple(r * grown for r in BODY), float(BODY_VALUE), 0)]

    def put(centre, radii, value, label) -> None:
        centre = tuple(c * grown + rng.normal(0, 3) for c in centre)
        parts.append(
            (centre, tuple(r * grown * rng.uniform(0.85, 1.15) for r in radii), value + rng.normal(0, 10), label)
        )

    put(*STOMACH, 0)
    for label, organ in enumerate(ORGANS[1:], 1):
        for centre, radii, value in SHAPES[organ]:
            put(centre, radii, value, label)
    return parts


def _painted(places: Tensor, anatomy: list, rng: torch.Generator, flat: bool) -> tuple[Tensor, Tensor]:
    """Values and labels (X, Y, Z) of the anatomy at these places, mm (3, X, Y, Z)."""
    values = torch.full(places.shape[1:], -1000.0)
    mask = torch.zeros(places.shape[1:], dtype=torch.uint8)
    shape = (3, 1, 1, 1)
    for centre, radii, value, label in anatomy:
        away = (places - torch.tensor(centre, dtype=torch.float32).view(shape)) / torch.tensor(
            radii, dtype=torch.float32
        ).view(shape)
        here = away.square().sum(0) < 1
        values[here], mask[here] = float(value), label
    kernel = (3, 3, 1) if flat else (3, 3, 3)
    pads = [k // 2 for k in reversed(kernel) for _ in range(2)]
    blurred = F.avg_pool3d(F.pad(values[None, None], pads, mode="replicate"), kernel, 1)[0, 0]  # voxels hold mixtures
    return 0.5 * values + 0.5 * blurred + 35 * torch.randn(values.shape, generator=rng), mask
