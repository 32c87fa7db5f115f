"""Point clouds: what a cloud is (classification), which part each point is (parts), what each point of a scene belongs to (scenes).

A batch is a dict:

    points   float32 (B, N, C): x, y, z, then three columns for each of `features`: normals (unit length), colours (0 to 1), place (in
             the room, 0 to 1). Objects are centred and fit the unit sphere; blocks of scenes are in metres around their middle
    target   int64 (B,): the class of the cloud, or its category where parts are asked for; 0 for scenes
    labels   int64 (B, N): the label of each point; -1 where nothing counts. Not there for classification
    mask     bool (B, N): false where a row repeats another, because the cloud has fewer than N points or was thinned out

A network maps points to logits (B, num_classes), or (B, N, num_classes) where points are labelled; for parts it is also given the category,
`network(points, target)`, and made with `num_categories`. All networks take `num_classes` and `in_channels`. One that has
`takes_mask = True` is given `mask=` as well; for others a repeated row changes nothing that is a maximum over points. In training a network may
return a dict with "out" and whatever its paper's `loss` reads. Clouds of any size are legal: a network sees `num_points` of them at a
time, and where every point wants a label, as many views as it takes (`point_batches.views`).

Metrics. Classification: accuracy over clouds, mean accuracy over classes. Parts: a cloud's IoU is the mean over the parts of its category,
answers being restricted to them; `instance_miou` averages over clouds, `category_miou` over categories. Scenes: IoU of classes from counts
over all points. A prediction is a `Classification` or a `LabelledCloud`.
"""

from __future__ import annotations

from collections.abc import Iterator
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

from paperzoo.data import point_files
from paperzoo.data.point_files import Cloud, read_cloud, write_ply
from paperzoo.data.points import Clouds, open_clouds
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks import segmentation
from paperzoo.tasks.classification import Classification, answer
from paperzoo.tasks.point_batches import Blocks, Objects, choose, in_unit_sphere, views, with_features
from paperzoo.tasks.point_metrics import PartIoU, restricted
from paperzoo.tasks.point_pictures import captioned, cloud_picture, coloured, legend
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
TOGETHER = 32  # clouds or views that go through the network at once where nothing is learned


@dataclass(frozen=True)
class LabelledCloud:
    """The answer for the points of one cloud, in its own order.

    labels: int64 (N,), numbers of `names`. confidence: float32 (N,) in [0, 1]. shares: the share of the points of every label that
    occurs, largest first. category: what the shape was taken for, where parts were asked for.
    """

    labels: Tensor = field(repr=False)
    confidence: Tensor = field(repr=False)
    shares: dict[str, float]
    category: str | None = None


@dataclass(frozen=True)
class Config:
    """The default recipe: Adam on the cross-entropy of clouds or points, random turns, scales and jitter."""

    model: str = "pointnet_cls"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    task: Literal["classification", "parts", "scenes"] = "classification"
    data: str = "solids"
    num_points: Count = 1024  # of a cloud that the network sees at a time
    features: tuple[Literal["normals", "colours", "place"], ...] = ()
    normalise: Literal["sphere", "none"] = "sphere"  # objects alone
    up: Literal["x", "y", "z"] = "z"  # the axis that points up in the data
    block_size: Positive = 1.0  # metres; scenes alone
    rotate: Literal["none", "up", "any"] = "up"
    perturb: NotNegative = 0.0  # deviation of small turns about every axis, radians
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    shift: NotNegative = 0.0  # at most, along each axis
    jitter: NotNegative = 0.01  # deviation, of every coordinate
    jitter_clip: Positive = 0.05
    drop: Fraction = 0.0  # at most this share of a training cloud is left out, how much is drawn anew each time
    weights: str | None = None  # start from these weights
    steps: Count = 10_000
    batch_size: Count = 32
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 0.001
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "staircase"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Count = 6000  # of "staircase", and of the batch norms below
    decay_factor: Positive = 0.5
    least_rate: NotNegative = 1e-5
    norm_momentum: Annotated[float, Field(gt=0, le=1)] | None = (
        None  # of batch norms, at the start; None: as built, for good
    )
    norm_factor: Positive = 0.5
    least_norm_momentum: Positive = 0.01
    label_smoothing: Fraction = 0.0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    workers: Annotated[int, Field(ge=0)] = 0


