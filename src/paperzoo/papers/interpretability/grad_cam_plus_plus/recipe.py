"""Grad-CAM++ at work: a classifier learns scenes of one digit, and is explained on scenes with up to three copies of one.

All copies are to be found. The classifier never sees a box. What it has to beat is Grad-CAM on the same network and the same images.
"""

from __future__ import annotations

import dataclasses

import torch
from PIL import Image
from torch import Tensor, nn

from paperzoo.papers.interpretability.grad_cam.recipe import PRESETS as GRAD_CAM
from paperzoo.papers.interpretability.grad_cam.technique import GradCAM
from paperzoo.papers.interpretability.grad_cam_plus_plus.technique import GradCAMPlusPlus
from paperzoo.tasks.explanation import ExplanationRecipe


class GradCAMPlusPlusRecipe(ExplanationRecipe):
    """The explanation recipe with Grad-CAM++'s maps."""

    def explain(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        return GradCAMPlusPlus(model, self.layer)(images, classes)

    def grad_cam(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        return GradCAM(model, self.layer)(images, classes)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The room's metrics, and how far Grad-CAM on the same network and images is behind."""
        found = super().evaluate(split)
        return found | self.against("grad_cam", self.grad_cam, ("faintest_instance", "average_drop"), found, split)

    def own_figures(self, images: list, inputs: Tensor, results: list) -> dict[str, Image.Image]:
        """The same images and classes under Grad-CAM, above this paper's maps."""
        from paperzoo.engine.pictures import tile

        classes = torch.tensor([result.index for result in results], device=inputs.device)
        other = self.grad_cam(self.deployed, inputs, classes).cpu()
        rows = [self.heat(image, found, "Grad-CAM") for image, found in zip(images, other, strict=True)]
        rows += [self.heat(image, result.map, "Grad-CAM++") for image, result in zip(images, results, strict=True)]
        return {"Several instances": tile(rows, len(images))}


PRESETS = {
    "embedded": dataclasses.replace(GRAD_CAM["embedded"], instances=3),
    "published": GRAD_CAM["published"],  # sec. 5: VGG-16 trained on ImageNet's class folders
}
RECIPE = GradCAMPlusPlusRecipe
