"""Parity of BiSeNet: with CoinCheung's code (stored outputs), pytorchcv's modules, and figures 2 and 3 written out for Xception39."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.segmentation.bisenet_v1 import golden, model
from paperzoo.papers.segmentation.segnet.parity import lively

SOURCE = "github CoinCheung/BiSeNet, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    network = model.bisenet_v1_resnet18_released(golden.CLASSES).eval()
    network.load_state_dict(model.from_official(golden.by_rule(released_names(network.state_dict()))))
    yield Case(
        "released: logits of two photographs, all three heads",
        lambda x: {f"logits.{i}": o[:, :, ::5, ::5].detach() for i, o in enumerate(all_heads(network, x))},
        lambda x: {name: value for name, value in stored.items() if name.startswith("logits")},
        (golden.pictures(),),
        SOURCE,
        note="names converted; every fifth pixel",
    )
    yield Case(
        "released: losses and gradients of a training step",
        lambda: training_step(network),
        lambda: {name: value for name, value in stored.items() if not name.startswith("logits")},
        against=SOURCE,
        rtol=1e-6,
        atol=1e-10,
        note="in double precision; 50 values each of seven gradients",
    )
    yield from module_cases()
    for name, size, train in (
        ("bisenet_v1_xception39", (2, 3, 64, 96), False),
        ("bisenet_v1_xception39", (2, 3, 47, 70), False),
        ("bisenet_v1_resnet18", (1, 3, 33, 65), False),
        ("bisenet_v1_slim", (3, 3, 31, 40), True),
    ):
        net = lively(getattr(model, name)(3).double().eval())
        yield Case(
            f"{name} {'train' if train else 'eval'} {size}",
            (lambda x, n=net: n.train()(x)) if train else net,
            (lambda x, n=net: written_out(n.train(), x)) if train else (lambda x, n=net: written_out(n, x)["out"]),
            (torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),),
            "sec. 3 and fig. 2, line by line",
            gradients=train,
        )


def all_heads(network: model.BiSeNetV1, x: Tensor) -> list[Tensor]:
    """The logits of the three heads, with running statistics."""
    network.training = True  # of the network itself: its layers stay in eval
    output = network(x)
    network.training = False
    return [output["out"], *output["aux"]]


def training_step(network: model.BiSeNetV1) -> dict[str, Tensor]:
    network.double().train().zero_grad()
    output = network(golden.pictures().double())
    losses, loss = golden.step([output["out"], *output["aux"]])
    loss.backward()
    found = {"losses": losses.detach()}
    for name in golden.WATCHED:
        gradient = network.get_submodule(name.replace("cp.resnet", "cp.backbone.body")).weight.grad
        found[name] = gradient.flatten()[:: max(1, gradient.numel() // 50)]
    return found


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("cp.backbone.body.", "cp.resnet."): value for name, value in state.items()}


class Modules(nn.Module):
    """Refinement, fusion and heads on given maps, under pytorchcv's names of the parts."""

    def __init__(self) -> None:
        super().__init__()
        backbone = nn.Identity()
        backbone.stage_channels = [24, 40]
        self.context = model.ContextPath(backbone, 16)
        self.fusion = model.FeatureFusion(32, 32, reduction=4)
        self.head = model.Scores(32, 32, 5)

    def forward(self, fine: Tensor, middle: Tensor, last: Tensor) -> Tensor:
        context, _ = self.context.refine(middle, last, fine.shape[-2:])
        return self.head(self.fusion(fine, context))


PARTS = {
    "context.conv_avg": "pool.pool32.conv",
    "context.arm32.conv": "pool.pool16.att.conv1",
    "context.arm32.conv_atten": "pool.pool16.att.conv2.conv",
    "context.arm32.bn_atten": "pool.pool16.att.conv2.bn",
    "context.conv_head32": "pool.pool16.conv",
    "context.arm16.conv": "pool.pool8.att.conv1",
    "context.arm16.conv_atten": "pool.pool8.att.conv2.conv",
    "context.arm16.bn_atten": "pool.pool8.att.conv2.bn",
    "context.conv_head16": "pool.pool8.conv",
    "fusion.convblk": "pool.fusion.conv_merge",
    "fusion.conv1": "pool.fusion.conv1",
    "fusion.conv2": "pool.fusion.conv2",
    "head.conv": "head.conv1",
    "head.conv_out": "head.conv2",
}


