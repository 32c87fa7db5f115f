"""Grad-CAM at work: a classifier that never sees a box learns, and its maps are compared with where the object is.

On the embedded scenes (one handwritten digit somewhere over a photograph) boxes are known, so localisation is measured. On the
user's own class folders the same recipe trains, explains, and reports accuracy alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from paperzoo.data.images import Images, to_image
from paperzoo.data.scenes import LABELS, digit_scenes
from paperzoo.papers.interpretability.grad_cam.technique import GradCAM, GuidedGradCAM, find_layer, overlay, relief
from paperzoo.tasks import classification
from paperzoo.tasks.classification import Classification, ClassificationRecipe, Count, captioned

SCENES = "scenes"


@dataclass(frozen=True)
class Config(classification.Config):
    """A classifier's settings, and what is explained."""

    data: str = SCENES  # the embedded scenes, or a folder of class folders
    layer: str | None = None  # dotted name of the explained layer; None: the last one with a height and a width
    train_scenes: Count = 2048
    test_scenes: Count = 256


@dataclass(frozen=True)
class Explanation(Classification):
    """A classification with its reason: `map` is float32 (image_size, image_size) in [0, 1], of the image as the network saw it.

    `box` is the smallest around the map's largest part above 15% of its maximum (sec. 4.1): x1 y1 x2 y2 as parts of the side.
    """

    map: Tensor
    box: tuple[float, float, float, float]


class Scenes(Dataset):
    """Scenes with one digit: (input, label, box), the box in parts of the side."""

    def __init__(self, scenes: list[dict[str, Tensor]], transform: Any) -> None:
        self.scenes, self.transform = scenes, transform

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        scene = self.scenes[i]
        return self.transform(scene["image"]), int(scene["labels"][0]), scene["boxes"][0] / scene["image"].shape[-1]


class GradCAMRecipe(ClassificationRecipe):
    """The classification recipe whose answers come with a map, and whose evaluation measures where the maps point."""

    config: Config
    monitor = ("accuracy", "max")

    def open(self, split: str) -> Images:
        return scene_images(self.config, split) if self.config.data == SCENES else super().open(split)

    @property
    def layer(self) -> str:
        """The name of the explained layer."""
        return self.config.layer or find_layer(self.deployed, self.example()[0][:1].to(self.runtime.device))

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Accuracy, cross-entropy and, on scenes, how well the maps locate the object (boxes were never trained on).

        energy_inside: the share of the true class's map inside the box, averaged over images (a flat map has `box_area`).
        pointing_game: how often the highest place of the true class's map lies in the box.
        localisation_error: the paper's (sec. 4.1): the class is wrong, or the box around the map has an IoU below 0.5.
        """
        metrics = super().evaluate(split)
        if self.config.data != SCENES:
            return metrics
        size = self.config.image_size
        data = Scenes(scenes(self.config, split), v2.Compose(self.view(size) + self.to_input()))
        cam = GradCAM(self.deployed, self.layer)
        names = ("energy_inside", "pointing_game", "localisation_error", "box_area")
        sums = torch.zeros(len(names) + 1)
        for images, labels, boxes in self.runtime.loader(data, min(256, self.config.batch_size * 2)):
            maps, boxes = cam(images, labels).cpu(), boxes.cpu()
            inside = box_masks(boxes, size)
            energy = (maps * inside).sum((1, 2)) / maps.sum((1, 2)).clamp_min(1e-12)
            hit = inside.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))[:, 0]
            with torch.inference_mode():
                guess = self.deployed(images).argmax(1)
            located = [iou(box_of(m), b) for m, b in zip(cam(images, guess).cpu(), boxes.tolist(), strict=True)]
            wrong = (guess != labels).cpu() | (torch.tensor(located) < 0.5)
            rows = torch.stack(
                [energy, hit.float(), wrong.float(), inside.float().mean((1, 2)), torch.ones(len(maps))], 1
            )
            sums += rows.sum(0)
        total = self.runtime.mean(sums.to(self.runtime.device)).cpu()
        return metrics | dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True))

    # -- use -------------------------------------------------------------------------------------------------------------

    def predict(self, inputs: list) -> list[Explanation]:
        """Paths, PIL images or arrays to their classes, each with the map of its most probable class."""
        transform = v2.Compose(self.view(self.config.image_size) + self.to_input())
        cam = GradCAM(self.deployed, self.layer)
        results: list[Explanation] = []
        for value, answer in zip(inputs, super().predict(inputs), strict=True):
            image = transform(to_image(value))[None].to(self.runtime.device)
            found = cam(image, answer.index)[0].cpu()
            results.append(Explanation(**asdict(answer), map=found, box=box_of(found)))
        return results

    def seen(self, value: Any) -> Tensor:
        """An image as the network sees it, before normalisation: uint8 (3, S, S)."""
        return v2.Compose(self.view(self.config.image_size))(to_image(value))

    def draw(self, value: Any, result: Explanation) -> Image.Image:
        heat = overlay(self.seen(value), result.map)
        pixels = v2.functional.pil_to_tensor(heat)
        return captioned(pixels, f"{result.label} {result.probability:.0%}", max(96, self.config.image_size))

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with their maps, Guided Grad-CAM beside them, and the map of the runner-up class."""
        from paperzoo.engine.pictures import tile

        raw = self.test_data.with_transform(None)
        images = [raw[i][0] for i in range(min(8, len(raw)))]
        guided = GuidedGradCAM(self.deployed, self.layer)
        transform = v2.Compose(self.view(self.config.image_size) + self.to_input())
        cam, side = GradCAM(self.deployed, self.layer), max(96, self.config.image_size)
        rows: list[list[Image.Image]] = [[], [], [], []]
        for image, result in zip(images, self.predict(images), strict=True):
            x = transform(image)[None].to(self.runtime.device)
            second = sorted(result.probabilities, key=result.probabilities.get)[-2:][0]
            other = cam(x, self.facts["labels"].index(second))[0].cpu()
            rows[0].append(captioned(self.seen(image), "image", side))
            rows[1].append(self.draw(image, result))
            rows[2].append(captioned(v2.functional.pil_to_tensor(relief(guided(x, result.index)[0])), "guided", side))
            rows[3].append(captioned(v2.functional.pil_to_tensor(overlay(self.seen(image), other)), f"{second}?", side))
        sheet = tile([picture for row in rows for picture in row], len(images))
        return {"Grad-CAM": sheet} | super().figures()


