"""ArcFace: an embedding learned by a softmax over angles, the true one with a margin.

Deng et al., CVPR 2019 (arXiv:1801.07698), sec. 3. The task's default recipe with another head; any network that embeds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.face.arcface.technique import CentresSGD, CombinedMargin, MarginSoftmax, PartialFC
from paperzoo.tasks import face_verification
from paperzoo.tasks.face_verification import FaceRecipe
from paperzoo.tasks.training import learning_rate_factor

Margin = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Config(face_verification.Config):
    """Section 3.1; the margins are those of eq. 4, cos(m1 theta + m2) - m3."""

    m1: Annotated[float, Field(gt=0)] = 1.0
    m2: Annotated[float, Field(ge=0, lt=3.14)] = 0.5  # radians
    m3: Margin = 0.0
    head: Literal["whole", "spread"] = "whole"  # the class centres on every process, or a part on each
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0  # the share of the centres that a step sees; "spread" only


class ArcFace(FaceRecipe):
    """The task's default recipe with the margin; with `head="spread"` for identities by the million."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        if config.head == "whole" and config.sample_rate < 1:
            raise PaperZooError(f"sample_rate {config.sample_rate} needs --head spread; a whole head sees every centre")
        if config.head == "spread" and config.optimizer != "sgd":
            raise PaperZooError(f"--head spread learns by sgd alone, not by {config.optimizer}")
        if config.head == "spread" and runtime.shard_networks:
            raise PaperZooError("--head spread keeps its centres apart by itself; leave --shard away")
        super().__init__(config, runtime, facts)
        if config.head == "spread":
            c = config
            self.head_optimizer = CentresSGD(self.head, c.learning_rate, c.momentum, c.weight_decay)
            factor = lambda step: learning_rate_factor(config, step)  # noqa: E731
            self.head_scheduler = torch.optim.lr_scheduler.LambdaLR(self.head_optimizer, factor)

    def make_head(self, identities: int, num_features: int) -> nn.Module:
        c = self.config
        margin = CombinedMargin(c.m1, c.m2, c.m3)
        if c.head == "whole":
            return MarginSoftmax(identities, num_features, margin, c.scale)
        rank, world = self.runtime.rank, self.runtime.world
        return PartialFC(identities, num_features, margin, c.scale, c.sample_rate, rank, world)

    def learners(self) -> nn.Module:
        return self.model if self.config.head == "spread" else super().learners()

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, labels = batch
        self.model.train()
        embeddings = self.model(images)
        loss = self.head(embeddings, labels)
        values: dict[str, Any] = {"embedding_length": embeddings.detach().float().norm(dim=1).mean()}
        if self.config.head == "whole":
            return {"loss": loss} | values
        runtime = self.runtime
        runtime.update(self.optimizer, loss, self.config.clip, retain_graph=True)
        # the centres of different processes are different ones: their gradients are not averaged
        runtime.update(self.head_optimizer, loss, average=False)
        if runtime.micro == runtime.accumulate - 1:
            self.scheduler.step()
            self.head_scheduler.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        return {"loss": loss.detach()} | values


PRESETS = {
    # the paper's margin; a smaller scale, as a hundred identities need fewer than tens of thousands
    "embedded": Config(
        model="iresnet10_thin",
        embedding_size=64,
        image_size=32,
        flip_test=False,
        scale=8.0,
        steps=200,
        batch_size=48,
        schedule="cosine",
    ),
    "published": Config(
        model="iresnet100",
        data="ms1mv2",
        benchmark="lfw",
        drop_rate=0.4,
        workers=8,
    ),
    "casia": Config(
        model="iresnet50",
        data="casia_webface",
        benchmark="lfw",
        drop_rate=0.4,
        steps=32_000,
        milestones=(20 / 32, 28 / 32),
        workers=8,
    ),
}
RECIPE = ArcFace


def without_margin(config: Config) -> face_verification.Config:
    """The task's default recipe: the same network, data, scale, steps and optimizer, and no margin (NormFace)."""
    return face_verification.Config(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(face_verification.Config)}
    )


BASELINE = (FaceRecipe, without_margin(PRESETS["embedded"]))
