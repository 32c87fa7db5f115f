"""Which code a paper's proof belongs to: a hash over its folder and over everything of ours that it is made of.

A paper that has climbed the ladder need not learn again while its fingerprint stays the same. The engine is not part of it;
what it does is watched by a sample of papers that always learn. `make prove` and `paperzoo verify --write` record fingerprints.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from paperzoo.catalog.cards import Paper, papers, variants

PATH = Path(__file__).parent / "fingerprints.json"
SOURCE = Path(__file__).parents[1]
ROOMS = ("papers", "tasks", "blocks", "data")
SAMPLE = 8  # one in so many papers always learns


def fingerprint(paper: Paper) -> str:
    """Sixteen hex digits."""
    own = [p for p in sorted(paper.path.iterdir()) if p.is_file() and p.name not in ("notes.md", "reproduced.json")]
    digest = hashlib.sha256()
    for path in [*own, *closure(p for p in own if p.suffix == ".py")]:
        digest.update(
            path.relative_to(SOURCE).as_posix().encode() if path.is_relative_to(SOURCE) else path.name.encode()
        )
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def closure(files: Iterable[Path]) -> list[Path]:
    """The files of our rooms that these ones import, directly or not, and those of models that they name."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        new = set(used_by(waiting.pop())) - found
        found |= new
        waiting += new
    return sorted(found)


@functools.cache
def used_by(path: Path) -> tuple[Path, ...]:
    return tuple(used(ast.parse(path.read_text(encoding="utf-8"))))


def used(tree: ast.Module) -> Iterator[Path]:
    models = variants()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (p for alias in node.names if (p := file_of(alias.name)))
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from (p for name in names if (p := file_of(name)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in models:
            yield models[node.value].path / "model.py"


def file_of(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != "paperzoo" or len(parts) < 3 or parts[1] not in ROOMS:
        return None
    path = SOURCE.joinpath(*parts[1:]).with_suffix(".py")
    return path if path.is_file() else None


def proven(paper: Paper) -> bool:
    """Whether the paper climbed the whole ladder with the code that it has now."""
    return recorded().get(paper.slug) == fingerprint(paper)


def sampled(slug: str) -> bool:
    """Whether a paper learns in every test run."""
    return zlib.crc32(slug.encode()) % SAMPLE == 0


def recorded() -> dict[str, str]:
    try:
        return json.loads(PATH.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def record(proved: Iterable[Paper]) -> None:
    """Write down the fingerprints of papers that have passed; others keep theirs."""
    from paperzoo.engine.files import write_text

    known = recorded() | {paper.slug: fingerprint(paper) for paper in proved}
    kept = {slug: known[slug] for slug in sorted(known) if slug in papers()}
    write_text(PATH, json.dumps(kept, indent=1) + "\n")
