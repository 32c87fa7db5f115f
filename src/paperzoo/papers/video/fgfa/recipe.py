"""How FGFA learns (sec. 4.2, 5.1): frames with two random neighbours; and first, if asked for, frames alone and flow by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from paperzoo.data.flow import open_flow
from paperzoo.engine.runtime import Runtime
from paperzoo.engine.weights import read_state
from paperzoo.errors import PaperZooError
from paperzoo.papers.correspondence.pwc_net.technique import pyramid_loss
from paperzoo.papers.video.fgfa.flownet import FlowNetS, load_flow
from paperzoo.tasks import video_detection
from paperzoo.tasks.classification import Count, Positive
from paperzoo.tasks.optical_flow import cropped
from paperzoo.tasks.video_detection import VideoDetectionRecipe
from paperzoo.tasks.video_detection_samples import CollateWindows


@dataclass(frozen=True)
class Config(video_detection.Config):
    """What FGFA has beside the task's settings."""

    still_steps: Annotated[int, Field(ge=0)] = 0  # the first steps see frames alone, as a detector of pictures does
    flow_weights: str | None = None  # FlowNet-S to start from, learned on Flying Chairs (sec. 5.1)
    flow_data: str | None = None  # or: a set with known flow that the flow network learns from during `flow_steps`
    flow_steps: Annotated[int, Field(ge=0)] = 0
    flow_batch: Count = 8
    flow_loss_weight: Positive = 1.0
    flow_crop: tuple[Count, Count] | None = None  # height and width of what it sees of a pair; None: all


class FlowPairs(Dataset):
    """Pairs with known flow, pictures in [0, 1]; cut at random to one size."""

    def __init__(self, config: Config) -> None:
        self.data, self.size = open_flow(config.flow_data, "train"), config.flow_crop
        if not self.data.has_flow:
            raise PaperZooError(f"flow_data: {config.flow_data} has no flow, from which the flow network would learn")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {k: self.data[index][k] for k in ("first", "second", "flow", "valid")}
        item = item if self.size is None else cropped(item, self.size, self.data.path(index))
        return item | {k: item[k].float() / 255 for k in ("first", "second")}


class FGFARecipe(VideoDetectionRecipe):
    """The task's recipe, with a beginning of single frames, and of flow learned from known flow beside them."""

    config: Config
    engine_parts = ("features.forward", "flow.forward", "embedding.forward")  # of each frame, and of each pair

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.flow_steps and config.flow_data is None:
            raise PaperZooError("flow_steps says how long flow is learned by itself; flow_data must say from what")
        if config.flow_data is not None and not isinstance(self.model.flow, FlowNetS):
            raise PaperZooError("flow_data: only FlowNet-S learns here; train another flow network by its own paper")

    def build(self) -> nn.Module:
        model = super().build()
        if self.config.flow_weights is not None:
            try:
                load_flow(model.flow, read_state(self.config.flow_weights))
            except (ValueError, RuntimeError, AttributeError) as error:
                raise PaperZooError(f"flow_weights: {self.config.flow_weights} does not fit: {error}") from None
        return model

    @cached_property
    def still_batches(self):
        c = self.config
        collate = CollateWindows(c.multiple)
        return self.runtime.batches(self.windows(0), c.batch_size, workers=c.workers, collate=collate)

    @cached_property
    def flow_batches(self):
        return self.runtime.batches(FlowPairs(self.config), self.config.flow_batch, "flow", workers=self.config.workers)

    def batch(self) -> dict:
        step, config = self.runtime.step, self.config
        batch = self.still_batches.next() if step < config.still_steps else self.batches.next()
        return batch | ({"pairs": self.flow_batches.next()} if step < config.flow_steps else {})

    def step(self, batch: dict) -> dict[str, Any]:
        values = super().step(batch)
        if "pairs" in batch:
            pairs = batch["pairs"]
            flows = self.model.flow.flows(pairs["first"], pairs["second"])
            # the loss of FlowNet on every level; halved pictures show half the motion
            loss = pyramid_loss(flows, pairs["flow"] / self.model.flow.halves, pairs["valid"])
            values["loss"] = values["loss"] + self.config.flow_loss_weight * loss
            values["flow_loss"] = loss.detach()
        return values


RECIPE = FGFARecipe

EMBEDDED = {
    "model": "fgfa_rfcn_slim",
    "data": "blurred_digits",
    "image_sizes": (64,),
    "augment": "none",  # a mirrored digit is no digit
    "test_videos": 32,
    "steps": 400,
    "batch_size": 8,
    "optimizer": "adamw",
    "learning_rate": 4e-3,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 20,
    "clip": 10.0,
    "show_above": 0.25,  # after so few steps nothing is sure
}

PRESETS = {
    "embedded": Config(**EMBEDDED, neighbours=2, spread=3, reach=3, still_steps=330),
    # sec. 4.2, 5.1 and the released code: SGD on four GPUs with one frame each, 600 pixels, the rate divided after two thirds; VID, 15 frames of each
    # video, and twice as often DET's pictures of the thirty classes (ImageSets/DET_train_30classes.txt lists them). ResNet from ImageNet
    # (--backbone-weights), FlowNet-S from Flying Chairs (--flow-weights). K is the paper's, 10; the released settings say 9.
    "published": Config(
        model="fgfa_rfcn_resnet101",
        data="ILSVRC2015",
        stills="ILSVRC2015",
        frames_per_video=15,
        still_share=2 / 3,
        neighbours=2,
        spread=10,
        reach=10,
        coco_metrics=False,
        freeze=("features.body.body.conv1.", "features.body.body.bn1.", "features.body.body.layer1."),
        freeze_norms=True,
        steps=60_000,
        batch_size=4,
        learning_rate=0.001,
        schedule="step",
        milestones=(2 / 3,),
        workers=8,
    ),
}

BASELINE = (VideoDetectionRecipe, video_detection.Config(**EMBEDDED, neighbours=0, reach=0))
"""The same detector, frame by frame: what the task's default recipe makes of it without neighbours, in as many steps of as many frames."""

__all__ = ["BASELINE", "PRESETS", "RECIPE", "Config", "FGFARecipe"]
