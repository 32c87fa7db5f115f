"""SlowFast Networks for Video Recognition (Feichtenhofer et al., ICCV 2019, arXiv:1812.03982).

Two 3-D ResNets watch one clip: the Slow pathway every alpha-th frame with many channels, the Fast pathway all frames with beta = 1/8 of the
channels, and never pools time. After the stem and after res2, res3 and res4, a time-strided convolution brings the Fast maps to the Slow
pathway's rate and they are put beside its own (sec. 3.4). Only res4 and res5 of the Slow pathway, but all of the Fast one, look at several
frames (table 1).

Parameters have the names of pytorchvideo's `slowfast_r50`, whose weights load unchanged. What differs from the paper:

- The Slow pathway takes frames 0, alpha, 2 alpha, …, where the lateral convolutions are centred. The released code takes frames that are
  spread evenly from the first to the last; `pathways` can be handed those.
- The lateral kernels of the released 8x8 network look at 7 frames; the paper says 5, which the others have.
- The head is the mean over all of time and space, as in the paper. The released code averages windows of 7 x 7, which is the same at 224 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
SLOW, FAST = (1, 1, 3, 3), (3, 3, 3, 3)  # frames that the first convolution of a block sees, in res2 … res5


class Stem(nn.Module):
    """Convolution over `frames` frames with stride 2 in space, batch norm, ReLU, max pooling by 2: (B, C, T, H, W) -> (B, width, T, H/4, W/4)."""

    def __init__(self, in_channels: int, width: int, frames: int, kernel: int = 7) -> None:
        super().__init__()
        padding = (frames // 2, kernel // 2, kernel // 2)
        self.conv = nn.Conv3d(in_channels, width, (frames, kernel, kernel), (1, 2, 2), padding, bias=False)
        self.norm = nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))


class Residual(nn.Module):
    """The residual branch of a bottleneck: frames x 1 x 1, 1 x 3 x 3, 1 x 1 x 1."""

    def __init__(self, inputs: int, inner: int, outputs: int, frames: int, stride: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv3d(inputs, inner, (frames, 1, 1), padding=(frames // 2, 0, 0), bias=False)
        self.norm_a = nn.BatchNorm3d(inner)
        self.conv_b = nn.Conv3d(inner, inner, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.norm_b = nn.BatchNorm3d(inner)
        self.conv_c = nn.Conv3d(inner, outputs, 1, bias=False)
        self.norm_c = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_a(self.conv_a(x)), inplace=True)
        x = F.relu(self.norm_b(self.conv_b(x)), inplace=True)
        return self.norm_c(self.conv_c(x))


class Block(nn.Module):
    """A bottleneck with its shortcut: (B, inputs, T, H, W) -> (B, outputs, T, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, frames: int, stride: int) -> None:
        super().__init__()
        self.branch1_conv = self.branch1_norm = None
        if inputs != outputs or stride != 1:
            self.branch1_conv = nn.Conv3d(inputs, outputs, 1, (1, stride, stride), bias=False)
            self.branch1_norm = nn.BatchNorm3d(outputs)
        self.branch2 = Residual(inputs, outputs // 4, outputs, frames, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.branch1_conv is None else self.branch1_norm(self.branch1_conv(x))
        return F.relu(shortcut + self.branch2(x), inplace=True)


class Blocks(nn.Module):
    """The blocks of one pathway in one stage; the first one has the stride."""

    def __init__(self, inputs: int, outputs: int, depth: int, frames: int, stride: int) -> None:
        super().__init__()
        self.res_blocks = nn.Sequential(
            *(Block(outputs if i else inputs, outputs, frames, 1 if i else stride) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_blocks(x)


class Lateral(nn.Module):
    """Time-strided convolution (sec. 3.4): Fast maps (B, C, T, H, W) -> (B, ratio * C, ceil(T / alpha), H, W)."""

    def __init__(self, channels: int, ratio: int, frames: int, alpha: int) -> None:
        super().__init__()
        self.conv_fast_to_slow = nn.Conv3d(
            channels, ratio * channels, (frames, 1, 1), (alpha, 1, 1), (frames // 2, 0, 0), bias=False
        )
        self.norm = nn.BatchNorm3d(ratio * channels)

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        return torch.cat([slow, F.relu(self.norm(self.conv_fast_to_slow(fast)), inplace=True)], 1)


class Stage(nn.Module):
    """Both pathways side by side, and the lateral connection behind them where there is one."""

    def __init__(self, slow: nn.Module, fast: nn.Module, lateral: Lateral | None) -> None:
        super().__init__()
        self.multipathway_blocks = nn.ModuleList([slow, fast])
        self.multipathway_fusion = lateral

    def forward(self, slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        slow, fast = self.multipathway_blocks[0](slow), self.multipathway_blocks[1](fast)
        return (slow if self.multipathway_fusion is None else self.multipathway_fusion(slow, fast)), fast


class Head(nn.Module):
    """Dropout and a linear map of the pooled pathways: (B, features) -> logits (B, num_classes)."""

    def __init__(self, features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_rate)
        self.proj = nn.Linear(features, num_classes)
        nn.init.normal_(self.proj.weight, std=0.01)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dropout(x))


class SlowFast(nn.Module):
    """Clips (B, in_channels, T, H, W), the Fast pathway's frames -> logits (B, num_classes). Any T, H and W.

    Args:
        depths: blocks of res2 … res5.
        width: channels of the Slow stem.
        alpha: the Fast pathway sees alpha times as many frames.
        beta: the Fast pathway has one in `beta` of the channels (the paper's beta is its inverse).
        lateral: frames that a lateral convolution sees; its channels are `ratio` times the Fast pathway's.
        kernel: of the stems, in space.
        drop_rate: before the linear map, in training.
    """

    def __init__(
        self,
        depths: Sequence[int] = DEPTHS[50],
        width: int = 64,
        alpha: int = 8,
        beta: int = 8,
        lateral: int = 5,
        ratio: int = 2,
        kernel: int = 7,
        num_classes: int = 400,
        in_channels: int = 3,
        drop_rate: float = 0.5,
    ) -> None:
        super().__init__()
        if alpha < 1 or beta < 1 or width % beta:
            raise ValueError(
                f"alpha and beta are at least 1, and beta divides the width {width}; got {alpha} and {beta}"
            )
        self.alpha = alpha
        slim = width // beta
        stems = (Stem(in_channels, width, 1, kernel), Stem(in_channels, slim, 5, kernel))
        stages = [Stage(*stems, Lateral(slim, ratio, lateral, alpha))]
        slow, fast = width + ratio * slim, slim
        for i, depth in enumerate(depths):
            out, stride, last = 4 * width * 2**i, 1 if i == 0 else 2, i == len(depths) - 1
            pathways = (
                Blocks(slow, out, depth, SLOW[i], stride),
                Blocks(fast, out // beta, depth, FAST[i], stride),
            )
            fast = out // beta
            stages.append(Stage(*pathways, None if last else Lateral(fast, ratio, lateral, alpha)))
            slow = out + ratio * fast
        self.num_features = out + fast
        # pytorchvideo numbers the pooling, which has no parameters, too
        self.blocks = nn.ModuleList([*stages, nn.Identity(), Head(self.num_features, num_classes, drop_rate)])
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Residual):
                nn.init.zeros_(module.norm_c.weight)  # every block begins as its shortcut, as the paper trains

    def embed(self, x: Tensor) -> Tensor:
        """Both pathways' means over time and space: (B, num_features)."""
        return self.pathways(x[:, :, :: self.alpha], x)

    def pathways(self, slow: Tensor, fast: Tensor) -> Tensor:
        """`embed` of frames that were chosen elsewhere: (B, C, ceil(T / alpha), H, W) and (B, C, T, H, W)."""
        for stage in self.blocks[:-2]:
            slow, fast = stage(slow, fast)
        return torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[-1](self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        self.blocks[-1] = Head(self.num_features, num_classes, self.blocks[-1].dropout.p)


def slowfast_r50_4x16(num_classes: int = 400, in_channels: int = 3, drop_rate: float = 0.5) -> SlowFast:
    """T x tau = 4 x 16: of 32 frames, 2 apart, the Slow pathway sees 4; alpha = 8 (table 1)."""
    return SlowFast(DEPTHS[50], alpha=8, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate)


def slowfast_r50_8x8(num_classes: int = 400, in_channels: int = 3, drop_rate: float = 0.5) -> SlowFast:
    """T x tau = 8 x 8: the Slow pathway sees 8 of 32 frames; alpha = 4. Lateral kernels of 7 frames, as released."""
    return SlowFast(
        DEPTHS[50], alpha=4, lateral=7, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate
    )


def slowfast_r101_8x8(num_classes: int = 400, in_channels: int = 3, drop_rate: float = 0.5) -> SlowFast:
    """8 x 8 on ResNet-101, as `slowfast_r101` was released."""
    return SlowFast(DEPTHS[101], alpha=4, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate)


def slowfast_slim(num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.0) -> SlowFast:
    """Not of the paper: three stages of one block, 16 channels, beta = 1/2, for small pictures and learning in seconds."""
    return SlowFast((1, 1, 1), 16, 4, 2, 5, 2, 5, num_classes, in_channels, drop_rate)
