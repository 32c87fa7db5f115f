"""The ladder: what a paper has proved, computed anew each time.

builds, matches, learns, deploys, reproduces; see `paperzoo verify --help`. A step ends as "passed", "failed", "n/a" with the
card's reason, or, for "reproduces" alone, "not yet" or "not reproduced".
"""

from __future__ import annotations

import inspect
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from paperzoo.catalog.cards import Paper
from paperzoo.catalog.schema import LADDER, Card, check
from paperzoo.catalog.status import badge
from paperzoo.engine.bench import machine
from paperzoo.engine.checkpoint import read_checkpoint, restore, snapshot
from paperzoo.engine.configure import configure, read_toml
from paperzoo.engine.files import write_text
from paperzoo.engine.logs import read_metrics
from paperzoo.engine.loop import Settings, fit, one_step
from paperzoo.engine.parity import compare
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.run import build, load, save_results, write_config
from paperzoo.engine.weights import parameter_count
from paperzoo.errors import PaperZooError


@dataclass
class Step:
    """One step of the ladder: how it ended, one line that says what was seen, and the figures."""

    name: str
    state: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.state != "failed"


def verify(paper: Paper, steps: tuple[str, ...] = LADDER, tell: Callable[[str], None] | None = None) -> list[Step]:
    """Climb the ladder. A step that fails says why; nothing is raised for it.

    Raises:
        PaperZooError: if the card itself is wrong.
    """
    card = check(paper)
    if card.kind == "reading":
        return [Step(name, "n/a", "a work to read, without code") for name in steps]
    if not paper.has_code:
        return [Step(name, "not yet", "there is no code for this work yet") for name in steps]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        climb = {
            "builds": lambda: builds(paper, card),
            "matches": lambda: matches(paper),
            "learns": lambda: learns(paper, card, Path(folder)),
            "deploys": lambda: deploys(paper, card, Path(folder)),
            "reproduces": lambda: reproduces(paper, card),
        }
        for name in steps:
            if tell:
                tell(name)
            started = time.perf_counter()
            if name in card.not_applicable:
                result = Step(name, "n/a", card.not_applicable[name])
            else:
                try:
                    result = climb[name]()
                except Exception as error:  # whatever a paper's code does, the page is written
                    first = (str(error).strip() or type(error).__name__).splitlines()[0]
                    result = Step(name, "failed", f"{type(error).__name__}: {first}"[:300])
            result.seconds = round(time.perf_counter() - started, 1)
            results.append(result)
    return results


def climb_one(slug: str, steps: tuple[str, ...] = LADDER, threads: int | None = None) -> list[Step]:
    """`verify` by slug, for a process of its own."""
    from paperzoo.catalog.cards import find

    if threads is not None:
        torch.set_num_threads(threads)
    return verify(find(slug), steps)


# -- builds ------------------------------------------------------------------------------------------------------------


def builds(paper: Paper, card: Card) -> Step:
    """Every variant at its published size, without memory (meta device); its parameters counted."""
    if not card.variants:
        return Step(
            "builds", "failed", "no variants in the card: name the models, or say under [not_applicable] why not"
        )
    module = paper.module("model")
    counts, flops = {}, {}
    for variant in card.variants:
        function = getattr(module, variant.name, None)
        if function is None:
            return Step("builds", "failed", f"model.py has no function '{variant.name}'")
        with torch.device("meta"):
            model = function(**(variant.arguments or {}))
        counts[variant.name] = parameter_count(model)
        if counts[variant.name] != variant.parameters:
            return Step(
                "builds",
                "failed",
                f"{variant.name} has {counts[variant.name]:,} parameters, the card says {variant.parameters:,}",
                counts,
            )
        if variant.input and takes_one(model):
            flops[variant.name] = forward_flops(model, variant.input)
    named = {v.name for v in card.variants}
    public = [
        n
        for n, f in inspect.getmembers(module, inspect.isfunction)
        if f.__module__ == module.__name__ and f.__annotations__.get("return") and n not in named and returns_module(f)
    ]
    if public:
        return Step("builds", "failed", f"model.py makes models that the card does not list: {', '.join(public[:4])}")
    shown = ", ".join(f"{n} {count(c)}" for n, c in list(counts.items())[:3])
    more = f" and {len(counts) - 3} more" if len(counts) > 3 else ""
    return Step("builds", "passed", f"{len(counts)} models: {shown}{more}", {"parameters": counts, "flops": flops})


