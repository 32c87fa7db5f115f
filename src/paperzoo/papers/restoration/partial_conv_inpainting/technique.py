"""The losses of sec. 3.3: of the hole and the rest, of what an image classifier sees, of textures, and of the seam.

Images are float32 (B, 3, H, W) in [0, 1]; masks (B, 1, H, W), 1 where known. Every sum is divided by the number of its elements over the batch, as the paper divides
by N: of the pictures, of each feature map, of each Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.weights import read_state
from paperzoo.errors import PaperZooError
from paperzoo.papers.classification.vgg.model import PLANS, conv_stack, narrow, pooled_maps

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
Features = Callable[[Tensor], list[Tensor]]


def hole_losses(out: Tensor, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """L_hole and L_valid, mean absolute differences over the whole picture."""
    error = (out - images).abs()
    return (error * (1 - masks)).mean(), (error * masks).mean()


def gram(maps: Tensor) -> Tensor:
    """Psi^T Psi / (C H W) of features (B, C, H, W): (B, C, C)."""
    flat = maps.flatten(2)
    return flat @ flat.transpose(1, 2) / (maps[0].numel())


def feature_losses(features: Features, out: Tensor, composite: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """L_perceptual (eq. 3) and the two L_style (eq. 4 and 5) together: of the answer and of the composite, against the true picture."""
    with torch.no_grad():
        true = features(images)
    found = features(torch.cat([out, composite]))
    perceptual = style = out.new_zeros(())
    for theirs, both in zip(true, found, strict=True):
        for ours in both.chunk(2):
            perceptual = perceptual + (ours - theirs).abs().mean()
            style = style + (gram(ours) - gram(theirs)).abs().mean()
    return perceptual, style


def seam_loss(composite: Tensor, masks: Tensor) -> Tensor:
    """L_tv (eq. 6): differences of neighbours that both lie in the hole grown by one pixel, over the number of the picture's elements."""
    region = F.max_pool2d(1 - masks, 3, 1, 1)
    down = (composite[:, :, 1:] - composite[:, :, :-1]).abs() * region[:, :, 1:] * region[:, :, :-1]
    right = (composite[..., 1:] - composite[..., :-1]).abs() * region[..., 1:] * region[..., :-1]
    return (down.sum() + right.sum()) / composite.numel()


def vgg_features(weights: str | None, device: torch.device, slim: bool = False) -> Features:
    """The maps after the first three poolings of a frozen VGG-16, of pictures in [0, 1]: three of (B, 64 … 256, H / 2 … H / 8, W / 2 … W / 8).

    Args:
        weights: torchvision's vgg16 file, or any that names its convolutions `features.0` …; None: random kernels from a fixed seed, whose
            features compare less of the content but need no file.
        slim: an eighth of the channels, with random kernels alone.

    Raises:
        PaperZooError: if the file does not hold them.
    """
    plan = PLANS["D"][: PLANS["D"].index(256) + 4]  # up to and with the third pooling
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stack = conv_stack(narrow(plan, 8) if slim else plan)
        for module in stack:
            if isinstance(module, nn.Conv2d):  # features as large as their input
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
    if weights is not None:
        state = read_state(Path(weights))
        own = {name: state.get(f"features.{name}") for name in stack.state_dict()}
        missing = [f"features.{name}" for name, value in own.items() if value is None]
        if missing:
            raise PaperZooError(f"{weights}: has no {missing[0]}; a VGG-16 with torchvision's names is needed")
        try:
            stack.load_state_dict(own)
        except RuntimeError as error:
            line = " ".join(str(error).split())[:160]
            raise PaperZooError(f"{weights}: does not fit VGG-16: {line}") from error
    stack.to(device).eval().requires_grad_(False)
    mean, deviation = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return lambda images: pooled_maps(stack, (images - mean) / deviation)


def weigh(losses: dict[str, Tensor], weights: Sequence[tuple[str, float]]) -> Tensor:
    """Eq. 7: the weighted sum."""
    return sum(weight * losses[name] for name, weight in weights)
