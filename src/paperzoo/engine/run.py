"""Runs: from a paper's name to a trained network in a folder, and from the folder back to a recipe.

A run's folder, `runs/<name>/<time>/`, holds `config.toml` (everything needed to repeat it), `metrics.csv`,
`checkpoint.pt`, `model.safetensors` with `config.json`, `report.html` and `log.txt`.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import paperzoo
from paperzoo.catalog.cards import Paper, find
from paperzoo.engine.checkpoint import read_checkpoint, restore
from paperzoo.engine.configure import configure, dump, read_toml
from paperzoo.engine.configure import restore as restore_config
from paperzoo.engine.distributed import shard_recipe
from paperzoo.engine.files import write_text
from paperzoo.engine.logs import RunLog
from paperzoo.engine.loop import Progress, Settings, fit
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime, seed_globals
from paperzoo.engine.weights import load_weights, save_weights
from paperzoo.errors import PaperZooError, UnknownName

logger = logging.getLogger("paperzoo")


@dataclass
class Run:
    """A finished run: its folder, what `evaluate` measured, and the recipe, ready to predict."""

    folder: Path
    metrics: dict[str, float]
    recipe: Recipe
    seconds: float
    stopped: str = ""
    predictions: list[tuple[Any, Any]] = field(default_factory=list)
    export: Any = None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


def build(paper: Paper, config: Any, settings: Settings, facts: dict | None = None, recipe_class: Any = None) -> Recipe:
    """The paper's recipe on a fresh runtime; the same seed gives the same weights on every rank."""
    s = settings
    runtime = Runtime(s.seed, s.device, s.precision, s.accumulate, s.shard, s.channels_last)
    seed_globals(runtime.key("initialise"))
    recipe = (recipe_class or paper.module("recipe").RECIPE)(config, runtime, facts)
    if settings.shard:
        if runtime.world == 1:
            raise PaperZooError(
                "--shard spreads a network over several processes; start with --processes 2 or torchrun"
            )
        shard_recipe(recipe)
    if settings.compile:
        recipe.model.compile()
    return recipe


def preset(paper: Paper, name: str) -> Any:
    presets = paper.module("recipe").PRESETS
    if name not in presets:
        raise UnknownName(f"preset of {paper.slug}", name, presets)
    return presets[name]


def new_folder(paper: Paper, folder: str | Path | None, runtime_rank: int) -> Path:
    """A new run's folder, the same on every rank."""
    chosen: list[str] = [""]
    if runtime_rank == 0:
        if folder is None:
            base = Path("runs") / paper.slug
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
            target = next(
                p
                for p in (base / f"{stamp}{suffix}" for suffix in ("", *(f"_{i}" for i in range(2, 100))))
                if not p.exists()
            )
        else:
            target = Path(folder)
            if (target / "config.toml").exists():
                raise PaperZooError(
                    f"{target}: there is a run already; choose another --out, or: paperzoo resume {target}"
                )
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PaperZooError(f"{target}: cannot be created ({error.strerror})") from None
        chosen = [str(target)]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, 0)
    return Path(chosen[0])


def write_config(
    folder: Path, paper: Paper, preset_name: str, config: Any, settings: Settings, runtime: Runtime
) -> None:
    import tomli_w

    data = {
        "paper": paper.slug,
        "preset": preset_name,
        "paperzoo": paperzoo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": runtime.world,
        "config": dump(config),
        "settings": dump(settings),
    }
    write_text(folder / "config.toml", tomli_w.dumps(data))


