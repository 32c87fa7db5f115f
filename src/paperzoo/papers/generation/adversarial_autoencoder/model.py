"""The adversarial autoencoder and the critics of its code (Makhzani et al. 2015, arXiv 1511.05644).

Two hidden layers of 1000 rectified units everywhere (appendix A), weights from a normal of deviation 0.01, a linear code, a
sigmoid at the output. With `num_classes` the encoder has a second head, q(y | x), and the decoder reads class and code: the networks of the
semi-supervised and clustering experiments; with `labelled` the class is given, not inferred (supervised).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Prior = Literal["gaussian", "mixture", "swiss_roll"]


def drawn(inputs: int, outputs: int, deviation: float = 0.01) -> nn.Linear:
    """A linear layer with weights from a normal of deviation 0.01 and zero bias (appendix A.1)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, 0.0, deviation)
    nn.init.zeros_(layer.bias)
    return layer


def hidden_layers(inputs: int, width: int, deviation: float) -> nn.Sequential:
    return nn.Sequential(drawn(inputs, width, deviation), nn.ReLU(), drawn(width, width, deviation), nn.ReLU())


class AdversarialAutoencoder(nn.Module):
    """Images to codes and back.

    `forward(images)`: (B, C, S, S) in [0, 1] -> {"reconstruction": the same shape, in (0, 1), "code": (B, latent_dim), and with
    q(y | x) "classes": logits (B, num_classes)}.

    Args:
        posterior: "deterministic"; "gaussian": the encoder gives mean and log-variance; "universal": it reads noise beside the
            image, so that q(z | x) may have any shape (section 2). Without noise both give one fixed code.
        num_classes: of q(y | x) and of what the decoder reads; 0: the code alone.
        labelled: the decoder reads a given class, and there is no q(y | x) (section 4).
        noise_dim: of the universal posterior's noise. deviation: of fresh weights.
    """

    def __init__(
        self,
        image_size: int = 28,
        image_channels: int = 1,
        latent_dim: int = 8,
        width: int = 1000,
        num_classes: int = 0,
        posterior: Literal["deterministic", "gaussian", "universal"] = "deterministic",
        labelled: bool = False,
        noise_dim: int = 100,
        deviation: float = 0.01,
    ) -> None:
        super().__init__()
        if posterior not in ("deterministic", "gaussian", "universal"):
            raise ValueError(f"posterior '{posterior}' is not known; it is deterministic, gaussian or universal")
        self.image_size, self.image_channels, self.latent_dim = image_size, image_channels, latent_dim
        self.num_classes, self.posterior, self.labelled, self.noise_dim = num_classes, posterior, labelled, noise_dim
        values = image_channels * image_size**2
        extra = noise_dim if posterior == "universal" else 0
        self.encoder = hidden_layers(values + extra, width, deviation)
        self.to_code = drawn(width, latent_dim, deviation)
        self.log_variance = drawn(width, latent_dim, deviation) if posterior == "gaussian" else None
        self.classes = drawn(width, num_classes, deviation) if num_classes and not labelled else None
        self.decoder = nn.Sequential(
            hidden_layers(latent_dim + num_classes, width, deviation), drawn(width, values, deviation), nn.Sigmoid()
        )

    def encode(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, S, S) -> code (B, latent_dim) and class logits (B, num_classes) or None.

        `noise`: standard normal (B, latent_dim) of a Gaussian posterior, (B, noise_dim) of a universal one.
        """
        x = images.flatten(1)
        if self.posterior == "universal":
            x = torch.cat([x, x.new_zeros(len(x), self.noise_dim) if noise is None else noise], dim=1)
        x = self.encoder(x)
        code = self.to_code(x)
        if self.log_variance is not None and noise is not None:
            code = code + (0.5 * self.log_variance(x)).exp() * noise
        return code, self.classes(x) if self.classes is not None else None

    def decode(self, code: Tensor, classes: Tensor | None = None) -> Tensor:
        """Code (B, latent_dim), and where the network has classes their shares (B, num_classes) -> images (B, C, S, S) in (0, 1)."""
        if self.num_classes:
            code = torch.cat([classes, code], dim=1)
        return self.decoder(code).unflatten(1, (self.image_channels, self.image_size, self.image_size))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        code, logits = self.encode(images)
        if logits is None:
            return {"reconstruction": self.decode(code, labels), "code": code}
        return {"reconstruction": self.decode(code, logits.softmax(1)), "code": code, "classes": logits}


class Critic(nn.Module):
    """Whether a code (or a class vector) was drawn from the prior: (B, inputs) -> logits (B,), high for the prior's.

    `num_labels`: one-hot labels (B, num_labels) are read beside it (section 2.3); one place more than there are classes
    stands for "no label".
    """

    def __init__(self, inputs: int, width: int = 1000, num_labels: int = 0, deviation: float = 0.01) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.layers = nn.Sequential(hidden_layers(inputs + num_labels, width, deviation), drawn(width, 1, deviation))

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(codes if labels is None else torch.cat([codes, labels], dim=1)).squeeze(1)


# -- priors ----------------------------------------------------------------------------------------------------------


def from_prior(kind: Prior, noise: Tensor, uniform: Tensor, labels: Tensor, parts: int, deviation: float) -> Tensor:
    """Codes (B, D) from standard normal noise (B, D) and uniform numbers (B,): a pure function.

    "gaussian": of this deviation. "mixture": `parts` flat Gaussians around the origin, pointing outwards, in two dimensions.
    "swiss_roll": a spiral in two dimensions, cut into `parts` equal lengths. `labels` int64 (B,) choose the part; where one is
    negative the uniform number does. The paper gives no measures of either; these span about the same square.

    Raises:
        ValueError: if a mixture or roll is not of two dimensions.
    """
    if kind == "gaussian":
        return deviation * noise
    if noise.shape[1] != 2:
        raise ValueError(f"the prior {kind} has 2 dimensions, not {noise.shape[1]}")
    chosen = torch.where(labels >= 0, labels, (uniform * parts).long())
    if kind == "mixture":
        angle = 2 * math.pi * chosen / parts
        along, across = 1.4 + 0.4 * noise[:, 0], 0.1 * noise[:, 1]
        x, y = along * angle.cos() - across * angle.sin(), along * angle.sin() + across * angle.cos()
        return deviation * torch.stack([x, y], dim=1)
    place = (chosen + (uniform * parts).frac()) / parts  # the share of the roll's length
    angle = 4 * math.pi * place.sqrt()  # a spiral's length grows with the square of its angle
    radius = angle / (2 * math.pi)
    roll = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return deviation * (roll + 0.05 * noise)


def aae(
    image_size: int = 28,
    image_channels: int = 1,
    latent_dim: int = 8,
    width: int = 1000,
    posterior: Literal["deterministic", "gaussian", "universal"] = "deterministic",
    num_classes: int = 0,
    labelled: bool = False,
    deviation: float = 0.01,
) -> AdversarialAutoencoder:
    """The autoencoder of the likelihood experiments on MNIST: a code of 8 (appendix A.1)."""
    return AdversarialAutoencoder(
        image_size, image_channels, latent_dim, width, num_classes, posterior, labelled, deviation=deviation
    )


def aae_semi_supervised(
    image_size: int = 28,
    image_channels: int = 1,
    latent_dim: int = 10,
    width: int = 1000,
    num_classes: int = 10,
    posterior: Literal["deterministic", "gaussian", "universal"] = "deterministic",
    deviation: float = 0.01,
) -> AdversarialAutoencoder:
    """Class and style (appendix A.2): ten of each for MNIST."""
    return AdversarialAutoencoder(
        image_size, image_channels, latent_dim, width, num_classes, posterior, deviation=deviation
    )


def aae_clustering(
    image_size: int = 28,
    image_channels: int = 1,
    latent_dim: int = 5,
    width: int = 3000,
    num_classes: int = 16,
    posterior: Literal["deterministic", "gaussian", "universal"] = "deterministic",
    deviation: float = 0.01,
) -> AdversarialAutoencoder:
    """Cluster and style, without any label (appendix A.3): 16 or 30 clusters, layers of 3000."""
    return AdversarialAutoencoder(
        image_size, image_channels, latent_dim, width, num_classes, posterior, deviation=deviation
    )


def aae_critic(inputs: int = 8, width: int = 1000, num_labels: int = 0, deviation: float = 0.01) -> Critic:
    """The critic of a code of 8 (appendix A.1)."""
    return Critic(inputs, width, num_labels, deviation)
