"""Finding papers and models in the catalogue. Never imports torch."""

from __future__ import annotations

import fnmatch

from paperzoo.catalog.cards import Paper, papers, plain, variants

WEIGHTS = {
    "slug": 8,
    "name": 8,
    "aliases": 8,
    "title": 5,
    "task": 4,
    "area": 3,
    "summary": 2,
    "summary_zh": 2,
    "mechanism": 1,
}


def search(query: str, limit: int = 20) -> list[Paper]:
    """Papers whose card matches the words of a query, English or Chinese, best first."""
    words = [w for w in query.lower().replace("-", " ").split() if w]
    scored = []
    for paper in papers().values():
        fields = {"slug": paper.slug, "area": paper.area, **paper.card}
        score = 0.0
        for word in words:
            best = max(
                (weight * strength(word, text_of(fields.get(key))) for key, weight in WEIGHTS.items()), default=0
            )
            score += best if best else -2
        if plain(query) in {plain(paper.slug), plain(paper.card["name"])}:
            score += 50
        if score > 0:
            scored.append((-score, paper.slug, paper))
    return [paper for *_, paper in sorted(scored)][:limit]


def text_of(value: object) -> str:
    return " ".join(value).lower() if isinstance(value, list) else str(value or "").lower()


def strength(word: str, text: str) -> float:
    """1 for a whole word, 0.6 for its beginning, 0.4 inside; Chinese is matched inside."""
    if word not in text:
        stem = word.rstrip("s")
        return 0.5 if len(stem) > 3 and stem in text else 0.0
    tokens = text.replace("-", " ").replace("_", " ").replace(",", " ").replace(".", " ").split()
    if word in tokens or not word.isascii():
        return 1.0
    return 0.6 if any(t.startswith(word) for t in tokens) else 0.4


def select(
    area: str | None = None, task: str | None = None, year: int | None = None, kind: str | None = None
) -> list[Paper]:
    """Papers with these facts; area and task match in part."""
    chosen = []
    for paper in papers().values():
        if area and area.lower().replace(" ", "_") not in paper.area:
            continue
        if task and task.lower().replace("_", " ") not in paper.card["task"].lower():
            continue
        if year and paper.card["year"] != year:
            continue
        if kind and paper.card["kind"] != kind:
            continue
        chosen.append(paper)
    return chosen


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create` takes, those that match a pattern such as "resnet*"."""
    return sorted(fnmatch.filter(variants(), pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"))
