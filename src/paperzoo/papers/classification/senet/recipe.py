"""SENet learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

PRESETS = {
    "embedded": Config(
        model="seresnet20_cifar",
        data="digits",
        image_size=16,
        augment="shift",  # a mirrored digit is no digit
        steps=170,
        batch_size=64,
        learning_rate=0.1,
        nesterov=False,
        weight_decay=1e-4,
        schedule="cosine",
    ),
    # sec. 5: batches of 1024, rate 0.6 divided by ten every 30 epochs, 100 epochs (1252 steps each), momentum 0.9
    "published": Config(
        model="seresnet50",
        data="imagenet",
        image_size=224,
        augment="crop_flip",
        normalise="imagenet",
        steps=100 * 1252,
        batch_size=1024,
        learning_rate=0.6,
        nesterov=False,
        weight_decay=1e-4,
        schedule="step",
        milestones=(0.3, 0.6, 0.9),
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
