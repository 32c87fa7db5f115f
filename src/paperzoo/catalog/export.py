"""The whole catalogue as one file: JSON, CSV or SQLite."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paperzoo.catalog.board import boards
from paperzoo.catalog.cards import Paper
from paperzoo.catalog.cite import bibtex
from paperzoo.catalog.measured import readiness
from paperzoo.catalog.relations import builds_on, compares_with, used_by
from paperzoo.catalog.status import LETTERS, read_status
from paperzoo.errors import PaperZooError

FORMATS = ("json", "csv", "sqlite")


def record(paper: Paper, status: dict[str, Any]) -> dict[str, Any]:
    """One work with everything that is known and derived."""
    steps = status.get(paper.slug, {})
    level, why = readiness(paper, status)
    return {
        "slug": paper.slug,
        "area": paper.area,
        "link": paper.link,
        **{k: v for k, v in paper.card.items() if k not in ("builds_on", "compares_with")},
        "builds_on": builds_on(paper.slug),
        "used_by": used_by(paper.slug),
        "compares_with": compares_with(paper.slug),
        "has_code": paper.has_code,
        "status": {name: steps.get(name, {}).get("state", "not yet") for name in LETTERS},
        "readiness": level,
        "readiness_because": why,
        "notes": notes(paper),
        "bibtex": bibtex(paper),
    }


def notes(paper: Paper) -> str:
    path = paper.path / "notes.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def export_catalog(found: Iterable[Paper], path: Path, format: str | None = None) -> Path:
    """Write the catalogue, atomically; the format follows from the file's ending unless it is given.

    Raises:
        PaperZooError: for an ending that says no format, or a file that cannot be written.
    """
    from paperzoo.engine.files import write_bytes

    format = format or {".json": "json", ".csv": "csv", ".sqlite": "sqlite", ".db": "sqlite"}.get(path.suffix.lower())
    if format not in FORMATS:
        raise PaperZooError(
            f"{path}: say the format by the ending (.json, .csv, .sqlite) or with --format {'|'.join(FORMATS)}"
        )
    status = read_status()
    rows = [record(p, status) for p in found]
    content = {"json": as_json, "csv": as_csv, "sqlite": as_sqlite}[format](rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise PaperZooError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def as_json(rows: list[dict[str, Any]]) -> bytes:
    text = json.dumps(
        {"papers": rows, "boards": [b.as_data() for b in boards().values()]}, indent=1, ensure_ascii=False
    )
    return text.encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    """A row a work; lists joined with "; ", the headline results as "data set: metric value"."""
    out = io.StringIO()
    columns = "slug name title authors year venue area kind task tasks methods summary summary_zh link arxiv code headline builds_on"
    columns = [*columns.split(), "compares_with", *LETTERS, "readiness", "parameters"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        flat = {k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        results = [f"{h['dataset']}: {h['metric']} {h['value']}" for h in row.get("headline", [])]
        sizes = [str(v["parameters"]) for v in row.get("variants", [])]
        writer.writerow(flat | row["status"] | {"headline": "; ".join(results), "parameters": "; ".join(sizes)})
    return ("\ufeff" + out.getvalue()).encode()  # the mark tells spreadsheets that this is UTF-8


TABLES = """
create table papers (slug text primary key, name text, title text, year integer, venue text, area text, kind text, task text,
  summary text, summary_zh text, mechanism text, link text, arxiv text, code text, reading text, has_code integer, readiness text,
  notes text, bibtex text);
create table authors (slug text references papers, place integer, name text);
create table tasks (slug text references papers, place integer, task text);
create table methods (slug text references papers, place integer, method text);
create table relations (slug text references papers, relation text, other text references papers);
create table headline (slug text references papers, dataset text, metric text, value text, setting text, unconfirmed integer);
create table models (slug text references papers, name text primary key, parameters integer, source text);
create table status (slug text references papers, step text, state text);
create table boards (dataset text, metric text, better text, unit text, place integer, slug text references papers, value real, setting text, split text, state text);
"""


def as_sqlite(rows: list[dict[str, Any]]) -> bytes:
    base = sqlite3.connect(":memory:")
    base.executescript(TABLES)
    columns = [c[1] for c in base.execute("pragma table_info(papers)")]
    insert = f"insert into papers values ({','.join('?' * len(columns))})"
    base.executemany(insert, [[row.get(c) for c in columns] for row in rows])
    for row in rows:
        slug = row["slug"]
        for table in ("authors", "tasks", "methods"):
            base.executemany(
                f"insert into {table} values (?,?,?)", [(slug, i, v) for i, v in enumerate(row.get(table, []))]
            )
        for relation in ("builds_on", "compares_with"):
            base.executemany(
                "insert into relations values (?,?,?)", [(slug, relation, other) for other in row[relation]]
            )
        headline = [
            (slug, h["dataset"], h["metric"], h["value"], h.get("setting", ""), int(h.get("unconfirmed", False)))
            for h in row.get("headline", [])
        ]
        base.executemany("insert into headline values (?,?,?,?,?,?)", headline)
        models = [(slug, v["name"], v["parameters"], v["source"]) for v in row.get("variants", [])]
        base.executemany("insert into models values (?,?,?,?)", models)
        base.executemany("insert into status values (?,?,?)", [(slug, s, state) for s, state in row["status"].items()])
    wanted = {row["slug"] for row in rows}
    for board in boards().values():
        lines = [
            (
                board.dataset.name,
                board.metric.name,
                board.better,
                board.unit,
                i,
                r.slug,
                r.value,
                r.setting,
                r.split,
                r.state,
            )
            for i, r in enumerate(board.rows, 1)
            if r.slug in wanted
        ]
        base.executemany(f"insert into boards values ({','.join('?' * 10)})", lines)
    base.commit()
    content = base.serialize()
    base.close()
    return content
