"""Papers that run in a web page: a small network, trained by the paper's embedded preset, as ONNX, with what a page must know.

`prepare(slug)` trains and exports once and keeps the result in the cache folder; `write(prepared, folder)` puts it where a page
finds it, as scripts, because pages that are opened from a disk may not fetch files. The page's side is in `web/src/try`.

A paper whose embedded network is too large for a page names a preset "browser": the same architecture with smaller published code.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paperzoo.catalog.cards import Paper, cache_folder, find, papers, variants
from paperzoo.engine.configure import configure, dump
from paperzoo.engine.export import onnx_runner, quiet, tensors
from paperzoo.engine.files import write_atomically, write_text
from paperzoo.engine.loop import Settings
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.run import train as train_run
from paperzoo.errors import PaperZooError

LARGEST = 8_000_000  # bytes of a model that a page may ask a visitor to load


@dataclass(frozen=True)
class Prepared:
    """A paper's network for the browser: a folder with `model.onnx` and `spec.json`, and the latter's content."""

    slug: str
    folder: Path
    spec: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"


def eligible() -> list[str]:
    """The papers that a page can run: the recipe says how, verify's step "deploys" passed, and the network is small enough."""
    from paperzoo.catalog.status import read_status

    status = read_status()
    return [slug for slug, paper in papers().items() if suits(paper, status.get(slug, {}))]


def suits(paper: Paper, steps: dict[str, Any]) -> bool:
    """Whether a paper with these verified steps is eligible."""
    deploys = steps.get("deploys", {})
    if deploys.get("state") != "passed" or not says_how(paper):
        return False
    return "browser" in paper.module("recipe").PRESETS or deploys["figures"].get("bytes", 0) <= LARGEST


def says_how(paper: Paper) -> bool:
    """Whether the paper has a network to deploy and its recipe overrides `browser`.

    Where RECIPE is a function, whether one of the recipes in its module does.
    """
    if not paper.has_code or "deploys" in paper.card.get("not_applicable", {}):
        return False
    module = paper.module("recipe")
    kinds = [module.RECIPE] if isinstance(module.RECIPE, type) else list(vars(module).values())
    return any(isinstance(k, type) and issubclass(k, Recipe) and k.browser is not Recipe.browser for k in kinds)


def prepare(
    slug: str,
    *,
    train: bool = True,
    on_step: Callable[[int, int, dict], None] | None = None,
    changes: dict[str, Any] | None = None,
) -> Prepared | None:
    """The paper's network for the browser: from the cache, else trained now by its embedded preset.

    Args:
        train: False to take it from the cache or not at all.
        on_step: called as `paperzoo.engine.run.train` calls it.
        changes: fields of the preset to change, such as fewer steps for a test.

    Returns:
        None if the paper cannot run in a page, or is not in the cache and must not be trained.

    Raises:
        PaperZooError: if the network cannot be exported, ONNX Runtime differs from it, or it is larger than 8 MB.
    """
    paper = find(slug)
    if not says_how(paper):
        return None
    presets = paper.module("recipe").PRESETS
    preset_name = "browser" if "browser" in presets else "embedded"
    config = configure(presets[preset_name], changes or {}, f"option of {paper.slug}")
    base = cache_folder() / "browser"
    folder = base / f"{paper.slug}-{key(paper, config)}"
    with contextlib.suppress(OSError, ValueError):
        return Prepared(paper.slug, folder, json.loads((folder / "spec.json").read_text(encoding="utf-8")))
    if not train:
        return None
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{paper.slug}-", dir=base) as part:
        run = train_run(
            paper.slug,
            preset_name=preset_name,
            changes=changes,
            settings=Settings(device="cpu"),
            folder=Path(part) / "run",
            on_step=on_step,
            report=False,
        )
        spec = run.recipe.browser()
        if spec is None:
            return None
        made = Path(part) / "made"
        made.mkdir()
        network, inputs = run.recipe.browser_network()
        spec |= {
            "slug": paper.slug,
            "task": paper.card["task"],
            "inputs": export(network, inputs, made / "model.onnx"),
            "parameters": sum(p.numel() for p in run.recipe.deployed.parameters()),
            "bytes": (made / "model.onnx").stat().st_size,
            "seconds": round(run.seconds),
            "metric": run.recipe.monitor[0],
            "metrics": run.metrics,
        }
        if spec["bytes"] > LARGEST:
            raise PaperZooError(
                f"{paper.slug}: its network has {spec['bytes'] / 1e6:.1f} MB, a page takes {LARGEST / 1e6:.0f}; name a smaller preset 'browser'"
            )
        write_text(made / "spec.json", json.dumps(spec, ensure_ascii=False))
        if folder.exists():  # without a readable spec.json, or made by another process meanwhile
            shutil.rmtree(folder)
        os.replace(made, folder)
    return Prepared(paper.slug, folder, spec)


