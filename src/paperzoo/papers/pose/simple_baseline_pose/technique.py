"""Tracking people by their poses (sec. 3 of the paper): boxes from the flow of earlier joints, identities by similarity.

For each frame, in this order: `FlowTracker.boxes` gives boxes where earlier people should be now, to be merged with a detector's
by non-maximum suppression (sec. 3.1); a pose network looks into all of them; `FlowTracker.update` tells who is who (sec. 3.2, 3.3).
The flow comes from whoever computes it: for each pixel of the last frame, how far it moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.matching import greedy_pairs
from paperzoo.tasks.pose_metrics import oks

WIDENED = 0.15  # boxes of propagated joints are extended by this part of their sides (sec. 3.1)


def propagate(keypoints: Tensor, flow: Tensor) -> Tensor:
    """Keypoints of the last frame, moved into this one by the flow.

    Args:
        keypoints: (N, K, 2), x and y in pixels; the middle of the first pixel is (0, 0).
        flow: (2, H, W): how far each pixel of the last frame moves, in x and y. Between pixels bilinear, beyond the frame
            as at its border.
    """
    height, width = flow.shape[1:]
    grid = (2 * keypoints + 1) / keypoints.new_tensor([width, height]) - 1
    moved = F.grid_sample(flow[None], grid[None].to(flow), padding_mode="border", align_corners=False)[0]  # (2, N, K)
    return keypoints + moved.permute(1, 2, 0).to(keypoints)


def boxes_around(keypoints: Tensor, widened: float = WIDENED) -> Tensor:
    """Keypoints (N, K, 2) -> boxes (N, 4) around them, extended by a part of their width and height in total."""
    low, high = keypoints.amin(1), keypoints.amax(1)
    middle, half = (low + high) / 2 + 0.5, (high - low) / 2 * (1 + widened)
    return torch.cat([middle - half, middle + half], 1)


@dataclass
class Frame:
    """The people of an earlier frame, where the flow has carried them: keypoints (N, K, 2), area (N,), identities."""

    keypoints: Tensor
    area: Tensor
    ids: list[int]


class FlowTracker:
    """Follows people through a video (algorithm 1).

    Args:
        sigmas: K, of the skeleton (`Skeleton.sigmas`).
        length: frames that are remembered, L_Q; with more than one a person who was hidden for a while is found again.
        least: pose similarity (OKS) below which two poses are not the same person.
        above: keypoints with a lower score do not count for the similarity.
    """

    def __init__(self, sigmas: tuple[float, ...], length: int = 3, least: float = 0.2, above: float = 0.0) -> None:
        if length < 1:
            raise ValueError(f"length is {length}; it must be 1 or more")
        self.sigmas, self.length, self.least, self.above = sigmas, length, least, above
        self.memory: list[Frame] = []
        self.people = 0

    def boxes(self, flow: Tensor | None) -> Tensor:
        """Carries everybody who is remembered into the new frame; boxes (N, 4) around those of the last frame.

        Args:
            flow: (2, H, W) from the last frame to this one; None for the first frame.
        """
        if flow is None or not self.memory:
            return torch.zeros(0, 4)
        for frame in self.memory:
            frame.keypoints = propagate(frame.keypoints, flow)
        last = self.memory[-1].keypoints
        return boxes_around(last) if len(last) else torch.zeros(0, 4)

    def update(self, keypoints: Tensor, scores: Tensor, area: Tensor) -> list[int]:
        """The identity of each pose of the new frame, numbered from 0.

        Newer frames are looked at first: whoever finds no match in the last one may find one in an earlier one.

        Args:
            keypoints: (N, K, 2).
            scores: (N, K).
            area: (N,), of the bodies or their boxes.
        """
        ids: list[int | None] = [None] * len(keypoints)
        for frame in reversed(self.memory):
            taken = {i for i in ids if i is not None}
            here = [n for n, i in enumerate(ids) if i is None]
            there = [m for m, i in enumerate(frame.ids) if i not in taken]
            if not here or not there:
                continue
            similarity = oks(
                frame.keypoints[there], keypoints[here], area[here], self.sigmas, scores[here] > self.above
            )
            for m, n in greedy_pairs(similarity, self.least):
                ids[here[n]] = frame.ids[there[m]]
        for n, i in enumerate(ids):
            if i is None:
                ids[n], self.people = self.people, self.people + 1
        found = [i for i in ids if i is not None]
        self.memory = [*self.memory, Frame(keypoints.clone(), area.clone(), found)][-self.length :]
        return found
