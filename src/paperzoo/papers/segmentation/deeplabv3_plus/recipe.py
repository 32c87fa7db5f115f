"""DeepLabv3+ trains as DeepLabv3 does (sec. 4)."""

from paperzoo.papers.segmentation.deeplab_v3.recipe import RECIPE, Config

PRESETS = {
    "embedded": Config(
        model="deeplabv3plus_slim",
        data="digit_ink",
        crop_size=64,
        scale=(1.0, 1.0),
        steps=160,
        batch_size=8,
        optimizer="adamw",
        learning_rate=6e-3,
        warmup_steps=20,
        norm_momentum=0.1,
        workers=0,
    ),
    # Sec. 4: the settings of DeepLabv3 on VOC's 10,582 images with SBD's. The second round, on VOC's own annotation:
    # --model.output_stride 8 --freeze-norm --learning-rate 0.001 --weights FILE
    "published": Config(model="deeplabv3plus_xception65"),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
