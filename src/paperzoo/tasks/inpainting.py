"""Inpainting: fill the holes of a picture so that nobody sees where they were.

A batch is (images, masks): float32 (B, 3, H, W) in [0, 1], complete; float32 (B, 1, H, W), 1 where the picture is known, 0 in the hole. A network maps (images,
masks) to pictures (B, 3, H, W), about in [0, 1]; what the images hold inside the holes it must not read (evaluation and prediction set it to 0). In
training it may return a dictionary with "out" and whatever its loss needs (a first, coarse answer). The answer is always the composite: the given
pixels where they are known, the network's in the holes. A prediction is an `Inpainted`.

Metrics are averaged over the test pictures, each with a mask of its own that is the same in every evaluation: "psnr" (dB) and "ssim" of the composite on all three
channels, "l1" the mean absolute difference in percent of the range; and "psnr" by the share of the picture that is hole, as the papers' tables have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from paperzoo.data.holes import Holes, open_pictures, to_marked
from paperzoo.data.picture_files import as_float, as_pixels, to_pil, with_channels
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.tasks.restoration import psnr, ssim
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

BINS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # upper ends of the papers' classes of hole shares


@dataclass(frozen=True)
class Inpainted:
    """A filled picture: `image` at the size and with the bits of the given one where Pillow has them; `hole`: the share that was filled, in [0, 1].

    pixels: uint8 or uint16 (1 or 3, H, W): the same with all bits. Known pixels are the given ones, unchanged.
    """

    image: Image.Image
    hole: float
    pixels: Tensor = field(repr=False)


@dataclass(frozen=True)
class Config:
    """The default recipe: mean absolute error of the hole and of the rest, Adam."""

    model: str = "pconv_unet"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "photograph_parts"  # the embedded pictures, or a folder of clean ones
    image_size: Count = (
        256  # training pictures: the shorter side becomes this long, then a square is cut out; tests: its middle
    )
    holes: str = "free_form"  # or "rectangle", or a folder of mask files, white where the hole is
    hole_share: tuple[Fraction, Fraction] = (0.0, 0.6)  # least and most of a picture that is hole
    flip: bool = True  # mirror half of the training pictures
    weights: str | None = None  # start from these weights
    steps: Count = 500_000
    batch_size: Count = 8
    hole_weight: NotNegative = 6.0  # of the error inside the hole, against 1 for the rest
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 2e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = True
    schedule: Literal["constant", "step", "cosine"] = "constant"
    milestones: tuple[Fraction, ...] = ()
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    workers: Annotated[int, Field(ge=0)] = 0


class WithHoles(Dataset):
    """Pictures made ready, each with a mask: drawn anew for every batch in training, fixed by its number in tests."""

    def __init__(self, data: Any, transform: nn.Module, holes: Holes, fixed: bool) -> None:
        self.data, self.transform, self.holes, self.fixed = data, transform, holes, fixed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        seed = i if self.fixed else int(torch.randint(2**62, ()))
        known = self.holes(torch.Generator().manual_seed(seed))
        return as_float(self.transform(self.data[i])), known.float()[None]


class InpaintingRecipe(Recipe):
    """The task's default recipe. Papers override `loss`, or `step` where more than one network learns."""

    config: Config
    reads_images = True
    monitor = ("psnr", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        self.model = runtime.place(create(config.model, weights=config.weights, **config.model_arguments))
        self.average = running_average(self.model, config.ema_decay)
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(config, step)
        )

    # -- data ----------------------------------------------------------------------------------------------------

    @cached_property
    def train_set(self):
        return open_pictures(self.config.data, "train")

    @cached_property
    def test_set(self):
        return open_pictures(self.config.data, "test")

    def prepared(self, split: str) -> WithHoles:
        """A split as the network sees it."""
        config, size = self.config, self.config.image_size
        train = split == "train"
        steps: list[nn.Module] = [v2.Resize(size, antialias=True)]
        steps += [v2.RandomCrop(size) if train else v2.CenterCrop(size)]
        steps += [v2.RandomHorizontalFlip()] if train and config.flip else []
        holes = Holes(config.holes, (size, size), config.hole_share)
        return WithHoles(self.train_set if train else self.test_set, v2.Compose(steps), holes, fixed=not train)

    @cached_property
    def batches(self):
        return self.runtime.batches(self.prepared("train"), self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, output: dict[str, Tensor], images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """{"loss": …} and its parts, of the network's answer in output["out"]."""
        error = (output["out"].float() - images).abs()
        hole, rest = (error * (1 - masks)).mean(), (error * masks).mean()
        return {"loss": rest + self.config.hole_weight * hole, "hole": hole.detach(), "rest": rest.detach()}

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, masks = batch
        self.model.train()
        output = self.model(images * masks, masks)
        return self.loss(output if isinstance(output, dict) else {"out": output}, images, masks)

    # -- scoring -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def complete(self, images: Tensor, masks: Tensor) -> Tensor:
        """The deployed network's composite in [0, 1] of float32 images (B, 3, H, W) and masks (B, 1, H, W)."""
        network = self.deployed.eval()
        out = network(images * masks, masks).float().clamp(0, 1)
        return images * masks + out * (1 - masks)

    def answers(self, split: str = "test") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Composites, images, masks, over this process's part of a split."""
        data = self.prepared(split)
        if split == "train":
            data.fixed = True
        for images, masks in self.runtime.loader(data, self.config.batch_size, self.config.workers):
            yield self.complete(images, masks), images, masks

    def scores(self, split: str = "test") -> Tensor:
        """For each picture the hole's share, PSNR, SSIM and mean absolute difference: float64 (N, 4), of all processes."""
        rows = []
        for found, images, masks in self.answers(split):
            for one, clean, mask in zip(found.split(1), images.split(1), masks.split(1), strict=True):
                share, error = 1 - float(mask.mean()), float((one - clean).abs().mean())
                rows.append([share, psnr(one, clean), ssim(one, clean), error])
        return torch.tensor(self.runtime.gather_objects(rows), dtype=torch.float64).view(-1, 4)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        table = self.scores(split)
        share, found, structure, error = table.unbind(1)
        metrics = {"psnr": float(found.mean()), "ssim": float(structure.mean()), "l1": 100 * float(error.mean())}
        low = 0.0
        for high in BINS:
            inside = (share > low) & (share <= high)
            if inside.any():
                metrics[f"psnr_to_{high:.0%}".replace("%", "")] = float(found[inside].mean())
            low = high
        return metrics

    # -- use -----------------------------------------------------------------------------------------------------

    def predict(self, inputs: list) -> list[Inpainted]:
        """Pictures with holes (see `paperzoo.data.holes.to_marked`) to filled ones of the same size, bits and channels."""
        results = []
        for value in inputs:
            pixels, known = to_marked(value)
            images = with_channels(as_float(pixels), 3)[None].to(self.runtime.device)
            masks = known.float()[None, None].to(self.runtime.device)
            found = with_channels(self.complete(images * masks, masks)[0].cpu(), len(pixels))
            bits = 8 if pixels.dtype == torch.uint8 else 16
            filled = torch.where(known, pixels.int(), as_pixels(found, bits).int()).to(pixels.dtype)
            results.append(Inpainted(to_pil(filled), 1 - float(known.float().mean()), filled))
        return results

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out pictures with transparent holes, written as PNG files."""
        paths, data = [], self.prepared("test")
        for i in range(0, len(data), max(1, len(data) // 8))[:8]:
            image, mask = data[i]
            paths.append(str(folder / f"{i:05d}.png"))
            to_pil(as_pixels(torch.cat([image * mask, mask]), 8)).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor, Tensor]:
        size = self.config.image_size
        rng = torch.Generator().manual_seed(0)
        known = torch.stack([Holes("rectangle", (size, size))(rng) for _ in range(2)])
        masks = known[:, None].float()
        return torch.rand(2, 3, size, size, generator=rng) * masks, masks

    def draw(self, value: Any, result: Inpainted) -> Image.Image:
        """The picture with its holes, and filled."""
        pixels, known = to_marked(value)
        image = with_channels(as_float(pixels), 3)
        return side_by_side([shown_holes(image, known), with_channels(as_float(result.pixels), 3)])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out pictures (with the hole, filled, true), and PSNR over the share of the picture that is missing."""
        from paperzoo.engine.pictures import new_figure, tile, to_picture

        data = self.prepared("test")
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:8].tolist()
        images, masks = (
            torch.stack(rows).to(self.runtime.device) for rows in zip(*(data[i] for i in chosen), strict=True)
        )
        found = self.complete(images, masks).cpu()
        images, masks = images.cpu(), masks.cpu()
        rows = [
            side_by_side([shown_holes(image, mask[0] > 0), filled, image])
            for image, mask, filled in zip(images, masks, found, strict=True)
        ]
        table = self.scores()
        figure, axes = new_figure()
        axes.plot(100 * table[:, 0].numpy(), table[:, 1].numpy(), ".")
        axes.set(xlabel="hole, % of the picture", ylabel="PSNR in dB")
        title = "Held-out pictures: with the hole, filled, true"
        return {title: tile(rows, 2), "How well holes of different sizes are filled": to_picture(figure)}


def shown_holes(image: Tensor, known: Tensor) -> Tensor:
    """A picture (3, H, W) in [0, 1] with its hole in one bright colour that pictures seldom have."""
    return torch.where(known, image, torch.tensor([0.9, 0.1, 0.9]).view(3, 1, 1))


def side_by_side(pictures: list[Tensor]) -> Image.Image:
    """Pictures (3, H, W) in [0, 1] in a row, small ones enlarged."""
    from paperzoo.engine.pictures import tile

    height, width = pictures[0].shape[-2:]
    factor = max(1, round(160 / min(height, width)))
    size = (width * factor, height * factor)
    shown = [to_pil(as_pixels(p, 8)).resize(size, Image.Resampling.NEAREST) for p in pictures]
    return tile(shown, len(shown), 2)
