"""NAFNet learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.image_restoration import Config
from paperzoo.tasks.image_restoration import ImageRestorationRecipe as RECIPE

# Sec. 5.1 and the released options: AdamW with betas (0.9, 0.9), rate 1e-3 to 1e-7 by a cosine, batches of 8 GPUs x 8 crops of
# 256 x 256, 400,000 iterations, PSNR loss. SIDD is not flipped.
SIDD = {
    "model": "nafnet_sidd_width64",
    "data": "SIDD",
    "patch_size": 256,
    "flip": False,
    "loss": "psnr",
    "steps": 400_000,
    "batch_size": 64,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "betas": (0.9, 0.9),
    "weight_decay": 0.0,
    "schedule": "cosine",
    "workers": 16,
}

PRESETS = {
    # What bicubic interpolation leaves blurred: the published tasks need more than seconds to pass classical methods.
    "embedded": Config(
        model="nafnet_small",
        data="photographs",
        task="super_resolution",
        factor=2,
        loss="psnr",
        patch_size=32,
        steps=160,
        batch_size=8,
        optimizer="adamw",
        learning_rate=1e-2,
        betas=(0.9, 0.9),
        schedule="cosine",
    ),
    "published": Config(**SIDD),
    "published_width32": Config(**SIDD | {"model": "nafnet_sidd_width32", "steps": 200_000, "batch_size": 32}),
    "published_gopro": Config(
        **SIDD
        | {"model": "nafnet_gopro_width64", "data": "GoPro", "task": "deblur", "flip": True, "weight_decay": 1e-3}
    ),
    "published_gopro_width32": Config(
        **SIDD
        | {"model": "nafnet_gopro_width32", "data": "GoPro", "task": "deblur", "flip": True, "steps": 200_000, "batch_size": 32}
    ),
}  # fmt: skip

__all__ = ["PRESETS", "RECIPE", "Config"]
