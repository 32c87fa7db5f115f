"""What the scripts of the site are given: the search index's columns, the points of plots, the graph. Plain data, the same on every call.

The columns are shipped as deflated JSON in base64, in four scripts: `data/search.js` (names, titles, facets, the vocabulary),
`data/summaries-en.js` and `data/summaries-zh.js` (the page loads that of its language first, the other one later), and
`data/more.js` (authors and mechanisms, loaded last). With all four, the page ranks as `paperzoo.catalog.search` does.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

from paperzoo.catalog import board as boards
from paperzoo.catalog import search, vocabulary
from paperzoo.catalog.board import Board, Row
from paperzoo.catalog.cards import Paper, papers, plain
from paperzoo.catalog.measured import READINESS, read_measured, readiness
from paperzoo.catalog.relations import builds_on, imports, used_by
from paperzoo.catalog.status import LETTERS, badge, read_status

BOARDS_A_TASK = 6  # how many of a task's boards its plot offers
LEAST_ON_AN_AXIS = 3


# -- search ------------------------------------------------------------------------------------------------------------


def scripts() -> dict[str, str]:
    """File below the site's root -> its contents: all that the search needs. Home includes the first; it loads the others itself."""
    found = list(papers().values())
    parts = {
        "search": columns(found),
        "summaries-en": lines(p.card["summary"] for p in found),
        "summaries-zh": lines(p.card["summary_zh"] for p in found),
        "more": {
            "authors": lines("|".join(p.card.get("authors") or []) for p in found),
            "mechanism": lines(p.card.get("mechanism") or "" for p in found),
        },
    }
    return {f"data/{name}.js": script(name, content) for name, content in parts.items()}


def search_script() -> str:
    """`data/search.js`: what the home page needs before anything is typed."""
    return scripts()["data/search.js"]


def script(name: str, content: Any) -> str:
    """Data as a script, which a page may load from a disk too: window.PAPERZOO_SEARCH[name] = base64 of deflated JSON."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return f'(window.PAPERZOO_SEARCH??={{}})["{name}"]="{packed}";\n'


def lines(texts) -> str:
    """One text a line; a line break inside of a text becomes a blank."""
    return "\n".join(" ".join(text.split()) for text in texts)


def columns(found: list[Paper]) -> dict[str, Any]:
    """One value a work in every column; texts as lines, several texts of a work with | between them.

    Returns:
        {"areas", "tasks", "methods": [[id, name, zh, [words]]], "venues": [[id, name]], "readiness": [[id, en, zh]],
         "steps": of the ladder, "weights": of the search's fields, "stop": words that it leaves out;
         "slugs", "names", "titles", "aliases", "keywords", "words", "data": lines,
         "years", "venue" (-1: none), "area", "ready", "prior", "uses": numbers; "of_tasks", "of_methods": lists of numbers;
         "kind": a letter a work (m, e, t, r), "badge": five letters a work, "code": 0 or 1}
    """
    state = read_status()
    priors = (
        search.index()["priors"]
        if search.index()["slugs"] == [p.slug for p in found]
        else search.build_index()["priors"]
    )
    terms = {name: list(vocabulary.table(name).values()) for name in ("areas", "tasks", "methods")}
    place = {name: {t.id: i for i, t in enumerate(row)} for name, row in terms.items()}
    venues = [t for t in vocabulary.table("venues").values() if any(p.card.get("venue") == t.name for p in found)]
    venue = {t.name: i for i, t in enumerate(venues)}
    levels = list(READINESS)
    card = [p.card for p in found]
    return {
        **{name: [[t.id, t.name, t.zh, list(t.words)] for t in row] for name, row in terms.items()},
        "venues": [[t.id, t.name] for t in venues],
        "readiness": [[key, *READINESS[key]] for key in levels],
        "steps": list(LETTERS),
        "weights": search.FIELDS,
        "stop": sorted(search.STOP),
        "slugs": lines(p.slug for p in found),
        "names": lines(c["name"] for c in card),
        "titles": lines(c["title"] for c in card),
        "aliases": lines("|".join(c.get("aliases") or []) for c in card),
        "keywords": lines("|".join(c.get("keywords") or []) for c in card),
        "words": lines(c["task"] for c in card),
        "data": lines("|".join(row["dataset"] for row in c.get("headline", [])) for c in card),
        "years": [c["year"] for c in card],
        "venue": [venue.get(c.get("venue"), -1) for c in card],
        "area": [place["areas"][p.area] if p.area in place["areas"] else -1 for p in found],
        "of_tasks": [[place["tasks"][t] for t in c["tasks"]] for c in card],
        "of_methods": [[place["methods"][m] for m in c.get("methods", [])] for c in card],
        "kind": "".join({"model": "m", "method": "e", "technique": "t", "reading": "r"}[c["kind"]] for c in card),
        "badge": "".join(badge(state.get(p.slug, {})) for p in found),
        "ready": [levels.index(readiness(p, state)[0]) for p in found],
        "code": [int(p.has_code) for p in found],
        "prior": priors,
        "uses": [len(used_by(p.slug)) for p in found],
    }


# -- plots -------------------------------------------------------------------------------------------------------------


def plot(task: str) -> dict[str, Any] | None:
    """A task's fullest boards as points; None when none holds results of two of its works."""
    own = {p.slug for p in papers().values() if task in p.card["tasks"]}
    chosen = [b for b in boards.of_task(task) if is_about(b, task, own)][:BOARDS_A_TASK]
    if not chosen:
        return None
    term = vocabulary.table("tasks")[task]
    return {"title": {"en": term.name, "zh": term.zh or term.name}, "boards": [points(b) for b in chosen]}


