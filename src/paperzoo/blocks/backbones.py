"""Any classifier of the catalogue as a backbone: its feature maps by stage, with their channels and strides.

    backbone = create_backbone("convnext_tiny", out_indices=(1, 2, 3))      # or paperzoo.create("convnext_tiny", features_only=True)
    backbone(images)                                                        # [(B, 192, H/8, W/8), (B, 384, H/16, W/16), …]
    backbone.out_channels, backbone.strides                                 # [192, 384, 768], [8, 16, 32]

Detectors, pose networks and text detectors take one by name. What a map does not depend on, the classifier's head
for one, is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("avgpool", "fc", "classifier", "head")
"""What classifiers call their pooling and last layers."""


def headless(body: nn.Module) -> nn.Module:
    """The network without its pooling and classifier, in place."""
    for name in HEADS:
        if hasattr(body, name):
            setattr(body, name, nn.Identity())
    return body


def load_body(body: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Weights of a classifier with the same body; what the body has not, its head for one, is left out.

    Raises:
        ValueError: if weights of the body are missing, or have another shape.
    """
    wanted = body.state_dict()
    missing = [name for name in wanted if name not in state_dict and not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"state_dict lacks {missing[0]} and {len(missing) - 1} more; weights of the same body are needed"
        )
    other = next((name for name in wanted if wanted[name].shape != state_dict.get(name, wanted[name]).shape), None)
    if other:
        shapes = f"{tuple(state_dict[other].shape)} instead of {tuple(wanted[other].shape)}"
        raise ValueError(f"{other} has the shape {shapes}; weights of the same body are needed")
    body.load_state_dict({name: state_dict.get(name, value) for name, value in wanted.items()})


class Backbone(nn.Module):
    """A classifier's feature maps: images (B, in_channels, H, W) -> for each chosen stage (B, C_i, H_i, W_i), finest first.

    Args:
        network: has `stages(x)`, `stage_channels` and `stage_strides`; its head is dropped, in place.
        out_indices: which stages, counted from 0, in rising order; negative ones from the end; None for all.

    Attributes:
        out_channels, strides: of the chosen maps.
        stage_channels, stage_strides, stages: the same under a classifier's names, so that what takes a classifier's
            body takes this too.

    Raises:
        ValueError: if the network has no stages, or not those.
    """

    def __init__(self, network: nn.Module, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        for name in ("stages", "stage_channels", "stage_strides"):
            if not hasattr(network, name):
                raise ValueError(f"{type(network).__name__} has no feature maps by stage: it cannot be a backbone")
        count = len(network.stage_channels)
        chosen = range(count) if out_indices is None else [i + count if i < 0 else i for i in out_indices]
        self.taken = tuple(chosen)
        if not self.taken or any(not 0 <= i < count for i in self.taken) or list(self.taken) != sorted(set(self.taken)):
            raise ValueError(f"out_indices is {tuple(out_indices or ())}; they rise and are among 0 … {count - 1}")
        self.body = headless(network)
        self.out_channels = [int(network.stage_channels[i]) for i in self.taken]
        self.strides = [int(network.stage_strides[i]) for i in self.taken]
        self.stage_channels, self.stage_strides = self.out_channels, self.strides

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body.stages(images)
        return [maps[i] for i in self.taken]

    stages = forward

    def load_body(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of a classifier with the same body; its later stages and last layer are left out."""
        load_body(self.body, state_dict)


def create_backbone(
    name: str,
    *,
    in_channels: int = 3,
    out_indices: Sequence[int] | None = None,
    weights: str | None = None,
    **arguments: Any,
) -> Backbone:
    """A backbone by the name of a classifier; see `Backbone`.

    Args:
        weights: of the whole classifier: a file or folder, as `paperzoo.create` takes them.
        arguments: what else the classifier's function takes.

    Raises:
        UnknownName: if there is no such model.
        PaperZooError, ValueError: if it is no classifier with stages, or an argument or the weights do not fit.
    """
    from paperzoo import create

    backbone = Backbone(create(name, in_channels=in_channels, weights=weights, **arguments), out_indices)
    prune(backbone, create, name, in_channels, arguments)
    return backbone


def at_strides(name: str, strides: Sequence[int], **arguments: Any) -> Backbone:
    """A backbone with just the maps of these strides: the last stage of each.

    Raises:
        ValueError: if the classifier has no map of one of them; names those that it has.
    """
    backbone = create_backbone(name, **arguments)
    has = backbone.strides
    for stride in strides:
        if stride not in has:
            raise ValueError(f"backbone {name} has maps of strides {', '.join(map(str, has))}, none of stride {stride}")
    wanted = [len(has) - 1 - has[::-1].index(stride) for stride in strides]
    return backbone if wanted == list(range(len(has))) else create_backbone(name, out_indices=wanted, **arguments)


def prune(backbone: Backbone, create: Any, name: str, in_channels: int, arguments: dict[str, Any]) -> None:
    """Replace the modules that no chosen map depends on with nothing, so that they cost neither time nor memory.

    Found on a copy without memory (meta device): modules whose parameters get no gradient from the maps. Kept where
    the network's code needs them in their place.
    """
    with torch.device("meta"):
        twin = Backbone(create(name, in_channels=in_channels, **arguments), backbone.taken)
    images = torch.empty(2, in_channels, *[picture_size(twin.body)] * 2, device="meta")
    parameters = dict(twin.body.named_parameters())
    total = sum(m.sum() for m in twin(images))
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    used = {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    idle: list[str] = []
    for key, module in twin.body.named_modules():
        mine = [p for p in parameters if p.startswith(key + ".")] if key else []
        inside = any(key.startswith(done + ".") for done in idle)
        if mine and not inside and not isinstance(module, nn.ModuleList | nn.ModuleDict) and not used & set(mine):
            idle.append(key)
    for key, module in twin.body.named_modules():  # what follows them in a chain, an activation in place for one
        if isinstance(module, nn.Sequential):
            chain = [f"{key}.{child}" for child, _ in module.named_children()]
            first = next((i for i, child in enumerate(chain) if child in idle), len(chain))
            if not any(p.startswith(child + ".") for child in chain[first:] for p in used):
                idle += [child for child in chain[first:] if child not in idle]
    shapes = [m.shape for m in twin(images)]
    for key in reversed(idle):  # from the end, as a layer expects what the one before it makes
        before = replace(twin.body, key, nn.Identity())
        try:
            fits = [m.shape for m in twin(images)] == shapes
        except Exception:  # whatever a network's code makes of the missing module
            fits = False
        if fits:
            replace(backbone.body, key, nn.Identity())
        else:
            replace(twin.body, key, before)


def picture_size(network: nn.Module) -> int:
    """A side that every architecture allows: the size it was built for, or 256 pixels."""
    size = getattr(network, "image_size", None) or 256
    return int(size if isinstance(size, int) else size[0])


def replace(network: nn.Module, key: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of another, which is returned."""
    parent, _, child = key.rpartition(".")
    owner, before = network.get_submodule(parent), network.get_submodule(key)
    setattr(owner, child, module)
    return before
