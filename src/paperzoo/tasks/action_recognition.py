"""Action recognition: one label a video.

A batch is (clips, labels): float32 (B, 3, T, H, W), normalised with the mean and deviation in `facts`, frames in the order of time; int64 (B,)
in 0 … num_classes - 1. A network maps clips to logits (B, num_classes). It takes `num_classes`, `drop_rate` where it has dropout, `frames` and
`image_size` where it works at one size alone, and what `model_arguments` says; one that looks at a video in several ways (two frame rates,
differences of frames) makes them of the one clip. It has `reset_classifier(num_classes)`. In training it may return {"out": logits, "aux": [logits, …]}.

Frames are taken by their time stamps: a clip has `frames` frames, `stride` frames of a video with `rate` a second apart. A video is tested by
its views: `test_clips` clips spread over its time, `test_crops` crops across each, whose probabilities are averaged. A prediction is a
`Recognition`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from paperzoo.catalog.cards import variants
from paperzoo.data.videos import Video, Videos, open_video, open_videos, write_video
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.training import learning_rate_factor, make_optimizer, mix
from paperzoo.tasks.video_clips import Clips, Views, statistics, views
from paperzoo.tasks.video_pictures import STRIP, film_strip, with_classes

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

STATISTICS = {  # mean and deviation of red, green and blue in [0, 1]
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "kinetics": ([0.45, 0.45, 0.45], [0.225, 0.225, 0.225]),  # of SlowFast and its successors
    "symmetric": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),  # to -1 … 1
    "levels": (
        [104 / 255, 117 / 255, 128 / 255],
        [1 / 255, 1 / 255, 1 / 255],
    ),  # grey levels less their mean, as Caffe's networks
}
TOP = 5
SAMPLE_FRAMES, SAMPLE_SIDE = 150, 256  # of a video that is written as a sample, at most; pixels of its shorter side


@dataclass(frozen=True)
class Recognition:
    """The answer for one video: the most probable class, the probability of every class, and from how many views it was made.

    duration: of the video, seconds.
    """

    label: str
    index: int
    probability: float
    probabilities: dict[str, float] = field(repr=False)
    views: int
    duration: float

    def top(self, count: int = TOP) -> list[tuple[str, float]]:
        """The most probable classes, the first one first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]


@dataclass(frozen=True)
class Config:
    """The default recipe: random clips, stochastic gradient descent with cross-entropy, views in tests."""

    model: str = "slowfast_r50_8x8"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "moving_digits"
    frames: Count = 16  # of a clip
    stride: Count = 1  # frames of a video from one to the next
    rate: Positive | None = None  # frames a second at which strides are counted; None: each video's own
    short: Literal["hold", "loop"] = "hold"  # a video that ends before its clip
    image_size: Count = 112  # pixels; the crop that the network sees is this square
    short_side: tuple[Count, Count] | None = (
        None  # pixels; the shorter side is brought to a random size between these two before the crop
    )
    flip: bool = False  # mirror clips at random; not where left and right are classes
    randaugment: Annotated[int, Field(ge=0, le=30)] = 0  # magnitude of two operations a clip, 0 for none
    still: bool = False  # show the middle frame all the time: what can be told without motion
    mixup: NotNegative = 0.0  # alpha, 0 for none
    cutmix: NotNegative = 0.0
    normalise: Literal["data", "imagenet", "kinetics", "symmetric", "levels"] = "data"
    weights: str | None = None  # start from these weights; a head of another size is replaced
    drop_rate: Fraction = 0.0
    drop_path_rate: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    aux_weight: NotNegative = 0.4  # of auxiliary logits
    steps: Count = 1000
    batch_size: Count = 32
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 1e-4
    decay_all: bool = True
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    test_clips: Count = 1
    test_crops: Count = 1
    test_frames: Count | None = None  # of a clip in tests; None: as in training
    test_size: Count | None = None  # pixels; None: as in training
    test_batch: Count = 16  # views that the network sees at once
    workers: Annotated[int, Field(ge=0)] = 0


