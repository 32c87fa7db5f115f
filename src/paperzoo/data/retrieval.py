"""Images to be searched and images to search with.

    open_retrieval("digits", "query")                real handwritten digits that come with scikit-learn
    open_retrieval("cifar10_hashing", "database")    CIFAR-10 by the hashing papers' protocol I; any set of `open_images` alike
    open_retrieval("path/to/folder", "train")        one sub-folder a class; or query/ and gallery/ (and train/) of such folders
    open_retrieval("path/to/pictures", "database")   images without classes: they can be searched, not learned from
    open_retrieval("path/to/lists", "query")         HashNet's train.txt, test.txt, database.txt: "path 0 0 1 0 …" a line
    open_retrieval("hashnet_coco", "database")       those of COCO, under $PAPERZOO_DATA/hashnet/coco; imagenet, nuswide_81 alike
    open_retrieval("list.csv", "train")              columns path, label (or labels: "cat;dog"), and split

The roles are "train" (to learn from), "database" (to be searched) and "query". Where a set has no database of its own it is
what was learned from, as usual in this field; queries are never among the two.

An item is (image uint8 (3, H, W), target): an int, the class, -1 where it is not known; or float32 (num_classes,) of 0 and 1
where an image may have several labels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.images import (
    CLASSIC,
    EMBEDDED,
    HELD_OUT,
    SUFFIXES,
    Images,
    Rows,
    by_number,
    classic,
    data_folder,
    open_images,
    read_image,
    read_rows,
)
from paperzoo.data.multi_label import separated
from paperzoo.data.text import read_lines
from paperzoo.errors import DataError, UnknownName

ROLES = {
    "train": ("train",),
    "database": ("database", "gallery", "index", "base"),
    "query": ("query", "queries", "test", "val", "valid", "validation"),
}
HASHING = "cifar10_hashing"
LISTS = {f"hashnet_{name}": f"hashnet/{name}" for name in ("coco", "imagenet", "nuswide_81")}  # below the data folder
UNKNOWN = -1  # the class of an image that has none


class RetrievalImages(Dataset):
    """Images with labels, decoded when asked for; see the module's docstring.

    labels: the names of the classes. targets: int64 (N,), or float32 (N, num_classes).
    """

    def __init__(
        self,
        labels: Sequence[str],
        targets: Tensor,
        paths: Sequence[str] | None = None,
        pixels: Tensor | None = None,
        read: Callable[[int], Tensor] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.labels, self.targets, self.paths = list(labels), targets, paths
        self.pixels, self.read, self.transform = pixels, read, transform

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Tensor:
        """The raw image, uint8 (3, H, W)."""
        if self.pixels is not None:
            return self.pixels[index]
        return self.read(index) if self.read is not None else read_image(self.paths[index])

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        image, target = self.image(index), self.targets[index]
        return (image if self.transform is None else self.transform(image)), target if target.ndim else int(target)

    def path(self, index: int) -> str:
        return self.paths[index] if self.paths is not None else f"image {index}"

    def names(self, index: int) -> list[str]:
        """The names of an image's labels."""
        target = self.targets[index]
        if target.ndim:
            return [self.labels[k] for k in target.nonzero().flatten().tolist()]
        return [] if int(target) == UNKNOWN else [self.labels[int(target)]]

    def with_transform(self, transform: Callable[[Tensor], Tensor] | None) -> RetrievalImages:
        """The same samples through another transform."""
        return RetrievalImages(self.labels, self.targets, self.paths, self.pixels, self.read, transform)

    def subset(self, indices: Sequence[int]) -> RetrievalImages:
        """Some of the samples."""
        rows = list(map(int, indices))
        return RetrievalImages(
            self.labels,
            self.targets[rows],
            None if self.paths is None else [self.paths[i] for i in rows],
            None if self.pixels is None else self.pixels[rows],
            None if self.read is None else Rows(self.read, rows),
            self.transform,
        )


def of_images(images: Images) -> RetrievalImages:
    """Images with one label each, as this task has them."""
    return RetrievalImages(
        images.labels, torch.tensor(images.targets, dtype=torch.int64), images.paths, images.pixels, images.read
    )


def open_retrieval(data: str | Path, role: str = "train") -> RetrievalImages:
    """The images of a role: "train", "database" or "query"; see the module's docstring for what `data` may be.

    Raises:
        DataError: if the place is missing, empty, or lacks what the role needs; names the file and, in a list, the line.
        UnknownName: if `data` is neither a set's name nor a path, or there is no such role.
    """
    if role not in ROLES:
        raise UnknownName("role of images", role, ROLES)
    name = str(data)
    if name == HASHING:
        return hashing_cifar10(role)
    if name in (*EMBEDDED, *CLASSIC, "imagenet"):
        return of_images(open_images(name, "test" if role == "query" else "train"))
    if name in LISTS:
        root = data_folder() / LISTS[name]
        if not root.is_dir():
            raise DataError(
                root, "is not there; put HashNet's train.txt, test.txt and database.txt here, and the images"
            )
        return open_lists(root, role)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".tar":
        return open_table(path, role)
    if path.is_dir():
        return open_place(path, role)
    if path.suffix or len(path.parts) > 1:
        return of_images(open_images(name, "test" if role == "query" else "train"))
    raise UnknownName("data set or path", name, [*EMBEDDED, *CLASSIC, HASHING, *LISTS, "imagenet"])


