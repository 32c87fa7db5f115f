"""How good an explanation is: where it points, what it removes from the network's confidence, and whether it listens to the weights.

All of them take maps float (B, H, W), higher meaning more important, of images (B, C, H, W) as the network takes them, and
classes int64 (B,). An explainer is any function (model, images, classes) -> maps in [0, 1]. The network's output are logits
(B, num_classes); confidence is their softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from paperzoo.blocks.explaining import explaining, rescale

Explainer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images (B, C, H, W), classes (B,)) -> maps float32 (B, H, W) in [0, 1]."""


# -- where a map points, on images whose evidence is known -------------------------------------------------------------


def boxes_inside(boxes: Sequence[Tensor], height: int, width: int) -> Tensor:
    """The boxes of each image, (N_i, 4) as x1 y1 x2 y2 in parts of width and height, to bool (B, height, width).

    True are the pixels whose centre lies in one of the image's boxes; an image without a box has none.
    """
    owner = torch.repeat_interleave(torch.arange(len(boxes)), torch.tensor([len(b) for b in boxes]))
    every = torch.cat([torch.as_tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes])
    x1, y1, x2, y2 = every[:, :, None].unbind(1)  # (M, 1)
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    columns, rows = (x >= x1) & (x < x2), (y >= y1) & (y < y2)
    masks = (rows[:, :, None] & columns[:, None, :]).int()
    return torch.zeros(len(boxes), height, width, dtype=torch.int32).index_add_(0, owner, masks) > 0


def pointing_game(maps: Tensor, inside: Tensor, tolerance: int = 0) -> Tensor:
    """Whether the highest place of a map lies in the evidence, bool (B,) (Zhang et al., arXiv:1608.00507).

    Args:
        maps: (B, H, W).
        inside: bool (B, H, W).
        tolerance: pixels; a place so near to the evidence counts as well (the original: 15 of photographs).
    """
    if tolerance:
        side = 2 * tolerance + 1
        inside = F.max_pool2d(inside[:, None].float(), side, stride=1, padding=tolerance)[:, 0] > 0
    return inside.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))[:, 0]


def energy_inside(maps: Tensor, inside: Tensor) -> Tensor:
    """The share of a map that lies in the evidence, (B,) in [0, 1]: the energy-based pointing game of Score-CAM (sec. 4.3).

    A flat map has the evidence's share of the image, a map of zeros none.
    """
    return (maps * inside).sum((1, 2)) / maps.sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)


def localisation_overlap(maps: Tensor, inside: Tensor, threshold: float) -> Tensor:
    """Grad-CAM++'s Loc (sec. 5.2), (B,) in [0, 1]: intersection over union of a map above the threshold and the evidence."""
    marked = maps > threshold
    both, either = (marked & inside).sum((1, 2)), (marked | inside).sum((1, 2))
    return both / either.clamp_min(1)


def box_around(found: Tensor, threshold: float) -> tuple[float, float, float, float]:
    """The box around a map's largest connected part above a part of its maximum: x1 y1 x2 y2 in parts of the sides.

    Args:
        found: (H, W), not negative.
        threshold: 0 to 1.
    """
    from scipy.ndimage import find_objects, label

    marked, count = label((found > threshold * found.max()).numpy())
    if count == 0:
        return (0.0, 0.0, 0.0, 0.0)
    largest = torch.from_numpy(marked).flatten().bincount()[1:].argmax()
    rows, columns = find_objects(marked)[int(largest)]
    height, width = found.shape
    return (columns.start / width, rows.start / height, columns.stop / width, rows.stop / height)


# -- what is removed and what is kept ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Confidence in the class while pixels change hands: `scores` (B, steps + 1), `area` (B,) under it, both in [0, 1]."""

    scores: Tensor
    area: Tensor


