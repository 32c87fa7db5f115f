"""Picture files with all that is in them: 8 or 16 bits, grey or colour, transparency, the right way up. Read and written.

Pixels are uint8 or uint16 (C, H, W); C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha).
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from paperzoo.errors import DataError, PaperZooError

PNG = b"\x89PNG\r\n\x1a\n"
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
GREY = (0.2989, 0.5870, 0.1140)  # of red, green, blue: MATLAB's rgb2gray


def read_pixels(path: str | Path) -> Tensor:
    """A picture file as uint8 or uint16 (C, H, W), turned upright by its EXIF tag. Palettes become RGB or RGBA.

    Raises:
        DataError: if the file is missing, is no picture, or is cut short.
    """
    try:
        return turned(*decoded(Path(path)))
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except IsADirectoryError:
        raise DataError(path, "this is a folder; an image file is needed") from None
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DataError(path, f"not a readable image ({type(error).__name__}: {str(error)[:120]})") from None


def decoded(path: Path) -> tuple[Tensor, int]:
    """Pixels as they are stored, and the EXIF orientation, 1 … 8."""
    data = path.read_bytes()
    if data[:8] == PNG and data[24:25] == b"\x10":  # Pillow would make 8 bits of 16
        from torchvision.io import ImageReadMode, decode_png

        with Image.open(path) as image:
            orientation = image.getexif().get(0x0112, 1)
        return decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED), orientation
    if data[:4] in (b"II*\0", b"MM\0*"):
        import tifffile

        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            if page.dtype == np.uint16 and page.photometric in (0, 1, 2) and len(page.shape) in (2, 3):
                array = page.asarray()
                if array.ndim == 3 and page.planarconfig == 2:
                    array = np.moveaxis(array, 0, -1)
                array = 65535 - array if page.photometric == 0 else array
                tag = page.tags.get("Orientation")
                return from_array(array), int(tag.value) if tag else 1
    with Image.open(path) as image:
        image.load()
        return from_pil(image), image.getexif().get(0x0112, 1)


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image as pixels, not turned."""
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        largest = values.max(initial=0)
        if image.mode == "F":
            return from_array((values / max(1.0, largest) * 65535).clip(0, 65535).round().astype(np.uint16))
        wide = image.mode.startswith("I;16") or largest > 255  # "I" is how Pillow holds 16 bits, too
        return from_array(values.clip(0, 65535).astype(np.uint16 if wide else np.uint8))
    clear = image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if clear else "L") if grey else ("RGBA" if clear else "RGB")
    return from_array(np.asarray(image.convert(mode)))


