"""Set prediction: every object is given to one prediction, by the Hungarian method, and all others say "nothing" (DETR's loss, as YOLOS takes it).

Boxes are centre x, centre y, width, height in parts of the image. Classes are 0 … K - 1, and K stands for no object.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss


def corners(boxes: Tensor) -> Tensor:
    """cx cy w h (…, 4) -> x1 y1 x2 y2."""
    return torch.cat([boxes[..., :2] - 0.5 * boxes[..., 2:], boxes[..., :2] + 0.5 * boxes[..., 2:]], dim=-1)


def pairwise_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU of x1 y1 x2 y2 boxes whose leading shapes broadcast: (…, 4), (…, 4) -> (…). NaN where both are empty."""
    area = lambda b: (b[..., 2:] - b[..., :2]).prod(-1)  # noqa: E731
    shared = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    hull = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    shared, hull = shared.clamp(min=0).prod(-1), hull.clamp(min=0).prod(-1)
    union = area(boxes) + area(others) - shared
    return shared / union - (hull - union) / hull


@torch.no_grad()
def match(
    logits: Tensor,
    predicted: Tensor,
    boxes: Tensor,
    labels: Tensor,
    owner: Tensor,
    class_cost: float = 1.0,
    box_cost: float = 5.0,
    giou_cost: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """The cheapest way to give each object a prediction of its image, each prediction at most one object.

    The cost of a pair is -p(class) + 5 L1 - 2 GIoU with the default weights. All costs of a batch are computed at once and go to the
    CPU together.

    Args:
        logits, predicted: (B, Q, K + 1) and (B, Q, 4), the predictions.
        boxes, labels, owner: (T, 4), int64 (T,) and int64 (T,), the objects of all images and the image of each, in its order.

    Returns:
        int64 (M,) and (M,): rows of `boxes` and the query that each is given. M is T unless an image has more than Q objects.
    """
    if not len(boxes):
        return owner, owner
    probability = logits.softmax(-1)[owner, :, labels]  # (T, Q)
    mine = predicted[owner]  # (T, Q, 4)
    distance = (mine - boxes[:, None]).abs().sum(-1)
    overlap = pairwise_giou(corners(mine), corners(boxes)[:, None])
    cost = box_cost * distance - class_cost * probability - giou_cost * overlap
    worst = torch.finfo(cost.dtype).max  # a pair without a cost is taken only where there is no other
    table = cost.nan_to_num(worst, worst, worst).cpu()
    counts = torch.bincount(owner, minlength=len(logits)).tolist()
    rows, queries, first = [], [], 0
    for part, count in zip(table.split(counts), counts, strict=True):
        row, query = linear_sum_assignment(part.numpy())
        rows.append(torch.from_numpy(row) + first)
        queries.append(torch.from_numpy(query))
        first += count
    return torch.cat(rows).to(boxes.device), torch.cat(queries).to(boxes.device)


class SetLoss(nn.Module):
    """Cross-entropy of all predictions, L1 distance and 1 - GIoU of the matched ones, each with its weight.

    Args:
        num_classes: K.
        no_object: the weight of "nothing" in the cross-entropy, which is a weighted mean.
        box_weight, giou_weight: of the two box losses, which are summed over objects and divided by their number.
    """

    def __init__(
        self, num_classes: int, no_object: float = 0.1, box_weight: float = 5.0, giou_weight: float = 2.0
    ) -> None:
        super().__init__()
        self.num_classes, self.no_object = num_classes, no_object
        self.box_weight, self.giou_weight = box_weight, giou_weight

    def forward(
        self, logits: Tensor, predicted: Tensor, boxes: Tensor, labels: Tensor, owner: Tensor
    ) -> dict[str, Tensor]:
        """Arguments as `match`."""
        row, query = match(logits, predicted, boxes, labels, owner)
        wanted = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        wanted[owner[row], query] = labels[row]
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object
        found, goal = predicted[owner[row], query], boxes[row]
        count = max(1, len(boxes))
        return {
            "classification": F.cross_entropy(logits.transpose(1, 2), wanted, weight),
            "boxes": self.box_weight * (found - goal).abs().sum() / count,
            "giou": self.giou_weight * generalized_box_iou_loss(corners(found), corners(goal), "sum") / count,
        }
