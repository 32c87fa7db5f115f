"""From clips of skeletons to what a network sees: upright bodies, streams, frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.blocks.skeleton_graphs import LAYOUTS, Layout
from paperzoo.errors import DataError

STREAMS = ("joint", "bone", "joint_motion", "bone_motion")
TEST_SEED = 255  # of the released code


def people_first(joints: Tensor) -> Tensor:
    """(M, T, V, C) without the frames in which the first person is not seen; the first is who is seen in more of them."""
    seen = (joints != 0).any(3).any(2)  # (M, T)
    counts = seen.sum(1)
    if len(joints) > 1 and counts[1] > counts[0]:
        joints, seen = joints.roll(-1, 0), seen.roll(-1, 0)
    return joints[:, seen[0]]


def rotation_onto(start: Tensor, end: Tensor) -> Tensor:
    """The smallest rotation (3, 3) that turns one direction (3,) into another; the identity where one of them is 0."""
    if start.norm() < 1e-6 or end.norm() < 1e-6:
        return torch.eye(3, dtype=start.dtype)
    a, b = F.normalize(start, dim=0), F.normalize(end, dim=0)
    axis, cosine = torch.linalg.cross(a, b), torch.dot(a, b).clamp(-1, 1)
    if axis.norm() < 1e-6:
        axis = torch.linalg.cross(a, torch.eye(3, dtype=a.dtype)[a.abs().argmin()])
    axis = F.normalize(axis, dim=0)
    x, y, z = axis.tolist()
    across = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=start.dtype)
    angle = torch.acos(cosine)
    return torch.eye(3, dtype=start.dtype) + angle.sin() * across + (1 - angle.cos()) * across @ across


def normalised(joints: Tensor, layout: Layout) -> Tensor:
    """Three-dimensional joints (M, T, V, 3), pre-normalised: the first person's middle of the first frame is the origin, the spine then points along z,
    the shoulders along x. Joints that were not seen stay 0.

    The first frame is one in which the joints that this needs were seen, where there is one.
    """
    joints = people_first(joints)
    if not joints.shape[1]:
        return joints
    needed = [layout.middle, *layout.spine, *layout.shoulders]
    whole = (joints[0][:, needed] != 0).any(2).all(1)
    first = joints[0, int(whole.int().argmax())].double()
    seen = (joints != 0).any(3, keepdim=True)
    centre = first[layout.middle]
    bottom, top = first[list(layout.spine)]
    turn = rotation_onto(top - bottom, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    right, left = first[list(layout.shoulders)]
    turn = rotation_onto(turn @ (right - left), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)) @ turn
    return torch.where(seen, ((joints.double() - centre) @ turn.T).float(), torch.zeros(()))


def stream(joints: Tensor, kind: str, layout: Layout, flat: bool) -> Tensor:
    """One view of a clip (M, T, V, C): joints; bones, from the joint nearer to the body's middle; and how either moves to the next frame (0 in
    the last). How sure flat joints are is averaged over the two."""
    if kind in ("bone", "bone_motion"):
        other = joints[:, :, list(layout.bones)]
        joints = between(joints, other, flat)
    if kind in ("joint_motion", "bone_motion"):
        later = torch.cat([joints[:, 1:], joints[:, -1:]], 1)
        moved = between(later, joints, flat)
        moved[:, -1] = 0
        return moved
    return joints


def between(joints: Tensor, other: Tensor, flat: bool) -> Tensor:
    difference = joints - other
    if flat:
        difference[..., 2] = (joints[..., 2] + other[..., 2]) / 2
    return difference


def frames_of(count: int, length: int, rng: np.random.Generator, number: int = 0, clips: int = 0) -> np.ndarray:
    """`length` frames of a clip of `count`, uniform sampling: one at random from each of equal parts; a shorter clip is gone through repeatedly.

    Args:
        number, clips: which of how many test clips, whose starts are spread; 0 clips in training, where it is random.
    """
    if count < length:
        start = (number if count < clips else number * count // clips) if clips else int(rng.integers(count))
        return np.arange(start, start + length) % count
    if count < 2 * length:
        skipped = np.zeros(length + 1, np.int64)
        skipped[rng.choice(length + 1, count - length, replace=False)] = 1
        return np.arange(length) + skipped.cumsum()[:-1]
    borders = np.arange(length + 1) * count // length
    return borders[:-1] + rng.integers(np.diff(borders))


def rotated(joints: Tensor, most: float, rng: np.random.Generator) -> Tensor:
    """Three-dimensional joints turned about each axis by up to so many radians."""
    for axis in range(3):
        angle = float(rng.uniform(-most, most))
        turn, (a, b) = torch.eye(3), [k for k in range(3) if k != axis]
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        joints = joints @ turn.T
    return joints


class SkeletonSamples(Dataset):
    """Clips as a network sees them: float32 (people, frames, V, S * C), in tests with the test clips before; and the label (-1: unknown).

    Random numbers in training follow from numpy's global generator.
    """

    def __init__(self, data: Any, config: Any, test: bool) -> None:
        self.data, self.config, self.test = data, config, test
        self.layout = LAYOUTS[data.layout]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        clip = self.data[i]
        return self.values(clip.joints, clip.name), -1 if clip.label is None else clip.label

    def values(self, joints: Tensor, name: str) -> Tensor:
        config, flat = self.config, self.data.flat
        joints = people_first(joints)
        if config.still:  # before anything is measured from the first frame
            joints = joints[:, [joints.shape[1] // 2] * joints.shape[1]]
        joints = joints if flat else normalised(joints, self.layout)
        if not joints.shape[1]:
            raise DataError(name, "no body was seen in it")
        rng = np.random.default_rng(TEST_SEED if self.test else np.random.randint(2**31))
        if config.rotation and not self.test and not flat:
            joints = rotated(joints, config.rotation, rng)
        people = joints[: config.people]
        if len(people) < config.people:
            people = torch.cat([people, people.new_zeros(config.people - len(people), *people.shape[1:])])
        whole = torch.cat([stream(people, kind, self.layout, flat) for kind in config.streams], 3)
        count, clips = whole.shape[1], config.test_clips if self.test else 0
        if not clips:
            return whole[:, frames_of(count, config.frames, rng)]
        return torch.stack([whole[:, frames_of(count, config.frames, rng, k, clips)] for k in range(clips)])


def shared(weights: Sequence[float] | None, streams: Sequence[str]) -> list[float]:
    """The streams' shares in the answer, of sum 1; by default joints and bones count twice as much as motions."""
    values = list(weights) if weights is not None else [1.0 if s.endswith("motion") else 2.0 for s in streams]
    return [value / sum(values) for value in values]
