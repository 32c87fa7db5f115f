"""DeepLabv3's training (sec. 4): the task's default recipe, with batch norm that can be frozen for the second round at output stride 8."""

from dataclasses import dataclass

from torch import nn

from paperzoo.engine.runtime import Runtime
from paperzoo.tasks import segmentation
from paperzoo.tasks.segmentation import SegmentationRecipe


@dataclass(frozen=True)
class Config(segmentation.Config):
    model: str = "deeplabv3_multigrid"  # of output stride 16
    data: str = "VOCdevkit/VOC2012"
    crop_size: segmentation.Count = 513  # sec. 4.1: large, as else large rates see padding alone
    learning_rate: segmentation.Positive = 0.007
    norm_momentum: segmentation.Fraction = 3e-4  # sec. 4.1: the running averages of batch norm keep 0.9997
    freeze_norm: bool = False  # batch norm keeps its averages, scale and shift
    workers: int = 8


class RECIPE(SegmentationRecipe):
    """Sec. 4.1: train at output stride 16; then freeze batch norm and go on at 8."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        for norm in norms(self.model):
            norm.momentum = config.norm_momentum

    def build(self, fresh: bool) -> nn.Module:
        model = super().build(fresh)
        for norm in norms(model) if self.config.freeze_norm else []:
            norm.requires_grad_(False)
        return model

    def begin_training(self) -> None:
        super().begin_training()
        for norm in norms(self.model) if self.config.freeze_norm else []:
            norm.eval()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


PRESETS = {
    "embedded": Config(
        model="deeplabv3_slim",
        data="digit_ink",
        crop_size=64,
        scale=(1.0, 1.0),
        steps=160,
        batch_size=8,
        optimizer="adamw",
        learning_rate=6e-3,
        warmup_steps=20,
        norm_momentum=0.1,
        workers=0,
    ),
    # Sec. 4.1: 30,000 steps on VOC's 10,582 images with SBD's. The second round of the paper, on VOC's own annotation:
    # --model.output_stride 8 --freeze-norm --learning-rate 0.001 --weights FILE
    "published": Config(),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
