"""The site as plain files: every page, the scripts and styles, the data of the search, the models that run in the browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

from paperzoo.errors import PaperZooError
from paperzoo.serve import pages

HERE = Path(__file__).parent
STATIC = HERE / "static"
OWN = ("style.css", "head.js", "icon.svg")  # written by hand; the others are built from web/
BUILT = ("site.js", "search.js", "plot.js", "graph.js", "widgets.css", "try.js", "try.css", "ort.js")
MARKER = ".paperzoo-site"  # in every folder that a build wrote: others are never replaced


class Bar(Protocol):
    """What shows how far it is: a name for what begins, and steps of it."""

    def stage(self, name: str) -> None: ...

    def step(self, done: int, total: int, values: dict[str, float]) -> None: ...


def static_files() -> dict[str, Path]:
    """File name below static/ -> where it lies.

    Raises:
        PaperZooError: if the scripts are not built.
    """
    missing = [name for name in BUILT if not (STATIC / name).exists()]
    if missing:
        raise PaperZooError(f"{STATIC} lacks {', '.join(missing)}: run `make web` in a checkout; it needs npm")
    return {name: HERE / name for name in OWN} | {path.name: path for path in sorted(STATIC.glob("[!.]*"))}


def build(out: Path, *, train: bool = True, bar: Bar | None = None) -> dict[str, Any]:
    """Write the site into `out`. It is written beside it and moved into place at the end: a kill leaves the old site whole.

    Args:
        train: False to show only the models that are in the cache.

    Returns:
        {"pages": number, "seconds", "megabytes", "models": slugs that run in the browser}

    Raises:
        PaperZooError: if `out` holds something that is not a site, cannot be written, or the scripts are not built.
    """
    began = time.monotonic()
    out = Path(out).expanduser().resolve()
    static = static_files()
    restore(out)
    refuse_others(out)
    pages.refresh()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-{os.getpid()}-", dir=out.parent))
    except OSError as error:
        raise PaperZooError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        part.chmod(0o755)
        (part / MARKER).write_text(
            "written by `paperzoo site build`, which may replace this folder\n", encoding="utf-8"
        )
        models = write_models(part, train, bar)
        count = write_pages(part, bar)
        for name, source in static.items():
            put(part / "static" / name, source.read_bytes())
        for name, content in pages.scripts().items():
            put(part / name, content.encode())
        size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        replace(part, out)
    except OSError as error:
        raise PaperZooError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {"pages": count, "seconds": time.monotonic() - began, "megabytes": size / 1e6, "models": models}


def write_models(part: Path, train: bool, bar: Bar | None) -> list[str]:
    """The models for the browser, from the cache or trained now; the pages are told which there are."""
    from paperzoo.serve import browser

    specs = {}
    for slug in browser.eligible():
        if bar:
            bar.stage(f"model {slug}")
        prepared = browser.prepare(slug, train=train, on_step=bar.step if bar and train else None)
        if prepared:
            browser.write(prepared, part / "browser" / slug)
            specs[slug] = prepared.spec
    pages.use_models(specs)
    return list(specs)


def write_pages(part: Path, bar: Bar | None) -> int:
    if bar:
        bar.stage("pages")
    paths = pages.paths()
    for done, path in enumerate(paths, 1):
        put(part / path, pages.render(path).encode())
        if bar and (done % 50 == 0 or done == len(paths)):
            bar.step(done, len(paths), {})
    return len(paths)


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# -- the old site ------------------------------------------------------------------------------------------------------


def aside(out: Path) -> Path:
    """Where the old site stands for the moment in which the new one takes its place."""
    return out.with_name(f".{out.name}-old")


def restore(out: Path) -> None:
    """Clean up after a build that was killed: bring back an old site that it had set aside, remove what it had written."""
    old = aside(out)
    if (old / MARKER).exists():
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)
    for part in out.parent.glob(f".{out.name}-*-*") if out.parent.is_dir() else ():
        owner = part.name.removeprefix(f".{out.name}-").split("-")[0]
        if owner.isdigit() and not alive(int(owner)) and (part / MARKER).exists():
            shutil.rmtree(part, ignore_errors=True)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def refuse_others(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise PaperZooError(f"{out} is a file; name a folder for the site")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).exists():
        raise PaperZooError(f"{out} holds something that is not a site of paperzoo; name an empty or new folder")


def replace(part: Path, out: Path) -> None:
    """The new site for the old one, by two renames; `restore` undoes the first if the second does not come."""
    old = aside(out)
    if out.exists():
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
