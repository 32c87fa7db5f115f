"""The boundary benchmark of BSDS500: edges thinned, matched one to one with what people drew, at many thresholds.

A found pixel is right if it can be paired with a drawn one at most `tolerance` times the picture's diagonal away, each used once (Martin, Fowlkes
and Malik, PAMI 2004; Arbelaez et al., PAMI 2011). Precision counts found pixels that any annotator's map explains, recall counts the
drawn pixels of every annotator that are found. ODS is the best F over thresholds for the whole set, OIS lets each picture choose its own, AP is the
area under the precision-recall curve. The released code solves a minimum-cost assignment in which leaving a pixel alone costs
a hundred times the largest distance, so the number of pairs is the largest possible; that is what is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching


def triangle(image: np.ndarray, radius: int) -> np.ndarray:
    """A picture (H, W) smoothed by a triangle of this radius along both axes, mirrored at its borders."""
    ramp = np.arange(1, radius + 2)
    kernel = np.concatenate([ramp, ramp[-2::-1]]) / (radius + 1) ** 2
    return ndimage.correlate1d(ndimage.correlate1d(image, kernel, 0, mode="reflect"), kernel, 1, mode="reflect")


def suppress(edges: np.ndarray, border: int = 5, margin: float = 1.01) -> np.ndarray:
    """Non-maximum suppression: edge strengths (H, W) that are not the largest across the edge become 0.

    As in Dollár and Zitnick's structured edges, which the field uses: the direction across follows from the second derivatives of
    the smoothed map, and both neighbours at distance 1 in it are interpolated. Near the picture's border strengths fade to 0.

    Args:
        border: pixels over which they fade; 0 for none.
        margin: a pixel stays whose strength times this is at least that of both neighbours.
    """
    strength = triangle(np.asarray(edges, dtype=np.float64), 1)
    gy, gx = np.gradient(triangle(strength, 4))
    gxx = np.gradient(gx, axis=1)
    gyy, gxy = np.gradient(gy)
    sign = np.where(gxy > 0, -1.0, 1.0)  # the field's code has 0 for 0, and leaves level lines as they are
    across = np.mod(np.arctan(gyy * sign / (gxx + 1e-5)), np.pi)
    rows, columns = np.indices(strength.shape, dtype=np.float64)
    kept = np.ones(strength.shape, dtype=bool)
    for side in (-1, 1):
        at = [rows + side * np.sin(across), columns + side * np.cos(across)]
        kept &= strength * margin >= ndimage.map_coordinates(strength, at, order=1, mode="nearest")
    thin = np.where(kept, strength, 0.0)
    border = min(border, *(n // 2 for n in thin.shape))
    for axis in range(2 if border else 0):
        fade = np.minimum(1.0, np.minimum(np.arange(thin.shape[axis]), np.arange(thin.shape[axis])[::-1]) / border)
        thin = thin * (fade[:, None] if axis == 0 else fade[None])
    return thin


def match(found: np.ndarray, drawn: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest one-to-one pairing of the true pixels of two bool maps (H, W), none further apart than `reach` pixels.

    Returns:
        Two bool maps: which found and which drawn pixels have a partner.
    """
    pairs = np.zeros_like(found, dtype=bool), np.zeros_like(drawn, dtype=bool)
    here, there = np.nonzero(found), np.nonzero(drawn)
    if not len(here[0]) or not len(there[0]):
        return pairs
    r = int(reach)
    numbers = np.full((found.shape[0] + 2 * r, found.shape[1] + 2 * r), -1)
    numbers[there[0] + r, there[1] + r] = np.arange(len(there[0]))
    dy, dx = (d.ravel() for d in np.mgrid[-r : r + 1, -r : r + 1])
    near = dy**2 + dx**2 <= reach**2
    neighbours = numbers[here[0][:, None] + r + dy[near], here[1][:, None] + r + dx[near]]  # (found pixels, places)
    real = neighbours >= 0
    starts = np.concatenate([[0], real.sum(1).cumsum()])
    graph = csr_array((np.ones(starts[-1], dtype=np.int8), neighbours[real], starts), (len(here[0]), len(there[0])))
    partner = maximum_bipartite_matching(graph, perm_type="column")
    taken = partner >= 0
    pairs[0][here[0][taken], here[1][taken]] = True
    pairs[1][there[0][partner[taken]], there[1][partner[taken]]] = True
    return pairs


@dataclass(frozen=True)
class Counts:
    """Of one picture at each threshold, (T,) each: drawn pixels that were found, of how many; found pixels that are right, of how many."""

    recalled: np.ndarray
    drawn: np.ndarray
    right: np.ndarray
    found: np.ndarray


def thresholds(count: int) -> np.ndarray:
    """So many in (0, 1), evenly spaced; 99 are 0.01, 0.02, …, 0.99."""
    return np.linspace(1 / (count + 1), 1 - 1 / (count + 1), count)


def count_matches(edges: np.ndarray, maps: np.ndarray, levels: np.ndarray, tolerance: float = 0.0075) -> Counts:
    """A picture's thinned edge strengths (H, W) against its annotators' maps (A, H, W), at every threshold."""
    from skimage.morphology import thin

    reach = tolerance * float(np.hypot(*edges.shape))
    maps = np.asarray(maps) > 0
    result = np.zeros((4, len(levels)), dtype=np.int64)
    kept: dict[int, np.ndarray] = {}  # thresholds between which nothing lies give the same map
    for t, level in enumerate(levels):
        binary = edges >= level
        size = int(binary.sum())
        if size not in kept:
            found = thin(binary)
            right = np.zeros_like(found)
            recalled = 0
            for drawn in maps:
                of_found, of_drawn = match(found, drawn, reach)
                right |= of_found
                recalled += int(of_drawn.sum())
            kept[size] = np.array([recalled, int(maps.sum()), int(right.sum()), int(found.sum())])
        result[:, t] = kept[size]
    return Counts(*result)


def f_measure(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """2 P R / (P + R), 0 where both are."""
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)


def rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall (…) from counts (4, …); 0 where nothing was found or drawn, as in the released code."""
    recalled, drawn, right, found = counts.astype(np.float64)
    return right / np.maximum(found, 1), recalled / np.maximum(drawn, 1)


def summary(every: list[Counts]) -> dict[str, float]:
    """ODS, OIS and AP over a set of pictures, by the released rules: F is interpolated between thresholds for ODS, precision for AP."""
    table = np.array([[c.recalled, c.drawn, c.right, c.found] for c in every])  # (N, 4, T)
    precision, recall = rates(table.sum(0))
    share = np.linspace(0, 1, 100)[:, None]
    between = (
        [share * v[1:] + (1 - share) * v[:-1] for v in (precision, recall)]
        if len(precision) > 1
        else [precision, recall]
    )
    best = f_measure(*rates(table.transpose(1, 0, 2))).argmax(1)
    chosen = table[np.arange(len(table)), :, best].sum(0)
    order = np.unique(recall, return_index=True)
    at = np.arange(101) / 100
    inside = (at >= order[0][0]) & (at <= order[0][-1])
    area = np.where(inside, np.interp(at, order[0], precision[order[1]]), 0.0).sum() / 100
    return {
        "ods_f": float(f_measure(*between).max()),
        "ois_f": float(f_measure(*rates(chosen))),
        "edge_ap": float(min(1.0, area)),
    }
