"""Aerial and satellite pictures as files: any number of bands, 8 or 16 bits or floating point, with their place on the map.

`read_bands` reads what Pillow and tifffile (which comes with scikit-image) read; what is left (JPEG 2000, ERDAS, some compressions of
GeoTIFF) needs rasterio, the extra `geo`. The georeference of a GeoTIFF is a handful of tags; `write_mask` copies them to what it writes,
so that a map drawn here lies where the picture lay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from paperzoo.errors import DataError, MissingExtra

TIFF = {".tif", ".tiff"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".jp2", ".img", ".vrt"} | TIFF
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GeoDoubleParams, GeoAsciiParams (the GeoTIFF standard, OGC 19-008)."""
NODATA = 42113  # GDAL's tag for the value that means "no data"


def read_bands(path: str | Path) -> Tensor:
    """A picture as (C, H, W): uint8 as stored, 16-bit values divided by 65535 as float32, floating-point values as float32.

    A picture with 16 bits may use few of them; a task that measures mean and deviation makes up for it. Palettes become RGB; the
    transparency of a PNG is dropped, a fourth band of a TIFF is kept. Pixels without a finite value are 0.

    Raises:
        DataError: if the file is missing, broken, or no picture.
        MissingExtra: if only rasterio could read it.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(path, "this is a folder; an image file is needed")
    if not path.is_file():
        raise DataError(path, "no such file")
    try:
        values = _by_tifffile(path) if path.suffix.lower() in TIFF else _by_pillow(path)
    except Exception as error:  # decoders raise whatever they like on what they do not know or what is broken
        values = _by_rasterio(path, error)
    if values.ndim != 3 or 0 in values.shape:
        raise DataError(path, f"holds an array of the shape {values.shape}; a picture has rows, columns and bands")
    if values.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(values))
    if values.dtype == np.bool_:
        return torch.from_numpy(values.astype(np.uint8) * 255)
    top = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    return torch.from_numpy(np.nan_to_num(values.astype(np.float32) / top, posinf=0.0, neginf=0.0))


def _by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        picture.load()
        if picture.mode in ("P", "RGBA", "PA", "CMYK", "YCbCr", "HSV", "LAB"):
            picture = picture.convert("RGB")
        elif picture.mode == "LA":
            picture = picture.convert("L")
        array = np.array(picture)
    if array.dtype == np.int32:  # Pillow's way to hold 16 bits
        array = array.clip(0, 65535).astype(np.uint16)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _by_tifffile(path: Path) -> np.ndarray:
    """The file's first picture; bands may be stored side by side in each pixel, or one plane after the other."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        if file.pages[0].photometric == tifffile.PHOTOMETRIC.PALETTE:
            return _by_pillow(path)
        array, axes = series.asarray(), series.axes
    if axes == "YX":
        return array[None]
    if len(axes) == 3 and axes.endswith("YX"):
        return array
    if len(axes) == 3 and axes.startswith("YX"):
        return array.transpose(2, 0, 1)
    raise ValueError(f"its axes are {axes}")


def _by_rasterio(path: Path, before: Exception) -> np.ndarray:
    try:
        import rasterio
    except ImportError:
        if _broken(path):
            raise DataError(
                path, f"not a readable image ({type(before).__name__}: {str(before)[:100]}); is the file complete?"
            ) from None
        raise MissingExtra("rasterio", "geo", f"reading {path}") from None
    try:
        with rasterio.open(path) as file:
            return file.read()
    except rasterio.errors.RasterioError as error:
        raise DataError(path, f"not a readable image ({str(error)[:120]})") from None


def _broken(path: Path) -> bool:
    """Whether a file is none of a raster format's, or cut short: then another reader would be no help."""
    if path.suffix.lower() not in TIFF:
        return path.suffix.lower() not in {".jp2", ".img", ".vrt"}
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page, length = file.pages[0], path.stat().st_size
            ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
            return not ends or max(ends) > length
    except Exception:
        return True


# -- the place on the map ------------------------------------------------------------------------------------------------


def georeference(path: str | Path) -> dict[int, Any]:
    """The tags of a GeoTIFF that say where it lies: empty for other pictures, and where there are none."""
    if Path(path).suffix.lower() not in TIFF:
        return {}
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            tags = file.pages[0].tags
            return {code: tags[code].value for code in GEO_TAGS if code in tags}
    except (OSError, tifffile.TiffFileError, ValueError) as error:
        raise DataError(path, f"not a readable TIFF ({type(error).__name__}: {str(error)[:100]})") from None


def write_mask(path: str | Path, mask: Tensor, like: str | Path | None = None, scale: int = 1) -> Path:
    """Class ids (H, W), 0 … 255, as an 8-bit picture; a GeoTIFF where `like` is one and `path` ends in .tif.

    Args:
        like: the picture that the mask belongs to; its georeference is copied.
        scale: ids are multiplied by this: 255 makes a black-and-white picture of two classes.

    Raises:
        DataError: if the file cannot be written.
    """
    path = Path(path)
    picture = Image.fromarray((mask.to(torch.int64) * scale).clamp(0, 255).to(torch.uint8).cpu().numpy())
    options: dict[str, Any] = {}
    if path.suffix.lower() in TIFF:
        options["compression"] = "tiff_adobe_deflate"
        tags = georeference(like) if like is not None else {}
        if tags:
            options["tiffinfo"] = _tags_of(tags)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)
    except (OSError, ValueError) as error:
        raise DataError(path, f"cannot be written ({error})") from None
    return path


def _tags_of(tags: dict[int, Any]) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Tags as Pillow writes them; numbers keep the types that the GeoTIFF standard gives them."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for code, value in tags.items():
        kind = 2 if code == 34737 else 3 if code == 34735 else 12  # text, 16-bit numbers, doubles
        directory.tagtype[code] = kind
        directory[code] = value if isinstance(value, str) else tuple(np.atleast_1d(value).tolist())
    return directory


def write_bands(path: str | Path, picture: Tensor) -> Path:
    """A picture (C, H, W), uint8 or floating point, as PNG (uint8, 1 or 3 bands) or TIFF (any).

    Raises:
        DataError: if the file cannot be written.
    """
    path, array = Path(path), picture.permute(1, 2, 0).cpu().contiguous().numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in TIFF:
            import tifffile

            photometric = "rgb" if array.shape[2] in (3, 4) and array.dtype == np.uint8 else "minisblack"
            tifffile.imwrite(path, array, photometric=photometric, planarconfig="contig", metadata=None)
        else:
            Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(path, f"cannot be written ({error})") from None
    return path
