"""Edge detection: for every pixel, whether an outline that people would draw passes through it.

A batch is (images, targets): float32 (B, 3, H, W), normalised with the mean and deviation in `facts`; float32 (B, H, W), the share of annotators
in [0, 1] that drew an edge there, -1 where nothing counts (padding). A network maps images to logits (B, 1, H, W) at the size of its input; in
training it may return {"out": logits, "aux": logits of an auxiliary output, or a list of several}, all at that size. Any size that the network
accepts is legal: evaluation and prediction run on each picture at its own size, whole or, where `window` is given, by overlapping windows.
A prediction is an `EdgeMap`. Metrics are those of BSDS500 (`paperzoo.tasks.edge_metrics`): ODS, OIS and AP after non-maximum suppression.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.blocks.tiling import tiled
from paperzoo.data.edge_maps import open_edges
from paperzoo.data.images import to_image
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.edge_metrics import Counts, count_matches, f_measure, rates, summary, suppress, thresholds
from paperzoo.tasks.segmentation import DEVIATION, MEAN, RandomScale, as_list
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

CAFFE_MEAN = [
    122.67891434 / 255,
    116.66876762 / 255,
    104.00698793 / 255,
]  # of the first VGG's data; values then stay in 0 … 255
PADDING = 255  # in a mask


@dataclass(frozen=True)
class EdgeMap:
    """The answer for one picture, at its own size.

    strength: float32 (H, W) in [0, 1]. thin: float32 (H, W), the same where it is the largest across the edge, else 0 (what the
    benchmark scores). share: how much of the picture is a thin edge of at least 0.5.
    """

    strength: Tensor = field(repr=False)
    thin: Tensor = field(repr=False)
    share: float


@dataclass(frozen=True)
class Config:
    """The default recipe: class-balanced cross-entropy of every output, SGD in steps, random scale, crop and mirror."""

    model: str = "hed_vgg16"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "shape_edges"
    pixels: Literal["imagenet", "caffe"] = (
        "imagenet"  # mean and deviation of ImageNet; or mean alone, of values up to 255
    )
    crop_size: Count = 320  # pixels; training pictures are cropped or padded to this square, padding does not count
    scale: tuple[Positive, Positive] = (0.5, 1.5)  # random resizing before the crop
    turn: NotNegative = 0.0  # random turns of up to so many degrees
    flip: Fraction = 0.5  # probability of a mirrored picture
    agreed: Positive = 0.5  # a pixel is an edge if more than this share of the annotators drew it
    disputed: Literal["negative", "ignored"] = "negative"  # what a pixel is that somebody, but too few, drew
    weights: str | None = None  # start from these weights of the whole network
    backbone_weights: str | None = None  # a classifier's file for the backbone
    steps: Count = 30_000
    batch_size: Count = 10
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 1e-6
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 2e-4
    decay_all: bool = True
    schedule: Literal["constant", "step", "cosine"] = "step"
    milestones: tuple[Fraction, ...] = (1 / 3, 2 / 3)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    aux_weight: NotNegative = 1.0
    clip: Positive | None = None
    tolerance: Positive = 0.0075  # of the diagonal: how far a found pixel may lie from a drawn one (NYUD: 0.011)
    thresholds: Count = 99
    border: Annotated[int, Field(ge=0)] = 5  # pixels over which strengths fade to 0 before scoring
    window: Count | None = None  # pixels; evaluate and predict by square windows of this side; None: each picture whole
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    workers: Annotated[int, Field(ge=0)] = 0


class Transformed(Dataset):
    """An edge set seen through a transform of (image, maps), then with the annotators' shares for maps."""

    def __init__(self, data: Any, transform: nn.Module) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, maps = self.transform(*self.data[i])
        return image, torch.where(maps[0] == PADDING, -1.0, (maps > 0).float().mean(0))


