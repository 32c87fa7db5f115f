"""AC-GAN's generator and two-headed discriminator (Odena, Olah and Shlens 2017, arXiv 1610.09585).

The class is given to the generator beside the noise; the discriminator, instead of being told it, has to name it. Layer
sizes follow tables 1 and 2 of the appendix; "Linear 768" and "Linear 384" are the feature maps of a 4x4 map there, since
five (three) transposed convolutions of stride 2 must end at 128x128 (32x32). No code was released.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu

SMALLEST = 4  # the side of the map that the generator starts from


def drawn(layer: nn.Module) -> nn.Module:
    """Weights from a normal of deviation 0.02, biases zero (appendix A)."""
    nn.init.normal_(layer.weight, 0.0, 0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Generator(nn.Module):
    """From noise and a class to an image.

    `forward(latent, labels)`: latent (B, latent_dim) from a standard normal, labels (B,) int64 -> images
    (B, image_channels, S, S) in [-1, 1]. The class is appended to the noise as a one-hot vector.

    Args:
        channels: of the 4x4 map and of each larger one; S = 4 * 2 ** len(channels).
    """

    def __init__(
        self, channels: tuple[int, ...], num_classes: int, latent_dim: int = 100, image_channels: int = 3
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; class-conditional generation needs 1 or more")
        self.latent_dim, self.num_classes, self.image_channels = latent_dim, num_classes, image_channels
        self.image_size = SMALLEST * 2 ** len(channels)
        self.linear = drawn(nn.Linear(latent_dim + num_classes, channels[0] * SMALLEST**2))
        outputs = (*channels[1:], image_channels)
        pairs = zip(channels, outputs, strict=True)
        self.layers = nn.ModuleList(
            drawn(nn.ConvTranspose2d(a, b, 5, 2, padding=2, output_padding=1)) for a, b in pairs
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels[1:])

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        classes = torch.arange(self.num_classes, device=labels.device)
        wanted = (labels[:, None] == classes).to(latent.dtype)
        x = relu(self.linear(torch.cat([latent, wanted], dim=1)))
        x = x.unflatten(1, (-1, SMALLEST, SMALLEST))
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = relu(norm(layer(x)))
        return self.layers[-1](x).tanh()


class ActivationNoise(nn.Module):
    """Gaussian noise of a fixed deviation, in training only: any shape -> the same."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.deviation * torch.randn_like(x) if self.training and self.deviation else x


class Discriminator(nn.Module):
    """Whether an image is real, and of which class it is.

    `forward(images)`: images (B, image_channels, S, S) in [-1, 1] -> {"source": logits (B,), high for what looks real,
    "classes": logits (B, num_classes)}: sigmoid and softmax give P(S | X) and P(C | X), the table's "Soft-Sigmoid".

    Args:
        channels: of six convolutions, of strides 2, 1, 2, 1, 2, 1. drop_rate: after each of them.
        noise: the deviation of Gaussian noise that is added to activations in training.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        image_size: int,
        num_classes: int,
        image_channels: int = 3,
        drop_rate: float = 0.5,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size, self.num_classes = image_size, num_classes
        pairs = enumerate(zip((image_channels, *channels), channels, strict=False))
        self.layers = nn.ModuleList(drawn(nn.Conv2d(a, b, 3, 2 - i % 2, padding=1)) for i, (a, b) in pairs)
        self.norms = nn.ModuleList(nn.Identity() if i == 0 else nn.BatchNorm2d(c) for i, c in enumerate(channels))
        self.noise, self.dropout = ActivationNoise(noise), nn.Dropout(drop_rate)
        self.num_features = channels[-1] * (image_size // 8) ** 2
        self.source = drawn(nn.Linear(self.num_features, 1))
        self.classes = drawn(nn.Linear(self.num_features, num_classes))

    def embed(self, images: Tensor) -> Tensor:
        """What both heads read: (B, num_features)."""
        x = images
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.dropout(self.noise(leaky_relu(norm(layer(x)), 0.2)))
        return x.flatten(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.embed(images)
        return {"source": self.source(features).squeeze(1), "classes": self.classes(features)}


def acgan_128(num_classes: int = 10, latent_dim: int = 100) -> Generator:
    """The generator for 128x128 (table 1): one for each ten classes of ImageNet."""
    return Generator((768, 384, 256, 192, 64), num_classes, latent_dim)


def acgan_128_discriminator(num_classes: int = 10, drop_rate: float = 0.5, noise: float = 0.0) -> Discriminator:
    """The discriminator for 128x128 (table 1)."""
    return Discriminator((16, 32, 64, 128, 256, 512), 128, num_classes, drop_rate=drop_rate, noise=noise)


def acgan_32(num_classes: int = 10, latent_dim: int = 100) -> Generator:
    """The generator for CIFAR-10 (table 2)."""
    return Generator((384, 192, 96), num_classes, latent_dim)


def acgan_32_discriminator(num_classes: int = 10, drop_rate: float = 0.5, noise: float = 0.0) -> Discriminator:
    """The discriminator for CIFAR-10 (table 2); `noise` is searched over 0, 0.1 and 0.2 there."""
    return Discriminator((16, 32, 64, 128, 256, 512), 32, num_classes, drop_rate=drop_rate, noise=noise)


def acgan_32_slim(num_classes: int = 10, latent_dim: int = 32) -> Generator:
    """The CIFAR-10 generator at a sixth of its width, which learns on a CPU in seconds."""
    return Generator((64, 32, 16), num_classes, latent_dim)


def acgan_32_slim_discriminator(num_classes: int = 10, drop_rate: float = 0.0, noise: float = 0.0) -> Discriminator:
    """The discriminator that `acgan_32_slim` plays against."""
    return Discriminator((8, 16, 16, 32, 32, 64), 32, num_classes, drop_rate=drop_rate, noise=noise)
