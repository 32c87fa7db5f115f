"""Saliency at work: a classifier of digit scenes is asked which pixels it hangs on, and a graph cut makes an object of them.

The classifier never sees a box or a mask; the graph cut sees the image and the saliency alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from paperzoo.papers.interpretability.deep_inside_saliency.technique import Saliency, class_images, object_mask
from paperzoo.papers.interpretability.grad_cam.recipe import PRESETS as GRAD_CAM
from paperzoo.tasks import explanation
from paperzoo.tasks.classification import captioned
from paperzoo.tasks.explanation import Config, ExplanationRecipe
from paperzoo.tasks.explanation_metrics import boxes_inside
from paperzoo.tasks.explanation_pictures import picture


@dataclass(frozen=True)
class Explanation(explanation.Explanation):
    """An explanation with the object that a graph cut finds: bool (image_size, image_size), and its box, parts of the side."""

    mask: Tensor
    box: tuple[float, float, float, float]


class SaliencyRecipe(ExplanationRecipe):
    """The explanation recipe with gradients by pixel, and localisation by graph cut (sec. 3.2)."""

    config: Config

    def explain(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        return Saliency(model)(images, classes)

    @property
    def layer(self) -> str:
        """None of the network's: the image itself is what the gradient is taken by."""
        return ""

    def colours(self, images: Tensor) -> Tensor:
        """Inputs of the network (…, 3, S, S) back to uint8 pixels."""
        mean, deviation = (torch.tensor(self.facts[name])[:, None, None] for name in ("mean", "deviation"))
        return ((images.cpu() * deviation + mean).clamp(0, 1) * 255).round().to(torch.uint8)

    def own_measures(self, maps: Tensor, images: Tensor, labels: Tensor, instances: Tensor) -> dict[str, Tensor]:
        """localised: the box around the cut-out object has an IoU of at least 0.5 with the true one; mask_overlap: that IoU."""
        masks = [object_mask(image, m) for image, m in zip(self.colours(images), maps, strict=True)]
        boxes = [torch.tensor([box_of(mask)]) for mask in masks]
        found, truth = boxes_inside(boxes, *maps.shape[1:]), instances.any(1)
        overlap = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2)).clamp_min(1)
        return {"localised": overlap >= 0.5, "box_overlap": overlap}

    def predict(self, inputs: list) -> list[Explanation]:
        """Paths, PIL images or arrays to their classes, each with the saliency of its most probable class and the object."""
        results = []
        for value, found in zip(inputs, super().predict(inputs), strict=True):
            mask = object_mask(self.seen(value), found.map)
            results.append(Explanation(**vars(found), mask=mask, box=box_of(mask)))
        return results

    def own_figures(self, images: list, inputs: Tensor, results: list) -> dict[str, Image.Image]:
        """Saliency alone and the object cut out; and what each class looks like to the network (sec. 2)."""
        from paperzoo.engine.pictures import tile

        side = max(96, self.config.image_size)
        rows = [captioned(shades(r.map), r.label, side) for r in results]
        for image, result in zip(images, results, strict=True):
            cut = torch.where(result.mask, self.seen(image), self.seen(image) // 4)
            rows.append(captioned(cut, "graph cut", side))
        labels, size = self.facts["labels"], self.config.image_size
        made = class_images(self.deployed, list(range(min(10, len(labels)))), (3, size, size), steps=50)
        classes = [captioned(stretched(image), label, side) for image, label in zip(made.cpu(), labels, strict=False)]
        return {"Saliency and the object": tile(rows, len(images)), "Class models": tile(classes, 5)}


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """The box around a mask (H, W): x1 y1 x2 y2 in parts of the sides; zeros where it is empty."""
    if not mask.any():
        return (0.0, 0.0, 0.0, 0.0)
    (height, width), rows, columns = mask.shape, mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return (
        int(columns[0]) / width,
        int(rows[0]) / height,
        (int(columns[-1]) + 1) / width,
        (int(rows[-1]) + 1) / height,
    )


def shades(found: Tensor) -> Tensor:
    """A map (H, W) in [0, 1] as grey pixels uint8 (3, H, W)."""
    return v2.functional.pil_to_tensor(picture(found[None].expand(3, -1, -1)))


def stretched(image: Tensor) -> Tensor:
    """Any image (3, H, W) as pixels: grey for zero, three standard deviations to either side."""
    return ((image / (6 * image.std().clamp_min(1e-12)) + 0.5).clamp(0, 1) * 255).to(torch.uint8)


PRESETS = {
    "embedded": dataclasses.replace(GRAD_CAM["embedded"], explained=96),
    # sec. 2 and 3 explain a single network trained on ILSVRC-2013; here of the class folders of ImageNet
    "published": dataclasses.replace(GRAD_CAM["published"], model="alexnet"),
}
RECIPE = SaliencyRecipe
