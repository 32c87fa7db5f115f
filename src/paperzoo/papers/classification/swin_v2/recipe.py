"""Swin V2 learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

PRESETS = {
    "embedded": Config(
        model="swinv2_digits",
        data="digits",
        image_size=32,
        augment="none",
        steps=300,
        batch_size=32,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.05,
        decay_all=False,
        schedule="cosine",
        warmup_steps=20,
        clip=5.0,
    ),
    # Appendix A1: ImageNet-1K from scratch as Swin V1: AdamW for 300 epochs (1251 steps each) in batches of 1024, rate 0.001,
    # cosine after 20 epochs of warm-up, weight decay 0.05, gradients clipped at 5, label smoothing; stochastic depth is the
    # model's own default.
    "published": Config(
        model="swinv2_tiny_window8_256",
        data="imagenet",
        image_size=256,
        augment="randaugment",
        magnitude=9,
        erase=0.25,
        mixup=0.8,
        cutmix=1.0,
        drop_path_rate=0.2,
        normalise="imagenet",
        steps=300 * 1251,
        batch_size=1024,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        decay_all=False,
        schedule="cosine",
        warmup_steps=20 * 1251,
        label_smoothing=0.1,
        clip=5.0,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
