"""Text detection data: pictures with outlined texts, embedded or in the layouts of the field.

    open_text_regions("text_scenes", "train")       rendered words over photographs, always there
    open_text_regions("path/to/folder", "test")     the layout is recognised:
        ch4_training_images/img_1.jpg, ch4_training_localization_transcription_gt/gt_img_1.txt     ICDAR 2015
        ch8_training_images/…, ch8_training_localization_transcription_gt_v2/…                      ICDAR 2017 MLT
        Challenge2_Training_Task12_Images/…, Challenge2_Training_Task1_GT/…                         ICDAR 2013
        Images/Train/…, Groundtruth/Polygon/Train/poly_gt_….mat or .txt                             Total-Text
        train/text_image/…, train/text_label_curve/….txt; or train_images/…, ctw1500_train_labels/….xml   CTW1500
        train/IMG_0030.JPG, train/IMG_0030.gt                                                       MSRA-TD500
        cocotext.v2.json, train2014/…                                                               COCO-Text
        gt.mat and the folders that it names                                                        SynthText
    open_text_regions("texts.csv", "train")         columns image, polygon ("x1 y1 x2 y2 …"), text; optionally ignore, split
    open_text_regions("icdar2015", "train")         a folder of this name under $PAPERZOO_DATA or ~/.cache/paperzoo/data

An item is a dict:
    image     uint8 (3, H, W)
    polygons  list of float32 (N, 2), N >= 3: x and y in pixels, clockwise as one sees them; they may reach beyond the image
    ignore    bool (number of polygons,): illegible ("###") or marked difficult: not learned from, not counted
    texts     list of str, what each says; "" where nobody wrote it down
    id        int, the position in the data set
Outlines without an area, and those that lie wholly outside of the image, are dropped.
"""

from __future__ import annotations

import csv
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.blocks.polygons import tidy_polygon
from paperzoo.data import text_annotations as files
from paperzoo.data.coco import read_json
from paperzoo.data.images import HELD_OUT, SUFFIXES, data_folder, read_image
from paperzoo.data.rendered_text import SCENE, Style, scene_set
from paperzoo.data.text_annotations import Region
from paperzoo.errors import DataError, PaperZooError

SPLITS = ("train", "test")

# for each split: folders of images and of annotations, the annotation's name for an image's stem, its reader
LAYOUTS: dict[str, dict[str, list[tuple[str, str, str, Callable[[Path], list[Region]]]]]] = {
    "ICDAR 2015": {
        "train": [
            ("ch4_training_images", "ch4_training_localization_transcription_gt", "gt_{}.txt", files.icdar_lines)
        ],
        "test": [
            ("ch4_test_images", "Challenge4_Test_Task1_GT", "gt_{}.txt", files.icdar_lines),
            ("ch4_test_images", "ch4_test_localization_transcription_gt", "gt_{}.txt", files.icdar_lines),
        ],
    },
    "ICDAR 2017 MLT": {
        "train": [
            (
                "ch8_training_images",
                "ch8_training_localization_transcription_gt_v2",
                "gt_{}.txt",
                functools.partial(files.icdar_lines, script=True),
            )
        ],
        "test": [
            (
                "ch8_validation_images",
                "ch8_validation_localization_transcription_gt_v2",
                "gt_{}.txt",
                functools.partial(files.icdar_lines, script=True),
            )
        ],
    },
    "ICDAR 2013": {
        "train": [
            ("Challenge2_Training_Task12_Images", "Challenge2_Training_Task1_GT", "gt_{}.txt", files.icdar_boxes)
        ],
        "test": [("Challenge2_Test_Task12_Images", "Challenge2_Test_Task1_GT", "gt_{}.txt", files.icdar_boxes)],
    },
    "Total-Text": {
        split: [
            (f"Images/{part}", f"Groundtruth/Polygon/{part}", "poly_gt_{}.mat", files.total_text_arrays),
            (f"Images/{part}", f"Groundtruth/Polygon/{part}", "poly_gt_{}.txt", files.total_text_lines),
        ]
        for split, part in (("train", "Train"), ("test", "Test"))
    },
    "CTW1500": {
        "train": [
            ("train/text_image", "train/text_label_curve", "{}.txt", files.ctw_lines),
            ("train_images", "ctw1500_train_labels", "{}.xml", files.ctw_boxes),
        ],
        "test": [
            ("test/text_image", "test/text_label_circum", "{}.txt", files.ctw_lines),
            ("test/text_image", "test/text_label_curve", "{}.txt", files.ctw_lines),
            ("test_images", "gt_ctw1500", "{:0>7}.txt", files.ctw_lines),
        ],
    },
    "MSRA-TD500": {split: [(split, split, "{}.gt", files.td500_lines)] for split in SPLITS},
}


