"""Writing files so that a kill, a full disk or a read-only folder never damages what was there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from paperzoo.errors import PaperZooError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a part file beside `path`, force it to the disk, then move it into place in one step.

    Raises:
        PaperZooError: if the disk or the folder refuses; `path` is as it was before.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "; the previous one is intact" if path.exists() else ""
        raise PaperZooError(f"{path}: cannot be written ({reason}){kept}") from error


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """A binary file, atomically."""
    write_atomically(path, lambda part: part.write_bytes(content))