@contextmanager
def log_file(folder: Path, active: bool):
    """The package's messages in the run's log.txt as well."""
    if not active:
        yield
        return
    try:
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    except OSError as error:
        raise PaperZooError(f"{folder}: cannot be written ({error.strerror})") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def train(
    name: str,
    data: str | None = None,
    preset_name: str = "embedded",
    changes: dict[str, Any] | None = None,
    settings: Settings | None = None,
    folder: str | Path | None = None,
    on_step: Callable[[int, int, dict], None] | None = None,
    report: bool = True,
) -> Run:
    """Train a paper's recipe and evaluate it.

    Args:
        name: a paper, an alias, or one of its models, which is then the one that is trained.
        data: an embedded set or a path; None keeps the preset's.
        preset_name: "embedded" (seconds), "published" (the paper's own settings), or another that the paper has.
        changes: fields of the paper's config to change.
        settings: seed, device, precision and the like.
        folder: where to write; None makes `runs/<name>/<time>`.

    Raises:
        PaperZooError: for whatever is wrong with the names, values, data or disk.
    """
    paper, settings, changes = find(name), settings or Settings(), dict(changes or {})
    config = preset(paper, preset_name)
    if name != paper.slug and name in {v["name"] for v in paper.variants} and hasattr(config, "model"):
        changes.setdefault("model", name)
    if data is not None:
        changes["data"] = str(data)
    config = configure(config, changes, f"option of {paper.slug}")
    recipe = build(paper, config, settings)
    target = new_folder(paper, folder, recipe.runtime.rank)
    if recipe.runtime.rank == 0:
        write_config(target, paper, preset_name, config, settings, recipe.runtime)
    return carry_out(paper, recipe, target, settings, Progress(), on_step, report)


def resume(folder: str | Path, on_step: Callable[[int, int, dict], None] | None = None, **changed: Any) -> Run:
    """Go on with a run that was stopped or killed; it ends with the same weights as one that was not.

    Args:
        changed: settings to change, for example `device`.
    """
    target = Path(folder)
    stored = read_toml(target / "config.toml")
    paper, config, settings = stored_run(target, stored)
    settings = configure(settings, changed, "setting") if changed else settings
    path = target / "checkpoint.pt"
    progress = Progress()
    recipe = build(paper, config, settings)
    if path.exists():
        state = read_checkpoint(path)
        restore(recipe, state["recipe"], path)
        recipe.runtime.load_state_dict(state["runtime"])
        progress = Progress(**state["loop"])
    return carry_out(paper, recipe, target, settings, progress, on_step, report=True)


def stored_run(folder: Path, stored: dict[str, Any]) -> tuple[Paper, Any, Settings]:
    try:
        paper = find(stored["paper"])
        module = paper.module("recipe")
        kind = type(module.PRESETS.get(stored["preset"], next(iter(module.PRESETS.values()))))
        return paper, restore_config(kind, stored["config"]), restore_config(Settings, stored["settings"])
    except (KeyError, TypeError, AttributeError) as error:
        raise PaperZooError(
            f"{folder / 'config.toml'}: not the configuration of a run ({error} is missing or wrong)"
        ) from None


def carry_out(
    paper: Paper, recipe: Recipe, folder: Path, settings: Settings, progress: Progress, on_step: Any, report: bool
) -> Run:
    runtime = recipe.runtime
    with log_file(folder, runtime.rank == 0):
        logger.info(
            "%s from step %d of %d on %s, %d process(es)",
            paper.slug,
            runtime.step,
            recipe.config.steps,
            runtime.device,
            runtime.world,
        )
        log, progress = fit(recipe, folder, settings, progress, on_step)
        with runtime.autocast():
            metrics = {k: float(v) for k, v in recipe.evaluate("test").items()}
        log.write(max(1, runtime.step), {f"test/{k}": v for k, v in metrics.items()})
        logger.info(
            "ended at step %d%s: %s", runtime.step, f" ({progress.stopped})" if progress.stopped else "", metrics
        )
        save_results(recipe, folder, metrics)
        run = Run(folder, metrics, recipe, progress.seconds, progress.stopped)
        if report:
            run.figures = recipe.figures()  # on every rank: what it evaluates may be a collective
            if runtime.rank == 0:
                write_report(paper, run, log)
    return run


