"""What the default recipes of image tasks share: schedules, optimizers, layer-wise rates, mixed images."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

# "blocks.3", "layer4.1", "layers.2.blocks.1": a parameter's name up to its block's number
LAYER = re.compile(r"^.*?\.\d+(?:\.(?:blocks?|layers?)\.\d+)?(?=\.)")


def learning_rate_factor(config: Any, step: int) -> float:
    """The learning rate at a step, as a factor of `config.learning_rate`: warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "step":
        return config.gamma ** sum(step >= m * config.steps for m in config.milestones)
    return 1.0


def layer_numbers(model: nn.Module) -> tuple[dict[str, int], int]:
    """Parameter's name -> the number of its layer, counted from the input in the order of the module tree; and how many there are.

    A layer is a block of a stack ("blocks.3.…", "layers.2.blocks.1.…"), or a top-level module that is no stack.
    """
    order: dict[str, int] = {}
    numbers = {}
    for name, _ in model.named_parameters():
        match = LAYER.match(name)
        layer = match[0] if match else name.split(".")[0]
        numbers[name] = order.setdefault(layer, len(order))
    return numbers, len(order)


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_all: bool, learning_rate: float = 0.0, layer_decay: float = 1.0
) -> list[dict]:
    """Weight decay on everything, or on matrices and kernels alone; with `layer_decay` below 1 a learning rate a layer.

    The last layer learns at `learning_rate`, each one before it at `layer_decay` times the next one's (as BEiT and MAE are fine-tuned).
    """
    if layer_decay == 1.0:
        if decay_all:
            return [{"params": list(model.parameters()), "weight_decay": weight_decay}]
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    numbers, count = layer_numbers(model)
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if decay_all or parameter.ndim > 1 else 0.0
        rate = learning_rate * layer_decay ** (count - 1 - numbers[name])
        group = groups.setdefault((numbers[name], decay), {"params": [], "weight_decay": decay, "lr": rate})
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(config: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a config with these fields names."""
    layer_decay = getattr(config, "layer_decay", 1.0)
    groups = parameter_groups(model, config.weight_decay, config.decay_all, config.learning_rate, layer_decay)
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, config.learning_rate, momentum=config.momentum, nesterov=nesterov)
    if config.optimizer == "rmsprop":  # with the constants of the Inception and MobileNet papers
        return torch.optim.RMSprop(groups, config.learning_rate, alpha=0.9, eps=1e-3, momentum=config.momentum)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, config.learning_rate)


def mix(images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with itself; with both, one of them by a coin's toss.

    Args:
        images: (B, C, H, W).
        labels: int64 (B,).
        mixup, cutmix: alpha of the Beta distribution that the share is drawn from; 0 leaves it out.

    Returns:
        the images, and labels float32 (B, num_classes): the shares of the classes. Drawn from torch's global generator.
    """
    kinds = [kind for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    alphas = [alpha for alpha in (mixup, cutmix) if alpha > 0]
    chosen = int(torch.randint(len(kinds), ())) if len(kinds) > 1 else 0
    return kinds[chosen](alpha=alphas[chosen], num_classes=num_classes)(images, labels)
