"""Instance segmentation: objects with classes, scores, boxes, and the pixels of each.

Everything of `paperzoo.tasks.detection` holds, and besides:

A batch's targets, and what is true, have
    masks   bool (N, H, W): in pixels of the canvas, and of the original image

A network's `postprocess` gives for each image
    masks   float (N, h, w): probabilities in [0, 1] that a place belongs to the object, at any resolution, and
    frames  float (N, 4), if each mask covers a box of its own: the box, in pixels of the canvas. Without it every mask covers
            the canvas: what is stretched over one image's objects, and over the empty margin beside a small image.
A mask is resampled bilinearly to the pixels of the original image and is true where it reaches `mask_threshold`.

A prediction is an `InstanceSegmentation`, in pixels of the image that was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.blocks.boxes import pad_images
from paperzoo.data.coco import DetectionData
from paperzoo.data.images import to_image
from paperzoo.data.instance_masks import open_instances
from paperzoo.tasks import detection
from paperzoo.tasks.classification import Fraction
from paperzoo.tasks.detection import COLOURS, SCENES, Detection, DetectionRecipe, coco_numbers
from paperzoo.tasks.detection_samples import Collate, augmentation, relabelled, scale, to_network

CHUNK = 1 << 25  # pixels of masks that are resampled together


@dataclass(frozen=True)
class InstanceSegmentation(Detection):
    """The objects in one image, best first; `masks` is bool (N, H, W), in pixels of the image."""

    masks: Tensor = field(repr=False)

    def above(self, score: float) -> InstanceSegmentation:
        """Only the objects with at least this score."""
        n = sum(s >= score for s in self.scores)
        return InstanceSegmentation(self.boxes[:n], self.labels[:n], self.scores[:n], self.indices[:n], self.masks[:n])


@dataclass(frozen=True)
class Config(detection.Config):
    """Detection's default recipe; a network's losses have a part for masks."""

    model: str = "mask_rcnn_resnet50_fpn"
    augment: Literal["none", "colour", "flip", "ssd"] = "flip"
    mask_threshold: Fraction = 0.5


class InstanceSegmentationRecipe(DetectionRecipe):
    """The task's default recipe. A network with another way to learn overrides `step`, one that is called otherwise `outputs`."""

    config: Config
    monitor = ("mask_AP", "max")

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> DetectionData:
        c = self.config
        if c.data not in SCENES:
            return open_instances(c.data, split)
        count = c.scenes if split == "train" else min(128, c.scenes)
        options = {"size": c.scene_size, "max_objects": c.scene_objects, "scale": c.scene_scale}
        return open_instances(c.data, split, count=count, **options)

    @cached_property
    def train_data(self) -> Dataset:
        return PreparedInstances(self.open("train"), self, train=True)

    @cached_property
    def test_data(self) -> Dataset:
        return PreparedInstances(self.open("test"), self, train=False)

    @cached_property
    def batches(self):
        c = self.config
        collate = CollateInstances(c.multiple)
        return self.runtime.batches(self.train_data, c.batch_size, workers=c.workers, collate=collate)

    def batch(self) -> dict:
        batch = super().batch()
        canvas = batch["images"].shape[-2:]
        for target in batch["targets"]:
            if target["masks"].shape[-2:] != canvas:  # the batch was resized
                target["masks"] = as_size(target["masks"], canvas)
        return batch

    # -- evaluation ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """COCO's twelve numbers over the whole split, of masks ("mask_AP", "mask_AP50", …) and of boxes ("box_AP", …).

        By pycocotools, through torchmetrics; those that do not exist are left out. AP is the mean over IoU 0.5 to 0.95 and
        classes.
        """
        metric = self.metric()
        data = self.test_data if split == "test" else PreparedInstances(self.open(split), self, train=False)
        collate = CollateInstances(self.config.multiple)
        for batch in self.runtime.loader(data, min(self.config.batch_size, 32), self.config.workers, collate):
            found = self.detect(batch["images"], batch["sizes"], [t["size"] for t in batch["truth"]])
            metric.update(found, batch["truth"])
        computed, numbers = metric.compute(), {}
        for kind, name in (("segm", "mask"), ("bbox", "box")):
            of_kind = {k.removeprefix(f"{kind}_"): v for k, v in computed.items() if k.startswith(kind)}
            numbers |= {f"{name}_{k.removeprefix('m')}": v for k, v in coco_numbers(of_kind).items()}
        return numbers

    def metric(self) -> Any:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(box_format="xyxy", iou_type=("bbox", "segm"), backend="pycocotools")
        metric.warn_on_many_detections = False  # COCO's protocol itself takes the best 100
        return metric.to(self.runtime.device)

    # -- use -----------------------------------------------------------------------------------------------------

    def outputs(self, images: Tensor, sizes: Tensor) -> Any:
        """The deployed network's raw outputs for a batch."""
        return self.deployed.eval()(images)

    def detect(self, images: Tensor, sizes: Tensor, originals: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """A batch of network inputs to boxes, scores, labels and bool masks in pixels of the original images."""
        canvas = tuple(images.shape[-2:])
        found = self.deployed.postprocess(self.outputs(images, sizes), sizes, canvas)
        for objects, size, original in zip(found, sizes, originals, strict=True):
            height, width = (int(side) for side in original)
            factor = (torch.as_tensor(original, device=sizes.device) / size).flip(0).repeat(2)
            objects["boxes"] = objects["boxes"] * factor.to(objects["boxes"].dtype)
            whole = torch.tensor([0.0, 0.0, canvas[1], canvas[0]], device=sizes.device)
            frames = objects.pop("frames", None)
            stretched = (whole.expand(len(objects["masks"]), 4) if frames is None else frames) * factor
            threshold, extend = self.config.mask_threshold, frames is None
            objects["masks"] = place_masks(objects["masks"], stretched, (height, width), threshold, extend)
        return found

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[InstanceSegmentation]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to the objects in them."""
        results: list[InstanceSegmentation] = []
        for start in range(0, len(inputs), 8):
            raw = [to_image(value) for value in inputs[start : start + 8]]
            images = [to_network(image, self.config, self.facts) for image in raw]
            sizes = torch.tensor([x.shape[1:] for x in images], device=self.runtime.device)
            batch = pad_images(images, self.config.multiple).to(self.runtime.device)
            found = self.detect(batch, sizes, [torch.tensor(image.shape[1:]) for image in raw])
            results += [answer(objects, self.facts["labels"]) for objects in found]
        return results

    def draw(self, value: Any, result: InstanceSegmentation) -> Image.Image:
        shown = result.above(self.config.show_above)
        captions = [f"{label} {score:.0%}" for label, score in zip(shown.labels, shown.scores, strict=True)]
        return overlaid(to_image(value), shown.masks, captions)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with what was found, and with what is there."""
        from paperzoo.engine.pictures import tile

        data = self.open("test")
        items = [data[i] for i in range(0, len(data), max(1, len(data) // 16))[:16]]
        numbers = relabelled(data, self.facts["labels"])
        results = self.predict([item["image"] for item in items])
        found = [self.draw(item["image"], result) for item, result in zip(items, results, strict=True)]
        there = []
        for item in items:
            names = [self.facts["labels"][numbers[k]] for k in item["labels"].tolist()]
            there.append(overlaid(item["image"], item["masks"], names))
        return {"Found": tile(found, 4), "There": tile(there, 4)}


# -- samples -----------------------------------------------------------------------------------------------------------


class PreparedInstances(Dataset):
    """An instance data set as the network sees it: random transforms and a random size to learn from, or neither."""

    def __init__(self, data: DetectionData, recipe: Any, train: bool) -> None:
        self.data, self.config, self.facts, self.train = data, recipe.config, recipe.facts, train
        self.transform = v2.Compose(augmentation(self.config.augment)) if train else None
        self.labels = torch.tensor(relabelled(data, recipe.facts["labels"]))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        item = self.data[index]
        labels = self.labels[item["labels"]]
        if not self.train:
            truth = {"boxes": item["boxes"], "labels": labels, "iscrowd": item["crowd"].long(), "area": item["area"]}
            truth |= {"masks": item["masks"], "size": torch.tensor(item["image"].shape[1:])}
            return {"image": to_network(item["image"], self.config, self.facts), "truth": truth}
        sample = self.transformed(item | {"labels": labels})
        choice = int(torch.randint(len(self.config.image_sizes), ()))
        image = to_network(sample["image"], self.config, self.facts, self.config.image_sizes[choice])
        boxes = sample["boxes"] * scale(sample["image"], image)
        masks = as_size(sample["masks"], image.shape[1:])
        return {"image": image, "boxes": boxes, "labels": sample["labels"], "masks": masks}

    def transformed(self, item: dict) -> dict[str, Tensor]:
        """The random transforms of the objects that are no crowds; of those that are left, none is smaller than a pixel."""
        boxes, solid = item["boxes"], ~item["crowd"]
        if self.config.augment == "none":  # the same without the transforms' overhead, which small pictures feel
            solid = solid & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
            return {"image": item["image"]} | {key: item[key][solid] for key in ("boxes", "labels", "masks")}
        canvas = tuple(item["image"].shape[1:])
        sample = {
            "image": tv_tensors.Image(item["image"]),
            "boxes": tv_tensors.BoundingBoxes(boxes[solid], format="XYXY", canvas_size=canvas),
            "labels": item["labels"][solid],
            "masks": tv_tensors.Mask(item["masks"][solid]),
        }
        sample = {key: value.as_subclass(Tensor) for key, value in self.transform(sample).items()}
        return sample | {"boxes": sample["boxes"].float(), "masks": sample["masks"].bool()}


class CollateInstances(Collate):
    """Detection's batches with masks, which are padded like the images."""

    def __call__(self, samples: list[dict]) -> dict:
        batch = super().__call__(samples)
        if "targets" in batch:
            height, width = batch["images"].shape[-2:]
            for target, sample in zip(batch["targets"], samples, strict=True):
                rows, columns = sample["masks"].shape[-2:]
                target["masks"] = F.pad(sample["masks"], (0, width - columns, 0, height - rows))
        return batch


def as_size(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Bool masks (N, H, W) at another size, by nearest neighbours."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    if not len(masks):
        return masks.new_zeros(0, *size)
    return F.interpolate(masks[:, None].to(torch.uint8), tuple(size), mode="nearest")[:, 0].bool()


# -- masks at the image's resolution -----------------------------------------------------------------------------------


def place_masks(
    masks: Tensor, frames: Tensor, size: tuple[int, int], threshold: float = 0.5, extend: bool = False
) -> Tensor:
    """Where masks that cover boxes reach a threshold: bool (N, H, W), a few objects at a time.

    Args as `resample_masks`.
    """
    rows = max(1, CHUNK // max(1, size[0] * size[1]))
    parts = [
        resample_masks(masks[i : i + rows], frames[i : i + rows], size, extend) >= threshold
        for i in range(0, len(masks), rows)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, *size, dtype=torch.bool, device=masks.device)


def resample_masks(masks: Tensor, frames: Tensor, size: tuple[int, int], extend: bool = False) -> Tensor:
    """Masks that cover boxes, bilinearly sampled at the pixels of an image: float32 (N, H, W), 0 outside of the boxes.

    The bilinear weight of a cell is a tent in each direction, so that all pixels of an object are two matrix products.

    Args:
        masks: (N, h, w), the cells of each box.
        frames: (N, 4), the boxes in pixels of the image.
        size: H, W.
        extend: the outermost cells reach beyond their middles, to the border of the box and further; else they fade there.
    """
    frames = frames.float()

    def tents(low: Tensor, high: Tensor, cells: int, pixels: int) -> Tensor:
        """(N, pixels, cells): the weight of each cell at each pixel's middle."""
        at = torch.arange(pixels, device=low.device) + 0.5
        place = (at - low[:, None]) * (cells / (high - low).clamp(min=1e-6))[:, None] - 0.5
        if extend:
            place = place.clamp(0, cells - 1)
        return (1 - (place[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)

    (height, width), (rows, columns) = size, masks.shape[-2:]
    down = tents(frames[:, 1], frames[:, 3], rows, height)
    across = tents(frames[:, 0], frames[:, 2], columns, width)
    return down @ masks.float() @ across.transpose(1, 2)


def answer(objects: dict[str, Tensor], labels: Sequence[str]) -> InstanceSegmentation:
    plain = detection.answer(objects, labels)
    return InstanceSegmentation(plain.boxes, plain.labels, plain.scores, plain.indices, objects["masks"].cpu())


# -- pictures ----------------------------------------------------------------------------------------------------------


def overlaid(image: Tensor, masks: Tensor, captions: Sequence[str], least: int = 240) -> Image.Image:
    """A uint8 image (3, H, W) with each object's pixels in a colour of its own, outlined, and a legend below.

    Args:
        masks: bool (N, H, W), best first: the best lie on top.
        captions: one for each mask.
        least: smaller images are enlarged to about so many pixels.
    """
    factor = max(1, -(-least // max(image.shape[1:])))
    pixels = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2).float()
    colours = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS], dtype=torch.float32)
    for i in reversed(range(len(masks))):
        mask = masks[i].cpu().repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        colour = colours[i % len(COLOURS)][:, None, None]
        inner = F.max_pool2d((~mask).float()[None, None], 3, 1, 1)[0, 0] == 0  # the neighbours belong to it as well
        pixels = torch.where(mask, 0.45 * pixels + 0.55 * colour, pixels)
        pixels = torch.where(mask & ~inner, colour, pixels)
    picture = Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy())
    return with_legend(picture, captions, [COLOURS[i % len(COLOURS)] for i in range(len(captions))])


def with_legend(picture: Image.Image, captions: Sequence[str], colours: Sequence[str]) -> Image.Image:
    """The picture with lines below it that say which colour is what; as many lines for each picture of a size as it needs."""
    pen = ImageDraw.Draw(picture)
    places, x, y = [], 2, 0
    for caption in captions:
        wide = 16 + int(pen.textlength(caption))
        if x > 2 and x + wide > picture.width:
            x, y = 2, y + 14
        places.append((x, y))
        x += wide
    framed = Image.new("RGB", (picture.width, picture.height + y + 14), "white")
    framed.paste(picture, (0, 0))
    pen = ImageDraw.Draw(framed)
    for (left, down), caption, colour in zip(places, captions, colours, strict=True):
        top = picture.height + down
        pen.rectangle((left, top + 3, left + 7, top + 10), fill=colour)
        pen.text((left + 10, top + 1), caption, fill="black")
    return framed
