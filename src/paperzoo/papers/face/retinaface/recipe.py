"""RetinaFace learns by face detection's default recipe; here are its settings."""

from __future__ import annotations

from dataclasses import replace

from paperzoo.tasks.face_detection import Config
from paperzoo.tasks.face_detection import FaceDetectionRecipe as RECIPE

# the released code for its thin MobileNet: 12,880 pictures in batches of 32 at 640 pixels, SGD at 1e-3, a tenth after 190 and 220
# of 250 epochs; from a classifier's weights (give --backbone-weights). Evaluation at the pictures' own size
MOBILENET = Config(
    model="retinaface_mobilenet025",
    data="wider_face",
    resize="none",
    image_sizes=(640,),
    multiple=32,
    normalise="pixels",
    augment="square_crop",
    steps=250 * 403,
    batch_size=32,
    learning_rate=1e-3,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="step",
    milestones=(190 / 250, 220 / 250),
    workers=8,
)

PRESETS = {
    "embedded": Config(
        model="retinaface_tiny",
        data="drawn_faces",
        scenes=192,
        scene_size=128,
        resize="square",
        image_sizes=(128,),
        multiple=32,
        normalise="imagenet",
        augment="flip",
        steps=350,
        batch_size=8,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
    ),
    # sec. 4.2: WIDER FACE's 12,880 pictures in batches of 32 at 640 pixels, SGD; 1e-3 grows to 1e-2 in 5 epochs, a tenth after 55 and
    # 68 of 80. The schedule here warms up from zero
    "published": replace(
        MOBILENET,
        model="retinaface_resnet152",
        normalise="imagenet",
        steps=80 * 403,
        learning_rate=1e-2,
        warmup_steps=5 * 403,
        milestones=(55 / 80, 68 / 80),
    ),
    "released_mobilenet": MOBILENET,
    # the released code for ResNet-50: batches of 24 at 840 pixels, a tenth after 70 and 90 of 100 epochs
    "released_resnet50": replace(
        MOBILENET,
        model="retinaface_resnet50",
        image_sizes=(840,),
        steps=100 * 537,
        batch_size=24,
        milestones=(70 / 100, 90 / 100),
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
