"""View synthesis and the losses of Monodepth2 (Godard et al., ICCV 2019, arXiv:1806.01260), sec. 3.

A depth map and a motion say where each pixel of the target frame is seen in a source frame; reading the source there builds the target
again. How badly that goes is the loss. Pixels have whole coordinates at their middles: x in 0 … W - 1, y in 0 … H - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.85  # the share of SSIM in the photometric error (sec. 3.1)
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants, for images in [0, 1]
NOISE = 1e-5  # breaks ties between the two sides of the auto-mask, as in the released code


# -- depth and motion ----------------------------------------------------------------------------------------------------


def disparity_to_depth(sigmoid: Tensor, min_depth: float = 0.1, max_depth: float = 100.0) -> Tensor:
    """D = 1 / (a sigma + b), with a and b so that the depth lies in [min_depth, max_depth] (sec. 3.1); any shape."""
    return 1 / (1 / max_depth + (1 / min_depth - 1 / max_depth) * sigmoid)


def rotation(axis_angle: Tensor) -> Tensor:
    """Rodrigues' formula: axis times angle in radians (B, 3) -> rotation matrices (B, 3, 3)."""
    angle = axis_angle.norm(dim=1, keepdim=True)
    x, y, z = (axis_angle / (angle + 1e-7)).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    axis = torch.stack([x, y, z], 1)
    sin, cos = angle.sin()[..., None], angle.cos()[..., None]
    identity = torch.eye(3, dtype=cross.dtype, device=cross.device)
    return cos * identity + sin * cross + (1 - cos) * axis[:, :, None] * axis[:, None, :]


def motion_matrix(axis_angle: Tensor, translation: Tensor, inverse: bool = False) -> Tensor:
    """x -> R x + t as (B, 4, 4), from (B, 3) and (B, 3); with `inverse` its inverse, x -> R^T (x - t)."""
    turned = rotation(axis_angle)
    shift = translation[..., None]
    if inverse:
        turned = turned.mT
        shift = -turned @ shift
    upper = torch.cat([turned, shift], 2)
    last = upper.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(upper), 1, 4)
    return torch.cat([upper, last], 1)


# -- view synthesis ------------------------------------------------------------------------------------------------------


def project(depth: Tensor, intrinsics: Tensor, motion: Tensor) -> Tensor:
    """Where the target's pixels are in the source: proj(D, T, K), eq. (2).

    Args:
        depth: (B, S, H, W), S depth maps of each target.
        intrinsics: (B, 3, 3), in pixels.
        motion: (B, 4, 4), from points in the target camera to points in the source camera.

    Returns:
        (B, S, H, W, 2), x and y in pixels of the source.
    """
    height, width = depth.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=depth.dtype, device=depth.device),
        torch.arange(width, dtype=depth.dtype, device=depth.device),
        indexing="ij",
    )
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # (3, P)
    # K (R d K^-1 p + t) = d (K R K^-1 p) + K t: the rays are turned once, whatever the depth
    rays = intrinsics @ motion[:, :3, :3] @ torch.linalg.inv(intrinsics) @ pixels  # (B, 3, P)
    shift = intrinsics @ motion[:, :3, 3:]  # (B, 3, 1)
    points = depth.flatten(2)[:, :, None] * rays[:, None] + shift[:, None]  # (B, S, 3, P)
    places = points[:, :, :2] / (points[:, :, 2:] + 1e-7)
    return places.mT.unflatten(2, (height, width))


def read_at(source: Tensor, places: Tensor) -> Tensor:
    """The source (B, C, H, W) at places (B, S, H, W, 2) in pixels, bilinear, outside it its border: (B, S, C, H, W)."""
    size = places.new_tensor([source.shape[-1] - 1, source.shape[-2] - 1])
    grid = (places / size - 0.5) * 2
    height, width = grid.shape[2:4]
    read = F.grid_sample(
        source, grid.flatten(1, 2), padding_mode="border", align_corners=True
    )  # S maps under each other
    return read.unflatten(2, (-1, height)).transpose(1, 2)


