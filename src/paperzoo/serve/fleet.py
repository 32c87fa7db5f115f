"""Several models in one service: where their folders are, what memory they may have together, when they are loaded anew."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import tomllib
from pathlib import Path
from typing import Any

from paperzoo.catalog.cards import find
from paperzoo.errors import PaperZooError
from paperzoo.serve.limits import Refused
from paperzoo.serve.workers import Pool, Settings

WATCHED = ("deploy.json", "config.json", "model.safetensors")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

logger = logging.getLogger("paperzoo.serve")


# -- folders -----------------------------------------------------------------------------------------------------------


def locate(source: str) -> str:
    """The folder that is served: the one that was named, else the newest finished run of the paper that was named.

    In a paper's run the folder `deploy`, which `paperzoo optimize` writes, is preferred.

    Raises:
        PaperZooError: if there is none, saying which command makes one.
    """
    path = Path(source)
    if path.is_file():
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").exists():
            raise PaperZooError(f"{path}: not the folder of a finished run, nor one that paperzoo optimize wrote")
        return str(path)
    slug = find(source).slug
    runs = sorted(p.parent for p in (Path("runs") / slug).glob("*/config.json"))
    if not runs:
        raise PaperZooError(f"no finished run of {slug} under ./runs; make one with: paperzoo run {slug}")
    deployed = runs[-1] / "deploy"
    return str(deployed if (deployed / "deploy.json").exists() else runs[-1])


def named_sources(sources: list[str]) -> dict[str, str]:
    """Name -> source, from NAME, FOLDER or NAME=FOLDER.

    Raises:
        PaperZooError: if two would have one name.
    """
    found: dict[str, str] = {}
    for text in sources:
        given, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            given, source = "", text
        folder = Path(locate(source))
        name = given or paper_of(folder)
        if not NAME.fullmatch(name):
            raise PaperZooError(f"'{name}' cannot be the name of a model; give one: NAME={source}")
        if name in found:
            raise PaperZooError(f"two models are named {name}; give one another name: NAME={source}")
        found[name] = source
    return found


def paper_of(folder: Path) -> str:
    try:
        return str(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["paper"])
    except (OSError, ValueError, KeyError):
        raise PaperZooError(f"{folder / 'config.toml'}: not the configuration of a run") from None


def signature(source: str) -> tuple:
    """What changes when a model's files do."""
    folder = Path(locate(source))
    stats = [(folder / name).stat() for name in WATCHED if (folder / name).exists()]
    return str(folder), *((s.st_mtime_ns, s.st_size, s.st_ino) for s in stats)


# -- models ------------------------------------------------------------------------------------------------------------


class Fleet:
    """The models of one service.

    Args:
        sources: name -> NAME or FOLDER, see `named_sources`.
        budget: bytes that all model processes may have together; the least used models are put to sleep for others, and a
            request wakes them. None: no bound.
    """

    def __init__(self, sources: dict[str, str], settings: Settings, metrics: Any, budget: int | None = None) -> None:
        self.sources, self.settings, self.metrics, self.budget = sources, settings, metrics, budget
        self.pools = {
            name: Pool(name, lambda source=source: locate(source), settings, metrics)
            for name, source in sources.items()
        }
        self.sizes: dict[str, int] = {}
        self.waking = asyncio.Lock()
        self.tasks: list[asyncio.Task] = []

    async def start(self, watch: bool) -> None:
        """Open every model; with a budget, those that have no room go to sleep again.

        Raises:
            PaperZooError: if one cannot be opened, or is over the budget alone.
        """
        if self.budget is None:
            await asyncio.gather(*(pool.wake() for pool in self.pools.values()))
        else:
            for pool in self.pools.values():
                async with self.waking:
                    await pool.wake()
                    await self.settle(pool)
        self.tasks.append(asyncio.create_task(self.tick()))
        if watch:
            self.tasks.append(asyncio.create_task(self.watch()))

    @property
    def ready(self) -> bool:
        """Whether each model can answer: its processes are up, or asleep until they are asked."""
        return all(pool.ready or (pool.version and not pool.awake) for pool in self.pools.values())

    async def awake(self, name: str) -> Pool:
        """The pool of a model, its processes up.

        Raises:
            Refused: if there is no room for it within the time limit.
        """
        pool = self.pools[name]
        if pool.awake:
            return pool
        async with self.waking:
            if not pool.awake:
                await self.make_room(pool, self.sizes.get(name, 0))
                try:
                    await pool.wake()
                except PaperZooError as error:
                    logger.error("%s: %s", name, error)
                    raise Refused(f"{name} cannot be opened now", 503) from None
                await self.settle(pool)
        return pool

    def measured(self) -> int:
        for pool in self.pools.values():
            if pool.awake and pool.workers:
                self.sizes[pool.name] = sum(w.memory() for w in pool.workers)
        return sum(self.sizes.get(p.name, 0) for p in self.pools.values() if p.awake)

    async def settle(self, pool: Pool) -> None:
        """Put others to sleep until the processes fit.

        Raises:
            PaperZooError: if this one alone does not.
        """
        if self.budget is None:
            return
        self.measured()
        size = self.sizes.get(pool.name, 0)
        if size > self.budget:
            await pool.sleep()
            have, need = self.budget >> 20, -(-size >> 20)
            raise PaperZooError(f"{pool.name} needs {need} MB, more than --memory-mb {have}; give {need + need // 4}")
        await self.make_room(pool, 0)

    async def make_room(self, pool: Pool, size: int) -> None:
        if self.budget is None:
            return
        until = time.monotonic() + self.settings.limits.timeout
        while self.measured() + size > self.budget:
            others = [p for p in self.pools.values() if p.awake and p is not pool]
            idle = [p for p in others if not p.busy and not p.arriving]
            if idle:
                await min(idle, key=lambda p: p.used).sleep()
            elif not others:
                return
            elif time.monotonic() > until:
                raise Refused(f"there is no memory for {pool.name} now; the other models are busy", 503)
            else:
                await asyncio.sleep(0.05)

    async def reload(self, name: str) -> None:
        """See `Pool.reload`."""
        try:
            await self.pools[name].reload()
        except PaperZooError:
            self.metrics.reloads.labels(name, "failed").inc()
            raise
        self.metrics.reloads.labels(name, "done").inc()
        logger.info("%s was loaded anew from %s", name, self.pools[name].folder)

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            for pool in self.pools.values():
                pool.end_stuck()

    async def watch(self) -> None:
        """Load a model anew when its files have changed, and then been the same for a second."""
        loaded = {name: self.look(name) for name in self.pools}
        before = dict(loaded)
        while True:
            await asyncio.sleep(1)
            for name, pool in self.pools.items():
                now = self.look(name)
                if now is not None and now == before[name] and now != loaded[name] and pool.awake:
                    loaded[name] = now
                    try:
                        await self.reload(name)
                    except PaperZooError as error:
                        logger.error("%s stays as it is: %s", name, error)
                before[name] = now

    def look(self, name: str) -> tuple | None:
        try:
            return signature(self.sources[name])
        except (PaperZooError, OSError):
            return None

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(pool.close() for pool in self.pools.values()))
