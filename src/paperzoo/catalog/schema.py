"""What a card may say, checked by pydantic: `paperzoo verify` and the tests use it, reading a card does not."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from paperzoo.catalog import vocabulary
from paperzoo.catalog.cards import Paper, read_card
from paperzoo.errors import PaperZooError

LADDER = ("builds", "matches", "learns", "deploys", "reproduces")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", str_min_length=1)


class Headline(Strict):
    """One published result. `unconfirmed` marks a figure that was not found in the work or its code when it was looked for."""

    dataset: str
    metric: str
    value: str
    setting: str = Field(default="", min_length=0)
    unconfirmed: bool = False


class Variant(Strict):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    parameters: int = Field(ge=0)
    source: str
    input: list[int] | None = None
    arguments: dict | None = None  # for variants that need sizes: what the stated parameter count was taken with


class Expect(Strict):
    """What the step "learns" must see after PRESETS["embedded"]."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    baseline: float
    baseline_name: str
    margin: float | None = None
    seconds: float | None = None

    @model_validator(mode="after")
    def one_bound(self) -> Expect:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        reached = self.baseline >= self.at_least if self.at_least is not None else self.baseline <= self.at_most
        if reached:
            raise ValueError("the baseline reaches the bar: the bar would prove nothing")
        return self


class Reproduces(Strict):
    """The published number that a run here is held against; `headline` is its place (from 0) among the card's headline results."""

    preset: str = "published"
    headline: int | None = Field(default=None, ge=0)
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    setting: str


class Card(Strict):
    name: str
    title: str
    authors: list[str] = []
    year: int = Field(ge=1940, le=2030)
    venue: str | None = None
    arxiv: str | None = Field(default=None, pattern=r"^(\d{4}\.\d{4,5}|[a-z\-\.A-Z]+/\d{7})$")
    url: str | None = None
    kind: Literal["model", "method", "technique", "reading"]
    form: str | None = None
    task: str
    tasks: list[str] = Field(min_length=1)
    methods: list[str] = []
    aliases: list[str] = []
    keywords: list[str] = []
    summary: str
    summary_zh: str
    mechanism: str | None = None
    builds_on: list[str] = []
    compares_with: list[str] = []
    code: str | None = None
    license: str | None = None
    reference: list[str] = []
    reading: Literal["checked", "to_check", "survey"] | None = None
    lists: list[str] = []
    headline: list[Headline] = []
    variants: list[Variant] = []
    expect: Expect | None = None
    not_applicable: dict[Literal["builds", "matches", "learns", "deploys", "reproduces"], str] = {}
    reproduces: Reproduces | None = None

    @field_validator("tasks", "methods")
    @classmethod
    def in_the_vocabulary(cls, ids: list[str], info) -> list[str]:
        known = vocabulary.table(info.field_name)
        for name in ids:
            if name not in known:
                raise ValueError(f"'{name}' is not in vocabulary/{info.field_name}.toml{nearest(name, known)}")
        return ids

    @field_validator("venue")
    @classmethod
    def one_spelling(cls, venue: str | None) -> str | None:
        term = venue and vocabulary.resolve("venues", venue)
        if venue and not term:
            names = [t.name for t in vocabulary.table("venues").values()]
            raise ValueError(f"'{venue}' is not in vocabulary/venues.toml{nearest(venue, names)}")
        if term and venue != term.name:
            raise ValueError(f"write '{term.name}', the name that vocabulary/venues.toml gives it")
        return venue

    @model_validator(mode="after")
    def has_a_source(self) -> Card:
        if not (self.arxiv or self.url):
            raise ValueError("give arxiv or url")
        if self.summary == self.summary_zh:
            raise ValueError("summary_zh must be Chinese, not a copy of summary")
        return self


def nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def check(paper: Paper) -> Card:
    """The card, validated.

    Raises:
        PaperZooError: one line: the file, the line where it can be found, the key, what is wrong, and what to write instead.
    """
    path = paper.path / "card.toml"
    return check_card(read_card(path), path)


def check_card(card: dict, path: Path) -> Card:
    """A card's data, validated; `path` is where it was read, for the error."""
    try:
        return Card.model_validate(card)
    except ValidationError as error:
        found = error.errors()
        first = next(
            (e for e in found if e["type"] == "extra_forbidden"), found[0]
        )  # a misspelt key also counts as missing
        key = ".".join(str(part) for part in first["loc"]) or "the card"
        raise PaperZooError(f"{path}:{line_of(path, first['loc'])}: {key}: {said(first)}") from None


def said(error: dict) -> str:
    """What pydantic found, with the fix where it follows from the schema."""
    key = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"there is no such key{nearest(key, keys_beside(error['loc']))}"
    if error["type"] == "missing":
        return f"missing; add: {key} = {'[…]' if key in ('tasks', 'authors') else '…'}"
    return error["msg"].removeprefix("Value error, ")


def keys_beside(location: tuple) -> list[str]:
    models = {"headline": Headline, "variants": Variant, "expect": Expect, "reproduces": Reproduces}
    return list((models.get(str(location[0]), Card) if len(location) > 1 else Card).model_fields)


def line_of(path: Path, location: tuple) -> int:
    """The line of a key, found by its name; 1 when the key is not there."""
    names = [part for part in location if isinstance(part, str)]
    index = next((part for part in location if isinstance(part, int)), 0)
    lines = path.read_text(encoding="utf-8").splitlines()
    start, seen = 0, -1
    if len(names) > 1:
        for i, line in enumerate(lines):
            if line.strip().strip("[]").strip() == names[0]:
                seen += 1
                if seen == index:
                    start = i
                    break
    for i, line in enumerate(lines[start:], start):
        if names and line.split("=")[0].strip() == names[-1]:
            return i + 1
    return start + 1
