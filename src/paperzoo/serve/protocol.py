"""The Open Inference Protocol, version 2, over HTTP, with its binary extension: what Triton's and KServe's clients speak.

A model's inputs are what its task takes ("image" UINT8 [N, H, W, 3] or BYTES [N] of encoded files, "text" BYTES [N], a
tensor for each column of a table, "array" FP32 [N, …]); its outputs are the fields of the task's typed result, each with one row
an input; what has no fixed shape, such as the boxes of a detector, is a JSON text a row (BYTES).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from paperzoo.serve.answers import TYPES, column_types, columns, write_json
from paperzoo.serve.inputs import Kind, kind_of_json, parse_json
from paperzoo.serve.limits import MOST_FIELDS, MOST_INPUTS, Refused
from paperzoo.serve.pictures import Pixels

HEADER = "inference-header-content-length"
MOST_DIMENSIONS = 8


def bad(message: str) -> Refused:
    return Refused(message, 400)


@dataclass
class Inference:
    """A request that was read, and which outputs it wants in which form."""

    model: str
    identity: str | None
    values: list[Any]
    outputs: list[tuple[str, bool]] | None
    binary: bool

    def answer(self, recipe: Any, results: list[Any]) -> tuple[bytes, dict[str, str]]:
        """The body, and the header that says where its binary part begins, if there is one."""
        found = columns(results)
        wanted = self.outputs if self.outputs is not None else [(name, self.binary) for name in found]
        unknown = next((name for name, _ in wanted if name not in found), None)
        if unknown is not None:
            raise bad(f"there is no output '{unknown[:40]}'; there are {', '.join(found)}")
        rows, chunks = [], []
        for name, binary in wanted:
            datatype, array = found[name]
            row: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
            if binary:
                content = packed(array)
                row["parameters"] = {"binary_data_size": len(content)}
                chunks.append(content)
            else:
                row["data"] = in_json(array)
            rows.append(row)
        body: dict[str, Any] = {"model_name": self.model, "model_version": "1", "outputs": rows}
        if self.identity is not None:
            body["id"] = self.identity
        text = write_json(body)
        return (text + b"".join(chunks), {HEADER: str(len(text))}) if chunks else (text, {})


def packed(array: np.ndarray) -> bytes:
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(item)) + item for item in array.reshape(-1))
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()


def in_json(array: np.ndarray) -> list[Any]:
    """The values in row-major order, flat; a BYTES value that is no text is refused; a number that is not finite is null."""
    if array.dtype == object:
        try:
            return [item.decode() for item in array.reshape(-1)]
        except UnicodeDecodeError:
            raise bad("an output holds pictures; ask for it with binary_data") from None
    values = array.reshape(-1).tolist()
    return [v if math.isfinite(v) else None for v in values] if array.dtype.kind == "f" else values


# -- the request -------------------------------------------------------------------------------------------------------


def read_inference(model: str, kind: Kind, head: dict[str, Any], body: bytes) -> Inference:
    """A request to /v2/models/{model}/infer.

    Raises:
        Refused: with the status 400 for what breaks the protocol, else with the one that fits.
    """
    length = head.get("header_length")
    if length is not None and not (length.isascii() and length.isdigit() and int(length[:12]) <= len(body)):
        raise bad("Inference-Header-Content-Length is not the length of the body's JSON")
    split = len(body) if length is None else int(length)
    data, rest = parse_json(body[:split]), body[split:]
    if not isinstance(data, dict) or not isinstance(data.get("inputs"), list):
        raise bad('the body is an object with the list "inputs"')
    if len(data["inputs"]) > MOST_FIELDS:
        raise bad(f"there are more than {MOST_FIELDS} inputs")
    identity = data.get("id")
    if identity is not None and not (isinstance(identity, str) and len(identity) <= 200):
        raise bad("id is a string of at most 200 characters")
    known = {name for name, *_ in kind.tensors}
    tensors: dict[str, np.ndarray] = {}
    for entry in data["inputs"]:
        name, array, rest = read_tensor(entry, rest, kind.limits.body)
        if name not in known or name in tensors:
            raise bad(f"there is no input '{name[:40]}', or it stands twice; the inputs are {', '.join(sorted(known))}")
        tensors[name] = array
    if rest:
        raise bad(f"{len(rest)} bytes follow the last input")
    lacking = known - set(tensors) - set(kind.may_lack)
    if lacking or not tensors:
        raise bad(f"the input '{min(lacking or known)}' is missing")
    counts = {array.shape[0] for array in tensors.values()}
    if max(counts) > MOST_INPUTS:
        raise Refused(f"the request has {max(counts)} inputs; at most {MOST_INPUTS}", 413)
    outputs, binary = wanted_outputs(data)
    values = kind.from_tensors(tensors, Pixels(kind.limits.pixels))
    if not values:
        raise Refused("the request has no input")
    return Inference(model, identity, values, outputs, binary)


def parameters_of(entry: dict[str, Any]) -> dict[str, Any]:
    found = entry.get("parameters", {})
    if not isinstance(found, dict):
        raise bad(f"parameters is an object, not {kind_of_json(found)}")
    refused = {"shared_memory_region", "classification"} & set(found)
    if refused:
        raise bad(f"'{min(refused)}' is not served here")
    return found


def wanted_outputs(data: dict[str, Any]) -> tuple[list[tuple[str, bool]] | None, bool]:
    """(name, whether in binary) of each output; None for all; and the form of those that do not say one."""
    default = flag(parameters_of(data), "binary_data_output")
    if data.get("outputs") is None:
        return None, default
    found: list[tuple[str, bool]] = []
    if not isinstance(data["outputs"], list) or len(data["outputs"]) > MOST_FIELDS:
        raise bad("outputs is a list of objects with a name")
    for entry in data["outputs"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise bad("outputs is a list of objects with a name")
        if entry["name"] in dict(found):
            raise bad(f"the output '{entry['name'][:40]}' stands twice")
        found.append((entry["name"], flag(parameters_of(entry), "binary_data", default)))
    return found or None, default


def flag(parameters: dict[str, Any], name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise bad(f"{name} is true or false")
    return value


def read_tensor(entry: Any, rest: bytes, limit: int) -> tuple[str, np.ndarray, bytes]:
    """One input: its name, its values, and what of the binary part is left."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise bad("an input is an object with name, datatype, shape and data")
    name, datatype, shape = entry["name"], entry.get("datatype"), entry.get("shape")
    called = f"input '{name[:40]}'"
    if datatype not in TYPES and datatype != "BYTES":
        raise bad(f"{called}: the datatype is one of {', '.join(TYPES)} or BYTES")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MOST_DIMENSIONS:
        raise bad(f"{called}: the shape is a list of 1 to {MOST_DIMENSIONS} sizes")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= limit for n in shape):
        raise bad(f"{called}: each size of the shape is a whole number from 1 on")
    count = math.prod(shape)
    if count > limit:
        raise Refused(f"{called}: {count} values are more than a request may hold", 413)
    size = parameters_of(entry).get("binary_data_size")
    if (size is None) == ("data" not in entry):
        raise bad(f"{called}: give its data, or binary_data_size")
    if size is None:
        values = from_json(called, entry["data"], datatype, count)
    else:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
            raise bad(f"{called}: binary_data_size is not the number of its bytes")
        values, rest = from_bytes(called, rest[:size], datatype, count), rest[size:]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise bad(f"{called}: a value is not finite")
    return name, values.reshape(shape), rest


