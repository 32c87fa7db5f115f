"""MobileNetV3-Large (Howard et al. 2019, table 1) as a map for dense prediction; torchvision's names, whose files load.

Blocks of three convolutions: 1x1 widens, a depthwise one filters, 1x1 narrows; in some a squeeze-and-excitation between the last two, and
hard swish instead of ReLU in the later half. (`Conv2dNormActivation` and `SqueezeExcitation` are torchvision's operators.)
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

# kernel, widened channels, channels out, squeeze-and-excitation, hard swish, stride
PLAN = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
FIRST, LAST = 16, 960
NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of `by`, not more than a tenth below."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride); the input is added where it fits."""

    def __init__(
        self, inputs: int, kernel: int, widened: int, outputs: int, excite: bool, swish: bool, stride: int
    ) -> None:
        super().__init__()
        layer = partial(Conv2dNormActivation, norm_layer=NORM, activation_layer=nn.Hardswish if swish else nn.ReLU)
        layers: list[nn.Module] = [] if widened == inputs else [layer(inputs, widened, kernel_size=1)]
        layers.append(layer(widened, widened, kernel_size=kernel, stride=stride, groups=widened))
        if excite:
            layers.append(SqueezeExcitation(widened, divisible(widened / 4), scale_activation=nn.Hardsigmoid))
        layers.append(Conv2dNormActivation(widened, outputs, kernel_size=1, norm_layer=NORM, activation_layer=None))
        self.block = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.adds else self.block(x)


class MobileNetV3Features(nn.Sequential):
    """(B, in_channels, H, W) -> by `stages` the maps before each halving and the last (B, 960, H / 32, W / 32)."""

    def __init__(self, in_channels: int = 3) -> None:
        swish = partial(Conv2dNormActivation, norm_layer=NORM, activation_layer=nn.Hardswish)
        layers: list[nn.Module] = [swish(in_channels, FIRST, kernel_size=3, stride=2)]
        channels, self.taken = FIRST, []
        self.stage_channels, self.stage_strides, stride = [], [], 2
        for i, (kernel, widened, outputs, excite, hard, step) in enumerate(PLAN, 1):
            if step == 2:  # torchvision counts the block that halves as the stage's map
                stride *= 2
                self.taken.append(i)
                self.stage_channels.append(outputs)
                self.stage_strides.append(stride)
            layers.append(InvertedResidual(channels, kernel, widened, outputs, excite, hard, step))
            channels = outputs
        layers.append(swish(channels, LAST, kernel_size=1))
        self.taken.append(len(layers) - 1)
        self.stage_channels.append(LAST)
        self.stage_strides.append(stride)
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Of the blocks that halve, and the last."""
        maps = []
        for i, layer in enumerate(self):
            x = layer(x)
            if i in self.taken:
                maps.append(x)
        return maps
