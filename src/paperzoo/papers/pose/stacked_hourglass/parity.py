"""Parity of the hourglasses: with the authors' PyTorch code (stored answers), with a version without modules, with loops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.pose.stacked_hourglass import golden, model

AUTHORS = "princeton-vl/pytorch_stacked_hourglass ceedc14"


def cases() -> Iterator[Case]:
    yield from stored()
    yield from without_modules()
    yield checkpoint()
    yield loss()


def stored() -> Iterator[Case]:
    """The authors' network with the same weights: outputs, loss and the norms of all kernels' gradients."""
    from safetensors.torch import load_file

    answers = load_file(golden.FILE)
    network = model.StackedHourglass(golden.STACKS, golden.KEYPOINTS, channels=golden.CHANNELS)
    ours = golden.answers(golden.write_weights(network), lambda net, x: net(x))
    for part in ("eval", "train"):
        kept = {k: v for k, v in ours.items() if (part == "eval") == k.endswith("eval")}
        theirs = {k: v for k, v in answers.items() if k in kept}
        theirs |= {k: torch.full_like(v, torch.nan) for k, v in kept.items() if k not in theirs}  # missing: fails
        yield Case(
            f"two stacks, {part}",
            lambda k=kept: k,
            lambda t=theirs: t,
            (),
            AUTHORS,
            rtol=1e-9,
            atol=1e-9,
            note="float64",
        )


# -- the network from its state alone ----------------------------------------------------------------------------------------


class Plain:
    """Forward by the paper's figures, from a state_dict, in eval."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.conv.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.conv.bias"], stride, weight.shape[-1] // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            self.state[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)

    def residual(self, x: Tensor, name: str) -> Tensor:
        y = x
        for i in (1, 2, 3):
            y = self.conv(self.norm(y, f"{name}.bn{i}"), f"{name}.conv{i}")
        return y + (self.conv(x, f"{name}.skip_layer") if f"{name}.skip_layer.conv.weight" in self.state else x)

    def hourglass(self, x: Tensor, name: str, order: int) -> Tensor:
        half = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
        low = self.residual(half, f"{name}.low1")
        low = self.hourglass(low, f"{name}.low2", order - 1) if order > 1 else self.residual(low, f"{name}.low2")
        low = self.residual(low, f"{name}.low3").repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.residual(x, f"{name}.up1") + low

    def __call__(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x, "pre.0", 2), "pre.0.bn")
        x = F.max_pool2d(self.residual(x, "pre.1"), 2)
        x = self.residual(self.residual(x, "pre.3"), "pre.4")
        maps = []
        for i in range(100):
            if f"outs.{i}.conv.weight" not in self.state:
                return torch.stack(maps, 1)
            features = self.residual(self.hourglass(x, f"hgs.{i}.0", 4), f"features.{i}.0")
            features = self.norm(self.conv(features, f"features.{i}.1"), f"features.{i}.1.bn")
            maps.append(self.conv(features, f"outs.{i}"))
            if f"merge_preds.{i}.conv.conv.weight" in self.state:
                x = x + self.conv(maps[-1], f"merge_preds.{i}.conv") + self.conv(features, f"merge_features.{i}.conv")
        raise AssertionError("unreachable")


def without_modules() -> Iterator[Case]:
    torch.manual_seed(0)
    for name, batch, size in (
        ("hg1", 2, (64, 64)),
        ("hg2", 1, (128, 192)),
        ("hg2_slim", 3, (64, 128)),
        ("hg8", 1, (64, 64)),
    ):
        network = getattr(model, name)(num_keypoints=7).eval()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.8, 1.2)
        x = torch.randn(batch, 3, *size)
        yield Case(
            f"{name} {batch} x {size}", network, Plain(network.state_dict()), (x,), "figures 3 and 4 without modules"
        )


def checkpoint() -> Case:
    """A state as the authors' training script saves it, with the shortcuts it does not use."""
    network = model.hg2()
    state = dict(network.state_dict())
    extra = {}
    for name, value in state.items():
        if name.endswith("conv3.conv.weight"):
            owner, channels = name.removesuffix(".conv3.conv.weight"), value.shape[0]
            if f"{owner}.skip_layer.conv.weight" not in state:
                extra[f"{owner}.skip_layer.conv.weight"] = torch.zeros(channels, channels, 1, 1)
                extra[f"{owner}.skip_layer.conv.bias"] = torch.zeros(channels)
    saved = {f"model.module.{k}": v for k, v in (state | extra).items()}
    count = sum(v.numel() for k, v in saved.items() if k.endswith(("weight", "bias")))
    return Case(
        "an authors' checkpoint",
        lambda: (model.from_official(saved), count),
        lambda: (state, 8_429_088),
        (),
        "the same tensors; the released 2-stack network has 8,429,088 parameters with those it does not use",
    )


def loss() -> Case:
    """Every stage against the same maps, empty ones where a joint is not annotated."""
    from types import SimpleNamespace

    from paperzoo.papers.pose.stacked_hourglass.recipe import PRESETS, RECIPE

    torch.manual_seed(0)
    points = torch.rand(2, 5, 2) * 64
    batch = {"images": torch.zeros(2, 3, 64, 64), "keypoints": points, "weight": torch.tensor([[1.0, 0, 1, 1, 1]] * 2)}
    recipe = SimpleNamespace(model=SimpleNamespace(), stride=4, config=PRESETS["published"])
    recipe.targets = lambda b: RECIPE.targets(recipe, b)

    def slow(outputs: Tensor) -> Tensor:
        maps = torch.zeros(2, 5, 16, 16)
        for b in range(2):
            for k in range(5):
                x, y = ((points[b, k] / 4) + 0.5).floor().tolist()
                for i in range(16):
                    for j in range(16):
                        square = (j - x) ** 2 + (i - y) ** 2
                        near = max(abs(j - x), abs(i - y)) <= 3
                        maps[b, k, i, j] = batch["weight"][b, k] * near * torch.exp(torch.tensor(-square / 2))
        return sum(0.5 * F.mse_loss(outputs[:, s], maps) for s in range(outputs.shape[1]))

    return Case(
        "intermediate supervision",
        lambda o: RECIPE.losses(recipe, o, batch)["heatmap"],
        slow,
        (torch.randn(2, 3, 5, 16, 16),),
        "loops over stages, joints and cells",
        gradients=True,
    )


def pairs() -> dict[str, Pair]:
    def reference() -> nn.Module:
        network = model.hg2()
        return PlainModule(network)

    return {
        "hg2": Pair(model.hg2, reference, lambda b: (torch.randn(b, 3, 256, 256),), "figures 3 and 4 without modules")
    }


class PlainModule(nn.Module):
    """`Plain` with parameters of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return Plain(dict(self.network.named_parameters()) | dict(self.network.named_buffers()))(x)
