"""C3D learns with the task's default recipe: random clips of 16 consecutive frames."""

from paperzoo.tasks.action_recognition import ActionRecognitionRecipe as RECIPE
from paperzoo.tasks.action_recognition import Config

PRESETS = {
    "embedded": Config(
        model="c3d_slim",
        data="moving_digits",
        frames=16,
        image_size=24,
        steps=200,
        batch_size=16,
        optimizer="adam",
        learning_rate=1.5e-3,
        weight_decay=0.0,
        clip=1.0,
    ),
    # Sec. 3.3: Sports-1M as a list of two-second excerpts, five of each video (data/sports1m/train.csv and test.csv, path and label); 128 x 171
    # pixels, of which 112 x 112 at a random place, mirrored half of the time; batches of 30, a rate of 0.003 halved every 150,000 iterations,
    # 1.9 million iterations. Ten clips of a video are averaged. The paper says nothing of momentum and decay: Caffe's usual 0.9 and 5e-4.
    "published": Config(
        model="c3d",
        data="data/sports1m/train.csv",
        frames=16,
        image_size=112,
        short_side=(128, 128),
        flip=True,
        normalise="levels",
        drop_rate=0.5,
        steps=1_900_000,
        batch_size=30,
        learning_rate=0.003,
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        schedule="step",
        milestones=tuple(round(k * 150_000 / 1_900_000, 6) for k in range(1, 13)),
        gamma=0.5,
        test_clips=10,
        workers=8,
    ),
    # Sec. 3.2, with which the depth of the kernels was chosen: UCF101 from scratch, 16 epochs of its first split (9,537 videos, batches of
    # 30), the rate divided by 10 after every fourth.
    "ucf101": Config(
        model="c3d",
        data="data/ucfTrainTestlist/trainlist01.txt",
        frames=16,
        image_size=112,
        short_side=(128, 128),
        flip=True,
        normalise="levels",
        drop_rate=0.5,
        steps=5_088,
        batch_size=30,
        learning_rate=0.003,
        nesterov=False,
        weight_decay=5e-4,
        schedule="step",
        milestones=(0.25, 0.5, 0.75),
        gamma=0.1,
        test_clips=10,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
