"""Pairs of pictures of the same thing with points that match: bent photographs, PF-PASCAL, PF-WILLOW, SPair-71k, folders.

    open_matches("bent_photographs", "test")     parts of photographs under known maps, always there
    open_matches("proposal-flow", "test")        a folder with test_pairs.csv, train_pairs.csv, val_pairs.csv, all_pairs_pf_pascal.csv or test_pairs_pf.csv
    open_matches("pairs.csv", "test")            such a list: source_image,target_image,class,XA,YA,XB,YB (PF-PASCAL), or two names and 40 numbers (PF-WILLOW)
    open_matches("SPair-71k", "test")            PairAnnotation/test/*.json, JPEGImages/cat/2008_000182.jpg
    open_matches("path/to/folder", "test")       source/ and target/ with equal names, with or without train/ and val/ above: pairs without points
    open_photographs("bent_photographs")         parts of photographs with their surroundings, from which pairs are made by bending them
    open_photographs("VOC2011/JPEGImages")       every picture of a folder, or of a list with the column "image"

An item of matches is a dict:
    source, target      uint8 (3, H, W) and (3, h, w)
    source_points       float32 (N, 2), x and y in pixels of the source; the middle of the first pixel is (0, 0)   \\
    target_points       float32 (N, 2), the same things in the target                                             |  of sets that have points
    extent              float32 (), the larger side in pixels of the thing's box in the source, where a set        |
                        has boxes; else of the box around its points                                              /

A map answers, for places of the target, where they are in the source. SPair-71k asks the other way round: what it calls target is the source here.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.blocks.homography import from_corners, transform
from paperzoo.blocks.warping import pixel_grid
from paperzoo.data.depth import pictures_in, split_folder
from paperzoo.data.images import read_image
from paperzoo.data.photograph_parts import random_parts
from paperzoo.errors import DataError, PaperZooError, UnknownName

EMBEDDED = "bent_photographs"
SIDE = 64  # pixels of an embedded picture
AROUND = 112  # pixels of a part with its surroundings, of which 9/16, 63 pixels, become a picture
COUNTS = {"train": 192, "test": 96}
KINDS = ("affine", "homography", "spline", "affine and spline")
POINTS = 16  # matching points of an embedded pair
LISTS = {
    "train": ("train_pairs.csv", "trn_pairs.csv", "val_pairs.csv"),
    "test": ("test_pairs.csv", "test_pairs_pf.csv", "test_pairs_pf_pascal.csv", "all_pairs_pf_pascal.csv"),
}
JITTER = 0.4  # the farthest that a control point or a corner moves along x and y, of half a side
WILLOW = 10  # points of each picture of PF-WILLOW


# -- sets ----------------------------------------------------------------------------------------------------------------


class Matches(Dataset):
    """What every set shares; a subclass reads. `has_points`: its items have points."""

    has_points = True

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, i: int) -> str:
        """What an error calls item i."""
        raise NotImplementedError

    def kind(self, i: int) -> str:
        """The class of the thing, or how the pair was made; "" where it is not said."""
        return ""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Row:
    """A pair of files. Points (N, 2) in pixels, or None; `extent` None: that of the points. `mirrored`: both pictures are turned around."""

    source: Path
    target: Path
    source_points: Tensor | None = None
    target_points: Tensor | None = None
    extent: float | None = None
    kind: str = ""
    mirrored: bool = False
    where: str = ""


class MatchFiles(Matches):
    """Pairs of files."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.has_points = all(row.source_points is not None for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, i: int) -> str:
        return self.rows[i].where or str(self.rows[i].source)

    def kind(self, i: int) -> str:
        return self.rows[i].kind

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = self.rows[i]
        item = {"source": read_image(row.source), "target": read_image(row.target)}
        if self.has_points:
            points = {"source_points": row.source_points, "target_points": row.target_points}
            extent = span(row.source_points) if row.extent is None else row.extent
            item |= points | {"extent": torch.tensor(float(extent))}
        return mirror(item) if row.mirrored else item


