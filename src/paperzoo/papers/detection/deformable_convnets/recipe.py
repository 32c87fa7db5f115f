"""The detector learns by Faster R-CNN's recipe; here are its settings."""

from __future__ import annotations

from dataclasses import replace

from paperzoo.papers.detection.faster_rcnn.recipe import PRESETS as FASTER_RCNN
from paperzoo.papers.detection.faster_rcnn.recipe import FasterRCNNRecipe as RECIPE
from paperzoo.tasks.detection import Config

EMBEDDED = replace(
    FASTER_RCNN["embedded"],
    model="deformable_faster_rcnn_tiny",
    data="shape_scenes",
    scene_objects=4,
    scene_scale=(0.25, 0.5),  # 16 to 32 pixels
    augment="flip",
    steps=400,
)

PRESETS = {
    "embedded": EMBEDDED,
    "plain": replace(EMBEDDED, model_arguments={"deformable": False}),
    # Sec. 4.1 and 4.2: COCO trainval, shortest side 600, SGD on 8 GPUs with one image each, 240k steps for Faster R-CNN with the
    # rate at 1e-3 (for one image) and 1e-4 from two thirds on. Batch norms keep ImageNet's statistics; give --backbone-weights.
    "published": Config(
        model="deformable_faster_rcnn_resnet101",
        data="coco",
        image_sizes=(600,),
        longest_side=1000,
        augment="flip",
        freeze=("backbone.body.conv1.", "backbone.body.bn1.", "backbone.body.layer1."),
        freeze_norms=True,
        steps=240_000,
        batch_size=8,
        learning_rate=8e-3,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="step",
        milestones=(2 / 3,),
        warmup_steps=500,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