# -- CIFAR-10 as hashing papers use it ---------------------------------------------------------------------------------


def hashing_protocol(targets: Tensor, role: str, queries: int = 100, train: int = 500, seed: int = 0) -> Tensor:
    """Protocol I: the rows of a role, int64, out of all images of a set with classes int64 (N,).

    `queries` images of each class search, all others are the database, and `train` of those of each class are learned from.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    parts: dict[str, list[Tensor]] = {"query": [], "train": [], "database": []}
    for k in targets.unique():
        mine = order[targets[order] == k]
        parts["query"].append(mine[:queries])
        parts["database"].append(mine[queries:])
        parts["train"].append(mine[queries : queries + train])
    return torch.cat(parts[role]).sort().values


def hashing_cifar10(role: str) -> RetrievalImages:
    """CIFAR-10 of 60,000 images: 1,000 queries, 59,000 to be searched, 5,000 of those to learn from."""
    train, test = classic("cifar10", "train"), classic("cifar10", "test")
    targets = torch.tensor([*train.targets, *test.targets], dtype=torch.int64)
    rows = hashing_protocol(targets, role)
    return RetrievalImages(train.labels, targets[rows], None, torch.cat([train.pixels, test.pixels])[rows])


# -- folders -----------------------------------------------------------------------------------------------------------


def open_place(root: Path, role: str) -> RetrievalImages:
    """A folder of lists, of query/ and gallery/, of classes, or of images without classes."""
    if list_file(root, "train") or list_file(root, "database"):
        return open_lists(root, role)
    named = {p.name.lower(): p for p in root.iterdir() if p.is_dir()}
    parts = {r: next((named[n] for n in names if n in named), None) for r, names in ROLES.items()}
    if parts["query"] and parts["database"]:
        searched = [parts["database"], parts["query"]]  # their classes may be others than those that are learned
        mine = [parts["train"]] if role == "train" and parts["train"] else searched
        labels = sorted({label for folder in mine for label in class_names(folder)})
        return class_folders(parts[role] or parts["database"], labels)
    if not [p for p in named if not p.startswith(".")]:
        files = pictures(root)
        if not files:
            raise DataError(root, f"holds no images; files ending in {', '.join(sorted(SUFFIXES))} are read")
        if role != "database":
            raise DataError(
                root,
                "images without classes can be searched (--gallery), not learned from; expected <folder>/<class>/<image>",
            )
        return RetrievalImages([], torch.full((len(files),), UNKNOWN), list(map(str, files)))
    return of_images(open_images(root, "test" if role == "query" else "train"))


def pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def class_names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]


def class_folders(folder: Path, labels: list[str]) -> RetrievalImages:
    """<folder>/<class>/<image>; images that lie in no class have none."""
    files = pictures(folder)
    if not files:
        raise DataError(folder, f"holds no images; files ending in {', '.join(sorted(SUFFIXES))} are read")
    numbers = {label: k for k, label in enumerate(labels)}
    inside = [file.relative_to(folder).parts for file in files]
    targets = [numbers.get(parts[0], UNKNOWN) if len(parts) > 1 else UNKNOWN for parts in inside]
    return RetrievalImages(labels, torch.tensor(targets, dtype=torch.int64), list(map(str, files)))


# -- HashNet's lists ---------------------------------------------------------------------------------------------------


def list_file(root: Path, role: str) -> Path | None:
    return next((root / f"{name}.txt" for name in ROLES[role] if (root / f"{name}.txt").is_file()), None)


def open_lists(root: Path, role: str) -> RetrievalImages:
    """train.txt, test.txt and database.txt of a folder. Without database.txt the training images are the database, and the reverse."""
    path = list_file(root, role)
    if path is None and role != "query":
        path = list_file(root, "train" if role == "database" else "database")
    if path is None:
        raise DataError(root, f"has no {role} list; expected {' or '.join(f'{n}.txt' for n in ROLES[role][:3])}")
    paths, targets = read_list(path)
    find = Finder(root)
    return RetrievalImages([str(k) for k in range(targets.shape[1])], targets, [find(name) for name in paths])


def read_list(path: Path) -> tuple[list[str], Tensor]:
    """One image a line, "path 0 0 1 0 …": the paths as written, and the labels float32 (N, num_classes).

    Raises:
        DataError: names the line that has no labels, other numbers than 0 and 1, or another number of them.
    """
    paths: list[str] = []
    rows: list[np.ndarray] = []
    for number, line in enumerate(read_lines(path), 1):
        name, _, text = line.strip().partition(" ")
        if not name:
            continue
        row = np.frombuffer("".join(text.split()).encode(), dtype=np.uint8) - ord("0")
        if not len(row) or row.max() > 1 or len(row) != len(text.split()):
            raise DataError(f"{path}:{number}", "expected a path and a 0 or 1 for each class, separated by spaces")
        if rows and len(row) != len(rows[0]):
            raise DataError(f"{path}:{number}", f"has {len(row)} labels, the lines before have {len(rows[0])}")
        paths.append(name)
        rows.append(row)
    if not rows:
        raise DataError(path, "is empty; one image a line is needed")
    return paths, torch.from_numpy(np.stack(rows)).float()


class Finder:
    """Where a list's images are: as written, below the list's folder, or there under the end of the path as written.

    Lists that others made hold their own absolute paths, "/home/them/coco/val2014/x.jpg"; x.jpg is then looked for in
    <folder>/val2014, <folder>/coco/val2014, …, and once for each folder of theirs.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.known = root, {}

    def __call__(self, name: str) -> str:
        path = Path(name)
        folder = self.known.get(path.parent)
        if folder is None:
            parts = path.parent.parts
            tried = [
                path.parent,
                *(self.root.joinpath(*parts[i:]) for i in range(len(parts) + 1) if parts[i:] != parts),
            ]
            if not path.is_absolute():
                tried = [self.root / path.parent, *tried]
            folder = next((t for t in tried if (t / path.name).is_file()), tried[0])
            self.known[path.parent] = folder
        return str(folder / path.name)


