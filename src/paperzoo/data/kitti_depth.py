"""KITTI's raw recordings for depth: pictures of both colour cameras, laser scans, calibration, and lists of files.

    kitti/
        train_files.txt  test_files.txt     or the two in splits/; validation files (val_files.txt) may stand in for the test's
        2011_09_26/
            calib_cam_to_cam.txt  calib_velo_to_cam.txt
            2011_09_26_drive_0001_sync/
                image_02/data/0000000000.png (or .jpg)      image_03/data/…
                velodyne_points/data/0000000000.bin
                proj_depth/groundtruth/image_02/0000000005.png
        data_depth_annotated/{train,val}/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000005.png

A line of a list is `2011_09_26/2011_09_26_drive_0001_sync 473 l` (recording, frame, "l" or "r"), as the lists of the Eigen split in
common use, or the path of the image (what follows it is left out): `2011_09_26/…_sync/image_02/data/0000000473.png …`.

Depth is the benchmark's denser one (256 units a metre) if every file of the list has it; else the laser scan of the moment is
projected into the picture, as in the original protocol of the Eigen split.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paperzoo.data.depth import DepthData, Frame, read_depth
from paperzoo.data.images import read_image
from paperzoo.errors import DataError

LISTS = {"train": ("train_files.txt",), "test": ("test_files.txt", "val_files.txt")}
CAMERAS = {"l": 2, "r": 3, "2": 2, "3": 3}
IMAGE_PATH = re.compile(
    r"(?P<drive>\d{4}_\d\d_\d\d/[^/]+)/image_0(?P<camera>[23])/data/(?P<frame>\d+)\.(png|jpg|jpeg)$"
)


def looks_like(root: Path) -> bool:
    """Whether a folder holds KITTI's raw recordings: days as folders."""
    return any(re.fullmatch(r"\d{4}_\d\d_\d\d", p.name) and p.is_dir() for p in root.iterdir())


def read_list(root: Path, split: str) -> list[tuple[str, int, int]]:
    """The split's lines as (recording, frame, camera number)."""
    places = [base / name for name in LISTS[split] for base in (root, root / "splits")]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise DataError(
            root, f"needs a list of files, {LISTS[split][0]}, here or in splits/: lines as '2011_09_26/…_sync 473 l'"
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        match = IMAGE_PATH.search(words[0])
        if match:
            rows.append((match["drive"], int(match["frame"]), int(match["camera"])))
        elif len(words) >= 2 and words[1].isdigit() and (len(words) == 2 or words[2] in CAMERAS):
            rows.append((words[0].strip("/"), int(words[1]), CAMERAS[words[2]] if len(words) > 2 else 2))
        else:
            raise DataError(
                f"{path}:{number}", f"'{line[:60]}' is no line of a list; expected '2011_09_26/…_sync 473 l'"
            )
    if not rows:
        raise DataError(path, "is empty; lines as '2011_09_26/…_sync 473 l' are expected")
    return rows


@functools.cache
def read_calibration(path: Path) -> dict[str, np.ndarray]:
    """A calibration file: name -> numbers.

    Raises:
        DataError: if it is missing or not one.
    """
    values = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, numbers = line.partition(":")
            try:
                values[name.strip()] = np.array([float(n) for n in numbers.split()])
            except ValueError:
                continue  # the time of the calibration
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"not readable ({type(error).__name__}); KITTI's calibration files are needed") from None
    return values


