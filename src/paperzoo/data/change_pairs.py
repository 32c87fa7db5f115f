"""Pairs of pictures of one place at two dates, with a mask of what changed: LEVIR-CD's and related layouts, and an embedded set.

    open_changes("terrain_changes")   generated terrain with buildings that appear or vanish
    open_changes("LEVIR-CD")          a folder: A/, B/ and label/ with equal names, in train/, val/, test/ or with list/train.txt …
    open_changes("pairs.csv")         columns before, after, label, optionally split

An item is `(before, after, mask)`: two `tv_tensors.Image` (C, H, W), uint8, or float32 where the file has more bits (see
`paperzoo.data.rasters`), and a `tv_tensors.Mask` int64 (H, W): 0 unchanged, 1 changed (or several kinds of change), 255 for "do not
count". `.labels` are the names of these ids, `.bands` is C. Files are decoded when an item is asked for; a broken one raises `DataError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from paperzoo.data.images import HELD_OUT
from paperzoo.data.masks import IGNORE, SPLITS, read_ids
from paperzoo.data.rasters import SUFFIXES, read_bands
from paperzoo.errors import DataError, PaperZooError

BEFORE = ("A", "before", "t1", "T1", "time1", "im1", "image1", "pre")
AFTER = ("B", "after", "t2", "T2", "time2", "im2", "image2", "post")
LABEL = ("label", "labels", "mask", "masks", "OUT", "change", "change_label", "change label", "cd", "gt")
LISTS = ("list", "lists", "splits")
FOLDERS = {
    "train": SPLITS["train"],
    "test": ("test", "testing", *SPLITS["test"]),
}  # a test folder before a validation one
LABELS = ["unchanged", "changed"]
LOOKED_AT = 32  # masks that are read on opening, to see how changes are marked

Triple = tuple[Path, Path, Path]


class ChangeFiles(Dataset):
    """Triples of files: before, after, mask.

    Args:
        white: masks are black and white: what is lighter than 127 has changed. Else they hold ids, 255 for "do not count".
    """

    def __init__(self, triples: Sequence[Triple], labels: Sequence[str], white: bool) -> None:
        self.triples, self.labels, self.white = list(triples), list(labels), white
        self.bands = read_bands(self.triples[0][0]).shape[0]

    def __len__(self) -> int:
        return len(self.triples)

    def path(self, i: int) -> Path:
        return self.triples[i][0]

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Image, tv_tensors.Mask]:
        before_path, after_path, mask_path = self.triples[i]
        before, after = read_pair(before_path, after_path)
        if before.shape[0] != self.bands:
            raise DataError(before_path, f"has {before.shape[0]} bands, the first picture of the set has {self.bands}")
        ids = read_ids(mask_path)
        if ids.shape != before.shape[1:]:
            raise DataError(
                mask_path,
                f"is {_size(ids.shape)} pixels, {before_path.name} is {_size(before.shape)}; they must be equal",
            )
        if self.white:
            ids = (ids > 127).astype(np.int64)
        strange = ids[(ids >= len(self.labels)) & (ids != IGNORE)]
        if strange.size:
            raise DataError(
                mask_path,
                f"holds the id {strange.flat[0]}; known are 0 to {len(self.labels) - 1}, and 255 for 'ignore'",
            )
        return tv_tensors.Image(before), tv_tensors.Image(after), tv_tensors.Mask(torch.from_numpy(ids))


def read_pair(before: str | Path, after: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures of one place (C, H, W) each, of one type.

    Raises:
        DataError: if one cannot be read, or they differ in size or bands.
    """
    first, second = read_bands(before), read_bands(after)
    if first.shape != second.shape:
        raise DataError(
            after,
            f"is {_size(second.shape)} pixels with {second.shape[0]} bands, {Path(before).name} is {_size(first.shape)} "
            f"with {first.shape[0]}; both dates must be on the same grid",
        )
    if first.dtype != second.dtype:
        first, second = (x.float() / 255 if x.dtype == torch.uint8 else x for x in (first, second))
    return first, second


def open_changes(name_or_path: str, split: str = "train") -> Dataset:
    """A set of pairs by name, folder or table.

    Args:
        name_or_path: "terrain_changes" (embedded); a folder with the folders A, B and label (or `before`/`after`, `t1`/`t2`/`mask`,
            `time1`/`time2`/`label`, …), itself or in its folders train, val and test; where there are no such folders,
            `list/train.txt` and `list/test.txt` (or val.txt) name the files, and without lists every fifth pair is held out;
            `labels.txt` may name the ids; or a CSV.
        split: "train" or "test".

    Raises:
        PaperZooError: if there is no such set.
        DataError: if the folder has none of these layouts, or a picture lacks its partner.
    """
    if split not in FOLDERS:
        raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
    if name_or_path == "terrain_changes":
        from paperzoo.data.terrain import TerrainChanges

        return TerrainChanges(split)
    root = Path(name_or_path)
    if root.suffix.lower() == ".csv":
        return with_labels(_of_table(root, split), root.parent)
    if not root.is_dir():
        raise PaperZooError(f"data '{name_or_path}' is neither the embedded set terrain_changes nor a folder nor a CSV")
    inside = _first(root, FOLDERS[split])
    if inside is not None and _first(inside, BEFORE) is not None:
        return with_labels(_pairs(inside), root)
    if _first(root, BEFORE) is None:
        raise DataError(
            root, f"needs the folders A, B and label, itself or in one of its folders {', '.join(FOLDERS[split])}"
        )
    triples = _pairs(root)
    lists = _first(root, LISTS)
    chosen = _listed(lists, triples, split) if lists is not None else None
    if chosen is None:
        chosen = [t for i, t in enumerate(triples) if (i % HELD_OUT == HELD_OUT - 1) == (split == "test")]
        if not chosen:
            raise DataError(
                root, f"has too few pairs to hold any out: at least {HELD_OUT} are needed, or folders train and test"
            )
    return with_labels(chosen, root)


