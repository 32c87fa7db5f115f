"""DnCNN learns the noise of random patches; the published settings are those of section IV.

l(theta) = 1 / (2N) * sum over patches of ||R(y) - (y - x)||^2            (equation 1)
"""

from __future__ import annotations

from torch import Tensor

from paperzoo.tasks.image_restoration import Config, ImageRestorationRecipe


class DnCNNRecipe(ImageRestorationRecipe):
    """The task's default recipe with the paper's loss."""

    def loss(self, restored: Tensor, clean: Tensor) -> Tensor:
        """Equation 1. R(y) - (y - x) is clean - restored; the sum over a patch's pixels, halved, its mean over the patches."""
        if self.config.loss != "mse":
            return super().loss(restored, clean)
        return 0.5 * (restored.float() - clean).square().sum((1, 2, 3)).mean()


# the rate falls exponentially from 0.1 to 0.0001 over 50 epochs: a step at each of them
EPOCHS = tuple(round(k / 50, 2) for k in range(1, 50))
PUBLISHED = Config(
    model="dncnn_s",
    data="BSD400",  # 400 grey pictures of 180 x 180
    test_data="BSD68",
    channels=1,
    sigma=25.0,
    patch_size=40,
    loss="mse",
    steps=80_000,  # 50 epochs of 128 x 1600 patches
    batch_size=128,
    optimizer="sgd",
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="step",
    milestones=EPOCHS,
    gamma=1e-3 ** (1 / 49),
    clip=5.0,  # not in the paper: a rate of 0.1 on a sum over pixels needs a bound (the released code trains with Adam)
)
BLIND = {"model": "dncnn_b", "sigma": (0.0, 55.0), "test_sigma": 25.0, "patch_size": 50, "steps": 150_000}
FIELDS = {name: getattr(PUBLISHED, name) for name in Config.__dataclass_fields__}
PRESETS = {
    "embedded": Config(
        model="dncnn_slim",
        data="photographs",
        channels=1,
        task="super_resolution",
        factor=2,
        steps=450,
        learning_rate=0.003,
        patch_size=40,
        loss="mse",
        batch_size=4,
        schedule="cosine",
    ),
    "published": PUBLISHED,
    "published_blind": Config(**FIELDS | BLIND),
    "published_colour_blind": Config(**FIELDS | BLIND | {"channels": 3, "data": "CBSD432", "test_data": "CBSD68"}),
    "published_general": Config(
        **FIELDS
        | BLIND
        | {"model": "dncnn_3", "task": "general", "quality": (5, 99), "test_quality": 40, "steps": 400_000}
    ),
}
RECIPE = DnCNNRecipe
