"""Videos with one label each: folders of classes, lists, Kinetics' and UCF101's layouts, and embedded moving digits.

    open_videos("moving_digits", "train")            generated, always there (see `paperzoo.data.moving_digits`)
    open_videos("path/to/folder", "train")           one sub-folder a class, with or without train/ and val/ (or test/)
    open_videos("ucfTrainTestlist/trainlist01.txt", "test")   lines "path label"; the list beside it that says test or val is the other split
    open_videos("list.csv", "train")                 columns path and label, optionally split; or lines "path label" without a header
    open_videos("kinetics400", "train")              annotations/train.csv with youtube_id and time_start, the videos in train/ (val/ alike)

A video is a file that PyAV (FFmpeg) reads, a folder of pictures (its frames in the order of their names), an .npz with `frames` uint8
(T, H, W, 3) and `rate`, or an animated picture. `open_video` opens one. Frames are asked for by time, in seconds since the first one, and
found by their own time stamps, so that a video whose frame rate changes is seen at its true speed. Damaged packets are skipped.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as resizing

from paperzoo.data.images import HELD_OUT, HELD_OUT_NAMES, folders, is_picture, read_image, shuffled
from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName

SUFFIXES = {
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ts",
    ".mts",
    ".gif",
    ".npz",
}
EMBEDDED = ("moving_digits",)
PICTURES_RATE = 25.0  # frames a second of a folder of pictures, which does not say
EARLY = 1e-4  # seconds by which a frame may come late and still be the one of a moment

log = logging.getLogger(__name__)


# -- one video -----------------------------------------------------------------------------------------------------------


class Video:
    """A video's frames by time. `times`: float64 (N,), seconds since the first frame, ascending; `name` for messages."""

    def __init__(self, times: np.ndarray, name: str, rate: float | None = None) -> None:
        self.times, self.name = times, name
        measured = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
        self.rate = float(measured or rate or PICTURES_RATE)  # frames a second, on average

    @property
    def duration(self) -> float:
        """Seconds, the last frame's own time included."""
        return float(self.times[-1]) + 1 / self.rate

    def __len__(self) -> int:
        return len(self.times)

    def __str__(self) -> str:
        return self.name

    def rows(self, wanted: Sequence[float]) -> list[int]:
        """For each moment the frame that is seen then: the last one that has come. Before the first and after the last these are held."""
        found = np.searchsorted(self.times, np.asarray(wanted, np.float64) + EARLY, side="right") - 1
        return found.clip(0, len(self.times) - 1).tolist()

    def frames(self, wanted: Sequence[float], short_side: int | None = None) -> Tensor:
        """The frames that are seen at these moments, in seconds: uint8 (T, 3, H, W), the shorter side of so many pixels.

        Raises:
            DataError: if none can be decoded.
        """
        raise NotImplementedError


class ArrayVideo(Video):
    """Frames in memory: uint8 (T, 3, H, W)."""

    def __init__(self, pixels: Tensor, rate: float = PICTURES_RATE, name: str = "video") -> None:
        super().__init__(np.arange(len(pixels)) / rate, name, rate)
        self.pixels = pixels

    def frames(self, wanted: Sequence[float], short_side: int | None = None) -> Tensor:
        return shrunk(self.pixels[self.rows(wanted)], short_side)


