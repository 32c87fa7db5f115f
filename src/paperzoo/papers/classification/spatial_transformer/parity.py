"""The spatial transformer against its equations as loops, torch's affine grid, scipy's spline and torchvision's perspective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.classification.spatial_transformer import model as networks
from paperzoo.papers.classification.spatial_transformer import technique as stn
from paperzoo.papers.classification.spatial_transformer.recipe import Distort


def cases() -> Iterator[Case]:
    import scipy
    import torchvision

    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    maps, grid = torch.randn(2, 3, 4, 5, **double), torch.rand(2, 3, 6, 2, **double) * 3 - 1.5  # some points outside
    yield Case(
        "bilinear sampler and its gradients", stn.sample, slow_sample, (maps, grid), "eq. (5) as loops", gradients=True
    )
    yield Case("gradients of the sampler", sampler_gradients, slow_gradients, (maps, grid), "eq. (6) and (7) as loops")
    yield Case(
        "nearest sampler", lambda u, g: stn.sample(u, g, "nearest"), slow_nearest, (maps, grid), "eq. (4) as loops"
    )

    theta = torch.randn(3, 6)
    yield Case("affine grid", lambda t: placed(stn.Affine(), t, 5, 7),
               lambda t: F.affine_grid(t.reshape(-1, 2, 3), [3, 1, 5, 7], align_corners=True), (theta,),
               f"torch {torch.__version__.split('+')[0]} affine_grid", gradients=True)  # fmt: skip
    window = torch.tensor([[0.5, 0.2, -0.3], [1.5, 0.0, 0.1]])
    yield Case("attention", lambda t: placed(stn.Attention(), t, 4, 6),
               lambda t: placed(stn.Affine(), torch.stack([t[:, 0], 0 * t[:, 0], t[:, 1], 0 * t[:, 0], t[:, 0], t[:, 2]], 1), 4, 6),
               (window,), "eq. (2): the affine transform of s, t_x, t_y", gradients=True)  # fmt: skip
    plane = torch.tensor([[1.0, 0.2, 0.1, -0.1, 0.9, 0.3, 0.2, -0.15], [0.8, 0.0, -0.2, 0.3, 1.1, 0.0, -0.1, 0.3]])
    yield Case("projective", lambda t: placed(stn.Projective(), t, 4, 5), homogeneous, (plane,),
               "homogeneous coordinates, one point at a time", gradients=True)  # fmt: skip
    image = torch.rand(1, 2, 9, 9)
    yield Case("projective, on an image", lambda x: stn.sample(x, placed(stn.Projective(), plane[:1], 9, 9))[:, :, 2:-2, 2:-2],
               lambda x: perspective(x, plane[0])[:, :, 2:-2, 2:-2], (image,),
               f"torchvision {torchvision.__version__.split('+')[0]} perspective", atol=1e-4)  # fmt: skip

    for side in (2, 3, 4):
        spline = stn.ThinPlateSpline(side)
        moved = torch.tensor(spline.identity).repeat(2, 1) + torch.randn(2, 2 * side * side) * 0.2
        yield Case(f"thin plate spline, {side} x {side} points", lambda t, s=spline: placed(s, t, 6, 5),
                   lambda t, n=side: scipy_spline(t, n, 6, 5), (moved,), f"scipy {scipy.__version__} RBFInterpolator")  # fmt: skip
    yield Case("the spline meets its control points", lambda t: spline(t, spline.control), lambda t: t.reshape(-1, 16, 2),
               (moved,), "interpolation")  # fmt: skip

    # A fresh transformer hands its input on, whatever the transform.
    for name, kind in networks.TRANSFORMS.items():
        fresh = stn.SpatialTransformer(nn.Flatten(), 3 * 8 * 7, kind())
        yield Case(f"fresh {name} transformer", fresh, lambda x: x, (torch.randn(2, 3, 8, 7),), "identity")
    # Two output pixels for each input pixel, less one: between them, the mean.
    finer = stn.SpatialTransformer(nn.Flatten(), 12, output_size=(3, 3))
    yield Case("finer output", finer, halfway, (torch.randn(1, 3, 2, 2),), "midpoints by hand")

    for transform in networks.TRANSFORMS:
        net = networks.stn_cnn(num_classes=4, in_channels=1, image_size=34, transform=transform)
        nn.init.normal_(net.transformer.regress.weight, std=0.02)
        yield Case(f"ST-CNN, {transform}", net, lambda x, net=net, t=transform: written_out(net, x, t),
                   (torch.randn(2, 1, 34, 34),), "sec. 3 and 4.1 written out with functions and loops", gradients=True)  # fmt: skip
    net = networks.stn_fcn(image_size=12)
    plain = networks.plain_fcn(image_size=12)
    plain.features, plain.fc = net.features, net.fc
    yield Case("fresh ST-FCN: the classifier alone", net, plain, (torch.randn(2, 3, 12, 12),), "FCN", atol=1e-4)

    # The distortion, against torchvision's order of things: turn about the centre, scale, move.
    picture = smooth_picture()
    yield Case("distortion RTS", lambda: Distort("RTS", fixed=True)(picture).float(), lambda: distorted(picture), (),
               f"torchvision {torchvision.__version__.split('+')[0]} affine", rtol=0.0, atol=2.0, note="rounded to 255 levels")  # fmt: skip


def placed(transform: nn.Module, theta: Tensor, height: int, width: int) -> Tensor:
    return transform(theta, stn.output_points(height, width, theta)).reshape(-1, height, width, 2)


def pixel(value: Tensor, size: int) -> Tensor:
    """-1 … 1 to 0 … size - 1."""
    return (value + 1) / 2 * (size - 1)


def slow_sample(maps: Tensor, grid: Tensor) -> Tensor:
    _, _, height, width = maps.shape
    x, y = pixel(grid[..., 0], width), pixel(grid[..., 1], height)
    total = 0
    for n, m in product(range(height), range(width)):
        weight = (1 - (x - m).abs()).clamp_min(0) * (1 - (y - n).abs()).clamp_min(0)
        total = total + maps[:, :, n, m, None, None] * weight[:, None]
    return total


def slow_nearest(maps: Tensor, grid: Tensor) -> Tensor:
    _, _, height, width = maps.shape
    x, y = pixel(grid[..., 0], width), pixel(grid[..., 1], height)
    total = 0
    for n, m in product(range(height), range(width)):
        hit = ((x + 0.5).floor() == m) & ((y + 0.5).floor() == n)
        total = total + maps[:, :, n, m, None, None] * hit[:, None]
    return total


def sampler_gradients(maps: Tensor, grid: Tensor) -> dict[str, Tensor]:
    maps, grid = maps.clone().requires_grad_(), grid.clone().requires_grad_()
    to_maps, to_grid = torch.autograd.grad(stn.sample(maps, grid).sum(), (maps, grid))
    return {"maps": to_maps, "grid": to_grid}


def slow_gradients(maps: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """Of the sum of all outputs, by the paper's formulas."""
    _, _, height, width = maps.shape
    x, y = pixel(grid[..., 0], width), pixel(grid[..., 1], height)
    to_maps, to_x, to_y = torch.zeros_like(maps), torch.zeros_like(x), torch.zeros_like(y)
    for n, m in product(range(height), range(width)):
        along_x, along_y = (1 - (x - m).abs()).clamp_min(0), (1 - (y - n).abs()).clamp_min(0)
        to_maps[:, :, n, m] = (along_x * along_y).sum((1, 2))[:, None]
        value = maps[:, :, n, m].sum(1)[:, None, None]
        to_x += value * along_y * ((x - m).abs() < 1) * torch.where(m >= x, 1.0, -1.0)
        to_y += value * along_x * ((y - n).abs() < 1) * torch.where(n >= y, 1.0, -1.0)
    return {"maps": to_maps, "grid": torch.stack([to_x * (width - 1) / 2, to_y * (height - 1) / 2], dim=-1)}


