"""VoxelMorph against what the `voxelmorph` package 0.2 (PyTorch) answered (see golden.py), and against the paper's equations written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.data.registration_pairs import jacobians
from paperzoo.engine.parity import Case, Pair
from paperzoo.engine.runtime import Runtime
from paperzoo.papers.medical.voxelmorph import golden
from paperzoo.papers.medical.voxelmorph.model import PooledUnet, Registration, StridedUnet, from_official, vxm_dense
from paperzoo.papers.medical.voxelmorph.recipe import PRESETS, VoxelMorphRecipe, label_dice
from paperzoo.tasks import registration_measures as measure
from paperzoo.tasks.registration_volumes import PreparedPairs

SOURCE = "voxelmorph 0.2 (PyTorch), stored"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    stored = load_file(Path(__file__).with_name("golden.safetensors"))

    def make(dimensions: int, steps: int, downsize: int) -> Registration:
        return Registration(PooledUnet(dimensions, 2, *golden.FEATURES), dimensions, steps, downsize == 2)

    for name, network in golden.networks(make).items():
        dimensions = network.dimensions
        moving, fixed = golden.images(dimensions)
        wanted = {key: stored[f"{name}: {key}"] for key in ("displacement", "warped", "gradients")}
        yield Case(
            f"VxmDense, {name}",
            lambda m, f, net=network: answers(net, m, f),
            lambda *_, w=wanted: w,
            (moving, fixed),
            SOURCE,
        )
    for dimensions in (2, 3):
        moving, fixed = golden.images(dimensions)
        moving = 0.7 * fixed + 0.3 * moving
        wanted = [stored[f"ncc {dimensions}"], stored[f"ncc gradient {dimensions}"]]
        yield Case(
            f"local cross-correlation and its gradient, {dimensions}-D",
            lambda m, f: correlation_and_gradient(m, f),
            lambda *_, w=wanted: w,
            (moving, fixed),
            f"{SOURCE}: losses.NCC",
        )
    field = golden.fields(3)
    yield Case(
        "smoothness and its gradient",
        smoothness_and_gradient,
        lambda _: [stored["gradient loss"], stored["gradient loss, gradient"]],
        (field,),
        f"{SOURCE}: losses.Grad('l2')",
    )

    yield Case("fig. 3: the strided network", *strided(), "fig. 3, layer by layer with functions", gradients=True)
    small = Registration(StridedUnet(3, 2, (4, 4, 4), (4, 4, 4, 4, 4)), 3).eval()
    golden.filled(small, 3.0)
    a, b = torch.rand(2, 1, 13, 16, 9), torch.rand(2, 1, 13, 16, 9)
    yield Case("odd sizes", small, lambda m, f: padded(small, m, f), (a, b), "zeros added by numpy.pad, cut again")
    yield Case(
        "a checkpoint of the package",
        loaded,
        lambda: torch.zeros(1),
        (),
        "names and sizes of VxmDense's parameters, its grids left out",
    )

    image, move = torch.rand(2, 3, 5, 6, 4), 1.5 * torch.randn(2, 3, 5, 6, 4)
    yield Case(
        "warping (eq. 3)",
        measure.warp,
        warped_slowly,
        (image, move),
        "eq. 3 as a loop over voxels and their eight neighbours",
        gradients=True,
    )
    yield Case(
        "local cross-correlation (eq. 5)",
        measure.local_correlation,
        correlation_slowly,
        (torch.rand(1, 1, 8, 7, 6), torch.rand(1, 1, 8, 7, 6), 5),
        "eq. 5 with a loop over windows",
    )
    yield Case(
        "a gain does not matter",
        lambda x: measure.local_correlation(x, -3 * x, 5),
        lambda x: torch.tensor(1.0),
        (torch.rand(1, 1, 9, 9, 9),),
        "an identity",
        atol=2e-3,
    )
    yield Case(
        "Dice of labels (eq. 8)",
        lambda m, f, u: label_dice(m, f, u, 4),
        dice_slowly,
        (torch.randint(0, 4, (2, 5, 6, 4)), torch.randint(0, 4, (2, 5, 6, 4)), move),
        "eq. 8, one structure after the other",
    )
    yield Case(
        "Jacobian determinants",
        lambda u: jacobians(u, (1.0, 2.0, 3.0)),
        determinants,
        (torch.randn(3, 5, 6, 7, dtype=torch.float64),),
        "numpy.gradient and numpy.linalg.det",
    )
    yield Case(
        "a velocity integrates to a flow: v and -v undo each other",
        *undoing(),
        "an identity of scaling and squaring",
        atol=0.05,
    )
    yield Case(
        "instance-specific optimisation lowers its pair's objective",
        *refining(),
        "sec. III-E: gradient descent from the network's answer",
    )


def answers(network: Registration, moving: Tensor, fixed: Tensor) -> dict[str, Tensor]:
    """As golden.py makes them."""
    moving, fixed = moving.detach(), fixed.detach()
    output = network.train()(moving, fixed)
    found, raw = (output["displacement"], output["regularised"]) if isinstance(output, dict) else (output, output)
    network.zero_grad()
    warped = measure.warp(moving, found)
    (warped.square().mean() + found.square().mean() + raw.square().mean()).backward()
    gradients = torch.stack([p.grad.norm() for _, p in sorted(network.named_parameters())])
    shown = network.eval()(moving, fixed)
    return {"displacement": golden.some(shown), "warped": golden.some(warped), "gradients": golden.some(gradients)}


def correlation_and_gradient(moving: Tensor, fixed: Tensor) -> list[Tensor]:
    moving = moving.detach().requires_grad_(True)
    value = -measure.local_correlation(fixed, moving)
    return [value.detach()[None], golden.some(torch.autograd.grad(value, moving)[0])]


def smoothness_and_gradient(field: Tensor) -> list[Tensor]:
    field = field.detach().requires_grad_(True)
    value = measure.roughness(field)
    return [value.detach()[None], golden.some(torch.autograd.grad(value, field)[0])]


def strided() -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Our network, fig. 3 spelled out with the same parameters, and inputs."""
    ours = Registration(StridedUnet(2, 2, (4, 6, 6, 6), (8, 7, 6, 5, 4, 3, 2)), 2)
    golden.filled(ours.double(), 1.4)

    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet_model, self.flow = ours.unet_model, ours.flow

        def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
            u = self.unet_model

            def conv(block: nn.Module, x: Tensor, stride: int = 1) -> Tensor:
                y = F.conv2d(x, block.main.weight, block.main.bias, stride, 1)
                return torch.where(y > 0, y, 0.2 * y)

            def up(x: Tensor) -> Tensor:
                return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

            full = torch.cat([moving, fixed], 1)
            half = conv(u.enc[0], full, 2)
            quarter = conv(u.enc[1], half, 2)
            eighth = conv(u.enc[2], quarter, 2)
            y = conv(u.dec[0], conv(u.enc[3], eighth, 2))
            y = conv(u.dec[1], torch.cat([up(y), eighth], 1))
            y = conv(u.dec[2], torch.cat([up(y), quarter], 1))
            y = conv(u.dec[4], conv(u.dec[3], torch.cat([up(y), half], 1)))
            y = conv(u.vm2_conv, conv(u.dec[5], torch.cat([up(y), full], 1)))
            return F.conv2d(y, self.flow.weight, self.flow.bias, 1, 1)

    return ours, Literal(), tuple(torch.rand(3, 1, 32, 16, dtype=torch.float64) for _ in range(2))


