"""Semantic segmentation: one class for every pixel.

A batch is (images, masks): float32 (B, 3, H, W), normalised with the mean and deviation in `facts`; int64 (B, H, W), class ids in
0 … num_classes - 1 and `ignore_index` (255) where nothing counts. A network maps images to logits (B, num_classes, H, W) at the
size of its input; in training it may return {"out": logits, "aux": logits} with an auxiliary head's (or a list of several heads'). Any height and width that the
network accepts is legal: evaluation and prediction run on each image at its own size, whole or, where `window` is given, by
overlapping windows (`paperzoo.blocks.tiling`), which takes images of any size in bounded memory. A prediction is a `Segmentation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.blocks.tiling import tiled
from paperzoo.data.images import to_image
from paperzoo.data.masks import open_masks
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import browser

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which pretrained backbones expect


@dataclass(frozen=True)
class Segmentation:
    """The answer for one image, at its own size.

    mask: int64 (H, W), class ids. confidence: float32 (H, W) in [0, 1], the probability of the class given.
    areas: the share of the image of every class that appears, largest first.
    """

    mask: Tensor = field(repr=False)
    confidence: Tensor = field(repr=False)
    areas: dict[str, float]


@dataclass(frozen=True)
class Config:
    """The default recipe: cross-entropy over the pixels, SGD, the "poly" learning rate, random scale, crop and mirror."""

    model: str = "fcn_resnet50"
    # more for the model's function: a backbone's name, an output stride
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "digit_ink"
    crop_size: Count = 480  # pixels; training images are cropped or padded to this square, padding is ignored
    scale: tuple[Positive, Positive] = (0.5, 2.0)  # random resizing before the crop
    flip: Fraction = 0.5  # probability of a mirrored image
    weights: str | None = None  # start from these weights of the whole network, with a head for the same classes
    backbone_weights: str | None = None  # a classifier's file for the backbone
    steps: Count = 30_000
    batch_size: Count = 16
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-4
    bias_factor: Positive = 1.0  # learning rate of biases, relative; other than 1 they have no weight decay either
    power: NotNegative = 0.9  # of the poly schedule (1 - step / steps) ** power; 0 keeps the rate fixed
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    aux_weight: NotNegative = 0.5
    # learn only from pixels whose class has a probability below this, and at least from this share of a batch's, the hardest
    hard_pixels: Fraction | None = None
    min_kept: Fraction = 1 / 16
    ignore_index: Literal[255] = 255
    clip: Positive | None = None
    window: Count | None = None  # pixels; evaluate and predict by square windows of this side; None: each image whole
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5  # share of a window that the next one sees too
    workers: Annotated[int, Field(ge=0)] = 0


class RandomScale(v2.Transform):
    """Resizes image and mask by one random factor, uniform in `scale`."""

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        factor = float(torch.empty(()).uniform_(*self.scale))
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.resize(inpt, params["size"], antialias=True)


class Transformed(Dataset):
    """A segmentation set seen through a transform of (image, mask)."""

    def __init__(self, data: Any, transform: nn.Module) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.data[i])


def to_input(mean: list[float], deviation: list[float]) -> list[nn.Module]:
    """What makes a network's input of (uint8 image, mask)."""
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(mean, deviation), v2.ToPureTensor()]


def as_list(samples: list) -> list:
    """Collates images of different sizes: as they are."""
    return samples


