"""MaskFormer's learning rule (sec. 3.2): each segment is given to one query, whose mask and class learn from it; all others say "nothing".

Classes are 0 … K - 1, and K stands for nothing. Masks are logits of queries and bool masks of segments; a segment has any size, a
query's mask is smaller by any factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from paperzoo.papers.detection.fast_rcnn.model import exact

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss, RetinaNet's


def mask_costs(logits: Tensor, masks: Tensor, mask_weight: float = 20.0, dice_weight: float = 1.0) -> Tensor:
    """L_mask between every query and every segment of an image: 20 focal + dice.

    A segment's loss is linear in its pixels, so that all pairs are matrix products.

    Args:
        logits: (B, Q, P), at P pixels.
        masks: (B, T, P), 0 or 1.

    Returns:
        (B, Q, T).
    """
    probability, transposed = logits.sigmoid(), masks.transpose(1, 2)
    inside = ALPHA * (1 - probability) ** GAMMA * F.softplus(-logits)
    outside = (1 - ALPHA) * probability**GAMMA * F.softplus(logits)
    focal = ((inside - outside) @ transposed + outside.sum(2, keepdim=True)) / logits.shape[2]
    total = probability.sum(2)[:, :, None] + masks.sum(2)[:, None]
    return mask_weight * focal + dice_weight * (1 - (2 * probability @ transposed + 1) / (total + 1))


@torch.no_grad()
def match(
    class_logits: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    masks: Sequence[Tensor],
    mask_weight: float = 20.0,
    dice_weight: float = 1.0,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The cheapest way to give each segment a query of its image, each query at most one segment; for each prediction apart.

    The cost of a pair is -p(class) + 20 focal + dice (sec. 3.2, "bipartite matching"), at the resolution of the queries' masks.
    All costs of a batch and of all predictions go to the CPU together.

    Args:
        class_logits, mask_logits: for each prediction (B, Q, K + 1) and (B, Q, h, w).
        labels, masks: for each image int64 (T,) and bool (T, H, W).

    Returns:
        for each prediction three int64 (M,): the image, the query, and the segment's row in all images' segments joined. M is the
        number of segments unless an image has more than Q.
    """
    counts = [len(row) for row in labels]
    device, size = mask_logits[0].device, mask_logits[0].shape[-2:]
    if not sum(counts):
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return [(nothing, nothing, nothing) for _ in mask_logits]
    small = F.interpolate(torch.cat(list(masks))[:, None].to(torch.uint8), size, mode="nearest")[:, 0].float()
    wanted = pad_sequence(small.flatten(1).split(counts), batch_first=True)  # (B, T, P)
    classes = pad_sequence(list(labels), batch_first=True)
    tables = []
    for of_classes, of_masks in zip(class_logits, mask_logits, strict=True):
        index = classes[:, None].expand(-1, of_classes.shape[1], -1)
        probability = exact(of_classes).softmax(-1).gather(2, index)
        logits = exact(of_masks).flatten(2)
        tables.append(mask_costs(logits, wanted.to(logits.dtype), mask_weight, dice_weight) - probability)
    worst = torch.finfo(torch.float32).max  # a pair without a cost is taken only where there is no other
    table = torch.stack(tables).nan_to_num(worst, worst, worst).cpu().numpy()
    starts = [sum(counts[:i]) for i in range(len(counts))]
    result = []
    for of_prediction in table:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for image, (costs, count) in enumerate(zip(of_prediction, counts, strict=True)):
            query, row = (torch.from_numpy(found) for found in linear_sum_assignment(costs[:, :count]))
            parts.append((torch.full_like(query, image), query, row + starts[image]))
        result.append(tuple(torch.cat(column).to(device) for column in zip(*parts, strict=True)))
    return result


def focal_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t, averaged over the pixels: logits (M, P) and bool masks (M, P) -> (M,)."""
    away = torch.where(masks, -logits, logits)  # 1 - p_t is its sigmoid, -log p_t its softplus
    alpha = torch.where(masks, ALPHA, 1 - ALPHA).to(logits.dtype)
    return (alpha * away.sigmoid() ** GAMMA * F.softplus(away)).mean(1)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - (2 |x y| + 1) / (|x| + |y| + 1) of each pair: logits (M, P) and bool masks (M, P) -> (M,)."""
    probability = logits.sigmoid()
    return 1 - (2 * (probability * masks).sum(1) + 1) / (probability.sum(1) + masks.sum(1) + 1)


class SetMaskLoss(nn.Module):
    """L_mask-cls (sec. 3.2): cross-entropy of all queries; focal and dice loss of the matched ones, by the number of segments.

    Args:
        num_classes: K.
        no_object: the weight of "nothing" in the cross-entropy, which is a weighted mean.
        mask_weight, dice_weight: of the focal and the dice loss, in the matching as well.
    """

    def __init__(
        self, num_classes: int, no_object: float = 0.1, mask_weight: float = 20.0, dice_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.num_classes, self.no_object = num_classes, no_object
        self.mask_weight, self.dice_weight = mask_weight, dice_weight

    def forward(
        self,
        class_logits: Sequence[Tensor],
        mask_logits: Sequence[Tensor],
        labels: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """The losses, summed over the predictions of all decoder layers. Arguments as `match`."""
        matches = match(class_logits, mask_logits, labels, masks, self.mask_weight, self.dice_weight)
        joined, goal = torch.cat(list(labels)), torch.cat(list(masks))
        each = [
            self.of_one(exact(c), exact(m), joined, goal, *found)
            for c, m, found in zip(class_logits, mask_logits, matches, strict=True)
        ]
        return {name: torch.stack([losses[name] for losses in each]).sum() for name in each[0]}

    def of_one(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        labels: Tensor,
        masks: Tensor,
        image: Tensor,
        query: Tensor,
        row: Tensor,
    ) -> dict[str, Tensor]:
        """The weighed losses of one prediction, of matched pairs as `match` gives them."""
        wanted = torch.full(class_logits.shape[:2], self.num_classes, device=class_logits.device)
        wanted[image, query] = labels[row]
        weight = class_logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object
        losses = {"classification": F.cross_entropy(class_logits.transpose(1, 2), wanted, weight)}
        picked = mask_logits[image, query]
        if not len(picked):
            return losses | {"masks": mask_logits.sum() * 0, "dice": mask_logits.sum() * 0}
        size, count = tuple(masks.shape[-2:]), len(labels)
        picked = F.interpolate(picked[:, None], size, mode="bilinear", align_corners=False)[:, 0].flatten(1)
        goal = masks[row].flatten(1)
        focal, dice = focal_loss(picked, goal).sum() / count, dice_loss(picked, goal).sum() / count
        return losses | {"masks": self.mask_weight * focal, "dice": self.dice_weight * dice}
