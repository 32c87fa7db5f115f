"""Detection data: COCO's annotation files, Pascal VOC's XML, YOLO's text files, and the embedded scenes.

    open_detection("digit_scenes", "train")      digits over photographs, always there
    open_detection("shape_scenes", "train")      circles, stars, … over photographs, with crowds and empty pictures
    open_detection("path/to/coco", "train")      annotations/instances_train2017.json and train2017/, or train/_annotations.coco.json
    open_detection("path/to/VOC2012", "test")    Annotations/*.xml, JPEGImages/ and ImageSets/Main/*.txt
    open_detection("path/to/data.yaml", "train") YOLO's text files, images/… beside labels/…; or the folder with data.yaml
    open_detection("coco", "train")              a folder of this name under $PAPERZOO_DATA or ~/.cache/paperzoo/data
    CocoDetection("boxes.json", "images/")       any other place

An item is a dict:
    image   uint8 (3, H, W)
    boxes   float32 (N, 4), x1 y1 x2 y2 in pixels, x2 and y2 exclusive, inside the image
    labels  int64 (N,), 0 … len(data.labels) - 1
    crowd   bool (N,): a region that is not one object (COCO's iscrowd, VOC's difficult): not learned from, ignored in evaluation
    area    float32 (N,): COCO's area (of the segment where there is one, which decides small, medium, large)
    id      int, the file's own number of the image (or its position)
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.scenes import LABELS, digit_scenes
from paperzoo.errors import DataError, PaperZooError

VOC_LABELS = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa "
    "train tvmonitor"
).split()
SPLITS = {"train": ("train",), "test": ("val", "valid", "validation", "test")}


class DetectionData(Dataset):
    """What the readers share: `labels`, `path(i)`, and items as the module's docstring says."""

    labels: list[str]

    def path(self, index: int) -> str:
        raise NotImplementedError(f"{type(self).__name__} does not say where its samples are")

    def item(self, image: Tensor, boxes: Any, labels: Any, crowd: Any, area: Any, number: int) -> dict:
        """One sample in the common form. Boxes are cut to the image; those without any area left are dropped."""
        boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32)).reshape(-1, 4)
        limit = torch.tensor([image.shape[2], image.shape[1]] * 2, dtype=torch.float32)
        boxes = boxes.clamp(min=0).minimum(limit)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return {
            "image": image,
            "boxes": boxes[kept],
            "labels": torch.as_tensor(np.asarray(labels, dtype=np.int64))[kept],
            "crowd": torch.as_tensor(np.asarray(crowd, dtype=bool))[kept],
            "area": torch.as_tensor(np.asarray(area, dtype=np.float32))[kept],
            "id": number,
        }


class DigitScenes(DetectionData):
    """`paperzoo.data.scenes.digit_scenes` as a data set."""

    def __init__(self, split: str, count: int = 512, size: int = 96, **options: Any) -> None:
        self.labels, self.split = LABELS, split
        self.scenes = digit_scenes(count, size, split=split, **options)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        scene = self.scenes[index]
        boxes = scene["boxes"]
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return self.item(scene["image"], boxes, scene["labels"], [False] * len(boxes), area, index)

    def path(self, index: int) -> str:
        return f"{self.split} scene {index}"


