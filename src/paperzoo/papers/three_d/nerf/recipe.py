"""How NeRF learns: the task's default recipe with the paper's settings."""

from __future__ import annotations

from paperzoo.tasks.radiance_fields import Config
from paperzoo.tasks.radiance_fields import RadianceFieldRecipe as RECIPE

PRESETS = {
    # Pictures of 40 x 40 pixels and a small field: a larger rate, smaller batches.
    "embedded": Config(
        model="nerf_tiny",
        data="rendered_objects",
        steps=260,
        batch_size=400,
        learning_rate=1e-2,
        final_learning_rate=1e-3,
    ),
    # Sec. 5.3 and appendix A, the synthetic scenes: 800 x 800 pixels, 4096 rays a step, Adam from 5e-4 to 5e-5, 100 to 300 thousand steps; the released
    # settings show the middle of the pictures alone at first, so that a scene on white does not end as nothing but white.
    "published": Config(
        model="nerf",
        data="nerf_synthetic/lego",
        white_background=True,
        steps=200_000,
        batch_size=4096,
        learning_rate=5e-4,
        final_learning_rate=5e-5,
        centre_steps=500,
    ),
    # The real forward-facing scenes: a quarter of a thousand lines, normalised device coordinates, noise on the densities, no background.
    "llff": Config(
        model="nerf",
        model_arguments={"noise": 1.0},
        data="nerf_llff_data/fern",
        downscale=4,
        white_background=False,
        ndc=True,
        steps=200_000,
        batch_size=4096,
        learning_rate=5e-4,
        final_learning_rate=5e-5,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