# -- tables ------------------------------------------------------------------------------------------------------------


def open_table(path: Path, role: str) -> RetrievalImages:
    """A CSV or Parquet table: path (or image, file, filename), label (class, target) or labels (classes, tags), split (role).

    The column split holds train, database (gallery) or query (test); without it every fifth image is a query.
    Without a column of labels the images can be searched, not learned from.
    """
    header, table = read_rows(path)
    columns = {(name or "").strip().lower(): name for name in header}
    where = next((columns[n] for n in ("path", "image", "file", "filename") if n in columns), None)
    one = next((columns[n] for n in ("label", "class", "target") if n in columns), None)
    several = next((columns[n] for n in ("labels", "classes", "tags") if n in columns), None)
    part = next((columns[n] for n in ("split", "role", "part") if n in columns), None)
    if where is None:
        raise DataError(path, f"a column path is needed, and label or labels; the header is {header}")
    rows: list[tuple[str, list[str], str]] = []
    for number, row in enumerate(table, 2):
        if not (row[where] or "").strip():
            raise DataError(f"{path}:{number}", "has no path")
        if several:
            names = separated(row[several] or "")
        else:
            names = [row[one].strip()] if one and (row[one] or "").strip() else []
        kind = (row[part] or "").strip().lower() if part else ""
        if part and not any(kind in names_of for names_of in ROLES.values()):
            raise DataError(f"{path}:{number}", f"'{kind}' in the column {part} is not train, database or query")
        rows.append((row[where].strip(), names, kind))
    if not rows:
        raise DataError(path, "no rows below the header")
    labels = sorted({name for _, names, _ in rows for name in names}, key=by_number)
    kept = rows_of(rows, role)
    if not kept or (role == "train" and not any(names for _, names, _ in kept)):
        what = "rows" if not kept else "labels in the rows"
        raise DataError(path, f"no {what} for the role '{role}'; the column split says which rows are for what")
    numbers = {label: k for k, label in enumerate(labels)}
    files = [str(path.parent / name) for name, *_ in kept]
    if not several:
        targets = [numbers[names[0]] if names else UNKNOWN for _, names, _ in kept]
        return RetrievalImages(labels, torch.tensor(targets, dtype=torch.int64), files)
    hot = torch.zeros(len(kept), len(labels))
    for row, (_, names, _) in zip(hot, kept, strict=True):
        row[[numbers[name] for name in names]] = 1
    return RetrievalImages(labels, hot, files)


def rows_of(rows: list[tuple[str, list[str], str]], role: str) -> list[tuple[str, list[str], str]]:
    """The rows of a role; the database and what is learned from stand in for each other where one is missing."""
    if not any(kind for *_, kind in rows):
        order = sorted(rows, key=lambda row: (zlib.crc32(row[0].encode()), row[0]))
        return [row for i, row in enumerate(order) if (i % HELD_OUT == 0) == (role == "query")]
    kept = [row for row in rows if row[2] in ROLES[role]]
    if not kept and role != "query":
        return [row for row in rows if row[2] in ROLES["train" if role == "database" else "database"]]
    return kept