def save_results(recipe: Recipe, folder: Path, metrics: dict[str, float]) -> None:
    """The deployed network as safetensors, with what loading it needs beside it. A collective when sharded."""
    from paperzoo.engine.distributed import reshard, whole

    runtime = recipe.runtime
    model = getattr(recipe, "model", None)
    if model is None:
        return
    network = recipe.deployed
    if runtime.shard_networks:
        reshard(recipe)
        state = whole(network.state_dict())
    else:
        state = network.state_dict()
    if runtime.rank == 0:
        save_weights(folder / "model.safetensors", network, state)
        origin = getattr(network, "paperzoo", None) or getattr(model, "paperzoo", None) or {}
        config = {"library_name": "paperzoo", "paperzoo_version": paperzoo.__version__, "model": None, **origin}
        config |= {"facts": recipe.facts, "metrics": metrics}
        write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False, default=str) + "\n")


def write_report(paper: Paper, run: Run, log: RunLog) -> None:
    from paperzoo.engine.report import write

    write(paper, run, log)


def latest(name: str) -> Path:
    """The folder of a paper's latest finished run under `runs/`.

    Raises:
        PaperZooError: if there is none.
    """
    paper = find(name)
    found = sorted(p.parent for p in (Path("runs") / paper.slug).glob("*/config.json"))
    if not found:
        raise PaperZooError(f"no finished run of {paper.slug} under ./runs; start with: paperzoo run {paper.slug}")
    return found[-1]


def run_folder(source: str | Path) -> Path:
    """A run's folder from its path, a file in it, or a paper's name (its latest run)."""
    path = Path(source)
    if path.is_file():
        path = path.parent
    return path if path.is_dir() else latest(str(source))


def load(source: str | Path, device: str = "auto", weights: str | Path | None = None, **changes: Any) -> Recipe:
    """A finished run as a recipe that predicts and evaluates: `paperzoo.load("runs/…").predict([...])`.

    Args:
        source: a run's folder, a file in it, or a paper's name for its latest run.
        weights: other weights for the network.
        changes: fields of the config to change, for example `data` to evaluate on.
    """
    folder = run_folder(source)
    stored = read_toml(folder / "config.toml")
    paper, config, settings = stored_run(folder, stored)
    config = configure(config, changes, f"option of {paper.slug}") if changes else config
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PaperZooError(f"{folder}: the run is not finished; go on with: paperzoo resume {folder}") from None
    # the stored weights are loaded below, so those that training started from are not needed any more
    if getattr(config, "weights", None) is not None:
        config = configure(config, {"weights": None})
    recipe = build(paper, config, configure(settings, {"device": device, "shard": False, "compile": False}), facts)
    load_weights(recipe.deployed, weights or folder / "model.safetensors")
    if recipe.deployed is not recipe.model:
        recipe.model.load_state_dict(recipe.deployed.state_dict())
    return recipe


def run(name: str, on_stage: Callable[[str], None] | None = None, **arguments: Any) -> Run:
    """A paper end to end: train, evaluate, predict on held-out inputs, export, report. Arguments as for `train`."""
    tell = on_stage or (lambda stage: None)
    paper = find(name)
    tell("train")
    result = train(name, report=False, **arguments)
    recipe, folder = result.recipe, result.folder
    first = recipe.runtime.rank == 0
    with log_file(folder, first):
        tell("predict")
        (folder / "samples").mkdir(exist_ok=True)
        inputs = recipe.samples(folder / "samples")
        if inputs:
            result.predictions = list(zip(inputs, recipe.predict(inputs), strict=True))
        result.figures = recipe.figures()
        if not first:
            return result
        if "deploys" not in paper.card.get("not_applicable", {}):
            tell("export")
            from paperzoo.engine.export import export

            result.export = export(recipe, folder / "model.onnx")
            if not result.export.agrees:
                raise PaperZooError(
                    f"{result.export.path}: ONNX Runtime differs from the network by {result.export.difference:.3g}"
                )
            logger.info("exported %s, largest difference %.3g", result.export.path, result.export.difference)
        tell("report")
        log = RunLog(folder, rank=0, resumed_at=10**12)
        write_report(paper, result, log)
    return result
