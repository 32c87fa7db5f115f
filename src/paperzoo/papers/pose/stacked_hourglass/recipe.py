"""Stacked hourglasses learn by the task's default recipe; here are their optimizer and settings."""

import torch

from paperzoo.tasks.pose import Config, PoseRecipe


class HourglassRecipe(PoseRecipe):
    """The default recipe with RMSProp as Torch has it: a smoothing of 0.99, no momentum."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        if c.optimizer != "rmsprop":
            return super().make_optimizer()
        return torch.optim.RMSprop(self.model.parameters(), c.learning_rate, weight_decay=c.weight_decay)


RECIPE = HourglassRecipe

PRESETS = {
    # From random weights, in seconds: two thin hourglasses on small crops.
    "embedded": Config(
        model="hg2_slim",
        data="stick_figures",
        figures=512,
        image_size=(64, 64),
        sigma=1.0,
        weighted=False,
        normalise="none",
        scale_jitter=0.15,
        rotate=15.0,
        flip_shift=False,
        steps=200,
        batch_size=24,
        optimizer="adam",
        learning_rate=4e-3,
        schedule="cosine",
        warmup_steps=10,
    ),
    # Sec. 3.1: RMSProp at 2.5e-4, divided by five once, turned by up to 30 degrees, scaled by 0.75 to 1.25, maps of deviation 1
    # that are empty for joints not annotated. Batch and length as the authors' PyTorch code.
    "published": Config(
        model="hg8",
        data="mpii",
        image_size=(256, 256),
        sigma=1.0,
        weighted=False,
        normalise="none",
        scale_jitter=0.25,
        rotate=30.0,
        rotate_share=1.0,
        jitter="uniform",
        colour_jitter=0.3,
        flip_shift=False,
        steps=200_000,
        batch_size=16,
        optimizer="rmsprop",
        learning_rate=2.5e-4,
        schedule="step",
        milestones=(0.5,),
        gamma=0.2,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
