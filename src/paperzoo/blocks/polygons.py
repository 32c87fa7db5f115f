"""Polygons: what text detectors share. Areas, overlap, shrinking, filling, and back from a mask to an outline.

A polygon is (N, 2), x and y in pixels, N >= 3, without the first point repeated at the end; the centre of the first pixel is
(0.5, 0.5). A polygon that crosses itself stands for the parts that it encloses (by shapely's `make_valid`). Works on numpy arrays and
CPU tensors, and gives numpy arrays. Needs shapely (extra "ocr").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paperzoo.errors import MissingExtra

Polygon = Any
"""An array or CPU tensor (N, 2)."""


def geometry() -> Any:
    """The module shapely.

    Raises:
        MissingExtra: where it is not installed.
    """
    try:
        import shapely
    except ImportError:
        raise MissingExtra("shapely", "ocr", "measuring the overlap of polygons") from None
    return shapely


def as_regions(polygons: Sequence[Polygon]) -> np.ndarray:
    """Polygons as valid shapely geometries: an object array (len(polygons),)."""
    shapely = geometry()
    regions = np.empty(len(polygons), dtype=object)
    regions[:] = [shapely.Polygon(np.asarray(p, dtype=np.float64)) for p in polygons]
    crossed = ~shapely.is_valid(regions)
    if crossed.any():
        regions[crossed] = shapely.make_valid(regions[crossed])
    return regions


def polygon_areas(polygons: Sequence[Polygon]) -> np.ndarray:
    """Float64 (len(polygons),), in square pixels."""
    return geometry().area(as_regions(polygons))


def intersection_areas(ours: Sequence[Polygon], theirs: Sequence[Polygon]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64 (N, M) areas of the intersections, (N,) and (M,) areas of the polygons themselves."""
    shapely = geometry()
    a, b = as_regions(ours), as_regions(theirs)
    shared = np.zeros((len(a), len(b)))
    if len(a) and len(b):
        rows, columns = np.nonzero(shapely.intersects(a[:, None], b[None]))
        shared[rows, columns] = shapely.area(shapely.intersection(a[rows], b[columns]))
    return shared, shapely.area(a), shapely.area(b)


def polygon_iou(ours: Sequence[Polygon], theirs: Sequence[Polygon]) -> np.ndarray:
    """Intersection over union, float64 (N, M); 0 where both have no area."""
    shared, a, b = intersection_areas(ours, theirs)
    union = a[:, None] + b[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def polygon_nms(polygons: Sequence[Polygon], scores: Any, threshold: float) -> np.ndarray:
    """Greedy non-maximum suppression by IoU: int64 rows that stay, best first; equal scores in their order."""
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    overlap = polygon_iou(polygons, polygons)
    alive, kept = np.ones(len(order), dtype=bool), []
    for row in order:
        if alive[row]:
            kept.append(row)
            alive &= overlap[row] <= threshold
    return np.array(kept, dtype=np.int64)


def offset_polygon(polygon: Polygon, distance: float) -> list[np.ndarray]:
    """The outline moved outwards by `distance` pixels (inwards if negative), round corners: its pieces, largest first.

    Vatti clipping's offset; an outline that is moved far inwards falls into several pieces, or vanishes.
    """
    shapely = geometry()
    moved = shapely.get_parts(shapely.buffer(as_regions([polygon])[0], distance, quad_segs=4))
    moved = [g for g in moved if g.geom_type == "Polygon" and g.area > 0]
    return [shapely.get_coordinates(g.exterior)[:-1] for g in sorted(moved, key=lambda g: -g.area)]


def shrink_polygon(polygon: Polygon, ratio: float, most: float | None = None) -> np.ndarray:
    """The kernel of a text: its outline moved inwards by d = A (1 - r^2) / L, A its area and L its perimeter.

    Args:
        ratio: r, above 0 up to 1, which leaves the outline as it is.
        most: d is at most so many pixels.

    Returns:
        float64 (M, 2). The largest piece where there are several; the whole polygon where nothing would be left.
    """
    region = as_regions([polygon])[0]
    distance = region.area * (1 - ratio**2) / max(region.length, 1e-9)
    pieces = offset_polygon(polygon, -min(distance, np.inf if most is None else most))
    return pieces[0] if pieces else np.asarray(polygon, dtype=np.float64)


def pixels_inside(polygon: Polygon, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of an image (height, width) whose centres lie inside: int64 (K,) each."""
    from skimage.draw import polygon as fill

    points = np.asarray(polygon, dtype=np.float64)
    return fill(points[:, 1] - 0.5, points[:, 0] - 0.5, shape=size)


def outline_of(mask: np.ndarray) -> np.ndarray | None:
    """The outline of the largest part of a mask, bool (H, W): float64 (N, 2), half-way between inside and outside; None if empty.

    Clockwise as one sees it. Points that lie within a quarter of a pixel of the line through their neighbours are left out.
    """
    from skimage.measure import approximate_polygon, find_contours

    rows, columns = np.nonzero(mask)
    if not len(rows):
        return None
    top, left = rows.min(), columns.min()
    cut = np.pad(mask[top : rows.max() + 1, left : columns.max() + 1], 1).astype(np.float64)
    outline = max(find_contours(cut, 0.5), key=lambda line: abs(signed_area(line[:-1])))
    outline = approximate_polygon(outline, 0.25)[:-1, ::-1] + (left - 0.5, top - 0.5)
    return clockwise(outline)


def clockwise(points: np.ndarray) -> np.ndarray:
    """The same polygon (N, 2) from the same first point, clockwise as one sees it (y points down)."""
    return np.concatenate([points[:1], points[:0:-1]]) if signed_area(points) < 0 else points


def signed_area(points: np.ndarray) -> float:
    """The shoelace formula; positive where the points run clockwise as one sees them."""
    x, y = points[:, 0], points[:, 1]
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def rectangle_around(points: Polygon) -> np.ndarray:
    """The smallest rectangle, turned as it must be, around points (N, 2): float64 (4, 2), clockwise from the upper left (least x + y)."""
    shapely = geometry()
    box = shapely.oriented_envelope(shapely.MultiPoint(np.asarray(points, dtype=np.float64)))
    corners = shapely.get_coordinates(box)
    if len(corners) < 5:  # a point or a line
        return np.repeat(corners[:1], 4, axis=0)
    corners = clockwise(corners[:4])
    return np.roll(corners, -int(corners.sum(1).round(6).argmin()), axis=0)


def tidy_polygon(points: Polygon) -> np.ndarray | None:
    """An annotated polygon as detectors want it: float32 (N, 2), clockwise, no point twice in a row; None without an area.

    Four corners in an order that crosses itself are put in order, from the same first corner.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    points = points[np.abs(points - np.roll(points, -1, axis=0)).max(1) > 1e-6]
    if len(points) < 3:
        return None
    region = geometry().Polygon(points)
    if len(points) == 4 and not region.is_valid:
        around = points - points.mean(0)
        order = np.argsort(np.arctan2(around[:, 1], around[:, 0]), kind="stable")
        points = points[np.roll(order, -int(np.flatnonzero(order == 0)[0]))]
    if polygon_areas([points])[0] < 1e-6:
        return None
    return clockwise(points).astype(np.float32)
