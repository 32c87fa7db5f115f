"""EDSR and MDSR learn with the mean absolute error on DIV2K (section 3 and 4).

"We train our networks using L1 loss instead of L2" (section 4.2); the networks of scale 3 and 4 start from that of scale 2 (section 3.2, option
`pretrained`); MDSR draws a scale for each batch (section 3.2); EDSR+ and MDSR+ average eight flips and turns (section 3.4, option `self_ensemble`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import Dataset

from paperzoo.data.restoration import open_restoration
from paperzoo.engine.feeding import Batches
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.restoration.edsr.model import MDSR
from paperzoo.tasks import image_restoration
from paperzoo.tasks.image_restoration import ImageRestorationRecipe, Patches


@dataclass(frozen=True)
class Config(image_restoration.Config):
    """Defaults: EDSR at scale 2 as published."""

    pretrained: str | None = None  # a network of another scale to start from: everything but the enlarging
    factors: tuple[int, ...] = ()  # the scales that MDSR learns together; `factor` is the one that is tested and used


class SeveralScales(Dataset):
    """The patches of several scales one after the other; each has as many pictures."""

    def __init__(self, scales: list[Patches]) -> None:
        self.scales = scales

    def __len__(self) -> int:
        return len(self.scales) * len(self.scales[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scale, row = divmod(index, len(self.scales[0]))
        return self.scales[scale][row]


class ScaleBatches(Batches):
    """Batches of one scale each, drawn anew for every step and the same on all ranks."""

    def rows(self, position: int) -> list[int]:
        count = len(self.dataset.scales[0])
        scale = self.runtime.key("scale", position) % len(self.dataset.scales)
        rows = self.runtime.indices_at(position, count, self.batch_size, self.stream)
        return (rows + scale * count).tolist()


class EDSRRecipe(ImageRestorationRecipe):
    """The task's default recipe, a start from another scale, and a scale for each batch where the network has several."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.factors and not isinstance(self.model, MDSR):
            raise PaperZooError(f"{config.model} has one scale; factors is for a network of several, such as mdsr")

    def build(self) -> nn.Module:
        model = super().build()
        if self.config.pretrained is not None:
            from paperzoo.engine.weights import read_state

            given, own = read_state(Path(self.config.pretrained)), model.state_dict()
            fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
            others = [k for k in own if k not in fitting and not k.startswith(("tail.", "upsample."))]
            if others:
                raise PaperZooError(
                    f"{self.config.pretrained}: does not fit {self.config.model}: {others[0]} is missing or differs"
                )
            model.load_state_dict(own | fitting)
        return model

    @cached_property
    def batches(self) -> Batches:
        c = self.config
        if not c.factors:
            return super().batches
        data = SeveralScales([self.patches_at(factor) for factor in c.factors])
        return ScaleBatches(self.runtime, data, c.batch_size, "data", c.workers, None)

    def patches_at(self, factor: int) -> Patches:
        c = self.config
        pictures = open_restoration(c.data, "train", factor, c.degraded)
        kind = replace(self.degradations()[0][0], factor=factor)
        return Patches(pictures, [[kind]], c.patch_size, c.channels, c.flip)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        if not self.config.factors:
            return super().step(batch)
        self.model.set_scale(batch[1].shape[-1] // batch[0].shape[-1])
        try:
            return super().step(batch)
        finally:
            self.model.set_scale(self.config.factor)


PUBLISHED = Config(
    model="edsr",
    data="DIV2K",  # DIV2K_train_HR, DIV2K_train_LR_bicubic/X2 … and the same for valid
    task="super_resolution",
    factor=2,
    patch_size=48,  # of the small image: 96 pixels of the large one at scale 2
    loss="l1",
    steps=300_000,
    batch_size=16,
    optimizer="adam",
    learning_rate=1e-4,
    schedule="step",
    milestones=(2 / 3,),  # halved every 2 x 10^5 updates
    gamma=0.5,
    workers=4,
)


def like(config: Config, **changes: object) -> Config:
    return Config(**{f.name: getattr(config, f.name) for f in fields(config)} | changes)


PRESETS = {
    "embedded": Config(
        model="edsr_slim",
        data="photographs",
        task="super_resolution",
        factor=2,
        patch_size=24,
        loss="l1",
        steps=350,
        batch_size=8,
        learning_rate=3e-3,
        schedule="cosine",
    ),
    "published": PUBLISHED,
    "published_3": like(PUBLISHED, factor=3),  # with --pretrained, the weights of scale 2
    "published_4": like(PUBLISHED, factor=4),
    "published_baseline": like(PUBLISHED, model="edsr_baseline"),
    "published_mdsr": like(PUBLISHED, model="mdsr", factors=(2, 3, 4)),
    "published_mdsr_baseline": like(PUBLISHED, model="mdsr_baseline", factors=(2, 3, 4)),
}
RECIPE = EDSRRecipe
