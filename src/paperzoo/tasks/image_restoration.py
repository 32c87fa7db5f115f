"""Trained image restoration: denoising, super-resolution, deblurring, JPEG artefacts, or whatever pairs of pictures show.

A batch is (degraded, clean): float32 (B, C, h, w) and (B, C, h * scale, w * scale), C 1 (grey), 3 (RGB) or 4, in [0, 1]; Gaussian noise reaches
beyond it, as published. The contract with a network:

- it maps degraded to restored images of any height and width (what it needs to be a multiple of, it pads and crops itself), in [0, 1]
  on both sides; a mean or a range of 255 is its own affair. In training it may return a list or tuple of tensors, the restored images last;
- its function takes `in_channels` where it can have others than 3, and `scale` where one function makes several; both are given by the recipe;
- `network.scale`: how many times larger the restored image is (1 where missing). Super-resolution by a network of scale 1 gets the
  degraded image enlarged bicubically first, as SRCNN, VDSR and DnCNN-3 do;
- `network.receptive_radius` (optional): how many pixels of the degraded image around a pixel its answer depends on. Large pictures
  are restored in tiles with that much around them, and the result is the whole picture's; without it, or where it is larger than a
  quarter of a tile, tiles overlap by half and are blended.

A prediction is a `RestoredImage`: the size (times scale), the bits and the alpha of what was given.

Metrics are those of the papers: the answer rounded to 8 bits, PSNR and SSIM of each picture averaged over the set; super-resolution on
the luminance and without a border of `factor` pixels, everything else on all channels. "psnr_before" is that of what was given (for super-resolution, of
bicubic interpolation), "psnr_gain" what was won. The noise of a test picture follows from its place in the set alone, so that it is the same for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from paperzoo.blocks.tiling import tiled
from paperzoo.data.degradations import Degradation, imresize, to_8_bits
from paperzoo.data.picture_files import as_float, as_pixels, save_pixels, to_pil, to_pixels, with_channels
from paperzoo.data.restoration import Pictures, open_restoration
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.restoration import psnr, side_by_side, ssim
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Quality = Annotated[int, Field(ge=1, le=100)]


@dataclass(frozen=True)
class RestoredImage:
    """The answer for one picture.

    image: as a PIL image (colour with 16 bits is shown with 8). pixels: uint8 or uint16 (C, H, W), all there is; C counts alpha.
    """

    image: Image.Image
    pixels: Tensor = field(repr=False)
    bits: int = 8
    scale: int = 1

    def save(self, path: str | Path) -> None:
        """Write all bits and the alpha to a .png or .tif; other formats take 8 bits."""
        save_pixels(path, self.pixels)


@dataclass(frozen=True)
class Config:
    """The default recipe: the mean absolute error on random patches, Adam, flips and quarter turns."""

    model: str = "dncnn_s"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)  # more for the model's function
    data: str = "photographs"  # or a folder of clean pictures or of pairs, or a picture
    degraded: str | None = None  # a folder with the degraded pictures of the clean ones in `data`
    test_data: str | None = None  # all of it is tested on, in place of the data's own test split
    channels: Literal[1, 3, 4] = 3
    task: Literal["denoise", "super_resolution", "deblur", "jpeg", "general"] = "denoise"  # general: all but deblur
    sigma: NotNegative | tuple[NotNegative, NotNegative] = 25.0  # of the noise, in 1/255; a range is drawn from
    factor: Annotated[int, Field(ge=1, le=8)] = 1  # of super-resolution
    blur_kind: Literal["gaussian", "motion"] = "gaussian"
    blur: Positive | tuple[Positive, Positive] = 1.6  # pixels: deviation of the Gaussian, length of the movement
    quality: Quality | tuple[Quality, Quality] = 40  # of JPEG
    test_sigma: NotNegative | None = None  # what is tested where training draws from a range; its middle if not given
    test_blur: Positive | None = None
    test_quality: Quality | None = None
    patch_size: Count = 48  # pixels of the degraded picture
    flip: bool = True  # random flips and quarter turns
    weights: str | None = None
    loss: Literal["l1", "mse", "charbonnier", "psnr"] = "l1"
    charbonnier: Positive = 1e-3  # its epsilon
    steps: Count = 300_000
    batch_size: Count = 16
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: Positive = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # of Adam and AdamW
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = True  # False: no weight decay on biases and normalisation layers
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (0.66,)  # of the steps, for "step"
    gamma: Positive = 0.5  # the factor at a milestone
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    self_ensemble: bool = False  # the mean over eight flips and turns, for testing and predicting
    tile: Annotated[int, Field(ge=32)] = 256  # pixels; larger pictures are restored in squares of this side
    workers: Annotated[int, Field(ge=0)] = 0


# -- patches -----------------------------------------------------------------------------------------------------------


def dihedral(images: Tensor, k: int) -> Tensor:
    """One of the eight flips and quarter turns of (…, H, W), k in 0 … 7."""
    images = images.flip(-1) if k & 1 else images
    images = images.flip(-2) if k & 2 else images
    return images.transpose(-1, -2) if k & 4 else images


def undo_dihedral(images: Tensor, k: int) -> Tensor:
    images = images.transpose(-1, -2) if k & 4 else images
    images = images.flip(-2) if k & 2 else images
    return images.flip(-1) if k & 1 else images


def mirrored(image: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) continued by its mirror image until it has this height and width."""
    for axis, wanted in ((1, height), (2, width)):
        extent = image.shape[axis]
        if extent < wanted:
            places = torch.arange(wanted).remainder(2 * extent)
            places = torch.where(places < extent, places, 2 * extent - 1 - places)
            image = image.to(torch.float32).index_select(axis, places).to(image.dtype)
    return image


