"""MPII Human Pose: the JSON files that everybody trains from, and the official MATLAB file.

`paperzoo.data.poses.open_poses` finds them and says what an item is. Pixels are counted from 1 in MPII, here from 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from paperzoo.data.poses import BODY, PoseData, people
from paperzoo.data.skeletons import MPII
from paperzoo.errors import DataError


class MpiiPoses(PoseData):
    """MPII as everybody uses it: annot/train.json and valid.json, a row a person with center, scale, joints, joints_vis.

    A person's box is the square of 200 scale pixels whose middle lies 15 scale below the given centre, "to avoid cropping
    limbs"; the recipe widens it by a quarter. Head sizes are 0.6 of the diagonal of the head boxes in annot/gt_valid.mat;
    where that file is missing, the distance from the neck to the top of the head.

    Raises:
        DataError: naming the file and the row that does not fit.
    """

    def __init__(self, annotations: str | Path, images: str | Path) -> None:
        self.file, self.folder, self.skeleton = Path(annotations), Path(images), MPII
        entries = read_rows(self.file)
        heads = head_sizes(self.file.with_name(f"gt_{self.file.stem}.mat"), len(entries))
        rows, position = [], {}
        for i, entry in enumerate(entries):
            try:
                name, scale = str(entry["image"]), float(entry["scale"])
                centre = np.asarray(entry["center"], dtype=np.float64).reshape(2)
                joints = np.asarray(entry["joints"], dtype=np.float64).reshape(16, 2) - 1
                visible = np.asarray(entry["joints_vis"]).reshape(16).astype(np.int64) * 2
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    self.file, f"row {i + 1}: needs image, center, scale, joints (16 of x, y) and joints_vis: {error!r}"
                ) from None
            image = position.setdefault(name, len(position))
            head = heads[i] if heads is not None else head_length(joints, visible)
            rows.append(mpii_row(image, joints, visible, centre, scale, head))
        self._finish(rows, list(position))

    def _finish(self, rows: list[dict], names: list[str]) -> None:
        if not rows:
            raise DataError(self.file, "has no people")
        self.names, self.ids = names, list(range(len(names)))
        self.people = people(rows, len(self.skeleton))

    def path(self, index: int) -> str:
        return str(self.folder / self.names[index])


class MpiiMat(MpiiPoses):
    """The official file, mpii_human_pose_v1_u12_1.mat: every person of the training images; each tenth image is for tests.

    (Its own test images have no joints. The split that papers report on is that of the JSON files.) All people are there,
    with those who are not annotated as regions to leave out, so that it serves for several people as well.
    """

    def __init__(self, file: str | Path, images: str | Path, split: str) -> None:
        self.file, self.folder, self.skeleton = Path(file), Path(images), MPII
        try:
            release = read_mat(self.file)["RELEASE"]
            training = np.atleast_1d(release.img_train).astype(bool)
            entries = np.atleast_1d(release.annolist)
        except (AttributeError, KeyError) as error:
            raise DataError(self.file, f"has no RELEASE with annolist and img_train: {error!r}") from None
        rows, names = [], []
        for i, (entry, train) in enumerate(zip(entries, training, strict=True)):
            if not train or (len(names_of(entry)) == 0):
                continue
            found = [
                r for r in (self._person(p, i) for p in np.atleast_1d(getattr(entry, "annorect", []))) if r is not None
            ]
            if any(r["visible"].any() for r in found):
                names.append(names_of(entry))
                rows += [r | {"image": len(names) - 1} for r in found]
        chosen = [k for k in range(len(names)) if (k % 10 == 9) == (split == "test")]
        renumber = {k: i for i, k in enumerate(chosen)}
        rows = [r | {"image": renumber[r["image"]]} for r in rows if r["image"] in renumber]
        self._finish(rows, [names[k] for k in chosen])

    def _person(self, rectangle: Any, number: int) -> dict | None:
        try:
            corners = [float(getattr(rectangle, k)) for k in ("x1", "y1", "x2", "y2")]
        except (AttributeError, TypeError, ValueError):
            return None  # an empty entry; the file has some
        head = 0.6 * float(np.hypot(corners[2] - corners[0], corners[3] - corners[1]))
        joints, visible = np.zeros((16, 2)), np.zeros(16, dtype=np.int64)
        points = getattr(getattr(rectangle, "annopoints", None), "point", None)
        if points is None or not hasattr(rectangle, "objpos") or not np.size(getattr(rectangle, "scale", ())):
            box = [c - 1 for c in corners]
            return {"keypoints": joints, "visible": visible, "box": box, "area": 0.0, "head_size": head}
        try:
            for point in np.atleast_1d(points):
                k = int(point.id)
                joints[k] = float(point.x) - 1, float(point.y) - 1
                flag = getattr(point, "is_visible", 1)
                visible[k] = 1 if np.size(flag) and int(float(flag)) == 0 else 2
            centre = np.array([float(rectangle.objpos.x), float(rectangle.objpos.y)])
            return mpii_row(0, joints, visible, centre, float(rectangle.scale), head)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise DataError(self.file, f"image {number + 1}: a person's points cannot be read: {error!r}") from None


def names_of(entry: Any) -> str:
    return str(getattr(getattr(entry, "image", None), "name", "") or "")


def mpii_row(image: int, joints: Any, visible: Any, centre: Any, scale: float, head: float) -> dict[str, Any]:
    """A person of MPII, as `people` takes one; `centre` counts pixels from 1."""
    x, y = (
        float(centre[0]) - 0.5,
        float(centre[1]) + 15 * scale - 0.5,
    )  # from 1 to 0, and from a pixel's middle to its edge
    half = 100 * scale
    box = [x - half, y - half, x + half, y + half]
    area = BODY * (200 * scale) ** 2
    return {"image": image, "keypoints": joints, "visible": visible, "box": box, "area": area, "head_size": head}


def head_length(joints: np.ndarray, visible: np.ndarray) -> float:
    """The distance from neck to top of the head; nan where either is not annotated."""
    neck, top = MPII.head
    return float(np.linalg.norm(joints[neck] - joints[top])) if visible[neck] and visible[top] else float("nan")


def head_sizes(file: Path, count: int) -> np.ndarray | None:
    """0.6 of the diagonals of the head boxes in gt_valid.mat, (count,); None without the file."""
    if not file.is_file():
        return None
    content = read_mat(file)
    boxes = np.asarray(content.get("headboxes_src", ()))
    if boxes.size != 4 * count:
        raise DataError(
            file, f"headboxes_src has the shape {boxes.shape}; {(2, 2, count)} is needed for {count} people"
        )
    boxes = boxes.reshape(2, 2, count)
    return 0.6 * np.linalg.norm(boxes[1].astype(float) - boxes[0].astype(float), axis=0)


def read_rows(file: Path) -> list[dict]:
    """A JSON list of objects.

    Raises:
        DataError: if the file is missing, no JSON, or no such list.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(file, f"cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(file, f"is no JSON file: {error}") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError(file, "is no list of people; each is an object with image, center, scale, joints, joints_vis")
    return content


def read_mat(file: Path) -> dict[str, Any]:
    """A MATLAB file; structures become objects.

    Raises:
        DataError: if it cannot be read.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(file, squeeze_me=True, struct_as_record=False)
    except Exception as error:  # scipy raises whatever its parser meets
        raise DataError(file, f"is no readable MATLAB file ({type(error).__name__}: {str(error)[:100]})") from None
    return content