class OutlinedTexts(Dataset):
    """Pictures and where the texts in them are outlined; read when asked for. Items as the module's docstring says.

    Args:
        images: the picture files.
        read: for each the regions in it, by its position.
    """

    def __init__(self, images: Sequence[Path], read: Callable[[int], list[Region]]) -> None:
        self.images, self.read = list(images), read

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        regions = self.read(index)
        return item(read_image(self.images[index]), regions, index)

    def path(self, index: int) -> str:
        return str(self.images[index])


class Annotations:
    """For each picture a file of its own."""

    def __init__(self, paths: Sequence[Path], reader: Callable[[Path], list[Region]]) -> None:
        self.paths, self.reader = list(paths), reader

    def __call__(self, index: int) -> list[Region]:
        return self.reader(self.paths[index])


class Listed:
    """The regions of all pictures, in memory."""

    def __init__(self, regions: Sequence[list[Region]]) -> None:
        self.regions = list(regions)

    def __call__(self, index: int) -> list[Region]:
        return self.regions[index]


class TextScenes(Dataset):
    """`paperzoo.data.rendered_text.scene_set` as a data set; options as there, and fields of its `Style`."""

    def __init__(self, split: str, count: int = 512, size: int = 160, **options: Any) -> None:
        styled = {key: options.pop(key) for key in list(options) if key in Style.__dataclass_fields__}
        self.split, self.scenes = split, scene_set(count, split, size, style=replace(SCENE, **styled), **options)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        scene = self.scenes[index]
        return {key: scene[key] for key in ("image", "polygons", "ignore", "texts")} | {"id": index}

    def path(self, index: int) -> str:
        return f"{self.split} scene {index}"


def item(image: Tensor, regions: Sequence[Region], number: int) -> dict:
    """One sample in the common form."""
    size = np.array([image.shape[2], image.shape[1]])
    polygons, ignore, texts = [], [], []
    for points, text, ignored in regions:
        polygon = tidy_polygon(points)
        if polygon is None or (polygon.max(0) <= 0).any() or (polygon.min(0) >= size).any():
            continue
        polygons.append(torch.from_numpy(polygon))
        ignore.append(ignored)
        texts.append(text)
    return {
        "image": image,
        "polygons": polygons,
        "ignore": torch.tensor(ignore, dtype=torch.bool),
        "texts": texts,
        "id": number,
    }


# -- finding the files -------------------------------------------------------------------------------------------------


def open_text_regions(data: str | Path, split: str = "train", **options: Any) -> Dataset:
    """The pictures of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Args:
        options: of `TextScenes`, where that is the data.

    Raises:
        DataError: if the place is missing or its layout is not known.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    if str(data) == "text_scenes":
        return TextScenes(split, **options)
    root = Path(data).expanduser()
    if root.suffix.lower() == ".csv":
        return open_csv(root, split)
    if not root.is_dir() and len(root.parts) == 1:
        root = data_folder() / root
    if not root.is_dir():
        raise DataError(
            root, "no such folder; give text_scenes, a CSV file, or a folder in the layout of a text data set"
        )
    if (root / "gt.mat").is_file():
        return open_synth_text(root, split)
    coco = next(iter(sorted(root.glob("[cC][oO][cC][oO]*[tT]ext*.json"))), None)
    return open_coco_text(root, coco, split) if coco else open_folder(root, split)


def open_folder(root: Path, split: str) -> OutlinedTexts:
    """A folder with an annotation file for each picture."""
    for places in LAYOUTS.values():
        for images, beside, name, reader in places[split]:
            if not (root / images).is_dir() or not (root / beside).is_dir():
                continue
            pictures = sorted((p for p in (root / images).iterdir() if p.suffix.lower() in SUFFIXES), key=in_order)
            paths = [root / beside / name.format(p.stem) for p in pictures]
            there = [p.is_file() for p in paths]
            if not any(there):
                continue
            if not all(there):
                missing = there.index(False)
                raise DataError(paths[missing], f"no such file; {pictures[missing].name} has no annotation")
            return OutlinedTexts(pictures, Annotations(paths, reader))
    known = "; ".join(f"{name}: {places[split][0][0]}/ and {places[split][0][1]}/" for name, places in LAYOUTS.items())
    raise DataError(root, f"no pictures with annotations for the split '{split}'; known layouts: {known}")


def in_order(path: Path) -> tuple:
    """img_2 before img_10."""
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits) if digits else -1, path.name)


def open_csv(path: Path, split: str) -> OutlinedTexts:
    """Columns image (or path, file), polygon, text; optionally ignore (1 or true) and split. Pictures lie beside the file.

    A picture without text has a row with an empty polygon. Without a column split, one picture in five is for testing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = {(name or "").strip().lower(): name for name in reader.fieldnames or []}
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(path, f"not a readable CSV file ({error})") from None
    where = next((header[n] for n in ("image", "path", "file", "filename") if n in header), None)
    if where is None or "polygon" not in header:
        raise DataError(path, f"the columns image and polygon are needed; the header is {list(header)}")
    pictures: dict[str, list[Region]] = {}
    parts: dict[str, str] = {}
    for number, row in rows:
        name = (row[where] or "").strip()
        if not name:
            raise DataError(path, f"line {number} names no image")
        regions = pictures.setdefault(name, [])
        parts[name] = (row.get(header.get("split", "")) or "").strip().lower()
        outline = (row[header["polygon"]] or "").replace(",", " ").split()
        if outline:
            values = files.numbers_from(path, number, outline, "x1 y1 x2 y2 …")
            flag = (row.get(header.get("ignore", "")) or "").strip().lower()
            text = row.get(header.get("text", "")) or ""
            regions.append(files.region(path, f"line {number}", values, text, flag in ("1", "true", "yes") or None))
    chosen = [
        name
        for name in pictures
        if ((parts[name] != "train") if any(parts.values()) else zlib.crc32(name.encode()) % HELD_OUT == 0)
        == (split == "test")
    ]
    if not chosen:
        raise DataError(path, f"no rows for the split '{split}'")
    return OutlinedTexts([path.parent / name for name in chosen], Listed([pictures[name] for name in chosen]))


