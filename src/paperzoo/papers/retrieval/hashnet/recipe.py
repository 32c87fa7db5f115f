"""HashNet: codes learned through tanh(beta z) with a growing beta, by the weighted likelihood of pairs.

Cao et al., "HashNet: Deep Learning to Hash by Continuation", ICCV 2017, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.blocks.search import Backend
from paperzoo.engine.models import create
from paperzoo.errors import PaperZooError
from paperzoo.papers.retrieval.hashnet.technique import PairwiseLikelihood, growing_beta, staged_beta
from paperzoo.tasks import retrieval
from paperzoo.tasks.classification import Count, Fraction, Positive
from paperzoo.tasks.retrieval import RetrievalRecipe


@dataclass(frozen=True)
class Config:
    """Section 4.1 and the released Caffe code for COCO."""

    model: str = "hashnet"
    backbone: str = "alexnet"  # any classifier
    backbone_weights: str | None = None  # of that classifier, trained on ImageNet: torchvision's file
    bits: Count = 48  # 16, 32, 48 and 64 in the paper
    data: str = "hashnet_coco"
    gallery: str | None = None
    search: Backend = "exact"
    neighbours: Count = 10
    map_at: Count | None = 5000  # 1000 on ImageNet
    image_size: Count = 224
    augment: Literal["none", "shift", "flip_shift", "crop_flip"] = "crop_flip"
    normalise: Literal["data", "imagenet"] = "imagenet"
    alpha: Positive | None = None  # of the adaptive sigmoid; None: 10 / bits, as the released code
    balance: Literal["pairs"] | Positive = "pairs"  # eq. 2; released code: 1 on COCO, 5 on NUS-WIDE, 100 on ImageNet
    continuous: Literal["jaccard", "cosine", "none"] = "jaccard"
    continuation: Literal["growing", "stages", "constant"] = (
        "growing"  # the released code's; algorithm 1; none: beta is 1
    )
    beta_gamma: Positive = 0.005
    beta_power: Positive = 0.5
    beta_every: Count = 200  # steps
    betas: tuple[Positive, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)  # of "stages"
    pretrain_steps: Annotated[int, Field(ge=0)] = (
        0  # of the steps: the backbone first learns the classes; stands in for ImageNet
    )
    steps: Count = 10_000
    batch_size: Annotated[int, Field(ge=2, multiple_of=2)] = (
        512  # images; each of one half is paired with each of the other
    )
    hash_deviation: Positive = 0.01  # of the hash layer's first weights
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive = 5e-5
    hash_rate: Positive = 10.0  # the hash layer's rate, as a factor
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (0.2, 0.4, 0.6, 0.8)
    gamma: Positive = 0.5
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    drop_rate: Fraction = 0.0
    workers: Annotated[int, Field(ge=0)] = 0
    metric: Literal["hamming"] = "hamming"


class HashNetRecipe(RetrievalRecipe):
    """The task's recipe with the paper's network, loss and continuation."""

    config: Config

    def build(self) -> nn.Module:
        config = self.config
        arguments: dict[str, Any] = {"drop_rate": config.drop_rate} if config.drop_rate else {}
        if config.model == "hashnet":
            arguments["backbone"] = config.backbone
        model = create(config.model, bits=config.bits, deviation=config.hash_deviation, **arguments)
        if config.backbone_weights is not None:
            from paperzoo.engine.weights import read_state

            try:
                model.load_backbone(read_state(Path(config.backbone_weights).expanduser()))
            except ValueError as error:
                raise PaperZooError(f"{config.backbone_weights}: {error}") from None
        return model

    def make_learner(self) -> None:
        """Momentum for all, the hash layer ten times faster: it starts from nothing, the backbone from ImageNet (sec. 4.1)."""
        config = self.config
        fresh = list(self.model.hash_layer.parameters())
        others = [p for p in self.model.parameters() if not any(p is q for q in fresh)]
        groups = [{"params": others}, {"params": fresh, "lr": config.learning_rate * config.hash_rate}]
        if config.pretrain_steps:
            self.head = self.runtime.place(nn.Linear(self.model.num_features, len(self.facts["labels"])))
            groups.append({"params": list(self.head.parameters())})
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(groups, config.learning_rate, weight_decay=config.weight_decay)
        else:
            momentum = {"momentum": config.momentum, "nesterov": config.nesterov}
            self.optimizer = torch.optim.SGD(groups, config.learning_rate, weight_decay=config.weight_decay, **momentum)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)
        alpha = config.alpha if config.alpha is not None else 10 / config.bits
        self.objective = PairwiseLikelihood(alpha, config.balance, config.continuous, self.runtime)

    def beta(self, step: int) -> float:
        """The slope of tanh at a step, counted from the first that learns codes."""
        config = self.config
        if config.continuation == "growing":
            return growing_beta(step, config.beta_gamma, config.beta_power, config.beta_every)
        if config.continuation == "stages":
            return staged_beta(step, config.steps - config.pretrain_steps, config.betas)
        return 1.0

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        """Every other image of the batch is paired with each of those between, so that pairs do not depend on the number of processes."""
        images, labels = batch
        self.model.train()
        at = self.runtime.step - self.config.pretrain_steps
        if at < 0:
            return self.pretrain(images, labels)
        beta = self.beta(at)
        self.model.beta.fill_(beta)
        codes = self.model(images)
        loss = self.objective(codes[::2], codes[1::2], labels[::2], labels[1::2])
        return {"loss": loss, "beta": beta, "binary": codes.detach().abs().mean()}

    def pretrain(self, images: Tensor, labels: Tensor) -> dict:
        """One step of the stand-in for ImageNet: the backbone learns to tell the classes apart."""
        logits = self.head(self.model.backbone.embed(images)).float()
        if labels.ndim == 2:
            return {"loss": F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(labels)}
        return {"loss": F.cross_entropy(logits, labels)}

    def figures(self) -> dict[str, Image.Image]:
        """Those of the task, and how near to -1 and 1 the relaxed codes have come."""
        from paperzoo.engine.pictures import new_figure, to_picture

        codes, _ = self.encode(self.test_data, self.encode_query)
        figure, axes = new_figure(4.2, 3.2)
        axes.hist(codes.flatten().cpu().tolist(), bins=60, range=(-1, 1))
        axes.set_xlabel("relaxed code tanh(beta z), held-out images")
        return super().figures() | {"What the sign still changes": to_picture(figure)}


PRESETS = {
    # 12 bits in seconds: half of the steps are for what ImageNet is in the paper, then beta grows to 7.1, as over the released
    # code's 10,000 iterations. The hash layer has 64 features, not 4096, and starts larger; alpha is below 10 / 12, where all
    # codes may run into one corner.
    "embedded": Config(
        backbone="resnet20_cifar",
        bits=12,
        data="digits",
        map_at=None,
        image_size=16,
        augment="shift",
        normalise="data",
        alpha=0.25,
        beta_gamma=0.8333,
        beta_every=2,
        hash_deviation=0.1,
        hash_rate=1.0,
        pretrain_steps=60,
        steps=120,
        batch_size=64,
        learning_rate=0.05,
        nesterov=True,
        schedule="cosine",
        warmup_steps=5,
    ),
    # the released lists of COCO; --backbone-weights is torchvision's AlexNet
    "published": Config(workers=8),
    "published_imagenet": Config(data="hashnet_imagenet", map_at=1000, learning_rate=2e-4, workers=8),
    "published_nus_wide": Config(data="hashnet_nuswide_81", workers=8),
}
RECIPE = HashNetRecipe


def classified(config: Config) -> retrieval.Config:
    """The task's default recipe: the same network and budget, the embedding learned by telling classes apart, then signs."""
    return retrieval.Config(
        model=config.backbone,
        data=config.data,
        embedding_size=config.bits,
        metric="hamming",
        image_size=config.image_size,
        augment=config.augment,
        normalise=config.normalise,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=0.1,  # better here than 0.05
        optimizer=config.optimizer,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
    )


BASELINE = (RetrievalRecipe, classified(PRESETS["embedded"]))