def takes_one(model: torch.nn.Module) -> bool:
    """Whether a network can be called with one tensor alone."""
    needed = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    return len([p for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD]) == 1


def forward_flops(model: torch.nn.Module, size: list[int]) -> int:
    """Floating-point operations (a multiplication and an addition are two) of one input of this size, counted by torch on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.empty(1, *size, device="meta"))
    return counter.get_total_flops()


def returns_module(function: Callable) -> bool:
    """Whether a function is annotated to return an nn.Module and can be called without arguments (so it is a model)."""
    import typing

    try:
        kind = typing.get_type_hints(function).get("return")
        required = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
    except (NameError, TypeError, ValueError):
        return False
    return (
        isinstance(kind, type)
        and issubclass(kind, torch.nn.Module)
        and not required
        and not function.__name__.startswith("_")
    )


def count(n: int) -> str:
    return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}k" if n >= 1e4 else str(n)


# -- matches -----------------------------------------------------------------------------------------------------------


def matches(paper: Paper) -> Step:
    """Every case of parity.py."""
    outcomes = [compare(case) for case in paper.module("parity").cases()]
    if not outcomes:
        return Step("matches", "failed", "parity.py yields no case")
    failed = [o for o in outcomes if not o.passed]
    figures = {"cases": [{"name": o.name, "against": o.against, "largest": o.largest} for o in outcomes]}
    if failed:
        return Step(
            "matches", "failed", f"{failed[0].name}: {failed[0].problems[0]} (against {failed[0].against})", figures
        )
    worst = max(o.largest for o in outcomes)
    peers = list(dict.fromkeys(o.against for o in outcomes if o.against))
    more = f" and {len(peers) - 2} more" if len(peers) > 2 else ""
    return Step(
        "matches",
        "passed",
        f"{len(outcomes)} cases, largest difference {worst:.1e}, against {', '.join(peers[:2])}{more}",
        figures,
    )


# -- learns ------------------------------------------------------------------------------------------------------------


def learns(paper: Paper, card: Card, folder: Path) -> Step:
    """The embedded preset against its bar, its baseline, the untrained network; and stopped and resumed, bit for bit."""
    expect = card.expect
    if expect is None:
        return Step("learns", "failed", "the card has no [expect]")
    module = paper.module("recipe")
    config = module.PRESETS["embedded"]
    settings = Settings(device="cpu")
    recipe = build(paper, config, settings)
    write_config(folder, paper, "embedded", config, settings, recipe.runtime)
    untrained = recipe.evaluate("test").get(expect.metric)
    half = max(1, config.steps // 2)
    started = time.perf_counter()
    _, progress = fit(recipe, folder, settings, last_step=half)
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    _, progress = fit(recipe, folder, settings, progress)
    seconds = time.perf_counter() - started
    metrics = {k: float(v) for k, v in recipe.evaluate("test").items()}
    save_results(recipe, folder, metrics)
    if expect.metric not in metrics:
        return Step("learns", "failed", f"evaluate() has no '{expect.metric}', only {', '.join(metrics)}", metrics)
    value = metrics[expect.metric]
    figures = {
        "metric": expect.metric,
        "value": value,
        "untrained": untrained,
        "baseline": expect.baseline,
        "metrics": metrics,
        "seconds": round(seconds, 1),
    }
    bound = expect.at_least if expect.at_least is not None else expect.at_most
    reached = (lambda v: v >= expect.at_least) if expect.at_least is not None else (lambda v: v <= expect.at_most)
    wanted = f"{'at least' if expect.at_least is not None else 'at most'} {bound:g}"
    if not reached(value):
        return Step("learns", "failed", f"{expect.metric} is {value:.4g}, expected {wanted}", figures)
    if untrained is not None and reached(untrained):
        return Step(
            "learns",
            "failed",
            f"the untrained network has {expect.metric} {untrained:.4g} and reaches the bar ({wanted})",
            figures,
        )
    said = f"{expect.metric} {value:.4g} ({wanted}; {expect.baseline_name} {expect.baseline:g})"
    if card.kind != "model" or getattr(module, "BASELINE", None):
        problem, text = against_baseline(paper, module, expect, value, figures, folder)
        if problem:
            return Step("learns", "failed", problem, figures)
        said += text
    problem = resumes_exactly(paper, config, settings, recipe, checkpoint, folder)
    if problem:
        return Step("learns", "failed", problem, figures)
    return Step("learns", "passed", f"{said}, {seconds:.0f} s, resumed bit for bit", figures)


def against_baseline(
    paper: Paper, module: Any, expect: Any, value: float, figures: dict, folder: Path
) -> tuple[str, str]:
    """A method against its task's default recipe under the same budget: (what is wrong, what to say)."""
    if getattr(module, "BASELINE", None) is None:
        if expect.margin is not None:
            return "the card states a margin, but recipe.py has no BASELINE", ""
        return "", ""
    if expect.margin is None:
        return "recipe.py has a BASELINE, but the card states no margin", ""
    kind, config = module.BASELINE
    other = build(paper, config, Settings(device="cpu"), recipe_class=kind)
    plain = folder / "baseline"
    plain.mkdir()
    fit(other, plain, Settings(device="cpu"))
    theirs = float(other.evaluate("test")[expect.metric])
    gain = value - theirs if expect.at_least is not None else theirs - value
    figures |= {"default_recipe": theirs, "gain": gain}
    if gain < expect.margin:
        return (
            f"{expect.metric} {value:.4g} against {theirs:.4g} of the default recipe: a gain of {gain:.3g}, expected {expect.margin:g}",
            "",
        )
    return "", f", default recipe {theirs:.4g}"


