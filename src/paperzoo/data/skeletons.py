"""Which points of a body a data set knows: their names, limbs, mirror images, and how exactly people place them.

The order of the points is the data set's own, so that published weights and result files fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Skeleton:
    """Keypoints of a body.

    Attributes:
        names: of the K keypoints; "left_…" and "right_…" are the person's own sides.
        limbs: pairs of keypoints that are drawn, and that part affinity fields connect.
        sigmas: K: how far annotators differ, as a part of the body's size (the square root of its area); OKS uses it.
        upper: the keypoints above the hips, for half-body crops.
        head: the ends of the head, for a head size where no head box is annotated; () where they are not annotated.
        not_scored: keypoints that MPII's table leaves out of the mean.
    """

    names: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]
    upper: tuple[int, ...] = ()
    head: tuple[int, ...] = ()
    not_scored: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def flip(self) -> list[int]:
        """K: the keypoint whose place each one takes in a mirrored picture."""
        return [
            self.names.index(mirrored(name)) if mirrored(name) in self.names else k for k, name in enumerate(self.names)
        ]

    def facts(self) -> dict:
        """Plain JSON values; `Skeleton.read` makes a skeleton of them."""
        return asdict(self)

    @classmethod
    def read(cls, facts: dict) -> Skeleton:
        lists = {
            key: tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value) for key, value in facts.items()
        }
        return cls(**lists)


def mirrored(name: str) -> str:
    """ "left_knee" and "right_knee" are each other's; other names their own."""
    for one, other in (("left", "right"), ("right", "left")):
        if name.startswith(one):
            return other + name.removeprefix(one)
    return name


def limbs(names: Sequence[str], text: str) -> tuple[tuple[int, int], ...]:
    """Pairs of keypoints from "neck-nose nose-left_eye …"."""
    pairs = (pair.split("-") for pair in text.split())
    return tuple((names.index(a), names.index(b)) for a, b in pairs)


_COCO = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist "
    "left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
_COCO_SIGMAS = (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)  # thousandths

COCO = Skeleton(
    names=tuple(_COCO),
    limbs=limbs(
        _COCO,
        "left_ankle-left_knee left_knee-left_hip right_ankle-right_knee right_knee-right_hip left_hip-right_hip "
        "left_shoulder-left_hip right_shoulder-right_hip left_shoulder-right_shoulder left_shoulder-left_elbow "
        "right_shoulder-right_elbow left_elbow-left_wrist right_elbow-right_wrist left_eye-right_eye nose-left_eye "
        "nose-right_eye left_eye-left_ear right_eye-right_ear left_ear-left_shoulder right_ear-right_shoulder",
    ),
    sigmas=tuple(s / 1000 for s in _COCO_SIGMAS),
    upper=tuple(range(11)),
)
"""COCO's 17 points; pycocotools has the same sigmas."""

_MPII = (
    "right_ankle right_knee right_hip left_hip left_knee left_ankle pelvis thorax upper_neck head_top right_wrist right_elbow "
    "right_shoulder left_shoulder left_elbow left_wrist"
).split()

MPII = Skeleton(
    names=tuple(_MPII),
    limbs=limbs(
        _MPII,
        "right_ankle-right_knee right_knee-right_hip right_hip-pelvis pelvis-left_hip left_hip-left_knee left_knee-left_ankle "
        "pelvis-thorax thorax-upper_neck upper_neck-head_top right_wrist-right_elbow right_elbow-right_shoulder "
        "right_shoulder-thorax thorax-left_shoulder left_shoulder-left_elbow left_elbow-left_wrist",
    ),
    # MPII states none: COCO's for the joints both have, the face's for the points on the spine, as in mmpose
    sigmas=(0.089, 0.083, 0.107, 0.107, 0.083, 0.089, *(0.026,) * 4, 0.062, 0.072, 0.179, 0.179, 0.072, 0.062),
    upper=tuple(range(7, 16)),
    head=(8, 9),
    not_scored=(6, 7),
)
"""MPII's 16 points. Its table's mean leaves pelvis and thorax out."""

