"""SlowFast learns with the task's default recipe; both pathways are made of one clip inside the network."""

from paperzoo.tasks.action_recognition import ActionRecognitionRecipe as RECIPE
from paperzoo.tasks.action_recognition import Config

PRESETS = {
    "embedded": Config(
        model="slowfast_slim",
        data="moving_digits",
        frames=16,
        image_size=24,
        steps=160,
        batch_size=16,
        optimizer="adam",
        learning_rate=3e-3,
        weight_decay=0.0,
    ),
    # Sec. 4: Kinetics-400 from scratch. Clips of 64 frames at 30 a second of which 32 are taken; the shorter side random in 256 … 320, crops of
    # 224, mirrored half of the time; 256 epochs in batches of 1,024 are 60,000 iterations; a rate of 1.6 with half a period of a cosine after
    # 8,000 iterations of warm-up; decay 1e-4, dropout 0.5. Tested on ten clips with three crops of 256 pixels each.
    "published": Config(
        model="slowfast_r50_4x16",
        data="data/kinetics400",
        frames=32,
        stride=2,
        rate=30.0,
        image_size=224,
        short_side=(256, 320),
        flip=True,
        normalise="kinetics",
        drop_rate=0.5,
        steps=60_000,
        batch_size=1024,
        learning_rate=1.6,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=8_000,
        test_clips=10,
        test_crops=3,
        test_size=256,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
