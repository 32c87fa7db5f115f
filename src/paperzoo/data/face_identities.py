"""Faces by identity, and pairs of them to be told apart: drawn people, and the layouts that the field uses.

    open_faces("drawn_identities", "train")   drawn people, always there; other people in "test"
    open_faces("path/to/folder")              one sub-folder an identity; or train/ and test/ with such folders
    open_faces("path/to/lfw", "test")         LFW: <name>/<name>_0001.jpg and pairs.txt, here or in lfw*/; see LFW_PAIRS
    open_faces("list.csv")                    columns path and identity, optionally split, and x1 y1 … x5 y5
    open_faces("lfw"), ("ms1mv2"), …          such folders under $PAPERZOO_DATA or ~/.cache/paperzoo/data

Identities that are tested on are not learned: without train/ and test/, or a column split, one identity in five is held
out. Pairs come from pairs.txt (LFW's format) or pairs.csv (columns first, second, same, optionally fold; paths from the
folder) beside the pictures; else they are drawn, in ten folds of different people. A folder distractors/, of any depth, holds people that
are nobody's mate.

Pictures are taken to be aligned crops. Where five landmarks are given (columns x1 … y5, or a file landmarks.txt or lfw_landmark.txt whose
lines are a path and ten numbers), pictures are aligned by them when they are read.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paperzoo.blocks.face_alignment import align_face
from paperzoo.data.arrays import cached_arrays
from paperzoo.data.images import HELD_OUT, SUFFIXES, Images, by_number, data_folder, read_image, read_rows
from paperzoo.errors import DataError, PaperZooError, UnknownName

FOLDERS = ("lfw", "ms1mv2", "casia_webface")
LFW_PAIRS = {"test": "pairs.txt", "dev": "pairsDevTrain.txt", "dev_test": "pairsDevTest.txt"}
"""The files of pairs by split: the ten folds of the benchmark, and the two of "view 1" for development."""
LFW_IMAGES = ("lfw", "lfw-deepfunneled", "lfw_funneled", "lfw-funneled", "images")
TEST_FOLDERS = ("test", "val", "valid", "validation")
ALIGNED = 112  # pixels of a crop that is aligned when it is read
FOLDS = 10
POINTS = tuple(f"{axis}{i}" for i in range(1, 6) for axis in "xy")


@dataclass(frozen=True)
class Pairs:
    """Pairs of a set's pictures, by number: lists of one length. `folds` are 0, 1, …"""

    first: list[int]
    second: list[int]
    same: list[bool]
    folds: list[int]

    def __len__(self) -> int:
        return len(self.same)


@dataclass(frozen=True)
class FaceSet:
    """Pictures (uint8 (3, H, W), number of the identity), the pairs to be told apart, and others' faces; None where there are none.

    Training sets have no pairs. Distractors have the label 0 throughout and are of none of the set's identities.
    """

    images: Images
    pairs: Pairs | None = None
    distractors: Images | None = None


def open_faces(data: str | Path, split: str = "train") -> FaceSet:
    """The faces of a split, "train" or "test" (and "dev", "dev_test" for LFW); see the module's docstring.

    Raises:
        DataError: if the place is missing or empty, a list is wrong (with its line), or a file is a pickle.
        UnknownName: if `data` is neither a set's name nor a path.
    """
    name = str(data)
    if name == "drawn_identities":
        return drawn_identities(split)
    if name in FOLDERS:
        root = data_folder() / name
        if not root.is_dir():
            raise DataError(root, f"{name} is not there; unpack its aligned faces here, one folder an identity")
        return open_folder(root, split)
    path = Path(name).expanduser()
    if path.suffix.lower() in (".bin", ".pkl", ".pickle"):
        raise DataError(
            path,
            "refused: a verification pack is a Python pickle, which can run code when it is read; unpack its pictures "
            "where you trust it, into a folder with a pairs.csv (columns first, second, same, fold)",
        )
    if path.suffix.lower() in (".rec", ".idx", ".lst"):
        raise DataError(path, "MXNet record files are not read; unpack them into one folder an identity")
    if path.is_dir():
        return open_folder(path, split)
    if path.is_file():
        return open_list(path, split)
    if path.suffix or len(path.parts) > 1:
        raise DataError(
            path, "no such file or folder; give a folder of identities or a CSV with the columns path,identity"
        )
    raise UnknownName("set of faces or path", name, ["drawn_identities", *FOLDERS])


