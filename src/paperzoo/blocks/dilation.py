"""A classifier made dense: its last strides become dilations, so that its last maps stay large and its weights still fit.

    network = dilate(resnet50(), 8)                       # strides 4, 8, 8, 8 instead of 4, 8, 16, 32
    backbone = dilated_backbone("senet154", 16)           # any convolutional classifier by name

Where a convolution's stride is taken away, what follows sees its input too densely; a dilation of the same factor lets each kernel see the
same places again (the "hole algorithm"). Two customs differ in the convolution that had the stride, and weights are for one of them:
by default it keeps the dilation from before it, which is exact; with `whole_stage` it has the one of its stage already, as the
authors of PSPNet and torchvision's MobileNetV3 have it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from paperzoo.blocks.backbones import Backbone, create_backbone, picture_size


def dilate(network: nn.Module, output_stride: int, *, whole_stage: bool = False) -> nn.Module:
    """Takes the strides beyond `output_stride` from a network with `stages`, in place; returns it.

    Convolutions and pools are found by running a copy without memory, so any network made of them can be dilated. `stage_strides` follows.

    Args:
        network: has `stages(x)` and `stage_strides`, as a classifier or a `Backbone`.
        output_stride: a power of two; not above the network's own stride it changes something.
        whole_stage: see above.

    Raises:
        ValueError: if that is no power of two, or the network strides by other means.
    """
    if output_stride < 1 or output_stride & (output_stride - 1):
        raise ValueError(f"output_stride is {output_stride}; a power of two is needed")
    if max(network.stage_strides) <= output_stride:
        return network
    size = picture_size(getattr(network, "body", network))
    strides = _strides(network, size)
    for name, module in network.named_modules():
        if name not in strides:
            continue
        before, after = strides[name]
        if after <= output_stride:
            continue
        factor = max(1, (after if whole_stage else before) // output_stride)
        if after > before:
            kept = max(1, output_stride // before)
            module.stride = (kept, kept) if isinstance(module.stride, tuple) else kept
        if max(_pair(module.kernel_size)) == 1:
            continue
        module.dilation = _times(module.dilation, factor)
        if not isinstance(module.padding, str):
            module.padding = _times(module.padding, factor)
    network.stage_strides = [min(stride, output_stride) for stride in network.stage_strides]
    if isinstance(network, Backbone):
        network.strides = network.stage_strides
        network.body.stage_strides = [min(stride, output_stride) for stride in network.body.stage_strides]
    _check(network, size, output_stride)
    return network


def dilated_backbone(name: str, output_stride: int, *, whole_stage: bool = False, **arguments: Any) -> Backbone:
    """A classifier by name as a backbone of this stride, every stage's map; see `dilate` and `create_backbone`."""
    try:
        return dilate(create_backbone(name, **arguments), output_stride, whole_stage=whole_stage)
    except ValueError as error:
        raise ValueError(f"backbone {name}: {error}") from error


def _times(value: int | tuple[int, ...], factor: int) -> int | tuple[int, ...]:
    return tuple(n * factor for n in value) if isinstance(value, tuple) else value * factor


def _strides(network: nn.Module, size: int) -> dict[str, tuple[int, int]]:
    """Name of each convolution and pool with an extent -> the stride of its input and of its output, relative to the picture."""
    twin = copy.deepcopy(network).to("meta").eval()
    found: dict[str, tuple[int, int]] = {}

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sides = inputs[0].shape[-2], output.shape[-2]
            if min(sides) > 1:  # not what was pooled to one vector
                found[name] = tuple(2 ** round(math.log2(size / side)) for side in sides)

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d) and max(_pair(module.kernel_size) + _pair(module.stride)) > 1:
            module.register_forward_hook(watch(name))
    _maps(twin, size)
    return found


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)


def _maps(network: nn.Module, size: int) -> list[Tensor]:
    channels = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        return network.stages(torch.empty(1, channels, size, size, device="meta"))


def _check(network: nn.Module, size: int, output_stride: int) -> None:
    twin = copy.deepcopy(network).to("meta").eval()
    try:
        sides = [m.shape[-1] for m in _maps(twin, size)]
    except RuntimeError as error:
        raise ValueError(f"cannot be dilated: {' '.join(str(error).split())[:120]}") from error
    wrong = [n for n, stride in zip(sides, network.stage_strides, strict=True) if abs(n - size / stride) > 2]
    if wrong:
        raise ValueError(
            f"cannot be dilated to stride {output_stride}: it strides by other means than convolutions and max pools with padding"
        )
