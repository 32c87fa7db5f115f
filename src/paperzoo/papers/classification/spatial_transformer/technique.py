"""The spatial transformer: Spatial Transformer Networks (Jaderberg et al., NeurIPS 2015, arXiv:1506.02025).

    transformer = SpatialTransformer(localisation, num_features=50, transform=Affine())
    warped = transformer(feature_map)

Three parts (fig. 2): a localisation network regresses the parameters of a transform, the transform places a sampling point for
each output pixel, and the sampler reads the input there. Coordinates are (x, y) in -1 … 1 between the *centres* of the corner
pixels (`align_corners=True`), as the paper's; outside of the map everything is zero.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def output_points(height: int, width: int, like: Tensor) -> Tensor:
    """The regular grid G of output pixels (sec. 3.2), (height * width, 2)."""
    y, x = (torch.linspace(-1, 1, n, device=like.device, dtype=like.dtype) for n in (height, width))
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)


class Affine(nn.Module):
    """Six parameters, the rows of A (eq. 1): cropping, translation, rotation, scale and skew.

    Each transform maps parameters (B, num_parameters) and points (N, 2) of the output to points (B, N, 2) of the input;
    `identity` are the parameters that move nothing.
    """

    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    def forward(self, theta: Tensor, points: Tensor) -> Tensor:
        theta = theta.reshape(-1, 2, 3)
        return points @ theta[:, :, :2].transpose(1, 2) + theta[:, None, :, 2]


class Attention(nn.Module):
    """Three parameters, isotropic scale and translation (eq. 2): a window to look at."""

    identity = (1.0, 0.0, 0.0)

    def forward(self, theta: Tensor, points: Tensor) -> Tensor:
        return points * theta[:, None, :1] + theta[:, None, 1:]


class Projective(nn.Module):
    """Eight parameters: a plane seen from elsewhere. The rows of a 3 x 3 matrix whose last entry is 1."""

    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)

    def forward(self, theta: Tensor, points: Tensor) -> Tensor:
        plane = points @ theta[:, :6].reshape(-1, 2, 3)[:, :, :2].transpose(1, 2) + theta[:, None, 2:6:3]
        return plane / (points @ theta[:, 6:, None] + 1)


class ThinPlateSpline(nn.Module):
    """Free-form warps through `side` x `side` control points on a regular grid; parameters are their places (x, y) in the input.

    The spline is the smoothest one that takes each control point where it should go; 16 points in the paper.
    """

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        if side < 2:
            raise ValueError(f"side must be at least 2 control points, got {side}")
        control = output_points(side, side, torch.zeros((), dtype=torch.float64))
        count = side * side
        flat = torch.cat([torch.ones(count, 1, dtype=torch.float64), control], dim=1)
        system = torch.cat([torch.cat([bending(control, control), flat], dim=1),
                            torch.cat([flat.T, torch.zeros(3, 3, dtype=torch.float64)], dim=1)])  # fmt: skip
        self.register_buffer("control", control.float(), persistent=False)
        self.register_buffer("solution", torch.linalg.inv(system)[:, :count].float(), persistent=False)
        ticks = [-1 + 2 * i / (side - 1) for i in range(side)]
        self.identity = tuple(value for y in ticks for x in ticks for value in (x, y))

    def forward(self, theta: Tensor, points: Tensor) -> Tensor:
        control, solution = self.control.to(points.dtype), self.solution.to(points.dtype)
        basis = torch.cat([bending(points, control), torch.ones_like(points[:, :1]), points], dim=1)
        return basis @ solution @ theta.reshape(-1, len(self.control), 2)


def bending(points: Tensor, control: Tensor) -> Tensor:
    """U(r) = r^2 log r^2 between two sets of points: (N, 2), (K, 2) -> (N, K)."""
    square = (points[:, None] - control).square().sum(-1)
    return square * square.clamp_min(1e-12).log()


def sample(maps: Tensor, grid: Tensor, kernel: str = "bilinear") -> Tensor:
    """Read maps (B, C, H, W) at points (B, H', W', 2): eq. (5), or eq. (4) with kernel "nearest", which stops gradients to the grid."""
    return F.grid_sample(maps, grid.to(maps.dtype), kernel, padding_mode="zeros", align_corners=True)


class SpatialTransformer(nn.Module):
    """Warps each feature map of a batch as its own localisation network says: (B, C, H, W) -> (B, C, H', W').

    Args:
        localisation: the network f_loc without its last layer: (B, C, H, W) -> (B, num_features).
        num_features: what it puts out.
        transform: `Affine()`, `Attention()`, `Projective()`, `ThinPlateSpline()`.
        output_size: (H', W'); None is the input's.
        kernel: "bilinear", or "nearest".
    """

    def __init__(
        self,
        localisation: nn.Module,
        num_features: int,
        transform: nn.Module | None = None,
        output_size: tuple[int, int] | None = None,
        kernel: str = "bilinear",
    ) -> None:
        super().__init__()
        if kernel not in ("bilinear", "nearest"):
            raise ValueError(f"kernel is 'bilinear' or 'nearest', got '{kernel}'")
        self.localisation = localisation
        self.transform = Affine() if transform is None else transform
        self.regress = nn.Linear(num_features, len(self.transform.identity))
        self.output_size, self.kernel = output_size, kernel
        nn.init.zeros_(self.regress.weight)  # a fresh transformer is the identity
        with torch.no_grad():
            self.regress.bias.copy_(torch.tensor(self.transform.identity))

    def theta(self, x: Tensor) -> Tensor:
        """The transform's parameters for each map, (B, parameters)."""
        return self.regress(self.localisation(x))

    def grid(self, x: Tensor) -> Tensor:
        """Where each output pixel is read, (B, H', W', 2)."""
        height, width = self.output_size or x.shape[2:]
        theta, device = self.theta(x), x.device.type
        theta = theta.to(
            torch.promote_types(theta.dtype, torch.float32)
        )  # reduced precision would move places by pixels
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            points = self.transform(theta, output_points(height, width, theta))
        return points.reshape(-1, height, width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return sample(x, self.grid(x), self.kernel)
