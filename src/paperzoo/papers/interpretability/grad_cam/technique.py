"""Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization (Selvaraju et al., arXiv:1610.02391).

An explanation maps (model, input, target) to a map. Three of them, usable on any torch model:

    GradCAM(model, model.layer4)(images, target=3)         where: (B, H, W) in [0, 1]
    GuidedBackprop(model)(images, target=3)                which pixels: (B, C, H, W), signed
    GuidedGradCAM(model, model.layer4)(images, target=3)   both: (B, C, H, W), signed

The model is left as it was found: hooks are removed even when the forward pass fails, the modules' training flags, the
batch-norm statistics, the parameters' `.grad` and `requires_grad` do not change. Explanations are computed in eval mode, in
the precision around the call, and inside `torch.inference_mode` too.

`target` says which score is explained:
    None            the class with the highest score, of each image
    int             that class, for every image
    (B,) integers   a class for each image
    callable        output of the model -> scores (B,) or (); for what is not a classifier, and for counterfactuals
                    (sec. 3.3: `lambda logits: -logits[:, c]`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Target = int | Tensor | Sequence[int] | Callable[[Any], Tensor] | None


class GradCAM:
    """Class-discriminative localisation, eq. (1) and (2).

    Args:
        model: any module; its output is (B, num_classes), or anything that a callable target understands.
        layer: the module whose output is explained, or its dotted name; usually the last one that still has a height and a
            width (`find_layer`). It must run exactly once in a forward pass.
        reshape: from the layer's output to (B, K, h, w), where it is something else, for example a transformer's tokens:
            `lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (14, 14))`.
    """

    def __init__(
        self, model: nn.Module, layer: nn.Module | str, reshape: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.model = model
        self.layer = model.get_submodule(layer) if isinstance(layer, str) else layer
        if all(self.layer is not module for module in model.modules()):
            raise ValueError("layer is not a part of the model; give one of its modules or its dotted name")
        self.reshape = reshape

    def coarse(self, inputs: Tensor, target: Target = None) -> Tensor:
        """The map at the layer's own resolution and in the score's units: (B, h, w), not negative (eq. 2).

        Raises:
            ValueError: if the layer does not run exactly once, its output is not (B, K, h, w), or the target does not fit.
        """
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise ValueError(f"layer's output must be a tensor, got {type(output).__name__}; choose another layer")
            # With frozen weights the graph starts here; a clone goes on, because what follows may change it in place.
            caught.append(output if output.requires_grad else output.detach().requires_grad_())
            return caught[-1].clone()

        with explaining(self.model):
            hook = self.layer.register_forward_hook(catch)
            try:
                score = select(self.model(inputs.detach().clone()), target)
            finally:
                hook.remove()
            if len(caught) != 1:
                raise ValueError(
                    f"layer must run once in a forward pass, it ran {len(caught)} times; choose another one"
                )
            gradient = torch.autograd.grad(score.sum(), caught, allow_unused=True)[0] if score.requires_grad else None
            if gradient is None:
                raise ValueError("the target's score does not depend on the layer; choose another layer or target")
            maps, gradient = (t if self.reshape is None else self.reshape(t) for t in (caught[0].detach(), gradient))
            if maps.ndim != 4:
                raise ValueError(f"layer's output must be (B, K, h, w), got {tuple(maps.shape)}; pass reshape")
            alpha = gradient.float().mean((2, 3), keepdim=True)  # eq. (1): the importance of map k for the class
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


def find_layer(model: nn.Module, inputs: Tensor) -> str:
    """The dotted name of the module whose output is the last (B, K, h, w) with more than one place: the paper's choice.

    Raises:
        ValueError: if there is none, as in a transformer; name a layer and pass `reshape` then.
    """
    found: list[str] = []

    def remember(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(remember(name)) for name, module in model.named_modules() if name]
    try:
        with explaining(model), torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    once = [name for name in found if found.count(name) == 1]
    if not once:
        raise ValueError("the model has no layer with a height and a width; name a layer and pass reshape")
    return once[-1]


# -- how -----------------------------------------------------------------------------------------------------------------


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients, also inside `inference_mode`; the modules' training flags are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


def select(output: Any, target: Target) -> Tensor:
    """The scores (B,) or () that a target names in a model's output (see the module's docstring)."""
    if callable(target):
        return target(output)
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"target: the model's output is {found}, not (B, num_classes); pass a callable from it to scores"
        )
    batch, classes = output.shape
    chosen = output.detach().argmax(1) if target is None else torch.as_tensor(target, device=output.device)
    if chosen.is_floating_point() or chosen.ndim > 1 or (chosen.ndim == 1 and len(chosen) != batch):
        raise ValueError(f"target must be a class, {batch} classes (one an image), a callable or None, got {target}")
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < classes:
        raise ValueError(f"target must be a class from 0 to {classes - 1}, got {target}")
    return output.gather(1, chosen.clone().expand(batch)[:, None])[:, 0]  # a copy: it may be an inference tensor


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


# -- pictures ------------------------------------------------------------------------------------------------------------


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w) -> (B, *size), bilinear."""
    return F.interpolate(maps[:, None].float(), tuple(size), mode="bilinear")[:, 0]


def rescale(maps: Tensor) -> Tensor:
    """Each (…) of a batch (B, …) shifted and scaled to [0, 1]; a constant one becomes zero."""
    flat = maps.flatten(1)
    low, high = flat.min(1, keepdim=True).values, flat.max(1, keepdim=True).values
    return ((flat - low) / (high - low).clamp_min(torch.finfo(flat.dtype).tiny)).view_as(maps)


def overlay(image: Tensor, cam: Tensor, strength: float = 0.5) -> Image.Image:
    """The map as heat over the image, blue for 0 and red for 1.

    Args:
        image: (3, H, W) or (1, H, W), uint8 or float in [0, 1].
        cam: (H, W) in [0, 1].
        strength: how much of the heat is mixed in, 0 to 1.
    """
    base = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    centres = torch.tensor([3.0, 2.0, 1.0])[:, None, None]  # red, green, blue of the usual "jet" colours
    heat = (1.5 - (4 * cam.float().cpu() - centres).abs()).clamp(0, 1)
    return _picture(base.cpu().clamp(0, 1).expand(3, -1, -1) * (1 - strength) + heat * strength)


def relief(gradients: Tensor) -> Image.Image:
    """Signed gradients (C, H, W) as a picture: grey for 0, three standard deviations to either side."""
    gradients = gradients.float().cpu()
    if len(gradients) not in (1, 3):
        gradients = gradients.mean(0, keepdim=True)
    spread = gradients.std().clamp_min(torch.finfo(torch.float32).tiny)
    return _picture((gradients / (6 * spread) + 0.5).clamp(0, 1).expand(3, -1, -1))


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