class EdgeRecipe(Recipe):
    """The task's default recipe. Papers that differ override `groups`, `loss`, `training_loss` or `augmentation`."""

    config: Config
    reads_images = True
    monitor = ("ods_f", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.scale[0] > config.scale[1]:
            raise PaperZooError(f"scale is {config.scale}; the smaller factor comes first")
        if not self.facts:
            caffe = config.pixels == "caffe"
            mean, deviation = (CAFFE_MEAN, [1 / 255] * 3) if caffe else (MEAN, DEVIATION)
            self.facts = {"mean": mean, "deviation": deviation}
        self.model = runtime.place(self.build(fresh=facts is None))
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(config, step)
        )

    def build(self, fresh: bool) -> nn.Module:
        config = self.config
        model = create(config.model, weights=config.weights, **config.model_arguments)
        if fresh and config.backbone_weights is not None:
            from paperzoo.engine.weights import read_state

            try:
                model.load_backbone(read_state(Path(config.backbone_weights)))
            except (RuntimeError, ValueError, KeyError) as error:
                line = " ".join(str(error).split())[:200]
                raise PaperZooError(
                    f"{config.backbone_weights}: does not fit the backbone of {config.model}: {line}"
                ) from error
        return model

    def make_optimizer(self) -> torch.optim.Optimizer:
        """A paper with learning rates of its own for some layers says so here."""
        return make_optimizer(self.config, self.model)

    # -- data ----------------------------------------------------------------------------------------------------

    def augmentation(self) -> list[nn.Module]:
        config = self.config
        grey = [round(255 * min(1.0, m)) for m in self.facts["mean"]]
        fill = {tv_tensors.Image: grey, tv_tensors.Mask: PADDING}
        steps: list[nn.Module] = [v2.RandomHorizontalFlip(config.flip)] if config.flip else []
        steps += [v2.RandomRotation(config.turn, v2.InterpolationMode.BILINEAR, fill=fill)] if config.turn else []
        steps += [] if config.scale == (1.0, 1.0) else [RandomScale(config.scale)]
        return [*steps, v2.RandomCrop((config.crop_size, config.crop_size), pad_if_needed=True, fill=fill)]

    @cached_property
    def train_set(self):
        return open_edges(self.config.data, "train")

    @cached_property
    def test_set(self):
        return open_edges(self.config.data, "test")

    @property
    def to_input(self) -> list[nn.Module]:
        dtypes = {tv_tensors.Image: torch.float32, "others": None}
        return [
            v2.ToDtype(dtypes, scale=True),
            v2.Normalize(self.facts["mean"], self.facts["deviation"]),
            v2.ToPureTensor(),
        ]

    @cached_property
    def batches(self):
        data = Transformed(self.train_set, v2.Compose(self.augmentation() + self.to_input))
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`balanced_loss` of each picture, averaged over the pictures of the global batch (as gradients are)."""
        positive, counts = self.sides(targets)
        return balanced_loss(logits[:, 0].float(), positive, counts).mean()

    def sides(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Shares (B, H, W) as bool (B, H, W): what is an edge, and what counts."""
        positive = targets > self.config.agreed
        counts = targets >= 0
        return positive, counts & (positive | (targets == 0)) if self.config.disputed == "ignored" else counts

    def training_loss(self, output: dict[str, Any], targets: Tensor) -> Tensor:
        """The loss of the network's answer, and weighed of each auxiliary output."""
        loss = self.loss(output["out"], targets)
        outputs = output.get("aux", [])
        for logits in outputs if isinstance(outputs, list | tuple) else [outputs]:
            loss = loss + self.config.aux_weight * self.loss(logits, targets)
        return loss

    def begin_training(self) -> None:
        """Before every step: the network's mode."""
        self.model.train()

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, targets = batch
        self.begin_training()
        output = self.model(images)
        output = output if isinstance(output, dict) else {"out": output}
        found, (positive, counts) = output["out"].detach()[:, 0] > 0, self.sides(targets)
        hits, both = (found & positive & counts).sum(), (found & counts).sum() + (positive & counts).sum()
        return {"loss": self.training_loss(output, targets), "train_f1": 2 * hits / both.clamp(min=1)}

    # -- scoring -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def counts(self, split: str = "test") -> list[Counts]:
        """Each picture of the split against its annotators."""
        config = self.config
        data = self.test_set if split == "test" else self.train_set
        levels, every = thresholds(config.thresholds), []
        pairs = Pairs(data, v2.Compose(self.to_input))
        for samples in self.runtime.loader(pairs, config.batch_size, config.workers, collate=as_list):
            for image, maps in samples:
                strength = self.logits(image[None])[0, 0].sigmoid().cpu().numpy()
                every.append(
                    count_matches(suppress(strength, config.border), maps.cpu().numpy(), levels, config.tolerance)
                )
        return self.runtime.gather_objects(every)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        return summary(self.counts(split))

    def logits(self, images: Tensor) -> Tensor:
        """The deployed network's float32 logits (B, 1, H, W) of images (B, 3, H, W), whole or by windows, on the images' device."""
        network, config = self.deployed.eval(), self.config
        if config.window is None:
            return network(images.to(self.runtime.device)).float().to(images.device)
        window = (config.window, config.window)
        try:
            on = {"device": self.runtime.device, "progress": True}
            return tiled(network, images, window, config.overlap, config.batch_size, **on)
        except ValueError as error:
            raise PaperZooError(f"window {config.window}, overlap {config.overlap}: {error}") from error

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[EdgeMap]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to edge maps of the same height and width."""
        transform, results = v2.Compose(self.to_input), []
        for value in inputs:
            image = transform(tv_tensors.Image(to_image(value)))
            strength = self.logits(image[None])[0, 0].sigmoid().cpu()
            thin = torch.from_numpy(suppress(strength.numpy(), border=0)).float()
            results.append(EdgeMap(strength, thin, float((thin >= 0.5).double().mean())))
        return results

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out images, written as PNG files."""
        paths = []
        for i in range(0, len(self.test_set), max(1, len(self.test_set) // 8))[:8]:
            paths.append(str(folder / f"{i:05d}.png"))
            Image.fromarray(self.test_set[i][0].as_subclass(Tensor).permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor]:
        size = self.config.crop_size
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """Whether each pixel is more likely an edge than not."""
        return (expected > 0) == (found > 0)

    def draw(self, value: Any, result: EdgeMap) -> Image.Image:
        """The picture, the edges' strength, and the thin edges, dark on white."""
        return side_by_side([to_image(value), ink(result.strength), ink(result.thin)])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out pictures (picture, what people drew, strength, thin edges), and precision over recall with its thresholds."""
        import numpy as np

        from paperzoo.engine.pictures import new_figure, tile, to_picture

        shown = torch.randperm(len(self.test_set), generator=torch.Generator().manual_seed(0))[:6].tolist()
        pictures = []
        for i in shown:
            image, maps = (t.as_subclass(Tensor) for t in self.test_set[i])
            result = self.predict([image])[0]
            drawn = (maps > 0).float().mean(0)
            pictures.append(side_by_side([image, ink(drawn), ink(result.strength), ink(result.thin)]))
        every = self.counts()
        table = np.array([[c.recalled, c.drawn, c.right, c.found] for c in every]).sum(0)
        precision, recall = rates(table)
        figure, axes = new_figure()
        axes.plot(recall, precision, marker=".")
        best = f_measure(precision, recall).argmax()
        axes.plot(recall[best], precision[best], "o", label=f"threshold {thresholds(self.config.thresholds)[best]:.2f}")
        axes.legend(fontsize=8)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        title = "Held-out pictures: picture, drawn, strength, thin edges"
        return {title: tile(pictures, 2), "Precision and recall over thresholds": to_picture(figure)}


class Pairs(Dataset):
    """Pictures made ready, with the annotators' maps as they are."""

    def __init__(self, data: Any, transform: nn.Module) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, maps = self.data[i]
        return self.transform(image), maps.as_subclass(Tensor)


def balanced_loss(logits: Tensor, positive: Tensor, counts: Tensor) -> Tensor:
    """HED's class-balanced cross-entropy (eq. 2), a sum over the pixels of each picture: (B,).

    -beta sum_edges log p - (1 - beta) sum_others log(1 - p), with beta the share of the others, picture by picture.

    Args:
        logits: (B, H, W).
        positive, counts: bool (B, H, W).
    """
    edges, others = (positive & counts).float(), (~positive & counts).float()
    beta = others.sum((1, 2), keepdim=True) / counts.sum((1, 2), keepdim=True).clamp(min=1)
    losses = F.binary_cross_entropy_with_logits(logits, edges, reduction="none")
    return (losses * (beta * edges + (1 - beta) * others)).sum((1, 2))


def ink(strength: Tensor) -> Tensor:
    """Strengths (H, W) in [0, 1] as a uint8 picture (3, H, W), dark on white."""
    return (255 * (1 - strength.clamp(0, 1))).round().to(torch.uint8).expand(3, -1, -1)


def side_by_side(pictures: list[Tensor]) -> Image.Image:
    """uint8 pictures (3, H, W) of one size in a row, small ones enlarged."""
    from paperzoo.engine.pictures import tile

    height, width = pictures[0].shape[-2:]
    factor = max(1, round(160 / min(height, width)))
    shown = [Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in pictures]
    return tile([p.resize((width * factor, height * factor), Image.Resampling.NEAREST) for p in shown], len(shown), 2)
