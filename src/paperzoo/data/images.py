"""Images with one label each: the embedded digits, a folder of classes, a CSV of (path, label), the classic sets on disk.

    open_images("digits", "train")          real handwritten digits that come with scikit-learn
    open_images("path/to/folder", "train")  one sub-folder a class, with or without train/ and val/ (or test/)
    open_images("list.csv", "test")         columns path and label, optionally split; .parquet alike
    open_images("train-{0000..0012}.tar")   webdataset shards; also a folder of them, or a name with *
    open_images("cifar10", "train")         the original files, under $PAPERZOO_DATA or ~/.cache/paperzoo/data

An item is (image uint8 (3, H, W), label int). `.labels` are the class names.
"""

from __future__ import annotations

import csv
import functools
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
CLASSIC = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "svhn": "SVHN",
}
HELD_OUT = 5  # one image in five is held out where the data has no split of its own


def read_image(path: str | Path) -> Tensor:
    """An image file as uint8 (3, H, W): turned upright by its EXIF tag, grey and palette images made RGB, 16 bits made 8.

    Raises:
        DataError: if the file is missing, is no image, or is cut short.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return pil_to_tensor(image)
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except IsADirectoryError:
        raise DataError(path, "this is a folder; an image file is needed") from None
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DataError(path, f"not a readable image ({type(error).__name__}: {str(error)[:120]})") from None


def pil_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image as uint8 (3, H, W)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        largest = values.max(initial=0)
        if image.mode.startswith("I;16"):  # the file says 16 bits, however dark the picture is
            top = 65535.0
        elif image.mode == "F" and largest <= 1:
            top = 1.0
        else:
            top = 65535.0 if largest > 255 else 255.0
        image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_image(value: Any) -> Tensor:
    """Whatever a user may call an image, as uint8 (3, H, W).

    A path, a PIL image, or an array or tensor (H, W), (H, W, 1|3|4) or (1|3, H, W): uint8, or floating point in [0, 1].

    Raises:
        PaperZooError: for anything else, saying what it was.
    """
    if isinstance(value, str | Path):
        return read_image(value)
    if isinstance(value, Image.Image):
        return pil_to_tensor(value)
    if not isinstance(value, Tensor | np.ndarray):
        raise PaperZooError(f"an image is a path, a PIL image, an array or a tensor, not {type(value).__name__}")
    tensor = torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value).detach().cpu()
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim == 3 and tensor.shape[0] not in (1, 3) and tensor.shape[2] in (1, 3, 4):
        tensor = tensor.permute(2, 0, 1)[:3]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or 0 in tensor.shape:
        raise PaperZooError(f"an image has the shape (H, W), (H, W, 3) or (3, H, W), not {tuple(value.shape)}")
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()) or tensor.min() < -1e-3 or tensor.max() > 1 + 1e-3:
            raise PaperZooError("a floating-point image has values in [0, 1]; scale it, or pass uint8")
        tensor = (tensor.clamp(0, 1) * 255).round().to(torch.uint8)
    elif tensor.dtype != torch.uint8:
        if tensor.min() < 0 or tensor.max() > 255:
            raise PaperZooError(
                f"an integer image has values in 0 … 255, not {int(tensor.min())} … {int(tensor.max())}"
            )
        tensor = tensor.to(torch.uint8)
    return tensor.expand(3, -1, -1).contiguous()


class Images(Dataset):
    """Images with labels, decoded when asked for. `paths[i]` names sample i; `transform` is applied to the tensor."""

    def __init__(
        self,
        labels: Sequence[str],
        targets: Sequence[int],
        paths: Sequence[str] | None = None,
        pixels: Tensor | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        read: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.labels, self.targets, self.paths = list(labels), list(map(int, targets)), paths
        self.pixels, self.transform, self.read = pixels, transform, read

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.pixels is not None:
            image = self.pixels[index]
        else:
            image = self.read(index) if self.read is not None else read_image(self.paths[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def path(self, index: int) -> str:
        return self.paths[index] if self.paths is not None else f"sample {index}"

    def with_transform(self, transform: Callable[[Tensor], Tensor] | None) -> Images:
        """The same samples through another transform."""
        return Images(self.labels, self.targets, self.paths, self.pixels, transform, self.read)

    def subset(self, indices: Sequence[int]) -> Images:
        """Some of the samples."""
        rows = list(map(int, indices))
        return Images(
            self.labels,
            [self.targets[i] for i in rows],
            None if self.paths is None else [self.paths[i] for i in rows],
            None if self.pixels is None else self.pixels[rows],
            self.transform,
            None if self.read is None else Rows(self.read, rows),
        )

    def few(self, per_class: int, seed: int = 0) -> Images:
        """`per_class` samples of every class, drawn with a seed.

        Raises:
            PaperZooError: if a class has fewer.
        """
        targets = torch.tensor(self.targets)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        rows: list[int] = []
        for k, label in enumerate(self.labels):
            mine = order[targets[order] == k]
            if len(mine) < per_class:
                raise PaperZooError(f"class '{label}' has {len(mine)} samples; {per_class} were asked for")
            rows += mine[:per_class].tolist()
        return self.subset(rows)


class Rows:
    """Some of the samples of something that reads by number; a class, so that worker processes can be sent it."""

    def __init__(self, read: Callable[[int], Tensor], rows: list[int]) -> None:
        self.inner, self.rows = read, rows

    def __call__(self, index: int) -> Tensor:
        return self.inner(self.rows[index])


@functools.cache
def digits(split: str) -> Images:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 in 17 grey levels, enlarged to 32 x 32.

    One in five of each class is held out ("test": 359 scans); "train" has the other 1,438.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.from_numpy(raw.images).float()[:, None] / 16
    large = F.interpolate(pixels, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    large = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    targets = torch.from_numpy(raw.target)
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1797))
    for k in range(10):
        mine = order[targets[order] == k]
        held_out[mine[: round(len(mine) / HELD_OUT)]] = True
    chosen = torch.nonzero(held_out if split != "train" else ~held_out).flatten()
    return Images([str(k) for k in range(10)], targets[chosen].tolist(), None, large[chosen].contiguous())


EMBEDDED: dict[str, Callable[[str], Images]] = {"digits": digits}


def open_images(data: str | Path, split: str = "train") -> Images:
    """The images of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Raises:
        DataError: if the place is missing, empty or has no usable labels.
        UnknownName: if `data` is neither a set's name nor a path.
    """
    name = str(data)
    if name in EMBEDDED:
        return EMBEDDED[name](split)
    if name in CLASSIC:
        return classic(name, split)
    if name == "imagenet":
        if not (data_folder() / name).is_dir():
            raise DataError(
                data_folder() / name, "ImageNet is not there; unpack it here as train/<class>/ and val/<class>/"
            )
        return open_folder(data_folder() / name, split)
    path = Path(name).expanduser()
    if path.suffix == ".tar" or (path.is_dir() and any(path.rglob("*.tar"))):
        return open_shards(path, split)
    if path.is_dir():
        return open_folder(path, split)
    if path.is_file():
        return open_table(path, split)
    if path.suffix or len(path.parts) > 1:
        raise DataError(
            path, "no such file or folder; give a folder of class folders or a CSV with the columns path,label"
        )
    raise UnknownName("data set or path", name, [*EMBEDDED, *CLASSIC, "imagenet"])


def open_folder(root: Path, split: str) -> Images:
    """One sub-folder a class. train/ and val/ (or test/) are used where they are; else one file in five is held out."""
    named = {p.name.lower(): p for p in folders(root)}
    held_out = next((named[n] for n in ("test", "val", "valid", "validation") if n in named), None)
    has_split = "train" in named and held_out is not None
    if set(named) == {"train"}:  # a split without its counterpart: one in five of it is held out
        root = named["train"]
    base = (named["train"] if split == "train" else held_out) if has_split else root
    reference = named["train"] if has_split else root
    labels = sorted(p.name for p in folders(reference))
    if not labels:
        raise DataError(root, "no class folders; images are expected as <folder>/<class>/<image>")
    unknown = [p.name for p in folders(base) if p.name not in labels]
    if unknown:
        raise DataError(base / unknown[0], f"this class does not occur in {reference}")
    paths, targets = [], []
    for k, label in enumerate(labels):
        folder = base / label
        files = sorted(p for p in folder.rglob("*") if is_picture(p)) if folder.is_dir() else []
        if not has_split:
            files = [f for i, f in enumerate(shuffled(files, root)) if (i % HELD_OUT == 0) == (split != "train")]
        paths += [str(f) for f in files]
        targets += [k] * len(files)
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(base, f"no images for the split '{split}'; files ending in {kinds} are read")
    return Images(labels, targets, paths)


def folders(root: Path) -> list[Path]:
    """The folders in a folder, without hidden ones and what macOS leaves in archives."""
    return [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX"]


def is_picture(path: Path) -> bool:
    """By its name; "._x.jpg" is macOS's note about x.jpg."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def shuffled(files: list[Path], root: Path) -> list[Path]:
    """An order that depends on the names alone, so that a hold-out is the same on every machine."""
    return sorted(files, key=lambda f: (zlib.crc32(f.relative_to(root).as_posix().encode()), f))


