"""The cascade (sec. II-A): a picture at many sizes through P-Net, what it finds through R-Net, what is left through O-Net.

Every stage looks at all windows of all pictures together; only the sizes of the pyramid are a loop. Inside, boxes are as
in the authors' code: pixels are counted from 1 and both corners belong to the box. `detect` returns this project's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

THRESHOLDS = (0.6, 0.7, 0.7)  # of the three stages' scores, as released
FACTOR = 0.709  # from one size of the pyramid to the next: half the area
SMALLEST = 20  # pixels of the smallest face, as released
CHUNK = 512  # windows that go through a network together

Found = tuple[Tensor, Tensor, Tensor]
"""Boxes (N, 4), scores (N,), and the picture of each, int64 (N,)."""


def normalise(pixels: Tensor) -> Tensor:
    return (pixels - 127.5) * 0.0078125


def pyramid(height: int, width: int, smallest: float = SMALLEST, factor: float = FACTOR) -> list[float]:
    """The scales at which a picture is looked at: the smallest face becomes 12 pixels, down to where 12 pixels are all."""
    scales, scale = [], 12.0 / smallest
    side = min(height, width) * scale
    while side >= 12:
        scales.append(scale)
        scale, side = scale * factor, side * factor
    return scales


# -- windows ---------------------------------------------------------------------------------------------------------


def summed(pictures: Tensor) -> Tensor:
    """The summed-area table of pictures (B, 3, H, W) with whole numbers: int32 (B, H + 1, W + 1, 3).

    Sums of large pictures run over, but what is taken from the table are differences of a window's size, and those are
    right modulo 2^32.
    """
    whole = pictures.round().to(torch.int32)
    table = whole.cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32)
    return F.pad(table, (1, 0, 1, 0)).permute(0, 2, 3, 1).contiguous()


def cut_windows(table: Tensor, owner: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Windows of any size as squares of `size` pixels: each pixel is the mean of those that it covers.

    Equal to `adaptive_avg_pool2d` of each window, but four look-ups in the summed-area table for all of them.

    Args:
        table: of `summed`.
        owner: int64 (N,), the picture of each window.
        boxes: int64 (N, 4), x1 y1 x2 y2 inside the picture, x2 and y2 exclusive, of at least one pixel.

    Returns:
        float32 (N, 3, size, size) in 0 … 255.
    """
    steps = torch.arange(size, device=table.device)
    rows, columns = table.shape[1:3]
    ends = []
    for low, high in ((boxes[:, 0, None], boxes[:, 2, None]), (boxes[:, 1, None], boxes[:, 3, None])):
        length = high - low
        ends += [low + steps * length // size, low - (-(steps + 1) * length // size)]  # rounded down and up
    left, right, top, bottom = ends
    area = (bottom - top)[:, :, None] * (right - left)[:, None, :]
    top, bottom = ((owner[:, None] * rows + y) * columns for y in (top, bottom))
    flat = table.view(-1, 3)
    look = lambda y, x: F.embedding(y[:, :, None] + x[:, None, :], flat)  # noqa: E731
    total = look(bottom, right) - look(top, right) - look(bottom, left) + look(top, left)
    return (total.float() / area[..., None]).permute(0, 3, 1, 2)


def inside(boxes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of boxes (N, 4) that are in the picture: int64 (N, 4) from 0 and exclusive; and bool (N,), those with any."""
    height, width = table.shape[1] - 1, table.shape[2] - 1
    whole = boxes.trunc().long()
    low = whole[:, :2].clamp(min=1) - 1
    high = whole[:, 2:].minimum(torch.tensor([width, height], device=boxes.device))
    cut = torch.cat([low, high], dim=1)
    return cut, (high > low).all(1)


def through(network: nn.Module, table: Tensor, owner: Tensor, cut: Tensor) -> tuple[Tensor, ...]:
    """A network's outputs for windows of the pictures."""
    parts = [
        network(normalise(cut_windows(table, o, c, network.size)))
        for o, c in zip(owner.split(CHUNK), cut.split(CHUNK), strict=True)
    ]
    return tuple(torch.cat(values).float() for values in zip(*parts, strict=True))  # pixels do not fit into 16 bits


# -- boxes -----------------------------------------------------------------------------------------------------------


def calibrated(boxes: Tensor, offsets: Tensor, more: float = 1.0) -> Tensor:
    """Boxes (N, 4) moved by offsets (N, 4) in their sides, which are `more` longer than the corners' distance."""
    sides = (boxes[:, 2:] - boxes[:, :2] + more).repeat(1, 2)
    return boxes + offsets * sides


def squared(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) as squares around the same centre, with the longer side."""
    sides = boxes[:, 2:] - boxes[:, :2]
    side = sides.amax(1, keepdim=True)
    corner = boxes[:, :2] + sides * 0.5 - side * 0.5
    return torch.cat([corner, corner + side], dim=1)


def minimum_nms(boxes: Tensor, scores: Tensor, owner: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression where the overlap is a part of the smaller box ("Min"): the rows that stay, best first.

    A box goes if a better one that stays overlaps it by more than `threshold`. Found by repeating that sentence until nothing changes,
    which takes as many rounds as the longest chain of boxes that suppress each other.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, owner = boxes[order], owner[order]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low + 1).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    near = common / torch.minimum(area[:, None], area[None, :]) > threshold
    beats = (near & (owner[:, None] == owner[None, :])).triu(diagonal=1)  # (i, j): i is better and near j
    stays = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        now = ~(beats & stays[:, None]).any(0)
        if torch.equal(now, stays):
            return order[stays]
        stays = now


# -- stages ----------------------------------------------------------------------------------------------------------


def propose(
    pnet: nn.Module,
    pictures: Tensor,
    threshold: float = THRESHOLDS[0],
    smallest: float = SMALLEST,
    factor: float = FACTOR,
) -> Found:
    """Stage 1: the windows that P-Net takes for faces, calibrated, of pictures (B, 3, H, W) in 0 … 255."""
    height, width = pictures.shape[2:]
    levels = []
    for scale in pyramid(height, width, smallest, factor):
        size = (int(height * scale + 1), int(width * scale + 1))
        outputs = pnet(normalise(F.interpolate(pictures, size=size, mode="area")))
        score, offsets = outputs[0].float().softmax(1)[:, 1], outputs[1].float()
        owner, row, column = (score >= threshold).nonzero(as_tuple=True)
        cell = torch.stack([column, row], dim=1).to(score.dtype)
        low, high = (((pnet.stride * cell + end) / scale).floor() for end in (1, pnet.size))
        boxes, found = torch.cat([low, high], dim=1), score[owner, row, column]
        kept = batched_nms(boxes, found, owner, 0.5)
        levels.append((boxes[kept], found[kept], owner[kept], offsets.permute(0, 2, 3, 1)[owner, row, column][kept]))
    if not levels:
        empty = pictures.new_zeros(0)
        return empty.view(0, 4), empty, empty.long()
    boxes, scores, owner, offsets = (torch.cat(values) for values in zip(*levels, strict=True))
    kept = batched_nms(boxes, scores, owner, 0.7)
    return squared(calibrated(boxes[kept], offsets[kept], more=0.0)), scores[kept], owner[kept]


def refine(rnet: nn.Module, table: Tensor, found: Found, threshold: float = THRESHOLDS[1]) -> Found:
    """Stage 2: what R-Net leaves of the proposals, calibrated."""
    boxes, scores, owner = found
    cut, any_pixels = inside(boxes, table)
    boxes, owner, cut = boxes[any_pixels], owner[any_pixels], cut[any_pixels]
    if not len(boxes):
        return boxes, scores[:0], owner
    logits, offsets = through(rnet, table, owner, cut)[:2]
    scores = logits.softmax(1)[:, 1]
    kept = (scores > threshold).nonzero()[:, 0]
    kept = kept[batched_nms(boxes[kept], scores[kept], owner[kept], 0.7)]
    return squared(calibrated(boxes[kept], offsets[kept])), scores[kept], owner[kept]


def output(onet: nn.Module, table: Tensor, found: Found, threshold: float = THRESHOLDS[2]) -> tuple[Found, Tensor]:
    """Stage 3: the faces that O-Net leaves, calibrated, and their landmarks (N, 5, 2), counted from 0."""
    boxes, scores, owner = found
    cut, any_pixels = inside(boxes, table)
    boxes, owner, cut = boxes[any_pixels], owner[any_pixels], cut[any_pixels]
    if not len(boxes):
        return (boxes, scores[:0], owner), boxes.new_zeros(0, 5, 2)
    logits, offsets, points = through(onet, table, owner, cut)
    scores = logits.softmax(1)[:, 1]
    kept = (scores > threshold).nonzero()[:, 0]
    boxes, scores, owner, offsets, points = (v[kept] for v in (boxes, scores, owner, offsets, points))
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    points = points.view(-1, 2, 5).transpose(1, 2) * sides[:, None] + boxes[:, None, :2] - 1
    boxes = calibrated(boxes, offsets)
    kept = minimum_nms(boxes, scores, owner, 0.7)
    return (boxes[kept], scores[kept], owner[kept]), points[kept]


@torch.no_grad()
def detect(
    model: nn.Module,
    pictures: Tensor,
    thresholds: tuple[float, float, float] = THRESHOLDS,
    smallest: float = SMALLEST,
    factor: float = FACTOR,
) -> list[dict[str, Tensor]]:
    """All three stages.

    Args:
        model: `MTCNN`.
        pictures: (B, 3, H, W), RGB in 0 … 255.
        thresholds: of the stages' scores.
        smallest: height of the smallest face that is looked for, in pixels.
        factor: from one size of the pyramid to the next.

    Returns:
        for each picture "boxes" (N, 4), from 0 and exclusive; they may reach beyond it; "scores" (N,); "landmarks" (N, 5, 2).
    """
    table = summed(pictures)
    found = propose(model.pnet, pictures, thresholds[0], smallest, factor)
    found = refine(model.rnet, table, found, thresholds[1])
    (boxes, scores, owner), points = output(model.onet, table, found, thresholds[2])
    boxes = boxes - boxes.new_tensor([1.0, 1.0, 0.0, 0.0])
    rows = [owner == i for i in range(len(pictures))]
    return [{"boxes": boxes[r], "scores": scores[r], "landmarks": points[r]} for r in rows]
