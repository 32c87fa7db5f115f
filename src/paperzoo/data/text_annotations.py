"""The files in which text in pictures is annotated: a path to what it says, line by line.

    icdar_lines        x1,y1,…,x4,y4,text            ICDAR 2015; with `script` as well: …,x4,y4,script,text  ICDAR 2017 MLT
    icdar_boxes        x1, y1, x2, y2, "text"        ICDAR 2013, with commas or spaces
    ctw_lines          32 numbers: a box and 14 points relative to its corner (CTW1500, 2017); or x1,y1,…,x14,y14,####text
    ctw_boxes          CTW1500's XML: <box …><label>text</label><segs>x1,y1,…</segs></box>
    total_text_lines   x: [[…]], y: [[…]], ornt: [u'c'], transcriptions: [u'text']
    total_text_arrays  Total-Text's Matlab files
    td500_lines        index difficult x y w h angle: MSRA-TD500's turned boxes

Each gives a list of `Region`s as the file has them: nothing is dropped, turned or cut yet. Every number must be finite and
every outline have three points or more; else a DataError names the file and the line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paperzoo.data.coco import read_xml
from paperzoo.errors import DataError

UNREADABLE = ("###", "#")
"""Texts that say: not to be read, and not to be counted."""


class Region(NamedTuple):
    """One annotated text: outline float64 (N, 2), x and y in pixels; what it says; whether it is not to be counted."""

    polygon: np.ndarray
    text: str
    ignore: bool


def region(path: Path, where: str, numbers: Sequence[float], text: str, ignore: bool | None = None) -> Region:
    """A region from x1 y1 x2 y2 …

    Raises:
        DataError: if that is no outline.
    """
    if len(numbers) % 2 or len(numbers) < 6:
        raise DataError(path, f"{where}: {len(numbers)} coordinates; an outline has x and y of three points or more")
    if not all(map(math.isfinite, numbers)):
        raise DataError(path, f"{where}: a coordinate is not a finite number")
    text = text.strip()
    return Region(
        np.array(numbers, dtype=np.float64).reshape(-1, 2), text, text in UNREADABLE if ignore is None else ignore
    )


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers; a byte-order mark is passed over.

    Raises:
        DataError: if the file is missing or no UTF-8.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(path, f"is no UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip("\ufeff \t"):
            yield number, line.strip("\ufeff \t")


def numbers_from(path: Path, number: int, parts: Sequence[str], wanted: str) -> list[float]:
    try:
        return [float(part) for part in parts]
    except ValueError:
        bad = next(part for part in parts if not _is_number(part))
        raise DataError(path, f"line {number}: '{bad.strip()}' is not a number; a line is {wanted}") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def icdar_lines(path: Path, script: bool = False) -> list[Region]:
    """ICDAR 2015, and with `script` ICDAR 2017 MLT, whose lines name a script before the text."""
    wanted = "x1,y1,x2,y2,x3,y3,x4,y4," + ("script,text" if script else "text")
    found = []
    for number, line in lines_of(path):
        parts = line.split(",", 9 if script else 8)
        if len(parts) < (10 if script else 9):
            raise DataError(path, f"line {number}: {len(parts)} fields; a line is {wanted}")
        found.append(region(path, f"line {number}", numbers_from(path, number, parts[:8], wanted), parts[-1]))
    return found


def icdar_boxes(path: Path) -> list[Region]:
    """ICDAR 2013: upright boxes."""
    found = []
    for number, line in lines_of(path):
        parts = re.split(r"\s*,\s*|\s+", line, maxsplit=4)
        if len(parts) < 5:
            raise DataError(path, f'line {number}: {len(parts)} fields; a line is x1, y1, x2, y2, "text"')
        x1, y1, x2, y2 = numbers_from(path, number, parts[:4], 'x1, y1, x2, y2, "text"')
        found.append(region(path, f"line {number}", (x1, y1, x2, y1, x2, y2, x1, y2), parts[4].strip().strip('"')))
    return found


def ctw_lines(path: Path) -> list[Region]:
    """CTW1500's text files, both kinds."""
    found = []
    for number, line in lines_of(path):
        numbers, mark, text = line.partition(",####")
        values = numbers_from(path, number, numbers.split(","), "32 numbers, or x1,y1,…,x14,y14,####text")
        if not mark:
            if len(values) != 32:
                raise DataError(
                    path, f"line {number}: {len(values)} numbers; a line is 32, or x1,y1,…,x14,y14,####text"
                )
            values = [v + values[i % 2] for i, v in enumerate(values[4:])]
        found.append(region(path, f"line {number}", values, text))
    return found


