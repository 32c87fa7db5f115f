"""Grad-CAM++: Generalized Gradient-Based Visual Explanations for Deep Convolutional Networks (Chattopadhyay et al., arXiv:1710.11063).

Grad-CAM's weight of a map is the mean of its gradients, so an instance that lights up few places counts little. Here each place
has a coefficient of its own, chosen so that every map that shows a part of the class counts fully:

    GradCAMPlusPlus(model, model.layer4)(images, target=3)    (B, H, W) in [0, 1]

The coefficients need the second and third derivative of Y = exp(score). In a network of ReLUs the score is linear in the maps
almost everywhere, so these are exp(score) times powers of the first (sec. 3.2); one backward pass gives all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.explaining import Target, layer_of, maps_and_gradient, rescale, upsample


def coefficients(maps: Tensor, first: Tensor, second: Tensor, third: Tensor, epsilon: Tensor | float = 0.0) -> Tensor:
    """alpha of eq. (10), for every place of every map: (B, K, h, w), zero where the first derivative is not positive.

    Args:
        maps: A, (B, K, h, w).
        first, second, third: the derivatives of Y by each place of A alone; a common factor of all three cancels.
        epsilon: added to the denominator, which may come near zero where maps have negative sums.
    """
    denominator = 2 * second + maps.sum((2, 3), keepdim=True) * third + epsilon
    defined = (denominator != 0) & (first > 0)  # eq. (7) drops what is not positive
    return (second / denominator.where(defined, 1.0)).where(defined, 0.0)


class GradCAMPlusPlus:
    """The sum of a layer's maps, weighted with `alpha` times the positive gradients (eq. 5 to 7, 10, 19).

    Args:
        model: any module; its output is (B, num_classes), or anything that a callable target understands.
        layer: the module whose output is explained, or its dotted name; it must run exactly once in a forward pass.
        reshape: from the layer's output to (B, K, h, w), where it is something else, for example a transformer's tokens.
        normalise: divide the coefficients of a map by their sum, as the authors' code does and the equations do not. The weight
            is then a weighted mean of the positive gradients.
        epsilon: added to the denominator of eq. (19); the paper has none, the grad-cam package 1e-6.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        reshape: Callable[[Any], Tensor] | None = None,
        normalise: bool = False,
        epsilon: float = 0.0,
    ) -> None:
        self.model, self.layer, self.reshape = model, layer_of(model, layer), reshape
        self.normalise, self.epsilon = normalise, epsilon

    def coarse(self, inputs: Tensor, target: Target = None) -> Tensor:
        """The map at the layer's own resolution: (B, h, w), not negative, in the score's units.

        That is without the factor exp(score), one number an image, which does not change where the map is high.

        Raises:
            ValueError: if the layer does not run exactly once, its output is not (B, K, h, w), or the target does not fit.
        """
        maps, gradient, _ = maps_and_gradient(self.model, self.layer, inputs, target, self.reshape)
        # eq. (19): of exp(score) the derivatives are exp(score) times g, g^2, g^3; scaled so that no square underflows
        scale = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
        unit = gradient / scale
        alpha = coefficients(maps.float(), unit, unit**2, scale * unit**3, self.epsilon / scale**2)
        if self.normalise:
            total = alpha.sum((2, 3), keepdim=True)
            alpha = alpha / total.where(total != 0, 1.0)
        weights = (alpha * F.relu(gradient)).sum((2, 3), keepdim=True)  # eq. (5)
        return F.relu((weights * maps).sum(1))  # eq. (6)

    def __call__(self, inputs: Tensor, target: Target = None) -> Tensor:
        """Maps for a batch of images (B, C, H, W): (B, H, W), bilinear, each scaled to [0, 1]; an empty map stays zero."""
        return rescale(upsample(self.coarse(inputs, target), inputs.shape[-2:]))
