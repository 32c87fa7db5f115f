"""The model processes as the service sees them: started, fed, watched, replaced when they die, drained when they are old.

Requests for a model wait in one bounded queue; each of its processes has at most two batches of them in hand, one that it
computes and one that is there when it has done so: it never waits for the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paperzoo.errors import PaperZooError
from paperzoo.serve.limits import Limits, Refused
from paperzoo.serve.wire import frame, read_frame

START_SECONDS = 300.0  # that a model may take to be opened
STUCK_SECONDS = 5.0  # beyond the time limit of a request, until a process that answers nothing is ended
LONGEST_PAUSE = 30.0  # between attempts to start a process that dies again and again

logger = logging.getLogger("paperzoo.serve")


class Lost(Exception):
    """The process died with the request in its hands."""


@dataclass(frozen=True)
class Settings:
    """How a model is run."""

    workers: int = 1
    max_batch: int = 8
    max_wait: float = 0.005  # seconds
    max_queue: int = 64
    threads: int = 1
    limits: Limits = field(default_factory=Limits)


@dataclass(eq=False)
class Job:
    """A request that waits for its answer."""

    head: dict[str, Any]
    body: bytes
    answer: asyncio.Future


class Worker:
    """One model process. `in_hand` are the jobs that it was given and has not answered."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: Any) -> None:
        self.process, self.reader, self.writer = process, reader, writer
        self.in_hand: dict[int, Job] = {}
        self.accepting = True
        self.heard = time.monotonic()
        self.description: dict[str, Any] = {}

    @classmethod
    async def start(cls, name: str, folder: str, settings: Settings) -> Worker:
        """A process that has opened and tried its model.

        Raises:
            PaperZooError: with the process's own words if it could not.
        """
        ours, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "paperzoo.serve.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env=environment,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        worker = cls(process, reader, writer)
        told = {"name": name, "folder": folder, "limits": settings.limits.plain(), "threads": settings.threads}
        writer.write(frame(told | {"max_batch": settings.max_batch, "max_wait": settings.max_wait}))
        try:
            found = await asyncio.wait_for(read_frame(reader), START_SECONDS)
        except (TimeoutError, asyncio.CancelledError) as error:
            worker.kill()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise PaperZooError(f"{folder}: was not opened within {START_SECONDS:.0f} s") from None
        if found is None:
            code = await process.wait()
            raise PaperZooError(f"{folder}: the process that opened it ended ({ending(code)})")
        if "failed" in found[0]:
            await worker.stop()
            raise PaperZooError(found[0]["failed"])
        worker.description = found[0]["ready"]
        return worker

    def give(self, job: Job) -> None:
        if not self.in_hand:
            self.heard = time.monotonic()
        self.in_hand[job.head["id"]] = job
        self.writer.write(frame(job.head, job.body))
        job.body = b""

    async def answers(self) -> Any:
        """(head, body, job) of each answer, until the process is gone; then what it had in hand is lost."""
        while (found := await read_frame(self.reader)) is not None:
            self.heard = time.monotonic()
            job = self.in_hand.pop(found[0]["id"], None)
            if job is not None:
                yield *found, job
        self.accepting = False
        for job in self.in_hand.values():
            if not job.answer.done():
                job.answer.set_exception(Lost())
        self.in_hand.clear()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def stop(self, patience: float = 5.0) -> None:
        """Close its socket, which ends it; kill it if it stays."""
        self.accepting = False
        self.writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def memory(self) -> int:
        """Bytes that the process has for itself, its share of common pages included; 0 where that is not told."""
        for name, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
            with contextlib.suppress(OSError, IndexError, StopIteration):
                with open(f"/proc/{self.process.pid}/{name}", encoding="ascii") as file:
                    return 1024 * int(next(line for line in file if line.startswith(key)).split()[1])
        return 0


def ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Pool:
    """The processes of one model and the queue before them.

    Args:
        locate: the folder to open; asked again at every reload, so that a paper's name finds its newest run.
        metrics: see `paperzoo.serve.metrics`.
    """

    def __init__(self, name: str, locate: Callable[[], str], settings: Settings, metrics: Any) -> None:
        self.name, self.locate, self.settings, self.metrics = name, locate, settings, metrics
        self.folder = ""
        self.workers: list[Worker] = []
        self.waiting: deque[Job] = deque()
        self.description: dict[str, Any] = {}
        self.changing = asyncio.Lock()
        self.tasks: set[asyncio.Task] = set()
        self.closed = False
        self.awake = False
        self.used = time.monotonic()
        self.arriving = 0  # requests whose bodies are being read
        self.version = 0
        self.count = 0

    # -- requests ----------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return any(w.accepting for w in self.workers)

    @property
    def busy(self) -> int:
        return len(self.waiting) + sum(len(w.in_hand) for w in self.workers)

    def submit(self, head: dict[str, Any], body: bytes) -> Job:
        """Queue a request.

        Raises:
            Refused: 429 if the queue is full.
        """
        self.used = now = time.monotonic()
        self.count += 1
        head |= {"id": self.count, "arrived": now, "deadline": now + self.settings.limits.timeout}
        job = Job(head, body, asyncio.get_running_loop().create_future())
        if len(self.waiting) >= self.settings.max_queue:
            self.metrics.shed.labels(self.name, "queue full").inc()
            raise Refused(f"{len(self.waiting)} requests are waiting for {self.name} already", 429)
        self.waiting.append(job)
        self.feed()
        return job

    def feed(self) -> None:
        """Give waiting requests to processes that have room, the least busy first."""
        room = 2 * self.settings.max_batch
        while self.waiting:
            free = [w for w in self.workers if w.accepting and len(w.in_hand) < room]
            if not free:
                return
            job = self.waiting.popleft()
            if job.answer.done():  # its client left, or its time was over
                continue
            job.head["more"] = bool(self.waiting) or self.arriving > 0
            min(free, key=lambda w: len(w.in_hand)).give(job)

    async def tend(self, worker: Worker) -> None:
        """Pass on a process's answers; start another when it dies."""
        async for head, body, job in worker.answers():
            if head.get("ending"):
                worker.accepting = False
            if "batch" in head:
                self.metrics.batches.labels(self.name).observe(head["batch"])
                self.metrics.compute.labels(self.name).observe(head["seconds"])
            if not job.answer.done():
                job.answer.set_result((head, body))
            self.feed()
        code = await worker.process.wait()
        worker.writer.close()
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        self.metrics.restarts.labels(self.name).inc()
        logger.error("%s: process %d ended (%s); starting another", self.name, worker.process.pid, ending(code))
        if not self.closed and self.awake:
            await self.replace()

    async def replace(self) -> None:
        """Start a process until one is up."""
        pause = 0.1
        while not self.closed and self.awake and len(self.workers) < self.settings.workers:
            try:
                self.adopt(await Worker.start(self.name, self.folder, self.settings))
                return
            except (PaperZooError, OSError) as error:
                logger.error("%s: %s; trying again in %.1f s", self.name, error, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def adopt(self, worker: Worker) -> None:
        if self.closed or not self.awake:
            worker.kill()
            return
        self.workers.append(worker)
        self.description = worker.description
        self.keep(self.tend(worker))
        self.feed()

    def keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def end_stuck(self) -> None:
        """Kill processes that have had a request in hand for longer than any may take."""
        patience = self.settings.limits.timeout + STUCK_SECONDS
        for worker in self.workers:
            if worker.in_hand and time.monotonic() - worker.heard > patience:
                logger.error("%s: process %d has not answered for %.0f s", self.name, worker.process.pid, patience)
                worker.kill()

    # -- generations -------------------------------------------------------------------------------------------------

    async def wake(self) -> None:
        """Start the processes, unless they are there.

        Raises:
            PaperZooError: if the model cannot be opened.
        """
        async with self.changing:
            if not self.awake:
                await self.renew()

    async def reload(self) -> None:
        """New processes first; when all are up, they get the requests, and the old ones end with their last answer.

        Raises:
            PaperZooError: if the folder cannot be opened; the old processes stay.
        """
        async with self.changing:
            await self.renew()

    async def renew(self) -> None:
        folder = self.locate()
        starts = [Worker.start(self.name, folder, self.settings) for _ in range(self.settings.workers)]
        found = await asyncio.gather(*starts, return_exceptions=True)
        failed = next((f for f in found if isinstance(f, BaseException)), None)
        if failed is not None or self.closed:
            for worker in found:
                if isinstance(worker, Worker):
                    worker.kill()
            if failed is not None:
                raise failed
            return
        old, self.workers = self.workers, []
        self.folder, self.awake, self.version = folder, True, self.version + 1
        for worker in found:
            self.adopt(worker)
        for worker in old:
            self.keep(self.retire(worker))

    async def retire(self, worker: Worker) -> None:
        """End a process once it has answered what it has in hand."""
        worker.accepting = False
        until = time.monotonic() + self.settings.limits.timeout + STUCK_SECONDS
        while worker.in_hand and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await worker.stop()

    async def sleep(self) -> None:
        """Let the processes go; the next request starts them again."""
        async with self.changing:
            self.awake = False
            old, self.workers = self.workers, []
            await asyncio.gather(*(self.retire(worker) for worker in old))

    async def close(self) -> None:
        """End: the processes finish what is in their hands."""
        self.closed = True
        old, self.workers = self.workers, []
        await asyncio.gather(*(self.retire(worker) for worker in old))
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
