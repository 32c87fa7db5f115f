"""From a data set to batches: DataLoader workers fed with the runtime's index stream, seeded samples, broken files."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from paperzoo.errors import DataError

if TYPE_CHECKING:
    from paperzoo.engine.runtime import Runtime

TOLERATED = 0.01  # the share of broken files above which a run stops
TRIES = 20  # neighbours that are tried in place of a broken sample


class Seeded(Dataset):
    """A data set asked by (index, key): the global generators are seeded with the key, so random transforms are exact.

    A sample that cannot be read (`DataError`, or an `OSError` from the decoder) is replaced by the next one that can,
    and reported beside it.
    """

    def __init__(self, dataset: Any, replace: bool) -> None:
        self.dataset, self.replace = dataset, replace

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ticket: tuple[int, int]) -> tuple[Any, list[tuple[str, str]]]:
        from paperzoo.engine.runtime import seed_globals

        index, key = ticket
        kept = torch.default_generator.get_state(), numpy.random.get_state(), random.getstate()
        problems: list[tuple[str, str]] = []
        try:
            for shift in range(TRIES):
                seed_globals(key)
                try:
                    return self.dataset[(index + shift) % len(self.dataset)], problems
                except DataError as error:
                    problems.append((error.path, error.problem))
                except OSError as error:
                    problems.append((str(error.filename or f"sample {index + shift}"), str(error)))
                if not self.replace:
                    return None, problems
            raise DataError(*problems[-1])
        finally:
            torch.default_generator.set_state(kept[0])
            numpy.random.set_state(kept[1])
            random.setstate(kept[2])


class Collate:
    """Collates the samples of a batch, and carries the reports of broken ones along."""

    def __init__(self, collate: Callable | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, pairs: list[tuple[Any, list]]) -> tuple[Any, list[tuple[str, str]]]:
        samples = [sample for sample, _ in pairs if sample is not None]
        return (self.collate(samples) if samples else None), [p for _, problems in pairs for p in problems]


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def note_broken(runtime: Runtime, problems: list[tuple[str, str]], total: int) -> None:
    """Remember and print what could not be read; more than 1% of a set (and more than one file) stops the run."""
    for path, problem in problems:
        if path in runtime.broken:
            continue
        runtime.broken[path] = problem
        import logging

        logging.getLogger("paperzoo").warning("skipped %s: %s", path, problem)
    if problems and len(runtime.broken) > max(1, TOLERATED * total):
        path, problem = next(iter(runtime.broken.items()))
        raise DataError(
            path, f"{problem}; {len(runtime.broken)} of {total} files are broken, more than 1%: repair or remove them"
        )


def make_loader(dataset: Dataset, sampler: Any, workers: int, collate: Callable | None, pin: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=Collate(collate),
        pin_memory=pin,
        worker_init_fn=one_thread if workers else None,
        generator=torch.Generator(),  # else starting workers would draw from the global generator
        multiprocessing_context=("forkserver" if os.name == "posix" else "spawn") if workers else None,
        prefetch_factor=4 if workers else None,
    )


class Batches:
    """An endless source of batches; `next()` is the batch of `runtime.position`, wherever the run was resumed."""

    def __init__(
        self, runtime: Runtime, dataset: Any, batch_size: int, stream: str, workers: int, collate: Callable | None
    ) -> None:
        runtime.share(batch_size)
        self.runtime, self.dataset, self.batch_size = runtime, dataset, batch_size
        self.stream, self.workers, self.collate = stream, workers, collate
        self._iterator: Iterator | None = None
        self._position = -1

    def next(self) -> Any:
        """The collated batch of this step, on the device."""
        position = self.runtime.position
        if self._iterator is None or position != self._position:
            loader = make_loader(
                Seeded(self.dataset, replace=True),
                TicketsFrom(self, position),
                self.workers,
                self.collate,
                self.runtime.device.type == "cuda",
            )
            self._iterator, self._position = iter(loader), position
        (batch, problems), rows = next(self._iterator), self.rows(position)
        self._position += 1
        self.runtime.last_indices[self.stream] = rows
        note_broken(self.runtime, problems, len(self.dataset))
        return self.runtime.to_device(batch)

    def rows(self, position: int) -> list[int]:
        return self.runtime.indices_at(position, len(self.dataset), self.batch_size, self.stream).tolist()

    def tickets(self, position: int) -> list[tuple[int, int]]:
        """(row, key) of each sample; the key depends on the place in the global batch, not on the rank."""
        rows = self.rows(position)
        first = self.runtime.rank * len(rows)
        return [(row, self.runtime.key(self.stream, "sample", position, first + i)) for i, row in enumerate(rows)]


class TicketsFrom:
    """The batch sampler: the tickets of every batch from a position on, without end."""

    def __init__(self, batches: Batches, position: int) -> None:
        self.batches, self.position = batches, position

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.batches.tickets(p) for p in itertools.count(self.position))


class Loader:
    """This rank's samples of an evaluation set, in order, as collated batches on the device."""

    def __init__(self, runtime: Runtime, dataset: Any, batch_size: int, workers: int, collate: Callable | None) -> None:
        self.runtime, self.dataset, self.batch_size = runtime, dataset, batch_size
        self.workers, self.collate = workers, collate
        mine = range(runtime.rank, len(dataset), runtime.world)
        self.tickets = [
            [(i, runtime.key("evaluate", i)) for i in mine[start : start + batch_size]]
            for start in range(0, len(mine), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.tickets)

    def __iter__(self) -> Iterator[Any]:
        pin = self.runtime.device.type == "cuda"
        seeded = Seeded(self.dataset, replace=False)
        for batch, problems in make_loader(seeded, self.tickets, self.workers, self.collate, pin):
            note_broken(self.runtime, problems, len(self.dataset))
            if batch is not None:
                yield self.runtime.to_device(batch)