class PictureVideo(Video):
    """The pictures of a folder, in the order of their names."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        super().__init__(np.arange(len(files)) / PICTURES_RATE, str(path))
        self.files = files

    def frames(self, wanted: Sequence[float], short_side: int | None = None) -> Tensor:
        rows = self.rows(wanted)
        read = {row: shrunk(read_image(self.files[row])[None], short_side)[0] for row in sorted(set(rows))}
        sizes = {tuple(frame.shape) for frame in read.values()}
        if len(sizes) > 1:
            raise DataError(self.name, f"its pictures have different sizes: {sorted(sizes)[:3]}")
        return torch.stack([read[row] for row in rows])


class VideoFile(Video):
    """A file that PyAV reads. Time stamps are taken from the packets, so that opening decodes nothing.

    Raises:
        DataError: if there is no such file, no video in it, or nothing that can be read.
        MissingExtra: without PyAV.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        av = pyav()
        with self.container() as container:
            stream = self.stream(container)
            nominal = float(stream.average_rate or 0) or None
            stamps = []
            try:
                for packet in container.demux(stream):
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    if packet.size and stamp is not None:
                        stamps.append(stamp)
            except av.error.FFmpegError:  # the file breaks off: what came before counts
                pass
            self.unit = float(stream.time_base or 1 / (nominal or PICTURES_RATE))
        if not stamps:
            raise DataError(self.path, "holds no frame that can be read; is the video complete?")
        self.first = min(stamps)
        super().__init__(np.unique(stamps).astype(np.float64) * self.unit - self.first * self.unit, str(path), nominal)

    def container(self) -> Any:
        if not self.path.is_file():
            raise DataError(self.path, "no such file")
        av = pyav()
        try:
            return av.open(str(self.path))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            said = str(getattr(error, "strerror", None) or error)
            raise DataError(self.path, f"not a video that can be read ({said[:80]})") from None

    def stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise DataError(self.path, "holds no video, only sound or text")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # videos are decoded side by side in workers
        return stream

    def frames(self, wanted: Sequence[float], short_side: int | None = None) -> Tensor:
        order = np.argsort(wanted, kind="stable")
        moments = np.asarray(wanted, np.float64)[order] + EARLY
        found = self.decoded(moments, short_side, seek=True)
        if found is None:  # the seek went too far, or there was nothing behind it
            found = self.decoded(moments, short_side, seek=False)
        if found is None:
            raise DataError(self.path, "no frame can be decoded; is the video complete?")
        pixels = torch.from_numpy(np.stack([found[i] for i in np.argsort(order)]))
        return pixels.permute(0, 3, 1, 2).contiguous()

    def decoded(self, moments: np.ndarray, short_side: int | None, seek: bool) -> list[np.ndarray] | None:
        """The pictures (H, W, 3) seen at ascending moments; None if there is none, or the seek went beyond the first."""
        av = pyav()
        found: list[np.ndarray] = []
        shown: Any = None  # the frame on the screen, and its pixels once they were asked for
        pixels: np.ndarray | None = None
        damaged = 0
        with self.container() as container:
            stream = self.stream(container)
            if seek and moments[0] > 1 / self.rate:
                try:
                    container.seek(self.first + int(moments[0] / self.unit), stream=stream)
                except (av.error.FFmpegError, OSError):
                    return None
            else:
                seek = False
            packets = container.demux(stream)
            while len(found) < len(moments):
                try:
                    packet = next(packets)
                except StopIteration:
                    break
                except av.error.FFmpegError:
                    damaged += 1
                    break
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    damaged += 1
                    continue
                for frame in frames:
                    if frame.pts is None:
                        continue
                    time = (frame.pts - self.first) * self.unit
                    if shown is None and seek and time > moments[0]:
                        return None
                    while shown is not None and len(found) < len(moments) and time > moments[len(found)]:
                        pixels = to_pixels(shown, short_side) if pixels is None else pixels
                        found.append(pixels)
                    shown, pixels = frame, None
            if shown is None:
                return None
            while len(found) < len(moments):
                pixels = to_pixels(shown, short_side) if pixels is None else pixels
                found.append(pixels)
        if damaged and str(self.path) not in _told:
            _told.add(str(self.path))
            log.warning("%s: %d damaged packet(s) were skipped", self.path, damaged)
        return found


_told: set[str] = set()  # files whose damage has been told


def pyav() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtra("av", "video", "reading videos") from None
    return av


