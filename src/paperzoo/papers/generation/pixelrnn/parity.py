"""PixelRNN against what the likelihood's definition implies, and its layers against one pixel at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.generation.pixelrnn import model as pixelrnn

KINDS = ("convolution", "row", "diagonal")


def network(kind: str, channels: int = 1, levels: int = 2, hidden: int = 6) -> pixelrnn.PixelNetwork:
    """A small network whose weights are large enough that everything matters, in double precision."""
    torch.manual_seed(7)
    found = pixelrnn.PixelNetwork(kind, hidden, 2, 12, 4, channels, levels).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0.0, 0.4)
    return found.eval()


# -- the likelihood --------------------------------------------------------------------------------------------------


def every_image(channels: int, height: int, width: int, levels: int) -> Tensor:
    values = itertools.product(range(levels), repeat=channels * height * width)
    return torch.tensor(list(values)).reshape(-1, channels, height, width)


def total(kind: str, channels: int, height: int, width: int, levels: int) -> Tensor:
    """The probabilities of all images that there are, added up."""
    images = every_image(channels, height, width, levels)
    return network(kind, channels, levels).log_likelihood(images).exp().sum()


def sensitivity(kind: str, channels: int, size: int) -> Tensor:
    """How each logit depends on each value, |d logit i / d value j| (N, N), both in the order of reading: rows, columns, colours."""
    net = network(kind, channels)
    images = torch.rand(4, 1, channels, size, size, dtype=torch.float64)

    def ordered(x: Tensor) -> Tensor:
        return net(x)[0, 0].permute(1, 2, 0).flatten()

    found = [torch.autograd.functional.jacobian(ordered, x, vectorize=True)[:, 0] for x in images]  # (N, C, H, W) each
    return sum(x.permute(0, 2, 3, 1).flatten(1).abs() for x in found)


def future(kind: str, channels: int, size: int) -> Tensor:
    """The largest dependence of a logit on its own value or on one that is read later."""
    return sensitivity(kind, channels, size).triu().max()


def past(kind: str, channels: int, size: int) -> Tensor:
    """Which values each logit depends on at all."""
    return (sensitivity(kind, channels, size) > 0).double()


def blind_spot(size: int) -> Tensor:
    """What PixelCNN of one 7x7 and two 3x3 layers can see (N, N): by following the open taps of the masks, place by place."""
    reach = torch.zeros(size, size, size, size)
    for r, c in itertools.product(range(size), repeat=2):
        seen = {(r, c)}
        for half, centre in ((1, True), (1, True), (3, False)):  # from the logit back to the image
            taps = [(dr, dc) for dr in range(-half, 1) for dc in range(-half, half + 1) if dr < 0 or dc < 0]
            taps += [(0, 0)] if centre else []
            seen = {(y + dr, x + dc) for y, x in seen for dr, dc in taps}
        for y, x in seen:
            if 0 <= y < size and 0 <= x < size:
                reach[r, c, y, x] = 1
    return reach.reshape(size**2, size**2).double()


def whole_context(size: int) -> Tensor:
    """What a Diagonal BiLSTM behind a 7x7 mask A can see (N, N): everything before, but for one pixel.

    The map of the second direction ends with the row above; its last place knows, by mask A, all but that row's last pixel. So
    this one is seen only by the pixels whose first layer reaches it: at most three places to its left.
    """
    reach = torch.ones(size**2, size**2, dtype=torch.float64).tril(-1)
    for r, c in itertools.product(range(1, size), range(size - 4)):
        reach[r * size + c, r * size - 1] = 0
    return reach


def frequencies(kind: str) -> Tensor:
    """How often each binary image of 2 x 2 pixels is drawn: its uniforms lie on a fine regular grid, so there is no chance in it."""
    net, steps = network(kind), 12
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    noise = torch.cartesian_prod(*[grid] * 4).reshape(-1, 1, 2, 2)
    drawn = net.generate(noise).flatten(1) @ torch.tensor([8, 4, 2, 1])
    return drawn.bincount(minlength=16).double() / len(noise)


def probabilities(kind: str) -> Tensor:
    return network(kind).log_likelihood(every_image(1, 2, 2, 2)).exp()


def drawn_whole(net: pixelrnn.PixelNetwork, noise: Tensor) -> Tensor:
    """Value by value, always with passes over whole images and an explicit search along the cumulative distribution."""
    levels = torch.zeros(noise.shape, dtype=torch.int64)
    for r, c, k in itertools.product(range(noise.shape[2]), range(noise.shape[3]), range(noise.shape[1])):
        logits = net(levels.double() / (net.levels - 1))[:, :, k, r, c]
        for i, row in enumerate(logits):
            left, value = float(noise[i, k, r, c]), 0
            shares = row.softmax(0).tolist()
            while value < net.levels - 1 and left >= shares[value]:
                left -= shares[value]
                value += 1
            levels[i, k, r, c] = value
    return levels


# -- the layers, one pixel at a time ---------------------------------------------------------------------------------


def slow_masked(layer: pixelrnn.MaskedConv2d, mask: str, colours: int, x: Tensor) -> Tensor:
    """A masked convolution tap by tap; for channels that are a multiple of the colours."""
    batch, inputs, height, width = x.shape
    outputs, (kernel_height, kernel_width) = layer.out_channels, layer.kernel_size
    result = layer.bias[None, :, None, None].repeat(batch, 1, height, width)
    for o, i in itertools.product(range(outputs), range(inputs)):
        mine, theirs = o // (outputs // colours), i // (inputs // colours)
        for dr, dc in itertools.product(range(kernel_height), range(kernel_width)):
            up, left = kernel_height // 2 - dr, kernel_width // 2 - dc
            earlier = up > 0 or (up == 0 and left > 0)
            here = up == 0 and left == 0 and (theirs < mine or (mask == "B" and theirs == mine))
            if not (earlier or here):
                continue
            for r, c in itertools.product(range(height), range(width)):
                if 0 <= r - up and 0 <= c - left < width:
                    result[:, o, r, c] = result[:, o, r, c] + layer.weight[o, i, dr, dc] * x[:, i, r - up, c - left]
    return result


def cell(gates: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 3 for one pixel: gates (B, 4h) in the order o, f, i, g."""
    hidden = gates.shape[1] // 4
    o, f, i, g = (gates[:, k * hidden : (k + 1) * hidden] for k in range(4))
    state = torch.sigmoid(f) * before + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(state), state