_CROWDPOSE = (
    "left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee "
    "left_ankle right_ankle top_head neck"
).split()

CROWDPOSE = Skeleton(
    names=tuple(_CROWDPOSE),
    limbs=limbs(
        _CROWDPOSE,
        "neck-top_head neck-left_shoulder left_shoulder-left_elbow left_elbow-left_wrist neck-right_shoulder "
        "right_shoulder-right_elbow right_elbow-right_wrist neck-left_hip left_hip-left_knee left_knee-left_ankle "
        "neck-right_hip right_hip-right_knee right_knee-right_ankle",
    ),
    sigmas=(0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089, 0.079, 0.079),
    upper=(0, 1, 2, 3, 4, 5, 12, 13),
    head=(13, 12),
)
"""CrowdPose's 14 points and sigmas; the limbs are a tree with its root in the neck."""

_OPENPOSE = (
    "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist right_hip right_knee right_ankle "
    "left_hip left_knee left_ankle right_eye left_eye right_ear left_ear"
).split()

OPENPOSE = Skeleton(
    names=tuple(_OPENPOSE),
    limbs=limbs(
        _OPENPOSE,
        "neck-right_hip right_hip-right_knee right_knee-right_ankle neck-left_hip left_hip-left_knee left_knee-left_ankle "
        "neck-right_shoulder right_shoulder-right_elbow right_elbow-right_wrist right_shoulder-right_ear neck-left_shoulder "
        "left_shoulder-left_elbow left_elbow-left_wrist left_shoulder-left_ear neck-nose nose-right_eye nose-left_eye "
        "right_eye-right_ear left_eye-left_ear",
    ),
    sigmas=tuple(COCO.sigmas[_COCO.index(name)] if name in _COCO else 0.079 for name in _OPENPOSE),
    upper=(0, 1, 2, 3, 4, 5, 6, 7, 14, 15, 16, 17),
)
"""OpenPose's 18 points: COCO's and the neck, half-way between the shoulders. Limbs in the order of its fields' channels."""

KNOWN = {name: sigma for s in (CROWDPOSE, MPII, COCO) for name, sigma in zip(s.names, s.sigmas, strict=True)}
"""Sigmas by name, for data sets with points of their own."""


def skeleton_of(names: Sequence[str], pairs: Sequence[Sequence[int]] = ()) -> Skeleton:
    """The skeleton with these keypoints: a known one, or a new one with known sigmas by name and 0.05 for other points.

    Args:
        pairs: limbs of a new one, as pairs of keypoints counted from 0.
    """
    for known in (COCO, MPII, CROWDPOSE, OPENPOSE):
        if known.names == tuple(names):
            return known
    upper = tuple(
        k for k, n in enumerate(names) if not any(part in n for part in ("hip", "knee", "ankle", "toe", "heel"))
    )
    return Skeleton(tuple(names), tuple((a, b) for a, b in pairs), tuple(KNOWN.get(n, 0.05) for n in names), upper)


def translate(
    keypoints: Tensor, visible: Tensor, have: Skeleton, want: Skeleton, neck: bool = True
) -> tuple[Tensor, Tensor]:
    """Keypoints of one skeleton in the order of another, by name; what the first one lacks is not visible.

    Args:
        keypoints: (…, K, 2).
        visible: (…, K).
        neck: a missing neck is put half-way between the shoulders, and as visible as the less visible of them.

    Returns:
        (…, K', 2) and (…, K').
    """
    index = [have.names.index(name) if name in have.names else 0 for name in want.names]
    known = torch.tensor([name in have.names for name in want.names])
    points, seen = keypoints[..., index, :], visible[..., index] * known.to(visible.dtype)
    if neck and "neck" in want.names and "neck" not in have.names and "left_shoulder" in have.names:
        k = want.names.index("neck")
        left, right = (have.names.index(f"{side}_shoulder") for side in ("left", "right"))
        points, seen = points.clone(), seen.clone()
        points[..., k, :] = (keypoints[..., left, :] + keypoints[..., right, :]) / 2
        seen[..., k] = torch.minimum(visible[..., left], visible[..., right])
    return points * (seen > 0)[..., None], seen
