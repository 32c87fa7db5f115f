"""Every promise, for every paper, driven by the cards: a new paper adds no test code."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from paperzoo.catalog.cards import papers, variants
from paperzoo.catalog.fingerprint import proven, sampled
from paperzoo.catalog.schema import check
from paperzoo.engine.checkpoint import read_checkpoint
from paperzoo.engine.export import BATCHES
from paperzoo.engine.loop import Settings, fit
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.run import build, load, write_config
from paperzoo.engine.sizes import candidates
from paperzoo.engine.verify import LADDER, changed_by_storing, resumes_exactly, status_data, verify

EVERY = sorted(papers())
WITH_CODE = [slug for slug in EVERY if papers()[slug].has_code]
PROOF = os.environ.get("PAPERZOO_PROOF")
FILES = {"model": ["model.py"], "method": [], "technique": ["technique.py"], "reading": []}


@pytest.mark.parametrize("slug", EVERY)
def test_card_is_valid(slug):
    check(papers()[slug])


@pytest.mark.parametrize("slug", EVERY)
def test_folder_is_complete(slug):
    paper = papers()[slug]
    wanted = {"card.toml", "notes.md"}
    if slug in WITH_CODE:
        wanted |= {*FILES[paper.card["kind"]], "recipe.py", "parity.py"}
        assert paper.card["kind"] != "reading"
        assert [name for name in sorted(wanted) if not (paper.path / name).exists()] == []
    else:  # the card and the notes alone, until all of the code is there
        assert {p.name for p in paper.path.iterdir() if p.name != "__pycache__"} == wanted


@pytest.mark.parametrize("slug", WITH_CODE)
def test_notes_are_a_five_minute_reading(slug):
    words = len((papers()[slug].path / "notes.md").read_text(encoding="utf-8").split())
    assert 120 <= words <= 700


@pytest.mark.parametrize("slug", EVERY)
def test_nothing_is_left_to_fill_in(slug):
    for path in papers()[slug].path.iterdir():
        if path.suffix in (".py", ".toml", ".md"):
            text = path.read_text(encoding="utf-8")
            assert not [mark for mark in ("FILL IN", "TODO", "FIXME") if mark in text], path


@pytest.mark.parametrize("slug", WITH_CODE)
def test_files_are_read_in_one_sitting(slug):
    for path in papers()[slug].path.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path


@pytest.mark.parametrize("slug", WITH_CODE)
def test_references_are_imported_only_where_they_are_compared(slug):
    """Peers are development-only: no file but parity.py names them, and that one only inside functions."""
    peers = {"timm", "transformers", "pytorchcv", "captum", "pytorch_grad_cam", "deepctr_torch", "torch_rechub"}
    peers |= {
        "neuralop",
        "deepxde",
        "stable_baselines3",
        "pytorch_metric_learning",
        "monai",
        "segmentation_models_pytorch",
    }
    for path in papers()[slug].path.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = tree.body if path.name == "parity.py" else list(ast.walk(tree))
        named = [n for node in nodes for n in imported(node)]
        assert not peers & {name.split(".")[0] for name in named}, path


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize("slug", WITH_CODE)
def test_presets_are_complete_and_valid(slug):
    from paperzoo.engine.configure import configure, dump, restore

    presets = papers()[slug].module("recipe").PRESETS
    assert {"embedded", "published"} <= presets.keys()
    for preset in presets.values():
        assert dataclasses.is_dataclass(preset) and preset.__dataclass_params__.frozen
        assert configure(preset, {}) == preset
        assert restore(type(preset), dump(preset)) == preset


@pytest.mark.parametrize("slug", WITH_CODE)
def test_everything_that_changes_is_in_the_checkpoint(slug, tmp_path):
    """After some steps, every tensor that a recipe holds anywhere is part of something with a state_dict."""
    from paperzoo.engine.loop import one_step

    paper = papers()[slug]
    recipe = build(paper, paper.module("recipe").PRESETS["embedded"], Settings(device="cpu"))
    before = loose_tensors(recipe)
    for _ in range(2):
        one_step(recipe, tmp_path)
    after = loose_tensors(recipe)
    changed = [k for k in before if k in after and not torch.equal(before[k], after[k])]
    assert changed == [], f"tensors outside of any state_dict changed: {changed}"


def loose_tensors(recipe: Recipe) -> dict[str, torch.Tensor]:
    held = recipe.stateful()
    owned = {id(v) for v in held.values()}
    return {k: v.clone() for k, v in vars(recipe).items() if isinstance(v, torch.Tensor) and id(v) not in owned}


@pytest.mark.parametrize("slug", WITH_CODE)
def test_ladder(slug):
    """A step passes, does not apply for a stated reason, or waits for data.

    Papers whose code is what it was when they last passed, down to the parts that they import, do not learn again, but for a
    sample of them; they are stored, loaded and exported by the run from end to end below alone. With a folder in PAPERZOO_PROOF (`make prove`) all of them learn, and what was seen is left there.
    """
    steps = verify(
        papers()[slug], LADDER if must_learn(slug) else tuple(s for s in LADDER if s not in ("learns", "deploys"))
    )
    if PROOF:
        Path(PROOF, f"{slug}.json").write_text(json.dumps(status_data({slug: steps})[slug], indent=1))
    assert [f"{s.name}: {s.text}" for s in steps if not s.ok] == []


def must_learn(slug: str) -> bool:
    return bool(PROOF) or sampled(slug) or not proven(papers()[slug])


@pytest.mark.parametrize("slug", [slug for slug in WITH_CODE if not must_learn(slug)])
def test_a_run_that_was_stopped_goes_on_exactly(slug, tmp_path):
    """Part of "learns", in small, for papers that do not learn again."""
    paper, settings = papers()[slug], Settings(device="cpu")
    config = dataclasses.replace(paper.module("recipe").PRESETS["embedded"], steps=4)
    recipe = build(paper, config, settings)
    write_config(tmp_path, paper, "embedded", config, settings, recipe.runtime)
    _, progress = fit(recipe, tmp_path, settings, last_step=2)
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt")
    fit(recipe, tmp_path, settings, progress)
    assert resumes_exactly(paper, config, settings, recipe, checkpoint, tmp_path) is None


@pytest.mark.parametrize("slug", [slug for slug in WITH_CODE if "def pairs(" in (papers()[slug].path / "parity.py").read_text()])  # fmt: skip
def test_pairs_to_measure_have_names(slug):
    from paperzoo.engine.parity import Pair

    pairs = papers()[slug].module("parity").pairs()
    assert isinstance(pairs, dict) and pairs
    assert all(isinstance(name, str) and isinstance(pair, Pair) for name, pair in pairs.items())


def test_model_names_are_unique():
    names = [v["name"] for p in papers().values() for v in p.variants]
    assert len(names) == len(set(names)) == len(variants())


@pytest.mark.parametrize("slug", WITH_CODE)
def test_a_run_goes_end_to_end(slug, tmp_path):
    """A few steps of `paperzoo run`: trained, evaluated, predicted, exported where that applies, a report with its curves."""
    from paperzoo.engine.run import run

    result = run(slug, changes={"steps": 4}, settings=Settings(device="cpu"), folder=tmp_path / "run")
    assert result.metrics and result.report.stat().st_size > 10_000
    assert all(isinstance(value, float) for value in result.metrics.values())
    assert (result.export is not None) == ("deploys" not in papers()[slug].card.get("not_applicable", {}))
    assert changed_by_storing(load(result.folder, device="cpu"), result.folder) is None
    if result.export is not None:  # at two further sizes, or it says why not; some inputs have no sizes
        further = len(result.export.checked) - len(BATCHES)
        assert further == 2 or result.export.fixed or not candidates(result.recipe.example())
