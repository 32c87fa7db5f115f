"""The training loop. One counter, of recipe steps; everything it needs to go on is in the checkpoint."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from paperzoo.engine.checkpoint import save_checkpoint
from paperzoo.engine.files import write_atomically
from paperzoo.engine.logs import RunLog
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import NonFiniteLoss
from paperzoo.errors import PaperZooError

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Settings:
    """How a run is carried out; what is learned, and how, is in the paper's own config."""

    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: Count = 1  # batches to average the gradient over, each of batch_size
    shard: bool = False  # FSDP2 instead of replicas
    compile: bool = False  # torch.compile on the network
    channels_last: bool = True  # memory layout of convolutional networks; contiguous where they are sharded
    log_every: Count | None = None  # steps; None: a hundred times in a run
    evaluate_every: Count | None = None  # steps; None: at the end, and four times before with `patience`
    checkpoint_every: Count | None = None  # steps; None: ten times in a run, at least every 1000 steps
    patience: Count | None = None  # stop after so many evaluations without a better result
    loggers: tuple[Literal["csv", "tensorboard", "mlflow", "wandb"], ...] = ("csv",)


@dataclass
class Progress:
    """What the loop remembers besides the recipe: for early stopping, and the time spent."""

    best: float | None = None
    worse: int = 0  # evaluations since the best
    seconds: float = 0.0
    stopped: str = ""  # why a run ended before its last step


def fit(
    recipe: Recipe,
    folder: Path,
    settings: Settings,
    progress: Progress | None = None,
    on_step: Callable[[int, int, dict], None] | None = None,
    last_step: int | None = None,
) -> tuple[RunLog, Progress]:
    """Train until `config.steps`, writing metrics and checkpoints to `folder`.

    Args:
        progress: from the checkpoint when a run is resumed.
        on_step: called with (steps done, steps in all, the latest logged values), for a progress bar.
        last_step: stop here with a checkpoint, as a kill would, but tidily.

    Raises:
        NonFiniteLoss: with the step, the rows of the batch, and where the batch was kept.
    """
    runtime, steps = recipe.runtime, recipe.config.steps
    end = steps if last_step is None else min(steps, last_step)
    progress = progress or Progress()
    log_every = settings.log_every or max(1, steps // 100)
    save_every = settings.checkpoint_every or max(1, min(1000, steps // 10))
    evaluate_every = settings.evaluate_every or (max(1, steps // 5) if settings.patience else None)
    log = RunLog(folder, settings.loggers, runtime.rank, resumed_at=runtime.step)
    started = time.perf_counter() - progress.seconds
    checkpoint = folder / "checkpoint.pt"

    def save() -> None:
        progress.seconds = time.perf_counter() - started
        save_checkpoint(checkpoint, recipe, dict(vars(progress)))

    with log, asked_to_stop() as stop:
        while runtime.step < end and not progress.stopped:
            values = one_step(recipe, folder)
            done = runtime.step
            if done % log_every == 0 or done == steps:
                latest = averaged(recipe, values)
                log.write(done, latest | {"seconds": time.perf_counter() - started})
                if on_step:
                    on_step(done, steps, latest)
            elif on_step:
                on_step(done, steps, {})
            if evaluate_every and done % evaluate_every == 0 and done < steps:
                judge(recipe, log, progress, settings.patience)
            if done % save_every == 0 or done == end or progress.stopped:
                save()
            elif stop.is_set():
                save()
            if stop.is_set() and done < end:
                raise Interrupted(f"stopped at step {done} of {steps}; go on with: paperzoo resume {folder}")
    return log, progress


class Interrupted(PaperZooError):
    """A signal asked the run to stop; it did, with a checkpoint."""


def one_step(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """One recipe step: its batches, the update, the schedule, the running average."""
    runtime = recipe.runtime
    values: dict[str, Any] = {}
    batch = None
    try:
        for micro in range(runtime.accumulate):
            runtime.begin(micro)
            with runtime.autocast():
                batch = recipe.batch()
                values = recipe.step(batch)
            loss = values.get("loss")
            engine_updates = isinstance(loss, Tensor) and loss.requires_grad
            if engine_updates:
                runtime.update(recipe.optimizer, loss, clip=getattr(recipe.config, "clip", None))
    except NonFiniteLoss as error:
        where = keep_batch(batch, folder, runtime)
        raise NonFiniteLoss(
            f"{error}{where}; the weights of the last checkpoint are intact; a smaller learning rate or --clip may help"
        ) from None
    if engine_updates:
        if getattr(recipe, "scheduler", None) is not None:
            recipe.scheduler.step()
        if getattr(recipe, "average", None) is not None:
            recipe.average.update_parameters(recipe.model)
    runtime.finish()
    return values


def keep_batch(batch: Any, folder: Path, runtime: Any) -> str:
    """Store the batch that broke a run, and say which rows it was."""
    rows = "; ".join(
        f"rows of '{stream}': {rows[:8]}{' …' if len(rows) > 8 else ''}"
        for stream, rows in runtime.last_indices.items()
    )
    path = folder / "bad_batch.pt"
    try:
        write_atomically(path, lambda part: torch.save({"step": runtime.step, "batch": batch}, part))
        return f", {rows or 'its batch'} (kept in {path})"
    except PaperZooError:
        return f", {rows}" if rows else ""


def averaged(recipe: Recipe, values: dict[str, Any]) -> dict[str, float]:
    """The numbers among a step's values, averaged over ranks."""
    numbers = {
        k: v for k, v in values.items() if isinstance(v, int | float) or (isinstance(v, Tensor) and v.numel() == 1)
    }
    if not numbers:
        return {}
    device = recipe.runtime.device
    row = torch.stack(
        [torch.as_tensor(v, dtype=torch.float32).detach().reshape(()).to(device) for v in numbers.values()]
    )
    return dict(zip(numbers, recipe.runtime.mean(row).tolist(), strict=True))


def judge(recipe: Recipe, log: RunLog, progress: Progress, patience: int | None) -> dict[str, float]:
    """Evaluate in the middle of a run, remember whether it was the best, and stop when patience is out."""
    metrics = recipe.evaluate("test")
    log.write(recipe.runtime.step, {f"test/{k}": v for k, v in metrics.items()})
    name, direction = recipe.monitor
    value = metrics.get(name, math.nan)
    better = progress.best is None or (value > progress.best if direction == "max" else value < progress.best)
    if better and not math.isnan(value):
        progress.best, progress.worse = value, 0
    else:
        progress.worse += 1
        if patience and progress.worse >= patience:
            progress.stopped = f"no better {name} than {progress.best:.4g} in {patience} evaluations"
    return metrics


@contextmanager
def asked_to_stop():
    """An event that SIGTERM and the first Ctrl-C set, so that a run ends after its step, with a checkpoint."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
