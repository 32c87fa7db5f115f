"""LeNet-5: Gradient-Based Learning Applied to Document Recognition (LeCun, Bottou, Bengio, Haffner, Proc. IEEE 1998), sec. II.

`lenet5` is the network of fig. 2 as published: trainable subsampling, the sparse third layer of table I, and outputs that are
squared distances to bitmaps of the characters. It has the paper's 60,000 trainable parameters, layer by layer.
`lenet5_textbook` is what is built under this name today; it shares the shape and little else.

No weights of the 1998 network are public; the parts carry the paper's names (`c1`, `s2`, …). What the paper leaves open:

- The bitmaps of fig. 3 are not listed. The ten digits below are our own drawings on its grid of 7 x 12; for another number of
  classes the codes are random signs, the alternative that sec. II-C names.

One thing is not the paper's: weights start uniform with variance 1 / F, where F is the number of inputs of the unit (the rule of
the authors' "Efficient BackProp" of the same year), not between -2.4 / F and 2.4 / F (appendix A). From there the signals die out
on their way: F6 starts at states of 0.01, the lower layers have no curvature to be slowed by, and with the paper's rates 99% of
F6's states are saturated after twenty images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AMPLITUDE, SLOPE = 1.7159, 2 / 3  # of eq. (6): f(1) = 1 and f(-1) = -1

# Table I: the maps of S2 that each map of C3 sees: three or four neighbours, four in two pairs, all six.
C3_TABLE = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip

# Ten digits, 7 x 12 each, side by side: what F6 shall draw.
DIGITS = """
 ..###..  ...#...  .#####.  .#####.  ....##.  #######  ...###.  #######  .#####.  .#####.
 .##.##.  ..##...  ##...##  ##...##  ...###.  ##.....  ..##...  .....##  ##...##  ##...##
 ##...##  .###...  ##...##  .....##  ..#.##.  ##.....  .##....  .....##  ##...##  ##...##
 ##...##  ...#...  .....##  .....##  ..#.##.  ##.....  ##.....  ....##.  ##...##  ##...##
 ##...##  ...#...  .....##  .....##  .#..##.  ##.....  ##.....  ....##.  .##.##.  ##...##
 ##...##  ...#...  ....##.  ..####.  .#..##.  ######.  ######.  ...##..  ..###..  ##...##
 ##...##  ...#...  ...##..  .....##  #...##.  .....##  ##...##  ...##..  .##.##.  .######
 ##...##  ...#...  ..##...  .....##  #######  .....##  ##...##  ...##..  ##...##  .....##
 ##...##  ...#...  .##....  .....##  ....##.  .....##  ##...##  ..##...  ##...##  .....##
 ##...##  ...#...  ##.....  .....##  ....##.  .....##  ##...##  ..##...  ##...##  ....##.
 .##.##.  ...#...  ##.....  ##...##  ....##.  ##...##  ##...##  ..##...  ##...##  ...##..
 ..###..  .#####.  #######  .#####.  ....##.  .#####.  .#####.  ..##...  .#####.  .###...
"""


def squash(a: Tensor) -> Tensor:
    """f(a) = A tanh(S a), eq. (6)."""
    return AMPLITUDE * torch.tanh(SLOPE * a)


def codes(num_classes: int) -> Tensor:
    """The targets of F6, -1 or 1: (num_classes, 84); drawings row by row for ten classes, else random signs, always the same."""
    if num_classes != 10:
        signs = torch.randint(0, 2, (num_classes, 84), generator=torch.Generator().manual_seed(84), device="cpu")
        return torch.tensor((2.0 * signs - 1).tolist())
    rows = [line.split() for line in DIGITS.strip().splitlines()]
    return torch.tensor([[1.0 if c == "#" else -1.0 for row in rows for c in row[k]] for k in range(10)])


# -- layers: a unit's state is f(a), and a is linear in its inputs and in its weights (eq. 5) ---------------------------------


class Layer(nn.Module):
    """x -> squash(linear(x, weight, bias)). `linear` takes its weights as arguments, so that curvature can pass through it too."""

    weight: nn.Parameter
    bias: nn.Parameter

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return squash(self.linear(x, self.weight, self.bias))


def fresh(*shape: int, inputs: int) -> nn.Parameter:
    """Uniform with variance 1 / inputs."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) * (3 / inputs) ** 0.5)


