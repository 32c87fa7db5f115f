"""MobileNet learns by the task's default recipe; here are its settings."""

from paperzoo.tasks.classification import ClassificationRecipe as RECIPE
from paperzoo.tasks.classification import Config

EPOCH = 20_018  # steps of 64 images over ImageNet's 1.28 million

PRESETS = {
    "embedded": Config(
        model="mobilenetv1_025",
        data="digits",
        image_size=64,  # the last maps of a network of stride 32 are 2 x 2
        augment="shift",  # a mirrored digit is no digit
        steps=240,
        batch_size=64,
        learning_rate=0.1,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
    ),
    # Sec. 3.2 names RMSprop with asynchronous steps, as Inception v3, and no figures. Batch, rate and decay are those of the
    # authors' released training script: plain gradient descent in batches of 64, rate 0.045 times 0.94 every 2.5 epochs. It
    # decays the weights by 4e-5 except those of the depthwise filters; here these too, norms and biases not.
    "published": Config(
        model="mobilenetv1_100",
        data="imagenet",
        image_size=224,
        augment="crop_flip",
        normalise="imagenet",
        steps=100 * EPOCH,
        batch_size=64,
        learning_rate=0.045,
        momentum=0.0,
        nesterov=False,
        weight_decay=4e-5,
        decay_all=False,
        schedule="step",
        milestones=tuple(n / 40 for n in range(1, 40)),
        gamma=0.94,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
