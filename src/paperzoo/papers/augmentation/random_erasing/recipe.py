"""Random Erasing: the task's classification recipe with one more augmentation, measured also where part of the image is covered.

The occlusion test is the paper's (sec. 5, robustness to occlusion): a region of every test image is covered with random values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.papers.augmentation.random_erasing.technique import RandomErasing
from paperzoo.tasks import classification
from paperzoo.tasks.classification import ClassificationRecipe

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class BaselineConfig(classification.Config):
    """The default recipe's settings, and how it is tested under occlusion."""

    occlusion: tuple[Share, ...] = (0.1, 0.2, 0.3, 0.4)  # covered parts of the test images; the accuracies are averaged


@dataclass(frozen=True)
class Config(BaselineConfig):
    """Sec. 5.1: one setting for CIFAR-10, CIFAR-100, Fashion-MNIST and ImageNet."""

    erase_probability: Annotated[float, Field(ge=0, le=1)] = 0.5  # p
    smallest_area: Share = 0.02  # s_l
    largest_area: Share = 0.4  # s_h
    smallest_ratio: Annotated[float, Field(gt=0, le=1)] = 0.3  # r_1; r_2 is 1 / r_1
    erase_value: Literal["random", "mean", "black", "white"] = (
        "random"  # RE-R, RE-M, RE-0, RE-255; table 5: random is best
    )


class OccludedTest(ClassificationRecipe):
    """The task's default recipe; only its evaluation knows that images may be covered."""

    config: BaselineConfig

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """As the task's, and `occluded_accuracy`: the mean over the configured covered areas, the same covers at each call."""
        return super().evaluate(split) | {"occluded_accuracy": self.occluded_accuracy(split)}

    @torch.inference_mode()
    def occluded_accuracy(self, split: str) -> float:
        model, covers = self.deployed.eval(), self.covers()
        view, to_input = nn.Sequential(*self.view(self.config.image_size)), nn.Sequential(*self.to_input())
        data = self.open(split).with_transform(view)
        tally = torch.zeros(2, device=self.runtime.device)
        for n, (images, labels) in enumerate(self.runtime.loader(data, 256, self.config.workers)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.runtime.rank * 1_000_003 + n)  # covers do not depend on the run's seed or step
                covered = [to_input(cover(images.cpu())) for cover in covers]
            guesses = [model(each.to(self.runtime.device)).argmax(1) for each in covered]
            tally[0] += sum((guess == labels).sum() for guess in guesses)
            tally[1] += len(labels) * len(guesses)
        hits, total = self.runtime.mean(tally).tolist()
        return hits / total

    def covers(self) -> list[RandomErasing]:
        """Each covers one region of exactly the given area in every image of a batch, with random values."""
        return [RandomErasing(p=1.0, sl=area, sh=area, r1=0.5, r2=2.0) for area in self.config.occlusion]


class RandomErasingRecipe(OccludedTest):
    """The default recipe with Random Erasing after its own augmentation, on pixels, before normalisation."""

    config: Config

    def augmentation(self) -> list[nn.Module]:
        c = self.config
        value = {"black": 0, "white": 255}.get(c.erase_value, c.erase_value)
        ratio = (c.smallest_ratio, 1 / c.smallest_ratio)
        return [
            *super().augmentation(),
            RandomErasing(c.erase_probability, c.smallest_area, c.largest_area, *ratio, value),
        ]

    def figures(self) -> dict[str, Image.Image]:
        """What the network is trained on, and covered test images with the answers."""
        from paperzoo.engine.pictures import tile

        raw = self.open("train")
        augment = nn.Sequential(*self.augmentation())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seen = [picture(augment(raw[i % len(raw)][0])) for i in range(16)]
            test = self.test_data.with_transform(nn.Sequential(*self.view(self.config.image_size)))
            covers = self.covers()
            hidden = [covers[i % len(covers)](test[i % len(test)][0]) for i in range(16)]
        answers = [self.draw(x, result) for x, result in zip(hidden, self.predict(hidden), strict=True)]
        return {"Training images": tile(seen, 8), "Covered test images": tile(answers, 8)} | super().figures()


def picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.NEAREST)


EMBEDDED = BaselineConfig(
    model="resnet20_cifar",
    data="digits",
    image_size=16,
    augment="shift",  # a mirrored digit is no digit
    steps=200,
    batch_size=64,
    learning_rate=0.1,
    weight_decay=5e-4,
    schedule="cosine",
)
PRESETS = {
    "embedded": Config(**asdict(EMBEDDED)),
    # sec. 5.1, as the released code: WRN-28-10, 300 epochs, the rate divided by ten after 150 and 225
    "published": Config(
        model="wide_resnet28_10",
        data="cifar10",
        image_size=32,
        augment="flip_shift",
        steps=300 * 391,
        batch_size=128,
        learning_rate=0.1,
        nesterov=False,
        weight_decay=5e-4,
        schedule="step",
        milestones=(0.5, 0.75),
        workers=8,
    ),
}
RECIPE = RandomErasingRecipe
BASELINE = (OccludedTest, EMBEDDED)
