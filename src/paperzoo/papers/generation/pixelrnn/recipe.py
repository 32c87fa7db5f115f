"""PixelRNN learns by the task's default recipe, maximum likelihood; here are its settings."""

from paperzoo.tasks.density import Config
from paperzoo.tasks.density import DensityRecipe as RECIPE

PRESETS = {
    "embedded": Config(
        model="diagonal_bilstm_tiny",
        data="digits",
        image_size=8,
        image_channels=1,
        levels=2,
        steps=450,
        batch_size=32,
        optimizer="adam",  # paper: RMSProp
        learning_rate=8e-3,
        ema_decay=0.98,
        samples=100,
    ),
    # sec. 5.3 and 5.4: batches of 16, RMSProp, "the highest learning rate that converged", which the paper does not state
    "published": Config(
        model="diagonal_bilstm_cifar10",
        data="cifar10",
        steps=300_000,
        batch_size=16,
        optimizer="rmsprop",
        learning_rate=1e-3,
        clip=1.0,
        samples=0,
        workers=8,
    ),
    "mnist": Config(
        model="diagonal_bilstm_mnist",
        data="mnist",
        image_size=28,
        image_channels=1,
        levels=2,
        binarise="draw",
        steps=200_000,
        batch_size=16,
        optimizer="rmsprop",
        learning_rate=1e-3,
        clip=1.0,
        samples=1000,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
