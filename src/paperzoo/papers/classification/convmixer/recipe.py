"""ConvMixer learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

EPOCH = 1_281_167 // 640  # whole batches of 640 images

PRESETS = {
    "embedded": Config(
        model="convmixer_digits",
        data="digits",
        image_size=32,
        augment="shift",  # a mirrored digit is no digit
        steps=150,
        batch_size=64,
        optimizer="adamw",
        learning_rate=0.01,
        weight_decay=0.005,
        decay_all=False,
        schedule="cosine",
        warmup_steps=20,
    ),
    # Sec. 3 and the authors' script: AdamW at 0.01, weight decay 2e-5, 150 epochs, batches of 640 (ten GPUs of 64), gradients
    # clipped at 1, RandAugment, mixup 0.5, CutMix 0.5, erasing 0.25. Their triangular schedule (OneCycle) is a cosine with
    # warm-up here.
    "published": Config(
        model="convmixer_1536_20",
        data="imagenet",
        image_size=224,
        augment="randaugment",
        magnitude=9,
        erase=0.25,
        mixup=0.5,
        cutmix=0.5,
        normalise="imagenet",
        steps=150 * EPOCH,
        batch_size=640,
        optimizer="adamw",
        learning_rate=0.01,
        weight_decay=2e-5,
        decay_all=False,
        schedule="cosine",
        warmup_steps=10 * EPOCH,
        label_smoothing=0.1,
        clip=1.0,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
