"""The catalogue's orders and filters: by area, task, method, venue and year, reading status, readiness, list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from paperzoo.catalog import vocabulary
from paperzoo.catalog.cards import Paper, papers
from paperzoo.catalog.measured import READINESS, readiness
from paperzoo.catalog.status import LETTERS, read_status
from paperzoo.errors import PaperZooError, UnknownName

KINDS = ("model", "method", "technique", "reading")
READING = {"checked": "checked", "to_check": "to check", "survey": "survey", "none": "not marked"}
STATUS = (*LETTERS, "code", "verified", "not yet")


def task_names(paper: Paper) -> list[str]:
    return [vocabulary.table("tasks")[t].name for t in paper.card["tasks"]]


VIEWS: dict[str, Callable[[Paper, dict], list[str]]] = {
    "area": lambda paper, _: [paper.area.replace("_", " ")],
    "task": lambda paper, _: task_names(paper),
    "method": lambda paper, _: [vocabulary.table("methods")[m].name for m in paper.card.get("methods", [])] or ["none"],
    "venue": lambda paper, _: [f"{paper.card.get('venue') or 'preprint or web'} {paper.card['year']}"],
    "year": lambda paper, _: [str(paper.card["year"])],
    "kind": lambda paper, _: [paper.card["kind"]],
    "reading": lambda paper, _: [READING[paper.card.get("reading") or "none"]],
    "readiness": lambda paper, status: [READINESS[readiness(paper, status)[0]][0]],
    "list": lambda paper, _: paper.card.get("lists") or ["none"],
}


def group(found: Iterable[Paper], by: str) -> dict[str, list[Paper]]:
    """heading -> papers, the headings sorted (years and venues downwards in time, readiness from ready to watch).

    Raises:
        UnknownName: for a view that does not exist.
    """
    if by not in VIEWS:
        raise UnknownName("view", by, VIEWS)
    status = read_status()
    groups: dict[str, list[Paper]] = {}
    for paper in found:
        for heading in VIEWS[by](paper, status):
            groups.setdefault(heading, []).append(paper)
    if by == "readiness":
        order = [text for text, _ in READINESS.values()]
        return {h: groups[h] for h in order if h in groups}
    if by == "year":
        return dict(sorted(groups.items(), reverse=True))
    if by == "venue":  # a venue's name upwards, its years downwards
        return dict(sorted(groups.items(), key=lambda item: (item[0].rsplit(" ", 1)[0].lower(), -int(item[0][-4:]))))
    return dict(sorted(groups.items()))


def select(
    area: str | None = None,
    task: str | None = None,
    year: str | int | None = None,
    kind: str | None = None,
    venue: str | None = None,
    method: str | None = None,
    status: str | None = None,
    readiness_is: str | None = None,
    reading: str | None = None,
    parameters: str | None = None,
) -> list[Paper]:
    """Papers with these facts.

    Args:
        area, task, method: an id or name; a task or method also by any other spelling, or by a part of its name.
        year: "2017", "2015-2018", ">=2020", "<2015".
        venue: a venue's name or another spelling; workshops are venues of their own.
        status: a step of the ladder that was passed, or "code", "verified" (no step failed), "not yet" (no code).
        readiness_is: "ready", "buildable" or "to watch".
        reading: "checked", "to_check", "survey".
        parameters: "<5M", ">=100M", "1M-10M": the size of one of its models at least.

    Raises:
        UnknownName: for a value that does not exist, with the nearest ones.
    """
    found: list[Paper] = list(papers().values())
    state: dict[str, Any] = read_status() if status or readiness_is else {}
    if area:
        name = area.lower().replace(" ", "_").replace("-", "_")
        if name not in {p.area for p in found}:
            raise UnknownName("area", area, sorted({p.area for p in found}))
        found = [p for p in found if p.area == name]
    if task:
        found = [p for p in found if wanted_ids("tasks", task) & set(p.card["tasks"])]
    if method:
        found = [p for p in found if wanted_ids("methods", method) & set(p.card.get("methods", []))]
    if venue:
        term = vocabulary.resolve("venues", venue)
        if not term:
            raise UnknownName("venue", venue, [t.name for t in vocabulary.table("venues").values()])
        found = [p for p in found if p.card.get("venue") == term.name]
    if kind:
        found = [p for p in found if p.card["kind"] == one_of("kind", kind, KINDS)]
    if reading:
        wanted = one_of("reading status", reading.replace(" ", "_"), ("checked", "to_check", "survey"))
        found = [p for p in found if p.card.get("reading") == wanted]
    if year:
        fits = bounds("year", str(year))
        found = [p for p in found if fits(p.card["year"])]
    if parameters:
        fits = bounds("parameters", parameters)
        found = [p for p in found if any(fits(v["parameters"]) for v in p.variants)]
    if status:
        step = one_of("status", status.replace("_", " "), STATUS)
        found = [p for p in found if has_status(p, step, state)]
    if readiness_is:
        level = one_of("readiness", readiness_is.replace("_", " ").replace("-", " "), tuple(READINESS))
        found = [p for p in found if readiness(p, state)[0] == level]
    return found


def has_status(paper: Paper, step: str, state: dict[str, Any]) -> bool:
    steps = state.get(paper.slug, {})
    if step in ("code", "not yet"):
        return paper.has_code == (step == "code") and not (step == "not yet" and paper.card["kind"] == "reading")
    if step == "verified":
        return bool(steps) and all(s["state"] != "failed" for s in steps.values())
    return steps.get(step, {}).get("state") == "passed"


def wanted_ids(table: str, text: str) -> set[str]:
    """The term of that name; else all whose name contains the text."""
    term = vocabulary.resolve(table, text)
    if term:
        return {term.id}
    part = vocabulary.spelled(text)
    found = {t.id for t in vocabulary.table(table).values() if part in vocabulary.spelled(t.name) or part in t.zh}
    if not found:
        raise UnknownName(table[:-1], text, [t.name for t in vocabulary.table(table).values()])
    return found


def one_of(what: str, value: str, known: tuple[str, ...]) -> str:
    if value.lower() not in known:
        raise UnknownName(what, value, known)
    return value.lower()


def bounds(what: str, text: str) -> Callable[[float], bool]:
    """ "2017", "2015-2018", ">=2020", "<5M" as a test of a number; K, M and B are thousands, millions, billions."""
    number = r"(\d+(?:\.\d+)?)([kmb]?)"
    scale = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}
    plain = text.lower().replace(" ", "")
    if match := re.fullmatch(rf"{number}(?:-|\.\.|:){number}", plain):
        low, high = (float(match[i]) * scale[match[i + 1]] for i in (1, 3))
        return lambda value: low <= value <= high
    if match := re.fullmatch(rf"(<=|>=|<|>|=)?{number}", plain):
        bound = float(match[2]) * scale[match[3]]
        tests = {
            "<": lambda v: v < bound,
            "<=": lambda v: v <= bound,
            ">": lambda v: v > bound,
            ">=": lambda v: v >= bound,
        }
        return tests.get(match[1], lambda v: v == bound)
    shown = {"year": "2017, 2015-2018, >=2020", "parameters": "<5M, 1M-10M, >=100M"}[what]
    raise PaperZooError(f"'{text}' is no {what}; write it like {shown}")