class CocoDetection(DetectionData):
    """A COCO annotation file and the folder that its `file_name`s start from.

    Category numbers become labels 0 … in the order of the numbers; `category_ids[label]` leads back, for submissions.
    Annotations are kept as arrays (COCO's 860,000 boxes take 30 MB), images are decoded when asked for.

    Raises:
        DataError: naming the file, and the annotation or image in it, if something does not fit. A picture that cannot be
            read, or has another size than the annotations say, raises when it is asked for.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.file, self.folder = Path(annotations), Path(images)
        content = read_json(self.file)
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise DataError(self.file, f"has no list '{key}'; a COCO file has images, annotations and categories")
        try:
            categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
            self.category_ids, self.labels = [i for i, _ in categories], [name for _, name in categories]
            self.ids = [int(i["id"]) for i in content["images"]]
            self.names = [str(i["file_name"]) for i in content["images"]]
            self.sizes = [(i.get("width"), i.get("height")) for i in content["images"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(self.file, f"an image needs id and file_name, a category id and name: {error!r}") from None
        for what, numbers in (("category", self.category_ids), ("image", self.ids)):
            if len(set(numbers)) < len(numbers):
                raise DataError(self.file, f"two {what} entries have the same id")
        if not self.ids:
            raise DataError(self.file, "lists no images")
        self._read_boxes(content["annotations"])

    def _read_boxes(self, annotations: Sequence[dict]) -> None:
        rows = {number: i for i, number in enumerate(self.ids)}
        labels = {number: i for i, number in enumerate(self.category_ids)}
        table = np.empty((len(annotations), 8), dtype=np.float64)  # image, label, crowd, area, x, y, width, height
        for i, a in enumerate(annotations):
            try:
                x, y, width, height = map(float, a["bbox"])
                area = float(a.get("area") or width * height)
                image, label = rows[int(a["image_id"])], labels[int(a["category_id"])]
                table[i] = (image, label, bool(a.get("iscrowd", 0)), area, x, y, width, height)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    self.file, f"annotation {_name(a, i)}: {self._problem(a, rows, labels, error)}"
                ) from None
        bad = ~np.isfinite(table).all(1) | (table[:, 6:] < 0).any(1)
        if bad.any():
            i = int(bad.argmax())
            raise DataError(
                self.file,
                f"annotation {_name(annotations[i], i)}: bbox {annotations[i]['bbox']} is no x, y, width, height",
            )
        table[:, 6:] += table[:, 4:6]
        table = table[np.argsort(table[:, 0], kind="stable")]
        self.first = np.searchsorted(table[:, 0], np.arange(len(self.ids) + 1))
        self.boxes, self.area = table[:, 4:].astype(np.float32), table[:, 3].astype(np.float32)
        self.targets, self.crowd = table[:, 1].astype(np.int64), table[:, 2].astype(bool)

    @staticmethod
    def _problem(annotation: Any, rows: dict, labels: dict, error: Exception) -> str:
        if not isinstance(annotation, dict):
            return f"is {annotation!r}, not an object"
        for key, known in (("image_id", rows), ("category_id", labels)):
            if key in annotation and str(annotation[key]) not in {str(number) for number in known}:
                return f"{key} {annotation[key]!r} is not among the file's entries"
        if isinstance(error, KeyError):
            return f"has no {error}"
        return f"bbox {annotation.get('bbox')} is no x, y, width, height"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        from paperzoo.data.images import read_image

        path = self.folder / self.names[index]
        image = read_image(path)
        width, height = self.sizes[index]
        if width and height and tuple(image.shape[1:]) != (height, width):
            found = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(
                path, f"is {found} pixels, but {self.file.name} says {width}x{height}: the boxes would not fit"
            )
        rows = slice(self.first[index], self.first[index + 1])
        return self.item(
            image, self.boxes[rows], self.targets[rows], self.crowd[rows], self.area[rows], self.ids[index]
        )

    def path(self, index: int) -> str:
        return str(self.folder / self.names[index])


class VocDetection(DetectionData):
    """Pascal VOC: one XML file an image. Objects marked "difficult" are `crowd`, which evaluation ignores.

    Pixels are counted from 1 in VOC and its upper corner is inclusive; here from 0 and exclusive.

    Args:
        root: the folder with Annotations/ and JPEGImages/.
        names: which images, by file name without suffix.
        labels: the class names; VOC's twenty unless others occur in the annotations.

    Raises:
        DataError: naming the XML or image file, when the sample is asked for.
    """

    def __init__(self, root: str | Path, names: Sequence[str], labels: Sequence[str] | None = None) -> None:
        self.root, self.names = Path(root), list(names)
        self.labels = list(labels) if labels is not None else voc_labels(self.root)
        if not self.names:
            raise DataError(root, "no images in this split")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        from paperzoo.data.images import read_image

        path = self.root / "Annotations" / f"{self.names[index]}.xml"
        boxes, labels, crowd = [], [], []
        tree = read_xml(path)
        for number, entry in enumerate(tree.iter("object"), 1):
            name, corners = (entry.findtext("name") or "").strip(), entry.find("bndbox")
            if name not in self.labels:
                raise DataError(
                    path, f"object {number} is called '{name}'; the classes are {', '.join(self.labels[:8])} …"
                )
            try:
                x1, y1, x2, y2 = (float(corners.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
            except (AttributeError, TypeError, ValueError):
                raise DataError(path, f"object {number} ({name}) has no bndbox with xmin, ymin, xmax, ymax") from None
            if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 < x1 or y2 < y1:
                raise DataError(
                    path, f"object {number} ({name}) spans from {x1:g}, {y1:g} to {x2:g}, {y2:g}: that is no box"
                )
            boxes.append((x1 - 1, y1 - 1, x2, y2))
            labels.append(self.labels.index(name))
            crowd.append((entry.findtext("difficult") or "0").strip() == "1")
        image = read_image(self.path(index))
        area = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]
        return self.item(image, boxes, labels, crowd, area, index)

    def path(self, index: int) -> str:
        name = self.names[index]
        found = (self.root / "JPEGImages" / f"{name}{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".JPG"))
        return str(next((p for p in found if p.exists()), self.root / "JPEGImages" / f"{name}.jpg"))


@functools.cache
def voc_labels(root: Path) -> list[str]:
    """VOC's twenty classes, or the names that occur in this folder's annotations, sorted, if there are others.

    Files that cannot be read are passed over here; they raise when their sample is asked for.
    """
    found = set()
    for path in sorted((root / "Annotations").glob("*.xml")):
        try:
            found |= {(entry.findtext("name") or "").strip() for entry in read_xml(path).iter("object")}
        except DataError:
            continue
    found.discard("")
    return VOC_LABELS if found <= set(VOC_LABELS) else sorted(found)


# -- finding the files -------------------------------------------------------------------------------------------------


def open_detection(data: str | Path, split: str = "train", **options: Any) -> DetectionData:
    """The detection data of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Args:
        options: of `digit_scenes` or `shape_scenes`, where that is the data.

    Raises:
        DataError: if the place is missing or its layout is not known.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    if str(data) == "digit_scenes":
        return DigitScenes(split, **options)
    if str(data) == "shape_scenes":
        from paperzoo.data.shape_scenes import ShapeScenes

        return ShapeScenes(split, **options)
    from paperzoo.data.images import data_folder

    root = Path(data).expanduser()
    if not root.exists() and len(root.parts) == 1:
        root = data_folder() / root
    files = [root] if root.suffix.lower() in (".yaml", ".yml") else [root / name for name in ("data.yaml", "data.yml")]
    file = next((f for f in files if f.is_file()), None)
    if file is not None:
        from paperzoo.data.yolo_text import open_yolo

        return open_yolo(file, split)
    if not root.is_dir():
        known = "digit_scenes, shape_scenes, or a folder in COCO's, Pascal VOC's or YOLO's (data.yaml) layout"
        raise DataError(root, f"no such folder; give {known}")
    if (root / "Annotations").is_dir():
        return open_voc(root, split)
    return open_coco(root, split)


