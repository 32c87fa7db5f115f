"""Change detection: what is different between two pictures of one place.

A batch is (before, after, masks): two float32 (B, C, H, W), normalised with the mean and deviation in `facts` (one number a band), on the
same grid; int64 (B, H, W), 0 unchanged, 1 … num_classes - 1 kinds of change (mostly just 1), 255 where nothing counts. A network maps
(before, after) to logits (B, num_classes, H, W) at the size of its inputs; in training it may return a dict {"out": logits, "aux": logits
or a list of several heads', of any size, …}: what else it holds (features of each date, distances) is for a paper's own `training_loss`.
Any size that the network accepts is legal: evaluation and prediction run on each pair at its own size, whole or, where `window` is given,
by overlapping windows (`paperzoo.blocks.tiling`), which takes tiles of any size in bounded memory. A prediction is a `ChangeMap`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.blocks.tiling import tiled
from paperzoo.data.change_pairs import open_changes
from paperzoo.data.rasters import write_mask
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.change_pictures import (
    BETWEEN,
    IGNORE,
    as_float,
    as_picture,
    compared,
    outlined,
    row,
    split_pair,
    visible,
)
from paperzoo.tasks.segmentation import DEVIATION, MEAN, RandomScale, as_list, class_ious
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

MEASURED = 64  # training pairs that mean and deviation are measured on
HIT, FALSE_ALARM, MISS = (
    (255, 255, 255),
    (220, 60, 40),
    (70, 130, 230),
)  # colours in which answers are held against the truth


@dataclass(frozen=True)
class ChangeMap:
    """The answer for one pair, at its own size.

    mask: int64 (H, W), 0 unchanged, else the kind of change. probability: float32 (H, W) in [0, 1], that anything has changed.
    changed: the share of the picture that has. places: how many separate regions (8-neighbours). source: the first picture's file, if
    it was one; a map that is saved as a GeoTIFF lies where that picture lies.
    """

    mask: Tensor = field(repr=False)
    probability: Tensor = field(repr=False)
    changed: float
    places: int
    source: str | None = None

    def save(self, path: str | Path) -> Path:
        """The mask as an 8-bit file: changes white where there is one kind, ids where there are more; .tif keeps the georeference."""
        return write_mask(path, self.mask, self.source, 255 if int(self.mask.max()) <= 1 else 1)


@dataclass(frozen=True)
class Config:
    """The default recipe: cross-entropy over the pixels, SGD, a learning rate that falls to 0, mirrors, random scale and crop, blur."""

    model: str = "bit_resnet18"
    # more for the model's function: a backbone's name, the number of tokens
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "terrain_changes"
    # mean and deviation: 0.5 and 0.5 of every band; ImageNet's, of three bands; or measured on the training pairs
    normalise: Literal["half", "imagenet", "data"] = "half"
    crop_size: Count = 256  # pixels; training pairs are cropped or padded to this square, padding is ignored
    scale: tuple[Positive, Positive] = (1.0, 1.2)  # random resizing before the crop
    flip: Fraction = 0.5  # probability of a mirrored pair, left-right and top-bottom each
    turn: bool = False  # random quarter turns
    blur: NotNegative = 1.0  # largest deviation of a random Gaussian blur of both pictures, in pixels
    swap: Fraction = 0.0  # probability that the dates change places
    weights: str | None = None  # start from these weights of the whole network
    backbone_weights: str | None = None  # a classifier's file for the backbone
    steps: Count = 100_000
    batch_size: Count = 8
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4
    decay_all: bool = True  # False: no weight decay on biases and norms
    schedule: Literal["poly", "cosine", "step", "constant"] = "poly"
    power: NotNegative = 1.0  # of "poly", (1 - step / steps) ** power; 1 is a straight line
    milestones: tuple[Fraction, ...] = (0.5, 0.75)  # of "step", as shares of the steps
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    aux_weight: NotNegative = 0.4
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip: Positive | None = None
    window: Count | None = None  # pixels; evaluate and predict by square windows of this side; None: each pair whole
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    workers: Annotated[int, Field(ge=0)] = 0


class Transformed(Dataset):
    """A set of pairs seen through a transform of (before, after, mask); every part is cropped and mirrored alike."""

    def __init__(self, data: Any, transform: nn.Module, swap: float = 0.0) -> None:
        self.data, self.transform, self.swap = data, transform, swap

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        before, after, mask = self.data[i]
        if self.swap and float(torch.rand(())) < self.swap:
            before, after = after, before
        return self.transform(before, after, mask)


class QuarterTurn(v2.Transform):
    """Turns everything by 0, 90, 180 or 270 degrees."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(torch.rot90(inpt.as_subclass(Tensor), params["turns"], (-2, -1)).contiguous(), like=inpt)