class Convolution(Layer):
    """5 x 5, no padding: (B, inputs, H, W) -> (B, outputs, H - 4, W - 4). C1 and C5."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = fresh(outputs, inputs, 5, 5, inputs=25 * inputs)
        self.bias = fresh(outputs, inputs=25 * inputs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias)


class SparseConvolution(Layer):
    """C3: every map has 5 x 5 kernels for the maps of `C3_TABLE` alone: 60 of them. (B, 6, H, W) -> (B, 16, H - 4, W - 4)."""

    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([fresh(len(s), 5, 5, inputs=25 * len(s)).detach() for s in C3_TABLE]))
        self.bias = nn.Parameter(torch.cat([fresh(1, inputs=25 * len(s)).detach() for s in C3_TABLE]))
        # the kernel of (map of C3, map of S2); the number past the last is a kernel of zeros
        kernels, zeros = iter(range(60)), 60
        table = [[next(kernels) if i in seen else zeros for i in range(6)] for seen in C3_TABLE]
        self.register_buffer("place", torch.tensor(table), persistent=False)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernels = torch.cat([weight, weight.new_zeros(1, 5, 5)])[self.place]
        return F.conv2d(x, kernels, bias)


class Subsampling(Layer):
    """The sum of four inputs, times a coefficient, plus a bias (sec. II-B). (B, C, H, W) -> (B, C, H // 2, W // 2). S2 and S4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = fresh(channels, inputs=4), fresh(channels, inputs=4)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 4 * F.avg_pool2d(x, 2) * weight[:, None, None] + bias[:, None, None]


class Full(Layer):
    """(B, inputs) -> (B, outputs). F6."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = fresh(outputs, inputs, inputs=inputs), fresh(outputs, inputs=inputs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)


class RadialBasis(nn.Module):
    """y_i = sum_j (x_j - w_ij)^2 with fixed w, eq. (7); returned as logits, -y: (B, 84) -> (B, num_classes), at most 0."""

    codes: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - self.codes).square().sum(2)


# -- the network ---------------------------------------------------------------------------------------------------------------


class LeNet5(nn.Module):
    """Fig. 2: images (B, in_channels, 32, 32), paper -0.1 and ink 1.175, -> minus the penalty of each class (B, num_classes).

    The answers are ordered like logits, and their softmax is the posterior of eq. (9) without its rubbish class.

    Args:
        num_classes: 10 have drawn codes, other numbers random ones; 0 for the states of F6.
        in_channels: of C1. With one, as published, the channels of a colour picture are averaged.
    """

    image_size = 32

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.in_channels, self.num_features = in_channels, 84
        self.stage_channels, self.stage_strides = [6, 16], [2, 4]
        self.c1 = Convolution(in_channels, 6)
        self.s2 = Subsampling(6)
        self.c3 = SparseConvolution()
        self.s4 = Subsampling(16)
        self.c5 = Convolution(16, 120)
        self.f6 = Full(120, 84)
        self.reset_classifier(num_classes)

    def grey(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H, W) where C1 has one input."""
        return x.mean(1, keepdim=True) if self.in_channels == 1 and x.shape[1] == 3 else x

    def stages(self, x: Tensor) -> list[Tensor]:
        """The subsampled maps, S2 and S4, of images of any size from 12 pixels on."""
        s2 = self.s2(self.c1(self.grey(x)))
        return [s2, self.s4(self.c3(s2))]

    def embed(self, x: Tensor) -> Tensor:
        """The states of F6 (B, 84), within -1.7159 … 1.7159: a drawing of 12 rows of 7."""
        if x.shape[-2:] != (32, 32):
            raise ValueError(f"LeNet-5 reads images of 32 x 32 pixels, got {x.shape[-2]} x {x.shape[-1]}")
        return self.f6(self.c5(self.stages(x)[-1]).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Codes for another number of classes; 0 for none. There is nothing in them to learn."""
        self.output = RadialBasis(num_classes).to(self.f6.weight.device) if num_classes else nn.Identity()


class MAPLoss(nn.Module):
    """Eq. (9): the penalty of the right class, and a competition that pushes the penalties of the others up.

    E = mean over images of  y_D + log(e^-j + sum_i e^-y_i). The rubbish class e^-j leaves penalties far above j alone.
    As Bayes would have it, this is cross-entropy with one more logit, -j, that is never right.

    Args:
        rubbish: j > 0; the paper does not state it.
    """

    def __init__(self, rubbish: float) -> None:
        super().__init__()
        self.rubbish = rubbish

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Minus the penalties (B, K), classes int64 (B,) -> a scalar, at least 0."""
        return F.cross_entropy(torch.cat([logits, torch.full_like(logits[:, :1], -self.rubbish)], dim=1), labels)


class TextbookLeNet5(nn.Module):
    """The network of today's textbooks: plain average pooling, a full C3, sigmoids and linear outputs (Dive into Deep Learning, 7.6).

    Images (B, in_channels, 32, 32) -> logits (B, num_classes). Names are those of the book (`net.0.weight`), whose network pads
    28 x 28 pixels by two on each side; its weights load.
    """

    image_size = 32

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.in_channels, self.num_features = in_channels, 84
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5), nn.Sigmoid(), nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(400, 120), nn.Sigmoid(),
            nn.Linear(120, 84), nn.Sigmoid(), nn.Identity(),
        )  # fmt: skip
        self.reset_classifier(num_classes)
        for module in self.net:
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def embed(self, x: Tensor) -> Tensor:
        return self.net[:-1](x.mean(1, keepdim=True) if self.in_channels == 1 and x.shape[1] == 3 else x)

    def forward(self, x: Tensor) -> Tensor:
        return self.net[-1](self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        self.net[-1] = nn.Linear(84, num_classes).to(self.net[0].weight) if num_classes else nn.Identity()


def lenet5(num_classes: int = 10, in_channels: int = 1) -> LeNet5:
    """The network of the paper: 60,000 trainable parameters."""
    return LeNet5(num_classes, in_channels)


def lenet5_textbook(num_classes: int = 10, in_channels: int = 1) -> TextbookLeNet5:
    """The network of today's textbooks: 61,706 parameters."""
    return TextbookLeNet5(num_classes, in_channels)
