"""Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks (Wang et al., arXiv:1910.01279).

A map of a layer is worth what the network still sees when the image is masked with it. No gradients:

    ScoreCAM(model, model.layer4)(images, target=3)    (B, H, W) in [0, 1]

Every image needs one forward pass for each of the layer's maps; all of them go through the network in large batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.explaining import Target, activations, explaining, layer_of, rescale, select, upsample


class ScoreCAM:
    """Algorithm 1: masks from maps, the increase of confidence that each leaves, their softmax as weights.

    Args:
        model: any module; its output is (B, num_classes), or anything that a callable target understands.
        layer: the module whose output is explained, or its dotted name; it must run exactly once in a forward pass.
        reshape: from the layer's output to (B, K, h, w), where it is something else, for example a transformer's tokens.
        confidence: what f of eq. (5) is, the class's score before the softmax ("logit", as most use it) or after it
            ("probability", as the authors' code does). A callable target says it itself.
        softmax: whether the increases become weights through a softmax over the maps (the paper) or as they are (the authors'
            code, whose weights are then probabilities).
        baseline: X_b, broadcastable to the images; None: zeros, the mean of normalised images. The softmax cancels it.
        batch_size: masked images that go through the network together.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        reshape: Callable[[Any], Tensor] | None = None,
        confidence: Literal["logit", "probability"] = "logit",
        softmax: bool = True,
        baseline: Tensor | None = None,
        batch_size: int = 256,
    ) -> None:
        if confidence not in ("logit", "probability"):
            raise ValueError(f"confidence must be 'logit' or 'probability', got '{confidence}'")
        self.model, self.layer, self.reshape = model, layer_of(model, layer), reshape
        self.confidence, self.softmax, self.baseline, self.batch_size = confidence, softmax, baseline, batch_size

    @torch.no_grad()
    def coarse(self, inputs: Tensor, target: Target = None) -> Tensor:
        """The map at the layer's own resolution: (B, h, w), not negative.

        Raises:
            ValueError: if the layer does not run exactly once, its output is not (B, K, h, w), or the target does not fit.
        """
        maps, classes = self.look(inputs, target)
        increase, alive = self.increases(inputs, maps, classes)
        if self.softmax:
            increase = increase.masked_fill(~alive, -torch.inf).softmax(1)
        weights = increase.where(alive, 0.0)  # a constant map masks nothing and says nothing
        return F.relu((weights[:, :, None, None] * maps).sum(1))  # eq. (6)

    def __call__(self, inputs: Tensor, target: Target = None) -> Tensor:
        """Maps for a batch of images (B, C, H, W): (B, H, W), bilinear, each scaled to [0, 1]; an empty map stays zero."""
        return rescale(upsample(self.coarse(inputs, target), inputs.shape[-2:]))

    def look(self, inputs: Tensor, target: Target) -> tuple[Tensor, Target]:
        """The layer's maps (B, K, h, w), and the target with the predicted classes in the place of None."""
        seen: list[Any] = []

        def remember(output: Any) -> Tensor:
            seen.append(output)
            return select(output, target)

        with explaining(self.model), torch.no_grad():
            maps, _ = activations(self.model, self.layer, inputs, remember)
        maps = (maps if self.reshape is None else self.reshape(maps)).detach().float()
        if maps.ndim != 4:
            raise ValueError(f"layer's output must be (B, K, h, w), got {tuple(maps.shape)}; pass reshape")
        if callable(target):
            return maps, target
        chosen = seen[0].argmax(1) if target is None else torch.as_tensor(target, device=inputs.device)
        return maps, chosen.clone().expand(len(inputs))

    def increases(self, inputs: Tensor, maps: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Eq. (5): confidence in the image under each mask, less that in the baseline (B, K); which maps are not constant (B, K)."""
        batch, count = maps.shape[:2]
        masks = F.interpolate(maps, inputs.shape[-2:], mode="bilinear")
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        alive = (high > low)[:, :, 0, 0]
        masks = (masks - low) / (high - low).where(high > low, 1.0)  # eq. (4)
        found = []
        with explaining(self.model), torch.no_grad():
            for rows in torch.arange(batch * count, device=inputs.device).split(self.batch_size):
                image, channel = rows // count, rows % count
                masked = inputs[image] * masks[image, channel, None].to(inputs.dtype)
                found.append(self.score(masked, target, image))
            blank = torch.zeros_like(inputs) if self.baseline is None else self.baseline.expand_as(inputs)
            nothing = self.score(blank, target, torch.arange(batch, device=inputs.device))
        return torch.cat(found).view(batch, count) - nothing[:, None], alive

    def score(self, images: Tensor, target: Target, owner: Tensor) -> Tensor:
        """f of the target for altered images (N, C, H, W), each made of the image that `owner` (N,) names: (N,)."""
        output = self.model(images)
        if callable(target):
            scores = target(output)
            return scores if scores.ndim else scores.expand(len(images))
        if self.confidence == "probability":
            output = output.softmax(1)
        return select(output, target[owner]).float()
