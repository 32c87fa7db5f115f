"""DCN V2 learns by the task's default recipe; here are its own sizes and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paperzoo.tasks import click_through_rate
from paperzoo.tasks.click_through_rate import Count, CTRRecipe


@dataclass(frozen=True)
class Config(click_through_rate.Config):
    """The default recipe's settings, and the sizes of the cross network."""

    model: str = "dcn_v2_stacked"
    num_cross_layers: Count = 2
    rank: Count | None = None  # of the factored cross matrices; None: full matrices
    num_experts: Count = 4  # of the mixture, for the dcn_mix models


class DCNRecipe(CTRRecipe):
    """The default recipe with the cross network's sizes handed to the model."""

    config: Config

    def model_arguments(self) -> dict[str, Any]:
        config = self.config
        arguments = super().model_arguments()
        if config.model in ("mlp", "logistic_regression"):
            return arguments
        arguments["num_cross_layers"] = config.num_cross_layers
        if config.rank is not None:
            arguments["rank"] = config.rank
        if config.model.startswith("dcn_mix"):
            arguments["num_experts"] = config.num_experts
        return arguments


RECIPE = DCNRecipe

PRESETS = {
    "embedded": Config(
        model="dcn_v2_parallel",
        data="clicks",
        label="click",
        embed_dim=8,
        hidden=(64, 64),
        num_cross_layers=2,
        steps=600,
        batch_size=512,
        learning_rate=0.02,
    ),
    # sec. 7.1 and appendix: seven days of Criteo's log, the last split evenly into validation and test; log(x + 1), for I2
    # log(x + 4); embeddings of 39; Adam in batches of 512 with the gradient norm clipped at 10 and an average of the weights
    # with decay 0.9999. The learning rate was searched between 1e-4 and 5e-4, the number of steps between 150,000 and 300,000.
    "published": Config(
        model="dcn_v2_stacked",
        data="criteo",
        transform="log",
        min_count=10,  # not in the paper: the threshold that most who work on this log use
        hold_out="last",
        hold_out_share=1 / 7,
        embed_dim=39,
        hidden=(768, 768),
        num_cross_layers=2,
        steps=150_000,
        batch_size=512,
        learning_rate=1e-4,
        schedule="constant",
        clip=10.0,
        ema_decay=0.9999,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
