"""What PAN learns and how its maps become texts: kernels, losses (sec. 3.4, 3.5), pixel aggregation (sec. 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.polygons import outline_of, pixels_inside, rectangle_around, shrink_polygon

# -- what is to be learned ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelTargets:
    """One picture's polygons to the maps that PAN learns from (sec. 3.5).

    Args:
        ratio: r of the kernels, polygons moved inwards by d = A (1 - r^2) / L: 0.7, for ICDAR 2015 0.5.
        most: d is at most so many pixels, as in the released code.
    """

    ratio: float = 0.7
    most: float = 20.0

    def __call__(self, target: dict, canvas: tuple[int, int]) -> dict[str, Tensor]:
        """{"polygons": …, "ignore": …} -> maps of the canvas (H, W):

        instances int32: 0 is background, k the k-th text; where texts overlap the later one has the pixels; kernels bool: the
        kernels of all texts; counted bool: False inside ignored texts.
        """
        instances = np.zeros(canvas, dtype=np.int32)
        kernels, counted = np.zeros(canvas, dtype=bool), np.ones(canvas, dtype=bool)
        pairs = zip(target["polygons"], target["ignore"].tolist(), strict=True)
        for number, (polygon, ignored) in enumerate(pairs, 1):
            inside = pixels_inside(polygon, canvas)
            instances[inside] = number
            kernels[pixels_inside(shrink_polygon(polygon, self.ratio, self.most), canvas)] = True
            if ignored:
                counted[inside] = False
        return {
            "instances": torch.from_numpy(instances),
            "kernels": torch.from_numpy(kernels),
            "counted": torch.from_numpy(counted),
        }


# -- losses ------------------------------------------------------------------------------------------------------------


def hard_pixels(logits: Tensor, text: Tensor, counted: Tensor, ratio: int = 3) -> Tensor:
    """Online hard example mining (sec. 3.5): which pixels the text loss looks at, bool (B, H, W).

    All of text, and of background those with the largest logits, `ratio` for each pixel of counted text; equal ones all. Everything
    that is counted where a picture has no such text, or no background. Arguments (B, H, W): floats, bool, bool.
    """
    text_count = (text & counted).sum((1, 2))
    wanted = torch.minimum(text_count * ratio, (~text).sum((1, 2)))
    ranked = logits.detach().masked_fill(text, -torch.inf).flatten(1).sort(1, descending=True).values
    threshold = ranked.gather(1, (wanted - 1).clamp(min=0)[:, None])[..., None]
    chosen = (logits.detach() >= threshold) | text
    return torch.where((wanted > 0)[:, None, None], chosen, True) & counted


def dice_loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 - 2 sum(P G) / (sum(P^2) + sum(G^2)) over the masked pixels (eq. 6, 7): (B,). P is the sigmoid of the logits.

    A picture with nothing to find has the loss 1 and no gradient, as in the released code. Arguments (B, H, W).
    """
    probability, target = (torch.sigmoid(logits) * mask).flatten(1), (target & mask).flatten(1).to(logits.dtype)
    shared = (probability * target).sum(1)
    return 1 - 2 * shared / (probability.square().sum(1) + target.sum(1) + 0.002)


