"""How DenseDepth learns: from known depth, by three losses of its reciprocal at half the resolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paperzoo.papers.depth.densedepth.technique import densedepth_loss, depth_of, reciprocal, reduced
from paperzoo.tasks.depth import Config, DepthRecipe


class DenseDepth(DepthRecipe):
    """The network's answer is y = m / depth, with m = `max_depth`."""

    def to_depth(self, output: Tensor) -> Tensor:
        return depth_of(output, self.config.max_depth)

    def depth_at(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Made depth first, then enlarged, as the released evaluation."""
        return F.interpolate(self.to_depth(output), size, mode="bilinear", align_corners=False)

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        y = self.model(batch["image"]).float()
        truth, known = reduced(reciprocal(batch["depth"], self.config.max_depth), tuple(y.shape[-2:]))
        parts = densedepth_loss(y, truth, known)
        return {
            "loss": parts.total,
            "distance": parts.distance.detach(),
            "edges": parts.edges.detach(),
            "structure": parts.structure.detach(),
        }


RECIPE = DenseDepth

PRESETS = {
    # From scratch on small images, where the paper starts from ImageNet's weights: hence a narrow network and a larger rate.
    "embedded": Config(
        model="densedepth_slim",
        data="traced_scenes",
        image_size=(64, 96),
        max_depth=15.0,
        mirror_test=True,
        flip=0.5,
        channel_swap=0.25,
        steps=160,
        batch_size=8,
        learning_rate=3e-3,
        schedule="step",
        milestones=(0.6, 0.85),
    ),
    # Sec. 4.2: NYU Depth v2's 50,000 filled-in frames of 640 x 480, depths up to 10 m, 1,000,000 steps of Adam at 1e-4 with batches of 8; mirrored
    # half, colours swapped a quarter of the time. Tested on the mean of an image and its mirror image. The encoder starts from
    # ImageNet: --backbone-weights.
    "published": Config(
        model="densedepth169",
        data="nyu",
        image_size=(480, 640),
        max_depth=10.0,
        crop="nyu",
        average="pixels",
        mirror_test=True,
        flip=0.5,
        channel_swap=0.25,
        steps=1_000_000,
        batch_size=8,
        learning_rate=1e-4,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
