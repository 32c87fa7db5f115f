"""Leaderboards from all cards' headline results: one data set, one metric, the best first."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from paperzoo.catalog import vocabulary
from paperzoo.catalog.cards import Paper, papers
from paperzoo.catalog.status import read_status
from paperzoo.catalog.vocabulary import Term
from paperzoo.errors import UnknownName

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One published result, with its value in the board's unit.

    `shown` is what the card says; `split` a part of the data set or ""; `state` is "reproduced" (by a run here), "unconfirmed" (the
    source of the figure was not at hand) or "as published".
    """

    slug: str
    name: str
    year: int
    value: float
    shown: str
    setting: str
    split: str
    state: str


@dataclass(frozen=True)
class Board:
    """A data set's results in one metric, best first, and the record year by year: a year appears when the record fell."""

    dataset: Term
    metric: Term
    rows: tuple[Row, ...]

    @property
    def better(self) -> str:
        return self.metric.better

    @property
    def unit(self) -> str:
        return self.metric.unit or ""

    @property
    def records(self) -> list[Row]:
        """For every year in which the best value so far was beaten, the row that did it."""
        held: list[Row] = []
        for year in sorted({row.year for row in self.rows}):
            best = next(row for row in self.rows if row.year == year)  # the rows are sorted
            if not held or beats(best.value, held[-1].value, self.better):
                held.append(best)
        return held

    def as_data(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset.name,
            "about": self.dataset.about,
            "url": self.dataset.url,
            "access": self.dataset.access,
            "metric": self.metric.name,
            "better": self.better,
            "unit": self.unit,
            "rows": [asdict(row) for row in self.rows],
            "records": [{"year": r.year, "slug": r.slug, "value": r.value} for r in self.records],
        }


def beats(a: float, b: float, better: str) -> bool:
    return a < b if better == "lower" else a > b


def number(text: str) -> float | None:
    """The first number of a value such as "96.55%", "31.2 dB", "1,024 px"; None when there is none."""
    found = NUMBER.search(text)
    return float(found[0].replace(",", "")) if found else None


def normalised(text: str, metric: Term) -> float | None:
    """A value in the unit of its board: fractions as percent, an error as the accuracy that it leaves."""
    value = number(text)
    if value is None:
        return None
    fraction = abs(value) <= (metric.fraction_to or 1) and "%" not in text
    if metric.better == "lower" and fraction and metric.unit == "%":
        fraction = len(text.split(".")[-1]) >= 3  # 0.035 is 3.5%, while 0.35 may well be a percentage already
    if metric.unit == "%" and fraction:
        value = round(value * 100, 6)
    return round(100 - value, 6) if metric.complement else value


def board_metric(metric: Term, dataset: Term | None = None, tasks: list[str] | None = None, setting: str = "") -> Term:
    """The metric whose board a result stands on: what "AP" means on this data set, errors as accuracies, probes apart."""
    known = vocabulary.table("metrics")
    for join in metric.joins or [] if dataset else []:
        mine = set((tasks or [])[:1])
        allowed = not join.get("tasks") or mine & set(join["tasks"])
        if join["dataset"] == dataset.id and allowed and not set(tasks or []) & set(join.get("not_tasks", [])):
            metric = known[join["metric"]]
            break
    if metric.complement:
        metric = known[metric.complement]
    said = vocabulary.spelled(setting)
    for other in protocols().get(metric.same_as or metric.id, ()):
        if any(vocabulary.spelled(words) in said for words in other.in_setting):
            return other
    return metric


@functools.cache
def protocols() -> dict[str, list[Term]]:
    """metric -> the metrics that are the same one by another protocol, told by words in the setting."""
    found: dict[str, list[Term]] = {}
    for term in vocabulary.table("metrics").values():
        if term.of:
            found.setdefault(term.of, []).append(term)
    return found


@functools.cache
def boards() -> dict[tuple[str, str], Board]:
    """(data set's id, metric's id) -> board, for every pair with at least one measurable result of quality."""
    state = read_status()
    found: dict[tuple[str, str], list[Row]] = {}
    for paper in papers().values():
        for result in paper.card.get("headline", []):
            for place, row in resolve_rows(paper, result, state):
                found.setdefault(place, []).append(row)
    for dataset, metric in list(found):  # "accuracy" joins the board of "top-1 accuracy" where the data set has one
        same = vocabulary.table("metrics")[metric].same_as
        if same and (dataset, same) in found:
            found[dataset, same] += found.pop((dataset, metric))
    made = {}
    for (dataset, metric), rows in sorted(found.items()):
        term = vocabulary.table("metrics")[metric]
        rows.sort(key=lambda r: (r.value if term.better == "lower" else -r.value, r.year, r.slug))
        made[dataset, metric] = Board(vocabulary.table("datasets")[dataset], term, tuple(rows))
    return made


