"""C3D against its layers written out, the port's way to build it, stated sizes, and the paper's video descriptor by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.video.c3d.model import C3D, c3d, from_official, video_descriptor

PORT = "mmaction2's C3D rebuilt of torch.nn layers, its names through from_official"


class Convolution(nn.Module):
    """mmcv's ConvModule without a norm: convolution and ReLU."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, (depth, 3, 3), padding=(depth // 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).clamp(min=0)


class Reference(nn.Module):
    """Fig. 3 as a chain of layers, with the parameter names of mmaction2's recogniser."""

    def __init__(self, widths: tuple[int, ...], hidden: int, seen: int, classes: int, depth: int) -> None:
        super().__init__()
        w = widths
        rows = [("1a", 3, w[0]), ("2a", w[0], w[1]), ("3a", w[1], w[2]), ("3b", w[2], w[2])]
        rows += [("4a", w[2], w[3]), ("4b", w[3], w[3]), ("5a", w[3], w[4]), ("5b", w[4], w[4])]
        self.backbone = nn.ModuleDict({f"conv{n}": Convolution(i, o, depth) for n, i, o in rows})
        self.backbone["fc6"], self.backbone["fc7"] = nn.Linear(seen, hidden), nn.Linear(hidden, hidden)
        self.cls_head = nn.ModuleDict({"fc_cls": nn.Linear(hidden, classes)})

    def forward(self, x: Tensor) -> Tensor:
        part, halve = self.backbone, nn.MaxPool3d(2)
        x = nn.MaxPool3d((1, 2, 2))(part["conv1a"](x))
        x = halve(part["conv2a"](x))
        x = halve(part["conv3b"](part["conv3a"](x)))
        x = halve(part["conv4b"](part["conv4a"](x)))
        x = nn.MaxPool3d(2, padding=(0, 1, 1))(part["conv5b"](part["conv5a"](x)))
        x = part["fc6"](x.reshape(len(x), -1)).clamp(min=0)
        return self.cls_head["fc_cls"](part["fc7"](x).clamp(min=0))


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for widths, hidden, size, frames, batch, depth in (
        ((3, 4, 5, 6, 7), 9, 112, 16, 1, 3),
        ((4, 4, 6, 6, 8), 8, 32, 32, 3, 3),
        ((4, 4, 6, 6, 8), 8, 48, 16, 2, 5),
    ):
        ours = C3D(widths, hidden, 11, 3, frames, size, depth).double().eval()
        reference = Reference(widths, hidden, ours.fc6.in_features, 11, depth).double()
        ours.load_state_dict(from_official(reference.state_dict()))
        names = {ours_name(n): n for n, _ in reference.named_parameters()}
        x = torch.randn(batch, 3, frames, size, size, dtype=torch.float64)
        yield Case(
            f"{batch} x {frames} frames of {size} pixels, kernels of {depth} frames: logits and all gradients",
            lambda x, net=ours, names=names: gradients_of(net, x, {n: n for n in names}),
            lambda x, net=reference, names=names: gradients_of(net, x, names),
            (x,),
            PORT,
        )
    small = C3D((2, 2, 3, 3, 4), 5, 4, 3, 16, 16).double().eval()
    x = torch.randn(1, 3, 16, 16, 16, dtype=torch.float64)
    yield Case(
        "a convolution", small.conv1, lambda x: slow(x, small.conv1), (x[:, :, :5, :6, :7],), "a loop over places"
    )
    flat = C3D((4, 4, 6, 6, 8), 8, 5, 3, 16, 32, depth=1).double().eval()
    clip = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64).expand(-1, -1, 16, -1, -1)
    yield Case(
        "kernels of one frame see a still as a picture",
        lambda: flat.maps(clip)[:, :, 0],
        lambda: picture(flat, clip[:, :, 0]),
        (),
        "sec. 3.2: depth 1 is a 2-D network on each frame",
    )
    video = torch.randn(3, 37, 16, 16, dtype=torch.float64)

    def by_hand() -> Tensor:
        every = [small.descriptor(video[None, :, start : start + 16])[0] for start in (0, 8, 16)]
        total = sum(every) / 3
        return total / total.square().sum().sqrt()

    yield Case(
        "the descriptor of a video",
        lambda: video_descriptor(small, video),
        by_hand,
        (),
        "sec. 3.3: fc6 of clips that overlap by 8",
    )
    with torch.device("meta"):
        of_ucf = c3d(num_classes=101)
    yield Case(
        "parameters on UCF101, millions",
        lambda: round(sum(p.numel() for p in of_ucf.parameters()) / 1e6, 1),
        lambda: 78.4,
        (),
        "mmaction2's table of models",
    )
    yield Case(
        "multiply-adds of a clip, billions",
        lambda: round(cost(of_ucf) / 1e9, 1),
        lambda: 38.5,
        (),
        "mmaction2's table of models",
    )


def ours_name(name: str) -> str:
    return next(iter(from_official({name: torch.zeros(1)})))


def gradients_of(net: nn.Module, x: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    """Logits, and the gradients of their mean square, by our names."""
    x = x.clone().requires_grad_(True)
    logits, own = net(x), dict(net.named_parameters())
    found = torch.autograd.grad(logits.square().mean(), [x, *(own[n] for n in names.values())])
    return {"logits": logits, "input": found[0], **dict(zip(names, found[1:], strict=True))}


def slow(x: Tensor, conv: nn.Conv3d) -> Tensor:
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1), (1, 1)))
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    out = np.zeros((len(x), len(bias), *x.shape[2:]))
    for t, i, j in np.ndindex(*x.shape[2:]):
        window = padded[:, None, :, t : t + 3, i : i + 3, j : j + 3]
        out[:, :, t, i, j] = (window * weight).sum((2, 3, 4, 5)) + bias
    return torch.from_numpy(out)


def picture(net: C3D, x: Tensor) -> Tensor:
    """`maps` of a network whose kernels see one frame, on one frame (B, C, H, W)."""
    for names in (("conv1",), ("conv2",), ("conv3a", "conv3b"), ("conv4a", "conv4b"), ("conv5a", "conv5b")):
        for name in names:
            layer = getattr(net, name)
            x = F.conv2d(x, layer.weight[:, :, 0], layer.bias, padding=1).relu()
        x = F.max_pool2d(x, 2, padding=1 if "conv5b" in names else 0)
    return x


def cost(net: nn.Module) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        net.eval()(torch.empty(1, 3, 16, 112, 112, device="meta"))
    return counter.get_total_flops() / 2


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""

    def clips(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 16, 112, 112),)

    def reference() -> nn.Module:
        return Reference((64, 128, 256, 512, 512), 4096, 8192, 487, 3)

    return {"c3d": Pair(c3d, reference, clips, "its layers in torch.nn", train_batch=1)}