def is_about(board: Board, task: str, own: set[str]) -> bool:
    """Whether a board says something of a task: two works of it, on a data set of it or among few others."""
    slugs = {row.slug for row in board.rows}
    return len(slugs & own) > 1 and (task in (board.dataset.tasks or ()) or 2 * len(slugs & own) >= len(slugs))


def board_plot(board: Board) -> dict[str, Any]:
    """All results of one leaderboard, and which of them were records."""
    title = f"{board.dataset.name}, {board.metric.name}"
    return {"title": {"en": title, "zh": title}, "boards": [points(board)]}


def points(board: Board) -> dict[str, Any]:
    """One board for plot.js: a point a row, in the order of the board.

    Returns:
        {"label", "unit", "better", "axes": names of the x values that at least three points have,
         "points": [{"slug", "name", "y", "shown", "setting", "state", "year", and where known "parameters", "flops",
         "cpu", "gpu" (measured milliseconds at batch 1), "fps" (published)}], "records": places among the points}
    """
    made = []
    for row in board.rows:
        setting = "; ".join(part for part in (row.split, row.setting) if part)
        point = {"slug": row.slug, "name": row.name, "y": row.value, "shown": row.shown, "setting": setting}
        made.append(point | {"state": row.state, "year": row.year} | sizes(row, board))
    axes = [a for a in ("year", "parameters", "flops", "cpu", "gpu", "fps") if counts(a, made)]
    records = [board.rows.index(row) for row in board.records]
    label = f"{board.dataset.name} · {board.metric.name}"
    better = "lower" if board.better == "lower" else "higher"
    return {"label": label, "unit": board.unit, "better": better, "axes": axes, "points": made, "records": records}


def counts(axis: str, made: list[dict[str, Any]]) -> bool:
    """Whether an axis has enough points to be worth drawing; the years always are."""
    return axis == "year" or sum(axis in point for point in made) >= LEAST_ON_AN_AXIS


