"""Inputs that are numbers: rows of a table, arrays."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np

from paperzoo.data.encoding import GAPS
from paperzoo.serve.inputs import Kind, Schema, kind_of_json, numbers
from paperzoo.serve.limits import MOST_FIELDS, MOST_INPUTS, Refused
from paperzoo.serve.pictures import Pixels


class Row(Kind):
    """A row of a table: column -> number or text; what is left out, or null, is missing."""

    name = "row"
    files = ("text/csv",)

    @property
    def columns(self) -> list[str]:
        return [*self.recipe.encoding.dense, *self.recipe.encoding.sparse]

    @property
    def may_lack(self) -> set[str]:
        return set(self.columns)

    @property
    def tensors(self) -> list[tuple[str, str, list[int]]]:
        encoding = self.recipe.encoding
        return [(n, "FP64", [-1]) for n in encoding.dense] + [(n, "BYTES", [-1]) for n in encoding.sparse]

    @property
    def schema(self) -> Schema:
        encoding = self.recipe.encoding
        text = {"type": ["string", "number", "null"], "maxLength": self.limits.text}
        dense = {name: {"type": ["number", "null"]} for name in encoding.dense}
        return {
            "type": "object",
            "properties": dense | {name: text for name in encoding.sparse},
            "additionalProperties": False,
        }

    def example(self) -> Any:
        encoding = self.recipe.encoding
        row: dict[str, Any] = {name: round(encoding.statistics[name]["mean"], 3) for name in encoding.dense}
        for name in encoding.sparse:
            values = encoding.vocabulary[name]
            row[name] = "1" if isinstance(values, int) or not values else values[0]
        return row

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        if not isinstance(item, dict):
            raise Refused(f"a row is an object of columns and values, not {kind_of_json(item)}")
        return self.checked(item)

    def checked(self, row: dict[Any, Any]) -> dict[str, Any]:
        known, dense = set(self.columns), set(self.recipe.encoding.dense)
        kept: dict[str, Any] = {}
        for name, value in row.items():
            if name not in known:
                near = ", ".join(self.columns[:12])
                raise Refused(f"there is no column '{str(name)[:40]}'; the columns are {near}")
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise Refused(f"'{name}' is {kind_of_json(value)}; a value is a number or a text")
            if isinstance(value, str):
                self.text(value, f"'{name}'")
            elif not (abs(value) <= 1e300 and math.isfinite(float(value))):
                raise Refused(f"'{name}' is not a finite number")
            if name in dense and isinstance(value, str):
                value = self.number(name, value)
            kept[name] = value
        return kept

    def number(self, name: str, value: str) -> Any:
        if value.strip().lower() in GAPS:
            return ""
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise Refused(f"'{name}' is '{value[:40]}', which is no number")
        return found

    def from_file(self, content: bytes, pixels: Pixels) -> list[Any]:
        try:
            text = content.decode("utf-8-sig")
            if "\x00" in text:
                raise Refused("the table has characters that are no text")
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            if len(reader.fieldnames or []) > MOST_FIELDS:
                raise Refused(f"the table has more than {MOST_FIELDS} columns", 413)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise Refused(f"line {reader.line_num} of the table has not as many values as its header")
                if len(rows) == MOST_INPUTS:
                    raise Refused(f"the table has more than {MOST_INPUTS} rows, which is the most of a request", 413)
                rows.append(self.checked(row))
        except (UnicodeDecodeError, csv.Error) as error:
            raise Refused(f"not a readable CSV table ({error})") from None
        return rows

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        columns = {name: values.reshape(-1) for name, values in tensors.items()}
        if len({len(values) for values in columns.values()}) > 1:
            raise Refused("the columns have different numbers of rows")
        plain = {
            name: [self.decoded(v, name) for v in values] if values.dtype == object else values.tolist()
            for name, values in columns.items()
        }
        return [self.checked(dict(zip(plain, row, strict=True))) for row in zip(*plain.values(), strict=True)]


class Numbers(Kind):
    """An array: an observation, the values of a function on a grid, points."""

    name = "array"
    tensors = [("array", "FP32", [-1, -1])]

    @property
    def schema(self) -> Schema:
        return {"type": "array", "description": f"Nested lists of numbers, for example of the shape {self.shape}."}

    @property
    def shape(self) -> list[int]:
        return list(self.recipe.example()[0].shape[1:])

    def example(self) -> Any:
        return np.round(self.recipe.example()[0][0].numpy().astype(np.float64), 4).tolist()

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        return numbers(item)

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        array = tensors["array"]
        if array.dtype == object or array.ndim < 2 or not array.size:
            raise Refused(f"array has the shape {list(array.shape)}; the first dimension counts inputs, none is empty")
        return [row.astype(np.float32) for row in array]
