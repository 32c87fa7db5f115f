"""How good interest points and their descriptors are, given the homography between two pictures: the measures of SuperPoint's sec. 7 and appendix.

    repeatability            share of points, among those that both pictures show, with a point of the other picture within 3 pixels
    localisation_error       mean distance of those that have one, pixels
    homography_accuracy_1, _3, _5
                             share of pairs whose homography, estimated by RANSAC from mutual nearest neighbours, takes the corners to
                             within so many pixels of where they belong, on average
    nn_map                   area under precision over recall of nearest neighbours, the threshold of their distance running; both directions
    matching_score           mutual nearest neighbours that are right, as a share of the points that both pictures show; both directions

The first two also for scenes of changed light and of changed view apart (…_light, …_view), where the data says which is which.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from paperzoo.blocks.homography import corner_error, estimate, transform
from paperzoo.blocks.interest_points import mutual_nearest

NEAR = 3.0  # pixels
ERRORS = (1, 3, 5)
KINDS = {"i": "light", "v": "view"}

Size = tuple[int, int]


def visible(points: Tensor, homography: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Where points (N, 2) are in the other picture, of (height, width): (N, 2), and whether it shows them, bool (N,)."""
    moved = transform(homography.to(points), points)
    limit = moved.new_tensor([size[1] - 1.0, size[0] - 1.0])
    return moved, ((moved >= 0) & (moved <= limit)).all(1)


class DetectorMetrics:
    """Repeatability and localisation error, means over pairs."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = defaultdict(list)

    def update(
        self, first: Tensor, second: Tensor, homography: Tensor, sizes: tuple[Size, Size], kind: str = ""
    ) -> None:
        """Points (N, 2) and (M, 2) of two pictures of these (height, width); homography (3, 3) from the first to the second."""
        moved, seen = visible(first, homography, sizes[1])
        _, back = visible(second, torch.linalg.inv(homography.double()), sizes[0])
        a, b = moved[seen], second[back]
        if not len(a) + len(b):
            return
        near = torch.zeros(0)
        if len(a) and len(b):
            apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
            near = torch.cat([apart.amin(1), apart.amin(0)])
            near = near[near <= NEAR]
        repeatability = len(near) / (len(a) + len(b))
        for part in ("", *([f"_{KINDS[kind]}"] if kind in KINDS else [])):
            self.found[f"repeatability{part}"].append(repeatability)
            if len(near):
                self.found[f"localisation_error{part}"].append(float(near.mean()))

    def compute(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.found.items()}


def average_precision(distance: Tensor, right: Tensor, positives: int) -> float:
    """Area under precision over recall of answers that are taken in the order of their distances; `positives` could have been right."""
    if positives == 0:
        return 0.0
    hits = right[distance.argsort()].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)
    return float((precision * hits).sum() / positives)


class DescriptorMetrics:
    """Homography accuracy, NN mAP and matching score, means over pairs."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = defaultdict(list)

    def update(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], homography: Tensor, sizes: tuple[Size, Size]
    ) -> None:
        """Points (N, 2) and descriptors of unit length (N, D) of two pictures of these (height, width); homography as above."""
        (p, d), (q, e) = first, second
        inverse = torch.linalg.inv(homography.double())
        pairs, _ = mutual_nearest(d, e)
        found, _ = estimate(p[pairs[:, 0]], q[pairs[:, 1]])
        error = float("inf") if found is None else corner_error(found, homography.to(found.device), sizes[0])
        for limit in ERRORS:
            self.found[f"homography_accuracy_{limit}"].append(float(error <= limit))
        scores, maps = [], []
        for ours, theirs, matrix, size, swap in (
            ((p, d), (q, e), homography, sizes[1], 0),
            ((q, e), (p, d), inverse, sizes[0], 1),
        ):
            moved, seen = visible(ours[0], matrix, size)
            if not bool(seen.any()) or not len(theirs[0]):
                scores.append(0.0)
                maps.append(0.0)
                continue
            mine, others = pairs[:, swap], pairs[:, 1 - swap]
            right = ((moved[mine] - theirs[0][others]).norm(dim=1) <= NEAR) & seen[mine]
            scores.append(float(right.sum() / seen.sum()))
            cosine, nearest = (ours[1][seen] @ theirs[1].T).max(1)
            at = moved[seen]
            possible = torch.cdist(at, theirs[0], compute_mode="donot_use_mm_for_euclid_dist").amin(1) <= NEAR
            maps.append(average_precision(-cosine, (at - theirs[0][nearest]).norm(dim=1) <= NEAR, int(possible.sum())))
        self.found["nn_map"].append(sum(maps) / 2)
        self.found["matching_score"].append(sum(scores) / 2)

    def compute(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.found.items()}