SIZE = re.compile(r"(?<!under )\b(\d+(?:\.\d+)?) ?([KMBG]) ?parameters(?! besides)")
WORK = re.compile(r"(\d+(?:\.\d+)?) ?([MGBT]) ?(?:FLOPs|multiply-adds)")
PACE = re.compile(r"(\d+(?:\.\d+)?) FPS")
TIME = re.compile(r"(\d+(?:\.\d+)?) ms per image")
SCALE = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def sizes(row: Row, board: Board) -> dict[str, float]:
    """What the model behind a result costs: as the result's setting says, else as the variant it names was counted and measured."""
    paper = papers()[row.slug]
    found: dict[str, float] = {}
    name = variant_of(paper, row.setting)
    if name:
        found["parameters"] = next(v["parameters"] for v in paper.variants if v["name"] == name)
        figures = read_status().get(paper.slug, {}).get("builds", {}).get("figures", {})
        if figures.get("flops", {}).get(name):
            found["flops"] = figures["flops"][name]
        for device, models in read_measured().items():
            inference = models.get(name, {}).get("measures", {}).get("inference, batch 1")
            if inference:
                found["cpu" if device == "cpu" else "gpu"] = inference["ms"]
    for key, pattern in (("parameters", SIZE), ("flops", WORK)):
        if said := pattern.search(row.setting):
            found[key] = round(float(said[1]) * SCALE[said[2]])
    pace = published_pace(paper, row, board)
    return found | ({"fps": pace} if pace else {})


def published_pace(paper: Paper, row: Row, board: Board) -> float | None:
    """Frames per second that the work states with this result, or for this data set."""
    if said := PACE.search(row.setting):
        return float(said[1])
    if said := TIME.search(row.setting):
        return round(1000 / float(said[1]), 2)
    stated = [r for r in paper.card.get("headline", []) if is_pace(r, board)]
    value = boards.number(stated[0]["value"]) if len(stated) == 1 else None
    return value or None


def is_pace(result: dict[str, Any], board: Board) -> bool:
    metric = vocabulary.resolve("metrics", result["metric"])
    dataset = vocabulary.resolve("datasets", result["dataset"])
    return bool(metric and dataset and metric.id == "fps" and dataset.id == board.dataset.id)


def variant_of(paper: Paper, setting: str) -> str | None:
    """The variant that a setting such as "ResNet-110, best of five" names; None when none or more than one fits.

    A name fits in full ("vgg16"), without the work's own name ("retinanet_resnet50_fpn": ResNet-50-FPN), or without its last
    word ("resnet110_cifar": ResNet-110); the longest way of fitting counts.
    """
    said = plain(setting)
    fits: dict[str, int] = {}
    for variant in paper.variants:
        name = variant["name"]
        short = name.removeprefix(paper.slug + "_")
        for form in (name, short, name.rsplit("_", 1)[0]):
            if re.search(r"\d", form) and ends_well(plain(form), said):
                fits[name] = max(fits.get(name, 0), len(plain(form)) * 2 - (form not in (name, short)))
    best = [name for name, length in fits.items() if length == max(fits.values())]
    return best[0] if len(best) == 1 else None


def ends_well(form: str, said: str) -> bool:
    """Whether a name stands in a text and is not the beginning of a longer number: resnet20 is not in resnet200."""
    return bool(re.search(re.escape(form) + (r"(?!\d)" if form[-1].isdigit() else ""), said))


# -- the graph ---------------------------------------------------------------------------------------------------------


def graph() -> dict[str, Any]:
    """Works and who builds on whom.

    Returns:
        {"areas": [[id, name, zh]], "nodes": [[slug, name, year, place of its area, has code, how many build on it]],
         "imports" and "builds": [[from, to]] as places among the nodes: the first imports from, or builds on, the second}
    """
    found = list(papers().values())
    place = {p.slug: i for i, p in enumerate(found)}
    areas = sorted({p.area for p in found})
    names = vocabulary.table("areas")
    code = {(p.slug, other) for p in found for other in imports(p.slug)}
    edges = [(p.slug, other) for p in found for other in builds_on(p.slug) if other in place]
    return {
        "areas": [[a, names[a].name, names[a].zh] if a in names else [a, a.replace("_", " "), a] for a in areas],
        "nodes": [
            [p.slug, p.card["name"], p.card["year"], areas.index(p.area), int(p.has_code), len(used_by(p.slug))]
            for p in found
        ],
        "imports": [[place[a], place[b]] for a, b in edges if (a, b) in code],
        "builds": [[place[a], place[b]] for a, b in edges if (a, b) not in code],
    }