class BentPhotographs(Matches):
    """The embedded set, see `bent_photographs`: 192 pairs for training and 96 for testing, 64 x 64 pixels, of four kinds."""

    def __init__(self, split: str) -> None:
        self.pairs = bent_photographs(COUNTS[split], split=split)

    def __len__(self) -> int:
        return len(self.pairs.source)

    def path(self, i: int) -> str:
        return f"bent photographs {i}"

    def kind(self, i: int) -> str:
        return KINDS[i % len(KINDS)]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pairs = self.pairs
        item = {name: getattr(pairs, name)[i] for name in ("source", "target", "source_points", "target_points")}
        return item | {"extent": torch.tensor(span(item["source_points"]))}


class Photographs(Dataset):
    """Pictures uint8 (3, H, W), from files or in memory."""

    def __init__(self, files: Sequence[Path] | None, tensors: Tensor | None = None) -> None:
        self.files, self.tensors = files, tensors

    def __len__(self) -> int:
        return len(self.tensors) if self.files is None else len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return self.tensors[i] if self.files is None else read_image(self.files[i])


def span(points: Tensor) -> float:
    """The larger side of the box around points (N, 2)."""
    return float((points.amax(0) - points.amin(0)).max()) if len(points) else 0.0


def mirror(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pair with left and right exchanged in both pictures."""
    found = dict(item)
    for name in ("source", "target"):
        found[name] = item[name].flip(-1)
        if f"{name}_points" in item:
            x, y = item[f"{name}_points"].unbind(1)
            found[f"{name}_points"] = torch.stack([item[name].shape[-1] - 1 - x, y], 1)
    return found


# -- opening -------------------------------------------------------------------------------------------------------------


def open_matches(data: str | Path, split: str = "train") -> Matches:
    """Pairs by name or place; see the module's docstring. A list that is named itself is used whole, whatever the split.

    Raises:
        PaperZooError, UnknownName: if there is no such set or split.
        DataError: if a folder has none of the layouts, or a row of a list is wrong; names file and line.
    """
    if split not in COUNTS:
        raise PaperZooError(f"split '{split}' is not known; it is one of {', '.join(COUNTS)}")
    if str(data) == EMBEDDED:
        return BentPhotographs(split)
    path = place(data)
    if path.is_file():
        return MatchFiles(read_list(path, path.parent))
    if (path / "PairAnnotation").is_dir():
        return spair(path, split)
    for folder in (path, path / "image_pairs"):
        found = next((folder / name for name in LISTS[split] if (folder / name).is_file()), None)
        if found is not None:
            return MatchFiles(read_list(found, path))
    if any((path / name).is_file() for name in (*LISTS["train"], *LISTS["test"])):
        raise DataError(path, f"has no list for the split '{split}'; expected one of {', '.join(LISTS[split])}")
    return folders(path, split)


def open_photographs(data: str | Path, split: str = "train") -> Photographs:
    """Pictures alone, by name or place; train/ and val/ in a folder are its splits.

    Raises:
        PaperZooError, UnknownName, DataError: as `open_matches`.
    """
    if split not in COUNTS:
        raise PaperZooError(f"split '{split}' is not known; it is one of {', '.join(COUNTS)}")
    if str(data) == EMBEDDED:
        return Photographs(None, photograph_parts(COUNTS[split], split=split))
    path = place(data)
    if path.is_file():
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        if not rows or "image" not in rows[0]:
            raise DataError(path, "has no column 'image'")
        files = [path.parent / row["image"] for row in rows]
        missing = next((i for i, f in enumerate(files) if not f.is_file()), None)
        if missing is not None:
            raise DataError(f"{path}:{missing + 2}", f"names {files[missing]}, which is not there")
        return Photographs(files)
    files = pictures_in(split_folder(path, split) or path)
    if not files:
        raise DataError(path, "holds no pictures")
    return Photographs(files)


def place(data: str | Path) -> Path:
    path = Path(data).expanduser()
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise DataError(path, "no such file or folder")
        raise UnknownName("set of matching pictures or path", str(data), [EMBEDDED])
    return path


def read_list(path: Path, root: Path) -> list[Row]:
    """A list of pairs as the authors of CNNGeo and NC-Net share them; pixels are counted from 1 there. Names are within `root` or the folder above it."""
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, ValueError) as error:
        raise DataError(path, f"not a readable list ({type(error).__name__}: {error})") from None
    if len(lines) < 2 or len(lines[0]) < 2:
        raise DataError(path, "has no rows; a header and pairs source_image,target_image,… are expected")
    columns = {name.strip(): i for i, name in enumerate(lines[0])}
    first = lines[1][0].strip()
    root = next((base for base in (root, root.parent) if (base / first).is_file()), root)
    rows = []
    for number, line in enumerate(lines[1:], 2):
        where = f"{path}:{number}"
        if not any(cell.strip() for cell in line):
            continue
        if len(line) != len(lines[0]):
            raise DataError(where, f"has {len(line)} columns, the header {len(lines[0])}")
        try:
            points = row_points(line, columns)
        except ValueError as error:
            raise DataError(where, f"points are numbers, the same count in both pictures ({error})") from None
        kind = line[columns["class"]].strip() if "class" in columns else ""
        flip = "flip" in columns and line[columns["flip"]].strip() in ("1", "1.0", "True", "true")
        files = [root / cell.strip() for cell in line[:2]]
        rows.append(Row(*files, *points, kind=kind, mirrored=flip, where=where))
    if not rows:
        raise DataError(path, "has no pairs")
    return rows


def row_points(line: list[str], columns: dict[str, int]) -> tuple[Tensor | None, Tensor | None]:
    """The points of the source and of the target, (N, 2), counted from 0; None where a list has none."""
    if {"XA", "YA", "XB", "YB"} <= columns.keys():  # PF-PASCAL: numbers with semicolons between them
        four = [[float(v) for v in line[columns[k]].split(";") if v.strip()] for k in ("XA", "YA", "XB", "YB")]
    elif len(line) == 2 + 4 * WILLOW:  # ten points a picture: their x, then their y
        values = [float(v) for v in line[2:]]
        four = [values[k : k + WILLOW] for k in range(0, 4 * WILLOW, WILLOW)]
    else:
        return None, None
    if len({len(v) for v in four}) != 1 or not four[0]:
        raise ValueError(f"found {', '.join(str(len(v)) for v in four)}")
    if not all(math.isfinite(v) for values in four for v in values):
        raise ValueError("one is not finite")
    source, target = (torch.tensor(four[k : k + 2]).T - 1 for k in (0, 2))
    return source.contiguous(), target.contiguous()


def spair(root: Path, split: str) -> MatchFiles:
    """SPair-71k; its targets are the sources here, and their boxes the extent."""
    names = ("trn", "train") if split == "train" else ("test",)
    folder = next((root / "PairAnnotation" / n for n in names if (root / "PairAnnotation" / n).is_dir()), None)
    if folder is None:
        raise DataError(root / "PairAnnotation", f"has no folder {names[0]}")
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            kind = str(found["category"])
            pictures = [root / "JPEGImages" / kind / found[f"{k}_imname"] for k in ("trg", "src")]
            points = [torch.tensor(found[f"{k}_kps"], dtype=torch.float32).reshape(-1, 2) for k in ("trg", "src")]
            left, top, right, bottom = (float(v) for v in found["trg_bndbox"])
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise DataError(path, f"not a pair of SPair-71k ({type(error).__name__}: {error})") from None
        if len(points[0]) != len(points[1]):
            raise DataError(path, f"has {len(points[1])} points in its source and {len(points[0])} in its target")
        rows.append(Row(*pictures, *points, max(right - left, bottom - top), kind, where=str(path)))
    if not rows:
        raise DataError(folder, "holds no pairs")
    return MatchFiles(rows)


def folders(root: Path, split: str) -> MatchFiles:
    """source/ and target/ with equal names."""
    base = split_folder(root, split) or root
    sides = [base / name for name in ("source", "target")]
    if not all(side.is_dir() for side in sides):
        raise DataError(
            base, "has no pairs; a list train_pairs.csv, PairAnnotation/, or source/ and target/ is expected"
        )
    rows = []
    others = {p.relative_to(sides[1]).with_suffix(""): p for p in pictures_in(sides[1])}
    for path in pictures_in(sides[0]):
        name = path.relative_to(sides[0]).with_suffix("")
        if name not in others:
            raise DataError(path, f"has no partner; expected {sides[1] / path.name}")
        rows.append(Row(path, others[name]))
    if not rows:
        raise DataError(sides[0], "holds no pictures")
    return MatchFiles(rows)


# -- embedded ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bent:
    """Pairs; treat the tensors as read-only.

    source, target: uint8 (N, 3, S, S). places: float32 (N, 2, S, S), where each pixel of the target is in the source, x and y in pixels.
    source_points, target_points: float32 (N, POINTS, 2).
    """

    source: Tensor
    target: Tensor
    places: Tensor
    source_points: Tensor
    target_points: Tensor


@functools.lru_cache(maxsize=4)
def bent_photographs(count: int, side: int = SIDE, seed: int = 0, split: str = "train", strength: float = 1.0) -> Bent:
    """Parts of photographs, and what a known map makes of them in other light: affine, homography, spline, affine and spline in turn.

    Args:
        count: how many pairs.
        side: pixels.
        seed: every choice follows from it, and from the other arguments. Training and test parts of the photographs share nothing.
        strength: 1 for maps as large as CNNGeo's released code draws them, splines that follow an affine map half as large; 0 for none.
    """
    rng = torch.Generator().manual_seed(seed * 2 + (split == "test") + 13_000_003)
    own = pixel_grid(side, side, torch.empty(0))
    unit = (2 * own / (side - 1) - 1).flatten(1).T  # -1 … 1 between the middles of the corner pixels
    places = torch.stack([random_map(KINDS[i % len(KINDS)], unit, rng, strength) for i in range(count)])
    places = ((places + 1) / 2 * (side - 1)).mT.unflatten(2, (side, side))
    part = random_parts(count, (side, side), split, rng)
    source, target = part(own.expand(count, -1, -1, -1)), part(places)
    gain = 0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=rng)
    shift = 0.05 * torch.randn(count, 1, 1, 1, generator=rng)
    target = gain * target + shift + 0.01 * torch.randn(target.shape, generator=rng)
    pictures = [(p * 255).round().clamp(0, 255).to(torch.uint8) for p in (source, target)]
    shown = ((places >= 0) & (places <= side - 1)).all(1).flatten(1)
    chosen = (shown + torch.rand(shown.shape, generator=rng)).topk(POINTS, dim=1).indices
    at = [
        m.expand(count, -1, -1, -1).flatten(2).mT.gather(1, chosen[..., None].expand(-1, -1, 2)) for m in (places, own)
    ]
    return Bent(*pictures, places, *at)


def random_map(kind: str, points: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """Points (N, 2) of the target, -1 … 1, to places in the source: a random map of this kind."""
    if "spline" in kind:
        reach = (JITTER if kind == "spline" else JITTER / 2) * strength
        points = spline_basis(len(points)) @ (control_points() + reach * (2 * torch.rand(9, 2, generator=rng) - 1))
    if kind == "homography":
        square = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
        return transform(
            from_corners(square, square + JITTER * strength * (2 * torch.rand(4, 2, generator=rng) - 1)), points
        )
    if "affine" in kind:
        draw = strength * (2 * torch.rand(6, generator=rng) - 1)
        turn, slant = rotation(draw[0] * math.pi / 12), rotation(draw[1] * math.pi / 6)
        linear = turn @ slant.T @ torch.diag(1 + 0.25 * draw[2:4]) @ slant
        points = points @ linear.T + 0.25 * draw[4:]
    return points


def rotation(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)


def control_points() -> Tensor:
    """A 3 x 3 grid over -1 … 1, (9, 2)."""
    at = torch.linspace(-1, 1, 3)
    return torch.stack([at.repeat(3), at.repeat_interleave(3)], 1)


@functools.cache
def spline_basis(count: int) -> Tensor:
    """What each control point's place contributes to a thin-plate spline at the pixels of a square picture: (count, 9)."""
    from scipy.interpolate import RBFInterpolator

    side = math.isqrt(count)
    unit = (2 * pixel_grid(side, side, torch.empty(0)) / (side - 1) - 1).flatten(1).T
    spline = RBFInterpolator(control_points().double().numpy(), np.eye(9), kernel="thin_plate_spline", degree=1)
    return torch.from_numpy(spline(unit.double().numpy())).float()


@functools.lru_cache(maxsize=4)
def photograph_parts(count: int, side: int = AROUND, seed: int = 0, split: str = "train") -> Tensor:
    """Parts of photographs: uint8 (count, 3, side, side)."""
    rng = torch.Generator().manual_seed(seed * 2 + (split == "test") + 17_000_003)
    own = pixel_grid(side, side, torch.empty(0)).expand(count, -1, -1, -1)
    return (random_parts(count, (side, side), split, rng, margin=0.0)(own) * 255).round().to(torch.uint8)
