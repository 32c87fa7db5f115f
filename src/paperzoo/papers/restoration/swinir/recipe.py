"""SwinIR learns by EDSR's recipe, which can start from the network of another scale; here are its settings."""

from paperzoo.papers.restoration.edsr.recipe import Config
from paperzoo.papers.restoration.edsr.recipe import EDSRRecipe as RECIPE

# Sec. 4.1 and the authors' training options: Adam, rate 2e-4, halved at 1/2, 0.8, 0.9, 0.95 of 500,000 iterations, batches of 32
# patches of 48 x 48 (low resolution), L1, weights averaged with 0.999. x3, x4 and x8 start from x2 (`pretrained`) with half the steps.
CLASSICAL = {
    "model": "swinir_classical_x2",
    "data": "DIV2K",
    "task": "super_resolution",
    "factor": 2,
    "patch_size": 48,
    "steps": 500_000,
    "batch_size": 32,
    "learning_rate": 2e-4,
    "milestones": (0.5, 0.8, 0.9, 0.95),
    "gamma": 0.5,
    "ema_decay": 0.999,
    "workers": 16,
}
# Denoising: Charbonnier with 1e-3, batches of 8 patches of 128 x 128, 1,600,000 iterations on DIV2K, Flickr2K, BSD500 and WED.
DENOISING = CLASSICAL | {
    "model": "swinir_colour_denoising",
    "data": "DFWB",
    "test_data": "CBSD68",
    "task": "denoise",
    "sigma": 15.0,
    "factor": 1,
    "loss": "charbonnier",
    "patch_size": 128,
    "batch_size": 8,
    "steps": 1_600_000,
    "milestones": (0.5, 0.75, 0.875, 0.9375),
}

PRESETS = {
    "embedded": Config(
        model="swinir_small_x2",
        data="photographs",
        channels=1,  # without a skip from the image, strong colours take longer than seconds to learn
        task="super_resolution",
        factor=2,
        patch_size=16,
        steps=300,
        batch_size=8,
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=10,
    ),
    "published": Config(**CLASSICAL),
    "published_light": Config(
        **CLASSICAL | {"model": "swinir_light_x2", "patch_size": 64, "batch_size": 64, "workers": 16}
    ),
    "published_denoising": Config(**DENOISING),
    "published_grey_denoising": Config(
        **DENOISING | {"model": "swinir_grey_denoising", "channels": 1, "test_data": "BSD68"}
    ),
    "published_jpeg": Config(
        **DENOISING
        | {"model": "swinir_grey_jpeg", "channels": 1, "task": "jpeg", "quality": 40, "patch_size": 126, "test_data": "Classic5"}
    ),
}  # fmt: skip

__all__ = ["PRESETS", "RECIPE", "Config"]
