"""MLP-Mixer learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

PRESETS = {
    "embedded": Config(
        model="mixer_digits",
        data="digits",
        image_size=32,
        augment="shift",  # a mirrored digit is no digit
        steps=250,
        batch_size=64,
        optimizer="adamw",
        learning_rate=5e-3,
        weight_decay=0.05,
        decay_all=False,
        schedule="cosine",
        warmup_steps=20,
        label_smoothing=0.1,
        clip=1.0,
    ),
    # Sec. 3 and appendix B, from scratch on ImageNet: Adam for 300 epochs (312 steps each) in batches of 4096, 10k steps of
    # warm-up to 0.001, weight decay 0.1, gradients clipped at 1, RandAugment of magnitude 15, mixup, stochastic depth 0.1. The
    # paper's rate falls linearly, this one as a cosine.
    "published": Config(
        model="mixer_b16_224",
        data="imagenet",
        image_size=224,
        augment="randaugment",
        magnitude=15,
        mixup=0.5,
        normalise="imagenet",
        drop_path_rate=0.1,
        steps=300 * 312,
        batch_size=4096,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.1,
        schedule="cosine",
        warmup_steps=10_000,
        clip=1.0,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
