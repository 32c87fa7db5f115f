"""A paper's recipe on weights that come from elsewhere, such as its authors', without a run of one's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from paperzoo.catalog.cards import find, variants
from paperzoo.engine.configure import configure
from paperzoo.engine.loop import Settings
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.run import build, preset
from paperzoo.engine.weights import load_weights
from paperzoo.errors import PaperZooError, UnknownName


def has_run(source: str | Path) -> bool:
    """Whether this is a run's folder or a file in it, or a paper that has a finished run under `runs/`."""
    path = Path(source)
    return path.exists() or any((Path("runs") / find(str(source)).slug).glob("*/config.json"))


def load_given(
    name: str,
    weights: str | Path,
    device: str = "auto",
    preset_name: str = "published",
    scale: int | None = None,
    **changes: Any,
) -> Recipe:
    """A paper's recipe on weights from elsewhere, without a run: `load_given("swinir", "x4.pth", scale=4)`.

    Args:
        name: the paper's.
        weights: a file or folder as `paperzoo.create` takes it, for the model of the preset or the one that `changes` names.
        preset_name: whose settings are used. What a run learns from its data, such as labels, is in no file of weights: a recipe that
            needs it opens the preset's `data`, or the one that `changes` names.
        scale: of networks that enlarge pictures; takes the variant for it.
        changes: fields of the config, for example `model`.
    """
    paper = find(name)
    config = preset(paper, preset_name)
    changes = ({} if scale is None else enlarging(config, scale, paper.slug)) | changes
    config = configure(config, {"weights": None} | changes if hasattr(config, "weights") else changes)
    recipe = build(paper, config, Settings(device=device))
    load_weights(recipe.deployed, weights)
    if recipe.deployed is not recipe.model:
        recipe.model.load_state_dict(recipe.deployed.state_dict())
    return recipe


def enlarging(config: Any, scale: int, slug: str) -> dict[str, Any]:
    """The changes that make a config one of super-resolution by another factor: the factor, and the variant "…_x4" of its model.

    Raises:
        PaperZooError: if the config has no factor. UnknownName: if there is no such variant.
    """
    if not hasattr(config, "factor"):
        raise PaperZooError(f"scale is for networks that enlarge pictures; {slug} does not")
    model = re.sub(r"_x\d+$", f"_x{scale}", config.model)
    if model not in variants():
        raise UnknownName("model", model, variants())
    return {"factor": scale, "model": model}
