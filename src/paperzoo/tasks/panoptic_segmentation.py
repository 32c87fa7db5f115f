"""Panoptic segmentation: every pixel in one segment, a countable thing or a region of stuff, with its category.

Categories are 0 … K - 1, things and stuff together; which are things is in `facts["things"]`. K is below 255.

A batch is a dict:
    images   float32 (B, 3, H, W): resized, normalised with `facts`, zero-padded right and below; (H, W) is the canvas
    sizes    int64 (B, 2): height and width of each image inside the canvas
    targets  for each image, in pixels of the canvas:
             boxes     float32 (N, 4), x1 y1 x2 y2, x2 and y2 exclusive, around the visible pixels of each thing; N may be 0
             labels    int64 (N,), their categories
             masks     bool (N, H, W), their pixels, which do not overlap
             semantic  int64 (H, W): the category of each pixel, crowds included; 255 where no segment is, and in the padding
    truth    for evaluation: for each image {"map": `PanopticMap` of the original image, "size": int64 (2,), its height and width}

A network is a module that has
    model(images)                                          raw outputs, a tuple of tensors (B, …): what is exported
    model(images, targets)                                 the losses, a dict of scalars; their sum is learned from
    model.postprocess(outputs, sizes, canvas, originals)   a `PanopticMap` for each image, at its original height and width;
                                                           sizes as above, canvas = (H, W), originals: (height, width) of each
    model.num_classes, model.things                        K; the countable categories, rising
and more where it makes sense:
    model.semantic(outputs, sizes, canvas, originals)      the category of each pixel, int64 (height, width), of a network that
                                                           has an answer beside its segments: mIoU is then measured of this one
    model.reset_classifier(num_classes, things)            to learn other categories
    model.load_backbone(state_dict)                        to start from a classifier's weights
The model's function takes `num_classes` and `things`. `segments` gives things and stuff as one set of masks, for networks that
treat them alike.

A prediction is a `PanopticSegmentation`, in pixels of the image that was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from paperzoo.blocks.boxes import pad_images
from paperzoo.blocks.panoptic import PanopticMap, numbered
from paperzoo.catalog.cards import papers
from paperzoo.data.cityscapes_panoptic import open_panoptic_data
from paperzoo.data.images import to_image
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import detection
from paperzoo.tasks.classification import IMAGENET, Count, Positive
from paperzoo.tasks.detection import DetectionRecipe
from paperzoo.tasks.detection_samples import relabelled, to_network
from paperzoo.tasks.instance_segmentation import as_size
from paperzoo.tasks.panoptic_pictures import drawn_map
from paperzoo.tasks.segmentation import class_ious

VOID = 255
"""What `semantic` has where no segment is."""


@dataclass(frozen=True)
class PanopticSegmentation(PanopticMap):
    """The segments of one image: `ids` and `segments` as `PanopticMap` has them, and the name of each segment's category."""

    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config(detection.Config):
    """Detection's default recipe on panoptic data: without mosaics, with random crops."""

    model: str = "panoptic_fpn_resnet50"
    data: str = "panoptic_scenes"
    augment: Literal["none", "flip", "colour_flip"] = "flip"
    # before it is resized, every other image is cut to a random part of 384 to 600 pixels a side (as DETR learns)
    zoom: bool = False
    scale: tuple[Positive, Positive] = (1.0, 1.0)  # a random factor of `image_sizes`
    crop: tuple[Count, Count] | None = None  # then a random part of this height and width, padded where there is less


