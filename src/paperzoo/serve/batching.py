"""Dynamic batches: requests that wait together are computed together, and none waits longer than the bound for others."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

HELD = 256 * 1024 * 1024  # bytes of decoded inputs that wait for the network


@dataclass
class Work:
    """A request in a model process: what was read of it, and what the service said about it.

    `arrived` and `deadline` are on the clock that both processes share (`time.monotonic`); `more` is whether the service had
    other requests for this model on their way when it sent this one.
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
    """A queue between the thread that reads requests and the one that computes."""

    def __init__(self, max_batch: int, max_wait: float) -> None:
        self.max_batch, self.max_wait = max_batch, max_wait
        self.waiting: deque[Work] = deque()
        self.held = 0
        self.closed = False
        self.changed = threading.Condition()

    def put(self, work: Work) -> None:
        """Wait until its decoded inputs have room, then queue it."""
        with self.changed:
            self.changed.wait_for(lambda: not self.waiting or self.held + work.size <= HELD)
            self.waiting.append(work)
            self.held += work.size
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def take(self) -> list[Work] | None:
        """The next batch; None once the queue is closed and empty.

        Waits for more requests only while the newest said that others are on their way, and never longer than `max_wait`
        after the oldest arrived.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if not self.waiting:
                return None
            until = self.waiting[0].arrived + self.max_wait
            while self.counted() < self.max_batch and self.waiting[-1].more and not self.closed:
                left = until - time.monotonic()
                if left <= 0 or not self.changed.wait(left):
                    break
            batch = [self.waiting.popleft()]
            while self.waiting and sum(w.count for w in batch) + self.waiting[0].count <= self.max_batch:
                batch.append(self.waiting.popleft())
            self.held -= sum(w.size for w in batch)
            self.changed.notify_all()
            return batch

    def counted(self) -> int:
        return sum(w.count for w in self.waiting)
