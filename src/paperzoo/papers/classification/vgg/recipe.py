"""VGG learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

PRESETS = {
    "embedded": Config(
        model="vgg11_slim",
        data="digits",
        image_size=32,
        augment="shift",  # a mirrored digit is no digit
        steps=150,
        batch_size=64,
        learning_rate=0.05,
        schedule="cosine",
        warmup_steps=10,
    ),
    # sec. 3.1: batches of 256, momentum 0.9, weight decay 5e-4, the rate 1e-2 divided by 10 three times, 370k steps (74 epochs)
    "published": Config(
        model="vgg16",
        data="imagenet",
        image_size=224,
        augment="crop_flip",
        normalise="imagenet",
        drop_rate=0.5,
        steps=370_000,
        batch_size=256,
        learning_rate=0.01,
        nesterov=False,
        weight_decay=5e-4,
        schedule="step",
        milestones=(0.4, 0.65, 0.85),  # the paper: when the validation accuracy stopped improving
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
