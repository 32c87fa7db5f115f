"""FCN learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.segmentation import Config
from paperzoo.tasks.segmentation import SegmentationRecipe as RECIPE

PRESETS = {
    # From scratch, without a pretrained classifier: hence batch norm, AdamW and few classes.
    "embedded": Config(
        model="fcn8s_slim",
        data="digit_ink",
        crop_size=64,
        scale=(1.0, 1.0),
        flip=0.5,
        steps=100,
        batch_size=16,
        optimizer="adamw",
        learning_rate=3e-3,
    ),
    # Sec. 4.3: whole images in batches of 20 (VOC's are at most 500 pixels; the padding does not count), momentum 0.9, weight
    # decay 5e-4, a fixed rate of 1e-4, twice that for biases, 175 epochs of the 8498 images of SBD. The paper saw nothing gained by mirroring or jittering.
    # It trains in stages (sec. 4.2), each --backbone-weights from the one before: fcn32s_vgg16 from a VGG-16 classifier,
    # fcn16s_vgg16 from that, then this one with a rate 100 times smaller.
    "published": Config(
        model="fcn8s_vgg16",
        data="VOCdevkit/VOC2012",
        crop_size=500,
        scale=(1.0, 1.0),
        flip=0.0,
        steps=175 * 425,
        batch_size=20,
        learning_rate=1e-4,
        momentum=0.9,
        weight_decay=5e-4,
        bias_factor=2.0,
        power=0.0,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
