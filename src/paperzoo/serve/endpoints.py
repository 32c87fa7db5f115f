"""The typed endpoint of a model, /predict/{name}: JSON, a form, or a file as the body; one input or several.

    {"input": …}            -> {"model": …, "result": {…}}
    {"inputs": [… , …]}     -> {"model": …, "results": [{…}, …]}

With ?draw=true each result is drawn on its input, as PNG; with ?brief=true large arrays are described, not given.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from paperzoo.serve.answers import to_json, write_json
from paperzoo.serve.forms import read_form
from paperzoo.serve.inputs import Kind, kind_of_json, parse_json
from paperzoo.serve.limits import MOST_INPUTS, Refused
from paperzoo.serve.pictures import Pixels, png


@dataclass
class Typed:
    """A request that was read: its inputs as `predict` takes them, and how its answer is written."""

    model: str
    values: list[Any]
    single: bool
    draw: bool
    brief: bool

    def answer(self, recipe: Any, results: list[Any]) -> tuple[bytes, dict[str, str]]:
        """The body and more headers."""
        found = [to_json(r, self.brief) for r in results]
        body: dict[str, Any] = {"model": self.model}
        body |= {"result": found[0]} if self.single else {"results": found}
        if self.draw:
            drawn = [recipe.draw(v, r) for v, r in zip(self.values, results, strict=True)]
            urls = [None if p is None else f"data:image/png;base64,{base64.b64encode(png(p)).decode()}" for p in drawn]
            body |= {"picture": urls[0]} if self.single else {"pictures": urls}
        return write_json(body), {}


def read_typed(model: str, kind: Kind, head: dict[str, Any], body: bytes) -> Typed:
    """A request to /predict/{model}.

    Raises:
        Refused: with the status that fits.
    """
    draw, brief = (switch(head["query"], name) for name in ("draw", "brief"))
    pixels = Pixels(kind.limits.pixels)
    given = head.get("type") or "application/json"
    media = given.partition(";")[0].strip().lower()
    if media == "application/json":
        single, items = json_inputs(body)
        values = [kind.from_json(item, pixels) for item in items]
    elif media == "multipart/form-data":
        fields, files = read_form(body, given)
        if sum(map(len, fields.values())) + len(files) > 2 * MOST_INPUTS:
            raise Refused(f"a request has at most {MOST_INPUTS} inputs", 413)
        texts = {name: [kind.decoded(v, f"'{name[:40]}'") for v in parts] for name, parts in fields.items()}
        values = kind.from_form(texts, files, pixels)
        single = len(values) == 1 and "text/csv" not in kind.files
    elif any(media == known or (known.endswith("/*") and media.startswith(known[:-1])) for known in kind.files):
        values = kind.from_file(body, pixels)
        single = "text/csv" not in kind.files
    else:
        known = ", ".join(("application/json", "multipart/form-data", *kind.files))
        raise Refused(f"the content type is '{media[:60]}'; this model takes {known}", 415)
    if not values:
        raise Refused("the request has no input")
    if len(values) > MOST_INPUTS:
        raise Refused(f"the request has {len(values)} inputs; at most {MOST_INPUTS}", 413)
    return Typed(model, values, single, draw, brief)


def json_inputs(body: bytes) -> tuple[bool, list[Any]]:
    data = parse_json(body)
    if not isinstance(data, dict):
        raise Refused(f'the body is {{"input": …}} or {{"inputs": […]}}, not {kind_of_json(data)}')
    if set(data) == {"input"}:
        return True, [data["input"]]
    if set(data) != {"inputs"}:
        raise Refused(f'the body has the key "input" or "inputs", not {", ".join(data)[:100] or "none"}')
    items = data["inputs"]
    if not isinstance(items, list):
        raise Refused(f"inputs is a list, not {kind_of_json(items)}")
    if len(items) > MOST_INPUTS:
        raise Refused(f"the request has {len(items)} inputs; at most {MOST_INPUTS}", 413)
    return False, items


def switch(query: dict[str, str], name: str) -> bool:
    value = query.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise Refused(f"?{name} is true or false")
    return value in ("true", "1")