def homogeneous(theta: Tensor) -> Tensor:
    """A 4 x 5 grid through 3 x 3 matrices."""
    images = []
    for row in theta:
        matrix = torch.cat([row, row.new_ones(1)]).reshape(3, 3)
        points = []
        for i, j in product(range(4), range(5)):
            point = matrix @ torch.tensor([-1 + 2 * j / 4, -1 + 2 * i / 3, 1.0])
            points.append(point[:2] / point[2])
        images.append(torch.stack(points).reshape(4, 5, 2))
    return torch.stack(images)


def perspective(image: Tensor, theta: Tensor) -> Tensor:
    """torchvision's, which takes the corners: those of the output, and where each is read."""
    from torchvision.transforms.v2 import functional

    size = image.shape[-1]
    corners = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    read = stn.Projective()(theta[None], torch.tensor(corners))[0]
    inside = [[float(pixel(v, size)) for v in point] for point in read]
    ends = [[(v + 1) / 2 * (size - 1) for v in point] for point in corners]
    # torchvision measures from the corner of a pixel, its coefficients from half a pixel on
    half = [[v + 0.5 for v in p] for p in inside], [[v + 0.5 for v in p] for p in ends]
    return functional.perspective(image, half[0], half[1], interpolation=functional.InterpolationMode.BILINEAR)


