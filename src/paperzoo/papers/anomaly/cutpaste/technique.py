"""CutPaste: the two ways to make a defect out of a normal image (sec. 2.2, 2.3), and the density of its features (sec. 2.1).

`CutPaste` and `CutPasteScar` are torchvision v2 transforms of image tensors (…, C, H, W), uint8 or float in [0, 1]; masks, boxes and
labels pass through unchanged. Random numbers come from torch's global generator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F2
from torchvision.transforms.v2._utils import query_size


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


class _Paste(v2.Transform):
    """Cut a rectangle, change its colours, paste it elsewhere."""

    _transformed_types = (tv_tensors.Image, v2.functional.is_pure_tensor)

    def __init__(self, jitter: float) -> None:
        super().__init__()
        self.jitter = v2.ColorJitter(jitter, jitter, jitter, jitter) if jitter else None

    def cut(self, image: Tensor, params: dict[str, Any]) -> Tensor:
        top, left, height, width = params["source"]
        patch = image[..., top : top + height, left : left + width]
        return patch if self.jitter is None else self.jitter(patch)


class CutPaste(_Paste):
    """A rectangle of the image itself at another place (sec. 2.2).

    Args:
        area: smallest and largest part of the image's area, uniform.
        aspect: the ratio of width to height is uniform in (aspect, 1) or, as often, in (1, 1 / aspect).
        jitter: the largest change of brightness, contrast, saturation and hue; 0 for none.

    Raises:
        ValueError: for an area or an aspect outside (0, 1].
    """

    def __init__(self, area: tuple[float, float] = (0.02, 0.15), aspect: float = 0.3, jitter: float = 0.1) -> None:
        super().__init__(jitter)
        if not 0 < area[0] <= area[1] <= 1 or not 0 < aspect <= 1:
            raise ValueError(f"area must rise within (0, 1] and aspect lie in (0, 1], got {area} and {aspect}")
        self.area, self.aspect = area, aspect

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = query_size(flat_inputs)
        area = uniform(*self.area) * size[0] * size[1]
        aspect = uniform(self.aspect, 1) if torch.rand(()) < 0.5 else uniform(1, 1 / self.aspect)
        height = min(size[0], max(1, round(math.sqrt(area / aspect))))
        width = min(size[1], max(1, round(math.sqrt(area * aspect))))
        places = [
            [int(torch.randint(0, size[i] - side + 1, ())) for i, side in enumerate((height, width))] for _ in "ab"
        ]
        return {"source": (*places[0], height, width), "target": places[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        patch, (top, left) = self.cut(inpt, params), params["target"]
        out = inpt.clone()
        out[..., top : top + patch.shape[-2], left : left + patch.shape[-1]] = patch
        return out


class CutPasteScar(_Paste):
    """A long thin rectangle of the image itself, turned, at another place (sec. 2.3).

    Args:
        width: smallest and largest width in pixels, uniform; cut to the image.
        length: smallest and largest length in pixels, likewise.
        angle: the largest rotation to either side in degrees.
        jitter: as for `CutPaste`.

    Raises:
        ValueError: for sizes that do not rise from at least 1.
    """

    def __init__(
        self,
        width: tuple[int, int] = (2, 16),
        length: tuple[int, int] = (10, 25),
        angle: float = 45,
        jitter: float = 0.1,
    ) -> None:
        super().__init__(jitter)
        if not 1 <= width[0] <= width[1] or not 1 <= length[0] <= length[1]:
            raise ValueError(f"width and length must rise from at least 1, got {width} and {length}")
        self.width, self.length, self.angle = width, length, angle

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = query_size(flat_inputs)
        sides = [
            min(bound, round(uniform(*limits))) for bound, limits in zip(size, (self.length, self.width), strict=True)
        ]
        source = [int(torch.randint(0, bound - side + 1, ())) for bound, side in zip(size, sides, strict=True)]
        return {
            "source": (*source, *sides),
            "angle": uniform(-self.angle, self.angle),
            "place": (float(torch.rand(())), float(torch.rand(()))),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        patch = self.cut(inpt, params).as_subclass(Tensor)
        inside = torch.ones(*patch.shape[:-3], 1, *patch.shape[-2:], dtype=patch.dtype)
        turned = F2.rotate(torch.cat([patch, inside], -3), params["angle"], expand=True)
        height, width = inpt.shape[-2:]
        turned = turned[..., :height, :width]  # a scar that is longer than a small image
        top, left = (
            int(part * (bound - side + 1))
            for part, bound, side in zip(params["place"], (height, width), turned.shape[-2:], strict=True)
        )
        here = (..., slice(top, top + turned.shape[-2]), slice(left, left + turned.shape[-1]))
        out = inpt.clone()
        out[here] = torch.where(turned[..., -1:, :, :] > 0, turned[..., :-1, :, :], out[here])
        return out


def fit_density(features: Tensor) -> tuple[Tensor, Tensor]:
    """A Gaussian with the shrunk covariance of Ledoit and Wolf (2004): (N, D) -> mean (D,), precision (D, D); in float64.

    The sample covariance S is drawn towards a multiple of the identity, mu I with mu its mean variance, by the weight that is best in
    expectation, so that there is an inverse with fewer samples than dimensions too.
    """
    x = features.double()
    count, dimensions = x.shape
    mean = x.mean(0)
    x = x - mean
    covariance = x.T @ x / count
    mu = covariance.diagonal().mean()
    # the mean over entries of how much the samples' products scatter, against how far S is from mu I
    scatter = ((x.square().T @ x.square()).sum() / count - covariance.square().sum()) / (dimensions * count)
    distance = (covariance.square().sum() - dimensions * mu**2) / dimensions
    weight = 0.0 if distance <= 0 else float((scatter / distance).clamp(0, 1))
    shrunk = (1 - weight) * covariance
    # one sample, or equal ones, have no variance at all
    shrunk.diagonal().add_(weight * mu + torch.finfo(torch.float32).eps)
    return mean, torch.cholesky_inverse(torch.linalg.cholesky(shrunk))


def mahalanobis(features: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """The distance of features from a Gaussian, sqrt of -2 log p without its constant (sec. 2.1): (N, D) -> (N,)."""
    delta = features - mean
    return ((delta @ precision) * delta).sum(-1).clamp_min(0).sqrt()