def resolve_rows(paper: Paper, result: dict[str, Any], state: dict[str, Any]) -> list[tuple[tuple[str, str], Row]]:
    """The boards a headline result belongs to, with its rows; none for differences, costs and data sets without a name."""
    dataset = vocabulary.resolve("datasets", result["dataset"])
    metric = vocabulary.resolve("metrics", result["metric"])
    if not dataset or not metric or dataset.kind == "unnamed" or result["value"].lstrip().startswith("+"):
        return []
    known = vocabulary.table("metrics")
    parts = [known[m] for m in metric.parts] if metric.parts else [metric]
    values = result["value"].split("/") if metric.parts else [result["value"]]
    splits = said_splits(dataset) | said_splits(metric)
    split = splits.get(vocabulary.spelled(result["dataset"])) or splits.get(vocabulary.spelled(result["metric"]), "")
    found = []
    for part, text in zip(parts, values, strict=False):
        setting = result.get("setting", "")
        place = board_metric(part, dataset, paper.card["tasks"], setting)
        value = normalised(text, part)
        if value is None or place.kind != "quality" or place.better == "none":
            continue
        shown = text.strip() if not part.complement else f"{text.strip()} {part.name}"
        card = paper.card
        row = Row(
            paper.slug, card["name"], card["year"], value, shown, setting, split, verification(paper, result, state)
        )
        found.append(((dataset.id, place.id), row))
    return found


def said_splits(term: Term) -> dict[str, str]:
    return {vocabulary.spelled(spelling): split for spelling, split in (term.splits or {}).items()}


def verification(paper: Paper, result: dict[str, Any], state: dict[str, Any]) -> str:
    goal = paper.card.get("reproduces") or {}
    passed = state.get(paper.slug, {}).get("reproduces", {}).get("state") == "passed"
    if passed and goal.get("headline") == paper.card["headline"].index(result):
        return "reproduced"
    return "unconfirmed" if result.get("unconfirmed") else "as published"


def find_boards(dataset: str, metric: str | None = None) -> list[Board]:
    """The boards of a data set, the fullest first; of one metric, if given. "COCO box AP" names both at once.

    Raises:
        UnknownName: for a data set or metric that no card has a result on.
    """
    term, rest = split_query(dataset)
    metric = metric or rest or None
    found = [board for (name, _), board in boards().items() if name == term.id]
    if metric:
        wanted = vocabulary.resolve("metrics", metric)
        ids = {board_metric(wanted).id, board_metric(wanted).same_as} if wanted else set()
        part = vocabulary.spelled(metric)
        chosen = [b for b in found if b.metric.id in ids] or [
            b for b in found if part in vocabulary.spelled(b.metric.name)
        ]
        if not chosen:
            raise UnknownName(f"metric on {term.name}", metric, [b.metric.name for b in found])
        found = chosen
    return sorted(found, key=lambda b: (-len({row.slug for row in b.rows}), b.metric.name))


def split_query(text: str) -> tuple[Term, str]:
    """The data set that a query begins with, and what follows it."""
    with_results = {dataset for dataset, _ in boards()}
    words = text.split()
    for end in range(len(words), 0, -1):
        term = vocabulary.resolve("datasets", " ".join(words[:end]))
        if term and term.id in with_results:
            return term, " ".join(words[end:])
    raise UnknownName("data set with results", text, [vocabulary.table("datasets")[d].name for d in with_results])


def of_task(task: str) -> list[Board]:
    """The boards on which works of a task stand, the fullest first."""
    slugs = {p.slug for p in papers().values() if task in p.card["tasks"]}
    counted = [(len({r.slug for r in b.rows} & slugs), b) for b in boards().values()]
    return [b for n, b in sorted(counted, key=lambda item: (-item[0], item[1].dataset.name)) if n]


def of_paper(slug: str) -> list[tuple[Board, int]]:
    """The boards on which a work stands, with its best rank (1 is the record)."""
    found = []
    for board in boards().values():
        ranks = [i for i, row in enumerate(board.rows, 1) if row.slug == slug]
        if ranks:
            found.append((board, ranks[0]))
    return found


def chart(board: Board, width: int = 40) -> list[str]:
    """The record over time as text, a bar a year."""
    held = board.records
    values = [row.value for row in held]
    low, high = min(values), max(values)
    floor = low - 0.25 * (high - low or abs(high) or 1)
    lines = []
    for row in held:
        share = (row.value - floor) / (high - floor or 1)
        bar = "█" * max(1, round(share * width))
        lines.append(f"{row.year}  {bar:<{width}}  {shown(row.value, board.unit)}  {row.name}")
    return lines


def shown(value: float, unit: str) -> str:
    text = f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return text + (unit if unit == "%" else f" {unit}" if unit else "")


def everything(found: Iterable[Board] | None = None) -> list[Board]:
    """All boards, those with the most works first."""
    return sorted(
        found or boards().values(), key=lambda b: (-len({r.slug for r in b.rows}), b.dataset.name, b.metric.name)
    )