def resumes_exactly(
    paper: Paper, config: Any, settings: Settings, finished: Recipe, checkpoint: dict, folder: Path
) -> str | None:
    """A fresh recipe taken from the half-way checkpoint for some steps, against one that ran through. None if equal.

    The whole second half for short runs; for longer ones the first steps after the checkpoint, compared with a third
    recipe that is taken from the same checkpoint and whose generators were disturbed before.
    """
    half = checkpoint["runtime"]["step"]
    steps = min(config.steps - half, 12)
    states = []
    for disturbed in (False, True):
        recipe = build(paper, config, settings)
        if disturbed:
            torch.rand(17)
        restore(recipe, checkpoint["recipe"])
        recipe.runtime.load_state_dict(checkpoint["runtime"])
        if half + steps == config.steps and not disturbed:
            states.append(snapshot(finished))
            continue
        for _ in range(steps):
            one_step(recipe, folder)
        states.append(snapshot(recipe))
    difference = first_difference(*states)
    return f"resumed from step {half} it ends with other values in '{difference}'" if difference else None


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two nested states differ in a bit, or None."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.shape == b.shape and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)) else path
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{path} (its parts)"
        return next((d for k in a if (d := first_difference(a[k], b[k], f"{path}.{k}".strip(".")))), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return next(
            (d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := first_difference(x, y, f"{path}.{i}"))), None
        )
    if callable(a) and callable(b):
        return None
    return None if a == b or (a != a and b != b) else path


# -- deploys -----------------------------------------------------------------------------------------------------------


