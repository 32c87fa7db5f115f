"""FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows (arXiv 2111.07677).

Features of a pretrained, frozen network at three depths are mapped, each by an invertible network of convolutions, to maps that are to
be standard normal for normal images. Where the likelihood is low, there is something that was not seen. As the flow is convolutional,
it keeps the place of what it sees.

The paper leaves much open. What it does not say follows the implementation that reproduces its figures (gathierry/FastFlow, which
anomalib took over): a learned layer norm before each flow, soft clamping of the scales, a learned scale and offset of each channel
and a fixed permutation in each step (FrEIA's AllInOneBlock). `from_official` reads those checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.first_stages import FirstStages
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.classification.wide_resnet.model import wide_resnet50_2

SCALE_AT_ONE = 2 * math.log(math.exp(5) - 1)  # the value whose `scale` is one

# -- the flow (sec. 3.2, 3.3) --------------------------------------------------------------------------------------------


class FlowStep(nn.Module):
    """An affine coupling, a scale and offset of each channel, a permutation: (B, C, H, W) <-> (B, C, H, W).

    y_b = exp(s(y_a)) y_b + t(y_a), where y_a are the first half of the channels (rounded up) and y_b the others; s is kept in
    (-clamp, clamp) by a tanh, and what the subnet gives is first divided by ten, so that training begins near the identity.

    Args:
        channels: C, at least 2.
        kernel_size: of the subnet's two convolutions.
        hidden_ratio: of the subnet's hidden channels to its inputs.
        clamp: bound of the logarithm of a scale.
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, channels: int, kernel_size: int, hidden_ratio: float = 1.0, clamp: float = 2.0) -> None:
        super().__init__()
        self.passive, self.clamp = channels - channels // 2, clamp
        active, hidden = channels // 2, int(self.passive * hidden_ratio)
        self.subnet = nn.Sequential(
            nn.Conv2d(self.passive, hidden, kernel_size, padding="same"),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * active, kernel_size, padding="same"),
        )
        self.global_scale = nn.Parameter(torch.full((1, channels, 1, 1), SCALE_AT_ONE))
        self.global_offset = nn.Parameter(torch.zeros(1, channels, 1, 1))
        order = torch.randperm(channels)
        self.register_buffer("permutation", order)
        self.register_buffer("inverse_permutation", order.argsort())

    def coupling(self, y_a: Tensor) -> tuple[Tensor, Tensor]:
        """log s and t for the active half."""
        log_scale, shift = (0.1 * self.subnet(y_a)).chunk(2, 1)
        return self.clamp * log_scale.tanh(), shift

    def scale(self) -> Tensor:
        return 0.1 * F.softplus(self.global_scale, beta=0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed maps, and the logarithm of the Jacobian's determinant (B,)."""
        x_a, x_b = x[:, : self.passive], x[:, self.passive :]
        log_scale, shift = self.coupling(x_a)
        y = torch.cat([x_a, x_b * log_scale.exp() + shift], 1)
        scale = self.scale()
        y = (y * scale + self.global_offset).index_select(1, self.permutation)
        places = x.shape[2] * x.shape[3]
        return y, log_scale.sum((1, 2, 3)) + places * scale.log().sum()

    def inverse(self, y: Tensor) -> Tensor:
        y = (y.index_select(1, self.inverse_permutation) - self.global_offset) / self.scale()
        y_a, y_b = y[:, : self.passive], y[:, self.passive :]
        log_scale, shift = self.coupling(y_a)
        return torch.cat([y_a, (y_b - shift) * (-log_scale).exp()], 1)


class Flow2d(nn.Module):
    """Steps one after the other, with kernels of 3 and 1 in turn: x -> z and the log-determinant (B,).

    Args:
        channels: of the maps.
        steps: how many.
        only_3x3: no 1x1 kernels.
        hidden_ratio, clamp: see `FlowStep`.
    """

    def __init__(
        self, channels: int, steps: int = 8, only_3x3: bool = False, hidden_ratio: float = 1.0, clamp: float = 2.0
    ) -> None:
        super().__init__()
        kernels = [3 if only_3x3 or i % 2 == 0 else 1 for i in range(steps)]
        self.steps = nn.ModuleList([FlowStep(channels, kernel, hidden_ratio, clamp) for kernel in kernels])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for step in self.steps:
            x, log_determinant = step(x)
            parts.append(log_determinant)
        return x, torch.stack(parts).sum(0)

    def inverse(self, z: Tensor) -> Tensor:
        for step in reversed(self.steps):
            z = step.inverse(z)
        return z


def flow_loss(z: Sequence[Tensor], log_determinants: Sequence[Tensor]) -> Tensor:
    """The negative log-likelihood (eq. 1) without its constant: summed over depths, channels and places, averaged over the batch: ()."""
    pairs = zip(z, log_determinants, strict=True)
    return torch.stack([(0.5 * x.square().sum((1, 2, 3)) - d).mean() for x, d in pairs]).sum()


def likelihood_map(z: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Minus the mean over depths of exp(mean over channels of log p(z)), constants left out: in [-1, 0], (B, *size)."""
    likely = [(-0.5 * x.square().mean(1, keepdim=True)).exp() for x in z]
    fine = [F.interpolate(x, size=tuple(size), mode="bilinear")[:, 0] for x in likely]
    return -torch.stack(fine).mean(0)


# -- the network ---------------------------------------------------------------------------------------------------------


class FastFlow(nn.Module):
    """Images (B, 3, S, S) -> {"map": (B, S, S), "score": (B,)}, in [-1, 0]; the score is the map's maximum.

    Args:
        backbone: images -> maps of several depths; has `stage_channels`, `stage_strides` and `load_classifier`.
        image_size: S in pixels, a multiple of the strides; the layer norms have a weight for each channel at each place.
        steps, only_3x3, hidden_ratio, clamp: see `Flow2d`.

    The backbone stays in evaluation mode. The buffer `threshold` () is the score from which an image counts as anomalous.
    """

    threshold: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int = 256,
        steps: int = 8,
        only_3x3: bool = False,
        hidden_ratio: float = 1.0,
        clamp: float = 2.0,
    ) -> None:
        super().__init__()
        for stride in backbone.stage_strides:
            if image_size % stride:
                raise ValueError(f"image_size must be a multiple of {backbone.stage_strides[-1]}, got {image_size}")
        self.backbone, self.image_size = backbone, image_size
        places = [image_size // stride for stride in backbone.stage_strides]
        pairs = list(zip(backbone.stage_channels, places, strict=True))
        self.norms = nn.ModuleList([nn.LayerNorm([channels, side, side]) for channels, side in pairs])
        self.flows = nn.ModuleList([Flow2d(c, steps, only_3x3, hidden_ratio, clamp) for c in backbone.stage_channels])
        self.register_buffer("threshold", torch.tensor(float("inf")))
        self.backbone.eval()

    def train(self, mode: bool = True) -> FastFlow:
        super().train(mode)
        self.backbone.eval()
        return self

    def learned(self) -> list[nn.Parameter]:
        """What is trained: the layer norms and the flows."""
        return [*self.norms.parameters(), *self.flows.parameters()]

    def flow(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """z and the log-determinant for each depth: lists of (B, C_l, h_l, w_l) and (B,)."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images must be {self.image_size} x {self.image_size}, got {tuple(x.shape[-2:])}")
        with torch.no_grad():
            maps = self.backbone(x)
        parts = zip(self.flows, self.norms, maps, strict=True)
        z, log_determinants = zip(*[flow(norm(features)) for flow, norm, features in parts], strict=True)
        return list(z), list(log_determinants)

    def loss(self, x: Tensor) -> Tensor:
        return flow_loss(*self.flow(x))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        heat = likelihood_map(self.flow(x)[0], x.shape[-2:])
        return {"map": heat, "score": heat.amax((1, 2))}

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Take over a ResNet classifier (its state dict), whose layer4 and dense layer are not used."""
        self.backbone.load_classifier(state)


def fastflow_resnet18(
    image_size: int = 256, steps: int = 8, only_3x3: bool = True, hidden_ratio: float = 1.0, clamp: float = 2.0
) -> FastFlow:
    """On ResNet-18; only 3x3 kernels, as the public configuration has it."""
    return FastFlow(FirstStages(resnet18()), image_size, steps, only_3x3, hidden_ratio, clamp)


def fastflow_wide_resnet50_2(
    image_size: int = 256, steps: int = 8, only_3x3: bool = False, hidden_ratio: float = 1.0, clamp: float = 2.0
) -> FastFlow:
    """On WideResNet-50-2; kernels of 3 and 1 in turn."""
    return FastFlow(FirstStages(wide_resnet50_2()), image_size, steps, only_3x3, hidden_ratio, clamp)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """gathierry's (`nf_flows.…`) or anomalib's (`fast_flow_blocks.…`) weights to these names; others come through unchanged.

    Permutations, matrices there, become indices. The backbone, timm's with `features_only`, is kept but for its unused layer4.
    """
    renamed: dict[str, Tensor] = {}
    for full, value in state_dict.items():
        name = full.removeprefix("model.")
        if name.startswith("feature_extractor."):
            if ".layer4." not in name and not name.startswith("feature_extractor.fc."):
                renamed[name.replace("feature_extractor.", "backbone.", 1)] = value
        elif name.startswith(("nf_flows.", "fast_flow_blocks.")):
            _, rest = name.split(".", 1)
            place = "flows." + rest.replace(".module_list.", ".steps.")
            if place.endswith(".w_perm"):
                order = value.flatten(1).argmax(1)
                renamed[place.replace("w_perm", "permutation")] = order
                renamed[place.replace("w_perm", "inverse_permutation")] = order.argsort()
            elif not place.endswith((".w_perm_inv", ".last_jac")):
                renamed[place] = value
        else:
            renamed[name] = value
    return renamed
