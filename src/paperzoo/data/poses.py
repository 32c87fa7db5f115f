"""People with keypoints: COCO's and MPII's annotation files, and the embedded stick figures.

    open_poses("stick_figures", "train")       one figure in a picture, always there
    open_poses("stick_crowds", "train")        one to four, who hide each other
    open_poses("path/to/coco", "train")        annotations/person_keypoints_train2017.json and train2017/ (or images/train2017/)
    open_poses("path/to/mpii", "test")         annot/train.json, annot/valid.json and images/; or mpii_human_pose_v1_u12_1.mat
    open_poses("coco", "train")                a folder of this name under $PAPERZOO_DATA or ~/.cache/paperzoo/data
    CocoPoses("people.json", "images/")        any other place

`data.skeleton` says which keypoints there are. `data.people` is a table of all people, `data[i]` an image with its own:
    image      uint8 (3, H, W)
    keypoints  float32 (N, K, 2), x and y in pixels; the middle of the first pixel is (0, 0), as in COCO
    visible    int64 (N, K): 2 seen, 1 annotated though hidden, 0 not annotated
    boxes      float32 (N, 4), x1 y1 x2 y2, x2 and y2 exclusive; MPII's are squares that may reach beyond the image
    area       float32 (N,): of the body, for OKS
    head_size  float32 (N,): for PCKh; nan where it is not known
    crowd      bool (N,): a region that is not one person (COCO's iscrowd)
    mask       bool (H, W): False where there are people without keypoints, of whom nothing is to be learned
    id         int, the file's own number of the image (or its position)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.coco import SPLITS, read_json
from paperzoo.data.skeletons import CROWDPOSE, Skeleton, skeleton_of
from paperzoo.errors import DataError, MissingExtra, PaperZooError

BODY = 0.53
"""Where a person's area is missing: this part of the box, the usual share of a body in COCO."""


@dataclass(frozen=True)
class People:
    """All annotated people of a data set, one row each, sorted by image; the columns are as in an item."""

    image: Tensor  # int64 (M,): the position of the image
    keypoints: Tensor
    visible: Tensor
    boxes: Tensor
    area: Tensor
    head_size: Tensor
    crowd: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def learnable(self) -> Tensor:
        """int64: the rows that are one person with at least one keypoint, a body and a box with some area."""
        size = self.boxes[:, 2:] - self.boxes[:, :2]
        return (~self.crowd & (self.visible > 0).any(1) & (self.area > 0) & (size > 0).all(1)).nonzero()[:, 0]


def people(rows: Sequence[dict[str, Any]], joints: int) -> People:
    """A table from one dict a person: image, keypoints (K, 2), visible (K,), box, area, and maybe head_size and crowd."""
    order = sorted(range(len(rows)), key=lambda i: rows[i]["image"])
    column = lambda key, shape, dtype, default=None: torch.from_numpy(  # noqa: E731
        np.asarray([rows[i].get(key, default) for i in order], dtype=dtype).reshape(len(rows), *shape)
    )
    visible = column("visible", (joints,), np.int64)
    return People(
        column("image", (), np.int64),
        column("keypoints", (joints, 2), np.float32) * (visible > 0)[..., None],
        visible,
        column("box", (4,), np.float32),
        column("area", (), np.float32),
        column("head_size", (), np.float32, np.nan),
        column("crowd", (), bool, False),
    )