def padded(network: Registration, moving: Tensor, fixed: Tensor) -> Tensor:
    big = [torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 3), (0, 0), (0, 7)))) for x in (moving, fixed)]
    return network(*big)[:, :, :13, :, :9]


def loaded() -> Tensor:
    """The package's names for its default network, as its checkpoints have them."""
    blocks = [("encoder", i, a, b) for i, (a, b) in enumerate(((2, 16), (16, 32), (32, 32), (32, 32)))]
    blocks += [("decoder", i, a, b) for i, (a, b) in enumerate(((32, 32), (64, 32), (64, 32), (64, 32)))]
    state = {}
    for part, i, a, b in blocks:
        state |= {
            f"unet_model.{part}.{i}.0.main.weight": torch.zeros(b, a, 3, 3, 3),
            f"unet_model.{part}.{i}.0.main.bias": torch.zeros(b),
        }
    for i, (a, b) in enumerate(((48, 32), (32, 16), (16, 16))):
        state |= {
            f"unet_model.remaining.{i}.main.weight": torch.zeros(b, a, 3, 3, 3),
            f"unet_model.remaining.{i}.main.bias": torch.zeros(b),
        }
    state |= {
        "flow.weight": torch.zeros(3, 16, 3, 3, 3),
        "flow.bias": torch.zeros(3),
        "transformer.grid": torch.zeros(1),
        "integrate.transformer.grid": torch.zeros(1),
    }
    network = vxm_dense()
    network.load_state_dict(from_official(state))
    return sum(p.abs().sum() for p in network.parameters()).detach()[None]