def open_shards(path: Path, split: str) -> Images:
    """Webdataset shards. In a folder with train/ and val/ (or test/) those are the splits, else one sample in five is held out."""
    from paperzoo.data.shards import Shards, shard_files

    named = {p.name.lower(): p for p in path.iterdir() if p.is_dir()} if path.is_dir() else {}
    held_out = next((named[n] for n in ("test", "val", "valid", "validation") if n in named), None)
    has_split = "train" in named and held_out is not None
    files = shard_files(str((named["train"] if split == "train" else held_out) if has_split else path))
    if not files:
        raise DataError(path, "no .tar files here")
    shards = Shards(files)
    labels = sorted(
        set(Shards(shard_files(str(named["train"]))).answers if has_split else shards.answers), key=by_number
    )
    order = range(len(shards.paths))
    if not has_split:
        order = [
            i
            for i in order
            if (zlib.crc32(shards.paths[i].rpartition(":")[2].encode()) % HELD_OUT == 0) == (split != "train")
        ]
    rows = list(order)
    unknown = next((shards.paths[i] for i in rows if shards.answers[i] not in labels), None)
    if unknown:
        raise DataError(unknown, "its label does not occur in the training shards")
    if not rows:
        raise DataError(path, f"no samples for the split '{split}'")
    numbers = {label: k for k, label in enumerate(labels)}
    return Images(
        labels,
        [numbers[shards.answers[i]] for i in rows],
        [shards.paths[i] for i in rows],
        read=Rows(shards.read, rows),
    )


