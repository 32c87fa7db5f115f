"""MTCNN's three networks learn one after the other, each from what the ones before let through (sec. III-A)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from paperzoo.data.faces import open_face_detection
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.face.mtcnn import cascade
from paperzoo.papers.face.mtcnn.windows import SHARES, TASKS, Windows, collect, multi_task_loss, to_batch
from paperzoo.tasks import face_detection
from paperzoo.tasks.classification import Count, Fraction, Positive
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

logger = logging.getLogger("paperzoo")

STAGES = ("pnet", "rnet", "onet")


@dataclass(frozen=True)
class Config(face_detection.Config):
    """The paper states neither the optimizer nor the steps. `batch_size` is not used."""

    model: str = "mtcnn"
    landmark_data: str | None = None  # another set whose faces are the landmark windows (paper: CelebA)
    resize: Literal["shortest", "square", "none"] = "none"
    multiple: Count = 1
    stage_shares: tuple[Fraction, Fraction] = (0.4, 0.3)  # of the steps: P-Net's and R-Net's; O-Net has the rest
    limits: tuple[Count, Count, Count, Count] = (50, 25, 25, 25)  # windows of each kind that an image gives, at most
    thresholds: tuple[Fraction, Fraction, Fraction] = cascade.THRESHOLDS
    smallest_face: Positive = cascade.SMALLEST
    pyramid_factor: Annotated[float, Field(gt=0, lt=1)] = cascade.FACTOR
    batch_sizes: tuple[Count, Count, Count] = (384, 384, 384)  # windows in a step, by stage
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class MTCNNRecipe(face_detection.FaceDetectionRecipe):
    """One recipe for the three networks. A step is one of the stage that `runtime.step` falls into."""

    config: Config
    engine_parts = tuple(f"{name}.forward" for name in STAGES)

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        if facts is None:  # the cascade sees pixels of 0 … 255 and normalises what it cuts out
            facts = {"labels": ["face"], "mean": [0.0] * 3, "deviation": [1 / 255] * 3}
        Recipe.__init__(self, config, runtime, facts)
        model = create(config.model, weights=config.weights, **self.model_arguments())
        if any(not hasattr(model, name) for name in STAGES):
            raise PaperZooError(f"{config.model} is not a cascade of {', '.join(STAGES)}")
        self.model = runtime.place(model)
        self.optimizers = {name: make_optimizer(config, getattr(self.model, name)) for name in STAGES}
        self._windows: dict[str, list[Windows]] = {}

    # -- stages ------------------------------------------------------------------------------------------------------

    def ends(self) -> list[int]:
        """The steps at which the stages end."""
        steps, (first, second) = self.config.steps, self.config.stage_shares
        return [round(steps * first), round(steps * (first + second)), steps]

    def stage(self) -> tuple[str, int, int]:
        """The network that learns at this step, the stage's first step and its last."""
        ends = self.ends()
        k = next((k for k, end in enumerate(ends) if self.runtime.step < end), len(STAGES) - 1)
        return STAGES[k], ends[k - 1] if k else 0, ends[k]

    def windows(self, name: str) -> list[Windows]:
        """The windows that a network learns from. A function of the networks before it, which have finished learning."""
        if name not in self._windows:
            self._windows = {}  # one stage's at a time
            rng = torch.Generator().manual_seed(self.runtime.key("windows", name))
            windows = self.collected(name, rng, self.before(name))
            if name != "pnet" and not (len(windows[0].pixels) and len(windows[2].pixels)):
                logger.warning("the networks before %s let nothing through: it learns from random windows", name)
                windows = self.collected(name, rng, None)
            if not len(windows[0].pixels) or not len(windows[2].pixels):
                raise PaperZooError(f"{self.config.data}: no windows to learn {name} from; does it have marked faces?")
            self._windows[name] = windows
        return self._windows[name]

    def collected(self, name: str, rng: torch.Generator, before: Any) -> list[Windows]:
        arguments = (getattr(self.model, name).size, rng, before, self.config.limits)
        windows = collect(self.open("train"), *arguments)
        if self.config.landmark_data is not None:
            windows[-1] = collect(open_face_detection(self.config.landmark_data, "train"), *arguments)[-1]
        return windows

    def before(self, name: str) -> Any:
        """From a picture to the windows that reach this network, from 0 and exclusive; None for P-Net, which all reach."""
        if name == "pnet":
            return None

        @torch.no_grad()
        def found(picture: Tensor) -> Tensor:
            picture = picture.to(self.runtime.device)
            result = self.candidates(picture)[name]
            return result[0] - result[0].new_tensor([1.0, 1.0, 0.0, 0.0])

        return found

    def candidates(self, picture: Tensor) -> dict[str, cascade.Found]:
        """For R-Net and O-Net, the windows of a picture (1, 3, H, W) that reach them."""
        c, model = self.config, self.deployed.eval()
        found = cascade.propose(model.pnet, picture, c.thresholds[0], c.smallest_face, c.pyramid_factor)
        refined = cascade.refine(model.rnet, cascade.summed(picture), found, c.thresholds[1])
        return {"rnet": found, "onet": refined}

    # -- learning ----------------------------------------------------------------------------------------------------

    def batch(self) -> dict:
        name, _, _ = self.stage()
        windows, size = self.windows(name), self.config.batch_sizes[STAGES.index(name)]
        rows, total = [], sum(SHARES)
        for k, kind in enumerate(windows):
            n, wanted = len(kind.pixels), max(self.runtime.world, size * SHARES[k] // total)
            wanted -= wanted % self.runtime.world
            rows.append(self.runtime.indices(n, wanted, f"{name}/{k}") if n else torch.empty(0, dtype=torch.int64))
        return self.runtime.to_device(to_batch(windows, rows))

    def step(self, batch: dict) -> dict:
        name, first, last = self.stage()
        network, optimizer = getattr(self.model, name), self.optimizers[name]
        self.model.train()
        part = StageSteps(self.config, last - first)
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_factor(part, self.runtime.step - first)
        outputs = tuple(output.flatten(1) for output in network(batch["windows"]))
        losses = multi_task_loss(outputs, batch["kind"], batch["offsets"], batch["points"], TASKS[name])
        loss = sum(losses.values())
        self.runtime.update(optimizer, loss, self.config.clip)
        return {f"{name}_{task}": value.detach() for task, value in losses.items()}

    # -- use ---------------------------------------------------------------------------------------------------------

    def detect(self, images: Tensor, sizes: Tensor, originals: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        c = self.config
        found = cascade.detect(self.deployed.eval(), images.round(), c.thresholds, c.smallest_face, c.pyramid_factor)
        for faces, size, original in zip(found, sizes, originals, strict=True):
            factor = (torch.as_tensor(original, device=sizes.device) / size).flip(0).to(faces["boxes"].dtype)
            limit = torch.as_tensor(original, device=sizes.device).flip(0).repeat(2)
            faces["boxes"] = (faces["boxes"] * factor.repeat(2)).clamp(min=0).minimum(limit)
            faces["landmarks"] = faces["landmarks"] * factor
        return found

    def example(self) -> tuple[Tensor, Tensor, Tensor]:
        rng = torch.Generator().manual_seed(0)
        return tuple(torch.rand(2, 3, size, size, generator=rng) * 2 - 1 for size in (64, 24, 48))

    def figures(self) -> dict[str, Image.Image]:
        """What is found and what is there, and what each stage of the cascade lets through."""
        from paperzoo.engine.pictures import tile

        data, pictures = self.open("test"), []
        items = [data[i] for i in range(0, len(data), max(1, len(data) // 4))[:4]]
        with torch.inference_mode():
            for item in items:
                picture = item["image"][None].float().to(self.runtime.device)
                passed = self.candidates(picture)
                for boxes, _, _ in passed.values():
                    pictures.append(
                        face_detection.drawn_with_points(item["image"], boxes.tolist(), [], [""] * len(boxes))
                    )
                pictures.append(self.draw(item["image"], self.predict([item["image"]])[0]))
        stages = {"After P-Net, after R-Net, after O-Net": tile(pictures, 3)}
        return super().figures() | stages


@dataclass(frozen=True)
class StageSteps:
    """A config as the schedule of one stage sees it."""

    config: Config
    steps: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


RECIPE = MTCNNRecipe

PRESETS = {
    "embedded": Config(
        model="mtcnn_half",
        model_arguments={"landmarks": True},
        data="drawn_faces",
        scenes=128,
        scene_size=128,
        smallest_face=12.0,
        limits=(40, 16, 16, 16),
        thresholds=(0.6, 0.5, 0.3),
        steps=1200,
        stage_shares=(0.28, 0.37),
        batch_sizes=(140, 56, 42),
        learning_rate=5e-3,
        schedule="cosine",
        warmup_steps=10,
    ),
    # sec. III: WIDER FACE for faces and non-faces, CelebA for landmarks, 3:1:1:2; optimizer and steps are not stated
    "published": Config(
        model_arguments={"landmarks": True},
        data="wider_face",
        landmark_data="celeba",
        steps=300_000,
        schedule="step",
        milestones=(0.5, 0.75),
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
