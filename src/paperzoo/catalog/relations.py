"""How works relate: what a card says, and what follows from the code's imports and from shared tasks."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from paperzoo.catalog.cards import Paper, papers

IMPORT = re.compile(r"^\s*(?:from|import) paperzoo\.papers\.\w+\.(\w+)", re.MULTILINE)


@functools.cache
def imports(slug: str) -> tuple[str, ...]:
    """The papers whose folders this paper's code imports from: the citation graph of the code."""
    paper = papers()[slug]
    if not paper.has_code:
        return ()
    text = "\n".join(
        p.read_text(encoding="utf-8")
        for p in sorted(paper.path.glob("*.py"))
        if p.name not in ("parity.py", "golden.py")
    )
    return tuple(s for s in dict.fromkeys(IMPORT.findall(text)) if s != slug and s in papers())


def builds_on(slug: str) -> list[str]:
    """Works whose parts or ideas this one uses: first those its code imports, then those its card names."""
    return list(dict.fromkeys([*imports(slug), *papers()[slug].card.get("builds_on", [])]))


@functools.cache
def used_by_all() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {slug: [] for slug in papers()}
    for slug in papers():
        for other in builds_on(slug):
            if other in found:
                found[other].append(slug)
    return found


def used_by(slug: str) -> list[str]:
    """The works that build on this one."""
    return used_by_all()[slug]


@functools.cache
def compared_by_all() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {slug: [] for slug in papers()}
    for slug, paper in papers().items():
        for other in paper.card.get("compares_with", []):
            if other in found:
                found[other].append(slug)
    return found


def compares_with(slug: str) -> list[str]:
    """Works that solve the same problem in another way; the relation holds both ways though one card names it."""
    lineage = {slug, *builds_on(slug), *used_by(slug)}
    both = dict.fromkeys([*papers()[slug].card.get("compares_with", []), *compared_by_all()[slug]])
    return [other for other in both if other not in lineage]


def same_task(slug: str, limit: int | None = None) -> list[str]:
    """Works filed under the same first task, those with code first, then the nearest in years."""
    paper = papers()[slug]
    task, year = paper.card["tasks"][0], paper.card["year"]
    found = [p for p in papers().values() if task in p.card["tasks"] and p.slug != slug]
    found.sort(key=lambda p: (not p.has_code, p.card["tasks"][0] != task, abs(p.card["year"] - year), p.slug))
    return [p.slug for p in found[:limit]]


def unresolved(chosen: Iterable[Paper]) -> list[str]:
    """What is wrong with the relations of these cards: unknown slugs, itself, or what the imports already say."""
    faults = []
    for paper in chosen:
        for key in ("builds_on", "compares_with"):
            for other in paper.card.get(key, []):
                if other not in papers():
                    faults.append(f"{paper.slug}: {key} names '{other}', which is no work here")
                if other == paper.slug:
                    faults.append(f"{paper.slug}: {key} names itself")
        for other in set(imports(paper.slug)) & set(paper.card.get("builds_on", [])):
            faults.append(f"{paper.slug}: builds_on names '{other}', which follows from the code's imports: remove it")
        for other in set(paper.card.get("builds_on", [])) & set(paper.card.get("compares_with", [])):
            faults.append(f"{paper.slug}: '{other}' stands under both builds_on and compares_with")
    return faults
