"""Errors that a user meets: one line that names the thing, what was wrong, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PaperZooError(Exception):
    """A mistake in what was asked for; the message is one line and complete. The command line prints it and exits with 2."""


class DataError(PaperZooError):
    """A file or a row that cannot be read. `path` names it, `problem` says what is wrong and what would be right."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem

    def __reduce__(self):  # worker processes send errors back pickled
        return type(self), (self.path, self.problem)


class UnknownName(PaperZooError):
    """A name that does not exist, answered with the nearest ones that do."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known, name = list(known), " ".join(str(name).split())
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known)[:12])}"
        super().__init__(f"no {kind} named '{name}'; {hint}")
        self.name = name


class MissingExtra(PaperZooError):
    """An optional dependency that is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}': pip install 'paperzoo[{extra}]'")
