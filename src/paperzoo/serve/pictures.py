"""Pictures from requests: bytes of a known format, whose size is read from the header before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from typing import Any

from PIL import Image

from paperzoo.serve.limits import Refused

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Image.MAX_IMAGE_PIXELS = None  # the limit of the service is checked here, before decoding


class Pixels:
    """How many pixels a request may still decode."""

    def __init__(self, limit: int) -> None:
        self.limit, self.left = limit, limit

    def take(self, width: int, height: int) -> None:
        self.left -= width * height
        if self.left < 0:
            raise Refused(f"a picture of {width} x {height} is too large: a request has {self.limit:,} pixels", 413)


def read_picture(content: bytes, pixels: Pixels) -> Image.Image:
    """An encoded picture, decoded.

    Raises:
        Refused: if it is none, broken, cut short or too large.
    """
    if not content:
        raise Refused("the picture is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
            pixels.take(*picture.size)
            picture.load()
    except Refused:
        raise
    except Exception as error:  # decoders raise whatever they like on broken files
        known = ", ".join(FORMATS)
        reason = f"{type(error).__name__}: {str(error)[:120]}" if not isinstance(error, OSError) else str(error)[:120]
        if "cannot identify" in reason:
            reason = f"it is none of {known}"
        raise Refused(f"not a readable picture ({reason})") from None
    return picture


def from_base64(text: Any, pixels: Pixels) -> Image.Image:
    if not isinstance(text, str):
        raise Refused('a picture is {"base64": "…"} with the bytes of its file; paths and addresses are not opened')
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused("the picture's base64 is not valid; paths and addresses are not opened") from None
    return read_picture(content, pixels)


def png(picture: Image.Image) -> bytes:
    kept = picture if picture.mode in ("L", "RGB", "RGBA", "1", "P") else picture.convert("RGB")
    buffer = io.BytesIO()
    kept.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
