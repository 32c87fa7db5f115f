"""What the commands print. Plain text where speed matters, Rich where it helps, JSON where a script asks."""

from __future__ import annotations

import dataclasses
import json as json_module
import logging
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperzoo.catalog.cards import find, papers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paperzoo.engine.run import Run
    from paperzoo.engine.verify import Step


def emit(value: Any) -> None:
    print(json_module.dumps(value, indent=2, ensure_ascii=False, default=str))


def prepare_process() -> None:
    """Set up a process of our own: waiting threads, allocator thresholds, warnings of files that are skipped."""
    from paperzoo.engine.memory import keep_memory

    # threads that wait give their core to others: on a busy machine training is twice as fast (read when torch loads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_memory()
    log = logging.getLogger("paperzoo")
    for old in [h for h in log.handlers if h.name == "terminal"]:  # this process ran a command before
        log.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.name = "terminal"
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    log.addHandler(handler)


def first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


# -- runs --------------------------------------------------------------------------------------------------------------


class Bar:
    """A progress bar for a run's stages; silent when the output is JSON, no terminal, or another rank's."""

    def __init__(self, title: str, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.quiet = quiet or not first_rank()
        self.console = Console(stderr=True, quiet=self.quiet)
        columns = [
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        ]
        self.progress = Progress(*columns, console=self.console, disable=self.quiet)
        self.name, self.task, self.plain_at = title, None, 0.0

    def stage(self, name: str) -> None:
        """What begins now; a bar appears with its first step."""
        self.name, self.task = name, None
        if name != "train":
            self.console.print(f"{name} …", highlight=False)

    def step(self, done: int, total: int, values: dict[str, float]) -> None:
        if self.task is None:
            self.task = self.progress.add_task(self.name, total=total, values="")
        said = {"values": "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "seconds")} if values else {}
        self.progress.update(self.task, completed=done, total=total, **said)
        if values and not self.console.is_terminal and time.monotonic() - self.plain_at > 5:  # a log, not a screen
            self.plain_at = time.monotonic()
            self.console.print(f"step {done}/{total}  {said['values']}", highlight=False)

    def count(self, name: str, done: int, total: int | None) -> None:
        """How many inputs of a source are done; a single one has no bar."""
        if total == 1:
            return
        if self.task is None or self.name != name:
            self.name, self.task = name, self.progress.add_task(name[-40:], total=total, values="")
        self.progress.update(self.task, completed=done)

    def say(self, text: str) -> None:
        """A line of the answer, on the standard output, above the bar."""
        if self.console.is_terminal and sys.stdout.isatty() and not self.quiet:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)


@contextmanager
def progress(title: str, json: bool):
    bar = Bar(title, json)
    with bar.progress:
        yield bar


def plain(value: Any) -> Any:
    """A typed result as JSON values; big arrays and pictures as a description."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        size = 1
        for n in value.shape:
            size *= n
        return value.tolist() if size <= 256 else {"shape": list(value.shape), "type": str(value.dtype)}
    if hasattr(value, "size") and hasattr(value, "mode"):
        return {"picture": list(value.size)}
    return value


def brief(value: Any) -> str:
    """A typed result in one line."""
    data = plain(value)
    if not isinstance(data, dict):
        return str(data)[:160]
    parts = []
    for key, item in data.items():
        if isinstance(item, float):
            parts.append(f"{key} {item:.4g}")
        elif isinstance(item, str | int):
            parts.append(f"{key} {item}")
        elif isinstance(item, list):
            inner = ", ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in item[:4])
            parts.append(f"{key} [{inner}{', …' if len(item) > 4 else ''}]")
    return ", ".join(parts)[:200]


def finished(run: Run, json: bool) -> None:
    if not first_rank():
        return
    if json:
        exported = run.export and {"path": str(run.export.path), "difference": run.export.difference}
        shown = [{"input": str(v), "result": plain(r)} for v, r in run.predictions]
        return emit(
            {
                "folder": str(run.folder),
                "metrics": run.metrics,
                "seconds": run.seconds,
                "stopped": run.stopped,
                "export": exported,
                "predictions": shown,
            }
        )
    print()
    table(run.metrics)
    print(f"\ntrained in {run.seconds:.1f} s{', stopped early: ' + run.stopped if run.stopped else ''}")
    for value, result in run.predictions[:8]:
        print(f"  {value}: {brief(result)}")
    if run.export is not None:
        print(f"exported {run.export.path}, ONNX Runtime agrees within {run.export.difference:.1e}")
    if run.recipe.runtime.broken:
        print(f"skipped {len(run.recipe.runtime.broken)} broken file(s); the report names them")
    print(f"\nreport   {run.report}")
    paper = find(run.folder.parent.name) if run.folder.parent.name in papers() else None
    print(f"predict  paperzoo predict {run.folder} YOUR_FILE")
    if paper is not None and hasattr(run.recipe.config, "data"):
        print(f"train    paperzoo train {paper.slug} --data path/to/your/data")
        print(f"read     {paper.path / 'notes.md'}")


def table(values: dict[str, float]) -> None:
    width = max((len(k) for k in values), default=0) + 2
    for name, value in values.items():
        print(f"  {name.replace('_', ' '):<{width}}{value:.4g}")


def metrics(values: dict[str, float], json: bool) -> None:
    emit(values) if json else table(values)


def predictions(recipe: Any, inputs: list, draw: Path | None, frames: int | None, json: bool) -> int:
    """Print what is predicted, as it is predicted. Returns the exit code: 1 if an input could not be read."""
    from paperzoo.engine.predicting import predict_all

    failed, filmed, first = 0, {}, True
    with progress("predict", json) as bar:
        on_step = lambda name, done, count: bar.count(name, done, count)  # noqa: E731
        for p in predict_all(recipe, inputs, draw, frames, on_step):
            failed += p.error is not None
            if json:  # a list, written as it grows
                row = {"input": p.name, "result": plain(p.result), "picture": p.picture}
                row |= {"error": p.error} if p.error else {}
                text = json_module.dumps(row, indent=2, ensure_ascii=False, default=str)
                print(("[\n" if first else ",\n") + text, end="", flush=True)
                first = False
            elif p.error:
                print(f"error: {p.error}", file=sys.stderr)
            elif p.picture and p.picture.endswith(".mp4"):
                filmed[p.picture] = filmed.get(p.picture, 0) + 1
            else:
                bar.say(f"{p.name}: {brief(p.result)}" + (f"  -> {p.picture}" if p.picture else ""))
    if json:
        print("[]" if first else "\n]")
    for path, count in filmed.items():
        print(f"{path}: {count} frames")
    return int(failed > 0)


def exported(result: Any, json: bool) -> None:
    if json:
        return emit(
            {
                "path": str(result.path),
                "format": result.format,
                "difference": result.difference,
                "agrees": result.agrees,
                "checked": result.checked,
                "fixed": result.fixed,
            }
        )
    verdict = "agrees" if result.agrees else "does NOT agree"
    print(
        f"{result.path}: {verdict} with the network, largest difference {result.difference:.2e} at outputs up to {result.scale:.3g}, "
        f"at {result.sizes}"
    )


def optimised(result: Any, json: bool) -> None:
    """Every candidate as a row: speed against the plain network, memory, size, what it costs; then the folder."""
    from paperzoo.engine.optimize import described

    if json:
        rows = [described(c) for c in (result.eager, *result.candidates)]
        return emit({"folder": str(result.folder), "best": result.best.name, "measured": rows})
    from rich.console import Console
    from rich.table import Table

    name = result.monitor[0]
    calls = sorted(result.eager.timing.calls)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "",
        *(f"batch {b}, {t} thread{'s' * (t > 1)}" for b, t in calls),
        "memory",
        "size",
        "differs",
        "same answers",
        name,
    ):
        shown.add_column(title, justify="left" if not title else "right")
    built = [c for c in result.candidates if c.timing is not None]
    for c in (result.eager, *built):
        times = [f"{c.timing.milliseconds(*k):.2f} ms ({c.timing.ratio(*k):.2f}x)" for k in calls]
        same = "" if c.same is None else f"{c.same:.2%}"
        metric = f"{c.metrics[name]:.4g}" if name in c.metrics else ""
        row = [
            f"{c.timing.peak_bytes / 2**20:.0f} MB",
            f"{c.bytes / 2**20:.1f} MB",
            f"{c.difference:.1e}",
            same,
            metric,
        ]
        shown.add_row(("* " if c is result.best else "  ") + c.name, *times, *row)
    Console(width=max(160, Console().width)).print(shown)
    for c in result.candidates:
        if c.reason:
            print(f"  {c.name}: {c.reason}")
        elif c.kept:
            print(f"  {c.name}: {c.kept} layers stay in fp32")
    print(f"\nwrote    {result.folder} ({result.best.name})")
    print(f"serve    paperzoo serve {result.folder}")


# -- proof -------------------------------------------------------------------------------------------------------------


def climb_all(slugs: list[str], steps: tuple[str, ...], processes: int) -> Iterator[list[Step]]:
    """The ladder of every paper, in order; several at a time if asked, each with its share of the cores."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from paperzoo.engine.verify import climb_one

    if processes == 1:
        yield from (climb_one(slug, steps) for slug in slugs)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield from pool.map(climb_one, slugs, [steps] * len(slugs), [threads] * len(slugs))


def verify(
    wanted: list[str], all_papers: bool, steps: list[str], json: bool, processes: int = 1, write: bool = False
) -> int:
    """Climb, print, and with `--all` or `--write` write STATUS.md and the status the catalogue shows. 1 if a step failed."""
    from paperzoo.catalog.fingerprint import record
    from paperzoo.engine.proof import write_status
    from paperzoo.engine.verify import refuse_unknown_steps, status_data

    chosen = refuse_unknown_steps(steps)
    found = [p for p in papers().values() if p.has_code] if all_papers else [find(n) for n in wanted]
    results = {}
    for paper, climbed in zip(found, climb_all([p.slug for p in found], chosen, processes), strict=True):
        results[paper.slug] = climbed
        if not json:
            print(paper.slug)
            for step in climbed:
                print(f"  {step.name:<12}{step.state:<9} {step.text}  ({step.seconds:.0f} s)", flush=True)
    status = status_data(results)
    if json:
        emit(status)
    if (all_papers or write) and not steps:
        record(paper for paper in found if all(step.ok for step in results[paper.slug]))
        page = write_status(status, keep_others=not all_papers)
        if page is not None and not json:
            print(f"wrote {page}")
    return int(any(not step.ok for steps in results.values() for step in steps))


def benchmark(result: dict[str, Any], json: bool) -> None:
    if json:
        return emit(result)
    from paperzoo.engine.bench import lines

    print("\n".join(lines(result)))
