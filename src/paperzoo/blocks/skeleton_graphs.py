"""Bodies as graphs: the joints of the usual skeletons, and their neighbourhoods as matrices.

A layout is a tree with its root in the body's middle: `parents[v]` is the neighbour of joint v on the way there, the root's is itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Joints of a skeleton.

    inward: (joint, neighbour nearer to the middle) pairs, in graphs. COCO's shoulders hang on the nose.
    bones: a bone of joint v is v - bones[v]; where that is v itself it has none.
    middle, spine, shoulders: joints that `normalised` in `paperzoo.tasks.skeleton_samples` puts upright: the origin; bottom and top; right and left.
    """

    name: str
    joints: int
    inward: tuple[tuple[int, int], ...]
    bones: tuple[int, ...]
    middle: int
    spine: tuple[int, int] = (0, 0)
    shoulders: tuple[int, int] = (0, 0)


_NTU = (  # counted from 1, as the data set's documents
    "1-2 2-21 3-21 4-3 5-21 6-5 7-6 8-7 9-21 10-9 11-10 12-11 13-1 14-13 15-14 16-15 17-1 18-17 19-18 20-19 22-8 23-8 24-12 25-12"
)
_NTU_INWARD = tuple((int(a) - 1, int(b) - 1) for a, b in (pair.split("-") for pair in _NTU.split()))
# of the released code: joints 22 and 24 (hand tips, counted from 1) are measured from the thumbs
_NTU_BONES = {**dict(_NTU_INWARD), 20: 20, 21: 22, 22: 7, 23: 24, 24: 11}

NTU = Layout("ntu", 25, _NTU_INWARD, tuple(_NTU_BONES[v] for v in range(25)), 1, (0, 1), (8, 4))
"""The 25 joints of the second Kinect, as NTU RGB+D has them."""

COCO = Layout(
    "coco",
    17,
    (
        (15, 13),
        (13, 11),
        (16, 14),
        (14, 12),
        (11, 5),
        (12, 6),
        (9, 7),
        (7, 5),
        (10, 8),
        (8, 6),
        (5, 0),
        (6, 0),
        (1, 0),
        (3, 1),
        (2, 0),
        (4, 2),
    ),
    (0, 0, 0, 1, 2, 0, 0, 5, 6, 7, 8, 0, 0, 11, 12, 13, 14),
    0,
)

OPENPOSE = Layout(
    "openpose",
    18,
    (
        (4, 3),
        (3, 2),
        (7, 6),
        (6, 5),
        (13, 12),
        (12, 11),
        (10, 9),
        (9, 8),
        (11, 5),
        (8, 2),
        (5, 1),
        (2, 1),
        (0, 1),
        (15, 0),
        (14, 0),
        (17, 15),
        (16, 14),
    ),
    (0, 0, 1, 2, 3, 1, 5, 6, 2, 8, 9, 5, 11, 12, 0, 0, 14, 15),
    1,
)

LAYOUTS = {layout.name: layout for layout in (NTU, COCO, OPENPOSE)}


def layout_of(joints: int) -> Layout | None:
    """The layout with so many joints, if there is one."""
    return next((layout for layout in LAYOUTS.values() if layout.joints == joints), None)


def spatial_graph(layout: Layout) -> Tensor:
    """float32 (3, V, V): each joint itself; from a joint to its inward neighbour; from a joint to its outward ones. Columns are averages: they sum up to 1,
    or to 0 where there is no such neighbour. Entry (v, w) is what joint w takes from joint v."""
    itself, inward, outward = torch.eye(layout.joints), *torch.zeros(2, layout.joints, layout.joints)
    for joint, nearer in layout.inward:
        inward[nearer, joint] = 1
        outward[joint, nearer] = 1
    graphs = torch.stack([itself, inward, outward])
    return graphs / graphs.sum(1, keepdim=True).clamp(min=1)
