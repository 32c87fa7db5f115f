"""Sets of point clouds: generated solids, ModelNet, ShapeNetPart, rooms of S3DIS, folders of the user's own files.

    open_clouds("solids", "train")              embedded; also "solid_parts" and "solid_rooms", see `data.solids`
    open_clouds("path/to/ModelNet40", "test")   <class>/train/*.off and <class>/test/*.off
    open_clouds("path/to/modelnet40_normal_resampled", …)    modelnet40_shape_names.txt, …_train.txt, …_test.txt, <class>/*.txt
    open_clouds("path/to/shapenetcore_partanno_…_normal", …) synsetoffset2category.txt, train_test_split/*.json (or .txt)
    open_clouds("path/to/rooms", …)             Area_<n>_<room>.npy (x y z r g b label), area 5 for testing; or train/ and test/
                                                with labelled files (.ply, .npy, .txt) and classes.txt, a name a line
    open_clouds("path/to/folder", …)            one sub-folder a class, with or without train/ and test/

"modelnet40", "modelnet10", "shapenet_part" and "s3dis" stand for folders of these names (or their usual ones) under $PAPERZOO_DATA or
~/.cache/paperzoo/data. An item is (`point_files.Cloud`, class). Files are read when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from paperzoo.data import solids
from paperzoo.data.images import HELD_OUT, data_folder, folders, shuffled
from paperzoo.data.point_files import SUFFIXES, Cloud, read_cloud
from paperzoo.errors import DataError, UnknownName

# where the sets that have a name are looked for
USUAL = {
    "modelnet40": ("modelnet40", "ModelNet40", "modelnet40_normal_resampled"),
    "modelnet10": ("modelnet10", "ModelNet10"),
    "shapenet_part": ("shapenet_part", "shapenetcore_partanno_segmentation_benchmark_v0_normal"),
    "s3dis": ("s3dis", "stanford_indoor3d"),
}
# parts of ShapeNetPart's 16 categories, numbered through in alphabetical order: 50 in all
SHAPENET_PARTS = {
    "Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2, "Lamp": 4, "Laptop": 2,
    "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3,
}  # fmt: skip
S3DIS_CLASSES = [
    "ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa", "bookcase", "board", "clutter",
]  # fmt: skip
EMBEDDED = ("solids", "solid_parts", "solid_rooms")


class Clouds(Dataset):
    """Clouds with a class each, read when asked for.

    labels: names of the classes or categories. targets: the class of each cloud. paths: a name for each. point_labels: names of
    what the points are labelled with, empty where they are not. parts: category -> the point labels that occur on it, for sets of
    shapes with parts.
    """

    def __init__(
        self,
        labels: Sequence[str],
        targets: Sequence[int],
        paths: Sequence[str],
        read: Callable[[int], Cloud],
        point_labels: Sequence[str] = (),
        parts: dict[str, list[int]] | None = None,
    ) -> None:
        self.labels, self.targets, self.paths = list(labels), list(map(int, targets)), list(paths)
        self.read, self.point_labels, self.parts = read, list(point_labels), parts or {}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Cloud, int]:
        cloud = self.read(index)
        if self.point_labels:
            if cloud.labels is None:
                raise DataError(self.paths[index], "its points have no labels")
            worst = int(cloud.labels.max())
            if worst >= len(self.point_labels) or int(cloud.labels.min()) < -1:
                raise DataError(self.paths[index], f"has the label {worst}; there are {len(self.point_labels)}, from 0")
        return cloud, self.targets[index]


class Files:
    """Reads the files of a set by number; a class, so that worker processes can be sent it."""

    def __init__(self, paths: Sequence[str], columns: str | None = None) -> None:
        self.paths, self.columns = list(paths), columns

    def __call__(self, index: int) -> Cloud:
        path = Path(self.paths[index])
        named = path.suffix.lower() in (".ply", ".off")
        return read_cloud(path, columns=None if named else self.columns)


class Stored:
    """Reads the clouds of a generated set by number."""

    def __init__(self, made: solids.Made, labelled: bool) -> None:
        self.made, self.labelled = made, labelled

    def __call__(self, index: int) -> Cloud:
        m = self.made
        return Cloud(m.points[index], m.normals[index], None, m.labels[index] if self.labelled else None)


def open_clouds(data: str | Path, split: str = "train") -> Clouds:
    """The clouds of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Raises:
        DataError: if the place is missing, empty or not laid out as one of these.
        UnknownName: if `data` is neither a set's name nor a path.
    """
    name = str(data)
    if name in EMBEDDED:
        return embedded(name, split)
    if name in USUAL:
        there = [data_folder() / n for n in USUAL[name] if (data_folder() / n).is_dir()]
        if not there:
            raise DataError(data_folder(), f"{name} is not there; unpack it here as {' or '.join(USUAL[name])}/")
        return open_layout(there[0], split)
    path = Path(name).expanduser()
    if path.is_dir():
        return open_layout(path, split)
    if path.exists():
        raise DataError(path, "this is a file; a folder of clouds is needed")
    if path.suffix or len(path.parts) > 1:
        raise DataError(
            path, "no such folder; give a folder of class folders, or one of ModelNet, ShapeNetPart or rooms"
        )
    raise UnknownName("point cloud set or path", name, [*EMBEDDED, *USUAL])


def embedded(name: str, split: str) -> Clouds:
    made = getattr(solids, name)(split)
    paths = [f"{name} {split} {i}" for i in range(len(made.points))]
    make = partial(Clouds, targets=made.targets.tolist(), paths=paths, read=Stored(made, name != "solids"))
    if name == "solids":
        return make(solids.SOLIDS)
    if name == "solid_rooms":
        return make(["room"], point_labels=solids.ROOM_CLASSES)
    return make(list(solids.OBJECTS), **numbered({k: len(v) for k, v in solids.OBJECTS.items()}, solids.OBJECTS))


def numbered(counts: dict[str, int], names: dict[str, list[str]] | None = None) -> dict:
    """Parts numbered through all categories: the `point_labels` and `parts` of a set."""
    parts, labels = {}, []
    for category, count in counts.items():
        parts[category] = list(range(len(labels), len(labels) + count))
        labels += [f"{category} {names[category][i] if names else i}" for i in range(count)]
    return {"parts": parts, "point_labels": labels}


def open_layout(root: Path, split: str) -> Clouds:
    """A folder, by what lies in it."""
    if (root / "synsetoffset2category.txt").is_file():
        return open_shapenet_part(root, split)
    if names := sorted(root.glob("modelnet*_shape_names.txt")):
        return open_resampled(root, names[0], split)
    if any(root.glob("Area_*")) or (root / "classes.txt").is_file():
        return open_rooms(root, split)
    return open_classes(root, split)


def lines_of(path: Path) -> list[str]:
    """The lines of a text without blanks.

    Raises:
        DataError: if it is missing or empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise DataError(path, "no such file, or not a text") from None
    if not lines:
        raise DataError(path, "is empty")
    return lines