def deploys(paper: Paper, card: Card, folder: Path) -> Step:
    """Saved, loaded, predicting the same; exported to ONNX and run in ONNX Runtime at several batches, and sizes where it takes any."""
    from paperzoo.engine.export import export

    if not (folder / "model.safetensors").exists():  # the ladder was entered here
        config, settings = paper.module("recipe").PRESETS["embedded"], Settings(device="cpu")
        config = configure(config, {"steps": 1}) if hasattr(config, "steps") else config
        recipe = build(paper, config, settings)
        write_config(folder, paper, "embedded", config, settings, recipe.runtime)
        fit(recipe, folder, settings)
        save_results(recipe, folder, {})
    recipe = load(folder, device="cpu")
    if wrong := changed_by_storing(recipe, folder):
        return Step("deploys", "failed", f"saved and loaded, '{wrong}' is another tensor")
    exported = export(recipe, folder / "model.onnx")
    size = sum(p.stat().st_size for p in folder.glob("model.onnx*"))
    figures = {"difference": exported.difference, "scale": exported.scale, "bytes": size}
    figures |= {"checked": list(exported.checked), "fixed": exported.fixed}
    if not exported.agrees:
        return Step(
            "deploys",
            "failed",
            f"ONNX Runtime differs by {exported.difference:.2e} at outputs up to {exported.scale:.2g}",
            figures,
        )
    return Step(
        "deploys",
        "passed",
        f"ONNX Runtime within {exported.difference:.1e} at {exported.sizes}; reloaded exactly",
        figures,
    )


def changed_by_storing(recipe: Recipe, folder: Path) -> str | None:
    """The first tensor of a recipe loaded from a run's folder that is not the one in its last checkpoint; None if there is none."""
    stored = torch.load(folder / "checkpoint.pt", weights_only=True)["recipe"]
    kept = stored.get("average") or stored.get("model") or {}
    names = {k.removeprefix("module."): v for k, v in kept.items()}
    again = recipe.deployed.state_dict()
    return next((k for k in again if k in names and not torch.equal(again[k], names[k])), None)


# -- reproduces --------------------------------------------------------------------------------------------------------


def reproduces(paper: Paper, card: Card) -> Step:
    """What a run on the paper's own data and protocol left in `reproduced.json`, held against the card's bar."""
    path = paper.path / "reproduced.json"
    goal = card.reproduces
    if goal is None:
        return Step(
            "reproduces", "not yet", "the paper's data cannot be generated here, and no run on it has been recorded"
        )
    if not path.exists():
        return Step("reproduces", "not yet", f"no run of the preset '{goal.preset}' has been recorded")
    record = json.loads(path.read_text(encoding="utf-8"))
    value = float(record["metrics"][goal.metric])
    good = value >= goal.at_least if goal.at_least is not None else value <= goal.at_most
    bound = f"at least {goal.at_least:g}" if goal.at_least is not None else f"at most {goal.at_most:g}"
    text = f"{goal.metric} {value:.4g} ({bound}), {record['date']}, {record['hardware']}"
    return Step("reproduces", "passed" if good else "not reproduced", text, record)


# -- the page ----------------------------------------------------------------------------------------------------------

MARKS = {"passed": "yes", "failed": "**no**", "n/a": "n/a", "not yet": "–", "not reproduced": "**not reproduced**"}


def status_data(results: dict[str, list[Step]]) -> dict[str, Any]:
    return {slug: {step.name: asdict(step) for step in steps} for slug, steps in results.items()}


def status_page(papers: dict[str, Paper], status: dict[str, Any]) -> str:
    """STATUS.md: a row a paper, then the figures."""
    import onnxruntime
    import torchvision

    done = sum(all(s["state"] != "failed" for s in steps.values()) for steps in status.values())
    lines = [
        "# Status",
        "",
        "Written by `paperzoo verify --all`; not edited by hand. "
        f"{done} of {len(status)} papers with code pass every step that applies; "
        f"{sum(p.card['kind'] != 'reading' and not p.has_code for p in papers.values())} more have their card and wait for code, "
        f"{sum(p.card['kind'] == 'reading' for p in papers.values())} are works to read. "
        f"torch {torch.__version__.split('+')[0]}, torchvision {torchvision.__version__.split('+')[0]}, ONNX Runtime {onnxruntime.__version__}.",
        "",
        "| paper | area | " + " | ".join(LADDER) + " |",
        "|---|---|" + "---|" * len(LADDER),
    ]
    for slug, steps in status.items():
        marks = " | ".join(MARKS[steps[name]["state"]] if name in steps else "–" for name in LADDER)
        lines.append(
            f"| [{slug}](src/paperzoo/papers/{papers[slug].area}/{slug}) | {papers[slug].area.replace('_', ' ')} | {marks} |"
        )
    for slug, steps in status.items():
        lines += ["", f"## {papers[slug].card['name']}", ""]
        lines += [f"- **{name}** {steps[name]['state']}: {steps[name]['text']}" for name in LADDER if name in steps]
    return "\n".join(lines) + "\n"


