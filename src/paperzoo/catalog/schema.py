"""What a card may say, checked by pydantic: `paperzoo verify` and the tests use it, reading a card does not."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from paperzoo.catalog.cards import Paper, read_card
from paperzoo.errors import PaperZooError

LADDER = ("builds", "matches", "learns", "deploys", "reproduces")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", str_min_length=1)


class Headline(Strict):
    dataset: str
    metric: str
    value: str
    setting: str = Field(default="", min_length=0)


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
    preset: str = "published"
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
    aliases: list[str] = []
    summary: str
    summary_zh: str
    mechanism: str | None = None
    builds_on: list[str] = []
    code: str | None = None
    license: str | None = None
    headline: list[Headline] = []
    variants: list[Variant] = []
    expect: Expect | None = None
    not_applicable: dict[Literal["builds", "matches", "learns", "deploys", "reproduces"], str] = {}
    reproduces: Reproduces | None = None

    @model_validator(mode="after")
    def has_a_source(self) -> Card:
        if not (self.arxiv or self.url):
            raise ValueError("give arxiv or url")
        if self.summary == self.summary_zh:
            raise ValueError("summary_zh must be Chinese, not a copy of summary")
        return self


def check(paper: Paper) -> Card:
    """The card, validated.

    Raises:
        PaperZooError: one line: the file, the line where it can be found, the key, what is wrong.
    """
    path = paper.path / "card.toml"
    try:
        return Card.model_validate(read_card(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the card"
        raise PaperZooError(f"{path}:{line_of(path, first['loc'])}: {key}: {first['msg']}") from None


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
