"""The flow network F of sec. 4.1: FlowNet-S (Dosovitskiy et al., ICCV 2015, arXiv:1504.06852), and others by name.

    network(first, second)     pictures (B, 3, H, W) in [0, 1], RGB -> for each cell of the first one's feature map where it is in the second
                               one: (B, 2, ceil(H / stride), ceil(W / stride)), to the right and down, in cells

For features of stride 16 the pictures are halved before and the last level's inputs after (sec. 4.1), as in the released code. Parameter names are those of
the public PyTorch re-implementations of FlowNet-S (`conv3_1.0`, `deconv4.0`, `predict_flow2`, `upsampled_flow6_to_5`); `load_flow` reads their files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.4829, 0.4545, 0.4042)  # of red, green, blue; the released code's 123.15, 115.90, 103.06
SCALE = 20.0  # FlowNet's outputs are in twentieths: pixels of its input are 20 times as many
KERNELS = (7, 5, 5, 3, 3, 3)


def conv(inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, kernel, stride, kernel // 2), nn.LeakyReLU(0.1, inplace=True))


def deconv(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(inside, outside, 4, 2, 1), nn.LeakyReLU(0.1, inplace=True))


class FlowNetS(nn.Module):
    """FlowNet "Simple": both pictures, one behind the other, through an encoder; flow is predicted from coarse to fine.

    Before it has learned it answers that nothing moves.

    Args:
        stride: of the feature map that is warped: 4, 8 or 16.
        widths: channels of the levels 1, 2, …; level l halves the picture l times.
        ups: channels that come from below to the levels 2, 3, … up to the last but one.
    """

    def __init__(
        self,
        stride: int = 16,
        widths: Sequence[int] = (64, 128, 256, 512, 512, 1024),
        ups: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        if stride not in (4, 8, 16):
            raise ValueError(f"stride is {stride}; FlowNet-S reaches 4, 8 or 16")
        if not 3 <= len(widths) <= len(KERNELS) or len(ups) != len(widths) - 2:
            raise ValueError(f"widths has {len(widths)} levels and ups {len(ups)}; 3 to 6 and two fewer are needed")
        self.stride, self.levels = stride, len(widths)
        before = 6
        for level, width in enumerate(widths, 1):
            self.add_module(f"conv{level}", conv(before, width, KERNELS[level - 1], 2))
            if level >= 3:
                self.add_module(f"conv{level}_1", conv(width, width))
            before = width
        seen = widths[-1]
        for level in range(self.levels, 1, -1):
            self.add_module(f"predict_flow{level}", nn.Conv2d(seen, 2, 3, padding=1))
            if level == 2:
                break
            self.add_module(f"deconv{level - 1}", deconv(seen, ups[level - 3]))
            self.add_module(f"upsampled_flow{level}_to_{level - 1}", nn.ConvTranspose2d(2, 2, 4, 2, 1))
            seen = widths[level - 2] + ups[level - 3] + 2
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, a=0.1)
                nn.init.zeros_(module.bias)
            if name.startswith("predict_flow"):
                nn.init.zeros_(module.weight)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)

    @property
    def halves(self) -> int:
        """What the pictures' sides are divided by before the first convolution."""
        return 2 if self.stride == 16 else 1

    def encoder(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Maps of the levels 2, 3, … of both pictures."""
        x = torch.cat([first - self.mean, second - self.mean], 1)
        if self.halves > 1:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        maps = []
        for level in range(1, self.levels + 1):
            x = self.get_submodule(f"conv{level}")(x)
            if level >= 3:
                x = self.get_submodule(f"conv{level}_1")(x)
            maps.append(x)
        return maps[1:]

    def flows(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Flow of every level, finest first, in twentieths of a pixel of the pictures that went in (halved ones for stride 16)."""
        maps = self.encoder(first, second)
        x = maps[-1]
        found: list[Tensor] = []
        for level in range(self.levels, 1, -1):
            if level < self.levels:
                skip = maps[level - 2]
                height, width = skip.shape[-2:]
                # odd maps: a deconvolution gives one row or column too many
                up = self.get_submodule(f"deconv{level}")(x)[..., :height, :width]
                flow = self.get_submodule(f"upsampled_flow{level + 1}_to_{level}")(found[0])[..., :height, :width]
                x = torch.cat([skip, up, flow], 1)
            if level == 2 and self.stride > 4:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            found.insert(0, self.get_submodule(f"predict_flow{level}")(x))
        return found

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.flows(first, second)[0] * (SCALE * self.halves / self.stride)


class FlowByName(nn.Module):
    """A flow network of `correspondence/pwc_net` in the place of FlowNet-S: its finest flow, averaged over each cell of the feature map."""

    def __init__(self, name: str, stride: int) -> None:
        super().__init__()
        from paperzoo import create

        self.network, self.stride = create(name), stride
        if not hasattr(self.network, "pyramid_names"):
            raise ValueError(f"flow is '{name}'; it must be flownet_s or a model of pwc_net")

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        height, width = first.shape[-2:]
        fitting = [-(-n // self.network.divisor) * self.network.divisor for n in (height, width)]
        if fitting != [height, width]:
            first, second = (F.interpolate(x, fitting, mode="bilinear", align_corners=False) for x in (first, second))
        flow = self.network(first, second)
        flow = flow[0] * SCALE if isinstance(flow, list) else flow
        flow = F.adaptive_avg_pool2d(flow, (-(-height // self.stride), -(-width // self.stride)))
        back = flow.new_tensor([width / fitting[1], height / fitting[0]])[:, None, None]
        return flow * back / self.stride


def flow_network(name: str, stride: int) -> nn.Module:
    """ "flownet_s", "flownet_s_slim" (not of the paper: narrow, five levels), or the name of a model of pwc_net."""
    if name == "flownet_s":
        return FlowNetS(stride)
    if name == "flownet_s_slim":
        return FlowNetS(stride, (8, 16, 24, 32, 48), (12, 16, 24))
    return FlowByName(name, stride)


def load_flow(network: FlowNetS, state_dict: dict[str, Tensor]) -> None:
    """Weights of a public FlowNet-S, of full size: those of the two known PyTorch re-implementations, which leave biases out here and there.

    Raises:
        ValueError: if weights are missing or have another shape.
    """
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    wanted = network.state_dict()
    missing = [n for n in wanted if n not in state and not n.endswith(".bias")]
    other = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    if missing or other:
        raise ValueError(f"{(missing + other)[0]} is missing or has another shape; weights of FlowNet-S are needed")
    network.load_state_dict({name: state.get(name, torch.zeros_like(value)) for name, value in wanted.items()})
