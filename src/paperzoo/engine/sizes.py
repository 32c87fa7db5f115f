"""Other input sizes: which of a network's inputs may be larger or smaller than in its example, found by trying.

A size is an axis that is neither the batch nor a feature: height and width of pictures, the length of a sequence, the
number of points. Sizes that agree among inputs (ids and the mask over them) are changed together; height and width of
a picture in one go, differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paperzoo.engine.explain import at_line, first_line

SMALLEST = 5  # an axis that is shorter is a structure (x and y of a point, height and width), no size
LARGE = 160  # pixels
LARGE_VOLUME = 48  # voxels
STEPS = (
    16,
    32,
    8,
    4,
)  # further values of a size lie so far away, or a divisor of that: what networks halve their maps by

Inputs = tuple[Tensor, ...]
Length = tuple[tuple[int, int], ...]  # (input, axis): the places that one size has


@dataclass(frozen=True)
class Sizes:
    """What was found. `axes` lists for each input the axes, beside the batch, that may differ; `others` holds the example at
    two other sizes that the network takes, none where all is fixed; `fixed` says why sizes do not differ, "" where all may.
    """

    axes: tuple[tuple[int, ...], ...]
    others: tuple[Inputs, ...] = ()
    fixed: str = ""

    @property
    def any(self) -> bool:
        return bool(self.others)


def closed(inputs: Sequence[Tensor], why: str = "") -> Sizes:
    """Only the batch may differ."""
    return Sizes(tuple(() for _ in inputs), (), why)


def candidates(inputs: Sequence[Tensor]) -> list[list[Length]]:
    """The sizes that might differ, in groups that are tried in one go."""
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for k, x in enumerate(inputs):
        whole = not x.is_floating_point()
        first = 2 if x.ndim >= 4 else 1 if x.ndim == 3 or (x.ndim == 2 and whole) else x.ndim
        for axis in range(first, x.ndim):
            if x.shape[axis] >= SMALLEST:  # those of one picture stay apart, though they may be equal
                groups.setdefault((axis, x.shape[axis]), []).append((k, axis))
    for k, x in enumerate(inputs):  # a mask of numbers over a sequence that another input has
        if x.ndim == 2 and x.is_floating_point() and (1, x.shape[1]) in groups:
            groups[1, x.shape[1]].append((k, 1))
    tried: dict[tuple[int, ...], list[Length]] = {}
    alone: list[list[Length]] = []
    for places in groups.values():
        pictures = tuple(k for k, _ in places if inputs[k].ndim >= 4)
        if pictures:
            tried.setdefault(pictures, []).append(tuple(places))
        else:
            alone.append([tuple(places)])
    return [*tried.values(), *alone]


def values(size: int, place: int, steps: Sequence[int] = STEPS) -> list[int]:
    """Further values of a size, in the order in which they are tried; `place` differs between sizes of one input."""
    found = []
    for largest in steps:
        step = max(s for s in (1, 2, 4, 8, 16, 32) if s <= largest and size % s == 0)
        more = [(1, 2), (2, 0), (0, 1), (-1, -1), (-1, 1), (-2, -1)]
        found += [size + step * pair[place % 2] for pair in more]
    return found


def at(inputs: Sequence[Tensor], changed: dict[tuple[int, int], int]) -> Inputs:
    """The example with other sizes, by repeating or leaving out what it has."""
    made = list(inputs)
    for (k, axis), size in changed.items():
        have = made[k].shape[axis]
        made[k] = made[k].index_select(axis, torch.arange(size) % have).contiguous()
    return tuple(made)


@torch.inference_mode()
def refusal(network: nn.Module, inputs: Inputs) -> str:
    """Why a network does not take inputs; "" where it does."""
    try:
        network(*inputs)
    except Exception as error:  # whatever a network raises for a size is its answer
        return f"{first_line(error)}{at_line(error)}"
    return ""


def try_sizes(network: nn.Module, inputs: Inputs) -> Sizes:
    """Which sizes of the inputs a network takes otherwise. It is in eval mode, and called a few times."""
    axes: list[list[int]] = [[] for _ in inputs]
    moved: list[list[dict[tuple[int, int], int]]] = []
    reasons = []
    for group in candidates(inputs):
        took, why = [], ""
        options = [
            values(inputs[length[0][0]].shape[length[0][1]], i, STEPS[: 2 if len(group) > 1 else None])
            for i, length in enumerate(group)
        ]
        for sizes in dict.fromkeys(zip(*options, strict=True)):
            if min(sizes) < 1:
                continue
            changed = {place: size for length, size in zip(group, sizes, strict=True) for place in length}
            if all(size == inputs[k].shape[axis] for (k, axis), size in changed.items()):
                continue
            problem = refusal(network, at(inputs, changed))
            why = why or problem
            if not problem:
                took.append(changed)
            if len(took) == 2:
                break
        if len(took) == 2:
            moved.append(took)
            for length in group:
                for k, axis in length:
                    axes[k].append(axis)
        else:
            reasons.append(f"{' x '.join(str(inputs[p[0][0]].shape[p[0][1]]) for p in group)}: {why}")
    others = []
    for i in range(2 if moved else 0):
        together = at(inputs, {place: size for took in moved for place, size in took[i].items()})
        problem = refusal(network, together)
        if problem:
            return closed(inputs, problem)
        others.append(together)
    return Sizes(tuple(map(tuple, axes)), tuple(others), "; ".join(reasons))


def enlarged(inputs: Inputs, sizes: Sizes) -> Inputs:
    """The first of the other sizes with pictures so large that no map in a network becomes a single point.

    Traced at a single point, a graph takes it for a rule.
    """
    other, changed = sizes.others[0], {}
    sides = [other[k].shape[axis] for k, axes in enumerate(sizes.axes) for axis in axes if other[k].ndim >= 4]
    large = LARGE_VOLUME if any(x.ndim > 4 for x in other) else LARGE
    factor = max(1, -(-large // min(sides))) if sides else 1
    for k, axes in enumerate(sizes.axes):
        for axis in axes:
            changed[k, axis] = other[k].shape[axis] * (factor if other[k].ndim >= 4 else 1)
    return at(inputs, changed)


def shapes(inputs: Sequence[Tensor]) -> str:
    """As people write them: "2 x 3 x 64 x 64, 2 x 12"."""
    return ", ".join(" x ".join(map(str, x.shape)) for x in inputs)
