"""Gestures: stick figures with the 25 joints of NTU RGB+D, always there. Eight classes in four pairs, each the other one backwards.

An arm goes up or down, an arm circles forwards or backwards, somebody sits down or stands up, two people come together or part. As the same
poses occur in both of a pair, no single pose tells which it is, only their order in time.

Bodies differ in size and proportions, stand somewhere before a camera and face it more or less; gestures differ in speed, extent, start and
arm. Joints are measured with noise, some are not seen (0, 0, 0). Everything follows from the seed; nothing is downloaded.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from paperzoo.data.skeleton_clips import SkeletonClip, SkeletonClips

LABELS = ["arm up", "arm down", "circle forwards", "circle backwards", "sit down", "stand up", "come together", "part"]
COUNT = {"train": 400, "test": 160}
MOMENTS = 48  # of a gesture before its speed; frames of a clip are 24 to 48
SHORTEST = 24
NOISE = 0.008  # metres
UNSEEN = 0.01  # share of joints

_LEFT, _RIGHT = (4, 5, 6, 7, 21, 22), (8, 9, 10, 11, 23, 24)  # shoulder, elbow, wrist, hand, tip, thumb
_LEFT_LEG, _RIGHT_LEG = (12, 13, 14, 15), (16, 17, 18, 19)


def _uniform(rng: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=rng)


def figure(raised: Tensor, forward: Tensor, seated: Tensor, size: Tensor, arm: Tensor) -> Tensor:
    """Stick figures (N, T, 25, 3) in metres: x to the person's left, y up, z the way they look; the hips' middle above the origin.

    Args:
        raised, forward: (N, T), radians: the gesturing arm's height at the side (-pi/2 hangs, pi/2 points up) and its turn to the front.
        seated: (N, T), 0 (standing) to 1.
        size: (N, 4): lengths of trunk, arms and legs, and the shoulders' width, as factors.
        arm: bool (N,), whether the left one gestures.
    """
    count, moments = raised.shape
    trunk, arms, legs, shoulders = (size[:, k, None] for k in range(4))
    joints = torch.zeros(count, moments, 25, 3)
    bent = seated * math.pi / 2
    thigh, shin = 0.42 * legs, 0.42 * legs
    joints[:, :, 0, 1] = 0.08 + shin + thigh * bent.cos()
    for joint, share in ((1, 0.28), (20, 0.52), (2, 0.6), (3, 0.78)):
        joints[:, :, joint] = joints[:, :, 0]
        joints[:, :, joint, 1] += share * trunk
        joints[:, :, joint, 2] += 0.25 * share * trunk * (bent * 2).sin()  # one leans forward on the way
    for side, own, leg in ((1.0, _LEFT, _LEFT_LEG), (-1.0, _RIGHT, _RIGHT_LEG)):
        acts = (arm == (side > 0))[:, None]
        up = torch.where(acts, raised, torch.full_like(raised, -1.4))
        front = torch.where(acts, forward, torch.zeros_like(forward))
        flat = up.cos()
        way = torch.stack([side * flat * front.cos(), up.sin(), flat * front.sin()], -1)
        place = joints[:, :, 20].clone()
        place[..., 0] += side * 0.19 * shoulders
        joints[:, :, own[0]] = place
        for joint, along in zip(own[1:], (0.28, 0.53, 0.6, 0.68, 0.62), strict=True):
            joints[:, :, joint] = place + way * (along * arms)[..., None]
        joints[:, :, own[5], 1] += 0.04
        hip = joints[:, :, 0].clone()
        hip[..., 0] += side * 0.1
        knee, foot = hip.clone(), hip.clone()
        knee[..., 1] -= thigh * bent.cos()
        knee[..., 2] += thigh * bent.sin()
        foot[..., 1] = 0.08
        foot[..., 2] = knee[..., 2]
        toe = foot.clone()
        toe[..., 1], toe[..., 2] = 0.03, foot[..., 2] + 0.14
        for joint, value in zip(leg, (hip, knee, foot, toe), strict=True):
            joints[:, :, joint] = value
    return joints


def _gestures(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Clean clips (N, 2, MOMENTS, 25, 3) in the camera's coordinates: x to its left, y up, z away from it."""
    count = len(labels)
    time = torch.linspace(0, 1, MOMENTS)[None]
    begin, length = _uniform(rng, 0.0, 0.3, count, 1), _uniform(rng, 0.55, 0.7, count, 1)
    going = ((time - begin) / length).clamp(0, 1)
    going = torch.where(
        labels[:, None] % 2 == 1, going.flip(1), going
    )  # the second of a pair is the first one backwards
    smooth = going * going * (3 - 2 * going)
    kind = labels // 2
    low, high = _uniform(rng, -1.4, -0.9, count, 1), _uniform(rng, 0.7, 1.4, count, 1)
    turns, start = _uniform(rng, 1.0, 1.6, count, 1), _uniform(rng, 0, 2 * math.pi, count, 1)
    angle = start + 2 * math.pi * turns * going
    raised = torch.full((count, MOMENTS), -1.4)
    raised = torch.where(kind[:, None] == 0, low + (high - low) * smooth, raised)
    raised = torch.where(kind[:, None] == 1, 0.9 * angle.sin(), raised)
    forward = torch.where(
        kind[:, None] == 1, math.pi / 2 + 0.7 * angle.cos(), _uniform(rng, 0, 1.4, count, 1).expand(-1, MOMENTS)
    )
    seated = torch.where(kind[:, None] == 2, _uniform(rng, 0.75, 1.0, count, 1) * smooth, torch.zeros(()))
    size = _uniform(rng, 0.88, 1.12, count, 4)
    first = figure(raised, forward, seated, size, torch.rand(count, generator=rng) < 0.5)
    still = torch.full_like(raised, -1.3)
    second = figure(
        still,
        torch.zeros_like(still),
        torch.zeros_like(still),
        _uniform(rng, 0.88, 1.12, count, 4),
        torch.ones(count, dtype=torch.bool),
    )
    apart = 2.4 - _uniform(rng, 1.3, 1.7, count, 1) * smooth
    walking = (going * 6 * math.pi).sin() * ((going > 0) & (going < 1))
    clips = torch.stack([first, second], 1)
    there = (kind == 3)[:, None]
    for person, sign in ((0, 1.0), (1, -1.0)):
        body = clips[:, person]
        steps = torch.where(there, 0.18 * walking * sign, torch.zeros(()))
        for leg, side in ((_LEFT_LEG, 1.0), (_RIGHT_LEG, -1.0)):
            body[:, :, leg[1], 2] += side * 0.5 * steps
            body[:, :, leg[2], 2] += side * steps
            body[:, :, leg[3], 2] += side * steps
        turned = torch.where(there, torch.full((count, 1), -sign * math.pi / 2), torch.zeros(count, 1))
        body = _turned(body, turned + _uniform(rng, -0.3, 0.3, count, 1))
        body[..., 0] += torch.where(there, sign * apart / 2, torch.zeros(()))[..., None]
        clips[:, person] = body
    clips = _turned(clips.flatten(1, 2), math.pi + _uniform(rng, -0.6, 0.6, count, 1)).unflatten(1, (2, -1))
    offset = torch.stack(
        [_uniform(rng, -0.6, 0.6, count), _uniform(rng, -1.3, -0.7, count), _uniform(rng, 2.5, 4.0, count)], 1
    )
    clips = clips + offset[:, None, None, None]
    clips[:, 1] *= there[..., None, None]
    return clips


