"""Instance masks: COCO's annotation files with polygons or run lengths, and the embedded scenes with exact masks.

    open_instances("digit_scenes", "train")     digits over photographs, always there
    open_instances("shape_scenes", "train")     circles, stars, … over photographs, with crowds and empty pictures
    open_instances("path/to/coco", "train")     annotations/instances_train2017.json and train2017/, or train/_annotations.coco.json
    open_instances("coco", "train")             a folder of this name under $PAPERZOO_DATA or ~/.cache/paperzoo/data
    CocoInstances("masks.json", "images/")      any other place

An item is one of `paperzoo.data.coco` with
    masks   bool (N, H, W), the pixels of each object; none where a polygon is smaller than a pixel
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperzoo.data.coco import SPLITS, CocoDetection, DetectionData, open_coco
from paperzoo.data.scenes import LABELS, digit_scenes
from paperzoo.errors import DataError, MissingExtra, PaperZooError

FARTHEST = 1e5  # pixels; a corner beyond that belongs to no picture


class SceneInstances(DetectionData):
    """The embedded scenes with their masks.

    Args:
        kind: "digit_scenes" or "shape_scenes".
        split: "train" or "test".
        count, size, options: of `digit_scenes` and `shape_scenes`.
    """

    def __init__(self, kind: str, split: str, count: int = 512, size: int = 96, **options: Any) -> None:
        from paperzoo.data import shape_scenes

        digits = kind == "digit_scenes"
        self.labels, self.split = LABELS if digits else shape_scenes.LABELS, split
        make = digit_scenes if digits else shape_scenes.shape_scenes
        self.scenes = make(count, size, split=split, **options)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        scene = self.scenes[index]
        masks = scene["masks"]
        crowd = scene.get("crowd", torch.zeros(len(masks), dtype=torch.bool))
        item = self.item(scene["image"], scene["boxes"], scene["labels"], crowd, masks.flatten(1).sum(1), index)
        return item | {"masks": masks}

    def path(self, index: int) -> str:
        return f"{self.split} scene {index}"


class CocoInstances(CocoDetection):
    """A COCO annotation file with its segmentations: polygons, run lengths as numbers, or as COCO's compressed text.

    Polygons become pixels as pycocotools draws them. Corners are kept as arrays (COCO's take 300 MB).

    Raises:
        DataError: as `CocoDetection`; and naming the annotation that has no segmentation, or one that cannot be read, or
            run lengths of another picture size.
    """

    def _read_boxes(self, annotations: Sequence[dict]) -> None:
        super()._read_boxes(annotations)
        rows = {number: i for i, number in enumerate(self.ids)}
        order = np.argsort([rows[int(a["image_id"])] for a in annotations], kind="stable")  # as the boxes are kept
        self.numbers = [_name(annotations[i], i) for i in order]
        self.segments = [self._segment(annotations[i], i) for i in order]

    def _segment(self, annotation: dict, position: int) -> list[np.ndarray] | dict[str, Any]:
        """Polygons as float64 arrays x0 y0 x1 y1 …, or run lengths as the file has them."""
        stored, name = annotation.get("segmentation"), _name(annotation, position)
        if isinstance(stored, dict):
            return stored  # read when asked for: a set may have millions
        if not isinstance(stored, list) or not stored:
            raise DataError(
                self.file, f"annotation {name} has no segmentation; polygons or run lengths are needed for masks"
            )
        try:
            polygons = [np.asarray(piece, dtype=np.float64) for piece in stored]
        except (TypeError, ValueError):
            polygons = []
        good = [p.ndim == 1 and len(p) % 2 == 0 and bool((np.abs(p) < FARTHEST).all()) for p in polygons]
        if not good or not all(good):
            raise DataError(
                self.file,
                f"annotation {name}: its segmentation is no list of polygons, each x0, y0, x1, y1, … in pixels",
            )
        return [p for p in polygons if len(p) >= 6]  # two corners have no area

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        height, width = item["image"].shape[1:]
        rows = range(self.first[index], self.first[index + 1])
        boxes = self.boxes[self.first[index] : self.first[index + 1]].clip(0, [width, height, width, height])
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)  # as `item` keeps them
        masks = [self._mask(row, height, width) for row, k in zip(rows, kept, strict=True) if k]
        return item | {"masks": torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)}

    def _mask(self, row: int, height: int, width: int) -> Tensor:
        segment = self.segments[row]
        if isinstance(segment, list):
            return torch.from_numpy(draw_polygons(segment, height, width))
        try:
            size, counts = tuple(map(int, segment["size"])), segment["counts"]
            counts = read_counts(counts) if isinstance(counts, str) else np.array(counts, dtype=np.int64)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"no run lengths with size and counts: {error}"
        else:
            if counts.ndim == 1 and (counts >= 0).all() and counts.sum() == height * width and size == (height, width):
                return torch.from_numpy(from_counts(counts, height, width))
            problem = f"the run lengths are not those of a picture of {width} x {height} pixels"
        raise DataError(self.file, f"annotation {self.numbers[row]}: {problem}")


def draw_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """The pixels inside any of the polygons, each x0 y0 x1 y1 … with three corners or more, as COCO draws them: bool (H, W)."""
    if not len(polygons):
        return np.zeros((height, width), dtype=bool)
    try:
        from pycocotools import mask
    except ImportError:
        raise MissingExtra("pycocotools", "detection", "drawing COCO's polygons") from None
    drawn = mask.merge(mask.frPyObjects([p.tolist() for p in polygons], height, width))
    return mask.decode(drawn).astype(bool)


def from_counts(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Run lengths, of zeros first, down each column from the left: bool (H, W)."""
    values = np.arange(len(counts)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, counts).reshape(width, height).T)


def read_counts(text: str) -> np.ndarray:
    """COCO's compressed run lengths, as int64 numbers.

    Each character holds five bits, the sixth says whether more follow, lowest first; from the fourth number on the difference
    to the one two before is stored.

    Raises:
        ValueError: if the text is cut off or has other characters.
    """
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any() or (len(codes) and codes[-1] & 32):
        raise ValueError("compressed run lengths are cut off, or no such text")
    counts: list[int] = []
    value, shift = 0, 0
    for code in codes.tolist():
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # a negative number
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    return np.array(counts, dtype=np.int64)


def open_instances(data: str | Path, split: str = "train", **options: Any) -> DetectionData:
    """The instance masks of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Args:
        options: of `digit_scenes` or `shape_scenes`, where that is the data.

    Raises:
        DataError: if the place is missing or its layout is not known.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    if str(data) in ("digit_scenes", "shape_scenes"):
        return SceneInstances(str(data), split, **options)
    from paperzoo.data.images import data_folder

    root = Path(data).expanduser()
    if not root.exists() and len(root.parts) == 1:
        root = data_folder() / root
    if not root.is_dir():
        raise DataError(root, "no such folder; give digit_scenes, shape_scenes, or a folder in COCO's layout")
    boxes = open_coco(root, split)
    return CocoInstances(boxes.file, boxes.folder)


def _name(annotation: dict, position: int) -> str:
    return str(annotation.get("id", f"number {position + 1}"))
