"""The simple baseline learns by the task's default recipe, which is its own; here are its settings."""

from paperzoo.tasks.pose import Config
from paperzoo.tasks.pose import PoseRecipe as RECIPE

PRESETS = {
    # From random weights, in seconds: a thin network on small crops, gentler augmentation, a larger rate along a cosine.
    "embedded": Config(
        model="pose_resnet_slim",
        data="stick_figures",
        figures=512,
        image_size=(64, 64),
        sigma=1.0,
        scale_jitter=0.15,
        rotate=15.0,
        steps=280,
        batch_size=32,
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=20,
    ),
    # Sec. 4: 140 epochs in batches of 128, Adam, 1e-3 divided by ten at 90 and 120; MPII's augmentation and size as in the
    # released code. The paper starts from an ImageNet classifier: --backbone-weights resnet50.pth (torchvision's).
    "published": Config(
        model="pose_resnet50",
        data="mpii",
        image_size=(256, 256),
        sigma=2.0,
        scale_jitter=0.25,
        rotate=30.0,
        steps=140 * 174,  # 22,246 people
        batch_size=128,
        learning_rate=1e-3,
        workers=8,
    ),
    # The same on COCO; people's boxes for the test come from a detector: --detections COCO_val2017_detections_AP_H_56_person.json
    "coco": Config(
        model="pose_resnet50",
        data="coco",
        image_size=(256, 192),
        sigma=2.0,
        scale_jitter=0.3,
        rotate=40.0,
        steps=140 * 1171,  # 149,813 people
        batch_size=128,
        learning_rate=1e-3,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
