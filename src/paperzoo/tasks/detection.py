"""Object detection: boxes with classes and scores.

Boxes are x1 y1 x2 y2 in pixels, x2 and y2 exclusive. Labels are 0 … num_classes - 1, without a class for background.

A batch is a dict:
    images   float32 (B, 3, H, W): resized, normalised with `facts`, zero-padded right and below; (H, W) is the canvas
    sizes    int64 (B, 2): height and width of each image inside the canvas
    targets  for each image {"boxes": float32 (N, 4) in pixels of the canvas, "labels": int64 (N,)}; N may be 0
    truth    for evaluation: for each image boxes, labels, iscrowd, area, size in pixels of the original image

A detector is a module with four members, whether it has anchors, proposals or queries:
    model(images)                                 raw outputs, a tuple of tensors (B, …): what is exported
    model(images, targets)                        the losses, a dict of scalars; their sum is learned from
    model.postprocess(outputs, sizes, canvas)     for each image {"boxes": (N, 4) in pixels of the canvas, "scores": (N,),
                                                  "labels": int64 (N,)}, best first; sizes as above, canvas = (H, W)
    model.num_classes
and two more where they make sense: `reset_classifier(num_classes)` to learn other classes, `load_backbone(state_dict)` to
start from a classifier's weights.

A prediction is a `Detection`, in pixels of the image that was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from torchvision.ops import box_iou

from paperzoo.blocks.boxes import pad_images
from paperzoo.data.coco import DetectionData, open_detection
from paperzoo.data.images import to_image
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import browser
from paperzoo.tasks.classification import IMAGENET, Count, Fraction, Positive
from paperzoo.tasks.detection_samples import (
    Augment,
    Collate,
    Mosaics,
    Prepared,
    at_side,
    augmentation,
    relabelled,
    resized,
    scale,
    to_network,
)
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

__all__ = [
    "Augment",
    "COLOURS",
    "Collate",
    "Config",
    "Detection",
    "DetectionRecipe",
    "Mosaics",
    "Prepared",
    "answer",
    "at_side",
    "augmentation",
    "batch_norms",
    "coco_numbers",
    "drawn",
    "relabelled",
    "resized",
    "scale",
    "to_network",
]

SCENES = ("digit_scenes", "shape_scenes")
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#000075", "#f032e6")


@dataclass(frozen=True)
class Detection:
    """The objects in one image, best first: one entry of each list an object. Boxes in pixels of the image."""

    boxes: list[tuple[float, float, float, float]]
    labels: list[str]
    scores: list[float]
    indices: list[int]

    def above(self, score: float) -> Detection:
        """Only the objects with at least this score."""
        n = sum(s >= score for s in self.scores)
        return Detection(self.boxes[:n], self.labels[:n], self.scores[:n], self.indices[:n])


@dataclass(frozen=True)
class Config:
    """The default recipe: gradient descent on the sum of the detector's losses. Batch of 16, 90,000 steps is COCO's "1x"."""

    model: str = "retinanet_resnet50_fpn"
    model_arguments: dict[str, str | int | float | bool] = field(
        default_factory=dict
    )  # more of what its function takes
    data: str = "digit_scenes"
    scenes: Count = (
        512  # how many scenes to learn from, their pixels and objects: only for digit_scenes and shape_scenes
    )
    scene_size: Count = 96
    scene_objects: Count = 4
    scene_scale: tuple[float, float] = (0.2, 0.45)
    resize: Literal["shortest", "square"] = "shortest"  # the shortest side to image_sizes, or both sides
    image_sizes: tuple[Count, ...] = (800,)  # drawn from for each image while learning; the last one is for evaluation
    longest_side: Count = 1333  # with "shortest": no side is longer
    multiple: Count = 32  # images are padded to a multiple of it
    normalise: Literal["imagenet", "none"] = "imagenet"
    augment: Augment = "flip"
    mosaic_scale: tuple[float, float] = (0.5, 1.5)  # a mosaic's random enlargement
    plain_steps: Annotated[int, Field(ge=0)] = 0  # the last steps, without mosaics and in one size
    batch_sizes: tuple[Count, ...] = ()  # the longer side that a step's batch is resized to; none: as it is
    batch_sizes_every: Count = 1  # drawn anew after so many steps
    weights: str | None = None  # start from these weights of the whole detector
    backbone_weights: str | None = None  # or from a classifier's
    freeze: tuple[str, ...] = ()  # parameters whose names begin so do not learn
    freeze_norms: bool = False  # batch norms keep their statistics and do not learn
    steps: Count = 90_000
    batch_size: Count = 16
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (2 / 3, 8 / 9)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    show_above: Fraction = 0.5  # pictures show objects with at least this score
    workers: Annotated[int, Field(ge=0)] = 0


class DetectionRecipe(Recipe):
    """The task's default recipe. A detector with another way to learn overrides `step` or `train_data`."""

    config: Config
    reads_images = True
    monitor = ("mAP", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            mean, deviation = IMAGENET if config.normalise == "imagenet" else ([0.0] * 3, [1.0] * 3)
            self.facts = {"labels": self.open("train").labels, "mean": mean, "deviation": deviation}
        self.model = runtime.place(self.build())
        self.optimizer = make_optimizer(config, self.model)
        factor = lambda step: learning_rate_factor(config, step)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = running_average(self.model, config.ema_decay)

    def model_arguments(self) -> dict[str, Any]:
        """What the model's function gets beside `num_classes`."""
        return dict(self.config.model_arguments)

    def build(self) -> nn.Module:
        """The detector, for the data's classes, with what is frozen frozen."""
        config, classes = self.config, len(self.facts["labels"])
        arguments = self.model_arguments()
        if "num_classes" in arguments:
            raise PaperZooError("model_arguments: num_classes is not chosen; it follows from the data")
        if config.weights is None:
            model = create(config.model, num_classes=classes, **arguments)
        else:
            model = create(config.model, weights=config.weights, **arguments)
            if model.num_classes != classes:
                model.reset_classifier(classes)
                model.paperzoo["arguments"]["num_classes"] = classes
        if config.backbone_weights is not None:
            from paperzoo.engine.weights import read_state

            path = Path(config.backbone_weights).expanduser()
            try:
                model.load_backbone(read_state(path))
            except (ValueError, RuntimeError) as error:
                raise PaperZooError(
                    f"{path}: these weights do not fit the backbone of {config.model}: {error}"
                ) from None
        for prefix in config.freeze:
            chosen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
            if not chosen:
                raise PaperZooError(f"freeze: no parameter of {config.model} begins with '{prefix}'")
            for parameter in chosen:
                parameter.requires_grad_(False)
        if config.freeze_norms:
            for norm in batch_norms(model):
                for parameter in norm.parameters():
                    parameter.requires_grad_(False)
        return model

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> DetectionData:
        """The raw data of a split."""
        c = self.config
        if c.data not in SCENES:
            return open_detection(c.data, split)
        count = c.scenes if split == "train" else min(128, c.scenes)
        return open_detection(
            c.data, split, count=count, size=c.scene_size, max_objects=c.scene_objects, scale=c.scene_scale
        )

    @cached_property
    def train_data(self) -> Dataset:
        return Prepared(self.open("train"), self, train=True)

    @cached_property
    def test_data(self) -> Dataset:
        return Prepared(self.open("test"), self, train=False)

    @cached_property
    def batches(self):
        collate = Collate(self.config.multiple)
        return self.runtime.batches(
            self.train_data, self.config.batch_size, workers=self.config.workers, collate=collate
        )

    @cached_property
    def mosaics(self):
        c, (share, mixed) = self.config, self.mosaic_shares
        data = Mosaics(self.train_data, share, mixed, c.mosaic_scale)
        return self.runtime.batches(data, c.batch_size, workers=c.workers, collate=Collate(c.multiple))

    @property
    def mosaic_shares(self) -> tuple[float, float]:
        """The share of mosaics among the samples, and of mixed ones among the mosaics."""
        return {"mosaic": (1.0, 0.0), "mosaic_mixup": (1.0, 1.0)}.get(self.config.augment, (0.0, 0.0))

    @property
    def plain(self) -> bool:
        """Whether the steps without mosaics have begun."""
        return self.runtime.step >= self.config.steps - self.config.plain_steps

    def batch(self) -> dict:
        source = self.batches if self.plain or self.mosaic_shares[0] == 0 else self.mosaics
        batch, sides = source.next(), self.config.batch_sizes
        if not sides or self.plain:
            return batch
        draw = self.runtime.key("side", self.runtime.position // self.config.batch_sizes_every, "all")
        choice = torch.randint(len(sides), (), generator=torch.Generator().manual_seed(draw))
        return at_side(batch, sides[int(choice)])

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: dict) -> dict:
        self.model.train()
        if self.config.freeze_norms:
            for norm in batch_norms(self.model):
                norm.eval()
        losses = self.model(batch["images"], batch["targets"])
        return {"loss": sum(losses.values())} | {f"{name}_loss": loss.detach() for name, loss in losses.items()}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """COCO's twelve numbers over the whole split (pycocotools, through torchmetrics); those that do not exist are left out.

        mAP is the mean over IoU 0.5 to 0.95 and classes; AR1, AR10, AR100 the recall with so many detections an image.
        """
        metric = self.metric()
        data = self.test_data if split == "test" else Prepared(self.open(split), self, train=False)
        collate = Collate(self.config.multiple)
        for batch in self.runtime.loader(data, min(self.config.batch_size, 32), self.config.workers, collate):
            found = self.detect(batch["images"], batch["sizes"], [t["size"] for t in batch["truth"]])
            metric.update(found, batch["truth"])
        return coco_numbers(metric.compute())

    def metric(self) -> Any:
        """The metric that `evaluate` fills."""
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools").to(self.runtime.device)
        metric.warn_on_many_detections = False  # COCO's protocol itself takes the best 100
        return metric

    # -- use -----------------------------------------------------------------------------------------------------

    def detect(self, images: Tensor, sizes: Tensor, originals: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """A batch of network inputs to boxes, scores and labels in pixels of the original images (height, width)."""
        model = self.deployed.eval()
        found = model.postprocess(model(images), sizes, tuple(images.shape[-2:]))
        for objects, size, original in zip(found, sizes, originals, strict=True):
            factor = (torch.as_tensor(original, device=sizes.device) / size).flip(0).repeat(2)
            objects["boxes"] = objects["boxes"] * factor.to(objects["boxes"].dtype)
        return found

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Detection]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to the objects in them."""
        results: list[Detection] = []
        for start in range(0, len(inputs), 8):
            raw = [to_image(value) for value in inputs[start : start + 8]]
            images = [to_network(image, self.config, self.facts) for image in raw]
            sizes = torch.tensor([x.shape[1:] for x in images], device=self.runtime.device)
            batch = pad_images(images, self.config.multiple).to(self.runtime.device)
            found = self.detect(batch, sizes, [torch.tensor(image.shape[1:]) for image in raw])
            results += [answer(objects, self.facts["labels"]) for objects in found]
        return results

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out images, written as PNG files."""
        data, paths = self.open("test"), []
        for i in range(0, len(data), max(1, len(data) // 8))[:8]:
            paths.append(str(folder / f"{i:05d}.png"))
            Image.fromarray(data[i]["image"].permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor]:
        size = -(-self.config.image_sizes[-1] // self.config.multiple) * self.config.multiple
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def same_answers(self, expected: Any, found: Any) -> Tensor:
        """Whether every object above `show_above` has one of its label that overlaps it by half or more, and the other way round."""
        size = self.config.image_sizes[-1]
        sizes = torch.full((len(tree_leaves(expected)[0]), 2), size)
        each = [self.deployed.postprocess(outputs, sizes, (size, size)) for outputs in (expected, found)]
        same = []
        for pair in zip(*each, strict=True):
            a, b = ({k: v[d["scores"] >= self.config.show_above] for k, v in d.items()} for d in pair)
            match = (box_iou(a["boxes"], b["boxes"]) >= 0.5) & (a["labels"][:, None] == b["labels"][None])
            same += [match.any(1), match.any(0)] if match.numel() else [torch.zeros(max(match.shape), dtype=torch.bool)]
        return torch.cat(same) if same and sum(map(len, same)) else torch.ones(1, dtype=torch.bool)

    def browser(self) -> dict | None:
        """A picture, its middle square scaled to the size of evaluation, to the objects in it."""
        if type(self).predict is not DetectionRecipe.predict:
            return None
        size, data = self.config.image_sizes[-1], self.open("test")
        numbers = relabelled(data, self.facts["labels"])
        samples = []
        for i in browser.evenly(len(data), browser.SHOWN):
            item = data[i]
            names = [self.facts["labels"][numbers[k]] for k in item["labels"].tolist()]
            truth = {"boxes": item["boxes"].tolist(), "labels": names}
            samples.append({"image": browser.picture_url(item["image"]), "truth": truth})
        return {
            "input": {
                "kind": "image",
                "size": [size, size],
                # "shortest" keeps the shape of a picture, but a page's graph has one size: hence the middle square
                "resize": {
                    "rule": "square" if self.config.resize == "square" else "cover",
                    "to": size,
                    "antialias": False,
                },
            },
            "output": {
                "kind": "boxes",
                "labels": self.facts["labels"],
                "colours": list(COLOURS),
                "threshold": self.config.show_above,
            },
            "samples": samples,
            **browser.about(self.config.data),
        }

    def browser_network(self) -> tuple[nn.Module, tuple]:
        """Pixels (1, 3, H, W) in [0, 1] -> boxes (N, 4) in those pixels, scores (N,), labels (N,): the whole of `postprocess`."""
        size, canvas = self.config.image_sizes[-1], self.example()[0].shape[-1]
        network = browser.Objects(self.deployed, self.facts, size, canvas)
        return network, (torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Detection) -> Image.Image:
        shown = result.above(self.config.show_above)
        captions = [f"{label} {score:.0%}" for label, score in zip(shown.labels, shown.scores, strict=True)]
        return drawn(to_image(value), shown.boxes, captions, shown.indices)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with what was found, and with what is there."""
        from paperzoo.engine.pictures import tile

        data = self.open("test")
        items = [data[i] for i in range(0, len(data), max(1, len(data) // 16))[:16]]
        numbers = relabelled(data, self.facts["labels"])
        found = [
            self.draw(item["image"], r)
            for item, r in zip(items, self.predict([i["image"] for i in items]), strict=True)
        ]
        true = []
        for item in items:
            labels = [numbers[k] for k in item["labels"].tolist()]
            true.append(drawn(item["image"], item["boxes"].tolist(), [self.facts["labels"][k] for k in labels], labels))
        return {"Found": tile(found, 4), "There": tile(true, 4)}


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def coco_numbers(computed: dict[str, Tensor]) -> dict[str, float]:
    """torchmetrics' names in COCO's words; -1 means that there was nothing to measure, and is dropped."""
    words = {"map": "mAP", "map_50": "mAP50", "map_75": "mAP75"} | {f"mar_{k}": f"AR{k}" for k in (1, 10, 100, 1000)}
    for part in ("small", "medium", "large"):
        words |= {f"map_{part}": f"mAP_{part}", f"mar_{part}": f"AR_{part}"}
    return {word: float(computed[key]) for key, word in words.items() if key in computed and float(computed[key]) >= 0}


def answer(objects: dict[str, Tensor], labels: Sequence[str]) -> Detection:
    indices = objects["labels"].tolist()
    boxes = [tuple(round(x, 2) for x in box) for box in objects["boxes"].tolist()]
    return Detection(boxes, [labels[k] for k in indices], objects["scores"].tolist(), indices)


def drawn(
    image: Tensor, boxes: Sequence[Sequence[float]], captions: Sequence[str], indices: Sequence[int], least: int = 240
) -> Image.Image:
    """A uint8 image (3, H, W) with captioned boxes, a colour for each class; small images are enlarged to `least` pixels."""
    factor = max(1, -(-least // max(image.shape[1:])))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for box, caption, index in reversed(list(zip(boxes, captions, indices, strict=True))):  # the best on top
        x1, y1, x2, y2 = (factor * v for v in box)
        colour = COLOURS[index % len(COLOURS)]
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        left, top, right, bottom = pen.textbbox((x1 + 2, max(0, y1 - 12)), caption)
        pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
        pen.text((x1 + 2, max(0, y1 - 12)), caption, fill="white")
    return picture
