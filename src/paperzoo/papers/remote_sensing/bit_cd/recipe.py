"""BIT learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.change_detection import ChangeDetectionRecipe as RECIPE
from paperzoo.tasks.change_detection import Config

PRESETS = {
    "embedded": Config(
        model="bit_slim",
        data="terrain_changes",
        crop_size=64,
        scale=(1.0, 1.0),
        blur=0.0,
        swap=0.5,
        steps=100,
        batch_size=8,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=1e-2,
    ),
    # Sec. IV-C and the released code: SGD, momentum 0.9, weight decay 5e-4, 0.01 falling in a straight line over 200 epochs,
    # batches of 8 pairs of 256 pixels, mirrors, a scale of 1 to 1.2 and a crop, a blur of up to 1. LEVIR-CD's 445 training pictures
    # of 1024 pixels are 7,120 such tiles: 200 epochs are 178,000 steps. Tested tile by tile.
    # --backbone-weights takes an ImageNet ResNet-18's file.
    "published": Config(model="bit_resnet18", data="levir_cd", steps=178_000, window=256, overlap=0.0, workers=8),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
