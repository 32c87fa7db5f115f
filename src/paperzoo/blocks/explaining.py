"""What every explanation of a network needs: a target, a layer, the model left as it was found, maps brought to size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.errors import UnknownName

Target = int | Tensor | Sequence[int] | Callable[[Any], Tensor] | None
"""Which score is explained.

None            the class with the highest score, of each image
int             that class, for every image
(B,) integers   a class for each image
callable        output of the model -> scores (B,) or (); for what is not a classifier, and for counterfactuals
                (`lambda logits: -logits[:, c]`)
"""


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
    """The scores (B,) or () that a target names in a model's output.

    Raises:
        ValueError: if the target does not fit the output.
    """
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


# -- layers ----------------------------------------------------------------------------------------------------------


def layer_of(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    """A module of the model, given itself or by its dotted name.

    Raises:
        UnknownName: if no module has that name; says which are near.
        ValueError: if the given module is not a part of the model.
    """
    if isinstance(layer, str):
        modules = dict(model.named_modules())
        if not layer or layer not in modules:
            raise UnknownName("layer", layer, [name for name in modules if name])
        return modules[layer]
    if all(layer is not module for module in model.modules()):
        raise ValueError("layer is not a part of the model; give one of its modules or its dotted name")
    return layer


def find_layer(model: nn.Module, inputs: Tensor) -> str:
    """The dotted name of the module whose output is the last (B, K, h, w) with more than one place.

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


def activations(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """One forward pass: what the layer gave out, still in the graph, and the target's scores (B,) or ().

    To be called inside `explaining`.

    Raises:
        ValueError: if the layer does not run exactly once, does not give a tensor, or the target does not fit.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(f"layer's output must be a tensor, got {type(output).__name__}; choose another layer")
        # With frozen weights the graph starts here; a clone goes on, because what follows may change it in place.
        caught.append(output if output.requires_grad else output.detach().requires_grad_())
        return caught[-1].clone()

    hook = layer.register_forward_hook(catch)
    try:
        score = select(model(inputs.detach().clone()), target)
    finally:
        hook.remove()
    if len(caught) != 1:
        raise ValueError(f"layer must run once in a forward pass, it ran {len(caught)} times; choose another one")
    return caught[0], score


def maps_and_gradient(
    model: nn.Module,
    layer: nn.Module,
    inputs: Tensor,
    target: Target,
    reshape: Callable[[Any], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's maps (B, K, h, w), the gradient of the target's score with respect to them in float32, and the scores.

    Raises:
        ValueError: if the layer does not run exactly once, its output is not (B, K, h, w), or the target does not fit.
    """
    with explaining(model):
        output, score = activations(model, layer, inputs, target)
        gradient = torch.autograd.grad(score.sum(), output, allow_unused=True)[0] if score.requires_grad else None
        if gradient is None:
            raise ValueError("the target's score does not depend on the layer; choose another layer or target")
        maps, gradient = (t if reshape is None else reshape(t) for t in (output.detach(), gradient))
        if maps.ndim != 4:
            raise ValueError(f"layer's output must be (B, K, h, w), got {tuple(maps.shape)}; pass reshape")
        return maps, gradient.float(), score.detach()


# -- maps ------------------------------------------------------------------------------------------------------------


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w) -> (B, *size), bilinear."""
    return F.interpolate(maps[:, None].float(), tuple(size), mode="bilinear")[:, 0]


def rescale(maps: Tensor) -> Tensor:
    """Each (…) of a batch (B, …) shifted and scaled to [0, 1]; a constant one becomes zero."""
    flat = maps.flatten(1)
    low, high = flat.min(1, keepdim=True).values, flat.max(1, keepdim=True).values
    return ((flat - low) / (high - low).clamp_min(torch.finfo(flat.dtype).tiny)).view_as(maps)
