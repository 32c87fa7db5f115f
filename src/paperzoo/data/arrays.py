"""Arrays on disk: generated sets kept in the user's cache directory, MATLAB files of both formats, plain files."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from paperzoo.catalog.cards import cache_folder
from paperzoo.errors import DataError


def cached_arrays(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays `make` returns, from the cache if they were made before.

    The file appears in one piece, so a run that is killed leaves none that is half written, and processes that make the
    same set at the same time do not disturb each other. A cached file that cannot be read is made anew. A folder that
    cannot be written to costs the time of making the set again, not the run.
    """
    path = cache_folder() / f"{name}.npz"
    try:
        with np.load(path) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = make()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".partial", delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return arrays


def read_mat(path: Path, fields: Sequence[str]) -> dict[str, np.ndarray]:
    """Fields of a MATLAB file: version 5 by SciPy; version 7.3, which is HDF5 with the axes reversed, by h5py.

    Raises:
        DataError: if the file cannot be read or lacks a field; names the fields that it has.
    """
    import scipy.io

    if not path.is_file():
        raise DataError(path, "there is no such file")
    try:
        stored = scipy.io.loadmat(path)
    except NotImplementedError:
        stored = _read_hdf5(path)
    except Exception as error:  # SciPy's reader fails on damaged files in many ways
        raise DataError(path, f"not a MATLAB file ({error})") from None
    names = sorted(name for name in stored if not name.startswith("__"))
    for field in fields:
        if field not in stored:
            raise DataError(path, f"there is no field '{field}'; it has {', '.join(names)}")
    return {field: np.asarray(stored[field]) for field in fields}


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError:
        from paperzoo.errors import MissingExtra

        raise MissingExtra("h5py", "science", f"reading the MATLAB 7.3 file {path}") from None
    try:
        with h5py.File(path, "r") as file:
            return {name: np.asarray(item).T for name, item in file.items() if isinstance(item, h5py.Dataset)}
    except OSError as error:
        raise DataError(path, f"not a MATLAB file ({error})") from None


def read_array(path: str | os.PathLike) -> np.ndarray:
    """The numbers in a .npy, .csv or .txt file.

    Raises:
        DataError: for another ending, or if the file does not hold plain numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(path, "there is no such file")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix in (".csv", ".txt"):
            return np.loadtxt(path, delimiter="," if path.suffix == ".csv" else None)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(path, f"no plain array of numbers ({error})") from None
    raise DataError(path, "its ending is not known; use .npy, .csv or .txt")
