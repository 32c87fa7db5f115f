"""Object detection's samples: from a data set's items to batches, with resizing, random transforms, mosaic and mixup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.blocks.boxes import pad_images
from paperzoo.blocks.mosaic import mixup, mosaic, random_affine, without_slivers
from paperzoo.data.coco import DetectionData
from paperzoo.errors import DataError

Augment = Literal["none", "colour", "flip", "ssd", "mosaic", "mosaic_mixup"]


def augmentation(kind: str) -> list[nn.Module]:
    """The random transforms of an augmentation's name, on a dict of tv_tensors; of a mosaic's, what its plain steps have."""
    flip = v2.RandomHorizontalFlip()
    # the patched-in border of RandomZoomOut is grey, ImageNet's mean
    ssd = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=(123, 116, 103)), v2.RandomIoUCrop(), flip]
    kinds = {"none": [], "colour": [v2.RandomPhotometricDistort()], "flip": [flip], "ssd": ssd}
    kinds |= {"mosaic": [flip], "mosaic_mixup": [flip]}
    return [*kinds[kind], v2.SanitizeBoundingBoxes(min_size=1)]


def resized(image: Tensor, shape: str, size: int, longest: int) -> Tensor:
    """A float image (3, H, W), bilinearly resized as torchvision's detectors do it.

    Args:
        shape: "shortest": by one factor, so that the shortest side becomes `size` but no side longer than `longest`;
            "square": both sides to `size`.
    """
    height, width = image.shape[1:]
    if shape == "square":
        return image if height == width == size else F.interpolate(image[None], (size, size), mode="bilinear")[0]
    factor = min(size / min(height, width), longest / max(height, width))
    if factor == 1.0:
        return image
    return F.interpolate(image[None], scale_factor=factor, mode="bilinear", recompute_scale_factor=True)[0]


class Prepared(Dataset):
    """A detection data set as the network sees it: random transforms and a random size to learn from, or neither."""

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
            image = to_network(item["image"], self.config, self.facts)
            return {"image": image, "truth": truth | {"size": torch.tensor(item["image"].shape[1:])}}
        picture, boxes, labels = self.transformed(item["image"], item["boxes"], labels, ~item["crowd"])
        choice = int(torch.randint(len(self.config.image_sizes), ()))
        image = to_network(picture, self.config, self.facts, self.config.image_sizes[choice])
        return {"image": image, "boxes": boxes * scale(picture, image), "labels": labels}

    def transformed(
        self, picture: Tensor, boxes: Tensor, labels: Tensor, solid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The random transforms of the objects that are no crowds; of those that are left, none is smaller than a pixel."""
        if self.config.augment == "none":  # the same without the transforms' overhead, which small pictures feel
            solid = solid & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
            return picture, boxes[solid], labels[solid]
        sample = {
            "image": tv_tensors.Image(picture),
            "boxes": tv_tensors.BoundingBoxes(boxes[solid], format="XYXY", canvas_size=tuple(picture.shape[1:])),
            "labels": labels[solid],
        }
        sample = self.transform(sample)
        return sample["image"].as_subclass(Tensor), sample["boxes"].as_subclass(Tensor).float(), sample["labels"]