# -- losses --------------------------------------------------------------------------------------------------------------


def window_sum(values: Tensor) -> Tensor:
    """The sum over every 3x3 window, (…, H, W) -> (…, H - 2, W - 2); by adding shifted views, several times faster than pooling."""
    rows = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    return rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]


def mirrored(images: Tensor) -> Tensor:
    """One more pixel on each side, mirrored at the edge."""
    return F.pad(images, (1, 1, 1, 1), mode="reflect")


class StructuralError(torch.autograd.Function):
    """(1 - SSIM) / 2 of 3x3 windows, with its gradient written out: half the time and a third of the memory of autograd's.

    SSIM = A B / (P Q) with A = 2 m_a m_b + C1, B = 2 cov + C2, P = m_a^2 + m_b^2 + C1, Q = var_a + var_b + C2.
    """

    @staticmethod
    def forward(ctx, images: Tensor, target: Tensor, mean_b: Tensor, variance_b: Tensor) -> Tensor:
        padded = mirrored(images)
        mean_a = window_sum(padded).div_(9)
        squared = mean_a.square()
        q = window_sum(padded.square()).div_(9).sub_(squared).add_(variance_b).add_(C2)
        product = mean_a * mean_b
        b = window_sum(padded * target).div_(9).sub_(product).mul_(2).add_(C2)
        a = product.mul_(2).add_(C1)
        p = squared.addcmul_(mean_b, mean_b).add_(C1)
        inverse = (p * q).reciprocal_()
        ssim = (a * b).mul_(inverse)
        ctx.save_for_backward(padded, target, mean_a, mean_b, a, b, p, q, inverse, ssim)
        return ((1 - ssim) / 2).clamp_(0, 1)  # outside only by rounding, so the gradient is that of (1 - SSIM) / 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        padded, target, mean_a, mean_b, a, b, p, q, inverse, ssim = ctx.saved_tensors
        gradient = gradient * (-0.5 / 9)
        of_product = 2 * a * inverse * gradient  # with respect to the window's mean of a b, then of a^2, then of a
        of_ssim = gradient * ssim
        of_square = of_ssim / q
        of_mean = 2 * (mean_b * (b - a) * inverse * gradient + mean_a * (of_square - of_ssim / p))
        wide = [window_sum(F.pad(g, (2, 2, 2, 2))) for g in (of_mean, of_square, of_product)]
        back = wide[0].addcmul_(padded, wide[1], value=-2).addcmul_(target, wide[2])
        for side in (back, back.mT):  # what fell on a mirrored pixel belongs to its original
            side[..., 2, :] += side[..., 0, :]
            side[..., -3, :] += side[..., -1, :]
        return back[..., 1:-1, 1:-1], None, None, None


class PhotometricError:
    """pe(I_a, I_b) = alpha / 2 (1 - SSIM) + (1 - alpha) |I_a - I_b| against one target (sec. 3.1), averaged over the channels.

    Called with images (B, C, H, W) it gives (B, H, W). What depends on the target (B, C, H, W) alone is computed once.
    """

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.padded = mirrored(target)
        self.mean = window_sum(self.padded) / 9
        self.variance = window_sum(self.padded.square()) / 9 - self.mean.square()

    def __call__(self, images: Tensor) -> Tensor:
        structure = StructuralError.apply(images, self.padded, self.mean, self.variance).mean(1)
        return ALPHA * structure + (1 - ALPHA) * (images - self.target).abs().mean(1)


