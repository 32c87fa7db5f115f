"""What a user may point `predict` at: pictures, folders of them, video files, cameras, streams. Never more than a few in memory.

    sources(["photo.jpg", "holiday/", "film.mp4", "camera:0", "rtsp://…"])

A source yields (name, value): a path for a picture, a uint8 array (H, W, 3) for a frame.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from paperzoo.data.images import SUFFIXES
from paperzoo.errors import DataError, MissingExtra, PaperZooError

VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts"}
ADDRESSES = ("rtsp://", "rtmp://", "http://", "https://", "udp://")
TIMEOUT = 10_000  # milliseconds without a frame after which a camera or a stream is given up

log = logging.getLogger(__name__)


@dataclass
class Source:
    """One thing to predict on.

    Attributes:
        name: as the user wrote it.
        items: yields (name, value), one picture or frame at a time.
        count: how many there are; None where nobody knows.
        rate: frames a second; None for pictures.
        live: frames come as time goes on, so each is answered before the next is taken.
    """

    name: str
    items: Iterator[tuple[str, Any]]
    count: int | None = 1
    rate: float | None = None
    live: bool = False

    @property
    def moving(self) -> bool:
        return self.rate is not None


def sources(inputs: list[str], frames: int | None = None) -> Iterator[Source]:
    """The sources that the inputs name, opened one after the other.

    Args:
        frames: at most so many of each video, camera or stream.

    Raises:
        DataError: for a folder without pictures, or a video, camera or stream that cannot be opened.
        MissingExtra: for moving pictures without OpenCV.
    """
    for text in inputs:
        path = Path(text).expanduser()
        if text == "camera" or text.startswith("camera:"):
            yield camera(text, frames)
        elif text.lower().startswith(ADDRESSES):
            yield moving(text, text, frames, live=True)
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES | VIDEOS and p.is_file())
            pictures = [p for p in found if p.suffix.lower() in SUFFIXES]
            if not found:
                raise DataError(path, f"no pictures here; files ending in {', '.join(sorted(SUFFIXES))} are read")
            if pictures:
                yield Source(text, iter([(str(p), str(p)) for p in pictures]), len(pictures))
            for video in found:
                if video.suffix.lower() in VIDEOS:
                    yield moving(str(video), str(video), frames)
        elif path.suffix.lower() in VIDEOS:
            if not path.is_file():
                raise DataError(path, "no such file")
            yield moving(text, str(path), frames)
        else:
            yield Source(text, iter([(text, text)]))


def camera(text: str, frames: int | None) -> Source:
    """ "camera", or "camera:1" for the second one."""
    number = text.partition(":")[2] or "0"
    if not number.isdigit():
        raise PaperZooError(f"'{text}' is no camera; cameras are camera:0, camera:1, …")
    return moving(text, int(number), frames, live=True)


def opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise MissingExtra("opencv-python-headless", "video", "reading videos and cameras") from None
    return cv2


def moving(name: str, place: str | int, frames: int | None, live: bool = False) -> Source:
    cv2 = opencv()
    before = cv2.getLogLevel() if hasattr(cv2, "getLogLevel") else None
    if before is not None:
        cv2.setLogLevel(0)  # what is wrong is said below, in one line
    reader = cv2.VideoCapture(place)
    if before is not None:
        cv2.setLogLevel(before)
    if not reader.isOpened():
        what = "this camera cannot be opened" if isinstance(place, int) else "not a video that can be read"
        raise DataError(name, f"{what}; is it there, complete, and not in use?")
    rate = float(reader.get(cv2.CAP_PROP_FPS) or 0)
    known = int(reader.get(cv2.CAP_PROP_FRAME_COUNT) or 0)
    count = None if live or known <= 0 else known
    if frames is not None:
        count = frames if count is None else min(count, frames)
    rate = rate if 0 < rate <= 1000 else 25.0  # files that do not say
    return Source(name, frames_of(cv2, reader, name, rate, count, frames, live), count, rate, live)


def frames_of(
    cv2: Any, reader: Any, name: str, rate: float, count: int | None, most: int | None, live: bool
) -> Iterator[tuple[str, numpy.ndarray]]:
    """The frames as RGB, upright; a video that breaks off ends with a warning."""
    number = 0
    try:
        while most is None or number < most:
            there, frame = reader.read()
            if not there:
                break
            moment = f"{time.strftime('%H:%M:%S')}" if live else f"{number / rate:.2f} s"
            yield f"{name}#{number} ({moment})", cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            number += 1
    finally:
        reader.release()
    if number == 0:
        raise DataError(name, "holds no frame that can be read")
    if count is not None and number < count - 1:  # containers count one too many now and then
        log.warning("%s: breaks off after frame %d of %d", name, number, count)


class VideoWriter:
    """Pictures to an .mp4 file. It is there when it is complete: until then it has another name."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate, self.writer, self.count = path, rate, None, 0
        self.part = path.with_name(f".{path.stem}.part{path.suffix}")

    def add(self, picture: Any) -> None:
        """A PIL image; later ones are brought to the size of the first."""
        cv2 = opencv()
        if self.writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.size = (max(2, picture.width // 2 * 2), max(2, picture.height // 2 * 2))  # codecs want even sides
            self.writer = cv2.VideoWriter(str(self.part), cv2.VideoWriter_fourcc(*"mp4v"), self.rate, self.size)
            if not self.writer.isOpened():
                raise DataError(self.path, "this video cannot be written here")
        frame = numpy.asarray(picture.convert("RGB").resize(self.size) if picture.size != self.size else picture)
        self.writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()
            self.part.replace(self.path)
