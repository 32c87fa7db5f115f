"""Images with depth, and frames of moving cameras: folders, NYU Depth v2, KITTI, videos, and embedded traced scenes.

    open_depth("traced_scenes", "train")                   ray-traced rooms with exact depth, always there
    open_depth("path/to/folder", "test")                   images/ and depth/ with equal names, with or without train/ and val/ inside
    open_depth("nyu", "train")                             nyu_depth_v2_labeled.mat and splits.mat; or nyu2_train.csv and nyu2_test.csv
    open_depth("kitti", "train", frames=(-1, 1))           KITTI's raw recordings with lists of files, see `paperzoo.data.kitti_depth`
    open_depth("holiday.mp4", "train", frames=(-1, 1))     a video, or a folder of a video's pictures: frames without depth

An item is a dict:
    image       uint8 (3, H, W)
    depth       float32 (1, H, W), metres along the optical axis, 0 where it is unknown; only of sets that have it, and if asked for
    frames      uint8 (F, 3, H, W), the other frames that were asked for: -1 is the picture before, 1 the one after, "s" the second
                camera's of a stereo pair; only if asked for
    intrinsics  float32 (3, 3), in pixels, a pixel's middle has whole coordinates
    stereo      float32 (4, 4), from points in the image's camera to points in the second camera's, in metres; only with "s"

Depth pictures hold `depth_scale` units a metre: 1000 for millimetres (NYU, most depth cameras), 256 for KITTI. `.npy` and
floating-point `.tiff` files are in metres.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.images import HELD_OUT, is_picture, read_image
from paperzoo.data.traced_scenes import CHUNK, STEREO, traced_scenes
from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName

Frame = int | str  # a moment relative to the image's, not 0; or "s"

SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "validation", "valid")}
IMAGE_FOLDERS = ("images", "image", "rgb", "imgs")
DEPTH_FOLDERS = ("depth", "depths", "depth_maps", "sync_depth")
DEPTHS = {".png", ".tif", ".tiff", ".npy", ".pgm"}
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
TRACED = {"train": 8 * CHUNK, "test": 2 * CHUNK}  # scenes of "traced_scenes"


class DepthData(Dataset):
    """What every set shares; a subclass reads. `has_depth` says whether its items have depth, `frames` which other frames.

    Args:
        frames: other frames of each item.
        focal_length: of cameras whose intrinsics are unknown, in image widths.
    """

    has_depth = True

    def __init__(self, frames: Sequence[Frame] = (), focal_length: float = 0.8) -> None:
        self.frames, self.focal_length = tuple(frames), focal_length

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, i: int) -> str:
        """What an error calls item i."""
        raise NotImplementedError

    def image(self, i: int, frame: Frame = 0) -> Tensor:
        """A picture uint8 (3, H, W): item i's own, or another frame of it."""
        raise NotImplementedError

    def depth(self, i: int) -> Tensor:
        """Item i's depth float32 (H, W)."""
        raise NotImplementedError

    def intrinsics(self, i: int, size: tuple[int, int]) -> Tensor:
        """float32 (3, 3) for pictures of (height, width)."""
        height, width = size
        focal = self.focal_length * width
        return torch.tensor([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])

    def stereo(self, i: int) -> Tensor:
        """float32 (4, 4) to the second camera."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image = self.image(i)
        item = {"image": image}
        if self.has_depth:
            depth = self.depth(i)
            if depth.shape != image.shape[1:]:
                raise DataError(
                    self.path(i),
                    f"its depth is {_size(depth.shape)} pixels, the image {_size(image.shape)}; they must be equal",
                )
            item["depth"] = depth[None]
        if self.frames:
            others = []
            for frame in self.frames:
                other = self.image(i, frame)
                if other.shape != image.shape:
                    raise DataError(
                        self.path(i),
                        f"frame {frame} is {_size(other.shape)} pixels, this one {_size(image.shape)}; they must be equal",
                    )
                others.append(other)
            item["frames"] = torch.stack(others)
            item["intrinsics"] = self.intrinsics(i, tuple(image.shape[1:]))
            if "s" in self.frames:
                item["stereo"] = self.stereo(i)
        return item


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]} x {shape[-2]}"


def open_depth(
    data: str | Path,
    split: str = "train",
    frames: Sequence[Frame] = (),
    depth: bool = True,
    depth_scale: float = 1000.0,
    focal_length: float = 0.8,
) -> DepthData:
    """A depth data set by name or place; see the module's docstring.

    Args:
        split: "train" or "test".
        frames: other frames of each item; items that do not have all of them are left out.
        depth: read depth where there is any.
        depth_scale: units a metre of whole-number depth pictures.
        focal_length: of cameras whose intrinsics are not in the data (`intrinsics.txt`, nine numbers), in image widths.

    Raises:
        PaperZooError, UnknownName: if there is no such set, split or frame.
        DataError: if a folder has none of the layouts, or a file of it is missing or broken.
        MissingExtra: for .mat files without h5py and videos without OpenCV.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
    frames = tuple(frames)
    for frame in frames:
        if frame != "s" and (not isinstance(frame, int) or frame == 0):
            raise PaperZooError(
                f"frames holds {frame!r}; -1 is the picture before, 1 the one after, 's' the second camera's"
            )
    if str(data) == "traced_scenes":
        return Traced(split, frames, depth)
    path = Path(data).expanduser()
    if path.suffix.lower() in VIDEOS:
        return VideoFrames(path, split, frames, focal_length)
    if path.suffix == ".mat":
        return NyuLabeled(path, split, frames)
    if not path.is_dir():
        if path.suffix or len(path.parts) > 1:
            raise DataError(path, "no such file or folder")
        raise UnknownName("depth data set or path", str(data), ["traced_scenes"])
    if (path / "nyu_depth_v2_labeled.mat").is_file():
        return NyuLabeled(path / "nyu_depth_v2_labeled.mat", split, frames)
    from paperzoo.data import kitti_depth

    if kitti_depth.looks_like(path):
        return kitti_depth.KittiRaw(path, split, frames, depth)
    if (path / "nyu2_train.csv").is_file():
        return nyu_table(path, split, frames)
    return open_folder(path, split, frames, depth, depth_scale, focal_length)