def scipy_spline(theta: Tensor, side: int, height: int, width: int) -> Tensor:
    from scipy.interpolate import RBFInterpolator

    control = stn.output_points(side, side, torch.zeros((), dtype=torch.float64)).numpy()
    points = stn.output_points(height, width, torch.zeros((), dtype=torch.float64)).numpy()
    found = [RBFInterpolator(control, row.reshape(-1, 2).double().numpy(), kernel="thin_plate_spline", degree=1)(points)
             for row in theta]  # fmt: skip
    return torch.stack([torch.from_numpy(f).reshape(height, width, 2).float() for f in found])


def halfway(x: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 3, 3)
    for i, j in product(range(3), range(3)):
        near = [x[:, :, a, b] for a in {i // 2, (i + 1) // 2} for b in {j // 2, (j + 1) // 2}]
        out[:, :, i, j] = sum(near) / len(near)
    return out


def written_out(net: networks.DigitNetwork, x: Tensor, transform: str) -> Tensor:
    """ST-CNN from its parameters, with the sampler as loops."""
    w = dict(net.named_parameters())
    size = x.shape[-1]
    h = F.max_pool2d(x, 2)
    for i in (1, 4):
        name = f"transformer.localisation.{i}"
        h = F.max_pool2d(F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"]).clamp_min(0), 2)
    h = (h.flatten(1) @ w["transformer.localisation.8.weight"].T + w["transformer.localisation.8.bias"]).clamp_min(0)
    theta = h @ w["transformer.regress.weight"].T + w["transformer.regress.bias"]
    if transform == "affine":
        grid = F.affine_grid(theta.reshape(-1, 2, 3), [len(x), 1, size, size], align_corners=True)
    else:
        grid = placed(networks.TRANSFORMS[transform](), theta, size, size)
    h = slow_sample(x, grid)
    for name in ("features.conv1", "features.conv2"):
        h = F.max_pool2d(F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"]).clamp_min(0), 2)
    return h.flatten(1) @ w["fc.weight"].T + w["fc.bias"]


def smooth_picture() -> Tensor:
    """A blurred blob off the centre of an empty canvas, uint8 (3, 42, 42)."""
    y, x = torch.meshgrid(torch.arange(42.0), torch.arange(42.0), indexing="ij")
    blob = 255 * torch.exp(-((x - 24) ** 2 / 60 + (y - 17) ** 2 / 20))
    return blob.round().to(torch.uint8).expand(3, -1, -1).contiguous()


def distorted(picture: Tensor) -> Tensor:
    """The same distortion by torchvision, from the numbers that the picture gives."""
    import zlib

    from torchvision.transforms.v2 import functional

    draw = torch.rand(4, generator=torch.Generator().manual_seed(zlib.crc32(picture.numpy().tobytes()))).tolist()
    degrees, scale = (2 * draw[0] - 1) * 45, 0.7 + 0.5 * draw[1]
    room = (1 - 2 / 3 * scale) * 41 / 2
    move = [(2 * d - 1) * room for d in draw[2:]]
    small = picture.float()
    fine = functional.affine(small, math.degrees(math.radians(degrees)), move, scale, [0.0, 0.0],
                             interpolation=functional.InterpolationMode.BILINEAR)  # fmt: skip
    return fine.round()
