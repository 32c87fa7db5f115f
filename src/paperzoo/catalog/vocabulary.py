"""The catalogue's own words: areas, tasks, methods, metrics, data sets and venues, each with one name and every other spelling.

They live as tables in the folder `vocabulary/`. Cards name tasks and methods by id, metrics and data sets as the field spells
them; the tables say which spellings mean the same.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "vocabulary"
TABLES = ("areas", "tasks", "methods", "metrics", "datasets", "venues")


@dataclass(frozen=True)
class Term:
    """One entry of a table: its id, English and Chinese name, other spellings, and what else its table says of it."""

    id: str
    name: str
    zh: str
    words: tuple[str, ...]
    facts: dict[str, Any] = field(hash=False)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        return self.facts.get(key)

    @property
    def spellings(self) -> list[str]:
        return [self.name, *([self.zh] if self.zh else []), *self.words, *self.facts.get("splits", {})]


@functools.cache
def table(name: str) -> dict[str, Term]:
    """One of TABLES: id -> term."""
    rows = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    return {
        key: Term(key, row.get("name", key.replace("_", " ")), row.get("zh", ""), tuple(row.get("words", ())), row)
        for key, row in rows.items()
    }


def spelled(text: str) -> str:
    """A spelling as it is compared: case, blanks and hyphens do not matter."""
    return " ".join(text.casefold().replace("-", " ").replace("_", " ").split())


@functools.cache
def spellings(name: str) -> dict[str, str]:
    """Every spelling of a table -> id. Where two entries share a spelling (tasks may), the first one has it."""
    found: dict[str, str] = {}
    for term in table(name).values():
        found.setdefault(spelled(term.id), term.id)
    for term in table(name).values():
        for word in term.spellings:
            found.setdefault(spelled(word), term.id)
    return found


def resolve(name: str, text: str) -> Term | None:
    """The term of a table with this id, name or other spelling; None when there is none."""
    key = spellings(name).get(spelled(text))
    return table(name)[key] if key else None