def clouds_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def from_files(labels: list[str], files: list[Path], targets: list[int], root: Path, split: str, **more) -> Clouds:
    if not files:
        raise DataError(root, f"no clouds for the split '{split}'; files ending in {', '.join(SUFFIXES)} are read")
    paths = [str(f) for f in files]
    return Clouds(labels, targets, paths, Files(paths, more.pop("columns", None)), **more)


def open_classes(root: Path, split: str) -> Clouds:
    """ModelNet's <class>/<split>/, or <split>/<class>/, or class folders of which one file in five is held out."""
    named = {p.name.lower(): p for p in folders(root)}
    outer = {"train", "test"} <= named.keys()
    base = named[split] if outer else root
    labels = sorted(p.name for p in folders(named["train"] if outer else root))
    if not labels:
        raise DataError(root, "no class folders; clouds are expected as <folder>/<class>/<cloud>")
    files, targets = [], []
    for k, label in enumerate(labels):
        folder = base / label
        inner = (folder / "train").is_dir() and (folder / "test").is_dir()
        mine = clouds_in(folder / split if inner else folder)
        if not inner and not outer:
            mine = [f for i, f in enumerate(shuffled(mine, root)) if (i % HELD_OUT == 0) == (split != "train")]
        files += mine
        targets += [k] * len(mine)
    return from_files(labels, files, targets, base, split)