# -- drawn people ------------------------------------------------------------------------------------------------------

DRAWN = {"train": (0, 100, 7), "test": (10_000, 40, 8), "distractors": (20_000, 80, 1)}
"""First number of the identities, how many they are, and pictures of each."""
DRAWN_SIZE = 48


@functools.cache
def drawn_identities(split: str) -> FaceSet:
    """Aligned crops of drawn people, 48 x 48, before photographs: 700 to learn, 320 of 40 others to test, 80 distractors."""
    if split == "train":
        return FaceSet(drawn_images("train"))
    images = drawn_images("test")
    return FaceSet(images, make_pairs(images.targets), drawn_images("distractors"))


@functools.cache
def drawn_images(part: str) -> Images:
    import paperzoo.data.face_drawing as drawing

    first, people, each = DRAWN[part]
    code = zlib.crc32(Path(drawing.__file__).read_bytes() + Path(__file__).read_bytes())
    arrays = cached_arrays(f"drawn_identities_{part}_{code:08x}", lambda: draw_people(first, people, each, part))
    labels = ["others"] if part == "distractors" else [f"person {first + k}" for k in range(people)]
    targets = [0] * people if part == "distractors" else [k for k in range(people) for _ in range(each)]
    return Images(labels, targets, None, torch.from_numpy(arrays["pixels"]))


def draw_people(first: int, people: int, each: int, part: str) -> dict:
    """Pictures of `people` identities, `each` of them in a row; backgrounds are the left 70% of photographs for training, else the right 30%."""
    from paperzoo.data.face_drawing import draw_face
    from paperzoo.data.scenes import photographs

    side, crops = 64, []
    places = []
    for photograph in photographs():
        border = int(0.7 * photograph.shape[2])
        half = photograph[:, ::2, :border:2] if part == "train" else photograph[:, ::2, border::2]
        places.append(half)
    for k in range(people):
        rng = torch.Generator().manual_seed(first + k)
        for _ in range(each):
            image, alpha, landmarks = draw_face(first + k, rng, side)
            photograph = places[int(torch.randint(len(places), (), generator=rng))]
            top, left = (
                int(torch.randint(max(1, n - side), (), generator=rng))
                for n in (photograph.shape[1], photograph.shape[2])
            )
            behind = photograph[:, top : top + side, left : left + side].float()
            whole = torch.zeros(3, side, side)
            whole[:, : behind.shape[1], : behind.shape[2]] = behind
            whole = whole + alpha * (image.float() - whole)
            crops.append(align_face(whole.round().to(torch.uint8), landmarks, DRAWN_SIZE))
    return {"pixels": torch.stack(crops).numpy()}


# -- pairs -------------------------------------------------------------------------------------------------------------


def make_pairs(targets: Sequence[int], per_fold: int = 300, folds: int = FOLDS, seed: int = 0) -> Pairs:
    """As many pairs of one identity as of two, in folds that share no identity; a function of the seed.

    Args:
        targets: the identity of every picture.
        per_fold: pairs of each kind in a fold, at most.
        folds: fewer are made where there are not two identities with two pictures for each.

    Raises:
        PaperZooError: if there are fewer than four identities with two pictures.
    """
    rows: dict[int, list[int]] = {}
    for i, target in enumerate(targets):
        rows.setdefault(target, []).append(i)
    people = [mine for mine in rows.values() if len(mine) > 1]
    folds = min(folds, len(people) // 2)
    if folds < 2:
        raise PaperZooError(f"pairs need four identities with two pictures each at least; there are {len(people)}")
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(people), generator=rng).tolist()
    first, second, same, numbers = [], [], [], []
    for fold in range(folds):
        here = [torch.tensor(people[k]) for k in order[fold::folds]]
        here = [
            mine[torch.randperm(len(mine), generator=rng)[:50]] for mine in here
        ]  # no more of one person than 1,225 pairs
        alike = torch.cat([torch.combinations(mine) for mine in here])
        alike = alike[torch.randperm(len(alike), generator=rng)[:per_fold]]
        pictures = torch.cat(here)
        owner = torch.repeat_interleave(torch.arange(len(here)), torch.tensor([len(mine) for mine in here]))
        drawn = torch.randint(len(pictures), (8 * len(alike), 2), generator=rng).sort(1).values
        drawn = drawn[owner[drawn[:, 0]] != owner[drawn[:, 1]]].unique(dim=0)
        drawn = drawn[torch.randperm(len(drawn), generator=rng)[: len(alike)]]
        for chosen, kind in ((alike, True), (pictures[drawn], False)):
            first += chosen[:, 0].tolist()
            second += chosen[:, 1].tolist()
            same += [kind] * len(chosen)
            numbers += [fold] * len(chosen)
    return Pairs(first, second, same, numbers)


