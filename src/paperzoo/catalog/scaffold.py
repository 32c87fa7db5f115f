"""The skeleton of a paper's folder, from the facts that are known. It fails verification until it is filled in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from paperzoo.catalog.cards import ROOT, papers
from paperzoo.errors import PaperZooError

FILL = "FILL IN"


def scaffold(
    slug: str, facts: Path | None, area: str | None, title: str | None, kind: str, into: Path | None = None
) -> Path:
    """Write the folder and return it.

    Raises:
        PaperZooError: if the slug is malformed or taken, the facts have no such line, or too little was given.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise PaperZooError(f"slug '{slug}': lower-case letters, digits and underscores, beginning with a letter")
    known = papers().get(slug)
    if known and (known.has_code or known.card["kind"] == "reading"):
        raise PaperZooError(f"slug '{slug}' is taken by {known.path}")
    if known:  # its card and notes are there: the code files alone
        return write_files(known.path, code_files(known.card))
    entry = read_facts(facts, slug) if facts else {"area": area, "title": title, "kind": kind}
    if not entry.get("area") or not entry.get("title"):
        raise PaperZooError("give --facts FILE with a line for this slug, or both --area and --title")
    folder = (into or ROOT) / entry["area"] / slug
    if folder.exists():
        raise PaperZooError(f"{folder}: cannot be written (File exists)")
    return write_files(folder, {"card.toml": card_text(entry), "notes.md": notes_text(entry)} | code_files(entry))


def write_files(folder: Path, files: dict[str, str]) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for package in (folder, folder.parent):
            (package / "__init__.py").touch()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PaperZooError(f"{folder}: cannot be written ({error.strerror})") from None
    return folder


def read_facts(path: Path, slug: str) -> dict[str, Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        entry = next((e for line in lines if line.strip() and (e := json.loads(line)).get("slug") == slug), None)
    except (OSError, ValueError, AttributeError) as error:
        raise PaperZooError(f"{path}: not readable JSON lines ({error})") from None
    if entry is None:
        raise PaperZooError(f"{path}: has no line with the slug '{slug}'")
    return entry


def quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)


def card_text(entry: dict[str, Any]) -> str:
    fields = {
        "name": entry.get("name") or entry["title"],
        "title": entry["title"],
        "authors": None,
        "year": entry.get("year"),
        "venue": entry.get("venue"),
        "arxiv": entry.get("arxiv"),
        "url": entry.get("url"),
        "kind": entry.get("kind"),
        "form": entry.get("form"),
        "task": entry.get("task") or FILL,
        "tasks": [FILL],
        "summary": FILL,
        "summary_zh": FILL,
        "mechanism": entry.get("mechanism") or FILL,
    }
    lines = []
    for key, value in fields.items():
        if key == "authors":
            lines.append(f'authors = ["{FILL}"]')
        elif key == "year":
            lines.append(f"year = {value or 0}")
        elif value:
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    lines.append("builds_on = []")
    for note in entry.get("reference", []):
        lines.append(f"# reference: {note}")
    if entry.get("note"):
        lines.append(f"# check: {entry['note']}")
    for row in entry.get("headline", []):
        lines += [
            "",
            "[[headline]]",
            *(f"{k} = {quoted(row[k])}" for k in ("dataset", "metric", "value", "setting") if row.get(k)),
        ]
    if entry.get("kind") == "model":
        lines += ["", "[[variants]]", f'name = "{FILL}"', "parameters = 0", f'source = "{FILL}"']
    lines += ["", "[expect]", f'metric = "{FILL}"', "at_least = 0.0", "baseline = 0.0", f'baseline_name = "{FILL}"']
    return "\n".join(lines) + "\n"


def notes_text(entry: dict[str, Any]) -> str:
    name = entry.get("name") or entry["title"]
    parts = [
        "**The problem.**",
        "**The idea.**",
        "| in the paper | in the code |\n|---|---|\n| eq. 1 | |",
        "**What surprised.**",
        "**Left out.**",
    ]
    return (
        f"# {name} in five minutes\n\n"
        + "\n\n".join(f"{part} {FILL}" if part.startswith("**") else part for part in parts)
        + "\n"
    )


def code_files(entry: dict[str, Any]) -> dict[str, str]:
    title = f"{entry.get('name') or entry['title']}: {entry['title']}"
    files = {
        "recipe.py": f'"""{title}.\n\n{FILL}: how it learns. A network of a known task takes the task\'s recipe:\n\n    from paperzoo.tasks.classification import ClassificationRecipe as RECIPE, Config\n    PRESETS = {{"embedded": Config(…), "published": Config(…)}}\n"""\n',
        "parity.py": f'"""{title}: against {", ".join(entry.get("reference", [])) or "checks derived from the paper"}."""\n\nfrom collections.abc import Iterator\n\nfrom paperzoo.engine.parity import Case\n\n\ndef cases() -> Iterator[Case]:\n    """{FILL}: yield Case(name, ours, reference, inputs, against)."""\n    yield from ()\n',
    }
    if entry.get("kind") == "model":
        files["model.py"] = f'"""{title}.\n\n{FILL}: the network, one function a variant.\n"""\n'
    if entry.get("kind") == "technique":
        files["technique.py"] = f'"""{title}.\n\n{FILL}: the technique, with the signature its users expect.\n"""\n'
    return files