# -- files -------------------------------------------------------------------------------------------------------------


def read_depth(path: str | Path, scale: float = 1000.0) -> Tensor:
    """A depth file as float32 (H, W) in metres; negative, infinite and missing values become 0.

    Args:
        scale: units a metre of whole-number pictures.

    Raises:
        DataError: if the file is missing, broken, or a colour picture.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
            whole = False
        else:
            with Image.open(path) as picture:
                picture.load()
                if picture.mode not in ("L", "I", "F") and not picture.mode.startswith("I;16"):
                    raise DataError(path, f"has the pixel mode {picture.mode}; depth is one 8, 16 or 32-bit channel")
                values, whole = np.asarray(picture), picture.mode != "F"
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DataError(path, f"not a readable depth file ({type(error).__name__}: {str(error)[:120]})") from None
    values = np.squeeze(values)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise DataError(path, f"has the shape {values.shape} of {values.dtype}; depth is one number for each pixel")
    metres = torch.from_numpy(values.astype(np.float32))
    if whole:
        metres = metres / scale
    return torch.where(torch.isfinite(metres) & (metres > 0), metres, 0.0)


def read_intrinsics(path: Path) -> Tensor:
    """Nine numbers, row by row, as float32 (3, 3)."""
    try:
        numbers = [float(word) for word in re.split(r"[\s,;]+", path.read_text(encoding="utf-8").strip())]
    except (OSError, ValueError) as error:
        raise DataError(path, f"not readable numbers ({error})") from None
    if len(numbers) != 9 or numbers[0] <= 0 or numbers[4] <= 0:
        raise DataError(path, f"holds {len(numbers)} numbers; a camera is nine: fx 0 cx, 0 fy cy, 0 0 1")
    return torch.tensor(numbers).view(3, 3)


class PictureFiles(DepthData):
    """Pictures, each with a depth file or none; the pictures of a folder, in the order of their names, are a film.

    Args:
        images, depths: paths of all items; `depths` is None without depth.
        order: the films: lists of all pictures (also of those that are not items), for the frames before and after.
        scale: units a metre; or None: 8-bit files have 255 for 10 metres and 16-bit ones millimetres, as DenseDepth's NYU files.
    """

    def __init__(
        self,
        images: Sequence[Path],
        depths: Sequence[Path] | None,
        order: Sequence[Sequence[Path]],
        root: Path,
        frames: Sequence[Frame],
        scale: float | None,
        focal_length: float,
    ) -> None:
        super().__init__(frames, focal_length)
        if "s" in self.frames:
            raise DataError(root, "has no second camera; frames 's' is known of KITTI and traced_scenes alone")
        self.place = {p: (film, k) for film in order for k, p in enumerate(film)} if self.frames else {}
        keep = [i for i, p in enumerate(images) if self.has_all(p)]
        if not keep:
            raise DataError(root, f"has no picture with all of the frames {', '.join(map(str, self.frames))}")
        self.images = [images[i] for i in keep]
        self.depths = None if depths is None else [depths[i] for i in keep]
        self.has_depth = depths is not None
        self.scale, self.root = scale, root
        camera = root / "intrinsics.txt"
        self.camera = read_intrinsics(camera) if camera.is_file() else None

    def has_all(self, path: Path) -> bool:
        if not self.frames:
            return True
        film, k = self.place[path]
        return all(0 <= k + frame < len(film) for frame in self.frames)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> str:
        return str(self.images[i])

    def image(self, i: int, frame: Frame = 0) -> Tensor:
        if frame == 0:
            return read_image(self.images[i])
        film, k = self.place[self.images[i]]
        return read_image(film[k + frame])

    def depth(self, i: int) -> Tensor:
        path = self.depths[i]
        if self.scale is not None:
            return read_depth(path, self.scale)
        with Image.open(path) as picture:
            eight = picture.mode == "L"
        return read_depth(path, 25.5 if eight else 1000.0)

    def intrinsics(self, i: int, size: tuple[int, int]) -> Tensor:
        return super().intrinsics(i, size) if self.camera is None else self.camera


# -- folders -----------------------------------------------------------------------------------------------------------


def pictures_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and is_picture(p))


def first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def split_folder(root: Path, split: str) -> Path | None:
    """The split's folder, None where the folder has no splits.

    Raises:
        DataError: if only the other split is there.
    """
    found = first(root, SPLITS[split])
    if found is None and any(first(root, names) for names in SPLITS.values()):
        raise DataError(root, f"has no folder for the split '{split}'; expected one of {', '.join(SPLITS[split])}")
    return found


def open_folder(
    root: Path, split: str, frames: Sequence[Frame], depth: bool, scale: float, focal_length: float
) -> PictureFiles:
    """images/ and depth/, or pictures alone. Without train/ and val/ the last fifth of each folder is for testing."""
    images_root, depth_root = first(root, IMAGE_FOLDERS) or root, first(root, DEPTH_FOLDERS)
    inside = split_folder(images_root, split)
    source = inside or images_root
    every = [p for p in pictures_in(source) if depth_root is None or depth_root not in p.parents]
    if not every:
        raise DataError(
            source, "has no pictures; see images/ and depth/, a folder of a video's pictures, or a video file"
        )
    films: dict[Path, list[Path]] = {}
    for path in every:
        films.setdefault(path.parent, []).append(path)
    images = []
    for film in films.values():
        border = len(film) if inside else len(film) - len(film) // HELD_OUT
        images += film if inside else (film[:border] if split == "train" else film[border:])
    if not images:
        raise DataError(
            source, f"has too few pictures to hold any out for testing: {HELD_OUT} are needed, or a val folder"
        )
    depths = None
    if depth and depth_root is not None:
        base = depth_root / inside.name if inside else depth_root
        known = {_key(p.relative_to(base)): p for p in sorted(base.rglob("*")) if p.suffix.lower() in DEPTHS}
        depths = []
        for image in images:
            key = _key(image.relative_to(source))
            if key not in known:
                raise DataError(image, f"has no depth; expected {base / image.relative_to(source).with_suffix('.png')}")
            depths.append(known[key])
    return PictureFiles(images, depths, list(films.values()), root, frames, scale, focal_length)


def _key(relative: Path) -> str:
    """What an image's and its depth's name share: rgb_7.jpg and sync_depth_7.png, 7_depth.png."""
    stem = re.sub(r"^(rgb|sync_depth|depth|image)_|_(rgb|depth|colors|image)$", "", relative.stem)
    return (relative.parent / stem).as_posix()


def nyu_table(root: Path, split: str, frames: Sequence[Frame]) -> PictureFiles:
    """DenseDepth's NYU files: rows of an image and its depth, relative to the folder or to the one above it."""
    if frames:
        raise DataError(root, "holds single pictures, without the frames before and after")
    path = root / ("nyu2_train.csv" if split == "train" else "nyu2_test.csv")
    images, depths = [], []
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise DataError(path, f"not readable ({error.strerror})") from None
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        if len(row) != 2:
            raise DataError(f"{path}:{number}", f"has {len(row)} columns; an image and its depth are expected")
        places = [next((base / r for base in (root, root.parent) if (base / r).is_file()), None) for r in row]
        if None in places:
            raise DataError(f"{path}:{number}", f"names '{row[places.index(None)]}', which does not exist")
        images.append(places[0])
        depths.append(places[1])
    if not images:
        raise DataError(path, "is empty; rows of an image and its depth are expected")
    return PictureFiles(images, depths, [], root, (), None, 0.8)


