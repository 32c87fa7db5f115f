"""How ST-GCN++ learns: the task's default recipe with the released settings; a network for each of four streams, their probabilities mixed 2 : 2 : 1 : 1."""

from __future__ import annotations

from dataclasses import replace

from paperzoo.tasks.skeleton_actions import Config
from paperzoo.tasks.skeleton_actions import SkeletonActionRecipe as RECIPE

FOUR = ("joint", "bone", "joint_motion", "bone_motion")

# The released configuration for NTU RGB+D's 3-D skeletons: 100 frames, eight GPUs with 16 clips each, SGD with Nesterov momentum at 0.1, a cosine over 80
# epochs of 40,091 clips (16 through five times the set), weight decay 5e-4 on everything; tested with ten draws of frames.
PUBLISHED = Config(
    model="stgcn_plus_plus",
    data="ntu60_3danno.pkl",
    protocol="xsub",
    streams=FOUR,
    frames=100,
    steps=80 * 40_091 // 128,
    batch_size=128,
    learning_rate=0.1,
    weight_decay=5e-4,
    schedule="cosine",
    test_clips=10,
    workers=8,
)

PRESETS = {
    # Short clips, the joint stream alone, a narrow network, small batches: the gestures are simple, and no seconds are to be lost.
    "embedded": Config(
        model="stgcn_plus_plus_tiny",
        data="gestures",
        streams=("joint",),
        frames=10,
        steps=130,
        batch_size=16,
        learning_rate=0.2,
        test_clips=4,
    ),
    "published": PUBLISHED,
    # Flat skeletons that a pose network found (HRNet's, COCO's joints); the rest as above.
    "hrnet": replace(PUBLISHED, data="ntu60_hrnet.pkl"),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
