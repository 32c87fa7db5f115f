"""The two operators against plain ones, loops over taps and bins, and finite differences; the networks against plain ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.engine.weights import parameter_count
from paperzoo.papers.detection.deformable_convnets import model as deformable
from paperzoo.papers.detection.deformable_convnets.model import DeformableConv2d, DeformableRoIPool, pool_shifted


def cases() -> Iterator[Case]:
    import torchvision
    from torchvision.models import resnet50 as their_resnet50
    from torchvision.ops import roi_align

    torch.manual_seed(0)
    for stride, dilation, groups in ((1, 1, 1), (2, 1, 2), (1, 2, 4)):
        layer = wandering(DeformableConv2d(4, 6, 3, stride, dilation, dilation, deformable_groups=groups)).double()
        x = torch.randn(2, 4, 7, 9).double()
        name = f"deformable convolution, stride {stride}, dilation {dilation}, {groups} groups"
        yield Case(name, layer, Literal(layer), (x,), "eq. 2 and 3, one tap at a time", gradients=True)
        yield Case(
            f"{name}, as exported",
            compiled(layer),
            layer,
            (x,),
            f"torchvision {torchvision.__version__} ops.deform_conv2d",
        )
    layer = DeformableConv2d(4, 6, 3, 1, 2, 2)
    plain = nn.Conv2d(4, 6, 3, 1, 2, 2)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "offset" not in k})
    yield Case(
        "no offsets: the plain convolution", layer, plain, (torch.randn(2, 4, 8, 6),), "sec. 2.1", gradients=True
    )

    maps, regions = torch.randn(2, 5, 12, 10), torch.tensor(REGIONS)
    yield Case(
        "no offsets: RoIAlign",
        lambda m: pool_shifted(m, regions, None, 7, 1 / 16),
        lambda m: roi_align(m, regions, 7, 1 / 16, 4, True),
        (maps,),
        f"torchvision {torchvision.__version__} ops.roi_align",
        gradients=True,
    )
    offsets = 20 * torch.randn(len(regions), 2, 3, 3)
    for name, function in (("", pool_shifted), (", as exported", compiled(pool_shifted))):
        yield Case(
            f"bins with offsets{name}",
            lambda m, o, f=function: f(m, regions.double(), o, 3, 1 / 16, 2),
            lambda m, o: bin_by_bin(m, regions.double(), o, 3, 1 / 16, 2),
            (maps.double(), offsets.double()),
            "eq. 6, one place at a time",
            gradients=True,
        )
    pool = DeformableRoIPool(5, 3, 16)
    nn.init.normal_(pool.offset_fc.weight, std=0.3)
    yield Case(
        "offsets grow with the region",
        lambda: pool.offsets(maps, torch.tensor([[0.0, 0, 0, 64, 96]])),
        lambda: by_hand(pool, maps),
        against="sec. 2.2: gamma (w, h) times the layer's output, by hand",
    )

    reference = their_resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    ours = deformable.deformable_resnet50(dilate=True).eval()
    ours.load_state_dict(deformable.from_official(reference.state_dict()))
    # theirs leaves the first block of the stage undilated
    reference.layer4[0].conv2.dilation = reference.layer4[0].conv2.padding = (2, 2)
    x = torch.randn(2, 3, 97, 130)
    yield Case("a plain ResNet-50's weights, dilated", ours, reference, (x,), "torchvision resnet50")
    reference = their_resnet50().eval()
    ours = deformable.deformable_resnet50(dilate=False).eval()
    ours.load_state_dict(deformable.from_official(reference.state_dict()))
    yield Case("a plain ResNet-50's weights, stride 32", ours, reference, (x,), "torchvision resnet50")
    yield Case(
        "parameters of the offsets in res5",
        lambda: on_meta(deformable.deformable_resnet50) - on_meta(deformable.resnet50),
        lambda: 3 * (512 * 18 * 9 + 18),
        against="sec. 2.1: three convolutions of 3 x 3 to 18 channels",
    )
    yield Case("one deformable layer learns to follow a shift", followed, lambda: True, against="sec. 2.1")


REGIONS = [[0.0, 3, 4, 90, 100], [1, -5, 10, 70, 60], [1, 20, 20, 21, 21], [0, 150, 150, 200, 190], [0, 0, 0, 160, 192]]


def wandering(layer: DeformableConv2d) -> DeformableConv2d:
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    nn.init.normal_(layer.conv_offset.bias, std=0.7)
    return layer


def compiled(function):
    def call(*arguments):
        with patch("torch.compiler.is_compiling", lambda: True):
            return function(*arguments)

    return call


def at(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Eq. 3 and 4 on a plane (C, H, W): the sum of max(0, 1 - |y - q_y|) max(0, 1 - |x - q_x|) over all its pixels."""
    rows, columns = (torch.arange(n, dtype=plane.dtype) for n in plane.shape[1:])
    weight = (1 - (y - rows).abs()).clamp(min=0)[:, None] * (1 - (x - columns).abs()).clamp(min=0)
    return (plane * weight).sum((1, 2))


