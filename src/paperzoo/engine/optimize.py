"""Optimise: from a trained network to the fastest program of it that still gives its answers.

No engine is the fastest everywhere, so candidates are built, compared with the network, timed against its plain call in
turn, and the best is written with its recipe into a folder that `open_recipe` (`engine/deploy.py`) opens. What could not be
built says why.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paperzoo
from paperzoo.engine import quantise
from paperzoo.engine.deploy import (
    FORMAT,
    Installed,
    Signature,
    checksum,
    install,
    need_openvino,
    open_engine,
    tensorrt_providers,
    uninstall,
)
from paperzoo.engine.explain import first_line
from paperzoo.engine.export import cannot, folded, largest_gap, largest_output, quiet, resize_batch, tensors
from paperzoo.engine.parts import WHOLE, Part, Team, watched
from paperzoo.engine.program import numbers_as_tensors, to_program
from paperzoo.engine.quantisation_aware import tune
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.sizes import try_sizes
from paperzoo.engine.stopwatch import Child, Timing, compare
from paperzoo.engine.weights import save_weights
from paperzoo.errors import PaperZooError

TARGETS = ("auto", "onnxruntime", "openvino", "inductor", "tensorrt")
PRECISIONS = ("fp32", "bf16", "int8")
BATCHES = (1, 8)
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # of the largest output
CALIBRATION, CHECKED = 128, 512  # rows


@dataclass
class Candidate:
    """One engine with the network in one precision. `reason` says why there is none."""

    engine: str
    precision: str
    artefact: str = ""
    reason: str = ""
    difference: float = math.nan  # the largest to the network, of its largest output
    same: float | None = None  # the share of answers that stay the same
    metrics: dict[str, float] = field(default_factory=dict)
    kept: int = 0  # layers left in fp32
    bytes: int = 0
    timing: Timing | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"


@dataclass
class Optimised:
    """What was built and measured; `best` is what the folder holds."""

    folder: Path | None
    best: Candidate
    candidates: list[Candidate]
    eager: Candidate
    monitor: tuple[str, str]


class Bench:
    """A network with its inputs, on which candidates are built and compared.

    Args:
        network: in eval mode on the CPU; not changed.
        inputs: an example, batch first.
        source: how another process makes the same network: {"run": folder, "weights": …} or {"model": name, "arguments": …, "inputs": …}.
        work: a folder for what is built.
        checked: inputs that outputs are compared on; the example where there are none.
        calibration: inputs for int8 ranges.
        dynamic: height and width of images are open, too. Sizes that differ among `checked` are open anyway, as the
            lengths of sentences are, if the network can be exported so.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: tuple[Tensor, ...],
        source: dict[str, Any],
        work: Path,
        checked: quantise.Rows = (),
        calibration: quantise.Rows = (),
        dynamic: bool = False,
        same: Callable[[Any, Any], Tensor | None] | None = None,
    ) -> None:
        with torch.inference_mode(False):  # what was seen in inference mode cannot be traced
            inputs = tuple(x.clone() for x in inputs)
        self.network, self.inputs, self.source, self.work, self.same = network.eval(), inputs, source, work, same
        self.dynamic = dynamic
        self.open_sizes = [
            [i for i in range(x.ndim) if i == 0 or (dynamic and x.ndim == 4 and i > 1) or varies(k, i, inputs, checked)]
            for k, x in enumerate(inputs)
        ]
        self.signature = Signature.of(network, inputs, self.open_sizes)
        others = try_sizes(network, inputs).others if dynamic else ()
        self.others = [x for x in others if self.signature.takes(x)]
        self.seen = {"checked": checked, "calibration": calibration}
        self.answered: float | None = (
            None  # the share of the recipe's calls that the engine took, once it was evaluated
        )
        self.transformer = any(isinstance(m, nn.LayerNorm) for m in network.modules())
        self._onnx: Path | None = None
        self._order: list[str] | None = None
        self.built = False

    @property
    def checked(self) -> quantise.Rows:
        return self.accepted("checked")

    @property
    def calibration(self) -> quantise.Rows:
        return self.accepted("calibration")

    def accepted(self, kind: str) -> quantise.Rows:
        """Rows that a program takes; the example's where there are none."""
        example = [tuple(x[i : i + 1] for x in self.inputs) for i in range(len(self.inputs[0]))]
        return [r for r in self.seen[kind] if self.signature.takes(r)] or example

    # -- building ----------------------------------------------------------------------------------------------------

    def build(self, engine: str, precision: str, ranges: str = "percentile") -> Candidate:
        """A candidate, or one with the reason why there is none."""
        candidate = Candidate(engine, precision)
        try:
            try:
                self.attempt(candidate, ranges)
            except PaperZooError:
                if self.built or self.dynamic or all(where == [0] for where in self.open_sizes):
                    raise
                self.close_sizes()
                self.attempt(candidate, ranges)
            self.built = True
        except PaperZooError as error:
            candidate.reason = str(error)
        candidate.bytes = self.size(candidate)
        return candidate

    def attempt(self, candidate: Candidate, ranges: str) -> None:
        candidate.artefact = getattr(self, f"build_{candidate.engine}")(candidate.precision, ranges)
        self.survive(candidate)
        self.compare(candidate)

    def survive(self, candidate: Candidate) -> None:
        """Call it once in a process of its own: what crashes there does not take this one along."""
        saved = self.work / "example.pt"
        torch.save(self.inputs, saved)
        child = Child(self.task(candidate) | {"threads": 1, "inputs": str(saved)}, threads=1, quiet=True)
        try:
            child.ask("call 1")
            child.ask("call 3")
        except PaperZooError:
            raise PaperZooError(f"{candidate.engine} fails or crashes on this network") from None
        finally:
            child.close()
            saved.unlink()

    def task(self, candidate: Candidate) -> dict[str, Any]:
        """What another process needs to run a candidate."""
        file = str(self.work / candidate.artefact)
        return {"engine": candidate.engine, "precision": candidate.precision, "file": file}

    def close_sizes(self) -> None:
        """Only the batch stays open, where a network cannot be exported with more."""
        self.open_sizes = [[0] for _ in self.inputs]
        self.signature = Signature.of(self.network, self.inputs, self.open_sizes)
        for path in self.work.iterdir():
            path.unlink()
        self._onnx, self._order = None, None

    def build_onnxruntime(self, precision: str, ranges: str) -> str:
        if precision == "bf16":
            raise PaperZooError("ONNX Runtime has no bf16 kernels on a CPU")
        if precision == "fp32":
            return self.onnx().name
        return self.quantise("onnxruntime", ranges)

    def build_tensorrt(self, precision: str, ranges: str) -> str:
        tensorrt_providers()
        return self.build_onnxruntime(precision, ranges)

    def build_openvino(self, precision: str, ranges: str) -> str:
        openvino = need_openvino()
        plain = self.work / "model.xml"
        if not plain.exists():
            try:
                # read, not converted: OpenVINO's converter reports its use over the network
                openvino.save_model(openvino.Core().read_model(str(self.onnx())), str(plain), compress_to_fp16=False)
            except Exception as error:
                raise PaperZooError(f"OpenVINO cannot convert this network: {first_line(error)}") from error
        return plain.name if precision != "int8" else self.quantise("openvino", ranges)

    def quantise(self, engine: str, ranges: str, keep: Sequence[str] = ()) -> str:
        """The exported network in int8, without the layers (ONNX nodes) to `keep`."""
        if engine == "openvino":
            target = self.work / "model.int8.xml"
            quantise.quantise_openvino(self.work / "model.xml", target, self.calibration, self.transformer, keep)
        else:
            target = self.work / "model.int8.onnx"
            tokens = quantise.of_tokens(self.inputs)
            quantise.quantise_onnx(self.onnx(), target, self.calibration, ranges, tokens, keep)
        return target.name

    def sensitivity(self, ranges: str) -> list[str]:
        """The layers (ONNX nodes), those first that int8 spoils most: measured once, on ONNX Runtime's int8 network."""
        if self._order is None:
            quantised = self.work / "order.int8.onnx"
            tokens = quantise.of_tokens(self.inputs)
            quantise.quantise_onnx(self.onnx(), quantised, self.calibration, ranges, tokens)
            self._order = quantise.sensitivity(self.onnx(), quantised, self.calibration[:16])
        return self._order

    def build_inductor(self, precision: str, ranges: str) -> str:
        if precision == "int8":
            raise PaperZooError("int8 is for ONNX Runtime and OpenVINO")
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise PaperZooError("TorchInductor needs a C++ compiler (g++) to build its library")
        from torch._inductor import aoti_compile_and_package

        target = self.work / f"model.{precision}.pt2"
        network = self.ready() if precision == "fp32" else InBfloat16(self.ready())
        try:
            with quiet():
                program = self.program(network)
                options = {"freezing": True, "aot_inductor.use_runtime_constant_folding": False}
                aoti_compile_and_package(program, package_path=str(target), inductor_configs=options)
        except PaperZooError:
            raise
        except Exception as error:
            raise PaperZooError(f"TorchInductor cannot compile this network: {first_line(error)}") from error
        return target.name

    def ready(self) -> nn.Module:
        """A copy of the network with batch norm folded."""
        uninstall(self.network)
        return folded(self.network, self.inputs)

    def program(self, network: nn.Module) -> torch.export.ExportedProgram:
        try:
            return to_program(network, self.inputs, [[i for i in where if i] for where in self.open_sizes])
        except Exception as error:
            raise PaperZooError(cannot(self.network, "torch", error, traced=False)) from error

    def onnx(self) -> Path:
        if self._onnx is None:
            path = self.work / "model.onnx"
            with quiet():
                program = numbers_as_tensors(self.program(self.ready()))
                try:
                    torch.onnx.export(program, dynamo=True, optimize=True, verbose=False).save(str(path))
                except Exception as error:
                    raise PaperZooError(cannot(self.network, "onnx", error, traced=False)) from error
            self._onnx = path
        return self._onnx

    def files(self, artefact: str) -> list[Path]:
        """The artefact and what belongs to it (OpenVINO's .bin, ONNX's external data)."""
        path = self.work / artefact
        beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else [path.with_name(path.name + ".data")]
        return [p for p in (path, *beside) if p.exists()]

    def write(self, candidate: Candidate, folder: Path) -> dict[str, Any]:
        """A candidate's files into a folder, and their description."""
        for path in self.files(candidate.artefact):
            shutil.copyfile(path, folder / path.name)
        signature = self.signature
        described = {"artefact": candidate.artefact, "inputs": signature.inputs, "outputs": signature.outputs}
        return described | ({"structure": signature.structure} if signature.structure else {})

    def size(self, candidate: Candidate) -> int:
        return sum(p.stat().st_size for p in self.files(candidate.artefact)) if candidate.artefact else 0

    # -- comparing ---------------------------------------------------------------------------------------------------

    def install(self, runner: Any) -> list[Installed]:
        """Let a program answer for the network."""
        return [install(self.network, runner, self.signature)]

    def uninstall(self) -> None:
        uninstall(self.network)

    def runner(self, candidate: Candidate, threads: int | None = None) -> Any:
        return open_engine(candidate.engine, self.work / candidate.artefact, threads, candidate.precision)

    def compare(self, candidate: Candidate) -> None:
        """Fill in `difference` and `same`, over the checked inputs, batches of one, two and three, and other sizes."""
        runner, scale, difference, same = self.runner(candidate), 0.0, 0.0, []
        batches = list(quantise.joined(self.checked, 32))
        batches += [tuple(resize_batch(x, n) for x in self.inputs) for n in (1, 2, 3)]
        batches += self.others
        uninstall(self.network)
        align = getattr(self.network, "aligned", None)
        for batch in batches:
            with torch.inference_mode():
                whole = self.network(*batch)
            expected, found = tensors(whole), runner(*batch)
            if [x.shape for x in expected] != [x.shape for x in found]:
                raise PaperZooError(f"{candidate.name}: the outputs have other shapes than the network's")
            answers = self.same(whole, self.signature.restore(found)) if self.same is not None else None
            if answers is not None:
                same.append(answers.flatten().float().mean() * len(batch[0]))
            for a, b in zip(expected, align(expected, found) if align else found, strict=True):
                difference, scale = max(difference, largest_gap(a, b)), max(scale, largest_output(a))
        candidate.difference = difference / max(scale, 1e-12)
        candidate.same = float(sum(same) / sum(len(b[0]) for b in batches)) if same else None
        limit = TOLERANCE.get(candidate.precision)
        if limit is not None and not difference <= 1e-4 + limit * scale:
            raise PaperZooError(f"the outputs differ by {difference:.2g} at outputs up to {scale:.2g}")

    def time(self, candidates: Sequence[Candidate], eager: Candidate, threads: Sequence[int], rounds: int) -> None:
        """Fill in `timing`: every candidate and the plain network in turn, each in a process of its own."""
        files = {c.name: c for c in candidates if not c.reason}
        tasks = {name: self.task(c) for name, c in files.items()}
        saved = self.work / "example.pt"
        torch.save(self.inputs, saved)
        tasks["eager"] = {"engine": "eager", **self.source}
        for name, timing in compare(tasks, saved, BATCHES, threads, rounds).items():
            (eager if name == "eager" else files[name]).timing = timing
        saved.unlink()


