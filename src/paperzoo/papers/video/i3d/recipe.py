"""I3D learns with the task's default recipe: long clips, the whole video in tests."""

from paperzoo.tasks.action_recognition import ActionRecognitionRecipe as RECIPE
from paperzoo.tasks.action_recognition import Config

PRESETS = {
    "embedded": Config(
        model="i3d_slim",
        data="moving_digits",
        frames=16,
        image_size=24,
        steps=140,
        batch_size=16,
        optimizer="adam",
        learning_rate=3e-3,
        weight_decay=0.0,
    ),
    # Sec. 3 and 4: Kinetics, 25 frames a second; 64 consecutive frames of which shorter videos are repeated, the shorter side 256 pixels, crops
    # of 224, mirrored half of the time; momentum 0.9, 110,000 steps, the rate divided by 10 when validation loss saturates. Tests take the whole
    # video (250 frames) and the central crop. Not said: the rate, 0.1 here; when it fell, at 60% and 90% here; the batch, 192 here; weight
    # decay, 1e-4 here. `weights` starts from an image network's file, inflated.
    "published": Config(
        model="i3d",
        data="data/kinetics400",
        frames=64,
        rate=25.0,
        short="loop",
        image_size=224,
        short_side=(256, 256),
        flip=True,
        normalise="symmetric",
        drop_rate=0.5,
        steps=110_000,
        batch_size=192,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        schedule="step",
        milestones=(0.6, 0.9),
        gamma=0.1,
        test_frames=250,
        test_batch=1,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
