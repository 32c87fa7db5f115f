"""Citations from cards: BibTeX and CSL-JSON, as reference managers import them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from paperzoo.catalog import vocabulary
from paperzoo.catalog.cards import Paper

PLACES = {"journal": "journal", "preprint": "journal"}
TYPES = {"journal": "article", "preprint": "misc"}
CSL_TYPES = {"journal": "article-journal", "preprint": "article"}
SPECIAL = str.maketrans({"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$"})
PARTICLES = {"van", "von", "der", "den", "de", "di", "da", "del", "della", "la", "le", "ter", "ten", "dos"}


def key(paper: Paper) -> str:
    """he2015resnet: the first author's family name, the year, the slug."""
    authors = [a for a in paper.card.get("authors") or [] if a != "others"]
    family = split_name(authors[0])[1] if authors else paper.card["name"]
    plain = unicodedata.normalize("NFKD", family).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", plain.lower()) + str(paper.card["year"]) + paper.slug.replace("_", "")


def split_name(name: str) -> tuple[str, str]:
    """(given, family) of "Laurens van der Maaten" -> ("Laurens", "van der Maaten"); organisations are all family."""
    words = name.split()
    if len(words) == 1:
        return "", name
    start = len(words) - 1
    if words[start].rstrip(".").lower() in ("jr", "sr", "ii", "iii") and start > 1:
        start -= 1
    while start > 1 and words[start - 1].lower() in PARTICLES:
        start -= 1
    return " ".join(words[:start]), " ".join(words[start:])


def bibtex(paper: Paper) -> str:
    """A BibTeX entry: @inproceedings, @article or @misc as the venue is; always with the arXiv number if there is one."""
    card = paper.card
    venue = vocabulary.resolve("venues", card["venue"]) if card.get("venue") else None
    kind = TYPES.get(venue.type, "inproceedings") if venue else "misc"
    fields = {
        "title": "{" + card["title"].translate(SPECIAL) + "}",
        "author": " and ".join(bibtex_name(a) for a in card.get("authors") or []),
        "booktitle" if kind == "inproceedings" else "journal": venue.full.translate(SPECIAL) if venue else "",
        "year": str(card["year"]),
        "eprint": card.get("arxiv") or "",
        "archivePrefix": "arXiv" if card.get("arxiv") else "",
        "url": paper.link,
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key(paper)},", *lines, "}"])


def bibtex_name(name: str) -> str:
    given, family = split_name(name)
    if name == "others":
        return name
    if not given and " " not in family:
        return "{" + family.translate(SPECIAL) + "}"
    return f"{family}, {given}".translate(SPECIAL)


def csl(paper: Paper) -> dict[str, Any]:
    """A CSL-JSON item (the format of Zotero, Pandoc and citeproc)."""
    card = paper.card
    venue = vocabulary.resolve("venues", card["venue"]) if card.get("venue") else None
    kind = CSL_TYPES.get(venue.type, "paper-conference") if venue else ("article" if card.get("arxiv") else "webpage")
    item: dict[str, Any] = {
        "id": key(paper),
        "type": kind,
        "title": card["title"],
        "author": [csl_name(a) for a in card.get("authors") or []],
        "issued": {"date-parts": [[card["year"]]]},
        "container-title": venue.full if venue else None,
        "container-title-short": venue.name if venue else None,
        "number": f"arXiv:{card['arxiv']}" if card.get("arxiv") else None,
        "URL": paper.link,
        "abstract": card["summary"],
    }
    return {name: value for name, value in item.items() if value}


def csl_name(name: str) -> dict[str, str]:
    given, family = split_name(name)
    return {"family": family, "given": given} if given else {"literal": "et al." if name == "others" else family}


def bibliography(found: Iterable[Paper], format: str) -> str:
    """Many works in one file: format "bibtex" or "csl"."""
    import json

    if format == "csl":
        return json.dumps([csl(p) for p in found], indent=2, ensure_ascii=False)
    return "\n\n".join(bibtex(p) for p in found)
