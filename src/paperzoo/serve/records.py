"""What the service counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PLAIN_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counts of one service. Labels are names of models, endpoints and statuses, so their number is bounded."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "paperzoo_requests", "Requests, by what was answered.", ["endpoint", "model", "status"], registry=r
        )
        self.seconds = Histogram(
            "paperzoo_request_seconds",
            "From the first byte of a request to its answer.",
            ["endpoint", "model"],
            buckets=SECONDS,
            registry=r,
        )
        self.batches = Histogram(
            "paperzoo_batch_inputs",
            "Inputs that were computed together.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=r,
        )
        self.compute = Histogram(
            "paperzoo_batch_seconds", "The network's time for a batch.", ["model"], buckets=SECONDS, registry=r
        )
        self.inputs = Counter("paperzoo_inputs", "Inputs that were answered.", ["model"], registry=r)
        self.shed = Counter("paperzoo_shed", "Requests that were turned away.", ["model", "reason"], registry=r)
        self.restarts = Counter("paperzoo_worker_restarts", "Model processes that died.", ["model"], registry=r)
        self.reloads = Counter("paperzoo_reloads", "Reloads, by how they ended.", ["model", "result"], registry=r)
        self.waiting = Gauge("paperzoo_waiting", "Requests in the queue.", ["model"], registry=r)
        self.in_hand = Gauge("paperzoo_in_hand", "Requests that processes have in hand.", ["model"], registry=r)
        self.workers = Gauge("paperzoo_workers", "Model processes that answer.", ["model"], registry=r)
        self.memory = Gauge("paperzoo_memory_bytes", "Memory of a model's processes.", ["model"], registry=r)
        self.held = Gauge("paperzoo_held_bytes", "Request bodies in the service's hands.", registry=r)

    def text(self, pools: Any, held: int) -> bytes:
        """What /metrics answers; the gauges are read now."""
        self.held.set(held)
        for pool in pools:
            self.waiting.labels(pool.name).set(len(pool.waiting))
            self.in_hand.labels(pool.name).set(sum(len(w.in_hand) for w in pool.workers))
            self.workers.labels(pool.name).set(sum(w.accepting for w in pool.workers))
            self.memory.labels(pool.name).set(sum(w.memory() for w in pool.workers))
        return generate_latest(self.registry)