def entry(day: Path, file: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = read_calibration(day / file)
    if name not in values or values[name].size != int(np.prod(shape)):
        raise DataError(day / file, f"has no entry {name} of {int(np.prod(shape))} numbers")
    return values[name].reshape(shape)


def scan_depth(scan: np.ndarray, day: Path, camera: int, size: tuple[int, int]) -> Tensor:
    """Laser points (N, 4) (forward, left, up, reflectance) in a camera's picture: float32 (H, W), 0 where none fell.

    The depth is the distance forward of the laser, and pixels are counted from 1 before rounding, as in the programs with which
    results on the Eigen split have been made; where points meet in a pixel, the nearest counts.
    """
    height, width = size
    motion = np.eye(4)
    motion[:3, :3] = entry(day, "calib_velo_to_cam.txt", "R", (3, 3))
    motion[:3, 3] = entry(day, "calib_velo_to_cam.txt", "T", (3,))
    rectify = np.eye(4)
    rectify[:3, :3] = entry(day, "calib_cam_to_cam.txt", "R_rect_00", (3, 3))
    projection = entry(day, "calib_cam_to_cam.txt", f"P_rect_0{camera}", (3, 4)) @ rectify @ motion
    points = scan[scan[:, 0] >= 0]
    seen = np.concatenate([points[:, :3], np.ones((len(points), 1))], 1) @ projection.T
    forward = points[:, 0].astype(np.float32)
    ahead = (seen[:, 2] > 0) & (forward > 0)
    seen, forward = seen[ahead], forward[ahead]
    x, y = (np.round(seen[:, k] / seen[:, 2]).astype(np.int64) - 1 for k in (0, 1))
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    nearest = np.full(height * width, np.inf, dtype=np.float32)
    np.minimum.at(nearest, y[inside] * width + x[inside], forward[inside])
    return torch.from_numpy(np.where(np.isfinite(nearest), nearest, 0).reshape(height, width))


class KittiRaw(DepthData):
    """See the module's docstring."""

    def __init__(self, root: Path, split: str, frames: Sequence[Frame] = (), depth: bool = True) -> None:
        super().__init__(frames)
        self.root, self.rows = root, read_list(root, split)
        self.has_depth = depth
        self.dense = depth and all(self.annotated(row) is not None for row in self.rows)

    def annotated(self, row: tuple[str, int, int]) -> Path | None:
        drive, frame, camera = row
        inside = f"proj_depth/groundtruth/image_0{camera}/{frame:010d}.png"
        name = drive.split("/")[-1]
        places = [self.root / drive, *(self.root / "data_depth_annotated" / s / name for s in ("train", "val"))]
        return next((p / inside for p in places if (p / inside).is_file()), None)

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, i: int, frame: Frame = 0) -> Path:
        drive, number, camera = self.rows[i]
        if frame == "s":
            camera = 5 - camera
        else:
            number += int(frame)
        folder = self.root / drive / f"image_0{camera}" / "data"
        found = next((p for e in (".png", ".jpg") if (p := folder / f"{number:010d}{e}").is_file()), None)
        if found is None:
            raise DataError(folder / f"{number:010d}.png", "no such file (nor .jpg)")
        return found

    def path(self, i: int) -> str:
        drive, frame, camera = self.rows[i]
        return str(self.root / drive / f"image_0{camera}" / "data" / f"{frame:010d}")

    def image(self, i: int, frame: Frame = 0) -> Tensor:
        return read_image(self.picture(i, frame))

    def day(self, i: int) -> Path:
        return self.root / self.rows[i][0].split("/")[0]

    def depth(self, i: int) -> Tensor:
        if self.dense:
            return read_depth(self.annotated(self.rows[i]), 256.0)
        drive, frame, camera = self.rows[i]
        path = self.root / drive / "velodyne_points" / "data" / f"{frame:010d}.bin"
        try:
            scan = np.fromfile(path, dtype=np.float32)
        except FileNotFoundError:
            raise DataError(path, "no such file, and no annotated depth of this frame either") from None
        if scan.size == 0 or scan.size % 4:
            raise DataError(path, f"holds {scan.size} numbers; a laser scan has four for each point")
        size = tuple(read_image(self.picture(i)).shape[1:])
        return scan_depth(scan.reshape(-1, 4), self.day(i), camera, size)

    def intrinsics(self, i: int, size: tuple[int, int]) -> Tensor:
        matrix = entry(self.day(i), "calib_cam_to_cam.txt", f"P_rect_0{self.rows[i][2]}", (3, 4))
        return torch.from_numpy(matrix[:, :3].astype(np.float32))

    def stereo(self, i: int) -> Tensor:
        """From the image's camera to the other: the cameras are rectified, so only along x."""
        here = self.rows[i][2]
        places = []
        for camera in (here, 5 - here):
            matrix = entry(self.day(i), "calib_cam_to_cam.txt", f"P_rect_0{camera}", (3, 4))
            places.append(matrix[0, 3] / matrix[0, 0])
        motion = torch.eye(4)
        motion[0, 3] = places[1] - places[0]
        return motion
