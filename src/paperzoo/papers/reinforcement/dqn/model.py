"""The action-value networks of DQN.

Mnih et al., "Playing Atari with Deep Reinforcement Learning", NeurIPS workshop 2013 (arXiv 1312.5602), section 4.1; and
the larger network of their "Human-level control through deep reinforcement learning", Nature 2015. The paper does not say
how weights start: torch's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FrameNetwork(nn.Module):
    """Convolutions over stacked frames, then one hidden layer. (B, stack, H, W) with values 0 … 255 -> (B, num_actions).

    Args:
        layers: (filters, kernel size, stride) of each convolution, without padding.
        hidden: width of the hidden layer.

    Raises:
        ValueError: for a shape that is not (stack, H, W), or too small for the convolutions.
    """

    def __init__(
        self, num_actions: int, observation_shape: Sequence[int], layers: Sequence[tuple[int, int, int]], hidden: int
    ) -> None:
        super().__init__()
        if len(observation_shape) != 3:
            raise ValueError(f"observation_shape is {tuple(observation_shape)}; frames have (stack, height, width)")
        channels, height, width = observation_shape
        convolutions: list[nn.Module] = []
        for filters, kernel, stride in layers:
            convolutions += [nn.Conv2d(channels, filters, kernel, stride), nn.ReLU()]
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            if min(height, width) < 1:
                raise ValueError(f"observation_shape is {tuple(observation_shape)}; frames must be larger, as 84 x 84")
            channels = filters
        self.convolutions = nn.Sequential(*convolutions)
        self.hidden = nn.Linear(channels * height * width, hidden)
        self.head = nn.Linear(hidden, num_actions)
        self.num_features = hidden

    def embed(self, frames: Tensor) -> Tensor:
        """What the last layer reads: (B, num_features)."""
        return torch.relu(self.hidden(self.convolutions(frames.float() / 255).flatten(1)))

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.embed(frames))


class VectorNetwork(nn.Module):
    """Linear layers with ReLU between them. (B, *observation_shape) -> (B, num_actions)."""

    def __init__(self, num_actions: int, observation_shape: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = [math.prod(observation_shape), *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.head = nn.Linear(sizes[-1], num_actions)
        self.num_features = sizes[-1]

    def embed(self, observations: Tensor) -> Tensor:
        """What the last layer reads: (B, num_features)."""
        x = observations.flatten(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x

    def forward(self, observations: Tensor) -> Tensor:
        return self.head(self.embed(observations))


def dqn_atari(num_actions: int = 18, observation_shape: Sequence[int] = (4, 84, 84)) -> FrameNetwork:
    """The network of 2013: 16 filters of 8 x 8 with stride 4, 32 of 4 x 4 with stride 2, 256 units."""
    return FrameNetwork(num_actions, observation_shape, ((16, 8, 4), (32, 4, 2)), 256)


def dqn_nature(num_actions: int = 18, observation_shape: Sequence[int] = (4, 84, 84)) -> FrameNetwork:
    """The network of 2015: 32 filters of 8 x 8 / 4, 64 of 4 x 4 / 2, 64 of 3 x 3 / 1, 512 units."""
    return FrameNetwork(num_actions, observation_shape, ((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512)


def dqn_mlp(
    num_actions: int = 2, observation_shape: Sequence[int] = (4,), hidden: Sequence[int] = (128, 128)
) -> VectorNetwork:
    """Fully connected, for environments that show a few numbers; not in the paper."""
    return VectorNetwork(num_actions, observation_shape, hidden)