def read_lfw_pairs(path: Path) -> list[tuple[str, int, str, int, bool, int]]:
    """LFW's list of pairs: (name, number, name, number, same, fold).

    Its first line is the number of folds and of pairs of each kind in a fold, or the latter alone: then the pairs are dealt
    into ten folds. Then, for each fold, lines "name n1 n2" and "name1 n1 name2 n2".

    Raises:
        DataError: with the line.
    """
    lines = read_lines(path)
    try:
        head = [int(word) for word in lines[0].split()]
    except (ValueError, IndexError):
        head = []
    if len(head) not in (1, 2) or min(head) < 1:
        raise DataError(path, "line 1 must be the number of folds and of pairs of a kind in each, as in '10 300'")
    folds, each = head if len(head) == 2 else (1, head[0])
    found = []
    for number, line in enumerate(lines[1:], 2):
        words = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            continue
        names = (words[0], words[0]) if len(words) == 3 else (words[0], words[2]) if len(words) == 4 else None
        try:
            counts = (int(words[1]), int(words[-1]))
        except (ValueError, IndexError):
            names = None
        if names is None:
            raise DataError(
                path, f"line {number} must be 'name n1 n2' or 'name1 n1 name2 n2', not '{line.strip()[:60]}'"
            )
        place = len(found)
        kind = (place // each) % 2 == 0
        if kind != (len(words) == 3):
            wanted = "'name n1 n2'" if kind else "'name1 n1 name2 n2'"
            raise DataError(path, f"line {number} must be {wanted}: kinds alternate every {each} pairs")
        fold = place // (2 * each) if folds > 1 else place % FOLDS
        found.append((names[0], counts[0], names[1], counts[1], len(words) == 3, fold))
    if len(found) != 2 * folds * each:
        raise DataError(path, f"line 1 promises {2 * folds * each} pairs; there are {len(found)}")
    return found


def read_pair_table(path: Path, numbers: dict[str, int]) -> Pairs:
    """pairs.csv: columns first, second, same (1 or 0), optionally fold. `numbers`: path as written -> picture.

    Raises:
        DataError: with the line.
    """
    names, table = read_rows(path)
    header = {(name or "").strip().lower(): name for name in names}
    if not {"first", "second", "same"} <= header.keys():
        raise DataError(path, f"the columns first, second and same are needed; the header is {names}")
    first, second, same, folds = [], [], [], []
    for number, row in enumerate(table, 2):
        for key, into in (("first", first), ("second", second)):
            name = (row[header[key]] or "").strip()
            if name not in numbers:
                raise DataError(path, f"line {number}: '{name}' is not among the pictures")
            into.append(numbers[name])
        verdict = (row[header["same"]] or "").strip().lower()
        if verdict not in ("0", "1", "true", "false"):
            raise DataError(path, f"line {number}: same is '{verdict}'; it must be 1 or 0")
        same.append(verdict in ("1", "true"))
        fold = (row.get(header.get("fold", ""), "") or str((number - 2) % FOLDS)).strip()
        if not fold.isdigit():
            raise DataError(path, f"line {number}: fold is '{fold}'; it must be a whole number")
        folds.append(int(fold))
    if len(set(same)) < 2:
        raise DataError(path, "pairs of both kinds are needed, same and different")
    if len(set(folds)) < 2:  # a threshold is chosen on other folds than the one that is judged
        folds = [i % FOLDS for i in range(len(folds))]
    return Pairs(first, second, same, folds)


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(path, f"not a readable text file ({error})") from None


# -- folders and lists -------------------------------------------------------------------------------------------------


class AlignedReader:
    """Reads picture i and aligns it by its landmarks; pictures without any are read as they are."""

    def __init__(self, paths: Sequence[str], landmarks: Sequence[Tensor | None]) -> None:
        self.paths, self.landmarks = list(paths), list(landmarks)

    def __call__(self, index: int) -> Tensor:
        image, points = read_image(self.paths[index]), self.landmarks[index]
        return image if points is None else align_face(image, points, ALIGNED)


def faces(labels: Sequence[str], targets: Sequence[int], paths: Sequence[str], points: dict[str, Tensor]) -> Images:
    """Pictures on disk; `points` are landmarks by path."""
    read = AlignedReader(paths, [points.get(p) for p in paths]) if points else None
    return Images(labels, targets, paths, read=read)


def pictures_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def open_folder(root: Path, split: str) -> FaceSet:
    """One sub-folder an identity, with the files that the module's docstring names beside them."""
    named = {p.name.lower(): p for p in root.iterdir() if p.is_dir()}
    if (root / LFW_PAIRS["test"]).is_file() or split not in ("train", "test"):
        return open_lfw(root, split)
    held_out = next((named[n] for n in TEST_FOLDERS if n in named), None)
    has_split = "train" in named and held_out is not None
    base = (named["train"] if split == "train" else held_out) if has_split else root
    if base != root and split != "train" and (base / LFW_PAIRS["test"]).is_file():
        return open_lfw(base, split)
    aside = {"distractors"}
    people = [p for p in base.iterdir() if p.is_dir() and p.name not in aside and not p.name.startswith(".")]
    if not people:
        packs = sorted(p.name for p in root.iterdir() if p.suffix.lower() in (".bin", ".rec"))
        hint = f"; {packs[0]} is a pickle or a record file, which is not read: unpack it" if packs else ""
        raise DataError(root, f"no folders of identities; pictures are expected as <folder>/<identity>/<image>{hint}")
    table = base / "pairs.csv"
    if not has_split and not table.is_file():
        people = [p for i, p in enumerate(shuffled(people)) if (i % HELD_OUT == 0) == (split != "train")]
    people = sorted(people, key=lambda p: by_number(p.name))
    paths, targets = [], []
    for k, person in enumerate(people):
        mine = pictures_in(person)
        paths += [str(p) for p in mine]
        targets += [k] * len(mine)
    if not paths:
        raise DataError(
            base, f"no pictures for the split '{split}'; files ending in {', '.join(sorted(SUFFIXES))} are read"
        )
    points = read_landmarks(base) | (read_landmarks(root) if base != root else {})
    images = faces([p.name for p in people], targets, paths, points)
    if split == "train":
        return FaceSet(without_pairs(images, table, base) if not has_split and table.is_file() else images)
    if table.is_file():
        numbers = {Path(p).relative_to(base).as_posix(): i for i, p in enumerate(paths)}
        pairs = read_pair_table(table, numbers)
    else:
        pairs = pairs_of(images, base)
    others = next((d for d in (base / "distractors", root / "distractors") if d.is_dir()), None)
    strangers = [str(p) for p in pictures_in(others)] if others else []
    return FaceSet(images, pairs, faces(["others"], [0] * len(strangers), strangers, points) if strangers else None)


def without_pairs(images: Images, table: Path, base: Path) -> Images:
    """The people who are in no pair: those that may be learned where a folder with pairs has no train/."""
    numbers = {Path(p).relative_to(base).as_posix(): i for i, p in enumerate(images.paths or ())}
    pairs = read_pair_table(table, numbers)
    return without({images.targets[i] for i in (*pairs.first, *pairs.second)}, images, table)


def without(tested: set[int], images: Images, source: Path) -> Images:
    """The pictures of all other identities, numbered anew.

    Raises:
        DataError: if nobody is left.
    """
    kept = [i for i, target in enumerate(images.targets) if target not in tested]
    if not kept:
        raise DataError(source, "everybody is in a pair, so nobody is left to learn; use another set for training")
    labels = [label for k, label in enumerate(images.labels) if k not in tested]
    number = {label: k for k, label in enumerate(labels)}
    rest = images.subset(kept)
    return Images(labels, [number[images.labels[t]] for t in rest.targets], rest.paths, None, None, rest.read)


def pairs_of(images: Images, where: Path) -> Pairs:
    try:
        return make_pairs(images.targets)
    except PaperZooError as error:
        raise DataError(where, str(error)) from None


def shuffled(people: list[Path]) -> list[Path]:
    """An order that depends on the names alone, so that a hold-out is the same on every machine."""
    return sorted(people, key=lambda p: (zlib.crc32(p.name.encode()), p.name))


def open_lfw(root: Path, split: str) -> FaceSet:
    """LFW as it is published. "train" are the people of peopleDevTrain.txt, or without it those that are in no pair of pairs.txt."""
    base = next((root / n for n in LFW_IMAGES if (root / n).is_dir()), root)
    file = root / LFW_PAIRS.get(split, LFW_PAIRS["test"])
    if split != "train" and split not in LFW_PAIRS:
        raise DataError(root, f"there is no split '{split}'; LFW has train, {', '.join(LFW_PAIRS)}")
    if not file.is_file():
        raise DataError(file, "no such file; it belongs beside the pictures of LFW")
    people = sorted(p for p in base.iterdir() if p.is_dir() and p.name not in (*LFW_IMAGES, "distractors"))
    paths, targets = [], []
    for k, person in enumerate(people):
        mine = pictures_in(person)
        paths += [str(p) for p in mine]
        targets += [k] * len(mine)
    if not paths:
        raise DataError(base, "no pictures; they are expected as <name>/<name>_0001.jpg")
    images = faces([p.name for p in people], targets, paths, read_landmarks(root))
    rows = {
        (name, int(stem)): i
        for i, p in enumerate(paths)
        for name, _, stem in [Path(p).stem.rpartition("_")]
        if stem.isdigit()
    }
    found = read_lfw_pairs(file)
    if split == "train":
        allowed = root / "peopleDevTrain.txt"
        numbers = {label: k for k, label in enumerate(images.labels)}
        if allowed.is_file():
            names = {line.split()[0] for line in read_lines(allowed)[1:] if line.split()}
            return FaceSet(without({k for label, k in numbers.items() if label not in names}, images, allowed))
        return FaceSet(without({numbers[n] for a, _, b, *_ in found for n in (a, b) if n in numbers}, images, file))
    first, second = [], []
    for number, (a, i, b, j, _, _) in enumerate(found, 2):
        for name, count, into in ((a, i, first), (b, j, second)):
            if (name, count) not in rows:
                raise DataError(file, f"line {number}: there is no picture {name}/{name}_{count:04d} in {base}")
            into.append(rows[name, count])
    strangers = [str(p) for p in pictures_in(root / "distractors")] if (root / "distractors").is_dir() else []
    others = Images(["others"], [0] * len(strangers), strangers) if strangers else None
    return FaceSet(images, Pairs(first, second, [f[4] for f in found], [f[5] for f in found]), others)


def read_landmarks(root: Path) -> dict[str, Tensor]:
    """landmarks.txt or lfw_landmark.txt: a path from the folder (or its lfw*/) and ten numbers x1 y1 … x5 y5 a line.

    Raises:
        DataError: with the line.
    """
    path = next((root / n for n in ("landmarks.txt", "lfw_landmark.txt") if (root / n).is_file()), None)
    if path is None:
        return {}
    points = {}
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word) for word in words[-10:]]
        except ValueError:
            values = []
        name = " ".join(words[:-10])
        if len(values) != 10 or not name:
            raise DataError(
                path, f"line {number} must be a path and ten numbers x1 y1 … x5 y5, not '{line.strip()[:60]}'"
            )
        place = next((root / n / name for n in (".", *LFW_IMAGES) if (root / n / name).is_file()), None)
        if place is not None:  # lists often name pictures that were sorted out
            points[str(place)] = solid(torch.tensor(values).view(5, 2), path, number)
    return points


