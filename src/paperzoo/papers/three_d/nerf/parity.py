"""Parity of NeRF: the whole renderer against the released steps in plain torch, the equations against loops over samples, cameras against loops over
pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks import rays as ray_block
from paperzoo.blocks import volume_rendering
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.three_d.nerf import model

PORT = "the PyTorch port's steps, written out in plain torch"


class PlainField(nn.Module):
    """The network as fig. 7 draws it: everything is joined before each layer."""

    def __init__(self, depth: int, width: int, skip: int, points: int, views: int) -> None:
        super().__init__()
        self.octaves, self.skip = (points, views), skip
        p, v = 3 + 6 * points, 3 + 6 * views
        sizes = [p] + [width + p * (i == skip) for i in range(depth - 1)]
        self.pts_linears = nn.ModuleList(nn.Linear(s, width) for s in sizes)
        self.views_linears = nn.ModuleList([nn.Linear(v + width, width // 2)])
        self.feature_linear, self.alpha_linear = nn.Linear(width, width), nn.Linear(width, 1)
        self.rgb_linear = nn.Linear(width // 2, 3)

    def forward(self, points: Tensor, views: Tensor) -> Tensor:
        def encode(x: Tensor, octaves: int) -> Tensor:
            parts = [x]
            for k in range(octaves):
                parts += [torch.sin(x * 2.0**k), torch.cos(x * 2.0**k)]
            return torch.cat(parts, -1)

        flat = points.reshape(-1, 3)
        x = encode(flat, self.octaves[0])
        seen = encode(views[:, None].expand(points.shape).reshape(-1, 3), self.octaves[1])
        h = x
        for i, layer in enumerate(self.pts_linears):
            h = F.relu(layer(h))
            if i == self.skip:
                h = torch.cat([x, h], -1)
        density = self.alpha_linear(h)
        h = F.relu(self.views_linears[0](torch.cat([self.feature_linear(h), seen], -1)))
        return torch.cat([self.rgb_linear(h), density], -1).reshape(*points.shape[:2], 4)


class Plain(nn.Module):
    """The renderer step by step, its state that of `model.NeRF`."""

    def __init__(
        self, samples=64, fine_samples=128, noise=0.0, white=False, disparity=False, shape=(8, 256, 4, 10, 4)
    ) -> None:
        super().__init__()
        self.samples, self.fine_samples, self.noise, self.white, self.disparity = (
            samples,
            fine_samples,
            noise,
            white,
            disparity,
        )
        self.coarse, self.fine = PlainField(*shape), PlainField(*shape)

    def outputs(self, raw: Tensor, z: Tensor, directions: Tensor) -> tuple[Tensor, ...]:
        steps = torch.cat([z[:, 1:] - z[:, :-1], torch.full_like(z[:, :1], 1e10)], -1)
        steps = steps * directions[:, None].norm(dim=-1)
        density = raw[..., 3]
        if self.training and self.noise:
            density = density + torch.randn(density.shape, dtype=density.dtype) * self.noise
        alpha = 1 - torch.exp(-F.relu(density) * steps)
        clear = torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], -1)
        weights = alpha * torch.cumprod(clear, -1)[:, :-1]
        colour = (weights[..., None] * torch.sigmoid(raw[..., :3])).sum(-2)
        depth, opacity = (weights * z).sum(-1), weights.sum(-1)
        if self.white:
            colour = colour + (1 - opacity[:, None])
        return colour, depth, opacity, weights

    def forward(self, rays: Tensor) -> Tensor | dict[str, Tensor]:
        o, d, views, near, far = rays[:, :3], rays[:, 3:6], rays[:, 6:9], rays[:, 9:10], rays[:, 10:11]
        t = torch.linspace(0, 1, self.samples, dtype=rays.dtype)
        z = 1 / (1 / near * (1 - t) + 1 / far * t) if self.disparity else near * (1 - t) + far * t
        if self.training:
            middles = 0.5 * (z[:, 1:] + z[:, :-1])
            upper, lower = torch.cat([middles, z[:, -1:]], -1), torch.cat([z[:, :1], middles], -1)
            z = lower + (upper - lower) * torch.rand(z.shape, dtype=z.dtype)
        raw = self.coarse(o[:, None] + d[:, None] * z[..., None], views)
        first, _, _, weights = self.outputs(raw, z, d)
        bins, inner = 0.5 * (z[:, 1:] + z[:, :-1]), weights[:, 1:-1] + 1e-5
        cdf = torch.cumsum(inner / inner.sum(-1, keepdim=True), -1)
        cdf = torch.cat([torch.zeros_like(cdf[:, :1]), cdf], -1)
        if self.training:
            u = torch.rand(len(z), self.fine_samples, dtype=z.dtype)
        else:
            u = torch.linspace(0, 1, self.fine_samples, dtype=z.dtype).expand(len(z), self.fine_samples)
        place = torch.searchsorted(cdf, u.contiguous(), right=True)
        both = torch.stack([(place - 1).clamp(min=0), place.clamp(max=cdf.shape[1] - 1)], -1)
        shape = (*both.shape[:2], cdf.shape[1])
        c, b = (torch.gather(x[:, None].expand(shape), 2, both) for x in (cdf, bins))
        width = c[..., 1] - c[..., 0]
        width = torch.where(width < 1e-5, torch.ones_like(width), width)
        more = b[..., 0] + (u - c[..., 0]) / width * (b[..., 1] - b[..., 0])
        z = torch.sort(torch.cat([z, more.detach()], -1), -1)[0]
        raw = self.fine(o[:, None] + d[:, None] * z[..., None], views)
        colour, depth, opacity, _ = self.outputs(raw, z, d)
        if self.training:
            return {"colours": torch.stack([first, colour])}
        return torch.cat([colour, depth[:, None], opacity[:, None]], -1)


class Seeded(nn.Module):
    """Draws the same random numbers at each call."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, rays: Tensor) -> Tensor | dict[str, Tensor]:
        torch.manual_seed(5)
        return self.net(rays)