def module_cases() -> Iterator[Case]:
    import pytorchcv
    from pytorchcv.models.bisenet import BiSeHead, PyramidPooling

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = PyramidPooling(x16_in_channels=24, x32_in_channels=40, y_out_channels=16, y32_out_size=None)
            self.head = BiSeHead(32, 32, 5)
            nn.init.zeros_(self.head.conv2.conv.bias) if hasattr(self.head.conv2, "conv") else None

        def forward(self, fine: Tensor, middle: Tensor, last: Tensor) -> Tensor:
            return self.head(self.pool(fine, middle, last)[0])

    torch.manual_seed(0)
    ours, theirs = lively(Modules().eval()), Theirs().eval()
    given = ours.state_dict()
    renamed = {}
    for part, name in PARTS.items():
        renamed |= {f"{name}{key.removeprefix(part)}": v for key, v in given.items() if key.startswith(f"{part}.")}
    unmatched = theirs.load_state_dict(renamed, strict=False)
    if unmatched.missing_keys or [name for name in unmatched.unexpected_keys if name != "head.conv2.bias"]:
        raise RuntimeError(f"the parts do not correspond: {unmatched}")
    nn.init.zeros_(ours.head.conv_out.bias)  # pytorchcv's head has none
    maps = (torch.randn(2, 16, 8, 12), torch.randn(2, 24, 4, 6), torch.randn(2, 40, 2, 3))
    for train in (False, True):
        yield Case(
            f"refinement, fusion and head, {'train' if train else 'eval'}",
            ours.train(train),
            theirs.train(train),
            maps,
            f"pytorchcv {pytorchcv.__version__} bisenet.PyramidPooling",
            gradients=True,
            note="the map of stride 8 stands for the spatial path's, which pytorchcv leaves out",
        )


# -- the network, line by line -------------------------------------------------------------------------------------------


def block(part: nn.Module, x: Tensor) -> Tensor:
    return part.bn(part.conv(x)).clamp(min=0)


def average(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2)[:, :, None, None] / (x.shape[2] * x.shape[3])


def separable(part: nn.Module, x: Tensor, relu: bool) -> Tensor:
    x = part.bn(F.conv2d(x, part.conv1.weight, stride=part.conv1.stride, padding=1, groups=x.shape[1]))
    x = part.point_wise_cbr.bn(F.conv2d(x, part.point_wise_cbr.conv.weight))
    return x.clamp(min=0) if relu else x


def two_last_maps(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    body = getattr(backbone, "body", backbone)
    if not isinstance(body, model.Xception39):
        return body.stages(x)[-2:]
    x = F.max_pool2d(block(body.conv1, x), 3, 2, 1)
    maps = []
    for layer in (body.layer1, body.layer2, body.layer3):
        for i, unit in enumerate(layer):
            shortcut = separable(unit.proj, x, relu=False) if i == 0 else x
            first, second, third = unit.residual_branch
            h = separable(second, separable(first, x, relu=True), relu=True)
            x = (separable(third, h, relu=False) + shortcut).clamp(min=0)
        maps.append(x)
    return maps[-2:]


def gated(arm: nn.Module, x: Tensor) -> Tensor:
    x = block(arm.conv, x)
    return x * torch.sigmoid(arm.bn_atten(arm.conv_atten(average(x))))


def nearest(x: Tensor, size: torch.Size) -> Tensor:
    rows = [i * x.shape[2] // size[0] for i in range(size[0])]
    columns = [i * x.shape[3] // size[1] for i in range(size[1])]
    return x[:, :, rows][:, :, :, columns]


def written_out(net: model.BiSeNetV1, x: Tensor) -> dict[str, Tensor]:
    spatial = x
    for i in range(net.sp.depth):
        spatial = block(getattr(net.sp, f"conv{i + 1}"), spatial)
    spatial = block(net.sp.conv_out, spatial)
    middle, last = two_last_maps(net.cp.backbone, x)
    tail = block(net.cp.conv_avg, average(last))
    coarse = block(net.cp.conv_head32, nearest(gated(net.cp.arm32, last) + tail, middle.shape[-2:]))
    context = block(net.cp.conv_head16, nearest(gated(net.cp.arm16, middle) + coarse, spatial.shape[-2:]))
    f = block(net.ffm.convblk, torch.cat([spatial, context], 1))
    fused = f + f * torch.sigmoid(net.ffm.conv2(net.ffm.conv1(average(f)).clamp(min=0)))
    outputs = [
        F.interpolate(head.conv_out(block(head.conv, y)), x.shape[-2:], mode="bilinear", align_corners=False)
        for head, y in ((net.conv_out, fused), (net.conv_out16, context), (net.conv_out32, coarse))
    ]
    return {"out": outputs[0], "aux": outputs[1:]}


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures. pytorchcv's network reads the ResNet's own map of stride 8 in place of a spatial path."""
    from pytorchcv.models.bisenet import bisenet_resnet18_celebamaskhq

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 256, 512),)

    def reference() -> nn.Module:
        return bisenet_resnet18_celebamaskhq(in_size=(256, 512))

    against = "pytorchcv:bisenet_resnet18_celebamaskhq, which has no spatial path"
    return {"bisenet_v1_resnet18": Pair(model.bisenet_v1_resnet18, reference, images, against, train_batch=2)}