def by_number(label: str) -> tuple:
    """The order of labels: numbers by size, then names."""
    number = label.lstrip("-").isdigit()
    return (not number, int(label) if number else 0, label)


def read_rows(path: Path) -> tuple[list[str], list[dict]]:
    """Header and rows of a CSV or Parquet file.

    Raises:
        DataError: if it cannot be read.
        MissingExtra: for Parquet without pyarrow.
    """
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise MissingExtra("pyarrow", "tables", "reading Parquet files") from None
        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(path, f"not a readable Parquet file ({str(error).splitlines()[0]})") from None
        rows = [{k: "" if v is None else str(v) for k, v in row.items()} for row in table.to_pylist()]
        return table.column_names, rows
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(path, f"not a readable CSV file ({error})") from None


def open_table(path: Path, split: str) -> Images:
    """A CSV or Parquet table with the columns path (or image, file, filename), label (or class, target), optionally split."""
    names, table = read_rows(path)
    header = {(name or "").strip().lower(): name for name in names}
    where = next((header[n] for n in ("path", "image", "file", "filename") if n in header), None)
    what = next((header[n] for n in ("label", "class", "target") if n in header), None)
    if where is None or what is None:
        raise DataError(path, f"the columns path and label are needed; the header is {names}")
    rows = []
    for number, row in enumerate(table, 2):
        name, label = ((row[column] or "").strip() for column in (where, what))
        if not name or not label:
            raise DataError(path, f"line {number} has no path or no label")
        rows.append((name, label, (row.get(header.get("split", "")) or "").strip().lower()))
    if not rows:
        raise DataError(path, "no rows below the header")
    labels = sorted({label for _, label, _ in rows}, key=by_number)
    if any(part for *_, part in rows):
        kept = of_split(path, rows, split)
    else:
        order = sorted(rows, key=lambda row: (zlib.crc32(row[0].encode()), row[0]))
        kept = [row for i, row in enumerate(order) if (i % HELD_OUT == 0) == (split != "train")]
    if not kept:
        raise DataError(path, f"no rows for the split '{split}'")
    files = [str(path.parent / name) for name, *_ in kept]
    return Images(labels, [labels.index(label) for _, label, _ in kept], files)


HELD_OUT_NAMES = ("test", "val", "valid", "validation", "dev")


def of_split(path: Path, rows: list[tuple], split: str) -> list[tuple]:
    """The rows (…, …, split) of a table with a column "split": "train", and for "test" the first that there is of test, val, ….

    Raises:
        DataError: for a row whose split is empty or something else.
    """
    for number, row in enumerate(rows, 2):
        if row[2] not in ("train", *HELD_OUT_NAMES):
            raise DataError(path, f"line {number}: its split is '{row[2]}'; it is train, test or val")
    there = {row[2] for row in rows}
    wanted = "train" if split == "train" else next((name for name in HELD_OUT_NAMES if name in there), "test")
    return [row for row in rows if row[2] == wanted]


def data_folder() -> Path:
    """Where the classic sets are looked for: $PAPERZOO_DATA, else ~/.cache/paperzoo/data."""
    from paperzoo.catalog.cards import cache_folder

    return Path(os.environ.get("PAPERZOO_DATA", cache_folder() / "data"))


@functools.cache
def classic(name: str, split: str) -> Images:
    """CIFAR, MNIST and their like from their original files, read by torchvision; never downloaded."""
    import torchvision.datasets

    root = data_folder()
    maker = getattr(torchvision.datasets, CLASSIC[name])
    choice = {"split": "train" if split == "train" else "test"} if name == "svhn" else {"train": split == "train"}
    try:
        raw = maker(str(root), download=False, **choice)
    except RuntimeError:
        raise DataError(
            root, f"{CLASSIC[name]} is not there; unpack its original files here, as torchvision lays them out"
        ) from None
    pixels = torch.as_tensor(np.asarray(raw.data))
    if pixels.ndim == 3:
        pixels = pixels[:, None].expand(-1, 3, -1, -1)
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    targets = raw.labels if name == "svhn" else raw.targets
    labels = getattr(raw, "classes", [str(k) for k in range(10)])
    return Images(labels, list(map(int, targets)), None, pixels.contiguous())
