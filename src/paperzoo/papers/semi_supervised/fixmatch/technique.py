"""FixMatch's reusable parts: the loss, the two augmentations and the schedule.

Source: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", 2020
(eq. 3 and 4, sec. 2.3 and 2.4, tables 4 and 12). Facts of the authors' code are marked as such.

Both augmentations work on whole batches of uint8 images and are functions of uniform numbers that the caller may
pass in: images drawn on one process or on many are then the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

GREY = 127  # the authors' images lie in [-1, 1] and are filled with 0


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def pseudo_labels(logits_weak: Tensor, threshold: float = 0.95) -> tuple[Tensor, Tensor]:
    """Hard labels from the weak view and which of them to trust; no gradient (sec. 2.2).

    Args:
        logits_weak: (B, num_classes).
        threshold: tau; a label counts where the largest probability is at least this.

    Returns:
        labels (B,) int64 and mask (B,) of 0. and 1. in the dtype of the logits.
    """
    confidence, labels = logits_weak.detach().softmax(dim=1).max(dim=1)
    return labels, (confidence >= threshold).to(logits_weak.dtype)


class FixMatchLoss(nn.Module):
    """l_s + lambda_u * l_u (eq. 3 and 4).

    The unlabelled term is divided by the number of *all* unlabelled images, not by the number of confident ones:
    it grows by itself as the network becomes confident, which is the method's curriculum (sec. 2.2).
    """

    def __init__(self, threshold: float = 0.95, unlabelled_weight: float = 1.0) -> None:
        super().__init__()
        self.threshold, self.unlabelled_weight = threshold, unlabelled_weight

    def forward(
        self, logits: Tensor, labels: Tensor, logits_weak: Tensor, logits_strong: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logits (B, K) and labels (B,) of labelled images, logits_weak and logits_strong (mu B, K) -> loss, parts."""
        supervised = F.cross_entropy(logits, labels)
        targets, mask = pseudo_labels(logits_weak, self.threshold)
        unsupervised = (F.cross_entropy(logits_strong, targets, reduction="none") * mask).mean()
        loss = supervised + self.unlabelled_weight * unsupervised
        parts = {"supervised": supervised.detach(), "unsupervised": unsupervised.detach(), "confident": mask.mean()}
        return loss, parts


def cosine_7_16(step: int, steps: int) -> float:
    """The learning rate's factor cos(7 pi k / 16 K) (sec. 2.4): it ends at 0.195, never at 0."""
    return math.cos(7 * math.pi * min(step, steps) / (16 * steps))


# ---------------------------------------------------------------------------------------------------------------------
# Weak augmentation: flip and shift


class FlipAndShift(nn.Module):
    """Mirror half of the images, then translate by up to `shift` of the side, borders reflected (sec. 2.3).

    Args:
        flip: off where a mirrored image has another meaning (digits; the paper leaves SVHN unflipped too).
        shift: largest translation as a fraction of the side. Paper: 12.5 %.
    """

    noise = 3

    def __init__(self, flip: bool = True, shift: float = 0.125) -> None:
        super().__init__()
        self.flip, self.shift = flip, shift

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images (B, C, H, W) of any dtype, noise (B, 3) uniform in [0, 1) -> the same shape and dtype."""
        count, _, height, width = images.shape
        noise = torch.rand(count, self.noise) if noise is None else noise
        noise = noise.to(images.device)
        rows = torch.arange(height, device=images.device) + _offset(noise[:, 0], self.shift * height)
        columns = torch.arange(width, device=images.device) + _offset(noise[:, 1], self.shift * width)
        rows, columns = _reflect(rows, height), _reflect(columns, width)
        if self.flip:
            columns = torch.where(noise[:, 2:] < 0.5, width - 1 - columns, columns)
        index = torch.arange(count, device=images.device)[:, None, None]
        picked = images.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]]
        return picked.movedim(-1, 1).contiguous()


def _offset(uniform: Tensor, largest: float) -> Tensor:
    """A whole number of pixels in [-largest, largest], all equally likely: (B, 1) int64."""
    largest = int(largest)
    return (uniform * (2 * largest + 1)).long()[:, None] - largest


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return size - 1 - (size - 1 - index).abs()


# ---------------------------------------------------------------------------------------------------------------------
# Strong augmentation: RandAugment's operations, then Cutout.
# Every operation: uint8 images (n, C, H, W) and its argument for each, (n,) -> uint8 images.


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return (factor * images.float() + (1 - factor) * other.float()).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luminance, (n, 1, H, W) uint8; images of another number of channels than 3 are their own mean."""
    return TF.rgb_to_grayscale(images) if images.shape[1] == 3 else images.float().mean(1, keepdim=True).byte()


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), factor)


