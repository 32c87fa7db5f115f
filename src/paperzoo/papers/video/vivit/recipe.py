"""ViViT learns with the task's default recipe; from an image transformer's weights where `weights` names their file."""

from paperzoo.tasks.action_recognition import ActionRecognitionRecipe as RECIPE
from paperzoo.tasks.action_recognition import Config

PRESETS = {
    "embedded": Config(
        model="vivit_slim",
        data="moving_digits",
        frames=16,
        image_size=24,
        steps=180,
        batch_size=32,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup_steps=20,
        clip=1.0,
    ),
    # Sec. 4.1 and the supplementary table of hyper-parameters: Kinetics-400 from ImageNet-21k weights (give their file as `weights`), 32 frames, 2
    # apart, at 25 a second; crops of 224 of a shorter side in 230 … 340 (0.9 to 1.33 times 256), mirrored; 30 epochs of 214,834 videos in batches of
    # 64, momentum 0.9, a rate of 0.1 with a cosine after 2.5 epochs of warm-up, gradients cut at norm 1, no weight decay, none of the
    # regularisers. Four clips with three crops. Random changes of colour are left out.
    "published": Config(
        model="vivit_b_16x2",
        data="data/kinetics400",
        frames=32,
        stride=2,
        rate=25.0,
        image_size=224,
        short_side=(230, 340),
        flip=True,
        normalise="symmetric",
        steps=100_680,
        batch_size=64,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,
        warmup_steps=8_390,
        clip=1.0,
        test_clips=4,
        test_crops=3,
        test_batch=4,
        workers=16,
    ),
    # The same table, Something-Something v2 (168,913 videos as data/something_something_v2/train.csv and val.csv): model 2, large, started from
    # Kinetics weights, 35 epochs, a rate of 0.5, and what the paper needs on smaller sets: RandAugment, mixup, label smoothing, stochastic depth.
    # Not mirrored: left and right are classes.
    "something_something_v2": Config(
        model="vivit_l_16x2_factorised_encoder",
        data="data/something_something_v2/train.csv",
        frames=32,
        stride=2,
        rate=25.0,
        image_size=224,
        short_side=(230, 340),
        randaugment=20,
        mixup=0.3,
        label_smoothing=0.3,
        drop_path_rate=0.3,
        normalise="symmetric",
        steps=92_365,
        batch_size=64,
        learning_rate=0.5,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,
        warmup_steps=6_597,
        clip=1.0,
        test_clips=4,
        test_crops=3,
        test_batch=4,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