def to_pixels(frame: Any, short_side: int | None) -> np.ndarray:
    """A decoded frame, upright: uint8 (H, W, 3)."""
    width, height = frame.width, frame.height
    if short_side is not None:
        width, height = sides(height, width, short_side)[::-1]
    pixels = frame.reformat(width, height, "rgb24", interpolation="BILINEAR").to_ndarray()
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # as telephones note how they were held
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def sides(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the shorter side of so many pixels, the longer one rounded."""
    factor = short_side / min(height, width)
    return (
        (short_side, max(1, round(width * factor))) if height <= width else (max(1, round(height * factor)), short_side)
    )


def shrunk(pixels: Tensor, short_side: int | None) -> Tensor:
    """uint8 (T, 3, H, W) with another shorter side."""
    height, width = pixels.shape[-2:]
    if short_side is None or min(height, width) == short_side:
        return pixels
    return resizing.resize(pixels, list(sides(height, width, short_side)), antialias=True)


def open_video(value: Any) -> Video:
    """Whatever a user may call a video: a path, a folder of pictures, a `Video`, or frames in memory.

    Frames are an array or tensor (T, H, W, 3) or (T, 3, H, W): uint8, or floating point in [0, 1].

    Raises:
        DataError: if it cannot be read.
        PaperZooError: for anything else, saying what it was.
    """
    if isinstance(value, Video):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return ArrayVideo(to_frames(value))
    if not isinstance(value, str | Path):
        raise PaperZooError(
            f"a video is a path, a folder of pictures or an array of frames, not {type(value).__name__}"
        )
    path = Path(value).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if is_picture(p))
        if not files:
            raise DataError(path, "this folder holds no pictures; a video file, or a folder of its frames, is needed")
        return PictureVideo(path, files)
    if path.suffix.lower() in (".npz", ".npy"):
        return read_arrays(path)
    return VideoFile(path)


def to_frames(value: Tensor | np.ndarray) -> Tensor:
    """Frames in memory as uint8 (T, 3, H, W)."""
    tensor = torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value).detach().cpu()
    if tensor.ndim == 4 and tensor.shape[1] != 3 and tensor.shape[3] == 3:
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[1] != 3 or 0 in tensor.shape:
        raise PaperZooError(f"a video has the shape (T, H, W, 3) or (T, 3, H, W), not {tuple(value.shape)}")
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()) or tensor.min() < -1e-3 or tensor.max() > 1 + 1e-3:
            raise PaperZooError("a floating-point video has values in [0, 1]; scale it, or pass uint8")
        tensor = (tensor.clamp(0, 1) * 255).round()
    elif tensor.dtype != torch.uint8 and (tensor.min() < 0 or tensor.max() > 255):
        raise PaperZooError(f"an integer video has values in 0 … 255, not {int(tensor.min())} … {int(tensor.max())}")
    return tensor.to(torch.uint8).contiguous()


def read_arrays(path: Path) -> ArrayVideo:
    """An .npz with `frames` and optionally `rate`, or an .npy with the frames."""
    try:
        stored = np.load(path, allow_pickle=False)
        arrays = stored if isinstance(stored, np.ndarray) else stored["frames"]
        rate = PICTURES_RATE if isinstance(stored, np.ndarray) or "rate" not in stored else float(stored["rate"])
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
        raise DataError(path, f"no array 'frames' can be read from it ({type(error).__name__})") from None
    if not (math.isfinite(rate) and rate > 0):
        raise DataError(path, f"its rate is {rate}; frames a second are above 0")
    try:
        return ArrayVideo(to_frames(arrays), rate, str(path))
    except (PaperZooError, TypeError) as error:
        raise DataError(path, str(error)) from None


def write_video(path: str | Path, pixels: Tensor, rate: float) -> Path:
    """Frames uint8 (T, 3, H, W) as a file: .npz without loss, anything else by PyAV (H.264 where FFmpeg has it, else MPEG-4).

    Raises:
        MissingExtra: without PyAV, but for .npz.
    """
    from fractions import Fraction

    path, array = Path(path), pixels.permute(0, 2, 3, 1).contiguous().numpy()
    if path.suffix == ".npz":
        np.savez_compressed(path, frames=array, rate=np.float64(rate))
        return path
    av = pyav()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
        stream.width, stream.height = array.shape[2] // 2 * 2, array.shape[1] // 2 * 2  # codecs want even sides
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"} if codec == "libx264" else {"qscale": "2"}
        for picture in array:
            frame = av.VideoFrame.from_ndarray(picture[: stream.height, : stream.width].copy(), "rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


# -- sets ------------------------------------------------------------------------------------------------------------------


class Videos(Dataset):
    """Videos with labels: `labels` are the class names, `targets[i]` the class of video i. An item is (Video, class)."""

    def __init__(self, labels: Sequence[str], targets: Sequence[int], paths: Sequence[str] | None = None) -> None:
        self.labels, self.targets, self.paths = list(labels), list(map(int, targets)), paths

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, i: int) -> str:
        return self.paths[i]

    def video(self, i: int) -> Video:
        return open_video(self.paths[i])

    def __getitem__(self, i: int) -> tuple[Video, int]:
        return self.video(i), self.targets[i]


def open_videos(data: str | Path, split: str = "train") -> Videos:
    """The videos of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Raises:
        DataError: if the place is missing, empty or has no usable labels.
        UnknownName: if `data` is neither a set's name nor a path.
    """
    from paperzoo.data import video_lists as lists

    name = str(data)
    if name == "moving_digits":
        from paperzoo.data.moving_digits import MovingDigits

        return MovingDigits(split)
    path = Path(name).expanduser()
    if path.is_dir():
        return lists.open_kinetics(path, split) if lists.kinetics_lists(path) else open_folder(path, split)
    if path.is_file():
        return lists.open_list(path, split)
    if path.suffix or len(path.parts) > 1:
        raise DataError(
            path, "no such file or folder; give a folder of class folders, or a list of videos with their labels"
        )
    raise UnknownName("data set or path", name, EMBEDDED)


def open_folder(root: Path, split: str) -> Videos:
    """One sub-folder a class. train/ and val/ (or test/) are used where they are; else one video in five is held out."""
    named = {p.name.lower(): p for p in folders(root)}
    held_out = next((named[n] for n in HELD_OUT_NAMES if n in named), None)
    has_split = "train" in named and held_out is not None
    if set(named) == {"train"}:
        root = named["train"]
    reference = named["train"] if has_split else root
    base = (named["train"] if split == "train" else held_out) if has_split else root
    labels = sorted(p.name for p in folders(reference))
    unknown = [p.name for p in folders(base) if p.name not in labels]
    if unknown:
        raise DataError(base / unknown[0], f"this class does not occur in {reference}")
    if not labels:
        raise DataError(root, "no class folders; videos are expected as <folder>/<class>/<video>")
    paths, targets = [], []
    for k, label in enumerate(labels):
        files = videos_in(base / label)
        if not has_split:
            files = [f for i, f in enumerate(shuffled(files, root)) if (i % HELD_OUT == 0) == (split != "train")]
        paths += [str(f) for f in files]
        targets += [k] * len(files)
    if not paths:
        raise DataError(
            base, f"no videos for the split '{split}'; files ending in {', '.join(sorted(SUFFIXES))} are read"
        )
    return Videos(labels, targets, paths)


def videos_in(folder: Path) -> list[Path]:
    """The videos below a folder: files, and folders of pictures."""
    if not folder.is_dir():
        return []
    found = {p for p in folder.rglob("*") if is_video(p)}
    found |= {
        p.parent for p in folder.rglob("*") if is_picture(p) and p.suffix.lower() != ".gif" and p.parent != folder
    }
    return sorted(found)


def is_video(path: Path) -> bool:
    """By its name; "._x.mp4" is macOS's note about x.mp4."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
