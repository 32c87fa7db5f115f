"""ConvNeXt learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

EPOCH = 1_281_167 // 4096  # whole batches of 4096 images

PRESETS = {
    "embedded": Config(
        model="convnext_digits",
        data="digits",
        image_size=32,
        augment="shift",  # a mirrored digit is no digit
        steps=150,
        batch_size=64,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.05,
        decay_all=False,
        schedule="cosine",
        warmup_steps=20,
        label_smoothing=0.1,
    ),
    # Table 5: AdamW for 300 epochs in batches of 4096, rate 0.004, cosine after 20 epochs of warm-up, weight decay 0.05, mixup
    # or CutMix, RandAugment, erasing, label smoothing, stochastic depth 0.1 (T), moving average of the weights.
    "published": Config(
        model="convnext_tiny",
        data="imagenet",
        image_size=224,
        augment="randaugment",
        magnitude=9,
        erase=0.25,
        mixup=0.8,
        cutmix=1.0,
        normalise="imagenet",
        drop_path_rate=0.1,
        steps=300 * EPOCH,
        batch_size=4096,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.05,
        decay_all=False,
        schedule="cosine",
        warmup_steps=20 * EPOCH,
        label_smoothing=0.1,
        ema_decay=0.9999,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
