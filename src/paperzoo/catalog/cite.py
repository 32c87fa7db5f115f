"""Citations from cards."""

from __future__ import annotations

from paperzoo.catalog.cards import Paper


def bibtex(paper: Paper) -> str:
    """A BibTeX entry: @inproceedings where a venue is known, else @misc; always with the arXiv number if there is one."""
    card = paper.card
    kind = "inproceedings" if card.get("venue") else "misc"
    first = (card.get("authors") or [card["name"]])[0].split()[-1]
    key = (
        "".join(c for c in first if c.isascii() and c.isalnum()).lower()
        + str(card["year"])
        + paper.slug.replace("_", "")
    )
    fields = {
        "title": "{" + card["title"] + "}",
        "author": " and ".join(card.get("authors") or []),
        "booktitle": card.get("venue") or "",
        "year": str(card["year"]),
        "eprint": card.get("arxiv") or "",
        "archivePrefix": "arXiv" if card.get("arxiv") else "",
        "url": paper.link,
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])