def deletion(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    maps: Tensor,
    steps: int = 32,
    baseline: Tensor | None = None,
    batch_size: int = 256,
) -> Curve:
    """RISE's deletion (arXiv:1806.07421, sec. 4.1): the most important pixels go first; a small area is good.

    Args:
        model, images, classes, maps: see the module.
        steps: how often pixels are replaced; ceil(H * W / steps) of them each time. Among equal ones the upper left go first.
        baseline: what they are replaced with, broadcastable to the images; None: 0, which is the mean of normalised images.
        batch_size: how many altered images go through the network together.
    """
    after = torch.zeros_like(images) if baseline is None else baseline.expand_as(images)
    return exchange(model, images, after, classes, maps, steps, batch_size)


def insertion(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    maps: Tensor,
    steps: int = 32,
    baseline: Tensor | None = None,
    batch_size: int = 256,
) -> Curve:
    """RISE's insertion: the most important pixels come first onto a blurred image; a large area is good.

    Args:
        baseline: what is started from; None: `blurred(images)`. The others as in `deletion`.
    """
    before = blurred(images) if baseline is None else baseline.expand_as(images)
    return exchange(model, before, images, classes, maps, steps, batch_size)


def blurred(images: Tensor) -> Tensor:
    """Images without detail: a Gaussian whose deviation is 5 of 224 pixels, its kernel 11 wide (RISE), scaled to the height."""
    scale = images.shape[-2] / 224
    side = max(3, 2 * round(5 * scale) + 1)
    return gaussian_blur(images, [side, side], [max(1.0, 5 * scale)] * 2)