def slow_row(layer: pixelrnn.RowLSTM, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    inputs, nothing = layer.input_to_state(x), x.new_zeros(batch, layer.hidden)
    states: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for r, c in itertools.product(range(height), range(width)):
        gates = inputs[:, :, r, c]
        for tap in range(3):
            above = states.get((r - 1, c + tap - 1), (nothing, nothing))[0]
            gates = gates + above @ layer.state_to_state.weight[:, :, tap].T
        states[r, c] = cell(gates, states.get((r - 1, c), (nothing, nothing))[1])
    return torch.stack([torch.stack([states[r, c][0] for c in range(width)], -1) for r in range(height)], -2)


def slow_diagonal(layer: pixelrnn.DiagonalBiLSTM, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    inputs, nothing = layer.input_to_state(x).chunk(2, 1), x.new_zeros(batch, layer.hidden)
    maps = []
    for k, beside in enumerate((-1, 1)):  # from the left, from the right
        states: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for r in range(height):
            for c in range(width) if beside < 0 else reversed(range(width)):
                side, above = states.get((r, c + beside), (nothing,) * 2), states.get((r - 1, c), (nothing,) * 2)
                weight = layer.state_to_state[k]
                gates = inputs[k][:, :, r, c] + side[0] @ weight[: layer.hidden] + above[0] @ weight[layer.hidden :]
                states[r, c] = cell(gates, side[1])
        maps.append({place: state[0] for place, state in states.items()})
    rows = [
        torch.stack([maps[0][r, c] + maps[1].get((r - 1, c), nothing) for c in range(width)], -1) for r in range(height)
    ]
    return torch.stack(rows, -2)


def skewed(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    result = x.new_zeros(batch, channels, height, height + width - 1)
    for r in range(height):
        result[:, :, r, r : r + width] = x[:, :, r]
    return result


def spread(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.4)
    return layer


def cases() -> Iterator[Case]:
    one = "the definition of a probability"
    for kind in KINDS:
        for shape in ((1, 3, 3, 2), (3, 2, 2, 2), (1, 2, 3, 3)):
            name = f"{kind}: all {shape[0]}x{shape[1]}x{shape[2]} images of {shape[3]} levels"
            yield Case(name, partial(total, kind, *shape), lambda: 1.0, (), one, atol=1e-9, rtol=0)
        for channels in (1, 3):
            name = f"{kind}, {channels} colours: no logit depends on what is read later"
            jacobian = "Jacobian of all logits by all values"
            yield Case(name, partial(future, kind, channels, 5), lambda: 0.0, (), jacobian, atol=0, rtol=0)
        drawn, exact = partial(frequencies, kind), partial(probabilities, kind)
        yield Case(f"{kind}: images are drawn as often as they are probable", drawn, exact, (), "log p(x)", atol=0.04)
        net = network(kind, 3, 5)
        noise = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        whole = partial(drawn_whole, net)
        yield Case(
            f"{kind}: drawing by rows read so far", net.generate, whole, (noise,), "whole passes", atol=0, rtol=0
        )

    seen, reach = partial(past, "diagonal", 1, 9), partial(whole_context, 9)
    name = "Diagonal BiLSTM sees everything before, but for a row's last pixel"
    yield Case(name, seen, reach, (), "section 3.2 and mask A", atol=0, rtol=0)
    seen, reach = partial(past, "convolution", 1, 9), partial(blind_spot, 9)
    yield Case("PixelCNN sees what its masks leave open", seen, reach, (), "figure 2, place by place", atol=0, rtol=0)

    torch.manual_seed(0)
    for mask, colours, sizes in (("A", 1, (1, 4)), ("B", 1, (4, 4)), ("A", 3, (3, 6)), ("B", 3, (6, 6))):
        for kernel in ((7, 7), (3, 3)) if mask == "A" else ((3, 3), (1, 3), (1, 1)):
            layer = spread(pixelrnn.MaskedConv2d(mask, *sizes, kernel, colours))
            x, slow = torch.randn(2, sizes[0], 5, 6), partial(slow_masked, layer, mask, colours)
            name = f"mask {mask}, {colours} colours, {kernel[0]}x{kernel[1]}"
            yield Case(name, layer, slow, (x,), "figure 4, tap by tap", gradients=True)
    yield Case("skewing", pixelrnn.skew, skewed, (torch.randn(2, 3, 4, 6),), "row by row", atol=0, rtol=0)
    back = lambda x: pixelrnn.unskew(pixelrnn.skew(x))  # noqa: E731
    yield Case("unskewing", back, lambda x: x, (torch.randn(2, 3, 5, 3),), "the identity", atol=0, rtol=0)
    for kind, slow in ((pixelrnn.RowLSTM, slow_row), (pixelrnn.DiagonalBiLSTM, slow_diagonal)):
        for colours, hidden, shape in ((1, 4, (4, 5)), (3, 5, (6, 3)), (1, 3, (1, 4))):
            layer = spread(kind(hidden, colours))
            x = torch.randn(2, 2 * hidden, *shape)
            name = f"{kind.__name__}, {shape[0]}x{shape[1]}"
            yield Case(name, layer, partial(slow, layer), (x,), "equation 3, one pixel at a time", gradients=True)
