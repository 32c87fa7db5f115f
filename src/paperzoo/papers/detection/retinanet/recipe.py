"""RetinaNet learns by detection's default recipe; here are its settings."""

from paperzoo.tasks.detection import Config
from paperzoo.tasks.detection import DetectionRecipe as RECIPE

PRESETS = {
    "embedded": Config(
        model="retinanet_tiny_fpn",
        data="digit_scenes",
        scenes=1024,
        scene_size=64,
        scene_objects=3,
        scene_scale=(0.45, 0.8),  # 29 to 51 pixels
        image_sizes=(64,),
        augment="none",  # a mirrored digit is no digit
        steps=1200,
        batch_size=8,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
        show_above=0.3,  # a score of the focal loss is lower than its precision
    ),
    # sec. 4.1: 8 GPUs with 2 images each, 90k steps of SGD, the rate divided by 10 after 60k and 80k, flipping, images of
    # 800 pixels; the backbone starts from ImageNet (give --backbone-weights). As the released code: the first stage and all
    # batch norms frozen, 500 steps of warm-up
    "published": Config(
        model="retinanet_resnet101_fpn",
        data="coco",
        image_sizes=(800,),
        longest_side=1333,
        augment="flip",
        freeze=("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1"),
        freeze_norms=True,
        steps=90_000,
        batch_size=16,
        learning_rate=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="step",
        milestones=(2 / 3, 8 / 9),
        warmup_steps=1200,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
