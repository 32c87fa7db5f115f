"""Benchmarks: ours and a reference in turn, A B A B, as ratios.

Two ways, never mixed. *Like for like*: both in one process, with the same settings, so that only the code differs. *As users
get it*: each in a process of its own; the reference is called plainly (`model.eval()`, `torch.no_grad()`), ours as the
engine runs it (allocator thresholds, channels-last, batch norm folded, `inference_mode`).

A ratio is the reference's time over ours: above 1, ours is faster.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paperzoo.catalog.cards import Paper, papers
from paperzoo.engine.inference import make_ready
from paperzoo.engine.parity import Pair
from paperzoo.engine.runtime import channels_last
from paperzoo.engine.stopwatch import Child, enough_calls, peak_memory, timed
from paperzoo.errors import PaperZooError, UnknownName

MEASURES = ("inference, batch 1", "inference, batch 8", "training step")


def bench(
    name: str,
    against: str | None = None,
    rounds: int = 15,
    threads: int | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a model; see the module's docstring.

    Args:
        name: a model, or a paper, whose first pair is taken.
        against: None or "auto" for the reference in the paper's `parity.py`; "none" for ours alone.
        rounds: interleaved rounds; medians and quartiles are over these.

    Raises:
        UnknownName: if nothing of that name can be measured.
    """
    paper, model, pair = find_pair(name)
    if against not in (None, "auto", "none") and against != pair.against.split()[0]:
        raise PaperZooError(f"{model} can be measured against {pair.against}, not '{against}'")
    if rounds < 3:
        raise PaperZooError(f"rounds is {rounds}; at least 3 are needed for a median with a spread")
    alone = against == "none"
    result: dict[str, Any] = {
        "model": model,
        "paper": paper.slug,
        "against": None if alone else pair.against,
        "machine": machine(device, threads),
        "rounds": rounds,
        "like_for_like": {},
        "as_users_get_it": {},
    }
    for measure in MEASURES:
        for way in ("like_for_like", "as_users_get_it"):
            sides = ["ours"] if alone else ["ours", "reference"]
            result[way][measure] = measure_once(model, measure, way, sides, rounds, threads, device)
    if out is not None:
        from paperzoo.engine.files import write_text

        write_text(Path(out), json.dumps(result, indent=1) + "\n")
    return result


def find_pair(name: str) -> tuple[Paper, str, Pair]:
    """The paper, the model's name and the pair for a model's or a paper's name."""
    known: dict[str, Paper] = {}
    for paper in papers().values():
        text = (paper.path / "parity.py").read_text(encoding="utf-8") if (paper.path / "parity.py").exists() else ""
        if "def pairs(" not in text:
            continue
        pairs = paper.module("parity").pairs() if name == paper.slug or f'"{name}"' in text else {}
        if name in pairs:
            return paper, name, pairs[name]
        if name == paper.slug:
            return paper, *next(iter(pairs.items()))
        known[paper.slug] = paper
    raise UnknownName("model with a reference to measure against", name, known)


