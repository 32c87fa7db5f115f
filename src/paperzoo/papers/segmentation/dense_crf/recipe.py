"""DenseCRF as it is used: the answers of any segmentation network, refined on the picture's own colours.

The network learns by the task's default recipe; the CRF has no part in learning (section 5 takes its unaries as given).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from paperzoo.papers.segmentation.dense_crf.technique import Kernels, mean_field
from paperzoo.tasks import segmentation
from paperzoo.tasks.segmentation import NotNegative, Positive, SegmentationRecipe, answer, overlay


@dataclass(frozen=True)
class Config(segmentation.Config):
    """Eq. 3's weights and deviations, for pictures of some 320 x 213 pixels with colours in 0 … 255; and the iterations of section 5."""

    appearance: NotNegative = 10.0  # w1
    position: Positive = 60.0  # theta_alpha, pixels
    colour: Positive = 20.0  # theta_beta, steps of 255
    smoothness: NotNegative = 3.0  # w2
    smooth_position: Positive = 3.0  # theta_gamma, pixels
    iterations: Annotated[int, Field(ge=0)] = 10
    least: Annotated[float, Field(gt=0, lt=0.5)] = 1e-5  # no class is believed to be less likely than this


class DenseCRFRecipe(SegmentationRecipe):
    """The default recipe; its logits in evaluation and prediction are those of the CRF's marginals."""

    config: Config

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Log-marginals (B, K, H, W) of normalised images (B, 3, H, W)."""
        c, unary = self.config, super().logits(images).softmax(1).clamp(min=self.config.least)
        mean, deviation = (images.new_tensor(self.facts[k])[:, None, None] for k in ("mean", "deviation"))
        pixels = (images * deviation + mean).clamp(0, 1) * 255
        kernels = Kernels(c.appearance, c.position, c.colour, c.smoothness, c.smooth_position)
        return mean_field(-unary.log(), pixels, kernels, c.iterations).clamp(min=1e-30).log()

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images: picture, the network's answer, the CRF's, the truth."""
        from paperzoo.engine.pictures import tile
        from paperzoo.tasks.segmentation import Transformed, v2

        labels, data = self.facts["labels"], self.test_set
        inputs = Transformed(data, v2.Compose(self.to_input))
        pictures = []
        for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:6].tolist():
            image, truth = (part.as_subclass(Tensor) for part in data[i])
            with torch.inference_mode():
                plain = answer(super().logits(inputs[i][0][None])[0].softmax(0), labels)
            masks = torch.full_like(truth, 255), plain.mask, self.predict([image])[0].mask, truth
            pictures += [overlay(image, mask, labels) for mask in masks]
        return {"Picture, network, with the CRF, truth": tile(pictures, 8)} | super().figures()


EMBEDDED = segmentation.Config(
    model="fcn8s_slim",
    data="digit_ink",
    crop_size=64,
    scale=(1.0, 1.0),
    flip=0.5,
    steps=100,
    batch_size=16,
    optimizer="adamw",
    learning_rate=3e-3,
)
PRESETS = {
    # found on training pictures by grid search, as section 4 does on its validation set
    "embedded": Config(
        **asdict(EMBEDDED), appearance=8.0, position=10.0, colour=20.0, smoothness=1.0, smooth_position=1.0
    ),
    # MSRC-21 in class-id masks, and the kernels of the released example. The paper's unaries are TextonBoost's; here a network's.
    "published": Config(
        model="fcn8s_vgg16",
        data="MSRC_ObjCategImageDatabase_v2",
        crop_size=320,
        scale=(1.0, 1.0),
        flip=0.5,
        steps=8000,
        batch_size=20,
        learning_rate=1e-4,
        momentum=0.9,
        weight_decay=5e-4,
        bias_factor=2.0,
        power=0.0,
        workers=8,
    ),
}
RECIPE = DenseCRFRecipe
BASELINE = (SegmentationRecipe, EMBEDDED)
