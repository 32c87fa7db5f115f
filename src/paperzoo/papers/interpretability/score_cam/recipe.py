"""Score-CAM at work: a classifier of digit scenes is explained without gradients, and its maps are compared with Grad-CAM's.

The classifier never sees a box. What it has to beat is Grad-CAM on the same network and the same images.
"""

from __future__ import annotations

import dataclasses

import torch
from PIL import Image
from torch import Tensor, nn

from paperzoo.papers.interpretability.grad_cam.recipe import PRESETS as GRAD_CAM
from paperzoo.papers.interpretability.grad_cam.technique import GradCAM
from paperzoo.papers.interpretability.score_cam.technique import ScoreCAM
from paperzoo.tasks.explanation import ExplanationRecipe


class ScoreCAMRecipe(ExplanationRecipe):
    """The explanation recipe with Score-CAM's maps."""

    def explain(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        return ScoreCAM(model, self.layer)(images, classes)

    def grad_cam(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        return GradCAM(model, self.layer)(images, classes)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The room's metrics, and how far Grad-CAM on the same network and images is behind."""
        found = super().evaluate(split)
        return found | self.against("grad_cam", self.grad_cam, ("average_drop", "confidence_increase"), found, split)

    def own_figures(self, images: list, inputs: Tensor, results: list) -> dict[str, Image.Image]:
        """The same images and classes under Grad-CAM, above this paper's maps."""
        from paperzoo.engine.pictures import tile

        classes = torch.tensor([result.index for result in results], device=inputs.device)
        other = self.grad_cam(self.deployed, inputs, classes).cpu()
        rows = [self.heat(image, found, "Grad-CAM") for image, found in zip(images, other, strict=True)]
        rows += [self.heat(image, result.map, "Score-CAM") for image, result in zip(images, results, strict=True)]
        return {"With and without gradients": tile(rows, len(images))}


PRESETS = {
    "embedded": dataclasses.replace(GRAD_CAM["embedded"], explained=48, perturbed=8),
    "published": GRAD_CAM["published"],  # sec. 4: VGG-16 trained on ImageNet's class folders
}
RECIPE = ScoreCAMRecipe
