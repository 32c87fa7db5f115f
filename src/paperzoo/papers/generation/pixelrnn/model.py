"""PixelCNN, Row LSTM and Diagonal BiLSTM (van den Oord, Kalchbrenner and Kavukcuoglu 2016, arXiv 1601.06759).

One network, three kinds of layer: table 1 of the paper. An image is read row by row, a pixel's red before its green before
its blue; what each value depends on is cut by masks, so that one pass gives the distributions of all values at once and
log p(x) is exact. The recurrent layers loop over what is truly sequential alone: the H rows of a Row LSTM (whole rows at
once), the H + W - 1 diagonals of a Diagonal BiLSTM (whole diagonals, both directions at once).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def colour_of(count: int, colours: int, gates: int = 1) -> Tensor:
    """Which colour each of `count` channels belongs to (section 3.4): int64 (count,), in order, anew for each gate."""
    each = count // gates
    return (torch.arange(each) * colours // each).repeat(gates)


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees only what was read before (section 3.4, figure 4): (B, C, H, W) -> (B, C', H, W).

    Rows above and pixels to the left are open. At the pixel itself mask "A" opens the colours before the output's own, mask
    "B" that one too: A connects the image to the first layer, B all later ones. `gates`: into how many equal parts,
    each with all colours, the output channels fall.
    """

    def __init__(
        self,
        mask: Literal["A", "B"],
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        colours: int,
        gates: int = 1,
    ) -> None:
        height, width = kernel_size
        super().__init__(in_channels, out_channels, kernel_size, padding=(height // 2, width // 2))
        source, target = colour_of(in_channels, colours), colour_of(out_channels, colours, gates)
        here = source[None] < target[:, None] if mask == "A" else source[None] <= target[:, None]
        seen = torch.zeros(out_channels, in_channels, height, width)
        seen[:, :, : height // 2] = 1
        seen[:, :, height // 2, : width // 2] = 1
        seen[:, :, height // 2, width // 2] = here.float()
        self.register_buffer("mask", seen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


def lstm_cell(gates: Tensor, cell: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Equation 3: gates [o, f, i, g] stacked along `axis` and the last cell state -> the new hidden and cell state."""
    output, forget, enter, content = gates.chunk(4, axis)
    cell = forget.sigmoid() * cell + enter.sigmoid() * content.tanh()
    return output.sigmoid() * cell.tanh(), cell


class RowLSTM(nn.Module):
    """Rows from top to bottom (section 3.1): (B, 2h, H, W) -> (B, h, H, W).

    Input-to-state: 1 x 3, mask B, for the whole map at once. State-to-state: 1 x 3 over the row above, without a mask. A pixel
    sees a triangle above it. Hidden and cell states are zero before the first row.
    """

    def __init__(self, hidden: int, colours: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_to_state = MaskedConv2d("B", 2 * hidden, 4 * hidden, (1, 3), colours, gates=4)
        self.state_to_state = nn.Conv1d(hidden, 4 * hidden, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.input_to_state(x).unbind(2)
        state = cell = x.new_zeros(x.shape[0], self.hidden, x.shape[3])
        states = []
        for row in rows:
            state, cell = lstm_cell(row + self.state_to_state(state), cell, 1)
            states.append(state)
        return torch.stack(states, 2)


def skew(x: Tensor) -> Tensor:
    """Row r moves r places to the right, so that a diagonal becomes a column: (…, H, W) -> (…, H, H + W - 1), zeros beside."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, height)).flatten(-2)[..., : height * (height + width - 1)].unflatten(-1, (height, -1))


def unskew(x: Tensor) -> Tensor:
    """`skew` undone: (…, H, H + W - 1) -> (…, H, W)."""
    height, width = x.shape[-2], x.shape[-1] - x.shape[-2] + 1
    return F.pad(x.flatten(-2), (0, height)).unflatten(-1, (height, -1))[..., :width]


class DiagonalBiLSTM(nn.Module):
    """Diagonals from both upper corners (section 3.2): (B, 2h, H, W) -> (B, h, H, W).

    Input-to-state: 1 x 1, mask B. State-to-state: 2 x 1 over the diagonal before, which holds the pixel above and the one
    beside. The map of the second direction, which sees to the right, is moved down by one row before the two are added: no
    pixel sees its own row's right. Both directions advance in one loop. Outside of the image states are zero: gates are skewed
    with zeros beside them, and state-to-state has no bias, so that those cells stay zero.
    """

    def __init__(self, hidden: int, colours: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_to_state = MaskedConv2d("B", 2 * hidden, 8 * hidden, (1, 1), colours, gates=8)
        bound = (2 * hidden) ** -0.5
        self.state_to_state = nn.Parameter(torch.empty(2, 2 * hidden, 4 * hidden).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        ahead, back = self.input_to_state(x).chunk(2, 1)
        both = skew(torch.stack([ahead, back.flip(3)]))  # (2, B, 4h, H, T), the second direction mirrored
        diagonals = both.permute(4, 0, 1, 3, 2).reshape(height + width - 1, 2, batch * height, 4 * self.hidden)
        state = cell = x.new_zeros(2, batch * height, self.hidden)
        states = []
        for gates in diagonals.unbind(0):
            rows = state.reshape(2, batch, height, self.hidden)
            above = F.pad(rows, (0, 0, 1, 0))[:, :, :-1].flatten(1, 2)
            found = torch.baddbmm(gates, torch.cat([state, above], 2), self.state_to_state)
            state, cell = lstm_cell(found, cell, 2)
            states.append(state)
        maps = torch.stack(states, 3).reshape(2, batch, height, self.hidden, -1).transpose(2, 3)
        ahead, back = unskew(maps).unbind(0)
        return ahead + F.pad(back.flip(3), (0, 0, 1, 0))[:, :, :-1]


class ConvolutionBlock(nn.Module):
    """PixelCNN's residual block (figure 5, left): (B, 2h, H, W) -> the same shape."""

    def __init__(self, hidden: int, colours: int) -> None:
        super().__init__()
        self.down = MaskedConv2d("B", 2 * hidden, hidden, (1, 1), colours)
        self.conv = MaskedConv2d("B", hidden, hidden, (3, 3), colours)
        self.up = MaskedConv2d("B", hidden, 2 * hidden, (1, 1), colours)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.conv(self.down(x.relu()).relu()).relu())


class RecurrentBlock(nn.Module):
    """PixelRNN's residual block (figure 5, right): (B, 2h, H, W) -> the same shape."""

    def __init__(self, layer: nn.Module, hidden: int, colours: int) -> None:
        super().__init__()
        self.lstm = layer
        self.up = MaskedConv2d("B", hidden, 2 * hidden, (1, 1), colours)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.lstm(x))


def block(kind: str, hidden: int, colours: int) -> nn.Module:
    if kind == "convolution":
        return ConvolutionBlock(hidden, colours)
    return RecurrentBlock({"row": RowLSTM, "diagonal": DiagonalBiLSTM}[kind](hidden, colours), hidden, colours)


class PixelNetwork(nn.Module):
    """The distribution of every value of an image given all values before it (table 1).

    `forward(images)`: float32 (B, image_channels, H, W), values k / (levels - 1) -> logits (B, K, image_channels, H, W):
    K = levels of a softmax, or for two levels K = 1 of a sigmoid, of the upper one.

    Args:
        kind: of the layers. hidden: h; the map between layers has 2h channels. depth: how many layers.
        head: channels between the last two 1 x 1 convolutions.
    """

    def __init__(
        self,
        kind: Literal["convolution", "row", "diagonal"],
        hidden: int,
        depth: int,
        head: int,
        image_size: int,
        image_channels: int,
        levels: int,
    ) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels is {levels}; a value needs at least two")
        self.image_size, self.image_channels, self.levels = image_size, image_channels, levels
        self.outputs = levels if levels > 2 else 1
        self.first = MaskedConv2d("A", image_channels, 2 * hidden, (7, 7), image_channels)
        self.blocks = nn.ModuleList(block(kind, hidden, image_channels) for _ in range(depth))
        self.head = nn.Sequential(
            nn.ReLU(),
            MaskedConv2d("B", 2 * hidden, head, (1, 1), image_channels),
            nn.ReLU(),
            MaskedConv2d("B", head, image_channels * self.outputs, (1, 1), image_channels),
        )

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return self.image_channels, self.image_size, self.image_size

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for layer in self.blocks:
            x = layer(x)
        return self.head(x).unflatten(1, (self.image_channels, self.outputs)).transpose(1, 2)

    def log_likelihood(self, levels: Tensor) -> Tensor:
        """log p(x) of images, exact: levels int64 (B, C, H, W) in 0 … levels - 1 -> nats (B,)."""
        logits = self(levels.to(self.first.weight.dtype) / (self.levels - 1))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision is too coarse for a sum
        if self.outputs == 1:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], levels.to(logits.dtype), reduction="none")
        else:
            loss = F.cross_entropy(logits, levels, reduction="none")
        return -loss.sum((1, 2, 3))

    def generate(self, noise: Tensor, known: Tensor | None = None, rows: int = 0) -> Tensor:
        """Images drawn value by value, each by its uniform number in [0, 1): (B, C, H, W) -> levels int64, the same shape.

        `known`: levels (B, C, H, W), of which the first `rows` rows are kept. One pass a value, over the rows read so far.
        """
        levels = torch.zeros_like(noise, dtype=torch.int64)
        if known is not None:
            levels[:, :, :rows] = known[:, :, :rows]
        images = levels.to(noise.dtype) / (self.levels - 1)
        for row in range(rows, noise.shape[2]):
            for column in range(noise.shape[3]):
                for colour in range(self.image_channels):
                    logits = self(images[:, :, : row + 1])[:, :, colour, row, column].float()
                    drawn = invert(logits, noise[:, colour, row, column])
                    levels[:, colour, row, column] = drawn
                    images[:, colour, row, column] = drawn.to(images.dtype) / (self.levels - 1)
        return levels


def invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """The level at which the cumulative distribution passes a uniform number: (B, K) and (B,) -> int64 (B,)."""
    if logits.shape[1] == 1:
        return (uniform >= (-logits[:, 0]).sigmoid()).long()
    below = logits.double().softmax(1).cumsum(1)[:, :-1]  # the last one is 1, whatever rounding says
    return (below <= uniform[:, None]).sum(1)


def pixelcnn_mnist(image_size: int = 28, image_channels: int = 1, levels: int = 2) -> PixelNetwork:
    """PixelCNN for binary digits; the paper does not state its size there: seven layers, h = 16, as the best of table 4."""
    return PixelNetwork("convolution", 16, 7, 32, image_size, image_channels, levels)


def row_lstm_mnist(image_size: int = 28, image_channels: int = 1, levels: int = 2) -> PixelNetwork:
    """Row LSTM for binary digits; the paper does not state its size there: seven layers, h = 16, as the best of table 4."""
    return PixelNetwork("row", 16, 7, 32, image_size, image_channels, levels)


def diagonal_bilstm_mnist(
    image_size: int = 28, image_channels: int = 1, levels: int = 2, hidden: int = 16, depth: int = 7
) -> PixelNetwork:
    """Diagonal BiLSTM for binary digits (table 4): seven layers, h = 16; or one, h = 32."""
    return PixelNetwork("diagonal", hidden, depth, 32, image_size, image_channels, levels)


def pixelcnn_cifar10(image_size: int = 32, image_channels: int = 3, levels: int = 256) -> PixelNetwork:
    """PixelCNN for CIFAR-10: fifteen layers, h = 128."""
    return PixelNetwork("convolution", 128, 15, 1024, image_size, image_channels, levels)


def row_lstm_cifar10(image_size: int = 32, image_channels: int = 3, levels: int = 256) -> PixelNetwork:
    """Row LSTM for CIFAR-10: twelve layers, h = 128."""
    return PixelNetwork("row", 128, 12, 1024, image_size, image_channels, levels)


def diagonal_bilstm_cifar10(image_size: int = 32, image_channels: int = 3, levels: int = 256) -> PixelNetwork:
    """Diagonal BiLSTM for CIFAR-10: twelve layers, h = 128."""
    return PixelNetwork("diagonal", 128, 12, 1024, image_size, image_channels, levels)


def diagonal_bilstm_tiny(
    image_size: int = 8,
    image_channels: int = 1,
    levels: int = 2,
    kind: Literal["convolution", "row", "diagonal"] = "diagonal",
) -> PixelNetwork:
    """Two layers, h = 16, for small images; `kind` for the other layers at the same size (not in the paper)."""
    return PixelNetwork(kind, 16, 2, 32, image_size, image_channels, levels)
