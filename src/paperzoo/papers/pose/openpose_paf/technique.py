"""Part affinity fields (sec. 2.2 to 2.4): what is learned, and how people are put together from it.

Keypoints are x and y in pixels, the middle of the first pixel is (0, 0); cell u of a map of stride s lies at s * u + (s - 1) / 2.
Limbs are pairs of keypoints (j1, j2); the field of limb c has the channels 2c (x) and 2c + 1 (y).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from paperzoo.blocks.heatmaps import peaks, smoothed
from paperzoo.blocks.matching import greedy_pairs

COCO_ORDER = (6, 10, 7, 8, 11, 12, 0, 1, 2, 3, 4, 5, 14, 15, 17, 16, 18, 9, 13)
"""In which order the released code puts people together from the limbs of `paperzoo.data.skeletons.OPENPOSE`."""

Limbs = Sequence[tuple[int, int]]


# -- what is learned ---------------------------------------------------------------------------------------------------------


def cells(count: int, stride: int, like: Tensor) -> Tensor:
    """The pixels that a row of cells lies at."""
    return torch.arange(count, device=like.device, dtype=like.dtype) * stride + (stride - 1) / 2


def confidence_maps(keypoints: Tensor, weight: Tensor, size: tuple[int, int], stride: int, sigma: float) -> Tensor:
    """S* (eq. 6 and 7): the largest over people of a Gaussian around each keypoint, and the background.

    Args:
        keypoints: (B, P, K, 2).
        weight: (B, P, K), 0 where a keypoint is not annotated.
        size: rows and columns of the maps.
        sigma: in pixels; exp(-d^2 / (2 sigma^2)), as the released code. (Eq. 6 has no factor 2.)

    Returns:
        (B, K + 1, rows, columns); the last one is 1 less the largest of the others.
    """
    dy = cells(size[0], stride, keypoints) - keypoints[..., 1, None]
    dx = cells(size[1], stride, keypoints) - keypoints[..., 0, None]
    gy, gx = (torch.exp(-d.square() / (2 * sigma**2)) for d in (dy, dx))
    maps = (gy * (weight > 0)[..., None])[..., :, None] * gx[..., None, :]  # (B, P, K, h, w)
    maps = maps.amax(1)
    return torch.cat([maps, 1 - maps.amax(1, keepdim=True)], 1)


def affinity_fields(
    keypoints: Tensor, weight: Tensor, limbs: Limbs, size: tuple[int, int], stride: int, width: float = 1.0
) -> Tensor:
    """L* (eq. 8 to 10): on a limb the unit vector along it, averaged over the people whose limb is there; elsewhere 0.

    A limb goes on beyond its ends for its width, about as in the released code. The paper stops at the ends; but of ten
    samples on a line between two peaks, ends included, nine must lie on the limb, and a peak is a whole pixel.

    Args:
        width: the distance from a limb's line up to which a cell lies on it, in cells.

    Returns:
        (B, 2 C, rows, columns).
    """
    first, second = (keypoints[:, :, [limb[end] for limb in limbs]] for end in (0, 1))  # (B, P, C, 2)
    both = (weight[:, :, [a for a, _ in limbs]] > 0) & (weight[:, :, [b for _, b in limbs]] > 0)
    along = second - first
    length = along.norm(dim=-1)
    both &= length > 1e-6
    unit = along / length.clamp(min=1e-6)[..., None]
    dy = (cells(size[0], stride, keypoints) - first[..., 1, None])[..., :, None]  # (B, P, C, h, 1)
    dx = (cells(size[1], stride, keypoints) - first[..., 0, None])[..., None, :]
    ux, uy = (unit[..., k, None, None] for k in (0, 1))
    forward, across = ux * dx + uy * dy, uy * dx - ux * dy
    reach = width * stride
    inside = (forward >= -reach) & (forward <= length[..., None, None] + reach)
    on = inside & (across.abs() <= reach) & both[..., None, None]
    count = on.sum(1).clamp(min=1)  # (B, C, h, w)
    field = torch.stack([(on * u).sum(1) / count for u in (ux, uy)], 2)  # (B, C, 2, h, w)
    return field.flatten(1, 2)


def masked_loss(found: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """f of eq. 5 for all stages: squared differences where W is 1, summed over maps and stages and half their mean over images.

    Args:
        found: (B, T, C, h, w).
        true: (B, C, h, w).
        mask: W, (B, h, w), 0 where people are not annotated.
    """
    square = (found - true[:, None]).square() * mask[:, None, None]
    return 0.5 * square.sum() / len(found)


# -- how people are found ------------------------------------------------------------------------------------------------------


def candidates(maps: Tensor, threshold: float, sigma: float) -> list[list[Tensor]]:
    """The peaks of each keypoint's map: for each image and keypoint (n, 3) x, y and the map's value, row by row.

    Args:
        maps: (B, K, H, W), without the background.
        sigma: maps are blurred with it before peaks are looked for; 0 leaves them.
    """
    soft = smoothed(maps, sigma, 2 * int(4 * sigma + 0.5) + 1) if sigma > 0 else maps
    image, joint, y, x = peaks(soft, threshold).nonzero(as_tuple=True)
    table = torch.stack([x.to(maps.dtype), y.to(maps.dtype), maps[image, joint, y, x]], 1).cpu()
    count = torch.bincount(image * maps.shape[1] + joint, minlength=maps.shape[0] * maps.shape[1]).tolist()
    parts = table.split(count)
    return [list(parts[b * maps.shape[1] : (b + 1) * maps.shape[1]]) for b in range(maps.shape[0])]


def line_integrals(field: Tensor, first: Tensor, second: Tensor, samples: int = 10) -> tuple[Tensor, Tensor]:
    """E of eq. 11 for all pairs of candidates, by sampling the field at points evenly spaced between them.

    Args:
        field: (2, H, W).
        first, second: (M, 2) and (N, 2), x and y.

    Returns:
        the samples' products with the direction, (M, N, samples), and the distances (M, N).
    """
    along = second[None] - first[:, None]
    length = along.norm(dim=-1).clamp(min=1e-3)
    unit = along / length[..., None]
    steps = torch.linspace(0, 1, samples, dtype=first.dtype)
    points = (first[:, None, None] + steps[:, None] * along[:, :, None]).round().long()  # (M, N, samples, 2)
    height, width = field.shape[1:]
    values = field[:, points[..., 1].clamp(0, height - 1), points[..., 0].clamp(0, width - 1)]  # (2, M, N, samples)
    return values[0] * unit[..., 0, None] + values[1] * unit[..., 1, None], length


def connect(
    field: Tensor, first: Tensor, second: Tensor, above: float = 0.05, share: float = 0.8, samples: int = 10
) -> list[tuple[int, int, float]]:
    """The limbs of one kind (eq. 12 to 15, relaxed to one limb at a time and solved greedily): rows of `first` and `second`, score.

    Args:
        field: (2, H, W).
        first, second: candidates (M, 3) and (N, 3).
        above, share: more than this share of the samples must be above the threshold.
    """
    if not len(first) or not len(second):
        return []
    values, length = line_integrals(field, first[:, :2], second[:, :2], samples)
    # the released code's prior: limbs longer than half the image's height lose
    score = values.mean(-1) + (0.5 * field.shape[1] / length - 1).clamp(max=0)
    good = (values > above).sum(-1) > share * samples
    score = score.masked_fill(~good, -torch.inf)
    return [(m, n, float(score[m, n])) for m, n in greedy_pairs(score, 0.0)]


def tree_first(limbs: Limbs, order: Sequence[int] | None = None) -> tuple[list[int], set[int]]:
    """In which order limbs are used, and those that close a circle: they join people, but do not make new ones."""
    order = list(range(len(limbs)) if order is None else order)
    group = {joint: joint for limb in limbs for joint in limb}
    closing = set()
    for c in order:
        a, b = (group[j] for j in limbs[c])
        if a == b:
            closing.add(c)
        group = {joint: a if g == b else g for joint, g in group.items()}
    return [c for c in order if c not in closing] + [c for c in order if c in closing], closing


def assemble(
    parts: Sequence[Tensor],
    fields: Tensor,
    limbs: Limbs,
    order: Sequence[int] | None = None,
    least_parts: int = 4,
    least_score: float = 0.4,
    above: float = 0.05,
) -> tuple[Tensor, Tensor, Tensor]:
    """People from candidates: limbs that share a keypoint are one person's (sec. 2.4), by the released code's rules.

    Args:
        parts: for each of K keypoints the candidates (n, 3), x, y, score.
        fields: (2 C, H, W), on the CPU.
        order: of the limbs; see `tree_first`.
        least_parts, least_score: people with fewer keypoints, or a lower score for each of them, are dropped.
        above: of the line integrals.

    Returns:
        keypoints (N, K, 3), x, y, score, 0 where not found; the score of each person (N,), the sum of those of its keypoints
        and limbs; and how many keypoints it has, as the released code counts them (N,).
    """
    joints = len(parts)
    table = torch.cat(list(parts)).double().numpy()
    start = np.cumsum([0, *(len(p) for p in parts)])
    order, closing = tree_first(limbs, order)
    people: list[np.ndarray] = []  # K rows of `table` (-1: none), then score and count
    for c in order:
        a, b = limbs[c]
        for m, n, score in connect(fields[2 * c : 2 * c + 2], parts[a], parts[b], above):
            one, two = start[a] + m, start[b] + n
            holders = [p for p in people if p[a] == one or p[b] == two]
            if len(holders) == 1:
                extend(holders[0], b, two, table[two, 2] + score)
            elif len(holders) >= 2:
                merge(people, holders, b, two, table[two, 2], score)
            elif c not in closing:
                person = np.full(joints + 2, -1.0)
                person[a], person[b] = one, two
                person[-2:] = table[one, 2] + table[two, 2] + score, 2
                people.append(person)
    people = [p for p in people if p[-1] >= least_parts and p[-2] / p[-1] >= least_score]
    found = np.zeros((len(people), joints, 3))
    for i, person in enumerate(people):
        has = person[:-2] >= 0
        found[i, has] = table[person[:-2][has].astype(int)]
    totals = np.array([p[-2:] for p in people]).reshape(-1, 2)
    return torch.from_numpy(found).float(), torch.from_numpy(totals[:, 0]).float(), torch.from_numpy(totals[:, 1])


def extend(person: np.ndarray, joint: int, part: int, score: float) -> None:
    """A limb's second keypoint joins the person who has its first one; the first does not join who has the second."""
    if person[joint] != part:
        person[joint] = part
        person[-2:] += score, 1


def merge(
    people: list[np.ndarray], holders: list[np.ndarray], joint: int, part: int, value: float, score: float
) -> None:
    """A limb between two people: one person, if they have no keypoint in common; else it goes to the first one."""
    one, two = holders[:2]
    if not ((one[:-2] >= 0) & (two[:-2] >= 0)).any():
        one[:-2] += two[:-2] + 1  # -1 and a row make the row
        one[-2:] += two[-2:]
        one[-2] += score
        people[:] = [p for p in people if p is not two]
    else:
        one[joint] = part
        one[-2:] += value + score, 1