def open_coco_text(root: Path, file: Path, split: str) -> OutlinedTexts:
    """COCO-Text v2: one JSON file; the pictures are COCO's, in train2014/. Illegible texts are ignored."""
    content = read_json(file)
    for key in ("imgs", "anns"):
        if not isinstance(content.get(key), dict):
            raise DataError(file, f"has no object '{key}'; COCO-Text has imgs and anns")
    folder = root / "train2014" if (root / "train2014").is_dir() else root
    wanted = "train" if split == "train" else "val"
    names: dict[int, str] = {}
    for number, image in content["imgs"].items():
        if image.get("set", "train") == wanted:
            names[int(number)] = str(image.get("file_name", f"COCO_train2014_{int(number):012d}.jpg"))
    regions: dict[int, list[Region]] = {number: [] for number in names}
    for number, entry in content["anns"].items():
        try:
            owner, outline = int(entry["image_id"]), [float(v) for v in entry["mask"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(file, f"annotation {number}: image_id and mask are needed ({error!r})") from None
        if owner in regions:
            ignored = entry.get("legibility", "legible") != "legible"
            found = files.region(file, f"annotation {number}", outline, str(entry.get("utf8_string", "")), ignored)
            regions[owner].append(found)
    if not names:
        raise DataError(file, f"no pictures of the set '{wanted}'")
    return OutlinedTexts([folder / name for name in names.values()], Listed([regions[n] for n in names]))


def open_synth_text(root: Path, split: str) -> OutlinedTexts:
    """SynthText: gt.mat with imnames, wordBB (2, 4, words) and txt; one picture in a hundred is for testing."""
    from scipy.io import loadmat

    file = root / "gt.mat"
    try:
        content = loadmat(file, variable_names=("imnames", "wordBB", "txt"))
        names, boxes, texts = (content[key].ravel() for key in ("imnames", "wordBB", "txt"))
    except KeyError as error:
        raise DataError(file, f"has no {error}; SynthText's has imnames, wordBB and txt") from None
    except Exception as error:  # scipy raises whatever it likes on broken files
        raise DataError(file, f"is no Matlab file ({type(error).__name__}: {error})") from None
    rows = [i for i in range(len(names)) if (i % 100 == 99) == (split == "test")]
    pictures = [root / str(np.asarray(names[i]).ravel()[0]) for i in rows]
    return OutlinedTexts(pictures, SynthText(file, [boxes[i] for i in rows], [texts[i] for i in rows]))


class SynthText:
    """The words of SynthText's pictures."""

    def __init__(self, file: Path, boxes: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> None:
        self.file, self.boxes, self.texts = file, list(boxes), list(texts)

    def __call__(self, index: int) -> list[Region]:
        boxes = np.asarray(self.boxes[index], dtype=np.float64)
        boxes = boxes[..., None] if boxes.ndim == 2 else boxes  # one word: Matlab drops the last axis
        words = " ".join(str(line) for line in self.texts[index]).split()
        if boxes.shape[:2] != (2, 4) or boxes.shape[2] != len(words):
            raise DataError(
                self.file,
                f"entry {index + 1}: boxes of the shape {boxes.shape} for {len(words)} words; (2, 4, words) is right",
            )
        outlines = boxes.transpose(2, 1, 0).reshape(-1, 8).tolist()
        return [
            files.region(self.file, f"entry {index + 1}", o, w, False) for o, w in zip(outlines, words, strict=True)
        ]
