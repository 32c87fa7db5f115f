"""The networks of section 3: two hidden layers of rectified linear units for digits of 28 x 28 pixels.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. The teacher has 1200 units in a layer with
dropout (Hinton et al., 2012: half of the hidden units, a fifth of the pixels), the student 800 without.
"""

from __future__ import annotations

from torch import Tensor, nn


class TwoHiddenLayers(nn.Module):
    """(B, C, image_size, image_size) -> logits (B, num_classes). Channels are averaged: a grey scan has equal ones.

    Args:
        width: units in each hidden layer.
        drop_rate: dropout of hidden units; pixels are dropped at 0.4 of it.

    Raises:
        ValueError: if an image has another size than `image_size`.
    """

    def __init__(self, width: int, num_classes: int = 10, image_size: int = 28, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.image_size, self.num_features = image_size, width
        self.drop_input = nn.Dropout(0.4 * drop_rate)
        self.hidden = nn.Sequential(
            nn.Linear(image_size**2, width), nn.ReLU(), nn.Dropout(drop_rate),
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(drop_rate),
        )  # fmt: skip
        self.fc = nn.Linear(width, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """The second hidden layer, (B, width)."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"image_size is {self.image_size}, but the images are {tuple(images.shape[-2:])}")
        return self.hidden(self.drop_input(images.mean(1).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.embed(images))

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for another number of classes."""
        self.fc = nn.Linear(self.num_features, num_classes)


def distillation_mlp1200(**arguments) -> TwoHiddenLayers:
    """The teacher of section 3; its dropout is `drop_rate=0.5`."""
    return TwoHiddenLayers(1200, **arguments)


def distillation_mlp800(**arguments) -> TwoHiddenLayers:
    """The student of section 3."""
    return TwoHiddenLayers(800, **arguments)