def ctw_boxes(path: Path) -> list[Region]:
    """CTW1500's XML files."""
    found = []
    for number, box in enumerate(read_xml(path).iter("box"), 1):
        segments = (box.findtext("segs") or "").strip(" ,\n")
        try:
            values = [float(part) for part in segments.split(",")]
        except ValueError:
            raise DataError(path, f"box {number}: segs is '{segments[:40]}'; it is x1,y1,x2,y2,…") from None
        found.append(region(path, f"box {number}", values, box.findtext("label") or ""))
    return found


def total_text_lines(path: Path) -> list[Region]:
    """Total-Text's text files; an entry may run over several lines."""
    found: list[Region] = []
    entry, first = "", 1
    for number, line in lines_of(path):
        if line.startswith("x:") and entry:
            found.append(_total_text_entry(path, first, entry))
            entry = ""
        first = first if entry else number
        entry = f"{entry} {line}"
    return [*found, _total_text_entry(path, first, entry)] if entry else found


def _total_text_entry(path: Path, number: int, entry: str) -> Region:
    match = re.match(r"\s*x:\s*\[\[([^\]]*)\]\]\s*,\s*y:\s*\[\[([^\]]*)\]\]\s*,(.*)$", entry, re.DOTALL)
    wanted = "x: [[…]], y: [[…]], ornt: [u'…'], transcriptions: [u'…']"
    if match is None:
        raise DataError(path, f"line {number}: not of the form {wanted}")
    x, y = (numbers_from(path, number, part.replace(",", " ").split(), wanted) for part in match.groups()[:2])
    if len(x) != len(y):
        raise DataError(path, f"line {number}: {len(x)} x and {len(y)} y")
    text = re.search(r"transcriptions:\s*\[u?(['\"])(.*)\1\]", match[3], re.DOTALL)
    values = [v for point in zip(x, y, strict=True) for v in point]
    return region(path, f"line {number}", values, text[2] if text else "")


def total_text_arrays(path: Path) -> list[Region]:
    """Total-Text's Matlab files: rows of 'x:', xs, 'y:', ys, text, orientation."""
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except Exception as error:  # scipy raises whatever it likes on broken files
        raise DataError(path, f"is no Matlab file ({type(error).__name__}: {error})") from None
    rows = next((content[key] for key in ("polygt", "gt") if key in content), None)
    if rows is None:
        raise DataError(path, "has neither 'polygt' nor 'gt'")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            x, y = (np.asarray(row[i], dtype=np.float64).ravel() for i in (1, 3))
            points = np.stack([x, y], -1)
            text = str(np.asarray(row[4]).ravel()[0]) if np.asarray(row[4]).size else ""
        except (IndexError, TypeError, ValueError) as error:
            raise DataError(path, f"row {number}: not 'x:', xs, 'y:', ys, text ({error})") from None
        if len(points) < 3:  # a few entries of the published files are a single point, marked '#'
            if text in UNREADABLE:
                continue
            raise DataError(path, f"row {number}: an outline of {len(points)} points")
        found.append(region(path, f"row {number}", points.ravel().tolist(), text))
    return found


def td500_lines(path: Path) -> list[Region]:
    """MSRA-TD500: upper left corner and size of a box, turned about its middle by an angle in radians; difficult ones are ignored."""
    wanted = "index difficult x y w h angle"
    found = []
    for number, line in lines_of(path):
        values = numbers_from(path, number, line.split(), wanted)
        if len(values) != 7:
            raise DataError(path, f"line {number}: {len(values)} numbers; a line is {wanted}")
        _, difficult, x, y, w, h, angle = values
        cos, sin = math.cos(angle), math.sin(angle)
        corners = [(-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2)]
        points = [v for a, b in corners for v in (x + w / 2 + cos * a - sin * b, y + h / 2 + sin * a + cos * b)]
        found.append(region(path, f"line {number}", points, "", difficult == 1))
    return found