def color(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images).float().mean((1, 2, 3), keepdim=True).floor(), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a 3x3 smoothing (weight 5 in the centre); the border is left as it is."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    channels = images.shape[1]
    smooth = F.conv2d(images.float(), (kernel / kernel.sum()).expand(channels, 1, 3, 3), groups=channels)
    blurred = images.float().clone()
    blurred[:, :, 1:-1, 1:-1] = smooth.round()
    return _blend(images, blurred, factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` highest bits."""
    mask = (256 - 2 ** (8 - bits.long())).to(torch.uint8)
    return images & mask[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at or above `threshold`, a fraction of white."""
    return torch.where(images.float() >= 255 * threshold[:, None, None, None], 255 - images, images)


def _affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Nearest-neighbour warp about the centre; matrix (n, 2, 3) takes output to input pixels. Grey outside."""
    n, _, height, width = images.shape
    scale = torch.tensor([width / 2, height / 2], device=images.device)
    rotation = matrix[:, :, :2] * scale[None, None, :] / scale[None, :, None]
    translation = matrix[:, :, 2:] / scale[None, :, None]
    grid = F.affine_grid(torch.cat([rotation, translation], 2), [n, 1, height, width], align_corners=False)
    moved = F.grid_sample(images.float() - GREY, grid, mode="nearest", align_corners=False)
    return (moved + GREY).to(torch.uint8)


def _matrix(count: Tensor, **entries: Tensor) -> Tensor:
    """(n, 2, 3): the identity with the named entries (a b tx / c d ty) replaced."""
    matrix = torch.eye(2, 3, device=count.device).repeat(len(count), 1, 1)
    for name, value in entries.items():
        row, column = {"a": (0, 0), "b": (0, 1), "tx": (0, 2), "c": (1, 0), "d": (1, 1), "ty": (1, 2)}[name]
        matrix[:, row, column] = value
    return matrix


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    angle = degrees * math.pi / 180
    cos, sin = angle.cos(), angle.sin()
    return _affine(images, _matrix(degrees, a=cos, b=-sin, c=sin, d=cos))


def shear_x(images: Tensor, amount: Tensor) -> Tensor:
    """The upper edge stays where it is, as in the authors' code."""
    return _affine(images, _matrix(amount, b=amount, tx=amount * images.shape[2] / 2))


def shear_y(images: Tensor, amount: Tensor) -> Tensor:
    """The left edge stays where it is."""
    return _affine(images, _matrix(amount, c=amount, ty=amount * images.shape[3] / 2))


def translate_x(images: Tensor, fraction: Tensor) -> Tensor:
    return _affine(images, _matrix(fraction, tx=(fraction * images.shape[3]).trunc()))


def translate_y(images: Tensor, fraction: Tensor) -> Tensor:
    return _affine(images, _matrix(fraction, ty=(fraction * images.shape[2]).trunc()))


# Table 12: the operation, its range. The authors' code widens the four enhancers to [0.1, 1.9]; here the table's.
POOL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = {
    "autocontrast": (lambda images, _: TF.autocontrast(images), 0.0, 0.0),
    "brightness": (brightness, 0.05, 0.95),
    "color": (color, 0.05, 0.95),
    "contrast": (contrast, 0.05, 0.95),
    "equalize": (lambda images, _: TF.equalize(images), 0.0, 0.0),
    "identity": (lambda images, _: images, 0.0, 0.0),
    "posterize": (posterize, 4.0, 8.0),
    "rotate": (rotate, -30.0, 30.0),
    "sharpness": (sharpness, 0.05, 0.95),
    "shear_x": (shear_x, -0.3, 0.3),
    "shear_y": (shear_y, -0.3, 0.3),
    "solarize": (solarize, 0.0, 1.0),
    "translate_x": (translate_x, -0.3, 0.3),
    "translate_y": (translate_y, -0.3, 0.3),
}


def cutout(images: Tensor, centre: Tensor, size: int, fill: int = GREY) -> Tensor:
    """A square of `size` pixels around a random centre becomes `fill`; it may hang over the border.

    Args:
        images: (B, C, H, W).
        centre: (B, 2), row and column in [0, 1).
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - (centre[:, :1] * height).long()
    columns = torch.arange(width, device=images.device) - (centre[:, 1:] * width).long()
    inside_rows, inside_columns = ((-(size // 2) <= x) & (x < size - size // 2) for x in (rows, columns))
    hole = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    return torch.where(hole, torch.tensor(fill, dtype=images.dtype, device=images.device), images)


class RandAugmentCutout(nn.Module):
    """The strong augmentation: random operations of random magnitude, then Cutout (sec. 2.3).

    Args:
        operations: how many are drawn from POOL for each image, with replacement.
        probability: with which each of them is carried out. Authors' code: 0.5; the paper does not say.
        cutout_size: side of the hole as a fraction of the image's. Authors' code: 16 of 32 pixels; 0 leaves it out.
    """

    def __init__(self, operations: int = 2, probability: float = 0.5, cutout_size: float = 0.5) -> None:
        super().__init__()
        self.operations, self.probability, self.cutout_size = operations, probability, cutout_size
        self.noise = 3 * operations + 2

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 images (B, C, H, W), noise (B, self.noise) uniform in [0, 1) -> uint8 images (B, C, H, W)."""
        noise = torch.rand(len(images), self.noise) if noise is None else noise
        noise = noise.to(images.device)
        for k in range(self.operations):
            choice, magnitude, carried_out = noise[:, 3 * k : 3 * k + 3].unbind(1)
            images = images.clone()
            chosen = (choice * len(POOL)).long()
            for number, (operation, low, high) in enumerate(POOL.values()):
                rows = ((chosen == number) & (carried_out < self.probability)).nonzero().flatten()
                if len(rows):
                    images[rows] = operation(images[rows], low + (high - low) * magnitude[rows])
        size = round(self.cutout_size * min(images.shape[-2:]))
        return cutout(images, noise[:, -2:], size) if size else images
