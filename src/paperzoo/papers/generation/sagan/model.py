"""SAGAN's generator and projection discriminator (Zhang, Goodfellow, Metaxas and Odena, 2018, arXiv 1805.08318).

Self-attention lets a pixel use evidence from everywhere in the image; spectral norm in *both* networks and unequal
learning rates keep the game stable. Layer sizes follow the authors' released code (brain-research/self-attention-gan),
which differs from the text in three places: keys and values are max-pooled by two, the value path has C/2 channels and is
brought back to C by a 1x1 convolution v, and the blocks are the residual ones of the projection discriminator.

Written for speed where the result is the same: a 1x1 convolution commutes with nearest upsampling and with average
pooling, so shortcuts convolve at the lower resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, relu, scaled_dot_product_attention
from torch.nn.utils.parametrizations import spectral_norm

SMALLEST = 4  # the generator starts, and the discriminator ends, at about 4x4


def conv(in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> nn.Module:
    """A spectrally normalised convolution of stride 1 that keeps the size; Xavier weights, zero bias (released code)."""
    return spectral_norm(xavier(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)))


def xavier(layer: nn.Module) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return layer


def upsample(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), each pixel repeated."""
    return interpolate(x, scale_factor=2.0, mode="nearest")


class SelfAttention(nn.Module):
    """Self-attention over the positions of a feature map (section 3, equations 1 to 3): (B, C, H, W) -> the same shape.

    beta_ji = softmax_i(f(x_i) . g(x_j)) says how much position j looks at position i; o_j = v(sum_i beta_ji h(x_i)); the
    output is gamma o + x with gamma starting at 0, so that the network first learns from its neighbourhood.
    There is no 1/sqrt(d) in the paper. H and W must be even: f and h are max-pooled by two (released code).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(
                f"channels is {channels}; self-attention projects to channels / 8, so it must be a multiple of 8"
            )
        self.f = conv(channels, channels // 8, 1, bias=False)  # keys
        self.g = conv(channels, channels // 8, 1, bias=False)  # queries
        self.h = conv(channels, channels // 2, 1, bias=False)  # values
        self.v = conv(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)
        attended = scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, 1, HW, C/2)
        attended = attended.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.gamma * self.v(attended)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, 1, HW, C/8), keys (B, 1, HW/4, C/8) and values (B, 1, HW/4, C/2)."""
        pooled = (max_pool2d(self.f(x), 2), max_pool2d(self.h(x), 2))
        return tuple(t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (self.g(x), *pooled))

    def attention(self, x: Tensor) -> Tensor:
        """beta: (B, HW, HW/4), each row a distribution over the pooled positions. For looking at; `forward` never builds it."""
        query, key, _ = self.project(x)
        return (query @ key.transpose(-2, -1)).softmax(dim=-1).squeeze(1)


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose scale and shift are looked up by class: x (B, C, H, W), labels (B,) int64 -> (B, C, H, W)."""

    def __init__(self, num_features: int, num_classes: int, momentum: float = 0.001, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False)
        self.gamma = nn.Embedding(num_classes, num_features)
        self.beta = nn.Embedding(num_classes, num_features)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.gamma(labels)[:, :, None, None] * self.norm(x) + self.beta(labels)[:, :, None, None]


class GeneratorBlock(nn.Module):
    """Residual block that doubles the size: (B, C_in, H, W) and labels (B,) -> (B, C_out, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int, momentum: float) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm2d(in_channels, num_classes, momentum)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.norm2 = ConditionalBatchNorm2d(out_channels, num_classes, momentum)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.shortcut = conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.conv1(upsample(relu(self.norm1(x, labels))))
        y = self.conv2(relu(self.norm2(y, labels)))
        return y + upsample(self.shortcut(x))


