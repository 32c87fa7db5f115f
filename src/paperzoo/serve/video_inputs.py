"""Inputs that are videos: one short file, decoded from memory a few frames at a time."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import numpy as np

from paperzoo.data.videos import VideoFile, pyav
from paperzoo.errors import DataError
from paperzoo.serve.inputs import Kind, Schema, fields_of
from paperzoo.serve.limits import Refused
from paperzoo.serve.pictures import Pixels

MOST_FRAMES = 600  # of a video
MOST_SECONDS = 60.0
FRAME_PIXELS = 2048 * 1152  # of one frame
FOLD = 16  # a request's videos may have so many times the pixels of its pictures, because few frames are held at a time
LARGEST, FEWEST, EXAMPLE_FRAMES = 448, 32, 8  # pixels and frames of the example

# A container is told by its first bytes and opened as that alone: others, playlists above all, name files to be read.
CONTAINERS = {"mov": "MP4, MOV", "matroska": "MKV, WebM", "avi": "AVI", "gif": "GIF"}
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # that begin a file of the first kind
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "gif")

VIDEO: Schema = {
    "type": "object",
    "description": f"A video of at most {MOST_FRAMES} frames: the bytes of an MP4, MOV, MKV, WebM, AVI or GIF file.",
    "properties": {"base64": {"type": "string", "format": "byte", "minLength": 1}},
    "required": ["base64"],
    "additionalProperties": False,
}


class SentVideo(VideoFile):
    """The bytes of a video file.

    Raises:
        Refused: if it is none, broken, too long or too large; with the first frame it is tried.
    """

    def __init__(self, content: bytes, pixels: Pixels) -> None:
        self.path, self.content, self.format = Path("video"), content, container_of(content)
        try:
            self.check(pixels)
            super().__init__(self.path)
            if self.duration > MOST_SECONDS:
                raise Refused(f"the video takes {self.duration:.0f} s; at most {MOST_SECONDS:.0f}", 413)
            self.frames([0.0])
        except DataError as error:
            raise Refused(f"not a readable video ({str(error).removeprefix('video: ')[:120]})") from None

    def check(self, pixels: Pixels) -> None:
        """What the container says and holds, before anything is decoded."""
        with self.container() as container:
            stream = self.stream(container)
            width, height, count = stream.codec_context.width, stream.codec_context.height, 0
            if not width or not height:
                raise DataError(self.path, "its frames have no size")
            if width * height > FRAME_PIXELS:
                raise Refused(f"frames of {width} x {height} pixels are too large: at most {FRAME_PIXELS:,}", 413)
            try:
                for packet in container.demux(stream):
                    count += packet.size > 0
            except pyav().error.FFmpegError:  # the file breaks off: what came before counts
                pass
        take(pixels, count, width, height)

    def container(self) -> Any:
        av = pyav()
        try:
            return av.open(io.BytesIO(self.content), format=self.format)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            said = str(getattr(error, "strerror", None) or error)
            raise DataError(self.path, f"a damaged {CONTAINERS[self.format]} file: {said[:80]}") from None

    def stream(self, container: Any) -> Any:
        for stream in container.streams.video[:1]:
            codec = stream.codec_context and stream.codec_context.codec.canonical_name
            if codec not in CODECS:
                raise Refused(
                    f"the video's frames are coded as {codec or 'nobody knows what'}, not {', '.join(CODECS)}"
                )
            stream.codec_context.options = {"max_pixels": str(FRAME_PIXELS)}  # whatever the container says
        return super().stream(container)


def container_of(content: bytes) -> str:
    """The container that the first bytes are of, as FFmpeg calls it."""
    if not content:
        raise Refused("the video is empty")
    if content[4:8] in BOXES:
        return "mov"
    if content[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if content[:4] == b"RIFF" and content[8:12] == b"AVI ":
        return "avi"
    if content[:4] == b"GIF8":
        return "gif"
    raise Refused(f"not a readable video (it is none of {', '.join(CONTAINERS.values())})")


def take(pixels: Pixels, frames: int, width: int, height: int) -> None:
    """Count a video's frames to what a request may decode."""
    if frames > MOST_FRAMES:
        raise Refused(f"the video has {frames} frames; at most {MOST_FRAMES}", 413)
    pixels.left -= -(-frames * width * height // FOLD)
    if pixels.left < 0:
        largest = f"a request's videos have {FOLD * pixels.limit:,} pixels"
        raise Refused(f"a video of {frames} frames of {width} x {height} is too large: {largest}", 413)


class ShortVideo(Kind):
    """A short video."""

    name = "video"
    files = ("video/*", "image/gif")
    tensors = [("video", "UINT8", [-1, -1, -1, -1, 3])]

    @property
    def schema(self) -> Schema:
        return VIDEO

    def example(self) -> Any:
        """A bright square that moves, in the sides that the network was built for."""
        height, width = (max(FEWEST, min(LARGEST, n)) for n in self.recipe.example()[0].shape[-2:])
        return {"base64": base64.b64encode(moving_square(height, width)).decode()}

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        text = fields_of(item, {"base64"})["base64"]
        if not isinstance(text, str):
            raise Refused('a video is {"base64": "…"} with the bytes of its file; paths and addresses are not opened')
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise Refused("the video's base64 is not valid; paths and addresses are not opened") from None
        return SentVideo(content, pixels)

    def from_file(self, content: bytes, pixels: Pixels) -> list[Any]:
        return [SentVideo(content, pixels)]

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        """A BYTES tensor of files, or pixels uint8 (N, T, H, W, 3)."""
        tensor = tensors["video"]
        if tensor.dtype == object:
            return [SentVideo(content, pixels) for content in tensor.reshape(-1)]
        if tensor.dtype != np.uint8 or tensor.ndim != 5 or tensor.shape[4] != 3 or 0 in tensor.shape:
            found = f"{list(tensor.shape)} of {tensor.dtype}"
            raise Refused(f"video is {found}; it is UINT8 [N, T, H, W, 3], or BYTES [N] of files")
        for row in tensor:
            take(pixels, *row.shape[:1], row.shape[2], row.shape[1])
        return list(tensor)


def moving_square(height: int, width: int) -> bytes:
    """A small MP4 file in the codec that FFmpeg always has; sides are made even."""
    height, width = height + height % 2, width + width % 2
    buffer = io.BytesIO()
    with pyav().open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(EXAMPLE_FRAMES):
            picture = np.full((height, width, 3), 60, np.uint8)
            left, side = width // 8 + t * width // (4 * EXAMPLE_FRAMES), height // 3
            picture[side : 2 * side, left : left + side] = (230, 190, 40)
            container.mux(stream.encode(pyav().VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
