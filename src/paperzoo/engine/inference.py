"""A network made ready for inference: batch norm folded into the convolutions before it, channels-last memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from paperzoo.engine.parity import leaves
from paperzoo.engine.runtime import channels_last

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def make_ready(network: nn.Module, inputs: tuple) -> nn.Module:
    """The network, in place: in eval mode, folded, channels-last where it has 2-D convolutions. Its outputs stay the same.

    Pairs to fold are found by watching one call: a batch norm whose input is exactly what a convolution or linear layer,
    called once, has just returned. Each fold is believed only if the outputs stay the same within 1e-4 of their size;
    otherwise nothing is folded (a layer's output may have had a second reader).
    """
    channels_last(network.eval())
    pairs = foldable(network, inputs)
    if not pairs:
        return network
    before = [v.clone() for _, v in leaves(network(*inputs))]
    kept = [(name, network.get_submodule(name)) for pair in pairs for name in pair]
    for first, norm in pairs:
        layer, bn = network.get_submodule(first), network.get_submodule(norm)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        replace(network, first, fuse(layer, bn))
        replace(network, norm, nn.Identity())
    after = [v for _, v in leaves(network(*inputs))]
    if any(
        (a - b).abs().max() > 1e-4 * (1 + b.abs().max())
        for a, b in zip(after, before, strict=True)
        if b.is_floating_point() and b.numel()
    ):
        for name, module in kept:
            replace(network, name, module)
    return network


def foldable(network: nn.Module, inputs: tuple) -> list[tuple[str, str]]:
    """(layer, norm) by name, for every norm that reads what the layer alone has just returned.

    Layers whose weights are computed anew at each call (spectral norm) are left out: there is no weight to fold into.
    """
    made: dict[int, tuple[str, torch.Tensor]] = {}
    calls: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):

            def after(module, args, output, name=name):
                calls[name] = calls.get(name, 0) + 1
                made[id(output)] = (name, output)  # the tensor is kept, so its id stays its own

            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, NORMS) and module.track_running_stats:

            def before(module, args, name=name):
                calls[name] = calls.get(name, 0) + 1
                if id(args[0]) in made:
                    found.append((made[id(args[0])][0], name))

            hooks.append(module.register_forward_pre_hook(before))
    try:
        network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [(a, b) for a, b in found if calls[a] == calls[b] == 1 and not is_parametrized(network.get_submodule(a))]


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
