"""YOLO's text files: one `.txt` beside each image, one object a line, and a `data.yaml` that says where they are.

    data.yaml      path: .              # where the places below start; the file's own folder if it is left out
                   train: images/train  # a folder, a .txt list of images, or a list of those
                   val: images/val      # or valid, validation, test
                   names: [dog, cup]    # or {0: dog, 1: cup}
    images/train/a.jpg
    labels/train/a.txt                  # the image's path with its last "images" as "labels"; no such file: no objects

A line is `class cx cy w h`, or a polygon `class x1 y1 x2 y2 x3 y3 …` of which the box is taken. Everything but the class is a
part of the image's width or height.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paperzoo.data.coco import SPLITS, DetectionData
from paperzoo.errors import DataError, MissingExtra

SLACK = 0.01  # so far outside of 0 … 1 a number may lie: annotation tools round


class YoloText(DetectionData):
    """Images with YOLO's text files.

    Args:
        images: the image files.
        labels: the class names, in the order of their numbers.

    Raises:
        DataError: if none of the images has a text file. A wrong line raises when its sample is asked for, naming file and line.
    """

    def __init__(self, images: Sequence[Path], labels: Sequence[str]) -> None:
        self.images, self.labels = list(images), list(labels)
        if not any(label_file(image).is_file() for image in self.images):
            raise DataError(
                self.images[0], f"no image has a text file of objects; this one's would be {label_file(self.images[0])}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        from paperzoo.data.images import read_image

        boxes, labels, area = read_objects(label_file(self.images[index]), self.labels)
        image = read_image(self.images[index])
        height, width = image.shape[1:]
        boxes, area = boxes * np.array([width, height, width, height]), area * width * height
        return self.item(image, boxes, labels, np.zeros(len(labels), dtype=bool), area, index)

    def path(self, index: int) -> str:
        return str(self.images[index])


def label_file(image: Path) -> Path:
    """Where an image's objects stand: the last folder called "images" becomes "labels"; without one, beside the image."""
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_objects(path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The objects of one text file, in parts of the image: boxes (N, 4) as x1 y1 x2 y2, class numbers (N,), areas (N,).

    An area is the polygon's where there is one, as COCO counts it. A missing file has no objects.

    Raises:
        DataError: naming the line, if it is neither a box nor a polygon.
    """
    boxes, labels, areas = [], [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be read as text ({error})") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        label, values = read_line(path, number, line.split(), names)
        if len(values) == 4:
            (x, y), (width, height) = values[:2], values[2:]
            boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
            areas.append(width * height)
        else:
            x, y = values[0::2], values[1::2]
            boxes.append((x.min(), y.min(), x.max(), y.max()))
            areas.append(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)  # the shoelace formula
        labels.append(label)
    return (
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(areas, dtype=np.float64),
    )


def read_line(path: Path, number: int, words: list[str], names: Sequence[str]) -> tuple[int, np.ndarray]:
    """One line as its class and its numbers: four of a box, or an even number of at least six of a polygon."""

    def wrong(problem: str) -> DataError:
        return DataError(path, f"line {number}: {problem}")

    try:
        values = np.array([float(word) for word in words])
    except ValueError:
        raise wrong(f"'{' '.join(words)[:60]}' is not all numbers; it should be class cx cy w h") from None
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        raise wrong(f"{len(values)} numbers; a box has 5 (class cx cy w h), a polygon 7, 9, 11 … (class x y x y x y …)")
    if not np.isfinite(values).all():
        raise wrong("a number is not finite")
    label = int(values[0])
    if label != values[0] or not 0 <= label < len(names):
        raise wrong(f"class {words[0]}; the {len(names)} classes have the numbers 0 … {len(names) - 1}")
    if values[1:].min() < -SLACK or values[1:].max() > 1 + SLACK:
        raise wrong(
            f"'{' '.join(words)[:60]}' leaves 0 … 1; positions and sizes are parts of the image's width and height"
        )
    return label, values[1:]


# -- data.yaml ---------------------------------------------------------------------------------------------------------


def open_yolo(file: Path, split: str) -> YoloText:
    """The split "train" or "test" of a `data.yaml`.

    Raises:
        DataError: naming what is missing or wrong in it.
        MissingExtra: without PyYAML.
    """
    content = read_yaml(file)
    labels = class_names(file, content)
    keys = [name for name in SPLITS[split] if content.get(name)]
    if not keys:
        raise DataError(file, f"no entry for the split '{split}'; looked for {', '.join(SPLITS[split])}")
    value = content[keys[0]]
    root = file.parent / str(content.get("path") or ".")
    if not root.is_dir():  # these files often name a folder of the machine that they were made on
        root = file.parent
    images: list[Path] = []
    for place in value if isinstance(value, list) else [value]:
        images += images_at(file, root, str(place), keys[0])
    if not images:
        raise DataError(file, f"{keys[0]}: no images in {value}")
    return YoloText(images, labels)


def images_at(file: Path, root: Path, place: str, key: str) -> list[Path]:
    """The images in a folder and its folders, or in a .txt list, sorted or in the list's order."""
    from paperzoo.data.images import SUFFIXES

    # exports often write ../train/images for a folder beside data.yaml
    found = next((p for p in (root / place, root / place.removeprefix("../")) if p.exists()), None)
    if found is None:
        raise DataError(file, f"{key}: {root / place} does not exist")
    if found.is_dir():
        return sorted(p for p in found.rglob("*") if p.suffix.lower() in SUFFIXES)
    if found.suffix.lower() != ".txt":
        raise DataError(file, f"{key}: {found} is neither a folder nor a .txt list of images")
    lines = [line.strip() for line in found.read_text(encoding="utf-8-sig").splitlines()]
    return [found.parent / line for line in lines if line]


def class_names(file: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(file, f"names has the numbers {list(names)[:6]}; they count from 0 without a gap")
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(file, "has no 'names'; it lists the classes: [dog, cup], or {0: dog, 1: cup}")
    if content.get("nc", len(names)) != len(names):
        raise DataError(file, f"nc is {content['nc']}, but there are {len(names)} names")
    return [str(name) for name in names]


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping from a YAML file.

    Raises:
        DataError: if it cannot be read, naming the line where there is one.
        MissingExtra: without PyYAML.
    """
    try:
        import yaml
    except ImportError:
        raise MissingExtra("pyyaml", "detection", f"reading {file.name}") from None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(file, f"cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise DataError(file, f"is no YAML file{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise DataError(file, "holds no mapping; it should have train, val and names")
    return content