class Mosaics(Dataset):
    """A detection data set as mosaics: square images of the last of `image_sizes` (`paperzoo.blocks.mosaic`).

    Args:
        plain: the data set that they are made of, for learning.
        share: so many of the samples are mosaics, the others are `plain`'s.
        mixed: and so many of the mosaics are mixed with another image.
        scale: from which a mosaic's random enlargement is drawn.
    """

    def __init__(self, plain: Prepared, share: float, mixed: float, scale: tuple[float, float]) -> None:
        self.plain, self.config, self.size = plain, plain.config, plain.config.image_sizes[-1]
        self.share, self.mixed, self.scale = share, mixed, scale
        # YOLOX's released code shifts hue, saturation and value by up to 5, 30 and 30 of OpenCV's units
        self.after = v2.Compose([v2.ColorJitter(30 / 255, 0, 30 / 255, 5 / 180), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.plain)

    def sample(self, index: int) -> dict[str, Tensor]:
        item = self.plain.data[index]
        solid = ~item["crowd"]
        labels = self.plain.labels[item["labels"]][solid]
        return {"image": item["image"], "boxes": item["boxes"][solid], "labels": labels}

    def another(self) -> dict[str, Tensor]:
        return self.sample(int(torch.randint(len(self), ())))

    def __getitem__(self, index: int) -> dict:
        if float(torch.rand(())) >= self.share:
            return self.plain[index]
        four = [self.sample(index), *(self.another() for _ in range(3))]
        made = random_affine(mosaic(four, self.size), self.size, scale=self.scale)
        made = without_slivers(made)
        if len(made["boxes"]) and float(torch.rand(())) < self.mixed:
            made = without_slivers(mixup(made, self.another()))
        canvas = tuple(made["image"].shape[1:])
        boxes = tv_tensors.BoundingBoxes(made["boxes"], format="XYXY", canvas_size=canvas)
        made = self.after({"image": tv_tensors.Image(made["image"]), "boxes": boxes, "labels": made["labels"]})
        image = to_network(made["image"].as_subclass(Tensor), self.config, self.plain.facts)
        return {"image": image, "boxes": made["boxes"].as_subclass(Tensor).float(), "labels": made["labels"]}


def to_network(image: Tensor, config: Any, facts: dict, size: int | None = None) -> Tensor:
    """A uint8 image (3, H, W), normalised and resized: float32 (3, h, w)."""
    mean, deviation = (torch.tensor(facts[key])[:, None, None] for key in ("mean", "deviation"))
    image = (image.float() / 255 - mean) / deviation
    return resized(image, config.resize, config.image_sizes[-1] if size is None else size, config.longest_side)


def scale(before: Tensor, after: Tensor) -> Tensor:
    """What boxes are multiplied with, (4,), when an image (3, H, W) becomes one (3, h, w)."""
    return torch.tensor([after.shape[2] / before.shape[2], after.shape[1] / before.shape[1]]).repeat(2)


def relabelled(data: DetectionData, labels: Sequence[str]) -> list[int]:
    """For each of the data's classes, its number among those that were learned.

    Raises:
        DataError: if the data has a class that was not learned.
    """
    for label in data.labels:
        if label not in labels:
            known = ", ".join(labels[:5])
            raise DataError(
                data.path(0),
                f"the data has the class '{label}', which is not among the {len(labels)} learned: {known} …",
            )
    return [labels.index(label) for label in data.labels]


class Collate:
    """Samples of `Prepared` to a batch, as the module's docstring says."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple

    def __call__(self, samples: list[dict]) -> dict:
        images = [s["image"] for s in samples]
        batch = {"images": pad_images(images, self.multiple), "sizes": torch.tensor([x.shape[1:] for x in images])}
        if "truth" in samples[0]:
            return batch | {"truth": [s["truth"] for s in samples]}
        return batch | {"targets": [{"boxes": s["boxes"], "labels": s["labels"]} for s in samples]}


def at_side(batch: dict, side: int) -> dict:
    """The images of a batch with their longer side `side`, rounded to 32 pixels, and what is in pixels with them."""
    height, width = batch["images"].shape[-2:]
    shape = [max(32, round(s * side / max(height, width) / 32) * 32) for s in (height, width)]
    factor = batch["images"].new_tensor([shape[1] / width, shape[0] / height]).repeat(2)
    images = F.interpolate(batch["images"], shape, mode="bilinear")
    sizes = (batch["sizes"] * factor[:2].flip(0).to(batch["sizes"].device)).round().long()
    targets = [t | {"boxes": t["boxes"] * factor} for t in batch["targets"]]
    return batch | {"images": images, "sizes": sizes, "targets": targets}
