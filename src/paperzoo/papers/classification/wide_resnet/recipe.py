"""Wide ResNet learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

PRESETS = {
    "embedded": Config(
        model="wide_resnet16_2",
        data="digits",
        image_size=16,
        augment="shift",  # a mirrored digit is no digit
        steps=230,
        batch_size=64,
        learning_rate=0.1,
        schedule="cosine",
    ),
    # sec. 3: SGD with Nesterov momentum, 200 epochs in batches of 128, the rate times 0.2 after 60, 120 and 160
    "published": Config(
        model="wide_resnet28_10",
        data="cifar10",
        image_size=32,
        augment="flip_shift",
        steps=200 * 391,
        batch_size=128,
        learning_rate=0.1,
        schedule="step",
        milestones=(0.3, 0.6, 0.8),
        gamma=0.2,
        workers=4,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
