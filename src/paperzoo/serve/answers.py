"""Typed results as JSON, and as the tensors of the Open Inference Protocol."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import types
import typing
from typing import Any

import numpy as np
from PIL import Image

from paperzoo.serve.limits import Refused
from paperzoo.serve.pictures import png
from paperzoo.terminal import plain

SMALL = 256  # values of an array that are written as numbers, as `paperzoo predict --json` does


def to_json(value: Any, brief: bool = False) -> Any:
    """A result as JSON values; a number that is not finite becomes null.

    Larger arrays are {"shape", "type", "base64"}, their bytes little-endian in C order, whole numbers in the smallest type
    that holds them; pictures are {"picture": [width, height], "png"}. With `brief` both are described, not given.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name), brief) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v, brief) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v, brief) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not brief and is_array(value) and np.prod(value.shape, dtype=np.int64) > SMALL:
        array = narrow(np.asarray(value))
        content = base64.b64encode(array.tobytes()).decode()
        return {"shape": list(array.shape), "type": str(array.dtype), "base64": content}
    if not brief and isinstance(value, Image.Image):
        return {"picture": list(value.size), "png": base64.b64encode(png(value)).decode()}
    found = plain(value)
    return to_json(found, brief) if isinstance(found, list | dict | float) else scalar(found)


def scalar(value: Any) -> Any:
    if value is None or isinstance(value, str | int | bool):
        return value
    return to_json(value.item()) if hasattr(value, "item") else str(value)


def is_array(value: Any) -> bool:
    return hasattr(value, "tolist") and hasattr(value, "shape")


def narrow(array: np.ndarray) -> np.ndarray:
    """Little-endian; integers in the smallest type that holds them."""
    if array.dtype.kind in "iu" and array.size:
        low, high = int(array.min()), int(array.max())
        codes = ("u1", "u2", "u4", "u8") if low >= 0 else ("i1", "i2", "i4", "i8")
        array = array.astype(next(c for c in codes if np.iinfo(c).min <= low and high <= np.iinfo(c).max))
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))


def write_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def schema_of(value: Any) -> dict[str, Any]:
    """A JSON schema that this answer, and others of its kind, obey: names and types, without bounds."""
    if isinstance(value, dict):
        if "base64" in value or "shape" in value or "picture" in value:
            return {"type": "object"}
        return {"type": "object", "properties": {str(k): schema_of(v) for k, v in value.items()}}
    if isinstance(value, list):
        return {"type": "array"}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer"}
    if isinstance(value, float):
        return {"type": ["number", "null"]}
    return {"type": ["string", "null"]} if isinstance(value, str) else {}


# -- columns -----------------------------------------------------------------------------------------------------------

TYPES = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
VECTORS = {"FaceEmbedding.embedding", "Representation.values", "Decision.values"}  # lists that are always of one length
NAMES = {np.dtype(code): name for name, code in TYPES.items()}


def column_types(result_type: type) -> dict[str, str]:
    """How the fields of a result are given as tensors.

    Their datatype; "array" as it comes; "table" for the probabilities of all classes; "PNG", or "JSON" for one text each.
    """
    if not dataclasses.is_dataclass(result_type):
        return {"result": "JSON"}
    hints = typing.get_type_hints(result_type)
    return {
        f.name: column_type(f"{result_type.__name__}.{f.name}", hints[f.name]) for f in dataclasses.fields(result_type)
    }


def column_type(name: str, hint: Any) -> str:
    simple = {bool: "BOOL", int: "INT64", float: "FP32", str: "BYTES"}
    if hint in simple:
        return simple[hint]
    if name in VECTORS:
        return "array"
    if name.endswith(".probabilities") and typing.get_origin(hint) is dict:
        return "table"
    if isinstance(hint, types.UnionType) or not isinstance(hint, type):
        return "JSON"
    if hint.__name__ in ("Tensor", "ndarray"):
        return "array"
    return "PNG" if hint.__name__ == "Image" else "JSON"


def columns(results: list[Any]) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (datatype, array with one row for each result). BYTES arrays hold `bytes`.

    Raises:
        Refused: where maps of different sizes would have to be one tensor.
    """
    found: dict[str, tuple[str, np.ndarray]] = {}
    if len({type(r) for r in results}) > 1:
        raise Refused("the inputs have answers of different kinds; send them one at a time")
    for name, kind in column_types(type(results[0])).items():
        values = [getattr(r, name) if dataclasses.is_dataclass(r) else r for r in results]
        if kind == "table":
            found[name] = "FP32", np.array([list(v.values()) for v in values], np.float32)
        elif kind in TYPES:
            found[name] = kind, np.array(values, TYPES[kind])
        elif kind == "array":
            arrays = [np.asarray(v, np.float32 if isinstance(v, list) else None) for v in values]
            if len({a.shape for a in arrays}) > 1:
                raise Refused(f"'{name}' has another shape for each input; send inputs of one size, or one at a time")
            stacked = np.stack(arrays)
            found[name] = NAMES.get(stacked.dtype.newbyteorder("<"), "FP32"), stacked
        else:
            found[name] = "BYTES", byte_column(values, kind)
    return found


def byte_column(values: list[Any], kind: str) -> np.ndarray:
    column = np.empty(len(values), object)
    for i, value in enumerate(values):
        if kind == "BYTES":
            column[i] = value.encode("utf-8", "replace")
        else:
            column[i] = png(value) if kind == "PNG" else write_json(to_json(value))
    return column