def similarity_losses(
    similarity: Tensor, instances: Tensor, kernels: Tensor, counted: Tensor, pull: float = 0.5, push: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Aggregation, discrimination and size of the similarity vectors, (B,) each.

        L_agg = mean over texts of the mean over pixels p of ln(D(p, K_i) + 1), D = max(||F(p) - G(K_i)|| - pull, 0)^2   (eq. 1, 2)
        L_dis = mean over pairs of kernels of ln(D(K_i, K_j) + 1), D = max(push - ||G(K_i) - G(K_j)||, 0)^2            (eq. 3, 4)
        size  = mean of ln(||G(K_i)|| + 1) over the kernels and background's zero: only in the released code

    G(K_i) is the mean over the kernel's pixels. A text without a pixel of a kernel takes no part.

    Args:
        similarity: (B, D, H, W).
        instances, kernels, counted: as `KernelTargets` makes them, (B, H, W).
    """
    count = len(instances)
    instances = instances.long() * counted
    texts = int(instances.max()) + 1 if instances.numel() else 1
    picture, row, column = instances.nonzero(as_tuple=True)
    vectors = similarity[picture, :, row, column]  # (P, D): the pixels of all texts
    owner = picture * texts + instances[picture, row, column]
    inside = (kernels & (instances > 0))[picture, row, column]

    means, kernel_pixels = grouped_mean(vectors[inside], owner[inside], count * texts)
    exists = kernel_pixels > 0  # (B * texts,)
    distance = torch.linalg.vector_norm(vectors - means[owner], dim=1)
    pulled, _ = grouped_mean(torch.log1p(F.relu(distance - pull).square())[:, None], owner, count * texts)
    exists, pulled = exists.view(count, texts), pulled.view(count, texts)
    number = exists.sum(1)
    aggregation = (pulled * exists).sum(1) / number.clamp(min=1)

    means = means.view(count, texts, -1)
    apart = torch.linalg.vector_norm(means[:, :, None] - means[:, None], dim=3)
    pairs = exists[:, :, None] & exists[:, None] & ~torch.eye(texts, dtype=torch.bool, device=means.device)
    pushed = torch.log1p(F.relu(push - apart).square()) * pairs
    discrimination = pushed.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)

    size = (torch.log1p(torch.linalg.vector_norm(means, dim=2)) * exists).sum(1) / (number + 1)
    return aggregation, discrimination, size


def grouped_mean(rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The means of rows (P, D) by group, int64 (P,): (groups, D), 0 where a group is empty; and how many rows each has."""
    sums = rows.new_zeros(groups, rows.shape[1]).index_add(0, group, rows)
    number = torch.bincount(group, minlength=groups)
    return sums / number.clamp(min=1)[:, None], number


def stacked_targets(targets: Sequence[dict], make: KernelTargets, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """instances, kernels and counted of a batch (B, H, W); made here where nobody did it while loading."""
    canvas = tuple(images.shape[-2:])
    maps = [
        t if "instances" in t else make({**t, "polygons": [p.cpu() for p in t["polygons"]]}, canvas) for t in targets
    ]
    return tuple(torch.stack([m[key] for m in maps]).to(images.device) for key in ("instances", "kernels", "counted"))


# -- pixel aggregation -------------------------------------------------------------------------------------------------


def pixel_aggregation(
    text: np.ndarray, kernels: np.ndarray, similarity: np.ndarray, distance: float = 6.0
) -> np.ndarray:
    """Kernels grow over the pixels of text around them that are like them (sec. 3.4): int32 (H, W), 0 for none.

    Each connected part of the kernels is a text. Breadth first, a neighbour (one of four) of a text's pixel joins it if it is text,
    belongs to none yet, and its vector is less than `distance` from the kernel's mean. All pixels of a ring are taken at once: the
    result is that of a queue, in whose order two texts that reach a pixel in the same ring are told apart.

    Args:
        text, kernels: bool (H, W).
        similarity: float32 (D, H, W).
    """
    from scipy.ndimage import label

    height, width = text.shape
    labels, number = label(kernels & text)
    border = np.zeros((height + 2, width + 2), dtype=np.int32)  # one pixel around, which is no text: no edges to mind
    border[1:-1, 1:-1] = labels
    labels, free = border.ravel(), np.pad(text, 1).ravel()
    free = free & (labels == 0)
    vectors = np.pad(similarity.reshape(len(similarity), height, width), ((0, 0), (1, 1), (1, 1)))
    vectors = vectors.reshape(len(similarity), -1)

    front = np.flatnonzero(labels)
    pixels = np.bincount(labels[front], minlength=number + 1)
    sums = [np.bincount(labels[front], weights=v[front], minlength=number + 1) for v in vectors]
    means = np.stack(sums) / np.maximum(pixels, 1)
    steps = np.array([-(width + 2), width + 2, -1, 1])
    while len(front):
        reached, owner = (front[:, None] + steps).ravel(), np.repeat(labels[front], 4)
        open_ = free[reached]
        reached, owner = reached[open_], owner[open_]
        apart = np.sqrt(((vectors[:, reached] - means[:, owner]) ** 2).sum(0))
        reached, owner = reached[apart < distance], owner[apart < distance]
        _, first = np.unique(reached, return_index=True)
        first.sort()  # in the order in which a queue would have met them
        front = reached[first]
        labels[front], free[front] = owner[first], False
    return labels.reshape(height + 2, width + 2)[1:-1, 1:-1]


def texts_from_maps(
    maps: np.ndarray,
    stride: float,
    distance: float = 6.0,
    min_score: float = 0.88,
    min_area: float = 16.0,
    rectangles: bool = False,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Raw maps of one picture (2 + D, h, w) -> polygons in its pixels, float32 (N, 2) each, and scores float32; best first.

    Args:
        stride: pixels of the picture for each of the maps.
        min_score: least mean probability of text over a text's pixels.
        min_area: least number of the picture's pixels.
        rectangles: the smallest turned rectangle around a text's pixels instead of their outline.
    """
    from scipy.ndimage import find_objects

    text = maps[0] > 0
    labels = pixel_aggregation(text, (maps[1] > 0) & text, maps[2:], distance)
    probability = 1 / (1 + np.exp(-maps[0].astype(np.float64)))
    count = np.bincount(labels.ravel())
    score = np.bincount(labels.ravel(), weights=probability.ravel()) / np.maximum(count, 1)
    polygons, scores = [], []
    for number, place in enumerate(find_objects(labels), 1):
        if place is None or count[number] * stride**2 < min_area or score[number] < min_score:
            continue
        mask = labels[place] == number
        corner = np.array([place[1].start, place[0].start])
        if rectangles:
            rows, columns = np.nonzero(mask)
            # the corners of the pixels, so that one row of them has a height
            corners = [np.stack([columns + x, rows + y], 1) for x in (0, 1) for y in (0, 1)]
            outline = rectangle_around(np.concatenate(corners))
        else:
            outline = outline_of(mask)
        polygons.append(((outline + corner) * stride).astype(np.float32))
        scores.append(score[number])
    order = np.argsort(-np.array(scores), kind="stable")
    return [polygons[i] for i in order], np.array(scores, dtype=np.float32)[order]
