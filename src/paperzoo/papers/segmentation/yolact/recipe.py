"""YOLACT learns by its task's default recipe; here are its settings."""

from paperzoo.tasks.instance_segmentation import Config
from paperzoo.tasks.instance_segmentation import InstanceSegmentationRecipe as RECIPE

# sec. 6, "implementation details", and the released code: 550 x 550 pixels, 8 images, 800k steps of SGD at 1e-3, a tenth after 280k,
# 600k, 700k and 750k, SSD's augmentation; the backbone starts from ImageNet (give --backbone-weights)
COCO = Config(
    model="yolact_resnet101",
    data="coco",
    resize="square",
    image_sizes=(550,),
    multiple=1,
    augment="ssd",
    steps=800_000,
    batch_size=8,
    learning_rate=1e-3,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="step",
    milestones=(0.35, 0.75, 0.875, 0.9375),
    warmup_steps=500,
    workers=8,
)

PRESETS = {
    "embedded": Config(
        model="yolact_tiny",
        data="shape_scenes",
        scenes=2048,
        scene_size=64,
        scene_objects=2,
        scene_scale=(0.5, 0.8),  # 32 to 51 pixels
        resize="square",
        image_sizes=(64,),
        multiple=1,
        augment="none",  # shapes are turned already
        steps=160,
        batch_size=16,
        optimizer="adamw",
        learning_rate=5e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
        show_above=0.3,
    ),
    "published": COCO,
}

__all__ = ["PRESETS", "RECIPE", "Config"]