def _turned(joints: Tensor, angle: Tensor) -> Tensor:
    """(N, T, V, 3) about the vertical by (N, 1) radians."""
    cos, sin = angle[..., None].cos(), angle[..., None].sin()
    x, y, z = joints.unbind(-1)
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], -1)


@functools.lru_cache(maxsize=4)
def gestures(split: str = "train", count: int | None = None, seed: int = 0) -> SkeletonClips:
    """The clips of a split, every class as often. Treat them as read-only.

    Args:
        split: "train" or "test".
        count: how many; None for 400 and 160.
    """
    count = COUNT[split] if count is None else count
    rng = torch.Generator().manual_seed(2 * seed + (split == "test"))
    labels = torch.arange(count) % len(LABELS)
    clean = _gestures(labels, rng)
    noisy = clean + NOISE * torch.randn(clean.shape, generator=rng)
    seen = (torch.rand(clean.shape[:-1], generator=rng) >= UNSEEN) & (clean != 0).any(-1)
    noisy = noisy * seen[..., None]
    lengths = torch.randint(SHORTEST, MOMENTS + 1, (count,), generator=rng).tolist()
    clips = []
    for i, length in enumerate(lengths):
        frames = torch.linspace(0, MOMENTS - 1, length).round().long()
        clips.append(SkeletonClip(noisy[i][:, frames].clone(), int(labels[i]), f"gestures {split} {i}"))
    return SkeletonClips(clips, LABELS, "ntu", False)
