"""EfficientNet learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

EPOCH = 313  # steps of 4096 images over ImageNet's 1.28 million
EPOCHS = 350

PRESETS = {
    "embedded": Config(
        model="efficientnet_digits",
        data="digits",
        image_size=32,
        augment="shift",  # a mirrored digit is no digit
        steps=150,
        batch_size=64,
        learning_rate=0.2,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
    ),
    # Sec. 5.2: RMSProp with decay and momentum 0.9, weight decay 1e-5, rate 0.256 times 0.97 every 2.4 epochs, dropout 0.2 and
    # stochastic depth 0.2 (the model's own), AutoAugment. The length, the batch, 5 epochs of warm-up, label smoothing and the
    # average of the weights are the released script's. RandAugment stands for AutoAugment's policy.
    "published": Config(
        model="efficientnet_b0",
        data="imagenet",
        image_size=224,
        augment="randaugment",
        normalise="imagenet",
        steps=EPOCHS * EPOCH,
        batch_size=4096,
        optimizer="rmsprop",
        learning_rate=0.256,
        momentum=0.9,
        weight_decay=1e-5,
        decay_all=False,
        schedule="step",
        milestones=tuple(2.4 * n / EPOCHS for n in range(1, int(EPOCHS / 2.4) + 1)),
        gamma=0.97,
        warmup_steps=5 * EPOCH,
        label_smoothing=0.1,
        ema_decay=0.9999,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