# -- scenes and boxes ----------------------------------------------------------------------------------------------------


def scenes(config: Config, split: str) -> list[dict[str, Tensor]]:
    """Scenes with exactly one digit, at the network's size; chalk on a darkened photograph, to be learned in seconds."""
    count = config.train_scenes if split == "train" else config.test_scenes
    found = digit_scenes(count, size=config.image_size, max_objects=1, split=split, scale=(0.4, 0.6))
    return [scene | {"image": torch.where(scene["masks"], 230, scene["image"] // 2)} for scene in found]


def scene_images(config: Config, split: str) -> Images:
    """The same as labelled images."""
    found = scenes(config, split)
    pixels = torch.stack([scene["image"] for scene in found])
    return Images(LABELS, [int(scene["labels"][0]) for scene in found], None, pixels)


def box_masks(boxes: Tensor, size: int) -> Tensor:
    """Boxes (B, 4) in parts of the side to bool (B, size, size): the pixels whose centre lies inside."""
    centres = (torch.arange(size) + 0.5) / size
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    columns, rows = (centres >= x1) & (centres < x2), (centres >= y1) & (centres < y2)
    return rows[:, :, None] & columns[:, None, :]


def box_of(found: Tensor) -> tuple[float, float, float, float]:
    """The box around a map's largest connected part above 15% of its maximum (sec. 4.1), in parts of the side."""
    from scipy.ndimage import find_objects, label

    marked, count = label((found > 0.15 * found.max()).numpy())
    if count == 0:
        return (0.0, 0.0, 0.0, 0.0)
    largest = torch.from_numpy(marked).flatten().bincount()[1:].argmax()
    rows, columns = find_objects(marked)[int(largest)]
    height, width = found.shape
    return (columns.start / width, rows.start / height, columns.stop / width, rows.stop / height)


def iou(a: Any, b: Any) -> float:
    """Intersection over union of two boxes x1 y1 x2 y2."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0


PRESETS = {
    "embedded": Config(
        model="resnet20_cifar",
        image_size=32,
        augment="shift",
        steps=180,
        batch_size=32,
        learning_rate=0.05,
        weight_decay=5e-4,
        schedule="cosine",
    ),
    # sec. 4.1: localisation on ILSVRC with networks trained for classification; data: class folders of ImageNet
    "published": Config(
        model="vgg16",
        data="imagenet",
        image_size=224,
        augment="crop_flip",
        normalise="imagenet",
        steps=74 * 5005,
        batch_size=256,
        learning_rate=0.01,
        schedule="step",
        milestones=(0.4, 0.65, 0.9),
        workers=8,
    ),
}
RECIPE = GradCAMRecipe
