"""Dynamic batches: requests that wait together are computed together, and none waits longer than the bound for others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Work:
    """A request in a model process: what was read of it, and what the service said about it.

    `arrived` and `deadline` are on the clock that both processes share (`time.monotonic`); `more` is whether the service had
    other requests for this model on their way when it sent this one; `size` is about how many bytes its inputs hold.
    """

    identity: int
    request: Any
    arrived: float
    deadline: float
    more: bool
    size: int

    @property
    def count(self) -> int:
        return len(self.request.values)


class Batcher:
    """Forms batches of what `receive` brings: the next request within so many seconds (None: however long it takes; 0: if
    it is there), None if none came, and EOFError when no more will come. No more is taken in than the next batch needs.
    """

    def __init__(self, receive: Callable[[float | None], Work | None], max_batch: int, max_wait: float) -> None:
        self.receive, self.max_batch, self.max_wait = receive, max_batch, max_wait
        self.waiting: deque[Work] = deque()
        self.closed = False

    def take(self) -> list[Work] | None:
        """The next batch; None once no more will come.

        Waits for others only while the newest said that they are on their way, and never longer than `max_wait` after the
        oldest arrived. A request is not divided.
        """
        while not self.closed and sum(w.count for w in self.waiting) < self.max_batch:
            try:
                work = self.receive(self.patience())
            except EOFError:
                self.closed = True
                break
            if work is None:
                break
            self.waiting.append(work)
        if not self.waiting:
            return None
        batch = [self.waiting.popleft()]
        while self.waiting and sum(w.count for w in batch) + self.waiting[0].count <= self.max_batch:
            batch.append(self.waiting.popleft())
        return batch

    def patience(self) -> float | None:
        if not self.waiting:
            return None
        if not self.waiting[-1].more:
            return 0.0
        return max(0.0, self.waiting[0].arrived + self.max_wait - time.monotonic())
