"""Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization (Selvaraju et al., arXiv:1610.02391).

An explanation maps (model, input, target) to a map. Three of them, usable on any torch model:

    GradCAM(model, model.layer4)(images, target=3)         where: (B, H, W) in [0, 1]
    GuidedBackprop(model)(images, target=3)                which pixels: (B, C, H, W), signed
    GuidedGradCAM(model, model.layer4)(images, target=3)   both: (B, C, H, W), signed

The model is left as it was found: hooks are removed even when the forward pass fails, the modules' training flags, the
batch-norm statistics, the parameters' `.grad` and `requires_grad` do not change. Explanations are computed in eval mode, in
the precision around the call, and inside `torch.inference_mode` too.

`target` says which score is explained; see `paperzoo.blocks.explaining.Target`. Counterfactuals (sec. 3.3) are the target
`lambda logits: -logits[:, c]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paperzoo.blocks.explaining import (
    Target,
    explaining,
    layer_of,
    maps_and_gradient,
    rescale,
    select,
    upsample,
)


class GradCAM:
    """Class-discriminative localisation, eq. (1) and (2).

    Args:
        model: any module; its output is (B, num_classes), or anything that a callable target understands.
        layer: the module whose output is explained, or its dotted name; usually the last one that still has a height and a
            width (`paperzoo.blocks.explaining.find_layer`). It must run exactly once in a forward pass.
        reshape: from the layer's output to (B, K, h, w), where it is something else, for example a transformer's tokens:
            `lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (14, 14))`.
    """

    def __init__(
        self, model: nn.Module, layer: nn.Module | str, reshape: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.model = model
        self.layer = layer_of(model, layer)
        self.reshape = reshape

    def coarse(self, inputs: Tensor, target: Target = None) -> Tensor:
        """The map at the layer's own resolution and in the score's units: (B, h, w), not negative (eq. 2).

        Raises:
            ValueError: if the layer does not run exactly once, its output is not (B, K, h, w), or the target does not fit.
        """
        maps, gradient, _ = maps_and_gradient(self.model, self.layer, inputs, target, self.reshape)
        alpha = gradient.mean((2, 3), keepdim=True)  # eq. (1): the importance of map k for the class
        return F.relu((alpha * maps).sum(1))  # eq. (2)

    def __call__(self, inputs: Tensor, target: Target = None) -> Tensor:
        """Maps for a batch of images (B, C, H, W): (B, H, W), bilinear, each scaled to [0, 1]; an empty map stays zero."""
        return rescale(upsample(self.coarse(inputs, target), inputs.shape[-2:]))


class GuidedBackprop:
    """Gradients in which every ReLU also stops what is negative on the way back (Springenberg et al., arXiv:1412.6806).

    Calls are intercepted where torch computes a ReLU, so functional and in-place ReLUs count as modules do. A model that
    was compiled or scripted must be given in its plain form.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, inputs: Tensor, target: Target = None) -> Tensor:
        """Guided gradients of the target's score with respect to the images: (B, C, H, W), signed."""
        with explaining(self.model):
            pixels = inputs.detach().clone().requires_grad_()
            with GuidedReLUs():
                score = select(self.model(pixels.clone()), target)
            return torch.autograd.grad(score.sum(), pixels)[0]


class GuidedGradCAM:
    """Guided backprop times Grad-CAM (sec. 3.2): fine-grained and class-discriminative."""

    def __init__(
        self, model: nn.Module, layer: nn.Module | str, reshape: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.cam = GradCAM(model, layer, reshape)
        self.guided = GuidedBackprop(model)

    def __call__(self, inputs: Tensor, target: Target = None) -> Tensor:
        """(B, C, H, W), signed, in the units of both factors; `rescale` or `relief` makes it visible."""
        cam = upsample(self.cam.coarse(inputs, target), inputs.shape[-2:])
        return self.guided(inputs, target) * cam[:, None]


# -- how -----------------------------------------------------------------------------------------------------------------


class GuidedReLU(torch.autograd.Function):
    """ReLU forwards; backwards only where both the input and the gradient are positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp_min(0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient.clamp_min(0) * (y > 0)


class GuidedReLUs(TorchFunctionMode):
    """While active, every ReLU that torch is asked for is a guided one."""

    IN_PLACE = (torch.relu_, Tensor.relu_, F.relu_)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (F.relu, torch.relu, Tensor.relu):
            return guided_relu(*args, **(kwargs or {}))
        if function in self.IN_PLACE:
            return guided_relu(args[0], inplace=True)
        return function(*args, **(kwargs or {}))


def guided_relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu` with guided gradients."""
    output = GuidedReLU.apply(input)
    return input.copy_(output) if inplace else output