def solid(points: Tensor, path: Path, number: int) -> Tensor:
    """Landmarks that can be aligned.

    Raises:
        DataError: if they are not finite, or all one point.
    """
    if not bool(torch.isfinite(points).all()) or float((points - points.mean(0)).abs().max()) < 1e-3:
        raise DataError(
            path, f"line {number}: five landmarks at different places are needed, not {points.flatten().tolist()}"
        )
    return points


def read_list(path: Path) -> tuple[list[tuple[str, str, str, str]], dict[str, Tensor]]:
    """A CSV or Parquet table: path and identity (or label), optionally split and x1 y1 … x5 y5.

    Returns:
        rows (path as written, path of the file, identity, split in lower case or ""), and landmarks by path of the file.

    Raises:
        DataError: with the line.
    """
    names, table = read_rows(path)
    header = {(name or "").strip().lower(): name for name in names}
    where = next((header[n] for n in ("path", "image", "file", "filename") if n in header), None)
    what = next((header[n] for n in ("identity", "id", "label", "person", "name") if n in header), None)
    if where is None or what is None:
        raise DataError(path, f"the columns path and identity are needed; the header is {names}")
    marked = [header[p] for p in POINTS if p in header]
    if marked and len(marked) != len(POINTS):
        raise DataError(path, f"landmarks need all of the columns {', '.join(POINTS)}")
    rows, points = [], {}
    for number, row in enumerate(table, 2):
        if not row[where] or row[what] in (None, ""):
            raise DataError(path, f"line {number} has no path or no identity")
        name = row[where].strip()
        place = str(path.parent / name)
        if marked:
            try:
                values = torch.tensor([float(row[column]) for column in marked]).view(5, 2)
            except (TypeError, ValueError):
                raise DataError(path, f"line {number}: x1 … y5 must be ten numbers") from None
            points[place] = solid(values, path, number)
        rows.append((name, place, row[what].strip(), (row.get(header.get("split", "")) or "").strip().lower()))
    if not rows:
        raise DataError(path, "no rows below the header")
    return rows, points


