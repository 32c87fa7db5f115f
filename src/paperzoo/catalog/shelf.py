"""A reader's own shelf: marks, tags and notes on papers, in one local SQLite file.

The file is `shelf.sqlite` in the user's data folder ($PAPERZOO_SHELF names another). It lives apart from the package, so upgrades do not
touch it; its `user_version` says which tables it has, and older ones are brought forward when it is opened. Several processes may use
it at once (write-ahead log, and a wait of ten seconds for a writer). Entries for works that a later catalogue renames are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paperzoo.catalog.cards import find, papers
from paperzoo.errors import PaperZooError

MARKS = ("to read", "reading", "read", "to try")
STEPS = (  # step i brings a file of version i to version i + 1
    """
    create table entries (slug text primary key, mark text, added real not null, changed real not null);
    create table tags (slug text not null, tag text not null, primary key (slug, tag));
    create table notes (id integer primary key, slug text not null, text text not null, written real not null);
    create index notes_by_slug on notes (slug);
    """,
)


def shelf_file() -> Path:
    """$PAPERZOO_SHELF, else `paperzoo/shelf.sqlite` in the user's data folder."""
    named = os.environ.get("PAPERZOO_SHELF")
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(named).expanduser() if named else data / "paperzoo" / "shelf.sqlite"


@contextlib.contextmanager
def opened(path: Path | None = None) -> Iterator[sqlite3.Connection]:
    """The shelf in one transaction: all of it is written, or nothing.

    Raises:
        PaperZooError: if the file is no shelf, is from a newer version, or cannot be written.
    """
    path = path or shelf_file()
    base = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(path, timeout=10, isolation_level=None)
        base.execute("pragma journal_mode = wal")
        base.execute("begin immediate")
        bring_forward(base, path)
        yield base
        base.execute("commit")
    except (sqlite3.DatabaseError, OSError) as error:
        raise PaperZooError(f"{path}: this shelf cannot be used ({error})") from None
    finally:
        if base is not None:
            if base.in_transaction:
                base.execute("rollback")
            base.close()


def bring_forward(base: sqlite3.Connection, path: Path) -> None:
    version = base.execute("pragma user_version").fetchone()[0]
    if version > len(STEPS):
        raise PaperZooError(
            f"{path}: written by a newer PaperZoo (shelf version {version}, here {len(STEPS)}); upgrade to read it"
        )
    for step in STEPS[version:]:
        for statement in step.split(";"):
            base.execute(statement)
    base.execute(f"pragma user_version = {len(STEPS)}")


def mark(names: list[str], status: str) -> list[str]:
    """Put works on the shelf under one of MARKS; returns their slugs.

    Raises:
        PaperZooError: for an unknown mark or work.
    """
    if status.replace("-", " ") not in MARKS:
        raise PaperZooError(f"'{status}' is no mark; they are: {', '.join(MARKS)}")
    slugs = [find(name).slug for name in names]
    with opened() as base:
        for slug in slugs:
            touch(base, slug, status.replace("-", " "))
    return slugs


def touch(base: sqlite3.Connection, slug: str, status: str | None = None, added: float | None = None) -> None:
    now = time.time()
    base.execute(
        "insert into entries values (?, ?, ?, ?) on conflict (slug) do update set mark = coalesce(excluded.mark, mark), changed = excluded.changed",
        (slug, status, added or now, now),
    )


def tag(name: str, tags: list[str]) -> str:
    """Add tags to a work; "-tag" takes one off. Returns the slug."""
    slug = find(name).slug
    with opened() as base:
        touch(base, slug)
        for word in tags:
            if word.startswith("-"):
                base.execute("delete from tags where slug = ? and tag = ?", (slug, word[1:]))
            else:
                base.execute("insert or ignore into tags values (?, ?)", (slug, word))
    return slug


