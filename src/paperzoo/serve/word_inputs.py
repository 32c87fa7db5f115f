"""Inputs that are strings: texts, pairs of them, and the requests of generators."""

from __future__ import annotations

from typing import Any

import numpy as np

from paperzoo.serve.inputs import Kind, Schema, same_count, strings
from paperzoo.serve.limits import Refused
from paperzoo.serve.pictures import Pixels


class Text(Kind):
    name = "text"
    files = ("text/plain",)
    tensors = [("text", "BYTES", [-1])]
    sample = "Return the number of items in the list."

    @property
    def schema(self) -> Schema:
        return {"type": "string", "maxLength": self.limits.text}

    def example(self) -> Any:
        return self.sample

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        return self.text(item)

    def from_file(self, content: bytes, pixels: Pixels) -> list[Any]:
        return [self.decoded(content)]

    def from_form(self, texts: dict[str, list[str]], files: list[bytes], pixels: Pixels) -> list[Any]:
        if set(texts) - {"text"}:
            raise Refused("the form's fields are named text, its files file")
        return [self.text(t) for t in texts.get("text", [])] + [self.decoded(content) for content in files]

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        return [self.decoded(t) for t in strings(tensors, "text")]


class MaskedText(Text):
    sample = "Return the [MASK] of items in the list."


class TextPair(Kind):
    name = "pair of texts"
    tensors = [("text", "BYTES", [-1]), ("second", "BYTES", [-1])]

    @property
    def schema(self) -> Schema:
        text = {"type": "string", "maxLength": self.limits.text}
        return {"type": "array", "items": text, "minItems": 2, "maxItems": 2}

    def example(self) -> Any:
        return ["Return the number of items in the list.", "Count the items."]

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        if not isinstance(item, list) or len(item) != 2:
            raise Refused("an input is a list of two texts")
        return tuple(self.text(t) for t in item)

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        firsts, seconds = ([self.decoded(t) for t in strings(tensors, name)] for name in ("text", "second"))
        return list(zip(firsts, same_count(seconds, firsts), strict=True))


class Asked(Text):
    """A generator: which class, and perhaps a seed."""

    name = "class"
    files = ()
    tensors = [("request", "BYTES", [-1])]

    @property
    def schema(self) -> Schema:
        said = 'A class by its label or number, "*" for any; "label@42" fixes the seed.'
        return {"description": said, "anyOf": [{"type": "string", "maxLength": 200}, {"type": "integer", "minimum": 0}]}

    def example(self) -> Any:
        return f"{self.recipe.facts['labels'][0]}@1"

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        if isinstance(item, int) and not isinstance(item, bool):
            if not 0 <= item < len(self.recipe.facts["labels"]):
                raise Refused(f"there are the classes 0 to {len(self.recipe.facts['labels']) - 1}")
            return item
        text = self.text(item, "a class")
        seed = text.partition("@")[2]
        if len(text) > 200 or (seed and not (seed.isascii() and seed.isdigit() and int(seed[:20]) < 2**63)):
            raise Refused('a class is its label, or "label@seed" with a seed below 2**63')
        return text

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        return [self.from_json(self.decoded(t), pixels) for t in strings(tensors, "request")]


class Named(Text):
    """A recipe whose one picture is what it has learned; another would be learned from the start."""

    name = "name"
    files = ()
    tensors = [("name", "BYTES", [-1])]

    @property
    def schema(self) -> Schema:
        return {"const": str(self.recipe.config.data)}

    def example(self) -> Any:
        return str(self.recipe.config.data)

    def from_json(self, item: Any, pixels: Pixels) -> Any:
        if item != str(self.recipe.config.data):
            raise Refused(f"this network is one restored picture; its name is '{self.recipe.config.data}'")
        return item

    def from_tensors(self, tensors: dict[str, np.ndarray], pixels: Pixels) -> list[Any]:
        return [self.from_json(self.decoded(t), pixels) for t in strings(tensors, "name")]
