"""Faces brought to one place: five landmarks, by a similarity transform, onto a template.

Coordinates are x, y in pixels; (0, 0) is the centre of the upper left pixel, as in OpenCV and scikit-image. The five
points are the left eye, right eye, nose tip, left and right corner of the mouth; left is the left of the picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATE_112 = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
"""Where the points lie in a crop of 112 x 112: the field's "arcface_dst", which public weights of 112 x 112 expect."""


def face_template(size: int) -> Tensor:
    """The template of a square crop: float32 (5, 2), that of 112 pixels scaled by size / 112."""
    return torch.tensor(TEMPLATE_112) * (size / 112)


def similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """The scaling, rotation and shift, without reflection, that brings points nearest to others in the sense of least squares.

    This is Umeyama's solution (TPAMI 1991, eq. 40 to 43). In the plane, a scaled rotation is [[a, -b], [b, a]], so that his
    singular value decomposition reduces to two quotients of sums.

    Args:
        source, target: floating point (..., N, 2), N at least 2; the points of a source must not all be the same.

    Returns:
        (..., 2, 3): target ≈ matrix[..., :2] @ source + matrix[..., 2].

    Raises:
        ValueError: if the shapes differ, or the source's points are one point.
    """
    if source.shape != target.shape or source.shape[-1] != 2 or source.shape[-2] < 2:
        raise ValueError(
            f"source and target have the same shape (..., N, 2) with N >= 2, not {tuple(source.shape)} and {tuple(target.shape)}"
        )
    from_centre, to_centre = source.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    (x, y), (u, v) = (source - from_centre).unbind(-1), (target - to_centre).unbind(-1)
    spread = (x * x + y * y).sum(-1)
    if bool((spread <= 1e-12 * (1 + source.square().sum((-1, -2)))).any()):
        raise ValueError("the points of a source lie on one place; a similarity needs two different ones at least")
    a, b = (x * u + y * v).sum(-1) / spread, (x * v - y * u).sum(-1) / spread
    turn = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)
    shift = to_centre.squeeze(-2) - (turn @ from_centre.mT).squeeze(-1)
    return torch.cat([turn, shift.unsqueeze(-1)], -1)


def warp(images: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Images seen through similarity transforms, bilinear; black outside.

    Args:
        images: (B, C, H, W), uint8 or floating point.
        matrices: (B, 2, 3), from coordinates in the images to coordinates in the result.
        size: height and width of the result.

    Returns:
        (B, C, size, size) in the images' dtype.
    """
    height, width = images.shape[-2:]
    turn, shift = matrices[:, :, :2].float(), matrices[:, :, 2].float()
    places = torch.arange(size, device=images.device, dtype=torch.float32)
    y, x = torch.meshgrid(places, places, indexing="ij")
    grid = torch.stack([x, y], -1).view(1, -1, 2) - shift[:, None]
    grid = torch.linalg.solve(turn, grid.mT).mT  # coordinates in the images (B, size * size, 2)
    extent = torch.tensor([width, height], device=images.device, dtype=torch.float32)
    grid = (2 * grid + 1) / extent - 1  # as grid_sample counts without align_corners
    grid = grid.view(len(images), size, size, 2)
    values = images if images.is_floating_point() else images.float()
    result = F.grid_sample(values, grid.to(values.dtype), padding_mode="zeros", align_corners=False)
    return result if images.is_floating_point() else result.round().clamp(0, 255).to(images.dtype)


def align_face(images: Tensor, landmarks: Tensor, size: int = 112) -> Tensor:
    """Crops in which the five landmarks lie on the template.

    Args:
        images: (B, C, H, W) or (C, H, W), uint8 or floating point.
        landmarks: floating point (B, 5, 2) or (5, 2); see the module's docstring.
        size: of the crop, in pixels.

    Returns:
        (B, C, size, size) or (C, size, size), in the images' dtype.

    Raises:
        ValueError: if the landmarks have another shape or are all one point.
    """
    single = images.ndim == 3
    if single:
        images, landmarks = images[None], landmarks[None]
    if landmarks.shape != (len(images), 5, 2):
        raise ValueError(f"landmarks have the shape ({len(images)}, 5, 2), not {tuple(landmarks.shape)}")
    points = landmarks.to(images.device, torch.float32)
    matrices = similarity_transform(points, face_template(size).to(points.device).expand_as(points))
    crops = warp(images, matrices, size)
    return crops[0] if single else crops