class Generator(nn.Module):
    """From noise and a class to an image.

    `forward(latent, labels)`: latent (B, latent_dim) from a standard normal, labels (B,) int64 -> images
    (B, image_channels, S, S) in [-1, 1].

    Args:
        channels: of the 4x4 map and after each block; S = 4 * 2 ** (len(channels) - 1).
        attention_size: the side of the feature map that is attended over (the paper's "feat32" is 32).
        norm_momentum: of the running statistics. Released code: 0.001 (0.0001 for the last); short runs need more.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        attention_size: int,
        num_classes: int,
        latent_dim: int = 128,
        image_channels: int = 3,
        norm_momentum: float = 0.001,
    ) -> None:
        super().__init__()
        sizes = [SMALLEST * 2**i for i in range(1, len(channels))]
        if attention_size not in sizes:
            raise ValueError(f"attention_size is {attention_size}; the feature maps have sides {sizes}")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; class-conditional generation needs 1 or more")
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.image_size, self.image_channels = sizes[-1], image_channels
        self.linear = spectral_norm(xavier(nn.Linear(latent_dim, channels[0] * SMALLEST * SMALLEST)))
        pairs = zip(channels, channels[1:], strict=False)
        self.blocks = nn.ModuleList(GeneratorBlock(a, b, num_classes, norm_momentum) for a, b in pairs)
        self.attention_after = sizes.index(attention_size)
        self.attention = SelfAttention(channels[self.attention_after + 1])
        self.norm = nn.BatchNorm2d(channels[-1], momentum=norm_momentum)
        self.to_image = conv(channels[-1], image_channels, 3)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        x = self.linear(latent).unflatten(1, (-1, SMALLEST, SMALLEST))
        for i, block in enumerate(self.blocks):
            x = block(x, labels)
            if i == self.attention_after:
                x = self.attention(x)
        return self.to_image(relu(self.norm(x))).tanh()


class DiscriminatorBlock(nn.Module):
    """Residual block: (B, C_in, H, W) -> (B, C_out, H/2, W/2), or the same size without `downsample`.

    `first`: no activation before the first convolution, since the input is an image.
    """

    def __init__(self, in_channels: int, out_channels: int, downsample: bool = True, first: bool = False) -> None:
        super().__init__()
        self.downsample, self.first = downsample, first
        self.conv1 = conv(in_channels, out_channels, 3)
        self.conv2 = conv(out_channels, out_channels, 3)
        changes = downsample or in_channels != out_channels
        self.shortcut = conv(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(relu(self.conv1(x if self.first else relu(x))))
        if not self.downsample:
            return y + self.shortcut(x)
        return avg_pool2d(y, 2) + self.shortcut(avg_pool2d(x, 2))


class Discriminator(nn.Module):
    """How real an image looks for its class: a projection discriminator.

    `forward(images, labels)`: images (B, image_channels, S, S) in [-1, 1], labels (B,) int64 -> logits (B,);
    logit = w . phi(x) + b + e_label . phi(x), where phi is the feature map summed over positions.

    Args:
        channels: after each block. downsample: which blocks halve the size.
        attention_size: the side of the feature map that is attended over.
    """

    def __init__(
        self,
        image_size: int,
        channels: tuple[int, ...],
        downsample: tuple[bool, ...],
        attention_size: int,
        num_classes: int,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        sizes = [image_size // 2 ** sum(downsample[: i + 1]) for i in range(len(downsample))]
        if attention_size not in sizes:
            raise ValueError(
                f"attention_size is {attention_size}; the feature maps have sides {sorted(set(sizes), reverse=True)}"
            )
        self.image_size, self.num_classes, self.num_features = image_size, num_classes, channels[-1]
        pairs = enumerate(zip((image_channels, *channels), channels, downsample, strict=False))
        self.blocks = nn.ModuleList(DiscriminatorBlock(a, b, down, first=i == 0) for i, (a, b, down) in pairs)
        self.attention_after = sizes.index(attention_size)
        self.attention = SelfAttention(channels[self.attention_after])
        self.linear = spectral_norm(xavier(nn.Linear(channels[-1], 1)))
        self.embedding = spectral_norm(xavier(nn.Embedding(num_classes, channels[-1])))

    def embed(self, images: Tensor) -> Tensor:
        """phi(x): (B, num_features), summed over positions."""
        x = images
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.attention_after:
                x = self.attention(x)
        return relu(x).sum(dim=(2, 3))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.embed(images)
        return self.linear(features).squeeze(1) + (features * self.embedding(labels)).sum(dim=1)


def sagan_128(
    num_classes: int = 1000,
    latent_dim: int = 128,
    width: int = 64,
    attention_size: int = 32,
    norm_momentum: float = 0.001,
) -> Generator:
    """The paper's ImageNet generator for 128x128. `attention_size` 32 has the best FID, 64 the best Inception score (table 1)."""
    channels = tuple(width * m for m in (16, 16, 8, 4, 2, 1))
    return Generator(channels, attention_size, num_classes, latent_dim, norm_momentum=norm_momentum)


def sagan_128_discriminator(num_classes: int = 1000, width: int = 64, attention_size: int = 32) -> Discriminator:
    """The paper's ImageNet discriminator for 128x128."""
    channels = tuple(width * m for m in (1, 2, 4, 8, 16, 16))
    return Discriminator(128, channels, (True,) * 5 + (False,), attention_size, num_classes)


def sagan_32(
    num_classes: int = 10,
    latent_dim: int = 128,
    width: int = 256,
    attention_size: int = 16,
    norm_momentum: float = 0.001,
) -> Generator:
    """The 32x32 generator that later libraries use for CIFAR-10 (not in the paper): the same blocks, equally wide."""
    return Generator((width,) * 4, attention_size, num_classes, latent_dim, norm_momentum=norm_momentum)


def sagan_32_discriminator(num_classes: int = 10, width: int = 128, attention_size: int = 16) -> Discriminator:
    """The 32x32 discriminator that later libraries use for CIFAR-10 (not in the paper)."""
    return Discriminator(32, (width,) * 4, (True, True, False, False), attention_size, num_classes)


def sagan_32_slim(
    num_classes: int = 10, latent_dim: int = 32, width: int = 8, attention_size: int = 16, norm_momentum: float = 0.1
) -> Generator:
    """A 32x32 generator in the proportions of the 128x128 one, narrow enough to learn on a CPU in seconds."""
    channels = tuple(width * m for m in (8, 4, 2, 1))
    return Generator(channels, attention_size, num_classes, latent_dim, norm_momentum=norm_momentum)


def sagan_32_slim_discriminator(num_classes: int = 10, width: int = 8, attention_size: int = 16) -> Discriminator:
    """The discriminator that `sagan_32_slim` plays against."""
    channels = tuple(width * m for m in (1, 2, 4, 4))
    return Discriminator(32, channels, (True, True, True, False), attention_size, num_classes)
