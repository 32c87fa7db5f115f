"""Quantisation-aware training: a recipe that holds another recipe and lets it learn as if its network had int8 layers.

In every convolution and linear layer weights are rounded to 8 bits per channel and inputs to 8 bits per tensor, while
gradients pass as if nothing were rounded (the straight-through estimator; Jacob et al. 2018, arXiv:1712.05877, sec. 3). What
is saved is the same network, with weights that have learned to be rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperzoo.engine.configure import configure, read_toml
from paperzoo.engine.loop import fit
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.weights import load_weights
from paperzoo.errors import PaperZooError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ActivationRange(nn.Module):
    """The running range of a layer's input, zero included, and its rounding to 8 bits, asymmetric."""

    def __init__(self, bits: int = 8, momentum: float = 0.1) -> None:
        super().__init__()
        self.levels, self.momentum = 2**bits - 1, momentum
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, learning: bool) -> Tensor:
        if learning:
            with torch.no_grad():
                low, high = x.detach().float().aminmax()
                rate = torch.where(self.seen == 0, 1.0, self.momentum)
                self.low += rate * (low.clamp(max=0) - self.low)
                self.high += rate * (high.clamp(min=0) - self.high)
                self.seen += 1
        scale = ((self.high - self.low) / self.levels).clamp(min=1e-8)
        zero = (-self.low / scale).round().clamp(0, self.levels)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), 0, self.levels)


def rounded_weight(weight: Tensor, bits: int = 8) -> Tensor:
    """Weights (out, …) rounded to symmetric levels, a scale for each output channel."""
    top = 2 ** (bits - 1) - 1
    scale = (weight.detach().flatten(1).abs().amax(1) / top).clamp(min=1e-8)
    return torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros_like(scale, dtype=torch.int32), 0, -top, top
    )


class QuantisationAware(Recipe):
    """Another recipe, whose network learns with rounded weights and activations while `rounding` is on.

    Args:
        recipe: what learns; its data, loss, schedule and metrics stay its own.
        bits: of weights and activations.
    """

    def __init__(self, recipe: Recipe, bits: int = 8) -> None:
        super().__init__(recipe.config, recipe.runtime, recipe.facts)
        self.recipe, self.bits = recipe, bits
        self.ranges = nn.ModuleDict()
        for name, layer in recipe.model.named_modules():
            if isinstance(layer, CONVOLUTIONS) or (
                isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
            ):
                self.ranges[name.replace(".", "/")] = ActivationRange(bits).to(recipe.runtime.device)
        if not self.ranges:
            raise PaperZooError(f"{type(recipe.model).__name__} has no convolution or linear layer to quantise")
        self.turn(on=True)

    def turn(self, on: bool) -> None:
        """Rounding on or off."""
        for name, span in self.ranges.items():
            layer = self.recipe.model.get_submodule(name.replace("/", "."))
            vars(layer).pop("_conv_forward", None)
            vars(layer).pop("forward", None)
            if on and isinstance(layer, nn.Linear):
                layer.forward = self.linear(layer, span)
            elif on:
                layer._conv_forward = self.convolution(layer, span, layer._conv_forward)

    def linear(self, layer: nn.Linear, span: ActivationRange) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return nn.functional.linear(span(x, layer.training), rounded_weight(layer.weight, self.bits), layer.bias)

        return forward

    def convolution(self, layer: nn.Module, span: ActivationRange, plain: Callable) -> Callable:
        def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return plain(span(x, layer.training), rounded_weight(weight, self.bits), bias)

        return forward

    @property
    def model(self) -> nn.Module:
        return self.recipe.model

    @property
    def optimizer(self) -> Any:
        return self.recipe.optimizer

    @property
    def scheduler(self) -> Any:
        return getattr(self.recipe, "scheduler", None)

    @property
    def average(self) -> Any:
        return getattr(self.recipe, "average", None)

    @property
    def deployed(self) -> nn.Module:
        return self.recipe.deployed

    @property
    def monitor(self) -> tuple[str, str]:
        return self.recipe.monitor

    def batch(self) -> Any:
        return self.recipe.batch()

    def step(self, batch: Any) -> dict:
        return self.recipe.step(batch)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        return self.recipe.evaluate(split)

    def example(self) -> tuple:
        return self.recipe.example()


def tune(
    run: Path,
    folder: Path,
    steps: int,
    data: str | None = None,
    weights: str | Path | None = None,
    share: float = 0.1,
    on_step: Callable[[int, int, dict], None] | None = None,
) -> Recipe:
    """A finished run's recipe after `steps` more with rounded layers, at a small share of its learning rate.

    Args:
        run: the run's folder.
        folder: where metrics and checkpoints go.
        data: other data than the run's.
        weights: other weights than the run's.
        share: of the recipe's learning rate.

    Raises:
        PaperZooError: for a recipe that has no steps to take.
    """
    import json

    from paperzoo.engine.run import build, stored_run

    paper, config, settings = stored_run(run, read_toml(run / "config.toml"))
    if not hasattr(config, "steps"):
        raise PaperZooError(f"{paper.slug} does not learn in steps, so there is nothing to tune")
    facts = json.loads((run / "config.json").read_text(encoding="utf-8"))["facts"]
    wanted = {"steps": steps, "warmup_steps": 0, "plain_steps": 0, "weights": None}
    if hasattr(config, "learning_rate"):
        wanted["learning_rate"] = config.learning_rate * share
    if data is not None:
        wanted["data"] = data
    config = configure(config, {k: v for k, v in wanted.items() if hasattr(config, k)})
    settings = configure(settings, {"device": "cpu", "shard": False, "compile": False})
    recipe = build(paper, config, settings, facts)
    source = weights or run / "model.safetensors"
    load_weights(recipe.model, source)
    if recipe.deployed is not recipe.model:
        load_weights(recipe.deployed, source)
    aware = QuantisationAware(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fit(aware, folder, settings, on_step=on_step)
    finally:
        aware.turn(on=False)
    return recipe
