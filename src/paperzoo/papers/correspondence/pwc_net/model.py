"""PWC-Net: optical flow by a feature pyramid, warping and cost volumes (Sun et al., CVPR 2018, arXiv:1709.02371), sec. 3.

    model(first, second)    two pictures (B, 3, H, W) in [0, 1], RGB, of any equal size
        in eval             the flow (B, 2, H, W) in pixels, from the first picture to the second
        in training         flows (B, 2, H / 2^l, W / 2^l) of the levels l = 2 … 6, finest first, in twentieths of a pixel of the picture

Parameter names are those of the authors' PyTorch code, so that their file loads; see `from_official`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.cost_volume import local_correlation
from paperzoo.blocks.precision import full_precision
from paperzoo.blocks.warping import backward_warp

FINEST = 2  # the level that the flow is estimated down to: a quarter of the picture
SCALE = 20.0  # the ground truth is divided by it, on every level alike (sec. 4)


def conv(inside: int, outside: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, dilation, dilation), nn.LeakyReLU(0.1))


class PWCNet(nn.Module):
    """See the module's docstring.

    Args:
        widths: channels of the pyramid's levels from 1 on; the last level is where the search begins.
        convolutions: of each level, 2 as in the paper's appendix or 3 as in the released weights.
        estimator: channels of an optical flow estimator's layers.
        dense: each of them also sees the inputs of those before it.
        context: channels of the context network's layers; none leaves it out.
        displacement: range of the cost volumes, in cells of a level.
        standardise: each channel of a pair's maps gets the mean 0 and the deviation 1 before they are compared. Not of the paper, whose features find their
            range in a million steps; of UFlow (Jonschkowski et al. 2020), and for learning that has a hundred.
        in_channels: of one picture.
    """

    dilations = (1, 2, 4, 8, 16, 1)

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64, 96, 128, 196),
        convolutions: int = 3,
        estimator: Sequence[int] = (128, 128, 96, 64, 32),
        dense: bool = True,
        context: Sequence[int] = (128, 128, 128, 96, 64, 32),
        displacement: int = 4,
        standardise: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(widths) <= FINEST:
            raise ValueError(f"widths has {len(widths)} levels; at least {FINEST + 1} are needed")
        if convolutions not in (2, 3):
            raise ValueError(f"convolutions is {convolutions}; it must be 2 or 3")
        if len(context) > len(self.dilations):
            raise ValueError(f"context has {len(context)} layers; at most {len(self.dilations)}, besides the last one")
        self.levels, self.displacement, self.dense, self.standardise = len(widths), displacement, dense, standardise
        self.divisor = 2**self.levels  # sizes that leave no remainder on any level
        self.estimator_layers, self.context_layers = len(estimator), len(context)
        self.convolutions = convolutions

        before = in_channels
        for level, width in enumerate(widths, 1):
            for i, name in enumerate(self.pyramid_names(level)):
                self.add_module(name, conv(before if i == 0 else width, width, stride=2 if i == 0 else 1))
            before = width

        for level in range(self.levels, FINEST - 1, -1):
            seen = (2 * displacement + 1) ** 2
            seen += widths[level - 1] + 4 if level < self.levels else 0
            for i, width in enumerate(estimator):
                self.add_module(f"conv{level}_{i}", conv(seen, width))
                seen = seen + width if dense else width
            self.add_module(f"predict_flow{level}", nn.Conv2d(seen, 2, 3, padding=1))
            if level > FINEST:
                self.add_module(f"deconv{level}", nn.ConvTranspose2d(2, 2, 4, 2, 1))
                self.add_module(f"upfeat{level}", nn.ConvTranspose2d(seen, 2, 4, 2, 1))

        for i, width in enumerate(context):
            self.add_module(f"dc_conv{i + 1}", conv(seen, width, dilation=self.dilations[i]))
            seen = width
        if context:
            self.add_module(f"dc_conv{len(context) + 1}", nn.Conv2d(seen, 2, 3, padding=1))

        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in")
                nn.init.zeros_(module.bias)

    def pyramid_names(self, level: int) -> list[str]:
        """A level's convolutions in their order; in the released weights the last level's names are turned around."""
        if self.convolutions == 2:
            return [f"conv{level}a", f"conv{level}b"]
        return [f"conv{level}aa", f"conv{level}a", f"conv{level}b"] if level == 6 else [
            f"conv{level}a", f"conv{level}aa", f"conv{level}b"]  # fmt: skip

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Maps of the levels 1, 2, …: (B, width, H / 2^l, W / 2^l)."""
        maps = []
        for level in range(1, self.levels + 1):
            for name in self.pyramid_names(level):
                x = self.get_submodule(name)(x)
            maps.append(x)
        return maps

    def estimate(self, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A level's optical flow estimator: its input (B, …, h, w) -> features (B, …, h, w) and flow (B, 2, h, w)."""
        for i in range(self.estimator_layers):
            y = self.get_submodule(f"conv{level}_{i}")(x)
            x = torch.cat([y, x], 1) if self.dense else y
        return x, self.get_submodule(f"predict_flow{level}")(x)

    def costs(self, first: Tensor, second: Tensor) -> Tensor:
        """cv(x1, x2) = c1(x1)^T cw(x2) / N, eq. (2), behind a leaky ReLU."""
        if self.standardise:
            both = torch.cat([first, second], 3)
            mean, deviation = both.mean((2, 3), keepdim=True), both.std((2, 3), keepdim=True) + 1e-5
            first, second = (first - mean) / deviation, (second - mean) / deviation
        return F.leaky_relu(local_correlation(first, second, self.displacement), 0.1)

    def warped(self, maps: Tensor, flow: Tensor) -> Tensor:
        """c_w(x) = c_2(x + up_2(w)(x)), eq. (1); zero where that lies outside. The flow is in cells, in full precision."""
        with full_precision(flow):
            read, known = backward_warp(maps.float(), flow.float())
            return (read * known).to(maps.dtype)

    def forward(self, first: Tensor, second: Tensor) -> Tensor | list[Tensor]:
        both = self.pyramid(torch.cat([first, second]))  # one pass for both
        maps = [m.unflatten(0, (2, -1)).unbind(0) for m in both]
        x, flow = self.estimate(self.levels, self.costs(*maps[-1]))
        flows = [flow]
        for level in range(self.levels - 1, FINEST - 1, -1):
            near, far = maps[level - 1]
            height, width = near.shape[-2:]
            # odd maps: a deconvolution gives one row or column too many
            flow = self.get_submodule(f"deconv{level + 1}")(flow)[..., :height, :width]
            hint = self.get_submodule(f"upfeat{level + 1}")(x)[..., :height, :width]
            costs = self.costs(near, self.warped(far, flow * (SCALE / 2**level)))
            x, flow = self.estimate(level, torch.cat([costs, near, flow, hint], 1))
            flows.insert(0, flow)
        if self.context_layers:
            for i in range(1, self.context_layers + 2):
                x = self.get_submodule(f"dc_conv{i}")(x)
            flows[0] = flows[0] + x
        if self.training:
            return flows
        return SCALE * F.interpolate(flows[0], first.shape[-2:], mode="bilinear", align_corners=False)


def pwc_net(**arguments) -> PWCNet:
    """With the pyramid of the released weights: three convolutions a level."""
    return PWCNet(**arguments)


def pwc_net_paper(**arguments) -> PWCNet:
    """As the paper's appendix draws it: two convolutions a level."""
    return PWCNet(**{"convolutions": 2} | arguments)


def pwc_net_small(**arguments) -> PWCNet:
    """PWC-Net-small (sec. 4): estimators without dense connections."""
    return PWCNet(**{"convolutions": 2, "dense": False} | arguments)


def pwc_net_slim(**arguments) -> PWCNet:
    """Not of the paper: narrow, three levels, a short context network, features standardised; its first answer is no motion.

    For small pictures and small machines.
    """
    slim = {
        "widths": (16, 24, 32),
        "convolutions": 2,
        "estimator": (32, 24, 16),
        "context": (24, 16),
        "standardise": True,
    }
    model = PWCNet(**slim | arguments)
    for name, module in model.named_children():
        if name.startswith("predict_flow") or name == f"dc_conv{model.context_layers + 1}":
            nn.init.zeros_(module.weight)
    return model


# -- official weights ----------------------------------------------------------------------------------------------------

NUMBERS = {"One": 1, "Two": 2, "Thr": 3, "Fou": 4, "Fiv": 5, "Six": 6}


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' PyTorch file (pwc_net.pth.tar), or sniklaus' (network-default.pytorch, in its names of any year).

    Both were learned on pictures in the order blue, green, red; here the first convolution is turned around. The authors' unused
    `deconv2` is left out.
    """
    found = {_name(key): value for key, value in state.items() if not key.startswith("deconv2.")}
    found["conv1a.0.weight"] = found["conv1a.0.weight"].flip(1)
    return found


def _name(key: str) -> str:
    """A parameter's name here: netSix.netUpfeat.weight -> upfeat7 … as each level's estimator counts itself there."""
    key = re.sub(r"(^|\.)module(?=[A-Z])", r"\1net", key)
    if match := re.fullmatch(r"netExtractor\.net(\w{3})\.(\d)\.(weight|bias)", key):
        level, place = NUMBERS[match[1]], int(match[2]) // 2
        names = ("aa", "a", "b") if level == 6 else ("a", "aa", "b")
        return f"conv{level}{names[place]}.0.{match[3]}"
    if match := re.fullmatch(r"netRefiner\.netMain\.(\d+)\.(weight|bias)", key):
        number = int(match[1]) // 2 + 1
        return f"dc_conv{number}.{'' if number == 7 else '0.'}{match[2]}"
    if match := re.fullmatch(r"net(\w{3})\.net(Upflow|Upfeat)\.(weight|bias)", key):
        return f"{'deconv' if match[2] == 'Upflow' else 'upfeat'}{NUMBERS[match[1]] + 1}.{match[3]}"
    if match := re.fullmatch(r"net(\w{3})\.net(\w{3})\.0\.(weight|bias)", key):
        level, layer = NUMBERS[match[1]], NUMBERS[match[2]]
        return f"predict_flow{level}.{match[3]}" if layer == 6 else f"conv{level}_{layer - 1}.0.{match[3]}"
    return key
