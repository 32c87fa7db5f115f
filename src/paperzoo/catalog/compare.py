"""Works side by side: facts, headline results on the same boards, sizes, measured speed, status, what differs in mechanism."""

from __future__ import annotations

from typing import Any

from paperzoo.catalog import board, vocabulary
from paperzoo.catalog.cards import Paper
from paperzoo.catalog.measured import READINESS, measured, readiness
from paperzoo.catalog.relations import builds_on, compares_with
from paperzoo.catalog.status import LETTERS, read_status
from paperzoo.errors import PaperZooError


def compare(found: list[Paper]) -> dict[str, Any]:
    """What a table of these works shows.

    Returns:
        {"papers": [a dict a work: facts, models with parameters and FLOPs, speed, status, …],
         "boards": [{"dataset", "metric", "unit", "better", "values": {slug: best value}, "best": slug}],
         "methods": {"shared": [names], "only": {slug: [names]}},
         "relations": [sentences]}

    Raises:
        PaperZooError: for fewer than two works, or the same one twice.
    """
    slugs = [p.slug for p in found]
    if len(set(slugs)) < 2 or len(set(slugs)) != len(slugs):
        raise PaperZooError(
            "name two or more different papers to compare, for example: paperzoo compare resnet senet vgg"
        )
    state = read_status()
    methods = {p.slug: set(p.card.get("methods", [])) for p in found}
    shared = set.intersection(*methods.values())
    term = vocabulary.table("methods")
    return {
        "papers": [column(p, state) for p in found],
        "boards": common_boards(slugs),
        "methods": {
            "shared": sorted(term[m].name for m in shared),
            "only": {s: sorted(term[m].name for m in own - shared) for s, own in methods.items()},
        },
        "relations": relations(slugs),
    }


def column(paper: Paper, state: dict[str, Any]) -> dict[str, Any]:
    steps = state.get(paper.slug, {})
    level, why = readiness(paper, state)
    flops = steps.get("builds", {}).get("figures", {}).get("flops", {})
    models = [
        {"name": v["name"], "parameters": v["parameters"], "flops": flops.get(v["name"]), "input": v.get("input")}
        for v in paper.variants
    ]
    return {
        "slug": paper.slug,
        "name": paper.card["name"],
        "title": paper.card["title"],
        "year": paper.card["year"],
        "venue": paper.card.get("venue"),
        "area": paper.area,
        "kind": paper.card["kind"],
        "tasks": [vocabulary.table("tasks")[t].name for t in paper.card["tasks"]],
        "summary": paper.card["summary"],
        "summary_zh": paper.card["summary_zh"],
        "mechanism": paper.card.get("mechanism"),
        "headline": paper.card.get("headline", []),
        "models": models,
        "measured": measured(paper),
        "status": {name: steps.get(name, {}).get("state", "not yet") for name in LETTERS},
        "learns": steps.get("learns", {}).get("text"),
        "readiness": READINESS[level][0],
        "because": why,
    }


def common_boards(slugs: list[str]) -> list[dict[str, Any]]:
    """The boards on which at least two of the works stand, each with its best value."""
    rows = []
    for found in board.boards().values():
        values: dict[str, float] = {}
        for row in found.rows:  # best first
            if row.slug in slugs:
                values.setdefault(row.slug, row.value)
        if len(values) > 1:
            rows.append(
                {
                    "dataset": found.dataset.name,
                    "metric": found.metric.name,
                    "unit": found.unit,
                    "better": found.better,
                    "values": values,
                    "best": next(iter(values)),
                }
            )
    return rows


def relations(slugs: list[str]) -> list[str]:
    """How the works stand to each other, as sentences."""
    said = []
    for slug in slugs:
        said += [f"{slug} builds on {other}" for other in builds_on(slug) if other in slugs]
        said += [f"{slug} is compared with {other}" for other in compares_with(slug) if other in slugs and slug < other]
    return said