def warped_slowly(image: Tensor, move: Tensor) -> Tensor:
    size = image.shape[2:]
    lines = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")).float()
    at = lines + move
    low = at.detach().floor()
    out = torch.zeros_like(image)
    for corner in torch.cartesian_prod(*[torch.tensor([0, 1])] * 3):
        place = low + corner.view(3, 1, 1, 1)
        weight = (1 - (at - place).abs()).prod(1)
        inside = torch.stack([(place[:, a] >= 0) & (place[:, a] < n) for a, n in enumerate(size)]).all(0)
        index = [place[:, a].long().clamp(0, n - 1) for a, n in enumerate(size)]
        read = torch.stack([image[b][:, index[0][b], index[1][b], index[2][b]] for b in range(len(image))])
        out = out + read * (weight * inside)[:, None]
    return out


def correlation_slowly(fixed: Tensor, warped: Tensor, window: int) -> Tensor:
    reach, size, total = window // 2, fixed.shape[2:], []
    a, b = (F.pad(x[0, 0].double(), [reach] * 6) for x in (fixed, warped))
    for place in np.ndindex(*size):
        p, q = (x[tuple(slice(i, i + window) for i in place)] for x in (a, b))
        p, q = p - p.mean(), q - q.mean()
        total.append((p * q).sum() ** 2 / ((p * p).sum() * (q * q).sum() + 1e-5))
    return torch.stack(total).mean()


def dice_slowly(moving: Tensor, fixed: Tensor, move: Tensor) -> Tensor:
    found = []
    for b in range(len(moving)):
        for k in range(1, 4):
            s = warped_slowly((moving[b] == k)[None, None].float(), move[b : b + 1])[0, 0]
            t = (fixed[b] == k).float()
            found.append(2 * (s * t).sum() / (s.sum() + t.sum()))
    return -torch.stack(found).mean()


def determinants(field: Tensor) -> Tensor:
    rows = [np.stack(np.gradient(field[k].numpy(), 1.0, 2.0, 3.0), -1) for k in range(3)]
    return torch.from_numpy(np.linalg.det(np.stack(rows, -2) + np.eye(3)))


def undoing() -> tuple:
    smooth = F.interpolate(0.3 * torch.randn(1, 3, 4, 4, 4), size=(24, 24, 24), mode="trilinear", align_corners=True)

    def there_and_back(v: Tensor) -> Tensor:
        there, back = measure.integrate(v, 7), measure.integrate(-v, 7)
        return (there + measure.warp(back, there))[..., 4:-4, 4:-4, 4:-4]

    return there_and_back, lambda v: torch.zeros(1, 3, 16, 16, 16), (smooth,)


def refining() -> tuple:
    recipe = VoxelMorphRecipe(replace(PRESETS["embedded"], instance_steps=6, label_weight=0.0), Runtime(seed=0))
    moving, fixed, *_ = (x[None] for x in PreparedPairs(recipe.train_set, recipe.config, recipe.facts)[0])

    def ours() -> Tensor:
        start = torch.zeros(1, 3, *moving.shape[2:])
        first = recipe.objective(moving, fixed, start)[0]
        return (recipe.objective(moving, fixed, recipe.refined(moving, fixed, start))[0] < first).float()

    return ours, lambda: torch.tensor(1.0), ()


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: the package itself is of another Python, so MONAI's registration U-Net, which is somewhat narrower, is the peer."""
    import monai
    from monai.networks.nets import VoxelMorphUNet

    def volumes(batch: int) -> tuple[Tensor, Tensor]:
        return torch.rand(batch, 1, 32, 32, 32), torch.rand(batch, 1, 32, 32, 32)

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = VoxelMorphUNet(3, 2, 32, (16, 32, 32, 32, 32, 32), (16, 16))

        def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
            return self.net(torch.cat([moving, fixed], 1))

    return {
        "vxm_dense": Pair(
            lambda: vxm_dense(integration_steps=0),
            Reference,
            volumes,
            f"monai:VoxelMorphUNet {monai.__version__}",
            train_batch=2,
        )
    }