def open_coco(root: Path, split: str) -> CocoDetection:
    """annotations/instances_<split>*.json with <split>*/ or images/<split>*/; or <split>/_annotations.coco.json."""
    for name in SPLITS[split]:
        if (root / name / "_annotations.coco.json").is_file():
            return CocoDetection(root / name / "_annotations.coco.json", root / name)
        files = [
            f for pattern in ("instances_", "") for f in sorted((root / "annotations").glob(f"{pattern}{name}*.json"))
        ]
        for file in files[:1]:
            places = [file.stem.removeprefix("instances_"), name]
            folders = [base / place for place in places for base in (root, root / "images")] + [root / "images"]
            folder = next((f for f in folders if f.is_dir()), None)
            if folder is None:
                raise DataError(
                    file, f"no folder with its images; looked for {', '.join(str(f) for f in folders[:2])} …"
                )
            return CocoDetection(file, folder)
    looked = " or ".join(f"annotations/instances_{name}*.json" for name in SPLITS[split][:2])
    looked += f", {SPLITS[split][0]}/_annotations.coco.json, Annotations/*.xml (Pascal VOC), data.yaml (YOLO)"
    raise DataError(root, f"no annotations for the split '{split}'; looked for {looked}")


def open_voc(root: Path, split: str) -> VocDetection:
    """ImageSets/Main/trainval.txt or train.txt to learn from, test.txt or val.txt to test; without lists, every fifth tests."""
    lists = root / "ImageSets" / "Main"
    # the 2012 folder has no public test annotations: there, train.txt and val.txt
    pairs = [("trainval", "test"), ("train", "val"), ("train", "test")]
    for pair in pairs:
        if all((lists / f"{name}.txt").is_file() for name in pair):
            file = lists / f"{pair[split == 'test']}.txt"
            names = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            return VocDetection(root, names)
    names = sorted(p.stem for p in (root / "Annotations").glob("*.xml"))
    return VocDetection(root, [n for i, n in enumerate(names) if (i % 5 == 4) == (split == "test")])


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        DataError: if the file is missing, is no JSON (naming line and column), or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(path, f"is no JSON file{where}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(path, f"holds a {type(content).__name__}; a COCO file is an object")
    return content


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        DataError: if the file is missing or is no XML.
    """
    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise DataError(path, f"is no XML file: {error}") from None


def _name(annotation: Any, position: int) -> str:
    return str(annotation["id"]) if isinstance(annotation, dict) and "id" in annotation else f"number {position + 1}"