class Patches(Dataset):
    """Random patches of pictures, as pairs float32 (C, p, p) and (C, p * scale, p * scale). Drawn from torch's global generator.

    A part of a clean picture is degraded with its surroundings, so that it is what the degraded whole picture has there.

    Args:
        degradations: one is drawn for each patch: first the group, then one in it. Pairs need none, but for its scale.
    """

    def __init__(
        self,
        pictures: Pictures,
        degradations: Sequence[Sequence[Degradation]],
        patch_size: int,
        channels: int = 3,
        flip: bool = True,
    ) -> None:
        self.pictures, self.degradations = pictures, degradations
        self.patch_size, self.channels, self.flip = patch_size, channels, flip

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        degraded, clean = self.pictures[index]
        group = self.degradations[int(torch.randint(len(self.degradations), ()))]
        chosen = group[int(torch.randint(len(group), ()))]
        if degraded is None:
            pair = self.synthetic(clean, chosen)
        else:
            pair = self.recorded(degraded, clean, chosen)
        if self.flip:
            k = int(torch.randint(8, ()))
            pair = tuple(dihedral(image, k) for image in pair)
        return tuple(image.contiguous() for image in pair)

    def synthetic(self, clean: Tensor, degradation: Degradation) -> tuple[Tensor, Tensor]:
        scale, unit = degradation.scale, degradation.unit
        side = self.patch_size * scale
        clean = mirrored(clean, side, side)
        height, width = (n // unit * unit if n >= side + unit else n for n in clean.shape[1:])
        spans = []
        for extent in (height, width):
            first = int(torch.randint((extent - side) // scale + 1, ())) * scale
            low = max(0, first - degradation.reach * scale) // unit * unit
            high = min(extent, -(-(first + side + degradation.reach * scale) // unit) * unit)
            spans.append((first, low, high))
        (top, *rows), (left, *columns) = spans
        part = with_channels(as_float(clean[:, slice(*rows), slice(*columns)]), self.channels)
        spoiled = degradation(part)
        y, x = (top - rows[0]) // scale, (left - columns[0]) // scale
        p = self.patch_size
        return (
            spoiled[:, y : y + p, x : x + p],
            part[:, y * scale : y * scale + side, x * scale : x * scale + side],
        )

    def recorded(self, degraded: Tensor, clean: Tensor, degradation: Degradation) -> tuple[Tensor, Tensor]:
        if degradation.enlarge:
            degraded = imresize(degraded, size=tuple(clean.shape[1:]))
        scale, p = degradation.scale, self.patch_size
        degraded, clean = mirrored(degraded, p, p), mirrored(clean, p * scale, p * scale)
        top, left = (int(torch.randint(extent - p + 1, ())) for extent in degraded.shape[1:])
        low = degraded[:, top : top + p, left : left + p]
        high = clean[:, top * scale : (top + p) * scale, left * scale : (left + p) * scale]
        return tuple(with_channels(as_float(image), self.channels) for image in (low, high))


# -- the recipe --------------------------------------------------------------------------------------------------------


class ImageRestorationRecipe(Recipe):
    """The task's default recipe. Papers that differ override `training_data`, `loss` or `step`."""

    config: Config
    reads_images = True
    monitor = ("psnr", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.task == "super_resolution" and config.factor < 2:
            raise PaperZooError(f"factor is {config.factor}; super-resolution enlarges at least 2 times")
        self.model = runtime.place(self.build())
        self.scale = int(getattr(self.model, "scale", 1))
        wanted = config.factor if config.task == "super_resolution" else 1
        if self.scale not in (1, wanted):
            raise PaperZooError(
                f"{config.model} enlarges {self.scale} times; the task asks for {wanted} (option factor)"
            )
        if not self.facts:
            self.facts = {"scale": wanted, "channels": config.channels}
        self.optimizer = make_optimizer(config, self.model)
        if config.optimizer != "sgd":
            for group in self.optimizer.param_groups:
                group["betas"] = tuple(config.betas)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)
        self.average = running_average(self.model, config.ema_decay)

    def build(self) -> nn.Module:
        """The network by name, for the data's channels and scale where its function takes those."""
        from paperzoo.catalog.cards import variants

        config, arguments = self.config, dict(self.config.model_arguments)
        if config.model in variants():
            known = inspect.signature(getattr(variants()[config.model].module("model"), config.model)).parameters
            given = {"in_channels": config.channels}
            if config.task == "super_resolution":
                given["scale"] = config.factor
            arguments = {name: value for name, value in given.items() if name in known} | arguments
        return create(config.model, weights=config.weights, **arguments)

    def learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(self.config, step)

    # -- data ----------------------------------------------------------------------------------------------------

    def degradations(self) -> list[list[Degradation]]:
        """What training draws from: the groups of kinds, and in each the single ones."""
        c = self.config
        small = self.scale == 1
        one = {
            "denoise": [Degradation("denoise", sigma=c.sigma)],
            "super_resolution": [Degradation("super_resolution", factor=c.factor, enlarge=small)],
            "deblur": [Degradation("deblur", kind=c.blur_kind, blur=c.blur)],
            "jpeg": [Degradation("jpeg", quality=c.quality)],
        }
        if c.task == "general":  # DnCNN-3
            enlarged = [Degradation("super_resolution", factor=f, enlarge=True) for f in (2, 3, 4)]
            return [one["denoise"], enlarged, one["jpeg"]]
        return [one[c.task]]

    def test_degradations(self) -> list[Degradation]:
        """What is tested, one of each kind."""
        c = self.config
        chosen = [group[len(group) // 2] for group in self.degradations()]
        given = {
            "denoise": {"sigma": c.test_sigma},
            "deblur": {"blur": c.test_blur},
            "jpeg": {"quality": c.test_quality},
        }
        return [d.fixed(**given.get(d.task, {})) for d in chosen]

    @property
    def pair_scale(self) -> int:
        return self.config.factor if self.config.task == "super_resolution" else 1

    @cached_property
    def train_set(self) -> Pictures:
        return open_restoration(self.config.data, "train", self.pair_scale, self.config.degraded)

    @cached_property
    def test_set(self) -> Pictures:
        if self.config.test_data is not None:
            return open_restoration(
                self.config.test_data, "test" if self.config.test_data == "photographs" else "all", self.pair_scale
            )
        return open_restoration(self.config.data, "test", self.pair_scale, self.config.degraded)

    def training_data(self) -> Dataset:
        """What batches are drawn from: (degraded, clean) patches."""
        c = self.config
        return Patches(self.train_set, self.degradations(), c.patch_size, c.channels, c.flip)

    @cached_property
    def batches(self):
        return self.runtime.batches(self.training_data(), self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    def test_pair(self, index: int, degradation: Degradation, split: str = "test") -> tuple[Tensor, Tensor]:
        """A test picture, float32: degraded (C, h, w), with its own fixed noise, and clean (C, h * scale, w * scale)."""
        degraded, clean = (self.test_set if split == "test" else self.train_set)[index]
        clean = with_channels(as_float(clean), self.config.channels)
        if degraded is not None:
            degraded = with_channels(as_float(degraded), self.config.channels)
            return (imresize(degraded, size=tuple(clean.shape[1:])) if degradation.enlarge else degraded), clean
        height, width = (n // degradation.factor * degradation.factor for n in clean.shape[1:])
        clean = clean[:, :height, :width]
        return degradation(clean, torch.Generator().manual_seed(index)), clean

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, restored: Tensor, clean: Tensor) -> Tensor:
        """Of float32 images of the same shape; "psnr" is 10 log10 of each image's squared error (minus its PSNR)."""
        difference, kind = restored.float() - clean, self.config.loss
        if kind == "l1":
            return difference.abs().mean()
        if kind == "mse":
            return difference.square().mean()
        if kind == "charbonnier":
            return (difference.square() + self.config.charbonnier**2).sqrt().mean()
        return 10 * (difference.square().mean((1, 2, 3)) + 1e-8).log10().mean()

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        degraded, clean = batch
        self.model.train()
        restored = last(self.model(degraded))
        error = F.mse_loss(restored.detach().float(), clean)
        return {"loss": self.loss(restored, clean), "train_psnr": -10 * error.clamp(min=1e-10).log10()}

    # -- use -----------------------------------------------------------------------------------------------------

    def once(self, images: Tensor) -> Tensor:
        """The deployed network's answer, or the mean of its eight answers to the flipped and turned image."""
        network = self.deployed
        if not self.config.self_ensemble:
            return last(network(images)).float()
        found = [undo_dihedral(last(network(dihedral(images, k).contiguous())).float(), k) for k in range(8)]
        return torch.stack(found).mean(0)

    @torch.inference_mode()
    def restore(self, images: Tensor) -> Tensor:
        """Degraded (B, C, h, w) of any size, in tiles where they are large, to float32 (B, C, h * scale, w * scale) on the images' device."""
        self.deployed.eval()
        device, tile = self.runtime.device, self.config.tile
        height, width = images.shape[-2:]
        if max(height, width) <= tile:
            return self.once(images.to(device)).to(images.device)
        window = (min(tile, height), min(tile, width))
        radius = getattr(self.deployed, "receptive_radius", None)
        exact = radius is not None and 4 * radius <= tile
        margin = radius if exact else tile // 8
        margins = [margin if size > side else 0 for size, side in zip((height, width), window, strict=True)]
        overlap = 2 * margin / tile if exact else 0.5
        blend = "constant" if exact else "gaussian"
        return tiled(self.once, images, window, overlap, 1, blend, True, margin=margins, device=device)

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Means over the pictures of a split; with several kinds of degradation, also the PSNR of each."""
        data, kinds = (self.test_set if split == "test" else self.train_set), self.test_degradations()
        rows = range(self.runtime.rank, len(data), self.runtime.world)
        names = ("psnr", "ssim", "psnr_before")
        sums = torch.zeros(len(kinds), len(names) + 1, dtype=torch.float64)
        for i in rows:
            for k, kind in enumerate(kinds):
                degraded, clean = self.test_pair(i, kind, split)
                found = self.measure(self.restore(degraded[None]), degraded[None], clean[None])
                sums[k] += torch.tensor([*(found[name] for name in names), 1.0], dtype=torch.float64)
        sums = self.runtime.mean(sums).cpu()
        means = sums[:, :-1] / sums[:, -1:]
        result = dict(zip(names, means.mean(0).tolist(), strict=True))
        result["psnr_gain"] = result["psnr"] - result["psnr_before"]
        if len(kinds) > 1:
            result |= {f"psnr_{kind.task}": float(means[k, 0]) for k, kind in enumerate(kinds)}
        return result

    def measure(self, restored: Tensor, degraded: Tensor, clean: Tensor) -> dict[str, float]:
        """PSNR and SSIM of an answer (1, C, H, W) and of what was given, by the field's protocol."""
        super_resolution = self.config.task == "super_resolution"
        border = self.config.factor if super_resolution else 0
        how = {"y_channel": super_resolution and clean.shape[1] == 3, "border": border}
        restored = to_8_bits(restored)
        before = degraded
        if degraded.shape != clean.shape:
            before = to_8_bits(imresize(degraded, size=tuple(clean.shape[-2:])))
        return {
            "psnr": psnr(restored, clean, **how),
            "ssim": ssim(restored, clean, **how),
            "psnr_before": psnr(before, clean, **how),
        }

    def predict(self, inputs: list) -> list[RestoredImage]:
        """Paths, PIL images or arrays (see `paperzoo.data.picture_files.to_pixels`) to pictures with the same bits and alpha, `scale` times larger."""
        return [self.restored_pixels(to_pixels(value)) for value in inputs]

    @torch.inference_mode()
    def restored_pixels(self, pixels: Tensor) -> RestoredImage:
        bits, factor, channels = 8 * pixels.element_size(), self.facts["scale"], self.config.channels
        given = as_float(pixels)
        alpha = given[-1:] if channels != 4 and len(given) in (2, 4) else None
        colour = given if alpha is None else given[:-1]
        if channels == 1:  # a network for grey sees each colour alone
            images = colour[:, None]
        else:
            images = with_channels(given, channels)[None]
        if self.scale != factor:
            images = imresize(images, size=(factor * pixels.shape[1], factor * pixels.shape[2]))
        found = self.restore(images)
        found = found[:, 0] if channels == 1 else found[0]
        if channels == 3 and len(colour) == 1:
            found = with_channels(found, 1)
        if alpha is not None:
            larger = alpha if factor == 1 else imresize(alpha, size=tuple(found.shape[1:]))
            found = torch.cat([found, larger])
        restored = as_pixels(found, bits)
        return RestoredImage(to_pil(restored), restored, bits, factor)

    def samples(self, folder: Path) -> list[str]:
        """Degraded test pictures, at most eight, as PNG files; where the network wants them small, small."""
        paths, kinds = [], self.test_degradations()
        for n, i in enumerate(range(0, len(self.test_set), max(1, len(self.test_set) // 8))):
            kind = kinds[n % len(kinds)]
            degraded = self.test_pair(i, kind)[0]
            if self.scale != self.facts["scale"]:
                degraded = imresize(degraded, 1 / self.facts["scale"])
            paths.append(str(folder / f"{i:05d}_{kind.task}.png"))
            save_pixels(paths[-1], as_pixels(degraded, 8))
        return paths[:8]

    def example(self) -> tuple[Tensor]:
        size = self.config.patch_size
        return (torch.rand(2, self.config.channels, size, size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: RestoredImage) -> Image.Image:
        """The restored picture itself; saved as .png or .tif, with all its bits."""
        picture = result.image
        if result.bits == 16 and len(result.pixels) > 1:  # Pillow shows 8 of them, but the file keeps 16

            def save(path: Any, *arguments: Any, **options: Any) -> None:
                if isinstance(path, str | Path) and Path(path).suffix.lower() in (".png", ".tif", ".tiff"):
                    result.save(path)
                else:
                    Image.Image.save(picture, path, *arguments, **options)

            picture.save = save
        return picture

    def figures(self) -> dict[str, Image.Image]:
        """Parts of test pictures: what was given, the answer, the clean picture."""
        from paperzoo.engine.pictures import tile

        shown = []
        kinds = self.test_degradations()
        for n, i in enumerate(range(0, len(self.test_set), max(1, len(self.test_set) // 6))):
            if n == 6:
                break
            try:
                degraded, clean = self.test_pair(i, kinds[n % len(kinds)])
            except DataError:
                continue
            s = clean.shape[1] // degraded.shape[1]
            side = max(1, min(192 // s, *degraded.shape[1:]))
            top, left = ((extent - side) // 2 for extent in degraded.shape[1:])
            degraded = degraded[:, top : top + side, left : left + side]
            clean = clean[:, top * s : (top + side) * s, left * s : (left + side) * s]
            restored = self.restore(degraded[None])
            found = self.measure(restored, degraded[None], clean[None])
            pictures = {
                f"given {found['psnr_before']:.1f} dB": degraded,
                f"restored {found['psnr']:.1f} dB": restored[0],
                "clean": clean,
            }
            shown.append(
                side_by_side({k: to_pil(as_pixels(v[:3], 8)).convert("RGB") for k, v in pictures.items()}, 192)
            )
        return {"Test pictures: given, restored, clean": tile(shown, 2)} if shown else {}


def last(output: Any) -> Tensor:
    """The restored images of what a network returned."""
    return output[-1] if isinstance(output, list | tuple) else output
