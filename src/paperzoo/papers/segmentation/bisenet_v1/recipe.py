"""BiSeNet learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.segmentation import Config
from paperzoo.tasks.segmentation import SegmentationRecipe as RECIPE

PRESETS = {
    "embedded": Config(
        model="bisenet_v1_slim",
        data="digit_ink",
        crop_size=64,
        scale=(1.0, 1.0),
        steps=120,
        batch_size=16,
        optimizer="adamw",
        learning_rate=4e-3,
        aux_weight=1.0,
    ),
    # Sec. 4.1: batches of 16, 2.5e-2 with "poly", weight decay 1e-4, mirroring, scales of 0.75 to 2 (five of them; here any between).
    # Eq. (2) weighs both auxiliary losses by 1. Crop, steps and hard pixels (those below 0.7, a sixteenth at least) as in the
    # public training code. --backbone-weights takes an ImageNet ResNet-18's file.
    "published": Config(
        model="bisenet_v1_resnet18",
        data="cityscapes",
        crop_size=1024,
        scale=(0.75, 2.0),
        steps=80_000,
        batch_size=16,
        learning_rate=2.5e-2,
        weight_decay=1e-4,
        aux_weight=1.0,
        hard_pixels=0.7,
        min_kept=1 / 16,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