class PoseData(Dataset):
    """What the readers share; a reader sets these, and says where an image is."""

    skeleton: Skeleton
    people: People
    ids: list[int]

    def path(self, index: int) -> str:
        raise NotImplementedError(f"{type(self).__name__} does not say where its images are")

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W)."""
        from paperzoo.data.images import read_image

        return read_image(self.path(index))

    def rows(self, index: int) -> slice:
        """Which rows of `people` are in an image."""
        first, last = (int(torch.searchsorted(self.people.image, torch.tensor(index), right=r)) for r in (False, True))
        return slice(first, last)

    def hidden(self, row: int, height: int, width: int) -> Tensor:
        """bool (height, width): where a person without keypoints is; here the whole box."""
        x1, y1, x2, y2 = self.people.boxes[row].tolist()
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[max(0, int(y1)) : max(0, -int(-y2 // 1)), max(0, int(x1)) : max(0, -int(-x2 // 1))] = True
        return mask

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        image, rows = self.image(index), self.rows(index)
        mask = torch.ones(image.shape[1:], dtype=torch.bool)
        for row in range(rows.start, rows.stop):
            if not bool((self.people.visible[row] > 0).any()):
                mask &= ~self.hidden(row, *image.shape[1:])
        names = ("keypoints", "visible", "boxes", "area", "head_size", "crowd")
        item = {name: getattr(self.people, name)[rows] for name in names}
        return {"image": image, **item, "mask": mask, "id": self.ids[index]}


class StickFigures(PoseData):
    """`paperzoo.data.stick_figures.stick_figures` as a data set."""

    def __init__(self, split: str, count: int = 512, size: int = 96, **options: Any) -> None:
        from paperzoo.data.stick_figures import stick_figures

        self.skeleton, self.split = CROWDPOSE, split
        self.scenes = stick_figures(count, size, split=split, **options)
        self.ids = list(range(len(self.scenes)))
        joined = lambda key: torch.cat([s[key] for s in self.scenes])  # noqa: E731
        counts = torch.tensor([len(s["area"]) for s in self.scenes])
        image = torch.repeat_interleave(torch.arange(len(self.scenes)), counts)
        columns = [joined(key) for key in ("keypoints", "visible", "boxes", "area", "head_size")]
        self.people = People(image, *columns, torch.zeros(len(image), dtype=torch.bool))

    def path(self, index: int) -> str:
        return f"{self.split} scene {index}"

    def image(self, index: int) -> Tensor:
        return self.scenes[index]["image"]


class CocoPoses(PoseData):
    """A COCO keypoint file and the folder that its `file_name`s start from. The first category with keypoints counts.

    Crowds and people with num_keypoints 0 are kept as regions to leave out (by their segment, where there is one).

    Raises:
        DataError: naming the file and the annotation or image in it, if something does not fit. A picture that cannot be
            read, or has another size than the annotations say, raises when it is asked for.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.file, self.folder = Path(annotations), Path(images)
        content = read_json(self.file)
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise DataError(self.file, f"has no list '{key}'; a COCO file has images, annotations and categories")
        category = next((c for c in content["categories"] if isinstance(c, dict) and c.get("keypoints")), None)
        if category is None:
            raise DataError(self.file, "no category has 'keypoints', their names; person_keypoints_*.json is needed")
        pairs = [(int(a) - 1, int(b) - 1) for a, b in category.get("skeleton") or ()]
        self.skeleton = skeleton_of(category["keypoints"], pairs)
        try:
            self.ids = [int(i["id"]) for i in content["images"]]
            self.names = [str(i["file_name"]) for i in content["images"]]
            self.sizes = [(i.get("width"), i.get("height")) for i in content["images"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(self.file, f"an image needs id and file_name: {error!r}") from None
        if not self.ids:
            raise DataError(self.file, "lists no images")
        position = {number: i for i, number in enumerate(self.ids)}
        rows, segments = [], []
        for i, a in enumerate(content["annotations"]):
            if isinstance(a, dict) and a.get("category_id") != category["id"]:
                continue
            row = self._row(a, i, position)
            rows.append(row)
            bare = not any(row["visible"])
            segments.append((row["image"], a.get("segmentation") if bare else None))
        self.people = people(rows, len(self.skeleton))
        segments.sort(key=lambda pair: pair[0])  # as the table; both sorts are stable
        self.segments = {row: s for row, (_, s) in enumerate(segments) if s}

    def _row(self, a: Any, number: int, position: dict[int, int]) -> dict[str, Any]:
        where = a["id"] if isinstance(a, dict) and "id" in a else f"number {number + 1}"
        joints = len(self.skeleton)
        try:
            if a["image_id"] not in position:
                raise DataError(
                    self.file, f"annotation {where}: image_id {a['image_id']!r} is not among the file's images"
                )
            x, y, width, height = map(float, a["bbox"])
            values = np.asarray(a.get("keypoints") or [0] * (3 * joints), dtype=np.float64)
            area = float(a.get("area") or BODY * width * height)
            crowd = bool(a.get("iscrowd", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                self.file, f"annotation {where}: needs image_id, bbox (x, y, width, height) and keypoints: {error!r}"
            ) from None
        if values.shape != (3 * joints,):
            raise DataError(
                self.file,
                f"annotation {where}: keypoints has {values.size} numbers, {3 * joints} are needed: x, y, v of {joints}",
            )
        if not np.isfinite([x, y, width, height, area, *values]).all() or width < 0 or height < 0:
            raise DataError(
                self.file, f"annotation {where}: bbox or keypoints are not finite, or the bbox has a negative size"
            )
        table = values.reshape(joints, 3)
        if not np.isin(table[:, 2], (0, 1, 2)).all():
            raise DataError(self.file, f"annotation {where}: a keypoint's visibility is not 0, 1 or 2")
        visible = np.zeros(joints, dtype=np.int64) if crowd else table[:, 2].astype(np.int64)
        box = [x, y, x + width, y + height]
        image = position[a["image_id"]]
        return {"image": image, "keypoints": table[:, :2], "visible": visible, "box": box, "area": area, "crowd": crowd}

    def path(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def image(self, index: int) -> Tensor:
        image = super().image(index)
        width, height = self.sizes[index]
        if width and height and tuple(image.shape[1:]) != (height, width):
            found = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(
                self.path(index),
                f"is {found} pixels, but {self.file.name} says {width}x{height}: the keypoints would not fit",
            )
        return image

    def hidden(self, row: int, height: int, width: int) -> Tensor:
        segment = self.segments.get(row)
        if segment is None:
            return super().hidden(row, height, width)
        try:
            from pycocotools import mask as rle
        except ModuleNotFoundError:
            raise MissingExtra("pycocotools", "detection", "reading segments of crowds") from None

        try:
            if isinstance(segment, list):  # polygons
                coded = rle.merge(rle.frPyObjects(segment, height, width))
            else:
                coded = rle.frPyObjects(segment, height, width) if isinstance(segment["counts"], list) else segment
            mask = torch.from_numpy(rle.decode(coded).astype(bool))
        except (KeyError, TypeError, ValueError, IndexError):
            mask = None
        if mask is None or mask.shape != (height, width):
            raise DataError(
                self.file, f"the segmentation of a person in {self.names[int(self.people.image[row])]} cannot be read"
            )
        return mask


# -- finding the files -------------------------------------------------------------------------------------------------

EMBEDDED = {"stick_figures": {"max_people": 1}, "stick_crowds": {"max_people": 4}}


def open_poses(data: str | Path, split: str = "train", **options: Any) -> PoseData:
    """The people of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Args:
        options: of `stick_figures`, where that is the data.

    Raises:
        DataError: if the place is missing or its layout is not known.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    if str(data) in EMBEDDED:
        return StickFigures(split, **{**EMBEDDED[str(data)], **options})
    from paperzoo.data.images import data_folder

    root = Path(data).expanduser()
    if not root.is_dir() and len(root.parts) == 1:
        root = data_folder() / root
    if not root.is_dir():
        known = ", ".join(EMBEDDED)
        raise DataError(root, f"no such folder; give {known}, or a folder in COCO's or MPII's layout")
    from paperzoo.data.mpii import MpiiMat, MpiiPoses

    rows = root / "annot" / f"{'train' if split == 'train' else 'valid'}.json"
    if rows.is_file():
        return MpiiPoses(rows, root / "images")
    mats = sorted(root.rglob("mpii_human_pose_v1*.mat"))
    if mats:
        return MpiiMat(mats[0], root / "images", split)
    return open_coco(root, split)


def open_coco(root: Path, split: str) -> CocoPoses:
    """annotations/person_keypoints_<split>*.json with <split>*/ or images/<split>*/; or <split>/_annotations.coco.json."""
    for name in SPLITS[split]:
        if (root / name / "_annotations.coco.json").is_file():
            return CocoPoses(root / name / "_annotations.coco.json", root / name)
        files = [f for p in ("person_keypoints_", "") for f in sorted((root / "annotations").glob(f"{p}{name}*.json"))]
        for file in files[:1]:
            places = [file.stem.removeprefix("person_keypoints_"), name]
            folders = [base / place for place in places for base in (root, root / "images")] + [root / "images"]
            folder = next((f for f in folders if f.is_dir()), None)
            if folder is None:
                raise DataError(
                    file, f"no folder with its images; looked for {', '.join(str(f) for f in folders[:2])} …"
                )
            return CocoPoses(file, folder)
    raise DataError(
        root,
        f"no keypoints for the split '{split}'; looked for annotations/person_keypoints_{SPLITS[split][0]}*.json, "
        f"annot/{'train' if split == 'train' else 'valid'}.json and mpii_human_pose_v1*.mat",
    )