def readme_table(page: str, papers: dict[str, Paper], status: dict[str, Any]) -> str:
    """A README with the table between its marks `<!-- papers -->` and `<!-- /papers -->` written anew."""
    begin, end = "<!-- papers -->", "<!-- /papers -->"
    if begin not in page or end not in page:
        return page
    lines = ["", "", "| area | paper | year | status | in one line |", "|---|---|---|---|---|"]
    for slug, paper in papers.items():
        if not paper.has_code:
            continue
        link = f"[{slug}](src/paperzoo/papers/{paper.area}/{slug}/notes.md)"
        mark = badge(status.get(slug, {}))
        area = paper.area.replace("_", " ")
        lines.append(f"| {area} | {link} | {paper.card['year']} | `{mark}` | {paper.card['summary']} |")
    head, tail = page.split(begin)[0], page.split(end)[1]
    return head + begin + "\n".join(lines) + "\n\n" + end + tail


def record(paper: Paper, folder: Path) -> Path:
    """Write `reproduced.json` into a paper's folder from a finished run of the preset that the card names.

    It holds the metrics, the configuration, date, commit, hardware, versions and the run's log, thinned to 100 rows.

    Raises:
        PaperZooError: if the run is another paper's or preset's, or is not finished.
    """
    goal = check(paper).reproduces
    stored = read_toml(folder / "config.toml")
    if goal is None:
        raise PaperZooError(f"{paper.slug}: the card has no [reproduces], so there is nothing to hold a run against")
    if (stored.get("paper"), stored.get("preset")) != (paper.slug, goal.preset):
        raise PaperZooError(
            f"{folder}: a run of {stored.get('paper')} {stored.get('preset')}, not of {paper.slug} {goal.preset}"
        )
    try:
        metrics = json.loads((folder / "config.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        raise PaperZooError(f"{folder}: the run is not finished; go on with: paperzoo resume {folder}") from None
    rows = read_metrics(folder / "metrics.csv")
    data = {
        "date": time.strftime("%Y-%m-%d", time.localtime((folder / "config.json").stat().st_mtime)),
        "commit": commit_of(paper.path),
        "hardware": hardware(stored),
        "versions": {"paperzoo": stored.get("paperzoo"), "torch": stored.get("torch"), "python": stored.get("python")},
        "metrics": metrics,
        "config": stored["config"],
        "settings": stored["settings"],
        "log": [{k: float(f"{v:.5g}") for k, v in row.items()} for row in rows[:: max(1, len(rows) // 100)]],
    }
    path = paper.path / "reproduced.json"
    write_text(path, json.dumps(data, indent=1) + "\n")
    return path


def commit_of(folder: Path) -> str:
    """The commit of the checkout that a folder is in; empty outside of one."""
    import subprocess

    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def hardware(stored: dict[str, Any]) -> str:
    device = stored.get("settings", {}).get("device", "auto")
    facts = machine(
        "cuda" if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()) else "cpu", None
    )
    return facts.get("gpu") or f"{facts['processor']}, {facts['threads']} thread(s)"


def refuse_unknown_steps(names: list[str]) -> tuple[str, ...]:
    for name in names:
        if name not in LADDER:
            raise PaperZooError(f"'{name}' is not a step; they are {', '.join(LADDER)}")
    return tuple(names) or LADDER
