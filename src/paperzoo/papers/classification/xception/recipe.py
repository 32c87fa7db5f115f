"""Xception learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

BATCH = 60 * 32  # sec. 4.4 has 60 GPUs and no batch size; 32 images each are assumed here
EPOCH = 1_281_167 // BATCH

PRESETS = {
    "embedded": Config(
        model="xception_digits",
        data="digits",
        image_size=32,
        augment="shift",  # a mirrored digit is no digit
        steps=150,
        batch_size=64,
        learning_rate=0.1,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
    ),
    # Sec. 4.3, ImageNet: momentum 0.9, rate 0.045 times 0.94 every 2 epochs, weight decay 1e-5, dropout 0.5, and the
    # running average of the weights (Polyak) at test time. Its epochs are not stated; 120 are about what fig. 6 shows.
    "published": Config(
        model="xception",
        data="imagenet",
        image_size=299,
        augment="crop_flip",
        normalise="imagenet",
        drop_rate=0.5,
        steps=120 * EPOCH,
        batch_size=BATCH,
        learning_rate=0.045,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-5,
        schedule="step",
        milestones=tuple(n / 60 for n in range(1, 60)),
        gamma=0.94,
        ema_decay=0.9999,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