def smoothness(disparity: Tensor, image: Tensor) -> Tensor:
    """L_s, eq. (3): the slope of the mean-normalised disparity, less where the image has an edge. (B, 1, H, W), (B, 3, H, W) -> scalar."""
    normal = disparity / (disparity.mean((2, 3), keepdim=True) + 1e-7)

    def slopes(values: Tensor) -> tuple[Tensor, Tensor]:
        return (values[..., :-1] - values[..., 1:]).abs(), (values[..., :-1, :] - values[..., 1:, :]).abs()

    loss = 0.0
    for of_disparity, of_image in zip(slopes(normal), slopes(image), strict=True):
        loss = loss + (of_disparity * torch.exp(-of_image.mean(1, keepdim=True))).mean()
    return loss


@dataclass(frozen=True)
class ViewSynthesis:
    """What `view_synthesis_loss` found.

    loss: the scalar. photometric, smooth: its two parts, averaged over the scales. kept: the share of pixels (finest scale) that the
    auto-mask lets learn; 1 without a mask. mask: bool (B, H, W), those pixels. views: (B, F, C, H, W), the target built from each source with the
    finest disparity.
    """

    loss: Tensor
    photometric: Tensor
    smooth: Tensor
    kept: Tensor
    mask: Tensor
    views: Tensor


def view_synthesis_loss(
    disparities: Sequence[Tensor],
    target: Tensor,
    sources: Tensor,
    intrinsics: Tensor,
    motions: Sequence[Tensor],
    *,
    min_depth: float = 0.1,
    max_depth: float = 100.0,
    smooth_weight: float = 1e-3,
    auto_mask: bool = True,
    minimum: bool = True,
) -> ViewSynthesis:
    """L = mu L_p + lambda L_s averaged over pixels, scales and batch (sec. 3.2 and 3.3).

    Every scale's disparity is brought to the size of the image before it is used (sec. 3.2, "multi-scale estimation").

    Args:
        disparities: sigmoids (B, 1, H / 2^s, W / 2^s), finest first.
        target: (B, 3, H, W) in [0, 1]. sources: (B, F, 3, H, W).
        intrinsics: (B, 3, 3). motions: (B, 4, 4) for each source, from the target's camera to the source's.
        auto_mask: a pixel counts only where building it is better than taking the source as it is, eq. (5).
        minimum: the least error among the sources, eq. (4); else their average, what the paper replaces.
    """
    size = target.shape[-2:]
    error = PhotometricError(target)
    fine = torch.cat(
        [F.interpolate(d, size, mode="bilinear", align_corners=False) for d in disparities], 1
    )  # (B, S, H, W)
    depth = disparity_to_depth(fine, min_depth, max_depth)
    views = [read_at(sources[:, i], project(depth, intrinsics, motion)) for i, motion in enumerate(motions)]
    errors = torch.stack([torch.stack([error(v) for v in of_source.unbind(1)], 1) for of_source in views], 2)
    if not minimum:
        errors = errors.mean(2, keepdim=True)
    least = errors.amin(2)  # of (B, S, F, H, W)
    if auto_mask:
        unmoved = torch.stack([error(s) for s in sources.unbind(1)], 1)  # (B, F, H, W)
        if not minimum:
            unmoved = unmoved.mean(1, keepdim=True)
        unmoved = unmoved[:, None] + NOISE * torch.randn(
            len(target), len(disparities), *unmoved.shape[1:], device=target.device, dtype=target.dtype
        )
        rival = unmoved.amin(2)
        mask = least < rival
        least = torch.minimum(least, rival)  # where the mask is off this has no gradient: mu = 0
    else:
        mask = torch.ones_like(least, dtype=torch.bool)
    photometric = least.mean()
    smooth = sum(
        smoothness(d, F.interpolate(target, d.shape[-2:], mode="area")) / 2**s for s, d in enumerate(disparities)
    ) / len(disparities)
    return ViewSynthesis(
        loss=photometric + smooth_weight * smooth,
        photometric=photometric.detach(),
        smooth=smooth.detach(),
        kept=mask[:, 0].float().mean(),
        mask=mask[:, 0],
        views=torch.stack([v[:, 0] for v in views], 1).detach(),
    )