# -- NYU Depth v2, the labelled frames -----------------------------------------------------------------------------------


class NyuLabeled(DepthData):
    """`nyu_depth_v2_labeled.mat` (a HDF5 file) with the official `splits.mat` beside it: 795 and 654 frames, 480 x 640."""

    def __init__(self, path: Path, split: str, frames: Sequence[Frame] = ()) -> None:
        super().__init__((), 518.86 / 640)
        if frames:
            raise DataError(path, "holds single pictures, without the frames before and after")
        if not path.is_file():
            raise DataError(path, "no such file")
        self.file_path, self.file = path, None
        splits = path.with_name("splits.mat")
        if not splits.is_file():
            raise DataError(splits, "is needed too: the official split, from the same place as the labelled frames")
        from scipy.io import loadmat

        try:
            rows = loadmat(splits)["trainNdxs" if split == "train" else "testNdxs"].ravel()
        except (KeyError, ValueError, OSError, NotImplementedError) as error:
            raise DataError(splits, f"has no trainNdxs and testNdxs ({type(error).__name__})") from None
        self.rows = [int(r) - 1 for r in rows]  # counted from 1
        count = len(self.opened()["images"])
        if not self.rows or max(self.rows) >= count or min(self.rows) < 0:
            raise DataError(splits, f"numbers frames up to {max(self.rows, default=-1) + 1}; {path.name} holds {count}")

    def opened(self) -> Any:
        """The open file, one for each process."""
        if self.file is None:
            try:
                import h5py
            except ImportError:
                raise MissingExtra("h5py", "science", "reading nyu_depth_v2_labeled.mat") from None
            try:
                self.file = h5py.File(self.file_path, "r")
                _ = self.file["images"].shape, self.file["depths"].shape
            except (OSError, KeyError) as error:
                raise DataError(self.file_path, f"not a readable NYU file ({str(error)[:100]})") from None
        return self.file

    def __getstate__(self) -> dict:
        return {**self.__dict__, "file": None}

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, i: int) -> str:
        return f"{self.file_path}:frame {self.rows[i] + 1}"

    def image(self, i: int, frame: Frame = 0) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.opened()["images"][self.rows[i]].transpose(0, 2, 1)))

    def depth(self, i: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.opened()["depths"][self.rows[i]].T.astype(np.float32)))