def to_cloud(value: Any) -> Cloud:
    """Whatever a user may call a cloud: a path, an array or tensor or nested list (N, 3 or more), a `Cloud`.

    Of arrays with more columns the meaning is told as for files without names, see `point_files.meaning`.

    Raises:
        PaperZooError: for anything else, saying what it was.
    """
    if isinstance(value, Cloud):
        return value
    if isinstance(value, str | Path):
        return read_cloud(value)
    try:
        values = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
    except (TypeError, ValueError):
        raise PaperZooError(f"a cloud is a path or an array of points, not {type(value).__name__}") from None
    if values.ndim != 2 or values.shape[1] < 3 or not len(values):
        raise PaperZooError(f"a cloud is an array (N, 3 or more), not {values.shape}")
    return point_files.to_cloud(values, Path("array"), None)


def listed(samples: list) -> list:
    """Collates clouds of different sizes: as they are."""
    return samples


class PointCloudRecipe(Recipe):
    """The task's default recipe. Papers that differ override `loss`, `build` or the data."""

    config: Config

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.scale[0] > config.scale[1]:
            raise PaperZooError(f"scale is {config.scale}; the smaller factor comes first")
        if "place" in config.features and config.task != "scenes":
            raise PaperZooError("the feature 'place' is where a point is in its room: it goes with task scenes")
        self.monitor = {"parts": ("instance_miou", "max"), "scenes": ("miou", "max")}.get(
            config.task, ("accuracy", "max")
        )
        if not self.facts:
            clouds = self.open("train")
            self.facts = {"labels": clouds.labels, "point_labels": clouds.point_labels, "parts": clouds.parts}
            self.check(clouds)
        self.model = runtime.place(self.build())
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.average = running_average(self.model, config.ema_decay)

    def check(self, clouds: Clouds) -> None:
        """Raises: DataError if the data do not have what the task asks for."""
        if self.config.task == "parts" and not clouds.parts:
            raise DataError(
                self.config.data, "its shapes have no parts; task parts needs ShapeNetPart's layout or solid_parts"
            )
        if self.config.task == "scenes" and not clouds.point_labels:
            raise DataError(
                self.config.data, "its points have no classes; task scenes needs labelled rooms or solid_rooms"
            )

    def build(self) -> nn.Module:
        config = self.config
        names = self.facts["labels"] if config.task == "classification" else self.facts["point_labels"]
        sizes = {"num_classes": len(names), "in_channels": 3 + 3 * len(config.features)}
        if config.task == "parts":
            sizes["num_categories"] = len(self.facts["labels"])
        return create(config.model, weights=config.weights, **(sizes | config.model_arguments))

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> Clouds:
        """The clouds of a split; recipes with data of their own override this alone."""
        return open_clouds(self.config.data, split)

    def split(self, split: str) -> Clouds:
        """A split, held against what was learned.

        Raises:
            DataError: if its classes are other ones.
        """
        clouds = self.open(split)
        if (clouds.labels, clouds.point_labels) != (self.facts["labels"], self.facts["point_labels"]):
            raise DataError(
                self.config.data, f"its classes {clouds.labels[:5]} are not those learned: {self.facts['labels'][:5]}"
            )
        return clouds

    @cached_property
    def test_clouds(self) -> Clouds:
        return self.split("test")

    @cached_property
    def batches(self):
        kind = Blocks if self.config.task == "scenes" else Objects
        data = kind(self.split("train"), self.config, train=True)
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> dict[str, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def rate(self, step: int) -> float:
        """The learning rate, as a factor of `learning_rate`."""
        config = self.config
        if config.schedule != "staircase" or step < config.warmup_steps:
            return learning_rate_factor(config, step)
        factor = config.decay_factor ** ((step - config.warmup_steps) // config.decay_steps)
        return max(factor, config.least_rate / config.learning_rate)

    def set_norm_momentum(self) -> None:
        """Batch norms average over ever more batches, as the learning rate falls."""
        config = self.config
        if config.norm_momentum is None:
            return
        momentum = config.norm_momentum * config.norm_factor ** (self.runtime.step // config.decay_steps)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = max(momentum, config.least_norm_momentum)

    def output(self, network: nn.Module, batch: dict[str, Tensor]) -> Any:
        """What a network says to a batch."""
        inputs = (batch["points"], batch["target"]) if self.config.task == "parts" else (batch["points"],)
        return network(*inputs, mask=batch["mask"]) if getattr(network, "takes_mask", False) else network(*inputs)

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy over clouds, or over points that count."""
        logits = output["out"] if isinstance(output, dict) else output
        truth = batch["target"] if self.config.task == "classification" else batch["labels"].flatten()
        return F.cross_entropy(
            logits.flatten(0, -2), truth, ignore_index=-1, label_smoothing=self.config.label_smoothing
        )

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        self.set_norm_momentum()
        output = self.output(self.model, batch)
        logits = output["out"] if isinstance(output, dict) else output
        truth = batch["target"] if self.config.task == "classification" else batch["labels"]
        hits = (logits.detach().argmax(-1) == truth)[truth >= 0].float().mean()
        return {"loss": self.loss(output, batch), "train_accuracy": hits}

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """See the module's docstring; over every cloud of the split and, where points are labelled, every point of it."""
        clouds = self.test_clouds if split == "test" else self.split(split)
        if self.config.task == "parts":
            return self.part_ious(clouds).metrics(self.runtime.mean)
        counts = self.confusion(clouds)
        if self.config.task == "scenes":
            found = segmentation.metrics(counts)
            return {
                "miou": found["miou"],
                "point_accuracy": found["pixel_accuracy"],
                "mean_class_accuracy": found["mean_accuracy"],
            }
        hits, total = counts.diag().double(), counts.sum(1)
        return {
            "accuracy": float(hits.sum() / total.sum()),
            "mean_class_accuracy": float((hits / total)[total > 0].mean()),
        }

    @torch.inference_mode()
    def confusion(self, clouds: Clouds) -> Tensor:
        """Counts (true, predicted) of clouds, or of points."""
        model = self.deployed.eval()
        if self.config.task == "scenes":
            matrix = MulticlassConfusionMatrix(len(self.facts["point_labels"]), ignore_index=-1)
            for _, cloud, scores in self.labelled(clouds):
                matrix.update(scores.argmax(1), cloud.labels)
            return matrix.to(self.runtime.device).compute().cpu()
        matrix = MulticlassConfusionMatrix(len(self.facts["labels"])).to(self.runtime.device)
        data = Objects(clouds, self.config, train=False)
        for batch in self.runtime.loader(data, TOGETHER, self.config.workers):
            matrix.update(self.output(model, batch).argmax(1), batch["target"])
        return matrix.compute().cpu()

    @torch.inference_mode()
    def part_ious(self, clouds: Clouds) -> PartIoU:
        ious = PartIoU(len(self.facts["labels"]))
        for target, cloud, scores in self.labelled(clouds):
            parts = self.facts["parts"][self.facts["labels"][target]]
            ious.add(restricted(scores, parts), cloud.labels, target, parts)
        return ious

    def labelled(self, clouds: Clouds) -> Iterator[tuple[int, Cloud, Tensor]]:
        """(category, cloud, probabilities of its points) over this rank's part of a split."""
        for batch in self.runtime.loader(clouds, TOGETHER // 2, self.config.workers, collate=listed):
            found = self.point_scores([c for c, _ in batch], [t for _, t in batch])
            yield from ((target, cloud, s) for (cloud, target), s in zip(batch, found, strict=True))

    @torch.inference_mode()
    def point_scores(self, clouds: list[Cloud], categories: list[int]) -> list[Tensor]:
        """The probability of every label for every point of each cloud: float32 (N, K), the mean over the views that show it."""
        model, device = self.deployed.eval(), self.runtime.device
        seen = [views(cloud, self.config) for cloud in clouds]
        points = torch.cat([v[0] for v in seen])
        mask = torch.cat([v[2] for v in seen])
        target = torch.cat([torch.full((len(v[0]),), c) for v, c in zip(seen, categories, strict=True)])
        said = []
        for rows in torch.arange(len(points)).split(TOGETHER):
            batch = {"points": points[rows], "mask": mask[rows], "target": target[rows]}
            said.append(self.output(model, {k: v.to(device) for k, v in batch.items()}).float().softmax(2).cpu())
        results = []
        for cloud, (_, rows, kept), scores in zip(
            clouds, seen, torch.cat(said).split([len(v[0]) for v in seen]), strict=True
        ):
            total = torch.zeros(len(cloud), scores.shape[2]).index_add_(0, rows[kept], scores[kept])
            times = torch.zeros(len(cloud)).index_add_(0, rows[kept], torch.ones(int(kept.sum())))
            results.append(total / times.clamp(min=1)[:, None])
        return results

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Classification] | list[LabelledCloud]:
        """Clouds (see `to_cloud`) to their class, or to the labels of their points.

        Where parts are asked for, an input may be (cloud, category). Without one, a file's folder says it if it is named as a category;
        else all are tried, and the one whose own parts are the most probable is taken.
        """
        if self.config.task != "classification":
            return [self.label(value) for value in inputs]
        model, results = self.deployed.eval(), []
        for start in range(0, len(inputs), TOGETHER):
            part = [self.one_view(v) for v in inputs[start : start + TOGETHER]]
            batch = {k: torch.stack([x[k] for x in part]).to(self.runtime.device) for k in part[0]}
            results += [answer(row, self.facts["labels"]) for row in self.output(model, batch).float().softmax(1).cpu()]
        return results

    def one_view(self, value: Any) -> dict[str, Tensor]:
        cloud, config = to_cloud(value), self.config
        rows, mask = choose(len(cloud), config.num_points, torch.Generator().manual_seed(len(cloud)))
        cloud = in_unit_sphere(cloud) if config.normalise == "sphere" else cloud
        return {"points": with_features(cloud.take(rows), config.features, name_of(value)), "mask": mask}

    def label(self, value: Any) -> LabelledCloud:
        names = self.facts["point_labels"]
        if self.config.task == "scenes":
            scores = self.point_scores([to_cloud(value)], [0])[0]
            return labelled_cloud(scores.argmax(1), scores, names)
        cloud, category = self.category_of(value)
        tried = [category] if category is not None else list(range(len(self.facts["labels"])))
        tables = self.point_scores([cloud] * len(tried), tried)
        parts = [self.facts["parts"][self.facts["labels"][k]] for k in tried]
        best = max(range(len(tried)), key=lambda i: float(tables[i][:, parts[i]].sum()))
        labels = restricted(tables[best], parts[best])
        return labelled_cloud(labels, tables[best], names, self.facts["labels"][tried[best]])

    def category_of(self, value: Any) -> tuple[Cloud, int | None]:
        known = self.facts["labels"]
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str):
            if value[1] not in known:
                raise PaperZooError(f"'{value[1]}' is no category that was learned; they are {', '.join(known)}")
            return to_cloud(value[0]), known.index(value[1])
        folder = Path(value).parent.name if isinstance(value, str | Path) else ""
        return to_cloud(value), known.index(folder) if folder in known else None

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out clouds (two rooms), written as PLY files without their labels; parts in a folder named as their category."""
        paths, size = [], len(self.test_clouds)
        wanted = 2 if self.config.task == "scenes" else 8
        for i in [round(k * (size - 1) / max(1, wanted - 1)) for k in range(min(wanted, size))]:
            cloud, target = self.test_clouds[i]
            label = "".join(c if c.isalnum() else "_" for c in self.facts["labels"][target])
            name = {"classification": f"{i}_is_{label}.ply", "parts": f"{label}/{i}.ply"}.get(
                self.config.task, f"{i}.ply"
            )
            paths.append(str(folder / name))
            Path(paths[-1]).parent.mkdir(parents=True, exist_ok=True)
            write_ply(Path(paths[-1]), Cloud(cloud.points, cloud.normals, cloud.colours))
        return paths

    def example(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(2, self.config.num_points, 3 + 3 * len(self.config.features), generator=generator)
        points[..., :3] /= points[..., :3].norm(dim=2, keepdim=True)
        return (points, torch.tensor([0, len(self.facts["labels"]) - 1])) if self.config.task == "parts" else (points,)

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """The most likely class of each cloud or point."""
        return expected.argmax(-1) == found.argmax(-1)

    def draw(self, value: Any, result: Classification | LabelledCloud) -> Image.Image:
        """The cloud, with its class, or its points in the colours of their labels."""
        cloud = to_cloud(value[0] if isinstance(value, tuple) else value)
        if isinstance(result, Classification):
            picture = cloud_picture(cloud.points, cloud.colours, self.config.up)
            return captioned(picture, f"{result.label} {result.probability:.0%}")
        return self.with_labels(cloud, result.labels, result.category or "")

    def with_labels(self, cloud: Cloud, labels: Tensor, heading: str = "") -> Image.Image:
        names = self.facts["point_labels"]
        first = min(self.facts["parts"].get(heading, [0]))  # the parts of a category begin with the first colour
        size = 320 if self.config.task == "scenes" else 224
        picture = cloud_picture(
            cloud.points, coloured(torch.where(labels < 0, -1, labels - first)), self.config.up, size
        )
        return legend(picture, labels[labels >= 0].unique().tolist(), names, heading, first)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out clouds with truth and answer, and how well each class or category is known."""
        from paperzoo.engine.pictures import confusion_matrix, new_figure, tile, to_picture

        clouds, labels = self.test_clouds, self.facts["labels"]
        order = torch.randperm(len(clouds), generator=torch.Generator().manual_seed(0)).tolist()
        if self.config.task == "classification":
            shown: dict[bool, list[Image.Image]] = {True: [], False: []}
            rows = order[:256]
            results = self.predict([clouds[i][0] for i in rows])
            for i, result in zip(rows, results, strict=True):
                cloud, target = clouds[i]
                right = result.index == target
                text = result.label if right else f"{result.label}, is {labels[target]}"
                if len(shown[right]) < 12:
                    picture = cloud_picture(cloud.points, cloud.colours, self.config.up, 144)
                    shown[right].append(captioned(picture, f"{text} {result.probability:.0%}"))
            pictures = {"Confusion matrix": confusion_matrix(self.confusion(clouds), labels)}
            return pictures | {k: tile(shown[v], 6) for k, v in (("Right", True), ("Wrong", False)) if shown[v]}
        pictures = []
        for i in order[: 2 if self.config.task == "scenes" else 8]:
            cloud, target = clouds[i]
            heading = labels[target] if self.config.task == "parts" else ""
            result = self.label((cloud, heading) if heading else cloud)
            pictures += [self.with_labels(cloud, cloud.labels, heading), self.draw(cloud, result)]
        if self.config.task == "parts":
            names, ious = labels, self.part_ious(clouds).by_category(self.runtime.mean)
        else:
            names, ious = (
                self.facts["point_labels"],
                segmentation.class_ious(self.confusion(clouds)).nan_to_num().tolist(),
            )
        figure, axes = new_figure(6, 1.2 + 0.22 * len(names))
        axes.barh(names, ious)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="IoU")
        return {"Held-out clouds: truth, answer": tile(pictures, 4), "IoU": to_picture(figure)}


def name_of(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else "cloud"


def labelled_cloud(labels: Tensor, scores: Tensor, names: list[str], category: str | None = None) -> LabelledCloud:
    shares = torch.bincount(labels, minlength=len(names)).double() / len(labels)
    table = {names[i]: float(shares[i]) for i in shares.argsort(descending=True) if shares[i] > 0}
    return LabelledCloud(labels, scores.gather(1, labels[:, None])[:, 0], table, category)
