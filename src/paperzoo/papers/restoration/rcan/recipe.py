"""RCAN learns by EDSR's recipe, which can start from the network of another scale; here are its settings."""

from paperzoo.papers.restoration.edsr.recipe import Config
from paperzoo.papers.restoration.edsr.recipe import EDSRRecipe as RECIPE

# Sec. 4.1 and the released options: Adam, rate 1e-4, halved every 200 epochs of 1,000 batches of 16 patches of 48 x 48 (low resolution),
# L1, 1,000 epochs. Factors above 2 start from the x2 weights (`pretrained`).
DIV2K = {
    "model": "rcan_x2",
    "data": "DIV2K",
    "task": "super_resolution",
    "factor": 2,
    "patch_size": 48,
    "steps": 1_000_000,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "milestones": (0.2, 0.4, 0.6, 0.8),
    "gamma": 0.5,
    "workers": 16,
}

PRESETS = {
    "embedded": Config(
        model="rcan_small_x2",
        data="photographs",
        task="super_resolution",
        factor=2,
        patch_size=24,
        steps=380,
        batch_size=8,
        learning_rate=2e-3,
        schedule="cosine",
    ),
    "published": Config(**DIV2K),
    "published_x3": Config(**DIV2K | {"model": "rcan_x3", "factor": 3}),
    "published_x4": Config(**DIV2K | {"model": "rcan_x4", "factor": 4}),
    "published_x8": Config(**DIV2K | {"model": "rcan_x8", "factor": 8}),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
