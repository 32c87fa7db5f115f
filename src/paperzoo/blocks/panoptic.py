"""Panoptic maps: each pixel in one segment, a countable thing or a region of stuff; with COCO's coding as colours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

VOID = 0
"""The id of pixels that are in no segment."""


@dataclass(frozen=True)
class Segment:
    """What is known of one segment.

    id: its number in the map, above 0. category: 0 … K - 1. thing: whether the category is countable. area: in pixels.
    crowd: a group of things that are not told apart. score: of a prediction, in [0, 1].
    """

    id: int
    category: int
    thing: bool
    area: int
    crowd: bool = False
    score: float | None = None


@dataclass(frozen=True)
class PanopticMap:
    """One image: `ids` int64 (H, W), 0 where no segment is, and the segments, each with at least a pixel."""

    ids: Tensor = field(repr=False)
    segments: tuple[Segment, ...]

    @property
    def semantic(self) -> Tensor:
        """The category of each pixel, int64 (H, W); -1 where no segment is."""
        known, rows = numbered(self)
        categories = torch.tensor([-1, *(s.category for s in self.segments)], device=known.device)
        return categories[rows]


def panoptic_map(
    ids: Tensor,
    categories: Mapping[int, int],
    things: Iterable[int],
    crowds: Iterable[int] = (),
    scores: Mapping[int, float] | None = None,
) -> PanopticMap:
    """A map from its ids; areas are counted, and segments without a pixel are left out.

    Args:
        ids: int64 (H, W), 0 where no segment is.
        categories: of each id.
        things: the categories that are countable.
        crowds: the ids that are crowds.
        scores: of ids, if they have one.

    Raises:
        ValueError: if the map has an id without a category.
    """
    things, crowds, scores = set(things), set(crowds), scores or {}
    found, counts = ids.unique(return_counts=True)
    segments = []
    for number, area in zip(found.tolist(), counts.tolist(), strict=True):
        if number == VOID:
            continue
        if number not in categories:
            raise ValueError(f"the map has the id {number}, which has no category")
        category = categories[number]
        segments.append(Segment(number, category, category in things, area, number in crowds, scores.get(number)))
    return PanopticMap(ids, tuple(segments))


def numbered(panoptic: PanopticMap) -> tuple[Tensor, Tensor]:
    """The ids of void and of the segments, int64 (S + 1,); and each pixel's row in it, int64 (H, W).

    Raises:
        ValueError: if the map has an id that no segment describes.
    """
    ids = panoptic.ids.to(torch.int64)
    known = torch.tensor([VOID, *(s.id for s in panoptic.segments)], device=ids.device)
    ordered, order = known.sort()
    place = torch.searchsorted(ordered, ids).clamp(max=len(ordered) - 1)
    strange = ids[ordered[place] != ids]
    if len(strange):
        raise ValueError(f"the map has the id {int(strange[0])}, which no segment describes")
    return known, order[place]


def ids_to_rgb(ids: Tensor) -> Tensor:
    """Ids below 2^24 as COCO's pictures have them: int64 (H, W) -> uint8 (3, H, W), red the lowest byte."""
    return torch.stack([(ids >> shift) & 255 for shift in (0, 8, 16)]).to(torch.uint8)


def rgb_to_ids(picture: Tensor) -> Tensor:
    """The inverse of `ids_to_rgb`: uint8 (3, H, W) -> int64 (H, W)."""
    red, green, blue = picture.to(torch.int64)
    return red + (green << 8) + (blue << 16)
