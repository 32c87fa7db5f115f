"""Skeleton-based action recognition: one label a clip of moving skeletons.

A batch is (skeletons, labels): float32 (B, M, T, V, S * C), M people, T frames, V joints, and for each of S streams C coordinates: x, y, z in metres, the first
person upright in the origin; or x and y in -1 … 1 and how sure they are. What is not there is 0. Labels are int64 (B,). A network maps the C
coordinates of one stream, (B, M, T, V, C), to logits (B, num_classes). It takes `num_classes`, `in_channels` (C), `layout` (whose joints, see
`paperzoo.blocks.skeleton_graphs`), `drop_rate` where it has dropout, and what `model_arguments` says; it has `reset_classifier(num_classes)`.

Streams (`joint`, `bone`, `joint_motion`, `bone_motion`) are made of the whole clip, before frames are taken. With several of them there is a network for
each, of the same kind: they learn beside each other, each from its own loss, and their probabilities are averaged with weights. A network that
wants several streams at once overrides `build`, one that wants other inputs (heat maps) `samples_of`.

Frames are sampled uniformly: one at random from each of `frames` equal parts. A clip is tested by `test_clips` such draws, whose
probabilities are averaged. A prediction is a `SkeletonAction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from paperzoo.blocks.skeleton_graphs import LAYOUTS
from paperzoo.data.skeleton_clips import SkeletonClip, SkeletonClips, open_skeletons, read_kinetics, read_ntu
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.skeleton_pictures import strip
from paperzoo.tasks.skeleton_samples import SkeletonSamples, shared
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Stream = Literal["joint", "bone", "joint_motion", "bone_motion"]


@dataclass(frozen=True)
class SkeletonAction:
    """The answer for one clip: the most probable class, the probability of every class, how many people and frames there are."""

    label: str
    index: int
    probability: float
    probabilities: dict[str, float] = field(repr=False)
    people: int
    frames: int


@dataclass(frozen=True)
class Config:
    """The default recipe: uniformly sampled frames, stochastic gradient descent with cross-entropy."""

    model: str = "stgcn_plus_plus"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "gestures"
    protocol: str = "xsub"  # which split of the data, where there are several
    streams: Annotated[tuple[Stream, ...], Field(min_length=1)] = ("joint",)
    stream_weights: tuple[Positive, ...] | None = None  # None: joints and bones 2, motions 1
    people: Count = 2
    frames: Count = 100
    rotation: NotNegative = 0.0  # radians; in training bodies are turned about each axis by up to this
    still: bool = False  # show the middle frame all the time: what can be told without motion
    weights: str | None = None  # start from these weights; "{stream}" in it stands for the stream's name
    drop_rate: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    steps: Count = 25_000
    batch_size: Count = 128
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 5e-4
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    test_clips: Count = 10
    test_batch: Count = 16  # clips that are tested together
    workers: Annotated[int, Field(ge=0)] = 0


class Streams(nn.Module):
    """A network for each stream: (B, M, T, V, S * C) -> log of the averaged probabilities (B, num_classes); in training the logits of each, (S, B, num_classes).

    Their softmax is what the average says, so they serve as logits.
    """

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.networks, self.shares = nn.ModuleList(networks), list(weights)

    def forward(self, skeletons: Tensor) -> Tensor:
        parts = skeletons.chunk(len(self.networks), 4)
        logits = [network(part.contiguous()) for network, part in zip(self.networks, parts, strict=True)]
        if self.training:
            return torch.stack(logits)
        mixed = sum(share * one.float().softmax(1) for share, one in zip(self.shares, logits, strict=True))
        return mixed.clamp(min=1e-12).log()


class SkeletonActionRecipe(Recipe):
    """The task's default recipe."""

    config: Config
    monitor = ("accuracy", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if len(set(config.streams)) < len(config.streams):
            raise PaperZooError(f"streams is {', '.join(config.streams)}; each may be named once")
        if config.stream_weights is not None and len(config.stream_weights) != len(config.streams):
            raise PaperZooError(
                f"stream_weights has {len(config.stream_weights)} values; there are {len(config.streams)} streams"
            )
        if not self.facts:
            train = self.open("train")
            self.facts = {"labels": train.labels, "layout": train.layout, "flat": train.flat}
        self.model = runtime.place(self.build())
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: learning_rate_factor(config, s))
        self.average = running_average(self.model, config.ema_decay)

    def build(self) -> nn.Module:
        networks = [self.network(name) for name in self.config.streams]
        if len(networks) == 1:
            return networks[0]
        return Streams(networks, shared(self.config.stream_weights, self.config.streams))

    def network(self, stream: str) -> nn.Module:
        """One stream's, with a head for the data's classes."""
        config, classes = self.config, len(self.facts["labels"])
        given: dict[str, Any] = {"layout": self.facts["layout"], "in_channels": 3, **config.model_arguments}
        if "num_classes" in given:
            raise PaperZooError("model_arguments: num_classes is not chosen; it follows from the data")
        if config.drop_rate:
            given["drop_rate"] = config.drop_rate
        if config.weights is None:
            return create(config.model, num_classes=classes, **given)
        weights = config.weights.replace("{stream}", stream)
        model = create(config.model, weights=weights, **given)
        model.reset_classifier(classes)
        model.paperzoo["arguments"]["num_classes"] = classes
        return model

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> SkeletonClips:
        return open_skeletons(self.config.data, split, self.config.protocol)

    def samples_of(self, data: SkeletonClips, test: bool) -> SkeletonSamples:
        return SkeletonSamples(data, self.config, test)

    @cached_property
    def test_clips(self) -> SkeletonClips:
        return self.open("test")

    @cached_property
    def batches(self):
        data = self.samples_of(self.open("train"), test=False)
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        """The sum of the streams' losses: each network has parameters of its own, so each learns as if alone."""
        skeletons, labels = batch
        self.model.train()
        logits = self.model(skeletons)
        logits = logits if logits.ndim == 3 else logits[None]
        smoothing = self.config.label_smoothing
        losses = [F.cross_entropy(one.float(), labels, label_smoothing=smoothing) for one in logits]
        right = (logits.detach().argmax(2) == labels).float().mean()
        return {"loss": torch.stack(losses).sum(), "train_accuracy": right}

    def infer(self, clips: Tensor) -> Tensor:
        """(B, clips, M, T, V, S * C) -> probabilities (B, num_classes), averaged over the clips."""
        model = self.deployed.eval()
        logits = model(clips.flatten(0, 1).to(self.runtime.device))
        return logits.float().softmax(1).unflatten(0, clips.shape[:2]).mean(1)

    @torch.inference_mode()
    def confusion(self, split: str) -> Tensor:
        """Counts (classes, classes) of a split: rows are the truth."""
        data = self.test_clips if split == "test" else self.open(split)
        matrix = MulticlassConfusionMatrix(len(self.facts["labels"])).to(self.runtime.device)
        for clips, labels in self.runtime.loader(
            self.samples_of(data, test=True), self.config.test_batch, self.config.workers
        ):
            matrix.update(self.infer(clips), labels)
        return matrix.compute()

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Top-1 accuracy, and its mean over the classes that occur."""
        counts = self.confusion(split).double()
        total = counts.sum(1)
        each = counts.diag()[total > 0] / total[total > 0]
        return {"accuracy": float(counts.diag().sum() / counts.sum()), "mean_class_accuracy": float(each.mean())}

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[SkeletonAction]:
        """Clips: .skeleton files of NTU RGB+D, .json files of Kinetics-skeleton, .npy files or arrays (M, T, V, C) or (T, V, C)."""
        results = []
        for value in inputs:
            clip = self.clip(value)
            samples = self.samples_of(SkeletonClips([clip], [], self.facts["layout"], self.facts["flat"]), test=True)
            probabilities = self.infer(samples[0][0][None])[0].cpu()
            best = int(probabilities.argmax())
            table = dict(zip(self.facts["labels"], probabilities.tolist(), strict=True))
            people = int((clip.joints != 0).any(3).any(2).any(1).sum())
            answer = (self.facts["labels"][best], best, float(probabilities[best]), table)
            results.append(SkeletonAction(*answer, people, clip.joints.shape[1]))
        return results

    def clip(self, value: Any) -> SkeletonClip:
        """What `predict` takes, as a clip.

        Raises:
            DataError: if it is none, or has other joints than the network learned.
        """
        name = str(value) if isinstance(value, str | Path) else "clip"
        if isinstance(value, str | Path):
            path = Path(value).expanduser()
            readers = {".skeleton": read_ntu, ".json": read_kinetics, ".npy": read_array}
            if path.suffix not in readers:
                raise DataError(name, "a clip is a .skeleton, a .json or a .npy file")
            value = readers[path.suffix](path)
        joints = value.joints if isinstance(value, SkeletonClip) else torch.as_tensor(np.asarray(value, np.float32))
        joints = joints[None] if joints.ndim == 3 else joints
        wanted = LAYOUTS[self.facts["layout"]].joints
        if joints.ndim != 4 or joints.shape[2:] != (wanted, 3) or not joints.numel():
            raise DataError(name, f"has shape {tuple(joints.shape)}; it must be (people, frames, {wanted}, 3)")
        if not bool(joints.isfinite().all()):
            raise DataError(name, "holds values that are no numbers; what is not seen is 0")
        return SkeletonClip(joints.float(), None, name)

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out clips as .npy files."""
        data, paths = self.test_clips, []
        for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:8].tolist():
            paths.append(str(folder / f"{i:05d}.npy"))
            np.save(paths[-1], data[i].joints.numpy())
        return paths

    def example(self) -> tuple[Tensor]:
        joints = LAYOUTS[self.facts["layout"]].joints
        shape = (2, self.config.people, self.config.frames, joints, 3 * len(self.config.streams))
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        return expected.argmax(1) == found.argmax(1)

    def draw(self, value: Any, result: SkeletonAction) -> Image.Image:
        text = f"{result.label} {result.probability:.0%}"
        return strip(self.clip(value).joints, LAYOUTS[self.facts["layout"]], self.facts["flat"], text)

    def figures(self) -> dict[str, Image.Image]:
        """The confusion matrix, and held-out clips with truth and answer."""
        from paperzoo.engine.pictures import confusion_matrix, tile

        data, labels = self.test_clips, self.facts["labels"]
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[:64].tolist()
        pictures: dict[bool, list[Image.Image]] = {True: [], False: []}
        for i, result in zip(order, self.predict([data[i] for i in order]), strict=True):
            right = result.index == data[i].label
            text = result.label if right else f"{result.label}, is {labels[data[i].label]}"
            if len(pictures[right]) < 8:
                shown = strip(data[i].joints, LAYOUTS[data.layout], data.flat, f"{text} {result.probability:.0%}")
                pictures[right].append(shown)
        found = {"Confusion matrix": confusion_matrix(self.confusion("test").cpu(), labels)}
        return found | {k: tile(pictures[v], 2) for k, v in (("Right", True), ("Wrong", False)) if pictures[v]}


def read_array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(path, f"not a readable .npy file of numbers ({error})") from None