class ChangeDetectionRecipe(Recipe):
    """The task's default recipe. Papers that differ override `augmentation`, `build`, `training_loss` or `begin_training`."""

    config: Config
    monitor = ("f1", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.scale[0] > config.scale[1]:
            raise PaperZooError(f"scale is {config.scale}; the smaller factor comes first")
        if not self.facts:
            mean, deviation = self.measure()
            self.facts = {"labels": list(self.train_set.labels), "mean": mean, "deviation": deviation}
        self.model = runtime.place(self.build(fresh=facts is None))
        self.average = running_average(self.model, config.ema_decay)
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def build(self, fresh: bool) -> nn.Module:
        """The network for the data's bands and kinds of change; a fresh one starts from the backbone's weights that were asked for."""
        config, bands = self.config, len(self.facts["mean"])
        taken = {"num_classes", "in_channels"} & set(config.model_arguments)
        if taken:
            raise PaperZooError(f"model_arguments: {taken.pop()} is not chosen; it follows from the data")
        options = dict(config.model_arguments) | ({"in_channels": bands} if bands != 3 else {})
        model = create(config.model, weights=config.weights, num_classes=len(self.facts["labels"]), **options)
        if fresh and config.backbone_weights is not None:
            from paperzoo.engine.weights import read_state

            try:
                model.load_backbone(read_state(Path(config.backbone_weights)))
            except (RuntimeError, ValueError) as error:
                line = " ".join(str(error).split())[:200]
                raise PaperZooError(
                    f"{config.backbone_weights}: does not fit the backbone of {config.model}: {line}"
                ) from error
        return model

    def measure(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each band, as `normalise` says."""
        bands = self.train_set.bands
        if self.config.normalise == "half":
            return [0.5] * bands, [0.5] * bands
        if self.config.normalise == "imagenet":
            if bands != 3:
                raise PaperZooError(
                    f"normalise 'imagenet' is for three bands, {self.config.data} has {bands}; use --normalise data"
                )
            return MEAN, DEVIATION
        data, sums, squares, count = self.train_set, torch.zeros(bands), torch.zeros(bands), 0
        sums, squares = sums.double(), squares.double()
        for i in range(0, len(data), max(1, len(data) // MEASURED)):
            for picture in data[i][:2]:
                pixels = as_float(picture).flatten(1).double()
                sums, squares, count = sums + pixels.sum(1), squares + pixels.square().sum(1), count + pixels.shape[1]
        mean = sums / count
        deviation = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
        return [round(v, 6) for v in mean.tolist()], [max(1e-6, round(v, 6)) for v in deviation.tolist()]

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a factor: linear warm-up, then the schedule."""
        config = self.config
        if config.schedule != "poly" or step < config.warmup_steps:
            return learning_rate_factor(config, step)
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return (1 - min(1.0, done)) ** config.power

    # -- data ----------------------------------------------------------------------------------------------------

    def augmentation(self) -> list[nn.Module]:
        """The random transforms of training triples; the same for both dates and the mask."""
        config = self.config
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
        steps: list[nn.Module] = [v2.RandomHorizontalFlip(config.flip), v2.RandomVerticalFlip(config.flip)]
        steps += [QuarterTurn()] if config.turn else []
        steps += [] if config.scale == (1.0, 1.0) else [RandomScale(config.scale)]
        steps += [v2.RandomCrop((config.crop_size, config.crop_size), pad_if_needed=True, fill=fill)]
        return steps + ([v2.GaussianBlur(7, (0.01, max(0.02, config.blur)))] if config.blur else [])

    @cached_property
    def train_set(self):
        return open_changes(self.config.data, "train")

    @cached_property
    def test_set(self):
        return open_changes(self.config.data, "test")

    @property
    def to_input(self) -> list[nn.Module]:
        dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
        return [
            v2.ToDtype(dtypes, scale=True),
            v2.Normalize(self.facts["mean"], self.facts["deviation"]),
            v2.ToPureTensor(),
        ]

    @cached_property
    def batches(self):
        data = Transformed(self.train_set, v2.Compose(self.augmentation() + self.to_input), self.config.swap)
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Cross-entropy averaged over the pixels that count, of the whole global batch; logits of another size are resized."""
        if logits.shape[-2:] != masks.shape[-2:]:
            logits = F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)
        summed = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
        return summed / self.runtime.mean((masks != IGNORE).sum().float()).clamp(min=1)

    def training_loss(self, output: Mapping[str, Any], masks: Tensor) -> Tensor:
        """The loss of what the network returned in training: of its logits, and weighed of each auxiliary head's."""
        loss = self.loss(output["out"], masks)
        heads = output.get("aux", [])
        for logits in heads if isinstance(heads, list | tuple) else [heads]:
            loss = loss + self.config.aux_weight * self.loss(logits, masks)
        return loss

    def begin_training(self) -> None:
        """Before every step: the network's mode."""
        self.model.train()

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict:
        before, after, masks = batch
        self.begin_training()
        output = self.model(before, after)
        output = output if isinstance(output, Mapping) else {"out": output}
        loss = self.training_loss(output, masks)
        found, truth = output["out"].detach().argmax(1) > 0, (masks > 0) & (masks != IGNORE)
        hits, both = (found & truth).sum(), (found & (masks != IGNORE)).sum() + truth.sum()
        return {"loss": loss, "train_f1": 2 * hits / both.clamp(min=1)}

    @torch.inference_mode()
    def confusion(self, split: str = "test") -> Tensor:
        """Pixel counts (true id, found id) over the whole split, every pair at its own size."""
        matrix = MulticlassConfusionMatrix(len(self.facts["labels"]), ignore_index=IGNORE).to(self.runtime.device)
        data = Transformed(self.test_set if split == "test" else self.train_set, v2.Compose(self.to_input))
        for samples in self.runtime.loader(data, self.config.batch_size, self.config.workers, collate=as_list):
            for before, after, masks in same_sizes(samples):
                matrix.update(self.logits(before, after).argmax(1), masks)
        return matrix.compute()

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The field's metrics, all from pixel counts over the whole split (not averaged over pairs or batches); see `metrics`."""
        return metrics(self.confusion(split))

    def logits(self, before: Tensor, after: Tensor) -> Tensor:
        """The deployed network's float32 logits (B, K, H, W) of two stacks (B, C, H, W), whole or by windows, on the inputs' device."""
        network, config = self.deployed.eval(), self.config
        if config.window is None:
            on = self.runtime.device
            return network(before.to(on), after.to(on)).float().to(before.device)
        window = (config.window, config.window)

        def both(pair: Tensor) -> Tensor:
            return network(*pair.chunk(2, 1))

        try:
            on = {"device": self.runtime.device, "progress": True}
            return tiled(both, torch.cat([before, after], 1), window, config.overlap, config.batch_size, **on)
        except ValueError as error:
            raise PaperZooError(f"window {config.window}, overlap {config.overlap}: {error}") from error

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[ChangeMap]:
        """Pairs (before, after), {"before": …, "after": …}, or strings "before.tif :: after.tif", to maps of the same height and width.

        A picture is a path, a PIL image, or an array or tensor (H, W), (H, W, C) or (C, H, W), uint8, uint16 or floating point.

        Raises:
            PaperZooError: if an input is no pair, or has other bands than the network was trained with.
            DataError: if a file cannot be read, or the two differ in size.
        """
        transform, results = v2.Compose(self.to_input), []
        bands = len(self.facts["mean"])
        for value in inputs:
            before, after, source = split_pair(value)
            if before.shape[0] != bands:
                raise PaperZooError(
                    f"{source or 'the picture'} has {before.shape[0]} bands; this network takes {bands}"
                )
            pair = transform(tv_tensors.Image(before), tv_tensors.Image(after))
            results.append(answer(self.logits(*(x[None] for x in pair))[0].softmax(0), source))
        return results

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out pairs, written as PNG files, or TIFF where they have other bands."""
        from paperzoo.data.rasters import write_bands

        made, data = [], self.test_set
        for i in range(0, len(data), max(1, len(data) // 8))[:8]:
            ending = ".png" if data[i][0].shape[0] == 3 and data[i][0].dtype == torch.uint8 else ".tif"
            paths = [folder / f"{i:05d}_{name}{ending}" for name in ("before", "after")]
            for path, picture in zip(paths, data[i][:2], strict=True):
                write_bands(path, picture.as_subclass(Tensor))
            made.append(BETWEEN.join(map(str, paths)))
        return made

    def example(self) -> tuple[Tensor, Tensor]:
        size, bands = self.config.crop_size, len(self.facts["mean"])
        rng = torch.Generator().manual_seed(0)
        return tuple(torch.randn(2, bands, size, size, generator=rng) for _ in range(2))

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """The most likely class of each pixel."""
        return expected.argmax(1) == found.argmax(1)

    def draw(self, value: Any, result: ChangeMap) -> Image.Image:
        """Before, after with the changes outlined, and the map of changes."""
        before, after, _ = split_pair(value)
        return row([visible(before), outlined(visible(after), result.mask > 0), as_picture(result.mask > 0)])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out pairs with the truth; answers held against it; precision and recall at every threshold."""
        from paperzoo.engine.pictures import tile

        chosen = torch.randperm(len(self.test_set), generator=torch.Generator().manual_seed(0))[:64].tolist()
        shown = sorted(chosen, key=lambda i: -int((self.test_set[i][2] == 1).sum()))[:6] + chosen[:2]
        pictures = []
        for i in shown:
            before, after, mask = (x.as_subclass(Tensor) for x in self.test_set[i])
            result = self.predict([(before, after)])[0]
            pictures.append(row([visible(before), visible(after), as_picture(mask == 1), compared(result.mask, mask)]))
        title = "Held-out pairs: before, after, truth, answer (white: found, red: false alarm, blue: missed)"
        return {title: tile(pictures, 2), "Precision and recall over thresholds": self.threshold_curve(chosen)}

    def threshold_curve(self, chosen: list[int]) -> Image.Image:
        """Precision against recall of "anything has changed" over the chosen held-out pairs."""
        from sklearn.metrics import precision_recall_curve

        from paperzoo.engine.pictures import new_figure, to_picture

        scores, truth = [], []
        for i in chosen:
            before, after, mask = (x.as_subclass(Tensor) for x in self.test_set[i])
            counts = mask != IGNORE
            scores.append(self.predict([(before, after)])[0].probability[counts].cpu())
            truth.append(mask[counts] > 0)
        figure, axes = new_figure()
        if bool(torch.cat(truth).any()):
            precision, recall, _ = precision_recall_curve(torch.cat(truth).numpy(), torch.cat(scores).numpy())
            keep = np.unique(np.linspace(0, len(recall) - 1, 400).astype(int))
            axes.plot(recall[keep], precision[keep])
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        return to_picture(figure)


def same_sizes(samples: list[tuple[Tensor, Tensor, Tensor]]):
    """Stacks of the triples that have the same height and width."""
    by_size: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for triple in samples:
        by_size.setdefault(triple[0].shape, []).append(triple)
    for triples in by_size.values():
        yield tuple(torch.stack(parts) for parts in zip(*triples, strict=True))


def metrics(confusion: Tensor) -> dict[str, float]:
    """F1, IoU, precision, recall of change, overall accuracy and Cohen's kappa from pixel counts (K, K) (true, found).

    All kinds of change are one here; with more than one kind `miou` is over all ids. F1, IoU, precision and recall are 0 where nothing
    was to be found and nothing was found.
    """
    counts = confusion.double()
    hits = counts[1:, 1:].sum()
    found, truth, total = counts[:, 1:].sum(), counts[1:].sum(), counts.sum().clamp(min=1)
    agree = (hits + counts[0, 0]) / total
    chance = (found * truth + (total - found) * (total - truth)) / total.square()
    result = {
        "f1": 2 * hits / (found + truth).clamp(min=1),
        "change_iou": hits / (found + truth - hits).clamp(min=1),
        "precision": hits / found.clamp(min=1),
        "recall": hits / truth.clamp(min=1),
        "overall_accuracy": counts.diag().sum() / total,
        "kappa": (agree - chance) / (1 - chance) if float(chance) < 1 else torch.tensor(0.0),
    }
    if len(confusion) > 2:
        result["miou"] = class_ious(confusion).nanmean()
    return {name: float(value) for name, value in result.items()}


def answer(probabilities: Tensor, source: str | None = None) -> ChangeMap:
    """Probabilities (K, H, W) to the task's result."""
    from scipy.ndimage import label

    mask = probabilities.argmax(0)
    places = label((mask > 0).cpu().numpy(), np.ones((3, 3)))[1]
    return ChangeMap(mask, 1 - probabilities[0], float((mask > 0).double().mean()), int(places), source)
