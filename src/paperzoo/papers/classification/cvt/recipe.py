"""CvT learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

PRESETS = {
    "embedded": Config(
        model="cvt_digits",
        data="digits",
        image_size=16,
        augment="none",
        steps=250,
        batch_size=32,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        decay_all=False,
        schedule="cosine",
        warmup_steps=20,
    ),
    # sec. 4.1: AdamW for 300 epochs in batches of 2048 (625 steps each), cosine, weight decay 0.05 (0.1 for the larger ones), otherwise
    # as DeiT. The text's rate of 0.02 is taken for a misprint, as it goes with AdamW: here it is a tenth. Warm-up is DeiT's.
    "published": Config(
        model="cvt_13",
        data="imagenet",
        image_size=224,
        augment="randaugment",
        magnitude=9,
        erase=0.25,
        mixup=0.8,
        cutmix=1.0,
        drop_path_rate=0.1,
        normalise="imagenet",
        steps=300 * 625,
        batch_size=2048,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        decay_all=False,
        schedule="cosine",
        warmup_steps=5 * 625,
        label_smoothing=0.1,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