class PanopticSegmentationRecipe(DetectionRecipe):
    """The task's default recipe. A network with another way to learn overrides `step`, one that is called otherwise `outputs`."""

    config: Config
    monitor = ("PQ", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        self.config = config
        if config.scale[0] > config.scale[1]:
            raise PaperZooError(f"scale is {config.scale}; the smaller factor comes first")
        if not facts:
            mean, deviation = IMAGENET if config.normalise == "imagenet" else ([0.0] * 3, [1.0] * 3)
            data = self.open("train")
            facts = {"labels": list(data.labels), "things": sorted(data.things), "mean": mean, "deviation": deviation}
        super().__init__(config, runtime, facts)

    @property
    def things(self) -> list[int]:
        return self.facts["things"]

    def model_arguments(self) -> dict[str, Any]:
        arguments = super().model_arguments()
        if "things" in arguments:
            raise PaperZooError("model_arguments: things is not chosen; it follows from the data")
        return arguments if self.config.weights is not None else arguments | {"things": self.things}

    def build(self) -> nn.Module:
        """The network for the data's categories; of weights for others, the last layers are fresh."""
        model, classes = super().build(), len(self.facts["labels"])
        if list(model.things) != self.things:
            model.reset_classifier(classes, self.things)
        model.paperzoo["arguments"] |= {"num_classes": classes, "things": self.things}
        return model

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> Any:
        c = self.config
        if c.data != "panoptic_scenes":
            return open_panoptic_data(c.data, split)
        count = c.scenes if split == "train" else min(128, c.scenes)
        options = {"size": c.scene_size, "max_objects": c.scene_objects, "scale": c.scene_scale}
        return open_panoptic_data(c.data, split, count=count, **options)

    @cached_property
    def train_data(self) -> Dataset:
        return PreparedPanoptic(self.open("train"), self, train=True)

    @cached_property
    def test_data(self) -> Dataset:
        return PreparedPanoptic(self.open("test"), self, train=False)

    @cached_property
    def batches(self):
        c = self.config
        return self.runtime.batches(
            self.train_data, c.batch_size, workers=c.workers, collate=CollatePanoptic(c.multiple)
        )

    def batch(self) -> dict:
        batch = super().batch()
        canvas = batch["images"].shape[-2:]
        for target in batch["targets"]:
            if target["semantic"].shape != canvas:  # the batch was resized
                target["masks"] = as_size(target["masks"], canvas)
                target["semantic"] = nearest(target["semantic"], canvas)
        return batch

    # -- evaluation ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def measured(self, split: str = "test") -> tuple[Any, Tensor]:
        """Over the whole split: the panoptic quality, and pixel counts (true category, predicted one; the last: none)."""
        metric = panoptic_quality(len(self.facts["labels"]), self.things).to(self.runtime.device)
        counts = MulticlassConfusionMatrix(metric.num_categories + 1, ignore_index=VOID).to(self.runtime.device)
        data = self.test_data if split == "test" else PreparedPanoptic(self.open(split), self, train=False)
        collate = CollatePanoptic(self.config.multiple)
        for batch in self.runtime.loader(data, min(self.config.batch_size, 32), self.config.workers, collate):
            truth = [t["map"] for t in batch["truth"]]
            found, categories = self.segment(batch["images"], batch["sizes"], [t["size"] for t in batch["truth"]], True)
            metric.update(found, truth)
            for guess, true in zip(categories, truth, strict=True):
                guess = torch.where(guess < 0, metric.num_categories, guess)
                true = true.semantic.where(true.semantic >= 0, VOID)
                counts.update(guess.to(counts.device).flatten(), true.to(counts.device).flatten())
        return metric, counts.compute()

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """PQ, SQ and RQ over the whole split, of all categories, of things ("PQ_things") and of stuff; mIoU of the categories
        of pixels, void counted as wrong. All in [0, 1], averaged over the categories that are there or were found.
        """
        metric, counts = self.measured(split)
        return metric.compute() | {"mIoU": float(class_ious(counts)[:-1].nanmean())}

    # -- use -----------------------------------------------------------------------------------------------------

    def outputs(self, images: Tensor, sizes: Tensor) -> Any:
        """The deployed network's raw outputs for a batch."""
        return self.deployed.eval()(images)

    def segment(
        self, images: Tensor, sizes: Tensor, originals: Sequence[Tensor], semantic: bool = False
    ) -> tuple[list[PanopticMap], list[Tensor]]:
        """A batch of network inputs to maps in pixels of the original images, on the CPU; with `semantic` also the category
        of each pixel, -1 for none."""
        outputs, model = self.outputs(images, sizes), self.deployed
        arguments = outputs, sizes, tuple(images.shape[-2:]), [tuple(int(side) for side in size) for size in originals]
        found = [PanopticMap(m.ids.cpu(), m.segments) for m in model.postprocess(*arguments)]
        if not semantic:
            return found, []
        own = getattr(model, "semantic", None)
        return found, [m.semantic for m in found] if own is None else own(*arguments)

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[PanopticSegmentation]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to their segments."""
        labels, results = self.facts["labels"], []
        for start in range(0, len(inputs), 8):
            raw = [to_image(value) for value in inputs[start : start + 8]]
            images = [to_network(image, self.config, self.facts) for image in raw]
            sizes = torch.tensor([x.shape[1:] for x in images], device=self.runtime.device)
            batch = pad_images(images, self.config.multiple).to(self.runtime.device)
            for found in self.segment(batch, sizes, [torch.tensor(image.shape[1:]) for image in raw])[0]:
                names = tuple(labels[s.category] for s in found.segments)
                results.append(PanopticSegmentation(found.ids, found.segments, names))
        return results

    def same_answers(self, expected: Any, found: Any) -> Tensor:
        """The category of each pixel."""
        side = self.config.image_sizes[-1]
        count = len(tree_leaves(expected)[0])
        arguments = torch.full((count, 2), side), self.example()[0].shape[-2:], [(side, side)] * count
        maps = [self.deployed.postprocess(outputs, *arguments) for outputs in (expected, found)]
        return torch.stack([a.semantic == b.semantic for a, b in zip(*maps, strict=True)])

    def draw(self, value: Any, result: PanopticMap) -> Image.Image:
        return drawn_map(to_image(value), result, self.facts["labels"])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with what was found, and with what is there; the quality of each category."""
        from paperzoo.engine.pictures import new_figure, tile, to_picture

        data, labels = self.open("test"), self.facts["labels"]
        items = [data[i] for i in range(0, len(data), max(1, len(data) // 12))[:12]]
        numbers = relabelled(data, labels)
        results = self.predict([item["image"] for item in items])
        pictures = []
        for item, result in zip(items, results, strict=True):
            pictures += [
                drawn_map(item["image"], renamed(item["map"], numbers), labels),
                self.draw(item["image"], result),
            ]
        figure, axes = new_figure(6, 1.2 + 0.25 * len(labels))
        each = self.measured()[0].by_category()
        for name, colour, height in (("SQ", "#93c5fd", 0.8), ("RQ", "#3b82f6", 0.5), ("PQ", "#1e3a8a", 0.25)):
            axes.barh(labels, each[name].nan_to_num().tolist(), height, color=colour, label=name)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.legend(fontsize=8)
        return {"There, found": tile(pictures, 6), "By category": to_picture(figure)}


def panoptic_quality(num_categories: int, things: Sequence[int]) -> Any:
    """The field's metric, of the work that introduced it: a torchmetrics `Metric` of panoptic maps."""
    return papers()["panoptic_quality"].module("technique").PanopticQuality(num_categories, things)


def segments(target: dict[str, Tensor], things: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An image's things, and each other category that it has, as one set.

    Args:
        target: of a batch (see the module's docstring).
        things: the countable categories.

    Returns:
        masks bool (S, H, W), things first; labels int64 (S,).
    """
    present, labels = target["semantic"].unique(), target["labels"]
    countable = torch.tensor([*things, VOID], device=present.device)
    stuff, mine = present[~torch.isin(present, countable)], torch.isin(labels, countable)
    masks = torch.cat([target["masks"][mine], target["semantic"] == stuff[:, None, None]])
    return masks, torch.cat([labels[mine], stuff])


# -- samples -----------------------------------------------------------------------------------------------------------


class PreparedPanoptic(Dataset):
    """A panoptic data set as the network sees it: random transforms, sizes and crops to learn from, or none."""

    def __init__(self, data: Any, recipe: Any, train: bool) -> None:
        self.data, self.config, self.facts, self.train = data, recipe.config, recipe.facts, train
        self.numbers = relabelled(data, recipe.facts["labels"])
        flip, colour = v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()
        self.transform = v2.Compose([colour, flip] if self.config.augment == "colour_flip" else [flip])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        item, c = self.data[index], self.config
        image, panoptic = item["image"], renamed(item["map"], self.numbers)
        if not self.train:
            truth = {"map": panoptic, "size": torch.tensor(image.shape[1:])}
            return {"image": to_network(image, c, self.facts), "truth": truth}
        rows = numbered(panoptic)[1]  # 0: in no segment
        if c.augment != "none":
            pair = self.transform({"image": tv_tensors.Image(image), "rows": tv_tensors.Mask(rows)})
            image, rows = pair["image"].as_subclass(Tensor), pair["rows"].as_subclass(Tensor)
        if c.zoom and float(torch.rand(())) < 0.5:
            image, rows = zoomed(image, rows)
        size = c.image_sizes[int(torch.randint(len(c.image_sizes), ()))]
        if c.scale != (1.0, 1.0):
            size = max(1, round(size * float(torch.empty(()).uniform_(*c.scale))))
        image = to_network(image, c, self.facts, size)
        rows = nearest(rows, image.shape[1:])
        if c.crop is not None:
            image, rows = cropped(image, rows, c.crop)
        return {"image": image} | targets_of(rows, panoptic)


def targets_of(rows: Tensor, panoptic: PanopticMap) -> dict[str, Tensor]:
    """What a network learns of an image.

    Args:
        rows: int64 (H, W), each pixel's segment, counted from 1 in the order of `panoptic`; 0 for none.
        panoptic: whose segments these are, at whatever size.
    """
    categories = torch.tensor([VOID, *(s.category for s in panoptic.segments)])
    single = torch.tensor([False, *(s.thing and not s.crowd for s in panoptic.segments)])
    present = rows.unique()
    objects = present[single[present]]
    masks = rows == objects[:, None, None]
    boxes = masks_to_boxes(masks) if len(objects) else torch.zeros(0, 4)
    boxes = boxes.float() + torch.tensor([0.0, 0.0, 1.0, 1.0])  # they end behind the last pixel
    return {"boxes": boxes, "labels": categories[objects], "masks": masks, "semantic": categories[rows]}


class CollatePanoptic:
    """Samples of `PreparedPanoptic` to a batch, as the module's docstring says."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple

    def __call__(self, samples: list[dict]) -> dict:
        images = [s["image"] for s in samples]
        batch = {"images": pad_images(images, self.multiple), "sizes": torch.tensor([x.shape[1:] for x in images])}
        if "truth" in samples[0]:
            return batch | {"truth": [s["truth"] for s in samples]}
        height, width = batch["images"].shape[-2:]
        targets = []
        for sample in samples:
            missing = (0, width - sample["image"].shape[2], 0, height - sample["image"].shape[1])
            padded = {
                "masks": F.pad(sample["masks"], missing),
                "semantic": F.pad(sample["semantic"], missing, value=VOID),
            }
            targets.append({"boxes": sample["boxes"], "labels": sample["labels"]} | padded)
        return batch | {"targets": targets}


def renamed(panoptic: PanopticMap, numbers: Sequence[int]) -> PanopticMap:
    """The map with other numbers for its categories."""
    if list(numbers) == list(range(len(numbers))):
        return panoptic
    return PanopticMap(panoptic.ids, tuple(replace(s, category=numbers[s.category]) for s in panoptic.segments))


def nearest(rows: Tensor, size: Sequence[int]) -> Tensor:
    """Whole numbers below 2^24 (H, W) at another size, by nearest neighbours."""
    if tuple(rows.shape) == tuple(size):
        return rows
    return F.interpolate(rows[None, None].float(), tuple(size), mode="nearest")[0, 0].to(rows.dtype)


def zoomed(image: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A random part of an image: its shorter side becomes 400, 500 or 600 pixels, then 384 to 600 pixels a side are left."""
    side = (400, 500, 600)[int(torch.randint(3, ()))]
    factor = side / min(image.shape[1:])
    size = [max(1, round(s * factor)) for s in image.shape[1:]]
    image, rows = v2.functional.resize(image, size, antialias=True), nearest(rows, size)
    height, width = (int(torch.randint(min(384, s), min(600, s) + 1, ())) for s in size)
    top, left = (int(torch.randint(s - kept + 1, ())) for s, kept in zip(size, (height, width), strict=True))
    place = slice(top, top + height), slice(left, left + width)
    return image[:, *place], rows[place]


def cropped(image: Tensor, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A random part of an image and its rows, of this height and width; zeros to the right and below where the image is smaller."""
    missing = [max(0, wanted - s) for wanted, s in zip(size, rows.shape, strict=True)]
    if any(missing):
        padding = (0, missing[1], 0, missing[0])
        image, rows = F.pad(image, padding), F.pad(rows, padding)
    top, left = (int(torch.randint(s - wanted + 1, ())) for wanted, s in zip(size, rows.shape, strict=True))
    place = slice(top, top + size[0]), slice(left, left + size[1])
    return image[:, *place], rows[place]
