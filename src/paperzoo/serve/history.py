"""Who changed what in a work's folder, from the version history of the checkout that the package lies in; nothing elsewhere."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass

from paperzoo.catalog.cards import ROOT

MOST = 30  # edits a work shown on its page


@dataclass(frozen=True)
class Edit:
    """One change of a work's folder: the day (YYYY-MM-DD), the commit, its subject line, the names of the files."""

    day: str
    commit: str
    subject: str
    files: tuple[str, ...]


@functools.cache
def edits() -> dict[str, list[Edit]]:
    """slug -> edits, the newest first; all from one reading of the history. Empty outside of a checkout, or without git."""
    command = ["git", "log", "--no-merges", "--name-only", "--date=short", "--format=%x00%ad%x1f%h%x1f%s", "--", "."]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[str, list[Edit]] = {}
    for entry in done.stdout.split("\0")[1:]:
        head, *names = [line for line in entry.splitlines() if line]
        day, commit, subject = head.split("\x1f", 2)
        changed: dict[str, list[str]] = {}
        for name in names:
            parts = name.split("/papers/", 1)[-1].split("/")
            if len(parts) == 3:
                changed.setdefault(parts[1], []).append(parts[2])
        for slug, files in changed.items():
            found.setdefault(slug, []).append(Edit(day, commit, subject, tuple(sorted(files))))
    return found


def of(slug: str) -> list[Edit]:
    return edits().get(slug, [])[:MOST]
