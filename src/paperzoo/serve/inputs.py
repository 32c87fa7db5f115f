"""What a model takes, by its task: how an input is written in JSON, sent as a file, and given as tensors.

Everything a request brings becomes a picture, a text, a row or an array here. A string is only ever a text: where a task
would read a path from one, strings are refused, so no request reaches the file system.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np

from paperzoo.serve.limits import Limits, Refused
from paperzoo.serve.pictures import Pixels

Schema = dict[str, Any]


def fields_of(item: Any, needed: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:
    wanted = " and ".join(sorted(needed))
    if not isinstance(item, dict):
        raise Refused(f"an input is an object with {wanted}, not {kind_of_json(item)}")
    if not needed <= item.keys() <= needed | optional:
        raise Refused(f"an input has the keys {', '.join(sorted(needed | optional))}, not {', '.join(item)[:100]}")
    return item


def kind_of_json(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class Kind:
    """One way to be asked. `limits` and the recipe are there; an instance is made once for a model."""

    name: ClassVar[str]  # what the page shows an editor for
    files: ClassVar[tuple[str, ...]] = ()  # media types of a file that is an input, or several
    tensors: ClassVar[list[tuple[str, str, list[int]]]] = []  # inputs of the Open Inference Protocol: name, type, shape
    may_lack: ClassVar[set[str]] = set()  # those of them that may be left out

    def __init__(self, recipe: Any, limits: Limits) -> None:
        self.recipe, self.limits = recipe, limits

    @property
    def schema(self) -> Schema:
        raise NotImplementedError

    def example(self) -> Any:
        """An input in JSON."""
        raise NotImplementedError

    def warm_up(self) -> Any:
        """An input as `predict` takes it, of the size that the network was built for."""
        return self.from_json(self.example(), Pixels(self.limits.pixels))

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        raise NotImplementedError

    def from_file(self, content: bytes, pixels: Pixels) -> list[Any]:
        raise Refused(f"this model takes {self.name}s as JSON, not files", 415)

    def from_form(self, texts: dict[str, list[str]], files: list[bytes], pixels: Pixels) -> list[Any]:
        """The inputs of a form: its files, or its fields."""
        if texts:
            raise Refused(f"the form has the field '{next(iter(texts))[:40]}'; this model takes files, named file")
        return [value for content in files for value in self.from_file(content, pixels)]

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        """The inputs of a v2 request; BYTES tensors hold `bytes`."""
        raise NotImplementedError

    def text(self, value: Any, what: str = "a text") -> str:
        if not isinstance(value, str):
            raise Refused(f"{what} is a string, not {kind_of_json(value)}")
        if len(value) > self.limits.text:
            raise Refused(f"{what} has {len(value)} characters; at most {self.limits.text}", 413)
        if "\x00" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise Refused(f"{what} has characters that are no text")
        return value

    def decoded(self, content: bytes, what: str = "a text") -> str:
        try:
            return self.text(content.decode("utf-8-sig"), what)
        except UnicodeDecodeError:
            raise Refused(f"{what} is not UTF-8") from None


def numbers(value: Any) -> np.ndarray:
    """Nested lists as float32.

    Raises:
        Refused: if they are ragged, empty, no numbers, or not finite.
    """
    if isinstance(value, bool | str | dict | type(None)):
        raise Refused(f"an array is nested lists of numbers, not {kind_of_json(value)}")
    try:
        raw = np.asarray(value)
        if raw.dtype.kind not in "iuf":
            raise ValueError
        with np.errstate(over="ignore"):
            array = raw.astype(np.float32)
    except (ValueError, TypeError, OverflowError):
        raise Refused("an array is nested lists of numbers, with rows of equal length") from None
    if not array.size or not np.isfinite(array).all():
        raise Refused("an array is not empty, and all its numbers are finite")
    return array


def strings(tensors: dict[str, np.ndarray], name: str) -> list[bytes]:
    if tensors[name].dtype != object:
        raise Refused(f"the input '{name}' has the datatype BYTES")
    return list(tensors[name].reshape(-1))


def same_count(values: Any, others: list) -> Any:
    if len(values) != len(others):
        raise Refused(f"the inputs have different counts: {len(others)} and {len(values)}")
    return values


def parse_json(content: bytes) -> Any:
    """JSON without its extensions: no NaN, no infinity.

    Raises:
        Refused: saying what is wrong.
    """

    def refuse(name: str) -> Any:
        raise Refused(f"{name} is not JSON", 400)

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        short = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise Refused(f"the body is not JSON ({short})", 400) from None
