"""PAN learns by text detection's default recipe, which crops as its released code does; here are its settings."""

from __future__ import annotations

from dataclasses import replace

from paperzoo.tasks.text_detection import Config
from paperzoo.tasks.text_detection import TextDetectionRecipe as RECIPE

# sec. 4.2: 36k steps of 16 pictures, SGD with Nesterov momentum 0.99, 1e-3 with the poly schedule of power 0.9; random scale, mirror,
# turn up to 10 degrees and crop of 640 pixels. The backbone starts from ImageNet (give --backbone-weights)
CTW = Config(
    model="pan_resnet18",
    model_arguments={"kernel_ratio": 0.7, "min_score": 0.88},
    data="ctw1500",
    image_size=640,
    crop_size=640,
    scale=(0.7, 1.3),
    rotate=10.0,
    flip=0.5,
    steps=36_000,
    batch_size=16,
    optimizer="sgd",
    learning_rate=1e-3,
    momentum=0.99,
    nesterov=True,
    weight_decay=5e-4,
    schedule="poly",
    power=0.9,
    workers=8,
)

PRESETS = {
    "embedded": Config(
        model="pan",
        model_arguments={"backbone": "mobilenetv1_025", "channels": 32, "min_score": 0.7},
        data="text_scenes",
        scenes=512,
        scene_size=128,
        scene_texts=3,
        scene_scale=(0.14, 0.28),  # an em of 18 to 36 pixels
        image_size=128,
        crop_size=128,
        scale=(1.0, 1.0),  # scenes are as varied as crops
        rotate=0.0,
        flip=0.0,
        jitter=False,
        steps=200,
        batch_size=6,
        optimizer="adamw",
        learning_rate=5e-3,
        weight_decay=1e-4,
        schedule="poly",
        warmup_steps=10,
        clip=5.0,
    ),
    "published": CTW,
    "total_text": replace(CTW, data="total_text", model_arguments={"kernel_ratio": 0.7, "min_score": 0.87}),
    "icdar2015": replace(
        CTW,
        data="icdar2015",
        model_arguments={"kernel_ratio": 0.5, "min_score": 0.85, "rectangles": True},
        image_size=736,
        crop_size=736,
    ),
    # the authors' later code: Adam without weight decay, 600 epochs of 62 steps
    "released": replace(CTW, optimizer="adam", weight_decay=0.0, steps=37_200),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
