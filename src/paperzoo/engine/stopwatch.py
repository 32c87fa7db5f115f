"""Programs of one network timed in turn, each in a process of its own, so that their memory is known, too."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paperzoo.errors import PaperZooError

ROUND = 0.1  # seconds that a round of calls takes at least


@dataclass
class Timing:
    """Milliseconds a call by (batch, threads), medians and quartiles over rounds; ratios to the plain network; peak memory."""

    calls: dict[tuple[int, int], tuple[float, float, float]] = field(default_factory=dict)
    ratios: dict[tuple[int, int], tuple[float, float, float]] = field(default_factory=dict)
    peak_bytes: int = 0

    def milliseconds(self, batch: int, threads: int) -> float:
        return self.calls[batch, threads][1]

    def ratio(self, batch: int, threads: int) -> float:
        """How many times as fast as the plain network: the median over rounds in which the two took turns."""
        return self.ratios[batch, threads][1]

    def described(self) -> dict[str, Any]:
        rows = [
            {
                "batch": batch,
                "threads": threads,
                "milliseconds": self.calls[batch, threads],
                "times_eager": self.ratios.get((batch, threads)),
                "items_a_second": batch * 1e3 / self.milliseconds(batch, threads),
            }
            for batch, threads in sorted(self.calls)
        ]
        return {"calls": rows, "peak_bytes": self.peak_bytes}


def compare(
    tasks: dict[str, dict[str, Any]], inputs: Path, batches: tuple[int, ...], threads: Any, rounds: int
) -> dict[str, Timing]:
    """Time every task against the one named "eager".

    Args:
        tasks: name -> {"engine", "file", "precision"}, or for "eager" how the network is made (see `child`).
        inputs: a file with the example inputs, a tuple of tensors.
        batches: sizes to call with.
        threads: numbers of threads to call with.
        rounds: interleaved, each with enough calls to be timed.
    """
    if rounds < 3:
        raise PaperZooError(f"rounds is {rounds}; at least 3 are needed for a median with a spread")
    found = {name: Timing() for name in tasks}
    for count in threads:
        children = {
            name: Child(task | {"threads": count, "inputs": str(inputs)}, threads=count) for name, task in tasks.items()
        }
        try:
            for batch in batches:
                times: dict[str, list[float]] = {name: [] for name in children}
                for child in children.values():
                    child.ask(f"warm {batch}")
                for i in range(rounds):
                    for name in list(children)[:: 1 if i % 2 == 0 else -1]:
                        times[name].append(float(children[name].ask(f"time {batch}")))
                for name, values in times.items():
                    found[name].calls[batch, count] = tuple(1e3 * v for v in statistics.quantiles(values, n=4))
                    against = [e / v for e, v in zip(times["eager"], values, strict=True)]
                    found[name].ratios[batch, count] = tuple(statistics.quantiles(against, n=4))
            for name, child in children.items():
                found[name].peak_bytes = max(found[name].peak_bytes, int(child.ask("peak")))
        finally:
            for child in children.values():
                child.close()
    return found


class Child:
    """A process of its own that times what it is told to: `child` of a module, with a task as JSON.

    `quiet`: what it writes to the standard error is dropped.
    """

    def __init__(
        self, task: dict[str, Any], module: str = __name__, threads: int | None = None, quiet: bool = False
    ) -> None:
        environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        command = [sys.executable, "-c", f"from {module} import child; child()", json.dumps(task)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env=environment,
        )

    def ask(self, question: str) -> str:
        problem = PaperZooError("a measuring process ended early; its message stands above")
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            while True:
                line = self.process.stdout.readline()
                if not line:
                    raise problem
                if line.startswith("answer "):  # libraries print, too
                    return line.removeprefix("answer ").strip()
        except BrokenPipeError:
            raise problem from None

    def close(self) -> None:
        try:
            self.process.stdin.close()
            self.process.wait(30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


def child() -> None:
    """What runs in the measuring process: makes the program, then answers on standard input and output."""
    from paperzoo.engine.deploy import open_engine
    from paperzoo.engine.export import resize_batch

    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    example = torch.load(task["inputs"], weights_only=True)
    if task["engine"] == "eager":
        network = plain_network(task)

        def call(*inputs: torch.Tensor) -> Any:
            with torch.no_grad():
                return network(*inputs)
    else:
        call = open_engine(task["engine"], Path(task["file"]), task["threads"], task["precision"])
    repeats: dict[str, int] = {}
    for line in sys.stdin:
        word, _, size = line.strip().partition(" ")
        if word == "peak":
            print("answer", peak_memory(), flush=True)
            continue
        inputs = tuple(resize_batch(x, int(size)) for x in example)
        if word == "call":
            call(*inputs)
            print("answer", "done", flush=True)
        elif word == "warm":
            started, calls = time.perf_counter(), 0
            while calls < 2 or time.perf_counter() - started < 3 * ROUND:
                call(*inputs)
                calls += 1
            repeats[size] = enough_calls(lambda inputs=inputs: call(*inputs))
            print("answer", repeats[size], flush=True)
        else:
            print("answer", timed(lambda inputs=inputs: call(*inputs), repeats[size]), flush=True)


def plain_network(task: dict[str, Any]) -> torch.nn.Module:
    """The network as its user would call it: in eval mode and nothing else."""
    if "run" in task:
        from paperzoo.engine.run import load

        network = load(task["run"], device="cpu", weights=task.get("weights")).deployed.eval()
        if "part" not in task:
            return network
        from paperzoo.engine.parts import Part

        return Part(network, **task["part"])
    torch.manual_seed(0)
    if "pair" in task:
        from paperzoo.engine.bench import find_pair

        return find_pair(task["pair"])[2].ours().eval()
    import paperzoo

    return paperzoo.create(task["model"], **task.get("arguments", {})).eval()


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    try:  # the kernel's own word, as getrusage counts what the parent had before this process began
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(call: Callable[[], Any], repeats: int, device: str = "cpu") -> float:
    """Seconds a call."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def enough_calls(call: Callable[[], Any], device: str = "cpu") -> int:
    """How many calls make a round that is long enough to time."""
    return max(1, min(200, round(ROUND / max(1e-5, timed(call, 1, device)))))
