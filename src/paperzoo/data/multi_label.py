"""Images with any number of labels each: the embedded digit scenes, a CSV or Parquet table.

    open_multi_label("digit_scenes", "train")   digits pasted on photographs, one to four a picture; the labels are which digits there are
    open_multi_label("list.csv", "test")        columns path and labels ("cat;dog", empty for none), optionally split

An item is (image uint8 (3, H, W), labels float32 (num_classes,) of 0 and 1).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.images import HELD_OUT, by_number, of_split, read_image, read_rows
from paperzoo.data.scenes import LABELS, digit_scenes
from paperzoo.errors import DataError, UnknownName

SEPARATORS = ";|,"


class MultiLabelImages(Dataset):
    """Images with labels; `targets` float32 (N, num_classes). Decoded when asked for."""

    def __init__(
        self,
        labels: Sequence[str],
        targets: Tensor,
        paths: Sequence[str] | None = None,
        pixels: Tensor | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.labels, self.targets, self.paths = list(labels), targets, paths
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = read_image(self.paths[index]) if self.pixels is None else self.pixels[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def path(self, index: int) -> str:
        return self.paths[index] if self.paths is not None else f"sample {index}"

    def with_transform(self, transform: Callable[[Tensor], Tensor] | None) -> MultiLabelImages:
        """The same samples through another transform."""
        return MultiLabelImages(self.labels, self.targets, self.paths, self.pixels, transform)


@functools.cache
def scenes(split: str) -> MultiLabelImages:
    """2,048 scenes of 64 x 64 pixels to learn from, 512 held-out ones with other scans and other photographs."""
    made = digit_scenes(2048 if split == "train" else 512, size=64, max_objects=4, split=split, scale=(0.25, 0.45))
    targets = torch.zeros(len(made), len(LABELS))
    for row, scene in zip(targets, made, strict=True):
        row[scene["labels"].long()] = 1
    return MultiLabelImages(LABELS, targets, None, torch.stack([scene["image"] for scene in made]))


def open_multi_label(data: str | Path, split: str = "train") -> MultiLabelImages:
    """The images of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Raises:
        DataError: if the file is missing, or lacks what it needs.
        UnknownName: if `data` is neither a set's name nor a path.
    """
    name = str(data)
    if name == "digit_scenes":
        return scenes(split)
    path = Path(name).expanduser()
    if path.is_file():
        return open_table(path, split)
    if path.suffix or len(path.parts) > 1:
        raise DataError(path, "no such file; give a CSV or Parquet table with the columns path,labels")
    raise UnknownName("data set or path", name, ["digit_scenes"])


def open_table(path: Path, split: str) -> MultiLabelImages:
    """A table with the columns path (or image, file, filename) and labels (or label, classes, tags), optionally split."""
    names, table = read_rows(path)
    header = {(name or "").strip().lower(): name for name in names}
    where = next((header[n] for n in ("path", "image", "file", "filename") if n in header), None)
    what = next((header[n] for n in ("labels", "label", "classes", "tags") if n in header), None)
    if where is None or what is None:
        raise DataError(path, f"the columns path and labels are needed; the header is {names}")
    rows = []
    for number, row in enumerate(table, 2):
        if not row[where]:
            raise DataError(path, f"line {number} has no path")
        part = (row.get(header.get("split", "")) or "").strip().lower()
        rows.append((row[where].strip(), separated(row[what] or ""), part))
    labels = sorted({label for _, found, _ in rows for label in found}, key=by_number)
    if not labels:
        raise DataError(path, "no row has a label")
    if any(part for *_, part in rows):
        kept = of_split(path, rows, split)
    else:
        order = sorted(rows, key=lambda row: (zlib.crc32(row[0].encode()), row[0]))
        kept = [row for i, row in enumerate(order) if (i % HELD_OUT == 0) == (split != "train")]
    if not kept:
        raise DataError(path, f"no rows for the split '{split}'")
    numbers = {label: k for k, label in enumerate(labels)}
    targets = torch.zeros(len(kept), len(labels))
    for target, (_, found, _) in zip(targets, kept, strict=True):
        target[[numbers[label] for label in found]] = 1
    return MultiLabelImages(labels, targets, [str(path.parent / name) for name, *_ in kept])


def separated(text: str) -> list[str]:
    """ "cat; dog" as its labels."""
    for separator in SEPARATORS[1:]:
        text = text.replace(separator, SEPARATORS[0])
    return [part.strip() for part in text.split(SEPARATORS[0]) if part.strip()]