class ActionRecognitionRecipe(Recipe):
    """The task's default recipe. Papers that differ override `build`, `loss`, `step`, or the data."""

    config: Config
    monitor = ("accuracy", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.short_side is not None and not config.image_size <= config.short_side[0] <= config.short_side[1]:
            raise PaperZooError(
                f"short_side is {config.short_side}; it is (smallest, largest), both at least image_size, {config.image_size}"
            )
        if not self.facts:
            train = self.open("train")
            if len(train.labels) < 2:
                raise DataError(config.data, f"has one class, '{train.labels[0]}'; at least two are needed")
            mean, deviation = STATISTICS.get(config.normalise) or statistics(train)
            self.facts = {"labels": train.labels, "mean": mean, "deviation": deviation}
        self.model = runtime.place(self.build())
        if runtime.channels_last and not runtime.shard_networks:  # 3-D convolutions are faster so, too
            self.model.to(memory_format=torch.channels_last_3d)
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)
        self.average = running_average(self.model, config.ema_decay)

    def build(self) -> nn.Module:
        """The network, with a head for the data's classes."""
        given = dict(self.config.model_arguments)
        if "num_classes" in given:
            raise PaperZooError("model_arguments: num_classes is not chosen; it follows from the data")
        given |= {n: getattr(self.config, n) for n in ("drop_rate", "drop_path_rate") if getattr(self.config, n)}
        if self.config.model in variants():  # else create says what there is
            function = getattr(variants()[self.config.model].module("model"), self.config.model)
            taken = inspect.signature(function).parameters
            given |= {n: getattr(self.config, n) for n in ("frames", "image_size") if n in taken and n not in given}
        classes = len(self.facts["labels"])
        if self.config.weights is None:
            return create(self.config.model, num_classes=classes, **given)
        model = create(self.config.model, weights=self.config.weights, **given)
        model.reset_classifier(classes)
        model.paperzoo["arguments"]["num_classes"] = classes
        return model

    def learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(self.config, step)

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> Videos:
        """The videos of a split; recipes with data of their own override this alone."""
        return open_videos(self.config.data, split)

    @cached_property
    def train_data(self) -> Clips:
        return Clips(self.open("train"), self.config, self.facts)

    @cached_property
    def test_data(self) -> Views:
        return self.evaluation_data("test")

    def evaluation_data(self, split: str) -> Views:
        """A split's views.

        Raises:
            DataError: if its classes are not those that were learned.
        """
        videos = self.open(split)
        if videos.labels != self.facts["labels"]:
            known = self.facts["labels"]
            raise DataError(
                self.config.data,
                f"its classes {videos.labels[:5]} are not the {len(known)} that were learned: {known[:5]}",
            )
        return Views(videos, self.config, self.facts)

    @cached_property
    def batches(self):
        return self.runtime.batches(self.train_data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        clips, labels = batch
        self.model.train()
        if self.config.mixup or self.config.cutmix:  # frames are channels to it, so a clip is mixed as a whole
            flat, labels = mix(
                clips.flatten(1, 2), labels, len(self.facts["labels"]), self.config.mixup, self.config.cutmix
            )
            clips = flat.reshape(clips.shape)
        output = self.model(clips)
        logits = output["out"] if isinstance(output, dict) else output
        truth = labels if labels.ndim == 1 else labels.argmax(1)
        hits = (logits.detach().argmax(1) == truth).float().mean()
        loss = self.loss(logits, labels)
        for other in output.get("aux", []) if isinstance(output, dict) else []:
            loss = loss + self.config.aux_weight * self.loss(other, labels)
        return {"loss": loss, "train_accuracy": hits}

    # -- views ---------------------------------------------------------------------------------------------------

    def probabilities(self, every: Tensor) -> Tensor:
        """Views (N, V, 3, T, H, W) -> probabilities (N, num_classes), averaged over the views, on the CPU."""
        model, flat = self.deployed.eval(), every.flatten(0, 1)
        parts = [
            model(flat[i : i + self.config.test_batch].to(self.runtime.device)).float().softmax(1).cpu()
            for i in range(0, len(flat), self.config.test_batch)
        ]
        return torch.cat(parts).view(*every.shape[:2], -1).mean(1)

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Top-1 accuracy, mean accuracy of the classes, cross-entropy and, with more than five classes, top-5 accuracy, over the whole split."""
        matrix, sums = self.confusion(split)
        count = sums[2].clamp(min=1)
        recalls = (matrix.diag() / matrix.sum(1))[matrix.sum(1) > 0]
        metrics = {
            "accuracy": float(matrix.diag().sum() / count),
            "mean_class_accuracy": float(recalls.mean()),
            "cross_entropy": float(sums[0] / count),
        }
        if len(self.facts["labels"]) > TOP:
            metrics["top5_accuracy"] = float(sums[1] / count)
        return metrics

    @torch.inference_mode()
    def confusion(self, split: str = "test") -> tuple[Tensor, Tensor]:
        """The confusion matrix (true, predicted) over a split; summed cross-entropy, hits among the top five, and videos."""
        classes = len(self.facts["labels"])
        matrix = MulticlassConfusionMatrix(classes).to(self.runtime.device)
        sums = torch.zeros(3)
        data = self.test_data if split == "test" else self.evaluation_data(split)
        together = max(1, self.config.test_batch // (self.config.test_clips * self.config.test_crops))
        for every, labels in self.runtime.loader(data, together, self.config.workers):
            p, truth = self.probabilities(every), labels.cpu()
            matrix.update(p.to(self.runtime.device), labels)
            top = p.topk(min(TOP, classes), 1).indices
            hits = (top == truth[:, None]).any(1).sum()
            loss = F.nll_loss(p.clamp(min=1e-12).log(), truth, reduction="sum")
            sums += torch.stack([loss, hits.float(), torch.tensor(float(len(truth)))])
        return matrix.compute().cpu().float(), self.runtime.mean(
            sums.to(self.runtime.device)
        ).cpu() * self.runtime.world

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Recognition]:
        """Video files, folders of pictures, or frames (see `paperzoo.data.videos.open_video`) to their classes, one video at a time."""
        results = []
        for value in inputs:
            video = open_video(value)
            every = views(video, self.config, self.facts)
            row = self.probabilities(every[None])[0]
            best = int(row.argmax())
            table = {label: float(p) for label, p in zip(self.facts["labels"], row, strict=True)}
            results.append(
                Recognition(self.facts["labels"][best], best, float(row[best]), table, len(every), video.duration)
            )
        return results

    def samples(self, folder: Path) -> list[str]:
        """Six held-out videos as files: .mp4, or .npz where PyAV is not installed."""
        import importlib.util

        ending = ".mp4" if importlib.util.find_spec("av") else ".npz"
        videos, paths = self.test_data.videos, []
        for i in spread(len(videos), 6):
            try:
                video, target = videos[i]
                large = min(video.frames([0.0]).shape[-2:]) > SAMPLE_SIDE
                frames = video.frames(video.times[:SAMPLE_FRAMES].tolist(), SAMPLE_SIDE if large else None)
            except DataError:
                continue
            label = "".join(c if c.isalnum() else "_" for c in self.facts["labels"][target])
            paths.append(str(write_video(folder / f"{i}_{label}{ending}", frames, video.rate)))
        return paths

    def example(self) -> tuple[Tensor]:
        config = self.config
        shape = (2, 3, config.frames, config.image_size, config.image_size)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """The most likely classes."""
        return expected.argmax(1) == found.argmax(1)

    def draw(self, value: Any, result: Recognition) -> Image.Image:
        """Six frames of the video in the order of time, and the most likely classes."""
        return with_classes(strip_of(open_video(value)), result.top())

    def figures(self) -> dict[str, Image.Image]:
        """The confusion matrix, and held-out videos with what they are and what was said."""
        from paperzoo.engine.pictures import confusion_matrix, tile

        labels, videos, shown = self.facts["labels"], self.test_data.videos, []
        for i in spread(len(videos), 12):
            try:
                video, target = videos[i]
                result = self.predict([video])[0]
                mark = "right" if result.index == target else "wrong"
                shown.append(with_classes(strip_of(video, 64), result.top(2), f"{mark}: it is '{labels[target]}'"))
            except DataError:
                continue
        pictures = {"Confusion matrix": confusion_matrix(self.confusion("test")[0], labels)}
        if shown:
            pictures["Held-out videos"] = tile(shown, 2)
        return pictures


def strip_of(video: Video, height: int = 96) -> Image.Image:
    """Frames spread evenly over a video."""
    times = [video.duration * (k + 0.5) / STRIP for k in range(STRIP)]
    return film_strip(video.frames(times), height)


def spread(total: int, count: int) -> list[int]:
    """At most `count` numbers below `total`, spread evenly."""
    return sorted({k * total // count for k in range(count)}) if total else []
