"""Reading cards. The folder is the registry: `papers/<area>/<slug>/card.toml`, and slugs are unique.

The parsed cards are kept in one small index file in the user's cache folder, renewed for every card whose time or size
changed, so that listing hundreds of papers takes milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from paperzoo.errors import PaperZooError, UnknownName

ROOT = Path(__file__).resolve().parent.parent / "papers"


@dataclass(frozen=True)
class Paper:
    """One work: where its folder is, and its card as plain data (keys as in card.toml)."""

    slug: str
    area: str
    path: Path
    card: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.card.get(name)

    @property
    def variants(self) -> list[dict[str, Any]]:
        return self.card.get("variants", [])

    @property
    def has_code(self) -> bool:
        return (self.path / "recipe.py").exists()

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.card['arxiv']}" if self.card.get("arxiv") else self.card.get("url", "")

    def module(self, name: str) -> ModuleType:
        """The paper's `model`, `technique`, `recipe` or `parity`, imported now.

        Raises:
            PaperZooError: if the folder has no such file.
        """
        if not self.has_code and name in ("recipe", "model", "technique", "parity"):
            raise PaperZooError(f"{self.slug} has no code yet, only its card and notes: paperzoo show {self.slug}")
        if not (self.path / f"{name}.py").exists():
            raise PaperZooError(f"{self.slug} has no {name}.py; its folder is {self.path}")
        if ROOT in self.path.parents:
            return import_module(f"paperzoo.papers.{self.area}.{self.slug}.{name}")
        return import_from(self.path / f"{name}.py", f"paperzoo_papers.{self.area}.{self.slug}.{name}")


def import_from(path: Path, name: str) -> ModuleType:
    """A module of a paper that lives outside of the package, imported once under a name of its own."""
    from importlib.util import module_from_spec, spec_from_file_location

    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def roots() -> list[Path]:
    """The package's papers, and the user's own: the folders in $PAPERZOO_PAPERS, laid out alike."""
    own = os.environ.get("PAPERZOO_PAPERS", "")
    return [ROOT, *(Path(folder).expanduser().resolve() for folder in own.split(os.pathsep) if folder)]


def read_card(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PaperZooError(f"{path}: cannot read this card: {error}") from None


def cache_folder() -> Path:
    """Where derived files are kept: $PAPERZOO_CACHE, else the user's cache folder."""
    base = os.environ.get("PAPERZOO_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "paperzoo"


def card_files() -> list[tuple[Path, list[int]]]:
    """Every card, in the order of area and slug, with its time and size."""
    found = []
    for root in roots():
        here = []
        for area in os.scandir(root) if root.is_dir() else ():
            if not area.is_dir() or area.name.startswith(("_", ".")):
                continue
            for folder in os.scandir(area.path):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    stat = os.stat(os.path.join(folder.path, "card.toml"))
                    here.append((area.name, folder.name, folder.path, [stat.st_mtime_ns, stat.st_size]))
        found += [(Path(path, "card.toml"), stamp) for _, _, path, stamp in sorted(here)]
    return found


@functools.cache
def known_files() -> list[tuple[Path, list[int]]]:
    """The cards as they were when this process first looked."""
    return card_files()


def fingerprint(files: list[tuple[Path, list[int]]] | None = None) -> list:
    """What changes when any card does: every card's path, time and size, looked up now unless `files` are given."""
    return [[str(path), stamp] for path, stamp in (card_files() if files is None else files)]


faults: dict[str, PaperZooError] = {}  # slug -> what is wrong with its card, as far as this process has looked


def checked_card(path: Path) -> dict[str, Any]:
    """A card's data, read and checked against the schema.

    Raises:
        PaperZooError: the file, the line, the key, what is wrong, and what to write instead.
    """
    from paperzoo.catalog.schema import check_card

    card = read_card(path)
    check_card(card, path)
    return card


@functools.cache
def papers() -> dict[str, Paper]:
    """slug -> paper, in the order of area and slug. A card that cannot be read or is wrong is left out, with a warning on stderr."""
    index_file = cache_folder() / "cards.json"
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        assert isinstance(index, dict)
    except (OSError, ValueError, AssertionError):
        index = {}
    faults.clear()
    found: dict[str, Paper] = {}
    fresh, changed = {}, False
    for path, stamp in known_files():
        entry = index.get(str(path))
        slug = path.parent.name
        if not (isinstance(entry, dict) and entry.get("stamp") == stamp):
            try:
                entry, changed = {"stamp": stamp, "card": checked_card(path)}, True
            except PaperZooError as fault:
                faults[slug] = fault
                print(f"warning: {fault} (left out)", file=sys.stderr)
                continue
        fresh[str(path)] = entry
        if slug in found:
            raise PaperZooError(f"{path}: the slug '{slug}' is taken by {found[slug].path}; slugs are unique")
        found[slug] = Paper(slug, path.parent.parent.name, path.parent, entry["card"])
    if changed:
        with contextlib.suppress(OSError):  # the index only saves time: a read-only home is no error
            index_file.parent.mkdir(parents=True, exist_ok=True)
            part = index_file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(fresh, ensure_ascii=False), encoding="utf-8")
            part.replace(index_file)
    return found


@functools.cache
def variants() -> dict[str, Paper]:
    """Model name -> the paper whose `model.py` has the function of that name."""
    return {v["name"]: paper for paper in papers().values() for v in paper.variants}


def find(name: str) -> Paper:
    """The paper with this slug, name, alias or variant name; upper case, blanks and hyphens do not matter.

    Raises:
        UnknownName: with the nearest names.
    """
    known = papers()
    if name in known:
        return known[name]
    if name in faults:
        raise faults[name]
    if name in variants():
        return variants()[name]
    wanted = plain(name)
    for paper in known.values():
        if wanted in {plain(n) for n in (paper.slug, paper.card["name"], *paper.card.get("aliases", []))}:
            return paper
    raise UnknownName("paper or model", name, [*known, *variants()])


def plain(name: str) -> str:
    """A name as it is compared: lower case, letters and digits alone; a plus is part of a name (UNet++)."""
    return "".join(c for c in name.lower().replace("+", "plus") if c.isalnum())