def with_labels(triples: list[Triple], root: Path) -> ChangeFiles:
    """The set, with what its masks' values mean: black and white, or ids named in labels.txt."""
    path, named = root / "labels.txt", None
    if path.is_file():
        named = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(named) < 2:
            raise DataError(path, "needs at least two names, one a line, the first for what has not changed")
    found: set[int] = set()
    for _, _, mask in triples[:: max(1, len(triples) // LOOKED_AT)]:
        found.update(np.unique(read_ids(mask)).tolist())
    white = max(found, default=0) > 127 and not found & set(range(1, 64))
    if white or max(found - {IGNORE}, default=0) <= 1:
        return ChangeFiles(triples, named or LABELS, white)
    names = named or [LABELS[0], *(f"change {i}" for i in range(1, max(found - {IGNORE}) + 1))]
    return ChangeFiles(triples, names, white)


# -- layouts -------------------------------------------------------------------------------------------------------------


def _pairs(root: Path) -> list[Triple]:
    """Every picture of the first date with its partners: the same relative name, up to the extension."""
    folders = [_first(root, names) for names in (BEFORE, AFTER, LABEL)]
    for folder, names in zip(folders, (BEFORE, AFTER, LABEL), strict=True):
        if folder is None:
            raise DataError(root, f"lacks one of three folders; expected one of {', '.join(names)}")
    by_key = [_pictures(folder) for folder in folders]
    if not by_key[0]:
        raise DataError(folders[0], f"has no pictures ({', '.join(sorted(SUFFIXES))})")
    triples = []
    for key, path in by_key[0].items():
        for folder, found in zip(folders[1:], by_key[1:], strict=True):
            if key not in found:
                raise DataError(path, f"has no partner; expected {folder / key}{path.suffix}")
        triples.append((path, by_key[1][key], by_key[2][key]))
    return triples


def _pictures(folder: Path) -> dict[str, Path]:
    every = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in every}


def _listed(lists: Path, triples: list[Triple], split: str) -> list[Triple] | None:
    """The pairs that list/train.txt, or list/test.txt or val.txt, names; None without such a file."""
    path = next((p for name in FOLDERS[split] if (p := lists / f"{name}.txt").is_file()), None)
    if path is None:
        return None
    by_name = {t[0].stem: t for t in triples}
    chosen = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        triple = by_name.get(Path(words[0]).stem)  # further columns name the partners, which follow from the first
        if triple is None:
            raise DataError(f"{path}:{number}", f"names '{words[0]}', but there is no such picture")
        chosen.append(triple)
    if not chosen:
        raise DataError(path, "is empty; one file name a line is expected")
    return chosen


def _of_table(path: Path, split: str) -> list[Triple]:
    import csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            rows = list(enumerate(reader, 2))
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, f"not a readable CSV ({error})") from None
    missing = [name for name in ("before", "after", "label") if name not in names]
    if missing:
        raise DataError(path, f"lacks the column {missing[0]}; columns are before, after, label, and optionally split")
    here = {(row["split"] or "").strip().lower() for _, row in rows} if "split" in names else set()
    held_out = next(
        (name for name in FOLDERS["test"] if name in here), None
    )  # test rows, or validation rows without them
    triples = []
    for i, (number, row) in enumerate(rows):
        if "split" in names:
            mine = (row["split"] or "").strip().lower()
            if mine not in FOLDERS["train"] + FOLDERS["test"]:
                raise DataError(f"{path}:{number}", f"has the split '{mine}'; it is train, val or test")
            wanted = mine in FOLDERS["train"] if split == "train" else mine == held_out
        else:
            wanted = (i % HELD_OUT == HELD_OUT - 1) == (split == "test")
        files = [path.parent / (row[name] or "") for name in ("before", "after", "label")]
        for file in files:
            if not file.is_file():
                raise DataError(f"{path}:{number}", f"names {file}, which does not exist")
        if wanted:
            triples.append(tuple(files))
    if not triples:
        raise DataError(path, f"has no row for the split '{split}'")
    return triples


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]} x {shape[-2]}"
