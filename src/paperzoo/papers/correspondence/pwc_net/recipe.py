"""How PWC-Net learns: known flow on every level of the pyramid; the schedules of sec. 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paperzoo.papers.correspondence.pwc_net.technique import pyramid_loss
from paperzoo.tasks import optical_flow
from paperzoo.tasks.optical_flow import FlowRecipe


@dataclass(frozen=True)
class Config(optical_flow.Config):
    """`robust`: the loss of fine-tuning, eq. (4); else that of learning from the start, eq. (3)."""

    robust: bool = False


class PWCNetRecipe(FlowRecipe):
    """The task's recipe with the loss on the pyramid's levels."""

    config: Config
    any_size = (
        False  # halving a size rounds it one way or the other on each level; a traced graph holds for one of them
    )

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return pyramid_loss(output, batch["flow"], batch["valid"], self.config.robust)


RECIPE = PWCNetRecipe


def halved(steps: int, *places: int) -> dict[str, Any]:
    """A schedule whose rate is halved after these steps."""
    return {"steps": steps, "schedule": "step", "gamma": 0.5, "milestones": tuple(p / steps for p in places)}


FINE_TUNING = halved(150_000, 45_000, 65_000, 85_000, 95_000, 97_500, 100_000, 110_000, 120_000, 130_000, 140_000)

PRESETS = {
    "embedded": Config(
        model="pwc_net_slim",
        data="moving_layers",
        crop_size=(48, 64),
        augment="flip",
        steps=180,
        batch_size=8,
        learning_rate=4e-3,
        schedule="cosine",
        warmup_steps=10,
    ),
    # FlyingChairs, S_long of FlowNet2: 1.2 million steps, halved at 0.4, 0.6, 0.8 and 1 million; weight decay 0.0004, not of biases.
    "published": Config(
        data="FlyingChairs_release",
        crop_size=(384, 448),
        weight_decay=4e-4,
        workers=8,
        **halved(1_200_000, 400_000, 600_000, 800_000, 1_000_000),
    ),
    # Then FlyingThings3D, S_fine: --weights of the run before.
    "published_things": Config(
        data="FlyingThings3D",
        crop_size=(384, 768),
        batch_size=4,
        learning_rate=1e-5,
        weight_decay=4e-4,
        workers=8,
        **halved(500_000, 200_000, 300_000, 400_000),
    ),
    # Then Sintel, both passes, with the robust loss, mirrored pairs and no noise.
    "published_sintel": Config(
        data="Sintel",
        render_pass="both",
        crop_size=(384, 768),
        batch_size=4,
        flip=0.5,
        noise=0.0,
        robust=True,
        learning_rate=5e-5,
        weight_decay=4e-4,
        workers=8,
        **FINE_TUNING,
    ),
    # Or KITTI: crops of 896 x 320, smaller changes of place than here are said to help (sec. 4.1).
    "published_kitti": Config(
        data="KITTI",
        crop_size=(320, 896),
        batch_size=4,
        flip=0.5,
        noise=0.0,
        robust=True,
        learning_rate=5e-5,
        weight_decay=4e-4,
        workers=8,
        **FINE_TUNING,
    ),
}
