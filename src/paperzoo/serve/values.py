"""How the pages write values: numbers, sizes, addresses, data for scripts."""

from __future__ import annotations

import json
import re
from typing import Any

from markupsafe import Markup

from paperzoo.catalog import vocabulary
from paperzoo.catalog.cards import Paper
from paperzoo.catalog.vocabulary import Term

UNPUBLISHED = Term("unpublished", "preprints and the web", "预印本与网络", (), {})


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def count(number: int) -> str:
    return f"{number:,}"


def size(number: float | None) -> str:
    """1467610 -> 1.47M"""
    if not number:
        return ""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{letter}"
    return str(number)


def sizes(paper: Paper) -> str:
    """The parameters of a work's smallest and largest model."""
    found = [v["parameters"] for v in paper.variants if v["parameters"]]
    if not found:
        return ""
    low, high = size(min(found)), size(max(found))
    return low if low == high else f"{low}–{high}"


def safe_url(text: str | None) -> str:
    """The address if a page may link to it, else nothing: a card could say `javascript:`."""
    return text if text and re.match(r"https?://", text, re.IGNORECASE) else ""


def area(name: str) -> Term:
    return vocabulary.table("areas").get(name) or Term(name, name.replace("_", " "), "", (), {})


def venue_id(paper: Paper) -> str:
    term = vocabulary.resolve("venues", paper.card["venue"]) if paper.card.get("venue") else None
    return term.id if term else UNPUBLISHED.id


def embed(value: Any) -> Markup:
    """Data for a script, inside of the page; `<` is written so that no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Markup('<script type="application/json">{}</script>').format(Markup(text))
