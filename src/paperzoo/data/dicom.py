"""A DICOM series as one volume: slices in the order of their places in the body, values as the scanner meant them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from paperzoo.errors import DataError, MissingExtra

UNEVEN = 0.1  # share of the slice distance by which distances may differ
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts mm to the patient's left, back and top


def read_series(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A folder that holds one series, or one file: float32 (1, columns, rows, slices) and the affine to mm (right, front, top).

    Slices are sorted along their normal by ImagePositionPatient; stored values become RescaleSlope * value + RescaleIntercept (Hounsfield
    units in CT).

    Raises:
        DataError: if there is none or several series, a slice is missing or twice there, sizes differ, or pixels cannot be decoded.
        MissingExtra: without pydicom.
    """
    headers = _headers(path)
    series = Counter(str(header.get("SeriesInstanceUID", "")) for _, header in headers)
    if len(series) > 1:
        names = {str(h.get("SeriesInstanceUID", "")): str(h.get("SeriesDescription", "")) for _, h in headers}
        told = "; ".join(f"'{names[uid]}' of {n} files" for uid, n in series.most_common(4))
        raise DataError(path, f"holds {len(series)} series ({told}); give a folder with the files of one")
    first_path, first = headers[0]
    for file, header in headers:
        for key in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            if header.get(key) != first.get(key):
                raise DataError(file, f"its {key} is {header.get(key)}, of {first_path.name} it is {first.get(key)}")
    placed, across, down, gap = _places(path, headers)
    slices = [_pixels(file) for file in placed]
    rows, columns = (float(v) for v in first.get("PixelSpacing", (1.0, 1.0)))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * columns, down * rows
    affine[:3, 2] = np.cross(across, down) * gap
    affine[:3, 3] = _position(dict((str(p), h) for p, h in headers)[str(placed[0])], placed[0], alone=len(placed) == 1)
    return np.stack(slices, -1).transpose(1, 0, 2)[None], TO_RAS @ affine


def pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise MissingExtra("pydicom", "medical", "reading DICOM") from None
    return pydicom


def _headers(path: Path) -> list[tuple[Path, Any]]:
    """The image files of a folder with their headers; files of other kinds are passed over."""
    library = pydicom()
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")) if path.is_dir() else [path]
    headers = []
    for file in files:
        try:
            header = library.dcmread(file, stop_before_pixels=True)
        except (library.errors.InvalidDicomError, EOFError, OSError):
            if not path.is_dir() or file.suffix.lower() == ".dcm":
                raise DataError(file, "not a readable DICOM file") from None
            continue
        if "Rows" in header:
            headers.append((file, header))
    if not headers:
        raise DataError(path, "holds no DICOM images; a folder with the files of one series is expected")
    for file, header in headers:
        if int(header.get("NumberOfFrames", 1)) > 1:
            raise DataError(file, "holds several frames in one file, which is not read; convert it to NIfTI (dcm2niix)")
        if int(header.get("SamplesPerPixel", 1)) != 1:
            raise DataError(file, "is a colour picture; a volume has one value a voxel")
    return headers


def _position(header: Any, path: Path, alone: bool) -> np.ndarray:
    position = header.get("ImagePositionPatient")
    if position is None:
        if alone:
            return np.zeros(3)
        raise DataError(path, "has no ImagePositionPatient, so its place among the slices is not known")
    return np.array([float(v) for v in position])


def _places(path: Path, headers: list[tuple[Path, Any]]) -> tuple[list[Path], np.ndarray, np.ndarray, float]:
    """Files from the lowest slice along the normal, the directions along a row and down a column, and the distance of slices in mm."""
    first = headers[0][1]
    directions = [float(v) for v in first.get("ImageOrientationPatient", (1, 0, 0, 0, 1, 0))]
    across, down = np.array(directions[:3]), np.array(directions[3:])
    normal = np.cross(across, down)
    alone = len(headers) == 1
    found = sorted(((float(normal @ _position(h, p, alone)), p) for p, h in headers), key=lambda pair: pair[0])
    files = [p for _, p in found]
    if alone:
        return files, across, down, float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0)
    heights = np.array([height for height, _ in found])
    gaps = np.diff(heights)
    middle = float(np.median(gaps))
    if gaps.min() < 1e-3:
        i = int(gaps.argmin())
        raise DataError(files[i + 1], f"lies at the same place as {files[i].name}; one image a slice is expected")
    uneven = np.abs(gaps - middle) > UNEVEN * middle
    if uneven.any():
        i = int(np.abs(gaps - middle).argmax())
        raise DataError(
            path,
            f"slices are {middle:.3g} mm apart, but {files[i].name} and {files[i + 1].name} {gaps[i]:.3g} mm: is a slice missing?",
        )
    return files, across, down, float(heights[-1] - heights[0]) / (len(heights) - 1)


def _pixels(path: Path) -> np.ndarray:
    """float32 (rows, columns)."""
    try:
        data = pydicom().dcmread(path)
        values = data.pixel_array.astype(np.float32)
    except Exception as error:  # decoders raise whatever they like
        line = " ".join(str(error).split())[:160]
        raise DataError(path, f"its pixels cannot be decoded ({type(error).__name__}: {line})") from None
    values = values * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
    if data.get("PhotometricInterpretation") == "MONOCHROME1":  # large values are dark
        values = values.max() + values.min() - values
    return values
