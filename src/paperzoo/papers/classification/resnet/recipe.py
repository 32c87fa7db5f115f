"""ResNet learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

PRESETS = {
    "embedded": Config(
        model="resnet20_cifar",
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
    # sec. 3.4: batches of 256, rate 0.1 divided by ten when the error plateaus, 60 x 10^4 iterations. The plateaus are not
    # stated; thirds are the authors' figure 4. Random resized crops stand for the paper's scale augmentation with crops.
    "published": Config(
        model="resnet50",
        data="imagenet",
        image_size=224,
        augment="crop_flip",
        normalise="imagenet",
        steps=600_000,
        batch_size=256,
        learning_rate=0.1,
        nesterov=False,
        weight_decay=1e-4,
        schedule="step",
        milestones=(0.3, 0.6),
        workers=16,
    ),
    # sec. 4.2: 64k iterations in batches of 128, the rate divided by ten at 32k and 48k (resnet110_cifar: 400 steps of warm-up)
    "published_cifar": Config(
        model="resnet20_cifar",
        data="cifar10",
        image_size=32,
        augment="flip_shift",
        steps=64_000,
        batch_size=128,
        learning_rate=0.1,
        nesterov=False,
        weight_decay=1e-4,
        schedule="step",
        milestones=(0.5, 0.75),
        workers=4,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