def from_array(array: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) as (C, H, W)."""
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] not in MODES:
        raise ValueError(f"{array.shape[2]} channels; grey or RGB, with or without alpha, is needed")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Pixels turned and mirrored as an EXIF orientation, 1 … 8, says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    if flips:  # torch cannot flip uint16
        return torch.from_numpy(np.ascontiguousarray(np.flip(pixels.numpy(), flips)))
    return pixels.contiguous()


def to_pixels(value: Any) -> Tensor:
    """Whatever a user may call a picture, as uint8 or uint16 (C, H, W).

    A path, a PIL image, or an array or tensor (H, W), (H, W, 1 … 4) or (1 | 3 | 4, H, W): uint8, uint16, or floating point in [0, 1] (which becomes
    16 bits).

    Raises:
        DataError: for a file that cannot be read. PaperZooError: for anything else, saying what it was.
    """
    if isinstance(value, str | Path):
        return read_pixels(value)
    if isinstance(value, Image.Image):
        return turned(from_pil(value), value.getexif().get(0x0112, 1))
    if not isinstance(value, Tensor | np.ndarray):
        raise PaperZooError(f"a picture is a path, a PIL image, an array or a tensor, not {type(value).__name__}")
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and isinstance(value, Tensor):
        array = np.moveaxis(value.detach().cpu().numpy(), 0, -1)
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in MODES):
        raise PaperZooError(f"a picture has the shape (H, W), (H, W, 1 … 4) or (1 | 3 | 4, H, W), not {value.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
            raise PaperZooError("a floating-point picture has values in [0, 1]; scale it, or pass uint8 or uint16")
        array = (array.clip(0, 1) * 65535).round().astype(np.uint16)
    if array.dtype not in (np.uint8, np.uint16):
        raise PaperZooError(f"a picture is uint8, uint16 or floating point, not {array.dtype}")
    return from_array(array)


def as_float(pixels: Tensor) -> Tensor:
    """uint8 or uint16 to float32 in [0, 1]."""
    return pixels.float() / (255 if pixels.dtype == torch.uint8 else 65535)


def as_pixels(image: Tensor, bits: int) -> Tensor:
    """float in [0, 1] to uint8 or uint16, clipped and rounded."""
    top = 255 if bits == 8 else 65535
    return image.clamp(0, 1).mul(top).round().to(torch.uint8 if bits == 8 else torch.uint16)


def with_channels(image: Tensor, channels: int) -> Tensor:
    """float (1 … 4, H, W) as so many channels: alpha is left away, grey repeated, colour made grey; 4 must be there.

    Raises:
        PaperZooError: if four channels are wanted of a picture that has fewer.
    """
    have = image.shape[0]
    if channels == 4:
        if have != 4:
            raise PaperZooError(f"four channels are needed, the picture has {have}")
        return image
    colour = image[: 1 if have <= 2 else 3]
    if channels == 1 and len(colour) == 3:
        return (colour * torch.tensor(GREY).view(3, 1, 1)).sum(0, keepdim=True) / sum(GREY)
    return colour.expand(channels, -1, -1)


def to_pil(pixels: Tensor) -> Image.Image:
    """Pixels as a PIL image; 16 bits stay where they are grey without alpha, else the upper 8 of them are shown (Pillow has no more)."""
    array = np.moveaxis(pixels.numpy(), 0, -1)
    if array.dtype == np.uint16:
        if array.shape[2] == 1:
            return Image.fromarray(np.ascontiguousarray(array[..., 0]))
        array = np.rint(array / 257).astype(np.uint8)
    array = np.ascontiguousarray(array)
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def save_pixels(path: str | Path, pixels: Tensor) -> None:
    """Write pixels to a file whose name ends in .png, .tif or .tiff (8 or 16 bits), or anything that Pillow writes (8 bits).

    Raises:
        PaperZooError: if the format has no room for 16 bits or alpha, or is not known.
    """
    path, kind = Path(path), Path(path).suffix.lower()
    if pixels.dtype == torch.uint16 and kind == ".png":
        path.write_bytes(png_of(pixels))
        return
    if pixels.dtype == torch.uint16 and kind in (".tif", ".tiff"):
        import tifffile

        array = np.moveaxis(pixels.numpy(), 0, -1)
        extra = ["unassalpha"] if len(pixels) in (2, 4) else None
        colour = "rgb" if len(pixels) >= 3 else "minisblack"
        array = array[..., 0] if len(pixels) == 1 else array
        tifffile.imwrite(path, array, photometric=colour, extrasamples=extra)
        return
    if pixels.dtype == torch.uint16:
        raise PaperZooError(f"{path}: this format has 8 bits, the picture 16; write .png or .tif")
    try:
        to_pil(pixels).save(path)
    except (ValueError, OSError, KeyError) as error:
        raise PaperZooError(f"{path}: cannot be written ({str(error)[:120]})") from None


def png_of(pixels: Tensor) -> bytes:
    """A 16-bit PNG file of uint16 (C, H, W): Pillow writes those for grey alone."""
    channels, height, width = pixels.shape
    rows = np.moveaxis(pixels.numpy(), 0, -1).astype(">u2").reshape(height, -1).view(np.uint8)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.hstack(
        [np.full((height, 1), 2, np.uint8), rows - above]
    )  # each row as its difference to the one above
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b""))
    return PNG + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