@torch.no_grad()
def exchange(
    model: nn.Module, before: Tensor, after: Tensor, classes: Tensor, maps: Tensor, steps: int, batch_size: int
) -> Curve:
    """Confidence on the way from the images `before` to those `after`, pixels in the maps' order."""
    batch, pixels = len(before), maps[0].numel()
    each = -(-pixels // steps)
    counts = torch.arange(-(-pixels // each) + 1, device=before.device) * each  # pixels exchanged at each step
    order = maps.to(before.device).flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(pixels, device=before.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places).view(batch, 1, *maps.shape[1:])
    scores = []
    with explaining(model), torch.no_grad():
        for rows in torch.arange(batch * len(counts), device=before.device).split(batch_size):
            image, step = rows // len(counts), rows % len(counts)
            exchanged = ranks[image] < counts[step, None, None, None]
            mixed = torch.where(exchanged, after[image], before[image])
            probabilities = model(mixed).float().softmax(1)
            scores.append(probabilities.gather(1, classes[image, None])[:, 0])
    table = torch.cat(scores).view(batch, len(counts))
    return Curve(table, torch.trapezoid(table, dx=1 / (len(counts) - 1), dim=1))


@torch.no_grad()
def confidence_change(
    model: nn.Module, images: Tensor, classes: Tensor, maps: Tensor, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Confidence before and after the image is multiplied with its map (Grad-CAM++, sec. 5.1): two (B,) in [0, 1].

    With normalised images what is hidden becomes the mean colour. `average_drop` and `increase` sum them up.
    """
    found = []
    with explaining(model), torch.no_grad():
        for rows in torch.arange(len(images), device=images.device).split(batch_size):
            pair = torch.cat([images[rows], images[rows] * maps[rows, None].to(images.device)])
            probabilities = model(pair).float().softmax(1)
            found.append(probabilities.gather(1, classes[rows].repeat(2)[:, None])[:, 0].view(2, -1))
    full, kept = torch.cat(found, 1)
    return full, kept


def average_drop(full: Tensor, kept: Tensor) -> float:
    """The mean of max(0, full - kept) / full, in [0, 1]; small is good. The paper gives it in percent."""
    return float(((full - kept).clamp_min(0) / full.clamp_min(torch.finfo(full.dtype).tiny)).mean())


def increase(full: Tensor, kept: Tensor) -> float:
    """How often confidence rises when only the explained part is kept, in [0, 1]; large is good."""
    return float((kept > full).float().mean())


# -- whether it listens to the weights ---------------------------------------------------------------------------------


def cascade(model: nn.Module, images: Tensor, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Adebayo et al.'s cascading randomisation (arXiv:1810.03292, sec. 3): weights are lost from the output to the input.

    Yields the name of the layer that was just randomised, and the network: one copy, which goes on changing. Layers that know
    how they begin begin anew; the values of any other parameters are shuffled. Running statistics stay, they are not weights.
    """
    copy = deepcopy(model)
    order: list[nn.Module] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        if module not in order:
            order.append(module)

    holders = {m: name for name, m in copy.named_modules() if next(m.parameters(recurse=False), None) is not None}
    hooks = [module.register_forward_hook(remember) for module in holders]
    try:
        with explaining(copy), torch.no_grad():
            copy(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    order = [
        module for module in holders if module not in order
    ] + order  # parts that never run themselves: last of all
    rng = torch.Generator().manual_seed(seed)
    for module in reversed(order):
        begin_anew(module, rng)
        yield holders[module], copy


@torch.no_grad()
def begin_anew(module: nn.Module, rng: torch.Generator) -> None:
    """Random values for a module's own parameters; buffers stay."""
    buffers = {name: value.clone() for name, value in module.named_buffers(recurse=False)}
    if hasattr(module, "reset_parameters"):
        devices = [p.device for p in module.parameters(recurse=False) if p.is_cuda]
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
            module.reset_parameters()
    else:
        for parameter in module.parameters(recurse=False):
            places = torch.randperm(parameter.numel(), generator=rng).to(parameter.device)
            parameter.copy_(parameter.flatten()[places].view_as(parameter))
    for name, value in buffers.items():
        getattr(module, name).copy_(value)


def sanity_check(
    explain: Explainer, model: nn.Module, images: Tensor, classes: Tensor, stages: int = 8, seed: int = 0
) -> dict[str, float]:
    """Mean rank correlation of the maps with themselves, after ever more layers were randomised; it must fall.

    Args:
        explain, model, images, classes: see the module.
        stages: at how many depths of the cascade maps are taken, evenly spaced; the last one is the wholly random network.
        seed: of the random weights.

    Returns:
        By the name of the layer that was randomised last, from the output to the input: a mean in [-1, 1].
    """
    before = explain(model, images, classes)
    total = sum(next(m.parameters(recurse=False), None) is not None for m in model.modules())
    wanted = {round(total * (i + 1) / stages) for i in range(stages)}
    found = {}
    for i, (name, randomised) in enumerate(cascade(model, images, seed), start=1):
        if i in wanted or i == total:
            found[name] = float(rank_correlation(before, explain(randomised, images, classes)).mean())
    return found


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation between the maps (B, H, W) of two batches: (B,) in [-1, 1]; 0 where one is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(maps.detach().cpu().flatten(1).numpy().astype(numpy.float64), axis=1) for maps in (a, b)]
    x, y = (torch.from_numpy(r) - torch.from_numpy(r).mean(1, keepdim=True) for r in ranks)
    scale = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(scale > 0, (x * y).sum(1) / scale.clamp_min(1e-12), 0.0).float()


# -- what an explanation has to beat -----------------------------------------------------------------------------------


def centre_prior(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The explainer that always says "in the middle": a cone, 1 at the centre, 0 in the corners."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    cone = 1 - (x.square() + y.square()).sqrt() / 2**0.5
    return cone.expand(len(images), -1, -1).to(images.device)


def random_maps(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The explainer that throws dice: smooth noise in grains of four pixels, the same in every call."""
    height, width = images.shape[-2:]
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(len(images), 1, max(2, height // 4), max(2, width // 4), generator=rng)
    return rescale(F.interpolate(coarse, (height, width), mode="bilinear")[:, 0]).to(images.device)