def varies(k: int, i: int, inputs: tuple[Tensor, ...], rows: quantise.Rows) -> bool:
    """Whether size `i` of input `k` is another one in some row than in the example."""
    return any(
        len(r) == len(inputs) and r[k].ndim == inputs[k].ndim and r[k].shape[i] != inputs[k].shape[i] for r in rows
    )


class InBfloat16(nn.Module):
    """A network under autocast, its outputs as they were."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        from torch.utils._pytree import tree_map

        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.network(*inputs)
        return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, outputs)


# -- a run -------------------------------------------------------------------------------------------------------------


def optimize(
    source: str | Path,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    target: str = "auto",
    precision: str = "fp32",
    calibrate: str | None = None,
    max_drop: float = 0.01,
    min_same: float = 0.99,
    ranges: str = "percentile",
    dynamic: bool = False,
    rounds: int = 7,
    tune_steps: int = 0,
    on_stage: Callable[[str], None] | None = None,
    on_step: Callable[[int, int, dict], None] | None = None,
) -> Optimised:
    """Optimise a finished run's network and write the deployable folder.

    Args:
        source: a run's folder, or a paper's name for its latest run.
        out: the folder to write; None makes `<run>/deploy`, replacing an older one.
        weights: other weights for the network.
        target: an engine, or "auto" for the fastest at batch 1 on all threads, of those that are installed.
        precision: "fp32", "bf16" or "int8".
        calibrate: data for int8 ranges, an embedded set's name or a path; None takes the run's training data.
        max_drop: how much of the watched metric int8 may cost, relatively.
        min_same: the share of the answers that int8 has to leave as they were, where a task's answers can be counted.
        ranges: how ONNX Runtime's int8 ranges are found: "minmax", "entropy" or "percentile".
        dynamic: images of other sizes are taken, too.
        rounds: of timing.
        tune_steps: before int8, so many steps of quantisation-aware training on `calibrate` or the run's own data.

    Raises:
        PaperZooError: for unknown names, or when no candidate keeps the network's answers.
    """
    from paperzoo.engine.run import load, run_folder

    for value, known, what in (
        (target, TARGETS, "target"),
        (precision, PRECISIONS, "precision"),
        (ranges, quantise.RANGES, "ranges"),
    ):
        if value not in known:
            raise PaperZooError(f"{what} '{value}' is not known; there are {', '.join(known)}")
    if tune_steps < 0 or (tune_steps and precision != "int8"):
        raise PaperZooError(f"tune_steps is {tune_steps}; it is a number of steps, 1 or more, before precision int8")
    if not max_drop >= 0:
        raise PaperZooError(f"max_drop is {max_drop}; it is a share of the metric, 0 or more")
    if not 0 <= min_same <= 1:
        raise PaperZooError(f"min_same is {min_same}; it is a share of the answers, between 0 and 1")
    tell = on_stage or (lambda stage: None)
    run = run_folder(source)
    recipe = load(run, device="cpu", weights=weights)
    if precision == "int8" and recipe.engine_parts != WHOLE:
        raise PaperZooError(
            f"{type(recipe).__name__} calls its network in parts; int8 is for networks that are called as one"
        )
    place = Path(out) if out is not None else run / "deploy"
    if place.exists() and not (place / "deploy.json").exists() and any(place.iterdir()):
        raise PaperZooError(f"{place}: holds other files; choose another --out")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".optimize-") as folder:
        work = Path(folder) / "work"
        work.mkdir()
        tell("evaluate")
        eager = Candidate("eager", "fp32", metrics=recipe.evaluate("test"), same=1.0, difference=0.0)
        calibration: quantise.Rows = []
        if tune_steps:
            tell("tune")
            recipe = tune(run, Path(folder) / "tune", tune_steps, calibrate, weights, on_step=on_step)
            weights = Path(folder) / "tuned.safetensors"
            save_weights(weights, recipe.deployed)
        if precision == "int8":
            learned = load(run, device="cpu", data=calibrate) if calibrate else recipe
            calibration = quantise.captured(learned, "train", CALIBRATION)
        source = {"run": str(run.resolve()), "weights": str(weights) if weights else None}
        if recipe.engine_parts == WHOLE:
            checked = quantise.captured(recipe, "test", CHECKED)
            inputs = tuple(recipe.example())
            bench = Bench(recipe.deployed, inputs, source, work, checked, calibration, dynamic, recipe.same_answers)
        else:
            bench = team_of(recipe, source, work, dynamic)
        candidates = []
        for engine in TARGETS[1:4] if target == "auto" else (target,):
            tell(f"build {engine} {precision}")
            candidate = bench.build(engine, precision, ranges)
            candidates.append(candidate)
            if not candidate.reason:
                judge(bench, recipe, candidate, eager, max_drop, min_same, ranges)
        usable = [c for c in candidates if not c.reason]
        if not usable:
            reasons = "; ".join(f"{c.engine}: {c.reason}" for c in candidates)
            raise PaperZooError(f"no program of {run} keeps the network's answers. {reasons}")
        tell("time")
        eager.bytes = (run / "model.safetensors").stat().st_size
        bench.time(usable, eager, thread_counts(), rounds)
        best = min(usable, key=lambda c: c.timing.milliseconds(1, max(thread_counts())))
        tell("write")
        result = Optimised(place, best, candidates, eager, recipe.monitor)
        write_folder(Path(folder) / "new", run, bench, recipe, result, weights)
        replace_folder(Path(folder) / "new", place)
    return result


def team_of(recipe: Recipe, source: dict[str, Any], work: Path, dynamic: bool) -> Team:
    """The recipe's parts, each on a bench in a folder of its own.

    Raises:
        PaperZooError: where evaluating calls none of them.
    """
    seen = watched(recipe, "test", CHECKED)
    if not seen:
        raise PaperZooError(
            f"{type(recipe).__name__} predicts without calling its network, so no engine can make it faster"
        )
    benches = {}
    for i, (name, calls) in enumerate(seen.items()):
        folder = work / str(i)
        folder.mkdir()
        part = Part(recipe.deployed, name, calls.structure)
        told = source | {"part": {"name": name, "structure": calls.structure}}
        benches[name] = Bench(part, calls.example, told, folder, calls.rows, (), dynamic)
    return Team(recipe.deployed, benches, {name: calls.calls for name, calls in seen.items()})


def thread_counts() -> list[int]:
    return sorted({1, torch.get_num_threads()})


def judge(
    bench: Bench | Team,
    recipe: Recipe,
    candidate: Candidate,
    eager: Candidate,
    max_drop: float,
    min_same: float,
    ranges: str,
) -> None:
    """The recipe's metrics with the candidate in the network's place; int8 gives layers back to fp32 until metric and answers are kept."""

    def spoilt() -> str:
        lost = drop(candidate.metrics, eager.metrics, recipe.monitor)
        if lost > max_drop:
            return f"loses {lost:.1%} of {recipe.monitor[0]}, more than {max_drop:.1%}"
        if candidate.same is not None and candidate.same < min_same:
            return f"leaves {candidate.same:.1%} of the answers as they were, fewer than {min_same:.1%}"
        return ""

    candidate.metrics = evaluated(bench, recipe, bench.runner(candidate))
    if bench.answered == 0:
        candidate.reason = "the recipe does not call its network as `example` does, so no engine can stand in for it"
        return
    if candidate.precision != "int8" or not spoilt():
        return
    order = bench.sensitivity(ranges)
    for count in quantise.kept_counts(len(order))[1:]:
        bench.quantise(candidate.engine, ranges, order[:count])
        bench.compare(candidate)
        candidate.metrics, candidate.kept = evaluated(bench, recipe, bench.runner(candidate)), count
        if not spoilt():
            break
    candidate.bytes, candidate.reason = bench.size(candidate), spoilt()


def evaluated(bench: Bench | Team, recipe: Recipe, runner: Any) -> dict[str, float]:
    installed = bench.install(runner)
    try:
        metrics = {k: float(v) for k, v in recipe.evaluate("test").items()}
    finally:
        bench.uninstall()
    called = [
        one for one in installed if one.calls + one.passed_on
    ]  # what is kept from an earlier call is not called again
    bench.answered = min((one.calls / (one.calls + one.passed_on) for one in called), default=0.0)
    return metrics


def drop(found: dict[str, float], before: dict[str, float], monitor: tuple[str, str]) -> float:
    """What was lost of the watched metric, relatively; 0 for a recipe without it."""
    name, mode = monitor
    if name not in before or name not in found:
        return 0.0
    lost = before[name] - found[name] if mode == "max" else found[name] - before[name]
    return lost / max(abs(before[name]), 1e-12)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_folder(
    folder: Path, run: Path, bench: Bench | Team, recipe: Recipe, result: Optimised, weights: str | Path | None
) -> None:
    folder.mkdir()
    for name in ("config.toml", "config.json"):
        shutil.copyfile(run / name, folder / name)
    if weights:
        save_weights(folder / "model.safetensors", bench.network)
    else:
        shutil.copyfile(run / "model.safetensors", folder / "model.safetensors")
    program = bench.write(result.best, folder)
    description = {
        "format": FORMAT,
        "paperzoo": paperzoo.__version__,
        "engine": result.best.engine,
        "precision": result.best.precision,
        **program,
        "labels": recipe.facts.get("labels"),
        "monitor": list(result.monitor),
        "measured": [described(c) for c in (result.eager, *result.candidates)],
        "files": {str(p.relative_to(folder)): checksum(p) for p in sorted(folder.rglob("*")) if p.is_file()},
    }
    (folder / "deploy.json").write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_folder(new: Path, place: Path) -> None:
    """`new` in the place of an older folder, which is away only between two renames."""
    if place.exists():
        place.rename(new.with_name("old"))
    new.rename(place)


def described(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON; what was not measured is None."""
    data = asdict(candidate) | {"timing": candidate.timing.described() if candidate.timing else None}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
