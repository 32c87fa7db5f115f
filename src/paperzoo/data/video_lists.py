"""Lists of videos with labels, as the field's sets come: "path label", UCF101's three splits, Kinetics' annotations."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

from paperzoo.data.images import HELD_OUT, HELD_OUT_NAMES, by_number, of_split, read_rows
from paperzoo.data.videos import SUFFIXES, Videos
from paperzoo.errors import DataError

log = logging.getLogger(__name__)

Row = tuple[str, str]  # path, label as written; "" where a list has none


def open_list(path: Path, split: str) -> Videos:
    """A table with a header that names path and label; else lines "path label", separated by blanks, a comma or a tab."""
    if path.suffix.lower() == ".parquet" or has_header(path):
        return open_table(path, split)
    if "youtube_id" in first_line(path):
        return open_kinetics(path.parent.parent if path.parent.name == "annotations" else path.parent, split)
    train, test = counterpart(path)
    rows = read_lines(path) if test is None else read_lines(train if split == "train" else test)
    if test is None:
        order = sorted(rows, key=lambda row: (zlib.crc32(row[0].encode()), row[0]))
        rows = [row for i, row in enumerate(order) if (i % HELD_OUT == 0) == (split != "train")]
    if not rows:
        raise DataError(path, f"no videos for the split '{split}'")
    names = class_names(train)
    if names is not None:  # UCF101: numbers from 1, and the lists for tests have paths alone
        labels = [names[number] for number in sorted(names)]
        answers = [names.get(int(label)) if label.isdigit() else Path(file).parent.name for file, label in rows]
    else:
        reference = {label for _, label in read_lines(train)}
        labels, answers = sorted(reference, key=by_number), [label for _, label in rows]
    places = {label: k for k, label in enumerate(labels)}
    unknown = next((row for row, answer in zip(rows, answers, strict=True) if answer not in places), None)
    if unknown is not None:
        raise DataError(
            path, f"'{unknown[0]}': its class '{unknown[1]}' is not one of the {len(labels)} of {train.name}"
        )
    root = root_of(train, rows[0][0])
    return Videos(labels, [places[answer] for answer in answers], [str(root / file) for file, _ in rows])


def has_header(path: Path) -> bool:
    """Whether the first line names columns: it has the word path, video or file, and no name of a video."""
    words = first_line(path).lower().replace(",", " ").split()
    return any(w in ("path", "video", "file", "filename") for w in words) and not any(
        Path(w).suffix in SUFFIXES for w in words
    )


def first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.readline()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(path, f"not a readable list ({type(error).__name__})") from None


def read_lines(path: Path) -> list[Row]:
    """The rows of a list. The label is the last word: blanks in paths are fine.

    Raises:
        DataError: naming the line that has no label where others have one.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(path, f"not a readable list ({type(error).__name__})") from None
    rows: list[Row] = []
    numbers = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        separator = next((s for s in ("\t", ",") if s in text), None)
        file, _, label = text.rpartition(separator) if separator else text.rpartition(" ")
        if not file or Path(text).suffix.lower() in SUFFIXES:  # a path alone
            file, label = text, ""
        rows.append((file.strip(), label.strip()))
        numbers.append(number)
    if rows and any(label for _, label in rows):
        lacking = next((n for n, (_, label) in zip(numbers, rows, strict=True) if not label), None)
        if lacking is not None:
            raise DataError(path, f"line {lacking} has no label; a line is: path label")
    elif rows and class_names(path) is None:
        raise DataError(path, f"line {numbers[0]} has no label; a line is: path label")
    if not rows:
        raise DataError(path, "holds no videos; a line is: path label")
    return rows


def counterpart(path: Path) -> tuple[Path, Path | None]:
    """The lists for training and testing: "train" in a name against "test", "val", …; None where there is no other one."""
    name = path.name
    if "train" in name.lower():
        at = name.lower().index("train")
        for other in HELD_OUT_NAMES:
            beside = path.with_name(name[:at] + other + name[at + 5 :])
            if beside.is_file():
                return path, beside
    for other in HELD_OUT_NAMES:
        if other in name.lower():
            at = name.lower().index(other)
            beside = path.with_name(name[:at] + "train" + name[at + len(other) :])
            if beside.is_file():
                return beside, path
    return path, None