def measure_once(
    model: str, measure: str, way: str, sides: list[str], rounds: int, threads: int | None, device: str
) -> dict[str, Any]:
    """One measure in fresh processes: one with both sides, or one a side, asked in turn."""
    groups = [sides] if way == "like_for_like" else [[side] for side in sides]
    task = {"model": model, "measure": measure, "way": way, "threads": threads, "device": device}
    children = [Child(task | {"sides": group}, __name__) for group in groups]
    try:
        homes = {side: child for child, group in zip(children, groups, strict=True) for side in group}
        for side in sides:  # warm-up, and the number of calls that make a round long enough to time
            homes[side].ask(f"warm {side}")
        times: dict[str, list[float]] = {side: [] for side in sides}
        for i in range(rounds):
            for side in sides if i % 2 == 0 else sides[::-1]:
                times[side].append(float(homes[side].ask(f"time {side}")))
        peaks = {side: int(homes[side].ask("peak")) for side in sides}
    finally:
        for child in children:
            child.close()
    row: dict[str, Any] = {}
    for side in sides:
        low, middle, high = statistics.quantiles(times[side], n=4)
        row[side] = {"median_ms": middle * 1e3, "quartiles_ms": [low * 1e3, high * 1e3]}
        if way == "as_users_get_it" or device != "cpu":
            row[side]["peak_mb"] = round(peaks[side] / 2**20, 1)
    if len(sides) == 2:
        ratios = [r / o for r, o in zip(times["reference"], times["ours"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row["ratio"] = {"median": middle, "quartiles": [low, high]}
    return row


def child() -> None:
    """The measuring process: builds its sides, then answers on standard input and output."""
    task = json.loads(sys.argv[1])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    if task["way"] == "as_users_get_it" and task["sides"] == ["ours"]:
        from paperzoo.engine.memory import keep_memory

        keep_memory()
    _, _, pair = find_pair(task["model"])
    calls: dict[str, Callable[[], None]] = {}
    for side in task["sides"]:
        torch.manual_seed(0)
        network = (pair.ours if side == "ours" else pair.reference)().to(task["device"])
        fast = side == "ours" and task["way"] == "as_users_get_it"
        calls[side] = prepare(network, pair, task["measure"], task["way"], fast, task["device"])
    repeats: dict[str, int] = {}
    for line in sys.stdin:
        word, _, side = line.strip().partition(" ")
        if word == "warm":
            started = time.perf_counter()
            calls[side]()
            while time.perf_counter() - started < 0.5:
                calls[side]()
            repeats[side] = enough_calls(calls[side], task["device"])
            answer: Any = repeats[side]
        elif word == "time":
            answer = timed(calls[side], repeats[side], task["device"])
        else:
            cuda = task["device"].startswith("cuda")
            answer = torch.cuda.max_memory_allocated() if cuda else peak_memory()
        print("answer", answer, flush=True)


def prepare(
    network: torch.nn.Module, pair: Pair, measure: str, way: str, fast: bool, device: str
) -> Callable[[], None]:
    """The call that is timed."""
    batch = {"inference, batch 1": 1, "inference, batch 8": 8}.get(measure, pair.train_batch)
    inputs = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in pair.inputs(batch))
    if measure != "training step":
        network.eval()
        if fast:
            make_ready(network, inputs)
        context = torch.inference_mode if fast or way == "like_for_like" else torch.no_grad

        def infer() -> None:
            with context():
                network(*inputs)

        return infer
    network.train()
    if fast:
        channels_last(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)

    def learn() -> None:
        optimizer.zero_grad(set_to_none=True)
        pair.loss(network(*inputs)).backward()
        optimizer.step()

    return learn


def machine(device: str, threads: int | None) -> dict[str, Any]:
    """What the figures belong to."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    data = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        data["gpu"] = torch.cuda.get_device_name()
    return data


def lines(result: dict[str, Any]) -> list[str]:
    """A result for the terminal."""
    text = [
        f"{result['model']} against {result['against'] or 'nothing'}, {result['machine']['threads']} thread(s), medians of {result['rounds']} rounds"
    ]
    for way, title in (("like_for_like", "like for like"), ("as_users_get_it", "as users get it")):
        text.append(f"\n{title:<24}{'ours':>10}{'reference':>12}{'ratio':>8}   quartiles       peak memory")
        for measure, row in result[way].items():
            ours, reference, ratio = row["ours"], row.get("reference"), row.get("ratio")
            line = f"  {measure:<20}{ours['median_ms']:>9.2f} ms"
            if reference:
                low, high = ratio["quartiles"]
                line += f"{reference['median_ms']:>9.2f} ms{ratio['median']:>8.2f}   {low:.2f} … {high:.2f}"
            if "peak_mb" in ours:
                line += f"     {ours['peak_mb']:.0f} MB" + (f" / {reference['peak_mb']:.0f} MB" if reference else "")
            text.append(line)
    return text
