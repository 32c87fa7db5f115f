"""The Fourier neural operator learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.operator_learning import Config
from paperzoo.tasks.operator_learning import OperatorRecipe as RECIPE

PRESETS = {
    "embedded": Config(
        model="fno1d",
        data="burgers",
        resolution=64,
        test_resolutions=(32, 128, 256),
        reference=256,
        viscosity=0.02,  # steeper waves than the paper's 0.1, at which all but the longest wave has died by t = 1
        train_samples=256,
        test_samples=64,
        modes=12,
        width=24,
        steps=400,
        batch_size=32,
        learning_rate=4e-3,
        decay_steps=100,
    ),
    # sec. 5 and 5.1: 1000 functions, Adam at 1e-3 halved every 100 epochs, 500 epochs in batches of 20, 16 modes, 64 channels
    "published": Config(
        model="fno1d",
        data="burgers",
        resolution=1024,
        test_resolutions=(256, 512, 2048, 4096, 8192),
        steps=500 * 50,
        batch_size=20,
        learning_rate=1e-3,
        decay_steps=100 * 50,
    ),
}
PRESETS["published_256"] = Config(
    resolution=256, test_resolutions=(512, 1024, 2048, 4096, 8192)
)  # the column s = 256 of table 1

__all__ = ["PRESETS", "RECIPE", "Config"]