def class_names(path: Path) -> dict[int, str] | None:
    """UCF101's classInd.txt beside a list: number from 1 -> class."""
    file = path.with_name("classInd.txt")
    if not file.is_file():
        return None
    names = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split(maxsplit=1)
        if not words:
            continue
        if len(words) != 2 or not words[0].isdigit():
            raise DataError(file, f"line {number}: '{line.strip()[:40]}' is not: number class")
        names[int(words[0])] = words[1].strip()
    return names


def root_of(path: Path, first: str) -> Path:
    """The folder that a list's paths start from: its own, or one of those that archives put beside it."""
    places = [path.parent, path.parent.parent]
    places += [place / name for place in places for name in ("videos", "UCF-101", path.stem)]
    return next((place for place in places if (place / first).exists()), path.parent)


def open_table(path: Path, split: str) -> Videos:
    """Columns path (or video, file, filename) and label (or class, action), optionally split."""
    names, table = read_rows(path)
    header = {(name or "").strip().lower(): name for name in names}
    where = next((header[n] for n in ("path", "video", "file", "filename") if n in header), None)
    what = next((header[n] for n in ("label", "class", "action", "target") if n in header), None)
    if where is None or what is None:
        raise DataError(path, f"the columns path and label are needed; the header is {names}")
    rows = []
    for number, row in enumerate(table, 2):
        file, label = ((row[column] or "").strip() for column in (where, what))
        if not file or not label:
            raise DataError(path, f"line {number} has no path or no label")
        rows.append((file, label, (row.get(header.get("split", "")) or "").strip().lower()))
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
    root = root_of(path, kept[0][0])
    return Videos(labels, [labels.index(label) for _, label, _ in kept], [str(root / file) for file, *_ in kept])


# -- Kinetics --------------------------------------------------------------------------------------------------------------


def kinetics_lists(root: Path) -> dict[str, Path]:
    """The annotation files of a folder, by split: annotations/train.csv or train.csv, and so on."""
    found = {}
    for split in ("train", *HELD_OUT_NAMES):
        for place in (root / "annotations" / f"{split}.csv", root / f"{split}.csv"):
            if place.is_file() and "youtube_id" in first_line(place):
                found.setdefault(split, place)
    return found if "train" in found else {}


def open_kinetics(root: Path, split: str) -> Videos:
    """Kinetics' annotations with the videos that are there: <split>/<youtube_id>_<start>_<end>.mp4, flat or in class folders.

    Videos vanish from the Web, so those that are not there are left out, and their number is told.
    """
    files = kinetics_lists(root)
    # val before test: Kinetics' test labels are not what papers report
    wanted = (
        "train"
        if split == "train"
        else next((n for n in ("val", "validate", "validation", "test") if n in files), None)
    )
    if wanted is None:
        raise DataError(root, "no annotations/val.csv (or test.csv) beside train.csv")
    labels = sorted({label for label, *_ in kinetics_rows(files["train"])})
    places = {label: k for k, label in enumerate(labels)}
    folder = next((root / n for n in (wanted, f"{wanted}_256") if (root / n).is_dir()), root)
    there = {p.stem: p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()}
    paths, targets, missing = [], [], 0
    for label, name, start, end in kinetics_rows(files[wanted]):
        if label not in places:
            raise DataError(files[wanted], f"the class '{label}' does not occur in {files['train']}")
        file = there.get(f"{name}_{start:06d}_{end:06d}") or there.get(name)
        if file is None:
            missing += 1
            continue
        paths.append(str(file))
        targets.append(places[label])
    if not paths:
        raise DataError(
            folder, f"none of the {missing} videos of {files[wanted].name} is here, as <youtube_id>_<start>_<end>.mp4"
        )
    if missing:
        log.warning("%s: %d of %d videos are not there and are left out", folder, missing, missing + len(paths))
    return Videos(labels, targets, paths)


def kinetics_rows(path: Path) -> list[tuple[str, str, int, int]]:
    """(label, youtube_id, start, end) of every row that has a label."""
    names, table = read_rows(path)
    lacking = [n for n in ("label", "youtube_id", "time_start", "time_end") if n not in names]
    if lacking:
        raise DataError(
            path, f"the columns label, youtube_id, time_start, time_end are needed; there is no {lacking[0]}"
        )
    rows = []
    for number, row in enumerate(table, 2):
        try:
            times = [round(float(row[n])) for n in ("time_start", "time_end")]
        except (TypeError, ValueError):
            raise DataError(path, f"line {number}: time_start and time_end are seconds") from None
        rows.append((row["label"].strip(), row["youtube_id"].strip(), *times))
    return rows