def note(name: str, text: str) -> str:
    """Write a note on a work; earlier ones stay. Returns the slug."""
    slug = find(name).slug
    if not text.strip():
        raise PaperZooError("an empty note; write for example: paperzoo shelf note resnet 'try this on my data'")
    with opened() as base:
        touch(base, slug)
        base.execute("insert into notes (slug, text, written) values (?, ?, ?)", (slug, text.strip(), time.time()))
    return slug


def remove(names: list[str]) -> list[str]:
    """Take works off the shelf, with their tags and notes. A work that is not on it is an error, and then nothing is removed."""
    with opened() as base:
        here = {row[0] for row in base.execute("select slug from entries")}
        slugs = [name if name in here else find(name).slug for name in names]
        missing = [slug for slug in slugs if slug not in here]
        if missing:
            raise PaperZooError(f"'{missing[0]}' is not on the shelf")
        for table in ("entries", "tags", "notes"):
            base.executemany(f"delete from {table} where slug = ?", [(s,) for s in slugs])
    return slugs


def entries(status: str | None = None, with_tag: str | None = None, slug: str | None = None) -> list[dict[str, Any]]:
    """What is on the shelf, the last changed first: {slug, mark, tags, notes: [{text, written}], added, changed}; times are Unix seconds."""
    if status is not None and status.replace("-", " ") not in MARKS:
        raise PaperZooError(f"'{status}' is no mark; they are: {', '.join(MARKS)}")
    if not shelf_file().exists():
        return []
    with opened() as base:
        tags: dict[str, list[str]] = {}
        for owner, word in base.execute("select slug, tag from tags order by tag"):
            tags.setdefault(owner, []).append(word)
        notes: dict[str, list[dict]] = {}
        for owner, text, written in base.execute("select slug, text, written from notes order by written"):
            notes.setdefault(owner, []).append({"text": text, "written": written})
        rows = base.execute("select slug, mark, added, changed from entries order by changed desc, slug").fetchall()
    found = [
        {"slug": s, "mark": m, "tags": tags.get(s, []), "notes": notes.get(s, []), "added": a, "changed": c}
        for s, m, a, c in rows
    ]
    if status is not None:
        found = [e for e in found if e["mark"] == status.replace("-", " ")]
    if with_tag is not None:
        found = [e for e in found if with_tag in e["tags"]]
    return [e for e in found if slug is None or e["slug"] == slug]


def export_shelf(path: Path) -> int:
    """Write the shelf as JSON; returns the number of works."""
    from paperzoo.engine.files import write_text

    rows = entries()
    write_text(path, json.dumps({"paperzoo_shelf": 1, "entries": rows}, indent=1, ensure_ascii=False) + "\n")
    return len(rows)


def import_shelf(path: Path) -> int:
    """Add a JSON file of `export_shelf` to the shelf; marks of the file win, tags and notes are united. Returns the number of works.

    Raises:
        PaperZooError: if the file is not such a file; then nothing is changed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            (
                e["slug"],
                e.get("mark"),
                [str(t) for t in e["tags"]],
                [(str(n["text"]), float(n["written"])) for n in e["notes"]],
                float(e["added"]),
            )
            for e in data["entries"]
        ]
    except OSError as error:
        raise PaperZooError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise PaperZooError(
            f"{path}: not a shelf; such files are written by: paperzoo shelf export FILE.json"
        ) from None
    for slug, status, *_ in rows:
        if slug not in papers():
            raise PaperZooError(f"{path}: names '{slug}', which is no work here")
        if status is not None and status not in MARKS:
            raise PaperZooError(f"{path}: marks {slug} as '{status}'; marks are: {', '.join(MARKS)}")
    with opened() as base:
        for slug, status, tags, notes, added in rows:
            touch(base, slug, status, added)
            base.executemany("insert or ignore into tags values (?, ?)", [(slug, t) for t in tags])
            for text, written in notes:
                known = base.execute("select 1 from notes where slug = ? and text = ?", (slug, text)).fetchone()
                if not known:
                    base.execute("insert into notes (slug, text, written) values (?, ?, ?)", (slug, text, written))
    return len(rows)