def write(prepared: Prepared, folder: str | Path) -> list[Path]:
    """`spec.js` and `model.js` for a page: scripts that hand the spec, and the model in base64, to the widget.

    Returns:
        the two files.
    """
    target, name = Path(folder), json.dumps(prepared.slug)
    open_table = "(globalThis.paperzooTry ??= {specs: {}, models: {}})"
    model = base64.b64encode(prepared.model.read_bytes()).decode()
    spec = json.dumps(prepared.spec, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    write_text(target / "spec.js", f"{open_table}.specs[{name}] = {spec};\n")
    write_text(target / "model.js", f'{open_table}.models[{name}] = "{model}";\n')
    return [target / "spec.js", target / "model.js"]


# -- export ------------------------------------------------------------------------------------------------------------


def export(network: nn.Module, inputs: tuple, path: Path) -> list[dict[str, Any]]:
    """Write a network as ONNX for exactly these inputs, a batch of one, and compare ONNX Runtime's outputs with it.

    Returns:
        name, shape and type of each input of the graph.

    Raises:
        PaperZooError: if it cannot be exported or ONNX Runtime differs.
    """
    import onnxruntime

    network = network.eval().to("cpu")
    with torch.inference_mode():
        expected = tensors(network(*inputs))
    try:
        with quiet(), flat_suppression(), torch.no_grad():
            program = torch.export.export(network, inputs, strict=False)
            exported = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False)
        write_atomically(path, lambda part: exported.save(str(part)))
    except PaperZooError:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PaperZooError(f"{type(network).__name__} cannot be exported for a page: {first[:200]}") from error
    found = onnx_runner(path)(*inputs)
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4):
            raise PaperZooError(f"{path}: ONNX Runtime's outputs differ from the network's")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [{"name": x.name, "shape": x.shape, "type": x.type} for x in session.get_inputs()]


@contextlib.contextmanager
def flat_suppression() -> Iterator[None]:
    """Non-maximum suppression by class without a branch, for export.

    torchvision's `batched_nms` chooses its way by the number of boxes, which a graph does not know; both ways give the same.
    Detectors import it by name, hence the look through their modules.
    """
    from torchvision import ops

    original = ops.batched_nms

    def batched(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float) -> torch.Tensor:
        """Boxes (N, 4) are moved apart by class, so that those of two classes never overlap. N may be 0."""
        distance = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
        return ops.nms(boxes + (distance * classes)[:, None].to(boxes.dtype), scores, threshold)

    users = [m for name, m in list(sys.modules.items()) if name.startswith("paperzoo")]
    users = [m for m in users if getattr(m, "batched_nms", None) is original]
    try:
        for module in users:
            module.batched_nms = batched
        yield
    finally:
        for module in users:
            module.batched_nms = original


# -- the cache's key ---------------------------------------------------------------------------------------------------


def key(paper: Paper, config: Any) -> str:
    """A name for what the network follows from: the settings, and every source file that building and training it imports."""
    digest = hashlib.sha256(json.dumps(dump(config), sort_keys=True, default=str).encode())
    folders = {paper.path}
    model = getattr(config, "model", None)
    if isinstance(model, str) and model in variants():
        folders.add(variants()[model].path)
    roots = [path for folder in folders for path in folder.glob("*.py") if path.name != "parity.py"]
    loop = Path(find_spec("paperzoo.engine.loop").origin)
    for path in sorted({*imported([*roots, loop]), Path(__file__)}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def imported(roots: list[Path]) -> set[Path]:
    """These source files of the package and all of the package that they import, directly or not, at the top or in functions."""
    found, waiting = set(), list(roots)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            waiting += [file for name in names if name.startswith("paperzoo.") and (file := source(name))]
    return found


def source(name: str) -> Path | None:
    """The file of a module of the package; None for a name inside of a module."""
    file = Path(__file__).parents[1].joinpath(*name.split(".")[1:])
    return next((p for p in (file.with_suffix(".py"), file / "__init__.py") if p.exists()), None)