def some_rays(count: int, near: float = 2.0, far: float = 6.0) -> Tensor:
    """From around towards the origin, directions not of length one."""
    generator = torch.Generator().manual_seed(1)
    origins = 4 * F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    directions = (-origins + 0.8 * torch.randn(count, 3, generator=generator)) / 4
    depths = torch.tensor([[near, far, 0.003]]).expand(count, 3)
    return torch.cat([origins, directions, F.normalize(directions, dim=1), depths], 1)


def same_state(ours: model.NeRF, plain: Plain) -> Plain:
    plain.load_state_dict(ours.state_dict())
    return plain.train(ours.training)


# -- the equations, one sample after the other ------------------------------------------------------------------------------


def slow_weights(density: Tensor, lengths: Tensor) -> Tensor:
    """Eq. (3): T_i = exp(-sum over j < i), and its weight."""
    rows = []
    for ray in range(len(density)):
        passed, row = density.new_zeros(()), []
        for i in range(density.shape[1]):
            row.append(torch.exp(-passed) * (1 - torch.exp(-density[ray, i] * lengths[ray, i])))
            passed = passed + density[ray, i] * lengths[ray, i]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def slow_composite(weights: Tensor, colours: Tensor, depths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From back to front: what is seen so far is covered by the next sample in front (alpha compositing), over white."""
    seen, depth, opacity = [], [], []
    for ray in range(len(weights)):
        left, alphas = 1.0, []
        for w in weights[ray]:  # the share of what reaches a sample that it keeps
            alphas.append(w / left)
            left = left - w
        colour, far = torch.ones(colours.shape[2], dtype=colours.dtype), torch.zeros((), dtype=depths.dtype)
        cover = torch.zeros((), dtype=depths.dtype)
        for i in reversed(range(weights.shape[1])):
            colour = alphas[i] * colours[ray, i] + (1 - alphas[i]) * colour
            far = alphas[i] * depths[ray, i] + (1 - alphas[i]) * far
            cover = alphas[i] + (1 - alphas[i]) * cover
        seen.append(colour)
        depth.append(far)
        opacity.append(cover)
    return torch.stack(seen), torch.stack(depth), torch.stack(opacity)


def slow_inverse(edges: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """numpy.interp of the cumulative distribution, ray by ray."""
    rows = []
    for e, w, u in zip(edges.numpy(), weights.numpy(), places.numpy(), strict=True):
        steps = (w + 1e-5) / (w + 1e-5).sum()
        rows.append(np.interp(u, np.concatenate([[0.0], np.cumsum(steps)]), e))
    return torch.from_numpy(np.stack(rows))


def slow_encoding(x: Tensor, octaves: int) -> Tensor:
    rows = []
    for point in x.tolist():
        row = list(point)
        for k in range(octaves):
            row += [math.sin(2**k * p) for p in point] + [math.cos(2**k * p) for p in point]
        rows.append(row)
    return torch.tensor(rows, dtype=x.dtype)


def slow_rays(cameras: ray_block.Cameras, row: int) -> Tensor:
    """Pixel by pixel: the point at depth 1 in the camera, turned and shifted into the world."""
    pose, (fx, fy, cx, cy) = cameras.poses[row].double().numpy(), cameras.intrinsics[row].tolist()
    height, width = cameras.sizes[row].tolist()
    found = []
    for j in range(height):
        for i in range(width):
            point = pose[:, :3] @ np.array([(i - cx) / fx, -(j - cy) / fy, -1.0]) + pose[:, 3]
            way = point - pose[:, 3]
            found.append([*pose[:, 3], *way, *(way / np.sqrt((way**2).sum()))])
    return torch.tensor(np.array(found)).float()


def projected(points: Tensor, focal: Tensor, sizes: Tensor) -> Tensor:
    """Points (M, 3) through the perspective projection matrix of OpenGL with near plane 1 and far plane at infinity."""
    rows = []
    for p, f, size in zip(points, focal, sizes.double(), strict=True):
        matrix = points.new_zeros(4, 4)
        matrix[0, 0], matrix[1, 1] = 2 * f[0] / size[1], 2 * f[1] / size[0]
        matrix[2, 2], matrix[2, 3], matrix[3, 2] = -1, -2, -1
        x = matrix @ torch.cat([p, p.new_ones(1)])
        rows.append(x[:3] / x[3])
    return torch.stack(rows)


def keras_forward(arrays: list[np.ndarray], point: Tensor, view: Tensor) -> Tensor:
    """The authors' TensorFlow network: kernels multiply from the right; x of (M, 63) and (M, 27)."""
    x, views = point.double().numpy(), view.double().numpy()
    layer = lambda i, v: v @ arrays[2 * i].astype(np.float64) + arrays[2 * i + 1]  # noqa: E731
    h = x
    for i in range(8):
        h = np.maximum(layer(i, h), 0)
        if i == 4:
            h = np.concatenate([x, h], -1)
    density, feature = layer(11, h), layer(8, h)
    h = np.maximum(layer(9, np.concatenate([feature, views], -1)), 0)
    return torch.from_numpy(np.concatenate([layer(10, h), density], -1)).float()


def keras_arrays() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    sizes = [(63, 256), *[(256, 256)] * 4, (319, 256), *[(256, 256)] * 2, (256, 256), (283, 128), (128, 3), (256, 1)]
    arrays = []
    for inside, out in sizes:
        arrays.append((generator.normal(size=(inside, out)) / inside**0.5).astype(np.float32))
        arrays.append(generator.normal(size=out).astype(np.float32) * 0.1)
    return arrays


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    full = model.nerf(white_background=True).eval()
    full.coarse.alpha_linear.bias.data += 0.3
    full.fine.alpha_linear.bias.data += 0.3
    yield Case("nerf eval, 64 + 128 samples, white", full, same_state(full, Plain(white=True)), (some_rays(7),), PORT)
    yield Case(
        "a field",
        full.coarse,
        flat_field(full),
        (torch.randn(5, 6, 3), some_rays(5)[:, 6:9]),
        "fig. 7 joined layer by layer",
    )
    again = model.nerf(white_background=True).eval()
    port = {f"network_{n}_state_dict": getattr(full, a).state_dict() for n, a in (("fn", "coarse"), ("fine", "fine"))}
    again.load_state_dict(model.from_official(port))
    yield Case("the port's checkpoint", again, full, (some_rays(3),), "the same network", atol=1e-9)
    del again
    arrays = keras_arrays()
    theirs = model.nerf().eval()
    theirs.fine.load_state_dict(model.from_keras(arrays))
    points, views = torch.randn(9, 1, 3), some_rays(9)[:, 6:9]
    yield Case(
        "the authors' arrays",
        lambda p, v, net=theirs: torch.cat([*(x.reshape(9, -1) for x in net.fine(p, v))], 1),
        lambda p, v: keras_forward(arrays, slow_encoding(p[:, 0], 10), slow_encoding(v, 4)),
        (points, views),
        "the TensorFlow network written in NumPy",
    )
    del theirs, full
    small = {
        "samples": 12,
        "fine_samples": 9,
        "depth": 4,
        "width": 32,
        "skip": 1,
        "position_octaves": 4,
        "direction_octaves": 2,
    }
    shape = (4, 32, 1, 4, 2)
    for noise, white, disparity in ((0.0, True, False), (1.0, False, False), (0.0, False, True)):
        net = model.NeRF(**small, noise=noise, white_background=white, in_disparity=disparity).train().double()
        plain = Plain(12, 9, noise, white, disparity, shape).double()
        yield Case(
            f"train: noise {noise:g}, {'white' if white else 'black'}, {'disparity' if disparity else 'depth'}",
            Seeded(net),
            Seeded(same_state(net, plain)),
            (some_rays(16).double(),),
            PORT,
            gradients=True,
            atol=1e-6,
            note="in double precision",
        )
    net = model.NeRF(**small).eval()
    near_zero = some_rays(5, 0.0, 1.0)
    yield Case("eval, from depth 0", net, same_state(net, Plain(12, 9, shape=shape)), (near_zero,), PORT)

    density, lengths = torch.rand(4, 9).double() * 3, torch.rand(4, 9).double()
    density[0] = 0
    yield Case(
        "weights",
        volume_rendering.ray_weights,
        slow_weights,
        (density, lengths),
        "eq. (3), sample by sample",
        gradients=True,
        atol=1e-10,
    )
    yield Case(
        "an even fog",
        lambda d: volume_rendering.ray_weights(d, torch.full_like(d, 0.25)).sum(1),
        lambda d: 1 - torch.exp(-2.0 * d[:, 0]),
        (torch.tensor([[0.3], [2.0]]).double().expand(2, 8).contiguous(),),
        "Beer and Lambert's law over a length of 2",
        atol=1e-10,
    )
    weights = slow_weights(density + 0.1, lengths).detach()
    yield Case(
        "colour, depth, opacity over white",
        lambda w, c, z: volume_rendering.composite(w, c, z, True),
        slow_composite,
        (weights, torch.rand(4, 9, 3).double(), torch.rand(4, 9).double().sort(1).values),
        "alpha compositing from back to front",
        gradients=True,
        atol=1e-9,
    )
    edges = torch.rand(6, 12).double().cumsum(1)
    heavy = torch.rand(6, 11).double() * (torch.rand(6, 11) < 0.6)
    yield Case(
        "inverse transform sampling",
        volume_rendering.invert_cdf,
        slow_inverse,
        (edges, heavy, torch.rand(6, 40).double()),
        f"numpy {np.__version__} interp",
        atol=1e-9,
    )
    x = torch.randn(11, 3).double()
    encoding = model.Encoding(10).double()
    yield Case("the encoding", encoding, lambda v: slow_encoding(v, 10), (x,), "eq. (4) with math.sin", atol=1e-9)

    pose = ray_block.looking(
        torch.tensor([1.0, -2.0, 0.7]), torch.tensor([0.0, 0.0, 1.0]), torch.tensor([2.0, -4.0, 1.4])
    )
    cameras = ray_block.Cameras(pose[None], torch.tensor([[9.0, 8.0, 4.0, 2.5]]), torch.tensor([[5, 8]]))
    yield Case(
        "rays of a camera",
        lambda c: cameras.all_rays(0, 2.0, 6.0)[:, :9],
        lambda c: slow_rays(cameras, 0),
        (0,),
        "pixel by pixel",
        note="origin, direction, viewing direction",
    )
    origins, directions = torch.randn(6, 3).double() * 0.3, torch.randn(6, 3).double() * 0.4
    directions[:, 2] = -1.0
    focal, sizes = torch.full((6, 2), 7.0).double(), torch.tensor([[6, 8]]).expand(6, 2)
    t = torch.rand(6, 1).double() * 5

    def along_ndc(o: Tensor, d: Tensor) -> Tensor:
        new_o, new_d = ray_block.ndc_rays(o, d, focal, sizes)
        z = o[:, 2:] + (-(1 + o[:, 2:]) / d[:, 2:] + t) * d[:, 2:]
        return new_o + (1 - -1.0 / z) * new_d  # appendix C: t' = 1 - o_z / (o_z + t d_z), with o on the near plane

    def through_the_matrix(o: Tensor, d: Tensor) -> Tensor:
        return projected(o + (-(1 + o[:, 2:]) / d[:, 2:] + t) * d, focal, sizes)

    yield Case(
        "normalised device coordinates",
        along_ndc,
        through_the_matrix,
        (origins, directions),
        "the projection matrix",
        atol=1e-9,
    )


def flat_field(net: model.NeRF) -> nn.Module:
    """The coarse field of the plain renderer, giving colours and densities apart."""
    plain = same_state(net, Plain()).coarse
    return Apart(plain)


class Apart(nn.Module):
    def __init__(self, field: PlainField) -> None:
        super().__init__()
        self.field = field

    def forward(self, points: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.field(points, views)
        return raw[..., :3], raw[..., 3]


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: 64 rays for each of a batch."""
    return {
        "nerf": Pair(model.nerf, Plain, lambda batch: (some_rays(64 * batch),), PORT, train_batch=4),
    }