def open_list(path: Path, split: str) -> FaceSet:
    """A table as `read_list` takes it. The column split says "train" or another; without it one identity in five is held out."""
    rows, points = read_list(path)
    if any(part for *_, part in rows):
        rows = [row for row in rows if (row[3] == "train") == (split == "train")]
    else:
        people = sorted({row[2] for row in rows}, key=lambda name: (zlib.crc32(name.encode()), name))
        chosen = {name for i, name in enumerate(people) if (i % HELD_OUT == 0) == (split != "train")}
        rows = [row for row in rows if row[2] in chosen]
    if not rows:
        raise DataError(path, f"no rows for the split '{split}'")
    images = by_identity([(row[2], row[1]) for row in rows], points)
    if split == "train":
        return FaceSet(images)
    listed = path.parent / "pairs.csv"
    if listed.is_file() and listed != path:
        return FaceSet(images, read_pair_table(listed, {row[0]: i for i, row in enumerate(rows)}))
    return FaceSet(images, pairs_of(images, path))


def by_identity(found: Sequence[tuple[str, str]], points: dict[str, Tensor]) -> Images:
    """Pictures from pairs of identity and path, in that order."""
    labels = sorted({identity for identity, _ in found}, key=by_number)
    numbers = {label: k for k, label in enumerate(labels)}
    return faces(labels, [numbers[identity] for identity, _ in found], [path for _, path in found], points)


def open_gallery(place: str | Path) -> Images:
    """Known faces: a folder of one sub-folder an identity, or of one picture an identity, named after it; or a list. All of it.

    Raises:
        DataError: if there are none.
    """
    path = Path(place).expanduser()
    if path.is_file():
        rows, points = read_list(path)
        return by_identity([(row[2], row[1]) for row in rows], points)
    if not path.is_dir():
        raise DataError(
            path, "no such folder; a gallery is a folder of identities, one of pictures, or a CSV of path,identity"
        )
    found = [(p.name, str(q)) for p in path.iterdir() if p.is_dir() and p.name[0] != "." for q in pictures_in(p)]
    found += [(p.stem, str(p)) for p in path.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(path, f"no pictures; files ending in {', '.join(sorted(SUFFIXES))} are read")
    return by_identity(sorted(found), read_landmarks(path))
