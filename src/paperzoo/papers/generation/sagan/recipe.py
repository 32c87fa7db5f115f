"""SAGAN learns by the task's default adversarial recipe; here are its settings."""

from paperzoo.tasks.generation import AdversarialRecipe as RECIPE
from paperzoo.tasks.generation import Config

PRESETS = {
    "embedded": Config(
        model="sagan_32_slim",
        discriminator="sagan_32_slim_discriminator",
        data="digits",
        steps=600,
        batch_size=32,
        learning_rate=1e-3,  # paper: 1e-4 and 4e-4, over a million steps
        discriminator_learning_rate=2e-3,
        ema_decay=0.98,
    ),
    # sec. 4: batches of 256, a million steps, one of each network; the released code neither mirrors nor averages
    "published": Config(
        model="sagan_128",
        discriminator="sagan_128_discriminator",
        data="imagenet",
        steps=1_000_000,
        batch_size=256,
        learning_rate=1e-4,
        discriminator_learning_rate=4e-4,
        beta1=0.0,
        beta2=0.9,
        features="inception",
        samples=50_000,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
