"""Grad-CAM at work: a classifier that never sees a box learns, and its maps are compared with where the object is.

On the embedded scenes (one handwritten digit somewhere over a photograph) boxes are known, so localisation is measured. On the
user's own class folders the same recipe trains, explains, and reports what needs no boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from paperzoo.papers.interpretability.grad_cam.technique import GradCAM, GuidedGradCAM
from paperzoo.tasks import explanation
from paperzoo.tasks.classification import captioned
from paperzoo.tasks.explanation import Config, ExplanationRecipe
from paperzoo.tasks.explanation_metrics import box_around, boxes_inside
from paperzoo.tasks.explanation_pictures import relief

THRESHOLD = 0.15  # sec. 4.1: of the map's maximum


@dataclass(frozen=True)
class Explanation(explanation.Explanation):
    """An explanation with the box that follows from its map (sec. 4.1): x1 y1 x2 y2 as parts of the side."""

    box: tuple[float, float, float, float]


class GradCAMRecipe(ExplanationRecipe):
    """The classification recipe whose answers come with a map, and whose evaluation measures where the maps point."""

    config: Config

    def explain(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        return GradCAM(model, self.layer)(images, classes)

    def own_measures(self, maps: Tensor, images: Tensor, labels: Tensor, instances: Tensor) -> dict[str, Tensor]:
        """localisation_error, the paper's (sec. 4.1): the class is wrong, or the box around its map has an IoU below 0.5."""
        with torch.inference_mode():
            guess = self.deployed(images).argmax(1)
        found = [torch.tensor([box_around(m, THRESHOLD)]) for m in self.explain(self.deployed, images, guess).cpu()]
        ours, truth = boxes_inside(found, *maps.shape[1:]), instances.any(1)
        overlap = (ours & truth).sum((1, 2)) / (ours | truth).sum((1, 2)).clamp_min(1)
        return {"localisation_error": (guess != labels).cpu() | (overlap < 0.5)}

    def predict(self, inputs: list) -> list[Explanation]:
        """Paths, PIL images or arrays to their classes, each with the map of its most probable class and the box around it."""
        return [Explanation(**vars(r), box=box_around(r.map, THRESHOLD)) for r in super().predict(inputs)]

    def own_figures(self, images: list, inputs: Tensor, results: list) -> dict[str, Image.Image]:
        """Guided Grad-CAM: which pixels of the place."""
        from paperzoo.engine.pictures import tile

        classes = torch.tensor([result.index for result in results], device=inputs.device)
        found = GuidedGradCAM(self.deployed, self.layer)(inputs, classes)
        shown = [v2.functional.pil_to_tensor(relief(gradients)) for gradients in found]
        return {
            "Guided Grad-CAM": tile([captioned(p, r.label) for p, r in zip(shown, results, strict=True)], len(shown))
        }


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
