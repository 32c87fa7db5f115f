"""CapsNet: Dynamic Routing Between Capsules (Sabour, Frosst, Hinton, NeurIPS 2017, arXiv:1710.09829).

A capsule is a vector: its length, below 1, says whether something is there, its direction how it is posed. Capsules of a layer
predict those of the next, and a prediction counts the more the better it agrees with the others (procedure 1).

Parts carry the names of the most used PyTorch implementation (gram-ai/capsule-networks), whose weights `from_official` converts;
its routing takes the softmax over the lower capsules, where the paper has it over the upper ones, so they answer differently here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def squash(s: Tensor) -> Tensor:
    """Eq. (1), along the last dimension: v = |s|^2 / (1 + |s|^2) * s / |s|. Written without the division, so that 0 stays 0."""
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return length / (1 + length.square()) * s


class PrimaryCapsules(nn.Module):
    """A convolution whose outputs are grouped to vectors: (B, inputs, H, W) -> (B, types * H' * W', size), squashed (sec. 4)."""

    def __init__(self, inputs: int, types: int, size: int, kernel: int = 9, stride: int = 2) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(inputs, types * size, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).unflatten(1, (-1, self.size))  # (B, types, size, H', W')
        return squash(x.movedim(2, 4).flatten(1, 3))


class RoutedCapsules(nn.Module):
    """Capsules that each lower capsule predicts by a matrix of its own: (B, nodes, in_size) -> (B, capsules, out_size).

    Args:
        nodes: lower capsules.
        iterations: r of procedure 1. Gradients flow through all of them, as in the authors' code.
    """

    def __init__(self, capsules: int, nodes: int, in_size: int, out_size: int, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.route_weights = nn.Parameter(torch.empty(capsules, nodes, in_size, out_size))
        nn.init.normal_(self.route_weights, std=0.1)  # authors' code

    def forward(self, u: Tensor) -> Tensor:
        predictions = torch.einsum("bni,jnio->bjno", u, self.route_weights)  # u_hat of eq. (2)
        return route(predictions, self.iterations)


def route(predictions: Tensor, iterations: int) -> Tensor:
    """Routing by agreement, procedure 1: predictions (B, upper, lower, size) -> squashed capsules (B, upper, size)."""
    agreement = torch.zeros_like(predictions[..., 0])  # b
    for i in range(iterations):
        coupling = agreement.softmax(1)  # c, eq. (3): of each lower capsule, over the upper ones
        v = squash((coupling[:, :, None] @ predictions)[:, :, 0])  # s, eq. (2)
        if i < iterations - 1:
            agreement = agreement + (predictions @ v[..., None])[..., 0]
    return v


class CapsNet(nn.Module):
    """Fig. 1 and 2: images (B, in_channels, image_size, image_size) with values in 0 … 1 -> (B, num_classes).

    `capsules` gives the vectors, `lengths` the paper's output. The call gives the logarithms of the lengths: the softmax of logits
    is then each length's share of all, and the largest stays the largest.

    Args:
        num_classes: capsules of the last layer; 0 for the primary capsules, flattened.
        in_channels: of the first convolution. With one, as on MNIST, the channels of a colour picture are averaged.
        image_size: pixels of a side; the number of primary capsules depends on it.
        channels: of the first convolution.
        types, size: primary capsules at each place, and their dimensions.
        class_size: dimensions of the last capsules.
        iterations: of routing.
        hidden: widths of the decoder, which draws the picture from the capsule of one class.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        channels: int = 256,
        types: int = 32,
        size: int = 8,
        class_size: int = 16,
        iterations: int = 3,
        hidden: tuple[int, int] = (512, 1024),
    ) -> None:
        super().__init__()
        places = (image_size - 16) // 2  # of a side, behind two convolutions of 9 x 9, the second of stride 2
        if places < 1:
            raise ValueError(f"image_size is {image_size}; two convolutions of 9 x 9 need at least 18 pixels")
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; it must be 1 or more")
        self.in_channels, self.image_size = in_channels, image_size
        self.nodes, self.size, self.class_size, self.iterations = types * places**2, size, class_size, iterations
        self.hidden, self.num_features = hidden, types * places**2 * size
        self.conv1 = nn.Conv2d(in_channels, channels, 9)
        self.primary_capsules = PrimaryCapsules(channels, types, size)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh capsules and a fresh decoder for another number of classes; 0 for none."""
        self.num_classes = num_classes
        self.digit_capsules: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        if num_classes:
            first, second = self.hidden
            self.digit_capsules = RoutedCapsules(num_classes, self.nodes, self.size, self.class_size, self.iterations)
            self.decoder = nn.Sequential(
                nn.Linear(num_classes * self.class_size, first), nn.ReLU(),
                nn.Linear(first, second), nn.ReLU(),
                nn.Linear(second, self.in_channels * self.image_size**2), nn.Sigmoid(),
            )  # fmt: skip
        for part in (self.digit_capsules, self.decoder):
            part.to(self.conv1.weight)

    def grey(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H, W) where the first convolution has one input."""
        return x.mean(1, keepdim=True) if self.in_channels == 1 and x.shape[1] == 3 else x

    def embed(self, x: Tensor) -> Tensor:
        """The primary capsules, flattened: (B, num_features)."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"built for images of {self.image_size} x {self.image_size} pixels, got {x.shape[-2]} x {x.shape[-1]}"
            )
        return self.primary_capsules(F.relu(self.conv1(self.grey(x)))).flatten(1)

    def capsules(self, x: Tensor) -> Tensor:
        """The capsules of the classes (B, num_classes, class_size), each shorter than 1."""
        return self.digit_capsules(self.embed(x).unflatten(1, (self.nodes, self.size)))

    def lengths(self, x: Tensor) -> Tensor:
        """How sure the network is that each class is there, (B, num_classes) in 0 … 1; several may be."""
        return torch.linalg.vector_norm(self.capsules(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lengths(x).clamp_min(1e-6).log() if self.num_classes else self.embed(x)

    def reconstruct(self, capsules: Tensor, labels: Tensor | None = None) -> Tensor:
        """The picture that the capsule of one class stands for, all others masked out (sec. 4.1).

        Args:
            capsules: (B, num_classes, class_size).
            labels: int64 (B,), the class that is drawn; None for the longest capsule.

        Returns:
            (B, in_channels, image_size, image_size), in 0 … 1.
        """
        if labels is None:
            labels = torch.linalg.vector_norm(capsules, dim=-1).argmax(1)
        mask = F.one_hot(labels, capsules.shape[1]).to(capsules.dtype)
        pixels = self.decoder((capsules * mask[:, :, None]).flatten(1))
        return pixels.unflatten(1, (self.in_channels, self.image_size, self.image_size))


# -- losses --------------------------------------------------------------------------------------------------------------------


def margin_loss(lengths: Tensor, labels: Tensor, upper: float = 0.9, lower: float = 0.1, absent: float = 0.5) -> Tensor:
    """Eq. (4), summed over classes, averaged over images.

    Args:
        lengths: (B, num_classes).
        labels: int64 (B,), or float (B, num_classes) with 1 for each class that is there.
        upper, lower, absent: m+, m- and lambda.
    """
    there = labels.to(lengths) if labels.ndim == 2 else F.one_hot(labels, lengths.shape[1]).to(lengths)
    present = there * (upper - lengths).clamp_min(0).square()
    missing = absent * (1 - there) * (lengths - lower).clamp_min(0).square()
    return (present + missing).sum(1).mean()


def reconstruction_loss(pictures: Tensor, images: Tensor) -> Tensor:
    """The sum of squared differences of the pixels, averaged over images (sec. 4.1)."""
    return (pictures - images).square().flatten(1).sum(1).mean()


# -- variants ------------------------------------------------------------------------------------------------------------------


def capsnet(num_classes: int = 10, in_channels: int = 1, **options) -> CapsNet:
    """The network of the paper for MNIST: 8.2M parameters, 6.8M of them outside the decoder; `options` as `CapsNet`."""
    return CapsNet(num_classes, in_channels, **options)


def capsnet_svhn(num_classes: int = 10, in_channels: int = 3, **options) -> CapsNet:
    """The smaller network for SVHN (sec. 7): 64 channels, 16 types of 6 dimensions, 8 dimensions in the end.

    The size of its images is not stated; here 32 pixels, as the set has them.
    """
    sizes = {"image_size": 32, "channels": 64, "types": 16, "size": 6, "class_size": 8} | options
    return CapsNet(num_classes, in_channels, **sizes)


def capsnet_digits(num_classes: int = 10, in_channels: int = 1, **options) -> CapsNet:
    """For the embedded scans, at 20 pixels: 48 channels and 16 types of 8 dimensions; the decoder as published."""
    sizes = {"image_size": 20, "channels": 48, "types": 16} | options
    return CapsNet(num_classes, in_channels, **sizes)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """gram-ai's weights to these names: its eight primary convolutions, one a dimension, become one.

    Its decoder reads the capsule of the one class (16 numbers), not all of them masked: every class gets the same matrix.
    """
    prefix = "primary_capsules.capsules."
    parts = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not parts:
        return state_dict
    renamed = {k: v for k, v in state_dict.items() if not k.startswith(prefix) and k != "digit_capsules.route_logits"}
    for kind in ("weight", "bias"):
        dimensions = [parts[f"{d}.{kind}"] for d in range(len(parts) // 2)]
        renamed[f"primary_capsules.conv.{kind}"] = torch.stack(dimensions, 1).flatten(0, 1)
    classes, _, _, size = renamed["digit_capsules.route_weights"].shape
    if renamed["decoder.0.weight"].shape[1] == size:
        renamed["decoder.0.weight"] = renamed["decoder.0.weight"].repeat(1, classes)
    return renamed
