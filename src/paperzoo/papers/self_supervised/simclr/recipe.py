"""SimCLR: an encoder that learns, without labels, to recognise two random views of an image as the same.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020, algorithm 1. Any network
with `embed` can be the encoder; the paper's is ResNet-50, with a wide batch, LARS and many epochs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from paperzoo.data.images import Images, open_images, to_image
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.papers.self_supervised.simclr.technique import (
    LARS,
    ColourDistortion,
    NTXent,
    ProjectionHead,
    lars_groups,
    linear_probe,
    nearest_neighbours,
    warmup_cosine,
)
from paperzoo.tasks.classification import Count, Fraction, Positive

NonNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Config:
    """Section 2 and appendix A: ResNet-50 on ImageNet for 100 epochs."""

    model: str = "resnet50"
    data: str = "imagenet"
    image_size: Count = 224
    flip: bool = True
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.08  # of the area
    colour_strength: NonNegative = 1.0  # 0.5 on CIFAR-10
    blur: bool = True  # not on CIFAR-10
    central: Annotated[float, Field(gt=0, le=1)] = 0.875  # the part of the side that evaluation sees
    projection_features: Count = 128
    projection_layers: Count = 2
    temperature: Positive = 0.1  # best with 100 epochs and batches of 4096; 0.5 for smaller batches
    batch_size: Count = 4096
    steps: Count = 31_279  # 100 epochs
    warmup_steps: Annotated[int, Field(ge=0)] = 3_127  # 10 epochs
    learning_rate: Positive = 0.3
    scaling: Literal["linear", "sqrt", "none"] = "linear"  # times batch_size / 256, times sqrt(batch_size) or as it is
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 1e-6
    probe_labels: Count | None = None  # labels of each class for the linear probe and the neighbours; None: all
    probe_draws: Count = 1  # of such labels; the mean over them is reported
    probe_decay: NonNegative = 1e-4
    neighbours: Count = 20
    neighbour_temperature: Positive = 0.07
    compare: bool = False  # evaluate the untrained encoder and the raw pixels as well; no choice for large images
    workers: Annotated[int, Field(ge=0)] = 16


@dataclass(frozen=True)
class Representation:
    """What the encoder sees in one image: h in the paper, (num_features,)."""

    values: list[float]


class Encoder(nn.Module):
    """A classifier up to its head, (B, 3, H, W) -> (B, num_features).

    Its weights are stored under the classifier's own names, the idle head included, so that any recipe of image
    classification can start from them (`weights`).
    """

    prefix = "network."

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.num_features: int = network.num_features
        self.paperzoo = getattr(network, "paperzoo", {})
        head = head_parameters(network)
        for name, p in network.named_parameters():
            p.requires_grad_(name not in head)
        self.register_state_dict_post_hook(rename_stored)
        self.register_load_state_dict_pre_hook(rename_loaded)

    def forward(self, images: Tensor) -> Tensor:
        return self.network.embed(images)


def head_parameters(network: nn.Module) -> set[str]:
    """The names of what `reset_classifier` replaces: nothing runs through it here."""
    other = copy.deepcopy(network)
    before = dict(other.named_parameters())
    other.reset_classifier(1)
    return {name for name, p in other.named_parameters() if before.get(name) is not p}


def rename_stored(module: Encoder, state: dict, prefix: str, _: dict) -> None:
    for name in [name for name in state if name.startswith(prefix + module.prefix)]:
        state[prefix + name.removeprefix(prefix + module.prefix)] = state.pop(name)


def rename_loaded(module: Encoder, state: dict, prefix: str, *_: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + module.prefix + name.removeprefix(prefix)] = state.pop(name)


class TwoViews:
    """Two random crops of an image, each mirrored half of the time: uint8 (3, H, W) -> two of (3, size, size)."""

    def __init__(self, size: int, smallest: float, flip: bool) -> None:
        crop = v2.RandomResizedCrop(size, scale=(smallest, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        self.crop = v2.Compose([crop, v2.RandomHorizontalFlip()]) if flip else crop

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.crop(image), self.crop(image)


def peak_rate(config: Config) -> float:
    """The learning rate after warm-up (sec. 2.2 and appendix B.1)."""
    factors = {"linear": config.batch_size / 256, "sqrt": config.batch_size**0.5, "none": 1.0}
    return config.learning_rate * factors[config.scaling]


class SimCLR(Recipe):
    """Labels are used by `evaluate` alone."""

    config: Config
    reads_images = True
    monitor = ("accuracy", "max")

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            self.facts = {"labels": open_images(config.data, "train").labels}
        self.model = runtime.place(Encoder(self.build()))
        self.projection = runtime.place(
            ProjectionHead(self.model.num_features, config.projection_features, config.projection_layers)
        )
        self.distort = ColourDistortion(config.colour_strength, config.blur)
        self.contrast = NTXent(config.temperature, runtime)
        groups = lars_groups([self.model, self.projection], config.weight_decay)
        self.optimizer = LARS(groups, peak_rate(config), config.momentum)
        factor = lambda step: warmup_cosine(step, config.steps, config.warmup_steps)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def build(self) -> nn.Module:
        return create(self.config.model)

    # -- learning ------------------------------------------------------------------------------------------------

    @cached_property
    def batches(self):
        config = self.config
        views = TwoViews(config.image_size, config.smallest_crop, config.flip)
        data = open_images(config.data, "train").with_transform(views)
        return self.runtime.batches(data, config.batch_size, workers=config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Two views of B images, float32 (B, 3, H, W) in [0, 1]. Cropped by the workers, coloured on the device."""
        (first, second), _ = self.batches.next()
        return self.distorted(first, "first view"), self.distorted(second, "second view")

    def distorted(self, images: Tensor, stream: str) -> Tensor:
        """The random numbers are drawn for the whole batch over all processes, and each takes its rows."""
        count = len(images) * self.runtime.world
        noise = torch.rand(count, self.distort.noise, generator=self.runtime.rng(stream, per_rank=False))
        return self.distort(images.float() / 255, self.runtime.shard(noise))

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        """Algorithm 1: h = f(x), z = g(h), NT-Xent on z. Both views pass together and share batch statistics."""
        self.model.train()
        self.projection.train()
        first, second = self.projection(self.model(torch.cat(batch))).chunk(2)
        return {"loss": self.contrast(first, second)}

    # -- what the features are worth -----------------------------------------------------------------------------

    def view(self) -> v2.Compose:
        size, whole = self.config.image_size, round(self.config.image_size / self.config.central)
        crop = [v2.CenterCrop(size)] if whole != size else []
        shape = whole if crop else (size, size)
        resize = v2.Resize(shape, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([resize, *crop, v2.ToDtype(torch.float32, scale=True)])

    @torch.inference_mode()
    def features(self, data: Images, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """h (N, num_features) and labels (N,) of a whole set, the same on every process."""
        encoder.eval()
        rows, labels = [], []
        for images, some in self.runtime.loader(data.with_transform(self.view()), 256, self.config.workers):
            rows.append(encoder(images).float())
            labels.append(some)
        share = -(-len(data) // self.runtime.world)  # processes may have one row more or less: padded with label -1
        device, width = self.runtime.device, encoder.num_features
        h, y = torch.zeros(share, width, device=device), torch.full((share,), -1, device=device)
        if rows:
            found = torch.cat(rows)
            h[: len(found)], y[: len(found)] = found, torch.cat(labels)
        h, y = self.runtime.gather(h), self.runtime.gather(y)
        return h[y >= 0], y[y >= 0]

    @torch.inference_mode()
    def worth(self, encoder: nn.Module, known: list[Images], test: Images) -> dict[str, float]:
        """Accuracy on `test` of a linear classifier and of nearest neighbours, the mean over the labelled sets `known`."""
        config, classes = self.config, len(self.facts["labels"])
        queries, truth = self.features(test, encoder)
        new = lambda: MulticlassAccuracy(classes, average="micro", sync_on_compute=False)  # noqa: E731
        linear, knn = new().to(self.runtime.device), new().to(self.runtime.device)
        for some in known:
            features, labels = self.features(some, encoder)
            linear.update(linear_probe(features, labels, classes, config.probe_decay)(queries), truth)
            voted = nearest_neighbours(
                features, labels, queries, classes, config.neighbours, config.neighbour_temperature
            )
            knn.update(voted, truth)
        return {"accuracy": float(linear.compute()), "knn_accuracy": float(knn.compute())}

    def untrained(self) -> Encoder:
        """The encoder as it was before the first step: the seed makes the same weights again."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.runtime.key("initialise"))
            return Encoder(self.build()).to(self.runtime.device)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Top-1 accuracy of a linear classifier and of nearest neighbours, both on frozen features (sec. 4.2, B.8).

        With `compare`, the same of the untrained encoder and of the raw pixels; `margin` is by how much the features
        are ahead of the better of the two, in that of the two evaluations where they are less ahead.
        """
        config, train, test = self.config, open_images(self.config.data, "train"), open_images(self.config.data, split)
        known = [train]
        if config.probe_labels is not None:
            seeds = range(self.runtime.seed, self.runtime.seed + 1000 * config.probe_draws, 1000)
            known = [train.few(config.probe_labels, seed) for seed in seeds]
        metrics = self.worth(self.model, known, test)
        if not config.compare:
            return metrics
        pixels = Encoder(Pixels(config.image_size)).to(self.runtime.device)
        others = {"untrained": self.worth(self.untrained(), known, test), "pixels": self.worth(pixels, known, test)}
        ahead = [value - max(other[name] for other in others.values()) for name, value in metrics.items()]
        named = {f"{kind}_{name}": value for kind, other in others.items() for name, value in other.items()}
        return metrics | named | {"margin": min(ahead)}

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Representation]:
        """Paths, PIL images or arrays to their representations."""
        model, view, results = self.model.eval(), self.view(), []
        for start in range(0, len(inputs), 64):
            images = torch.stack([view(to_image(value)) for value in inputs[start : start + 64]])
            results += [Representation(h.tolist()) for h in model(images.to(self.runtime.device)).float().cpu()]
        return results

    def samples(self, folder: Path) -> list[str]:
        """Four held-out images, written as PNG files."""
        data, paths = open_images(self.config.data, "test"), []
        for i in range(0, len(data), max(1, len(data) // 4))[:4]:
            paths.append(str(folder / f"{i:05d}.png"))
            Image.fromarray(data[i][0].permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor]:
        size = self.config.image_size
        return (torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def figures(self) -> dict[str, Image.Image]:
        """Pairs of views, and held-out images each followed by the training images nearest to it."""
        from paperzoo.engine.pictures import tile

        pairs = [picture(view) for pair in zip(*(v[:16].cpu() for v in self.batch()), strict=True) for view in pair]
        train, test = (open_images(self.config.data, split) for split in ("train", "test"))
        known = [train[i][0] for i in range(0, len(train), max(1, len(train) // 1000))]
        asked = [test[i][0] for i in range(0, len(test), max(1, len(test) // 6))[:6]]
        bank, queries = (torch.tensor([h.values for h in self.predict(images)]) for images in (known, asked))
        bank, queries = nn.functional.normalize(bank, dim=1), nn.functional.normalize(queries, dim=1)
        view, rows = self.view(), []
        for image, found in zip(asked, (queries @ bank.T).topk(7, dim=1).indices.tolist(), strict=True):
            rows += [picture(view(image)), *(picture(view(known[k])) for k in found)]
        return {"Two views of each image": tile(pairs, 8), "Held-out images and their neighbours": tile(rows, 8)}


def picture(image: Tensor, size: int = 64) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


class Pixels(nn.Module):
    """The pixels as they are, in place of features."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = 3 * size * size
        self.scale = nn.Parameter(torch.ones(1, 1))

    def embed(self, images: Tensor) -> Tensor:
        return (images * self.scale[0, 0]).flatten(1)

    def reset_classifier(self, num_classes: int) -> None:
        pass


class RawPixels(SimCLR):
    """The baseline: raw pixels without an encoder, under the same evaluation."""

    def build(self) -> nn.Module:
        return Pixels(self.config.image_size)


PRESETS = {
    # a mirrored digit is no digit, and a small part of one is any digit
    "embedded": Config(
        model="wide_resnet10_2",
        data="digits",
        image_size=12,  # the scans have 8 x 8 pixels
        flip=False,
        smallest_crop=0.3,
        colour_strength=0.5,
        blur=False,
        central=1.0,
        temperature=0.5,
        batch_size=128,
        steps=480,
        warmup_steps=20,
        learning_rate=20.0,  # a LARS step moves a tensor by a thousandth of this, and there are few steps
        scaling="none",
        weight_decay=1e-6,
        probe_labels=10,
        probe_draws=5,
        neighbours=1,  # on a fifth of the training scans, 5, 10 and 20 were no better for raw pixels
        compare=True,
        workers=0,
    ),
    "published": Config(),
}
RECIPE = SimCLR
BASELINE = (RawPixels, replace(PRESETS["embedded"], steps=1))