class Literal(nn.Module):
    """A deformable convolution, one place and one tap at a time. Holds the layer, so that parameters share their names."""

    def __init__(self, layer: DeformableConv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.conv_offset = layer.weight, layer.bias, layer.conv_offset
        self.layer = [layer]  # not registered: its parameters are above

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        offset = self.conv_offset(x)
        share, results = x.shape[1] // layer.deformable_groups, []
        for b in range(len(x)):
            for i in range(offset.shape[2]):
                for j in range(offset.shape[3]):
                    total = self.bias
                    for g in range(layer.deformable_groups):
                        channels = slice(g * share, (g + 1) * share)
                        for n in range(9):
                            dy, dx = offset[b, 18 * g + 2 * n, i, j], offset[b, 18 * g + 2 * n + 1, i, j]
                            y = i * layer.stride[0] - layer.padding[0] + n // 3 * layer.dilation[0] + dy
                            z = j * layer.stride[1] - layer.padding[1] + n % 3 * layer.dilation[1] + dx
                            total = total + self.weight[:, channels, n // 3, n % 3] @ at(x[b, channels], y, z)
                    results.append(total)
        shape = (len(x), *offset.shape[2:], len(self.weight))
        return torch.stack(results).reshape(shape).permute(0, 3, 1, 2)


def bin_by_bin(maps: Tensor, regions: Tensor, offsets: Tensor, k: int, scale: float, samples: int) -> Tensor:
    height, width = maps.shape[2:]
    results = []
    for region, offset in zip(regions, offsets, strict=True):
        x1, y1, x2, y2 = (region[1:] * scale - 0.5).tolist()
        for i in range(k):
            for j in range(k):
                total = torch.zeros(maps.shape[1], dtype=maps.dtype)
                for u in range(samples):
                    for v in range(samples):
                        y = y1 + (i + (u + 0.5) / samples) * (y2 - y1) / k + offset[0, i, j] * scale
                        x = x1 + (j + (v + 0.5) / samples) * (x2 - x1) / k + offset[1, i, j] * scale
                        if -1 <= y <= height and -1 <= x <= width:
                            plane = maps[int(region[0])]
                            total = total + at(plane, y.clamp(0, height - 1), x.clamp(0, width - 1)) / samples**2
                results.append(total)
    return torch.stack(results).reshape(len(regions), k, k, -1).permute(0, 3, 1, 2)


def by_hand(pool: DeformableRoIPool, maps: Tensor) -> Tensor:
    region = torch.tensor([[0.0, 0, 0, 64, 96]])
    answer = pool.offset_fc(pool_shifted(maps, region, None, 3, 1 / 16).flatten(1)).reshape(1, 2, 3, 3)
    return torch.stack([0.1 * 96 * answer[:, 0], 0.1 * 64 * answer[:, 1]], dim=1)


def followed() -> bool:
    """A picture is moved by two pixels; a layer that may only move its one tap finds that out."""
    torch.manual_seed(0)
    layer = DeformableConv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    layer.weight.requires_grad_(False)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    steps = torch.linspace(0, 4 * math.pi, 24)
    for _ in range(150):
        shift = torch.rand(8, 1, 1, 1) * 6
        wide = (steps[:, None] * 0.7 + shift).sin() + (steps * 0.5 + shift).cos()
        loss = (layer(wide[..., 2:-2])[..., 3:-3, 3:-3] - wide[..., 4:][..., 3:-3, 3:-3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    row, column = layer.conv_offset(wide[..., 2:-2])[..., 3:-3, 3:-3].mean((0, 2, 3)).tolist()
    return abs(row) < 0.3 and abs(column - 2) < 0.3


def on_meta(make) -> int:
    with torch.device("meta"):
        return parameter_count(make())


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: ResNet-50 with torchvision's operator set into torchvision's network."""

    def theirs() -> nn.Module:
        from torchvision.models import resnet50
        from torchvision.ops import DeformConv2d

        class Layer(nn.Module):
            def __init__(self, plain: nn.Conv2d) -> None:
                super().__init__()
                shape = (plain.in_channels, plain.out_channels, 3, 1, 2, 2)
                self.conv = DeformConv2d(*shape, bias=False)
                self.offset = nn.Conv2d(plain.in_channels, 18, 3, 1, 2, 2)
                nn.init.zeros_(self.offset.weight)
                nn.init.zeros_(self.offset.bias)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x, self.offset(x))

        network = resnet50(replace_stride_with_dilation=[False, False, True])
        for block in network.layer4:
            block.conv2 = Layer(block.conv2)
        return network

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    return {
        "deformable_resnet50": Pair(
            deformable.deformable_resnet50, theirs, images, "torchvision:resnet50 with ops.DeformConv2d", train_batch=4
        )
    }
