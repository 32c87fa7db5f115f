"""TransUNet learns slices by half cross-entropy and half Dice (sec. 4.2 and the released code); volumes are segmented slice by slice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.tasks.volume_metrics import IGNORE
from paperzoo.tasks.volume_segmentation import Config, VolumeSegmentationRecipe


def dice_loss(probabilities: Tensor, truth: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - 2 sum(p g) / (sum(p^2) + sum(g^2)) over the whole batch, averaged over all classes, the background included.

    Args:
        probabilities: (B, K, H, W). truth: int64 (B, H, W); 255 does not count.
    """
    counted = (truth != IGNORE)[:, None]
    wanted = F.one_hot(truth.where(truth != IGNORE, 0), probabilities.shape[1]).movedim(-1, 1)
    p, g = probabilities * counted, (wanted * counted).to(probabilities.dtype)
    axes = [0, *range(2, p.ndim)]
    return (1 - (2 * (p * g).sum(axes) + smooth) / ((p * p).sum(axes) + g.sum(axes) + smooth)).mean()


class TransUNetRecipe(VolumeSegmentationRecipe):
    config: Config

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Half the mean cross-entropy, half the Dice loss."""
        logits = logits.float()
        counted = self.runtime.mean((masks != IGNORE).sum().float()).clamp(min=1)
        entropy = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum") / counted
        return 0.5 * entropy + 0.5 * dice_loss(logits.softmax(1), masks)

    def example(self) -> tuple[Tensor]:
        size = [-(-n // 16) * 16 for n in self.config.window]
        shape = (2, len(self.facts["channels"]), *size)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


RECIPE = TransUNetRecipe

PRESETS = {
    # Whole axial slices: liver and spleen are equally bright and differ by the side they lie on, so position counts.
    "embedded": Config(
        model="transunet_slim",
        data="organs",
        dimensions=2,
        window=(48, 32),
        spacing=(4.0, 4.0, 5.0),
        foreground=0.9,
        rotate=5.0,
        scale=(0.9, 1.1),
        steps=230,
        batch_size=8,
        learning_rate=0.008,
        schedule="cosine",
        warmup_steps=20,
        clip=1.0,
        overlap=0.25,
        windows=16,
    ),
    # Sec. 4.2: 224 x 224, SGD with momentum 0.9, rate 0.01, weight decay 1e-4, 24 slices a batch; the released code's poly decay and 150 epochs of
    # 2,211 slices. Synapse (18 training cases) as images/ and masks/; start from the encoder's weights with weights=R50+ViT-B_16.npz. The paper
    # resizes slices of 512 x 512 pixels to 224 x 224, about 1.6 mm.
    "published": Config(
        model="transunet",
        data="data/Synapse",
        dimensions=2,
        window=(224, 224),
        spacing=(1.6, 1.6, 3.0),
        normalise="ct",
        foreground=0.7,
        flip=("x", "y"),
        rotate=20.0,
        steps=13_950,
        batch_size=24,
        optimizer="sgd",
        learning_rate=0.01,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        schedule="poly",
        power=0.9,
        windows=24,
        workers=4,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config", "TransUNetRecipe"]
