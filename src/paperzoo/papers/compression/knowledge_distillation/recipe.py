"""Knowledge distillation: a small network learns from the softened answers of a large one.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, sections 2 to 4. Teacher and student are
two recipes of image classification that this one holds: it trains the teacher, or reads its weights, then the student.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.compression.knowledge_distillation.technique import DistillationLoss, limit_weights
from paperzoo.tasks import classification
from paperzoo.tasks.classification import Classification, ClassificationRecipe, Count, Positive


@dataclass(frozen=True)
class Config:
    """`data` and `steps` hold for both networks; the fields of these names in `teacher` and `student` do not count."""

    data: str
    steps: Count  # the teacher's and, after them, the student's
    teacher_steps: Annotated[int, Field(ge=0)]  # 0: `teacher.weights` are used as they are
    teacher: classification.Config
    student: classification.Config
    temperature: Positive = 20.0
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    teacher_jitter: Annotated[int, Field(ge=0)] | None = None  # pixels, in place of `teacher.augment`
    teacher_max_norm: Positive | None = None  # of each unit's incoming weights


class Teacher(ClassificationRecipe):
    """The large network: any classifier, with section 3's jitter and weight constraint where they are asked for."""

    jitter: int | None = None
    max_norm: float | None = None

    def augmentation(self) -> list[nn.Module]:
        if self.jitter is None:
            return super().augmentation()
        size = self.config.image_size
        return [v2.Resize((size, size), antialias=True), v2.RandomCrop(size, padding=self.jitter)]

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        if self.max_norm is not None:
            limit_weights(self.model, self.max_norm)
        return super().step(batch)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        return self.deployed.eval()(images).float()


class KnowledgeDistillation(Recipe):
    """The student is what is evaluated, saved and deployed."""

    config: Config
    reads_images = True
    monitor = ("accuracy", "max")

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.teacher.image_size != config.student.image_size:
            raise PaperZooError(
                f"teacher.image_size is {config.teacher.image_size}, student.image_size {config.student.image_size}; "
                "both networks see the same images, so they must be equal"
            )
        if facts is None and not config.teacher_steps and config.teacher.weights is None:
            raise PaperZooError("teacher_steps is 0, so teacher.weights must name the weights of a trained teacher")
        student = replace(config.student, data=config.data, steps=max(1, config.steps - config.teacher_steps))
        teacher = replace(config.teacher, data=config.data, steps=max(1, config.teacher_steps))
        if facts is not None:  # a trained student needs neither a teacher nor what it started from
            student, teacher = replace(student, weights=None), replace(teacher, weights=None)
        self.student = ClassificationRecipe(student, runtime, facts)
        self.facts = self.student.facts
        self.teacher = Teacher(teacher, runtime, self.facts)
        self.teacher.jitter, self.teacher.max_norm = config.teacher_jitter, config.teacher_max_norm
        self.objective = DistillationLoss(config.temperature, config.soft_weight)

    @property
    def model(self) -> nn.Module:
        return self.student.model

    @property
    def average(self) -> AveragedModel | None:
        return None  # each of the two recipes keeps its own

    @property
    def deployed(self) -> nn.Module:
        return self.student.deployed

    @property
    def learner(self) -> ClassificationRecipe:
        """Who learns in this step."""
        return self.teacher if self.runtime.step < self.config.teacher_steps else self.student

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.learner.batch()

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        """One step of the teacher on the true labels, or of the student on those and the teacher's answers."""
        learner = self.learner
        if learner is self.teacher:
            values = {f"teacher_{name}": value for name, value in self.teacher.step(batch).items()}
            loss = values["teacher_loss"]
        else:
            images, labels = batch
            soft = self.teacher.logits(images)
            self.student.model.train()
            logits = self.student.model(images)
            loss = self.objective(logits, soft, labels)
            agreement = (logits.argmax(1) == soft.argmax(1)).float().mean()
            values = {"distillation_loss": loss, "agreement": agreement}
        self.runtime.update(learner.optimizer, loss, learner.config.clip)
        if self.runtime.micro == self.runtime.accumulate - 1:
            learner.scheduler.step()
            if learner.average is not None:
                learner.average.update_parameters(learner.model)
        return {name: value.detach() for name, value in values.items()}

    # -- all else is the student's ---------------------------------------------------------------------------------

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The student's metrics; the teacher's accuracy beside them where there is a teacher."""
        metrics = self.student.evaluate(split)
        if self.runtime.step:
            metrics["teacher_accuracy"] = self.teacher.evaluate(split)["accuracy"]
        return metrics

    def predict(self, inputs: list) -> list[Classification]:
        return self.student.predict(inputs)

    def example(self) -> tuple[Tensor]:
        return self.student.example()

    def samples(self, folder: Path) -> list[str]:
        return self.student.samples(folder)

    def draw(self, value: Any, result: Classification) -> Image.Image:
        return self.student.draw(value, result)

    def figures(self) -> dict[str, Image.Image]:
        return self.student.figures()


SMALL = classification.Config(
    model="wide_resnet10_2", image_size=16, augment="shift", labels_per_class=4, batch_size=64, decay_all=False
)
# Section 3. Values that it leaves out are those of Hinton et al. (2012), which it builds on, or plain choices.
MNIST = classification.Config(
    data="mnist", image_size=28, augment="none", batch_size=100, weight_decay=0.0, nesterov=False, workers=4
)
PRESETS = {
    # table 5 in small: the student's transfer set is 40 scans, the teacher has seen them all
    "embedded": Config(
        data="digits",
        steps=500,
        teacher_steps=200,
        teacher=replace(SMALL, model="wide_resnet16_2", labels_per_class=None),
        student=SMALL,
        temperature=4.0,
        soft_weight=0.9,
    ),
    "published": Config(
        data="mnist",
        steps=600 * 1000,
        teacher_steps=600 * 500,  # 500 epochs each; the paper does not say
        teacher=replace(MNIST, model="distillation_mlp1200", drop_rate=0.5, learning_rate=0.1),
        student=replace(MNIST, model="distillation_mlp800", learning_rate=0.02),
        temperature=20.0,
        soft_weight=0.9,
        teacher_jitter=2,
        teacher_max_norm=15**0.5,  # Hinton et al. (2012): squared length 15
    ),
}
RECIPE = KnowledgeDistillation


def alone(config: Config) -> classification.Config:
    """The same student on the same images, labels and number of steps, without a teacher."""
    return replace(config.student, data=config.data, steps=config.steps - config.teacher_steps)


BASELINE = (ClassificationRecipe, alone(PRESETS["embedded"]))