def from_json(called: str, data: Any, datatype: str, count: int) -> np.ndarray:
    if not isinstance(data, list):
        raise bad(f"{called}: data is a list, not {kind_of_json(data)}")
    flat = flatten(data)
    if len(flat) != count:
        raise bad(f"{called}: the shape has {count} values, data has {len(flat)}")
    if datatype == "BYTES":
        if not all(isinstance(v, str) for v in flat):
            raise bad(f"{called}: the values of BYTES are strings")
        column = np.empty(count, object)
        column[:] = [v.encode("utf-8", "surrogatepass") for v in flat]
        return column
    kinds = {"B": (bool,), "F": (int, float)}.get(datatype[0], (int,))
    if not all(isinstance(v, kinds) and (datatype == "BOOL" or not isinstance(v, bool)) for v in flat):
        raise bad(f"{called}: a value is no {datatype}")
    try:
        return np.array(flat, TYPES[datatype])
    except (OverflowError, ValueError):
        raise bad(f"{called}: a value is out of the range of {datatype}") from None


def flatten(data: list[Any], depth: int = 1) -> list[Any]:
    """Nested lists in row-major order."""
    if not any(isinstance(v, list) for v in data):
        return data
    if depth > MOST_DIMENSIONS or not all(isinstance(v, list) for v in data):
        raise bad("data is a flat list, or nested as its shape")
    return [v for part in data for v in flatten(part, depth + 1)]


def from_bytes(called: str, content: bytes, datatype: str, count: int) -> np.ndarray:
    if datatype != "BYTES":
        dtype = np.dtype(TYPES[datatype])
        if len(content) != count * dtype.itemsize:
            raise bad(f"{called}: {count} values of {datatype} are {count * dtype.itemsize} bytes, not {len(content)}")
        if datatype == "BOOL" and any(b > 1 for b in content):
            raise bad(f"{called}: a BOOL is 0 or 1")
        return np.frombuffer(content, dtype)
    column, at = np.empty(count, object), 0
    for i in range(count):
        size = struct.unpack_from("<I", content, at)[0] if at + 4 <= len(content) else len(content)
        at += 4 + size
        if at > len(content):
            raise bad(f"{called}: its bytes end within value {i}")
        column[i] = content[at - size : at]
    if at != len(content):
        raise bad(f"{called}: {len(content) - at} bytes are left over")
    return column


# -- descriptions ------------------------------------------------------------------------------------------------------


def metadata(model: str, kind: Kind, result: Any) -> dict[str, Any]:
    """What GET /v2/models/{model} answers; `result` is one answer of the model."""
    names = column_types(type(result))
    outputs = []
    for name, kind_of_column in names.items():
        value = getattr(result, name, None)
        shape = {"table": [-1, len(value) if isinstance(value, dict) else -1]}.get(kind_of_column, [-1])
        datatype = {"table": "FP32", "JSON": "BYTES", "PNG": "BYTES"}.get(kind_of_column, kind_of_column)
        if kind_of_column == "array":
            found = columns([result])[name]
            datatype, shape = found[0], [-1] * found[1].ndim
        outputs.append({"name": name, "datatype": datatype, "shape": shape})
    inputs = [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in kind.tensors]
    return {"name": model, "versions": ["1"], "platform": "paperzoo", "inputs": inputs, "outputs": outputs}