class SegmentationRecipe(Recipe):
    """The task's default recipe. Papers that differ override `augmentation`, `groups`, `training_loss` or `begin_training`."""

    config: Config
    reads_images = True
    monitor = ("miou", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.scale[0] > config.scale[1]:
            raise PaperZooError(f"scale is {config.scale}; the smaller factor comes first")
        if not self.facts:
            self.facts = {"labels": list(self.train_set.labels), "mean": MEAN, "deviation": DEVIATION}
        self.model = runtime.place(self.build(fresh=facts is None))
        groups = self.groups()
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                groups, config.learning_rate, config.momentum, weight_decay=config.weight_decay
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def build(self, fresh: bool) -> nn.Module:
        """The network for the data's classes; a fresh one starts from the backbone's weights that were asked for."""
        config = self.config
        if "num_classes" in config.model_arguments:
            raise PaperZooError("model_arguments: num_classes is not chosen; it follows from the data")
        classes = len(self.facts["labels"])
        model = create(config.model, weights=config.weights, num_classes=classes, **config.model_arguments)
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

    def groups(self) -> list[dict]:
        """Parameters for the optimizer; biases apart where they have their own rate."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if self.config.bias_factor == 1:
            return [{"params": [p for _, p in trained]}]
        biases = [p for name, p in trained if name.endswith("bias")]
        others = [p for name, p in trained if not name.endswith("bias")]
        rate = self.config.learning_rate * self.config.bias_factor
        return [{"params": others}, {"params": biases, "lr": rate, "weight_decay": 0.0}]

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a factor: linear warm-up, then "poly"."""
        warmup, steps = self.config.warmup_steps, self.config.steps
        if step < warmup:
            return (step + 1) / warmup
        return (1 - min(1.0, (step - warmup) / max(1, steps - warmup))) ** self.config.power

    # -- data ----------------------------------------------------------------------------------------------------

    def augmentation(self) -> list[nn.Module]:
        """The random transforms of training pairs."""
        size = self.config.crop_size
        fill = {
            tv_tensors.Image: [round(255 * m) for m in self.facts["mean"]],
            tv_tensors.Mask: self.config.ignore_index,
        }
        resize = [] if self.config.scale == (1.0, 1.0) else [RandomScale(self.config.scale)]
        mirror = [v2.RandomHorizontalFlip(self.config.flip)] if self.config.flip else []
        return [*resize, v2.RandomCrop((size, size), pad_if_needed=True, fill=fill), *mirror]

    @cached_property
    def train_set(self):
        return open_masks(self.config.data, "train")

    @cached_property
    def test_set(self):
        return open_masks(self.config.data, "test")

    @property
    def to_input(self) -> list[nn.Module]:
        return to_input(self.facts["mean"], self.facts["deviation"])

    @cached_property
    def batches(self):
        data = Transformed(self.train_set, v2.Compose(self.augmentation() + self.to_input))
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Cross-entropy averaged over the pixels that count, of the whole global batch; 0 where none does.

        With `hard_pixels` those count whose class has a probability below it, and the hardest of the others until `min_kept` do.
        """
        ignored = self.config.ignore_index
        if self.config.hard_pixels is None:
            summed = F.cross_entropy(logits.float(), masks, ignore_index=ignored, reduction="sum")
            counted = (masks != ignored).sum().float()
            return summed / self.runtime.mean(counted).clamp(min=1)
        losses = F.cross_entropy(logits.float(), masks, ignore_index=ignored, reduction="none")
        return mean_of_hard(losses, masks != ignored, self.config.hard_pixels, self.config.min_kept, self.runtime)

    def training_loss(self, output: dict[str, Any], masks: Tensor) -> Tensor:
        """The loss of what the network returned in training: of its logits, and weighed of each auxiliary head's."""
        loss = self.loss(output["out"], masks)
        heads = output.get("aux", [])
        for logits in heads if isinstance(heads, list | tuple) else [heads]:
            loss = loss + self.config.aux_weight * self.loss(logits, masks)
        return loss

    def begin_training(self) -> None:
        """Before every step: the network's mode. A paper that freezes batch norm says so here."""
        self.model.train()

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, masks = batch
        self.begin_training()
        output = self.model(images)
        output = output if isinstance(output, dict) else {"out": output}
        logits, loss = output["out"], self.training_loss(output, masks)
        counted = masks != self.config.ignore_index
        found = logits.detach()
        of_truth = found.gather(1, masks.where(counted, 0)[:, None])[:, 0]
        hits = ((of_truth == found.amax(1)) & counted).sum() / counted.sum().clamp(min=1)  # quicker than argmax
        return {"loss": loss, "train_pixel_accuracy": hits}

    @torch.inference_mode()
    def confusion(self, split: str = "test") -> Tensor:
        """Pixel counts (true class, predicted class) over the whole split, every image at its own size."""
        classes = len(self.facts["labels"])
        matrix = MulticlassConfusionMatrix(classes, ignore_index=self.config.ignore_index).to(self.runtime.device)
        data = Transformed(self.test_set if split == "test" else self.train_set, v2.Compose(self.to_input))
        for samples in self.runtime.loader(data, self.config.batch_size, self.config.workers, collate=as_list):
            for images, masks in same_sizes(samples):
                matrix.update(self.logits(images).argmax(1), masks)
        return matrix.compute()

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The four usual metrics, all from pixel counts over the whole split (not averaged over images or batches)."""
        return metrics(self.confusion(split))

    def logits(self, images: Tensor) -> Tensor:
        """The deployed network's float32 logits (B, K, H, W) of images (B, 3, H, W), whole or by windows, on the images' device."""
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
    def predict(self, inputs: list) -> list[Segmentation]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to masks of the same height and width."""
        transform = v2.Compose(self.to_input)
        results = []
        for value in inputs:
            image = transform(tv_tensors.Image(to_image(value)))
            results.append(answer(self.logits(image[None])[0].softmax(0), self.facts["labels"]))
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
        """The most likely class of each pixel."""
        return expected.argmax(1) == found.argmax(1)

    def browser(self) -> dict | None:
        """A picture, its middle square scaled to the size of training, to a class for each pixel."""
        if type(self).predict is not SegmentationRecipe.predict:
            return None
        size, labels = self.config.crop_size, self.facts["labels"]
        samples = []
        for i in browser.evenly(len(self.test_set), browser.SHOWN):
            image, mask = (t.as_subclass(Tensor) for t in self.test_set[i])
            samples.append({"image": browser.picture_url(image), "truth": browser.picture_url(mask)})
        return {
            "input": {
                "kind": "image",
                "size": [size, size],
                "resize": {"rule": "cover", "to": size, "antialias": True},
            },
            "output": {
                "kind": "mask",
                "labels": labels,
                "colours": browser.hex_colours(palette(len(labels))),
                "clear": [0] if labels[0] == "background" else [],
            },
            "samples": samples,
            **browser.about(self.config.data),
        }

    def browser_network(self) -> tuple[nn.Module, tuple]:
        """Pixels (1, 3, H, W) in [0, 1] -> class ids int32 (1, H, W) and their probabilities (1, H, W)."""
        size = self.config.crop_size
        network = nn.Sequential(browser.Normalise(self.facts), self.deployed, browser.BestClass())
        return network, (torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Segmentation) -> Image.Image:
        return overlay(to_image(value), result.mask, self.facts["labels"])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images (picture, truth, answer), and the IoU of every class."""
        from paperzoo.engine.pictures import new_figure, tile, to_picture

        labels = self.facts["labels"]
        shown = torch.randperm(len(self.test_set), generator=torch.Generator().manual_seed(0))[:8].tolist()
        pictures = []
        for i in shown:
            image, mask = (t.as_subclass(Tensor) for t in self.test_set[i])
            result = self.predict([image])[0]
            pictures += [
                overlay(image, torch.full_like(mask, 255), labels),
                overlay(image, mask, labels),
                self.draw(image, result),
            ]
        ious = class_ious(self.confusion()).tolist()
        figure, axes = new_figure(6, 1.2 + 0.22 * len(labels))
        axes.barh(labels, ious)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("IoU")
        return {"Held-out images: picture, truth, answer": tile(pictures, 6), "IoU of each class": to_picture(figure)}


def mean_of_hard(losses: Tensor, counts: Tensor, below: float, least: float, runtime: Runtime) -> Tensor:
    """Online hard example mining: the mean of the losses of hard pixels over the global batch.

    Args:
        losses: cross-entropies -log p of each pixel's class (B, H, W).
        counts: bool (B, H, W); the others never count.
        below: a pixel is hard whose p is below this.
        least: share of the pixels that is kept at least, the hardest.
    """
    enough = max(1, round(least * losses.numel()))
    hardest = losses.detach().where(counts, -1.0).flatten().topk(enough).values
    border = torch.minimum(hardest[-1], torch.tensor(-math.log(max(below, 1e-12)), device=losses.device))
    kept = counts & (losses.detach() >= border)
    return (losses * kept).sum() / runtime.mean(kept.sum().float()).clamp(min=1)


def same_sizes(samples: list[tuple[Tensor, Tensor]]):
    """Stacks of the samples that have the same height and width."""
    by_size: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for image, mask in samples:
        by_size.setdefault(image.shape, []).append((image, mask))
    for pairs in by_size.values():
        yield tuple(torch.stack(parts) for parts in zip(*pairs, strict=True))


def class_ious(confusion: Tensor) -> Tensor:
    """Intersection over union of each class from pixel counts (K, K) (true, predicted): (K,), NaN for a class that never appears."""
    confusion = confusion.double()
    hits = confusion.diag()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def metrics(confusion: Tensor) -> dict[str, float]:
    """Pixel accuracy, mean accuracy, mean IoU and frequency-weighted IoU from pixel counts (K, K) (true, predicted).

    Classes that appear neither in the truth nor in the answers do not enter the means.
    """
    confusion = confusion.double()
    hits, truth = confusion.diag(), confusion.sum(1)
    iou = class_ious(confusion)
    total = confusion.sum().clamp(min=1)
    return {
        "miou": float(iou.nanmean()),
        "pixel_accuracy": float(hits.sum() / total),
        "mean_accuracy": float((hits / truth).nanmean()),
        "frequency_weighted_iou": float((iou.nan_to_num() * truth).sum() / total),
    }


def answer(probabilities: Tensor, labels: list[str]) -> Segmentation:
    """Probabilities (K, H, W) to the task's result."""
    confidence, mask = probabilities.max(0)
    shares = torch.bincount(mask.flatten(), minlength=len(labels)).double() / mask.numel()
    areas = {labels[i]: float(shares[i]) for i in shares.argsort(descending=True) if shares[i] > 0}
    return Segmentation(mask, confidence, areas)


def palette(count: int = 256) -> Tensor:
    """Pascal VOC's colours, uint8 (count, 3): the bits of the class id spread over red, green and blue."""
    ids = torch.arange(count)
    colours = torch.zeros(count, 3, dtype=torch.int64)
    for triple in range(3):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * triple + channel)) & 1) << (7 - triple)
    return colours.to(torch.uint8)


def overlay(image: Tensor, mask: Tensor, labels: list[str], strength: float = 0.6) -> Image.Image:
    """A uint8 image (3, H, W) tinted with each class's colour, with the names of the classes below; 255 and "background" stay clear."""
    colours = palette()
    tint = colours[mask.clamp(0, 255)].permute(2, 0, 1).float()
    clear = mask == 255
    if labels and labels[0] == "background":
        clear = clear | (mask == 0)
    blend = torch.where(clear, image.float(), (1 - strength) * image.float() + strength * tint)
    picture = Image.fromarray(blend.round().to(torch.uint8).permute(1, 2, 0).numpy())
    factor = max(1, round(160 / min(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    framed = Image.new("RGB", (picture.width, picture.height + 14), "white")
    framed.paste(picture, (0, 0))
    draw, x = ImageDraw.Draw(framed), 2
    for i in mask[~clear].unique().tolist():
        name = labels[i] if i < len(labels) else str(i)
        draw.rectangle((x, picture.height + 3, x + 7, picture.height + 10), fill=tuple(colours[i].tolist()))
        draw.text((x + 10, picture.height + 1), name, fill="black")
        x += 16 + int(draw.textlength(name))
    return framed
