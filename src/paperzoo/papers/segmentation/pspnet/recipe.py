"""PSPNet's training: the task's default recipe with its augmentation, and a higher rate for the layers that ImageNet did not train."""

from dataclasses import dataclass, field

from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.tasks import segmentation
from paperzoo.tasks.segmentation import SegmentationRecipe


@dataclass(frozen=True)
class Config(segmentation.Config):
    model: str = "pspnet_resnet50"
    data: str = "ADEChallengeData2016"
    crop_size: segmentation.Count = 473  # sec. 5.1: large crops matter
    steps: segmentation.Count = 150_000
    aux_weight: segmentation.NotNegative = 0.4  # sec. 5.2, table 2
    workers: int = 8
    rotate: segmentation.NotNegative = 10.0  # degrees, either way
    blur: segmentation.Fraction = 0.5  # probability of a 5 x 5 Gaussian
    head_factor: segmentation.Positive = 10.0  # learning rate of all but the backbone, relative; the released code's
    # sec. 5.1 tests by crops; the released code moves them by two thirds and averages
    window: segmentation.Count | None = 473
    overlap: float = field(default=1 / 3)


class RECIPE(SegmentationRecipe):
    """Sec. 5.1."""

    config: Config

    def augmentation(self) -> list[nn.Module]:
        config, others = self.config, super().augmentation()
        fill = {
            tv_tensors.Image: [round(255 * m) for m in self.facts["mean"]],
            tv_tensors.Mask: config.ignore_index,
        }
        turn = [v2.RandomRotation(config.rotate, v2.InterpolationMode.BILINEAR, fill=fill)] if config.rotate else []
        blur = [v2.RandomApply([v2.GaussianBlur(5, sigma=1.1)], config.blur)] if config.blur else []
        crop = next(i for i, transform in enumerate(others) if isinstance(transform, v2.RandomCrop))
        return [*others[:crop], *turn, *blur, *others[crop:]]

    def groups(self) -> list[dict]:
        """The backbone at the learning rate, what follows it at `head_factor` times that."""
        config, body = self.config, self.model.backbone
        known = {id(p) for p in body.parameters()}
        heads = [p for p in self.model.parameters() if id(p) not in known]
        return [
            {"params": list(body.parameters())},
            {"params": heads, "lr": config.learning_rate * config.head_factor},
        ]


PRESETS = {
    "embedded": Config(
        model="pspnet_slim",
        data="digit_ink",
        crop_size=64,
        scale=(1.0, 1.0),
        steps=160,
        batch_size=8,
        optimizer="adamw",
        learning_rate=6e-3,
        warmup_steps=20,
        workers=0,
        rotate=0.0,
        blur=0.0,
        head_factor=1.0,
        window=None,
    ),
    # Sec. 5.1 on ADE20K; VOC trains for 30,000 steps, Cityscapes for 90,000 with crops of 713 and neither rotation nor blur.
    "published": Config(),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
