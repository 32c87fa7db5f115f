"""The outputs of an instance and a semantic network, made from the truth with known faults."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.panoptic import PanopticMap


@dataclass(frozen=True)
class Outputs:
    """What is merged: instances with masks bool (N, H, W), scores (N,) and labels int64 (N,); and a semantic map int64 (H, W)."""

    masks: Tensor
    scores: Tensor
    labels: Tensor
    semantic: Tensor

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name).numpy() for name in ("masks", "scores", "labels", "semantic")}


def degraded(truth: PanopticMap, things: list[int], stuff: list[int], rng: torch.Generator) -> Outputs:
    """Faults of the kinds that networks make, at rates that are known:

    - every thing is found as a mask that is moved by up to 4% of the image and grown or shrunk by a pixel, with a score of 0.6 to 1;
    - half of them a second time, moved further, with 0.3 to 0.8; a tenth under another label, with 0.3 to 0.7;
    - as many discs that are nothing, with 0 to 0.5;
    - in the semantic map, three patches of a kind of stuff that is not there, each of 0.2 to 1% of the image; no pixel without a class.
    """
    height, width = truth.ids.shape
    objects = [s for s in truth.segments if s.thing and not s.crowd]
    masks, scores, labels = [], [], []

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    def add(mask: Tensor, score: float, label: int) -> None:
        masks.append(mask)
        scores.append(score)
        labels.append(label)

    def moved(mask: Tensor, share: float) -> Tensor:
        far = share * min(height, width)
        shifted = torch.roll(mask, (round(uniform(-far, far)), round(uniform(-far, far))), (0, 1)).float()[None, None]
        if float(torch.rand((), generator=rng)) < 0.5:
            return F.max_pool2d(shifted, 3, 1, 1)[0, 0] > 0
        return -F.max_pool2d(-shifted, 3, 1, 1)[0, 0] > 0

    for segment in objects:
        mask, chance = truth.ids == segment.id, torch.rand(2, generator=rng)
        wrong = things[int(torch.randint(len(things), (), generator=rng))]
        add(moved(mask, 0.04), uniform(0.6, 1.0), segment.category)
        if chance[0] < 0.5:
            add(moved(mask, 0.12), uniform(0.3, 0.8), segment.category)
        if chance[1] < 0.1:
            add(moved(mask, 0.04), uniform(0.3, 0.7), wrong)
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    for _ in objects:
        middle, radius = (uniform(0, height), uniform(0, width)), uniform(0.05, 0.15) * min(height, width)
        disc = (y - middle[0]).square() + (x - middle[1]).square() < radius**2
        add(disc, uniform(0.0, 0.5), things[int(torch.randint(len(things), (), generator=rng))])

    semantic = truth.semantic
    for _ in range(4):  # pixels that nobody labelled get a class all the same: their neighbour's
        grown = F.max_pool2d(semantic[None].float(), 5, 1, 2)[0].long()
        semantic = torch.where(semantic < 0, grown, semantic)
    present = {s.category for s in truth.segments}
    missing = [k for k in stuff if k not in present] or stuff
    for _ in range(3):
        side = (uniform(0.002, 0.01) * height * width) ** 0.5
        top, left = uniform(0, height - side), uniform(0, width - side)
        other = missing[int(torch.randint(len(missing), (), generator=rng))]
        semantic[round(top) : round(top + side), round(left) : round(left + side)] = other
    stacked = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)
    return Outputs(stacked, torch.tensor(scores), torch.tensor(labels, dtype=torch.int64), semantic)