def open_resampled(root: Path, names: Path, split: str) -> Clouds:
    """ModelNet as 10,000 points with normals a shape; its lists name shapes, "airplane_0001", of which the class is the front."""
    labels = lines_of(names)
    listing = names.with_name(names.name.replace("shape_names", split))
    files, targets = [], []
    for number, shape in enumerate(lines_of(listing), 1):
        label = shape.rpartition("_")[0]
        if label not in labels:
            raise DataError(listing, f"line {number}: the class of '{shape}' is not in {names.name}")
        files.append(root / label / f"{shape}.txt")
        targets.append(labels.index(label))
    return from_files(labels, files, targets, root, split, columns="xyznnn")


def open_shapenet_part(root: Path, split: str) -> Clouds:
    """ShapeNetPart: a text a shape, "x y z nx ny nz label". Training takes the published training and validation shapes together."""
    table, categories = root / "synsetoffset2category.txt", {}
    for number, line in enumerate(lines_of(table), 1):
        words = line.split()
        if len(words) != 2:
            raise DataError(table, f"line {number} is not 'name folder'")
        categories[words[0]] = words[1]
    names = sorted(categories)
    by_folder = {folder: k for k, (_, folder) in enumerate(sorted(categories.items()))}
    files, targets = [], []
    for listing in ("train", "val") if split == "train" else ("test",):
        for entry in shape_list(root / "train_test_split", listing):
            folder, _, shape = entry.rpartition("/")
            folder = folder.rpartition("/")[2]
            if folder in by_folder:  # the lists name all categories, also where only some are there
                files.append(root / folder / f"{shape}.txt")
                targets.append(by_folder[folder])
    if all(name in SHAPENET_PARTS for name in names):
        more = numbered(SHAPENET_PARTS)
        more["parts"] = {name: more["parts"][name] for name in names}
    else:
        more = parts_from(root, names, split, files, targets)
    return from_files(names, files, targets, root, split, columns="xyznnnl", **more)


def shape_list(folder: Path, name: str) -> list[str]:
    """ "shape_data/02691156/1021…" of each shape of a list, a JSON array or a line each."""
    found = next((f for s in (".json", ".txt") if (f := folder / f"shuffled_{name}_file_list{s}").is_file()), None)
    if found is None:
        raise DataError(folder / f"shuffled_{name}_file_list.json", "no such file")
    if found.suffix == ".txt":
        return lines_of(found)
    try:
        entries = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(found, f"not readable JSON ({error})") from None
    if not isinstance(entries, list) or not all(isinstance(e, str) and "/" in e for e in entries):
        raise DataError(found, "is not a list of <category folder>/<shape>")
    return entries


def parts_from(root: Path, names: list[str], split: str, files: list[Path], targets: list[int]) -> dict:
    """The labels that occur on each category of a set that is not the published one, from its training files."""
    if split != "train":
        train = open_shapenet_part(root, "train")
        return {"parts": train.parts, "point_labels": train.point_labels}
    found: dict[str, set[int]] = {name: set() for name in names}
    for file, target in zip(files, targets, strict=True):
        labels = read_cloud(file, columns="xyznnnl").labels
        found[names[target]] |= set(labels.unique().tolist())
    parts = {name: sorted(labels) for name, labels in found.items()}
    last = max((label for labels in parts.values() for label in labels), default=-1)
    owner = {label: name for name, labels in parts.items() for label in labels}
    return {"parts": parts, "point_labels": [f"{owner.get(i, 'part')} {i}" for i in range(last + 1)]}


def open_rooms(root: Path, split: str) -> Clouds:
    """Scenes of which every point has a class."""
    if (root / "classes.txt").is_file():
        files = clouds_in(root / split)
        files = [f for f in files if f.name != "classes.txt"]
        return from_files(
            ["room"], files, [0] * len(files), root / split, split, point_labels=lines_of(root / "classes.txt")
        )
    files = [f for f in sorted(root.glob("Area_*.npy")) if f.name.startswith("Area_5") == (split != "train")]
    if not files:
        raise DataError(
            root, f"no rooms for the split '{split}': Area_<n>_<room>.npy, x y z r g b label, area 5 for testing"
        )
    return from_files(["room"], files, [0] * len(files), root, split, columns="xyzcccl", point_labels=S3DIS_CLASSES)