# -- videos ------------------------------------------------------------------------------------------------------------


class VideoFrames(DepthData):
    """The frames of a video file, read by OpenCV where they are needed; the last fifth of the time is for testing."""

    has_depth = False

    def __init__(self, path: Path, split: str, frames: Sequence[Frame], focal_length: float) -> None:
        super().__init__(frames, focal_length)
        if "s" in self.frames:
            raise DataError(path, "has no second camera; frames 's' is known of KITTI and traced_scenes alone")
        self.file_path, self.capture, self.at = path, None, -1
        total = int(self.opened().get(7))  # CAP_PROP_FRAME_COUNT
        border = total - total // HELD_OUT
        begin, end = (0, border) if split == "train" else (border, total)
        before, after = max([0, *(-f for f in self.frames)]), max([0, *self.frames])
        self.rows = range(begin + before, end - after)
        if not len(self.rows):
            raise DataError(path, f"has {total} frames, too few for the split '{split}'")

    def opened(self) -> Any:
        if self.capture is None:
            try:
                import cv2
            except ImportError:
                raise MissingExtra("opencv-python-headless", "video", "reading videos") from None
            if not self.file_path.is_file():
                raise DataError(self.file_path, "no such file")
            capture = cv2.VideoCapture(str(self.file_path))
            if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_COUNT) < 1:
                raise DataError(self.file_path, "not a video that can be read")
            self.capture, self.at = capture, 0
        return self.capture

    def __getstate__(self) -> dict:
        return {**self.__dict__, "capture": None, "at": -1}

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, i: int) -> str:
        return f"{self.file_path}#{self.rows[i]}"

    def image(self, i: int, frame: Frame = 0) -> Tensor:
        number, capture = self.rows[i] + int(frame), self.opened()
        if number != self.at:
            capture.set(1, number)  # CAP_PROP_POS_FRAMES
        there, pixels = capture.read()
        self.at = number + 1
        if not there:
            self.capture = None
            raise DataError(f"{self.file_path}#{number}", "this frame cannot be read; is the video complete?")
        return torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1)))


# -- traced scenes -------------------------------------------------------------------------------------------------------


class Traced(DepthData):
    """The embedded set: 256 traced scenes for training and 64 for testing, 96 x 64 pixels; see `paperzoo.data.traced_scenes`."""

    def __init__(self, split: str, frames: Sequence[Frame] = (), depth: bool = True) -> None:
        super().__init__(frames)
        self.scenes = traced_scenes(TRACED[split], split=split, frames=self.frames)
        self.has_depth = depth

    def __len__(self) -> int:
        return len(self.scenes)

    def path(self, i: int) -> str:
        return f"traced scene {i}"

    def image(self, i: int, frame: Frame = 0) -> Tensor:
        return self.scenes.images[i, 0 if frame == 0 else 1 + self.frames.index(frame)]

    def depth(self, i: int) -> Tensor:
        return self.scenes.depth[i, 0]

    def intrinsics(self, i: int, size: tuple[int, int]) -> Tensor:
        return self.scenes.intrinsics

    def stereo(self, i: int) -> Tensor:
        motion = torch.eye(4)
        motion[0, 3] = -STEREO
        return motion
