"""Image restoration from one degraded image: denoising, inpainting, super-resolution.

Images are float32 (B, 3, H, W) in [0, 1]. A `Problem` is what is known: the observation y, the operator A with
y = A(x) (+ noise), the obvious answer that a method has to beat (the noisy image, the image with its holes filled by
the mean colour, bicubic interpolation) and, when it was degraded here, the clean image. A prediction is a `Restored`.

Metrics are computed by torchmetrics for each image and averaged: PSNR in dB at a peak of 1, SSIM with its usual
Gaussian window of 11. Super-resolution is measured as its papers do: on the luminance (BT.601, 16 … 235 of 255) and
without a border of `factor` pixels; the other tasks on all three channels and the whole image. "psnr_gain" is the PSNR
above that of the obvious answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from paperzoo.data.images import read_image, to_image
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Kind = Literal["denoise", "inpaint", "super_resolution"]


@dataclass(frozen=True)
class Restored:
    """A restored image, the obvious answer beside it, and, where the clean image is known, how close both come to it."""

    image: Image.Image
    before: Image.Image
    psnr: float | None = None
    psnr_gain: float | None = None
    clean: Image.Image | None = None


@dataclass(frozen=True)
class Config:
    """The default recipe: gradient descent on the pixels with a total variation prior."""

    data: str = "astronaut"  # a photograph that is always there, or the path of an image
    task: Kind = "denoise"
    degraded: bool = (
        False  # the image at `data` is degraded already: nothing is added to it, nothing known to compare with
    )
    crop: Count | None = None  # only a central square of this side
    sigma: NotNegative = 25.0  # of the noise, in 1/255
    mask: str | None = None  # an image of the same size, black where pixels are missing
    missing: Fraction = 0.5  # without a mask: the share of pixels that is hidden at random
    factor: Annotated[int, Field(ge=2, le=8)] = 4  # of super-resolution
    steps: Count = 1000
    learning_rate: Positive = 0.01
    prior_weight: NotNegative = 0.04  # of the total variation against the mean squared error


# -- metrics ---------------------------------------------------------------------------------------------------------


def luminance(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, 1, H, W) in [16/255, 235/255]: BT.601, as MATLAB's rgb2ycbcr and the papers."""
    weights = images.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 16) / 255


def prepared(images: Tensor, y_channel: bool, border: int) -> Tensor:
    if 2 * border + 11 > min(images.shape[-2:]):
        raise PaperZooError(
            f"a border of {border} leaves too little of an image of {images.shape[-2]}x{images.shape[-1]} to measure"
        )
    images = images[..., border : images.shape[-2] - border, border : images.shape[-1] - border].clamp(0, 1)
    return luminance(images) if y_channel else images


def psnr(restored: Tensor, clean: Tensor, y_channel: bool = False, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB of (B, 3, H, W) images in [0, 1], averaged over the images."""
    restored, clean = prepared(restored, y_channel, border), prepared(clean, y_channel, border)
    return float(peak_signal_noise_ratio(restored, clean, data_range=1.0, dim=(1, 2, 3)))


def ssim(restored: Tensor, clean: Tensor, y_channel: bool = False, border: int = 0) -> float:
    """Structural similarity of (B, 3, H, W) images in [0, 1], averaged over the images.

    Only windows that lie inside the image count, as in the original program and scikit-image; torchmetrics' own mean
    includes windows that reach over the (mirrored) edge.
    """
    restored, clean = prepared(restored, y_channel, border), prepared(clean, y_channel, border)
    _, windows = structural_similarity_index_measure(restored, clean, data_range=1.0, return_full_image=True)
    return float(windows[..., 5:-5, 5:-5].mean())


def total_variation(images: Tensor) -> Tensor:
    """Mean over pixels of the length of the colour gradient, (B, C, H, W) -> scalar; smoothed at zero, forward differences."""
    dy = F.pad(images[:, :, 1:] - images[:, :, :-1], (0, 0, 0, 1))
    dx = F.pad(images[:, :, :, 1:] - images[:, :, :, :-1], (0, 1))
    return (dx.square() + dy.square()).sum(1).add(1e-6).sqrt().mean()


# -- degradations ----------------------------------------------------------------------------------------------------


def lanczos_kernel(factor: int, lobes: int = 2) -> Tensor:
    """The 1-D Lanczos kernel for shrinking by `factor`, float64, with sum 1.

    For even factors the samples lie halfway between pixels (2 * lobes * factor of them), so that the result is centred;
    for odd factors on pixels (2 * lobes * factor + 1).
    """
    count = 2 * lobes * factor + factor % 2
    x = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) / factor
    kernel = torch.where(x.abs() < lobes, torch.sinc(x) * torch.sinc(x / lobes), 0.0)
    return kernel / kernel.sum()


class LanczosDownsample(nn.Module):
    """Shrinks by a whole factor with the Lanczos filter: (B, C, H, W) -> (B, C, H/factor, W/factor); edges repeated."""

    def __init__(self, factor: int, lobes: int = 2) -> None:
        super().__init__()
        kernel = lanczos_kernel(factor, lobes).float()
        self.factor, self.pad = factor, (len(kernel) - factor) // 2
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        channels = images.shape[1]
        x = F.pad(images, [self.pad] * 4, mode="replicate")
        rows = self.kernel.to(x.dtype).view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        x = F.conv2d(x, rows, stride=(self.factor, 1), groups=channels)
        return F.conv2d(x, rows.transpose(2, 3), stride=(1, self.factor), groups=channels)


class Mask(nn.Module):
    """Keeps the pixels that are known: `mask` (1, 1, H, W) is 1 there and 0 where they are missing."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.mask


@dataclass
class Problem:
    """y = A(x): `observed` (1, 3, h, w), `operator` A, the obvious answer `before` (1, 3, H, W), `clean` x if known."""

    task: Kind
    observed: Tensor
    operator: nn.Module
    before: Tensor
    clean: Tensor | None
    border: int = 0

    def measure(self, restored: Tensor) -> dict[str, float]:
        """PSNR, SSIM and the gain in PSNR over the obvious answer; nothing where the clean image is unknown."""
        if self.clean is None:
            return {}
        how = {"y_channel": self.task == "super_resolution", "border": self.border}
        mine, before = psnr(restored, self.clean, **how), psnr(self.before, self.clean, **how)
        return {
            "psnr_gain": mine - before,
            "psnr": mine,
            "ssim": ssim(restored, self.clean, **how),
            "psnr_before": before,
        }

    def to(self, device: torch.device) -> Problem:
        moved = {k: getattr(self, k).to(device) for k in ("observed", "operator", "before")}
        return replace(self, **moved, clean=None if self.clean is None else self.clean.to(device))


def open_photograph(name: str) -> Tensor:
    """A photograph by name or path, uint8 (3, H, W).

    Raises:
        DataError: if the path is no readable image. UnknownName: if it is neither a path nor a known name.
    """
    from paperzoo.data.scenes import PHOTOGRAPHS, photographs

    known = ("china", "flower", *(file.split(".")[0] for file in PHOTOGRAPHS))
    if name in known:
        return photographs()[known.index(name)]
    if Path(name).suffix or Path(name).exists():
        return read_image(name)
    raise UnknownName("photograph or path", name, known)


def as_float(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> float32 (1, 3, H, W) in [0, 1]."""
    return image[None].float() / 255


def pose(config: Any, image: Tensor, key: int) -> Problem:
    """The problem that a config poses with an image, uint8 (3, H, W); noise and holes follow from `key`."""
    side = config.crop
    if side is not None and not config.degraded:
        top, left = (max(0, (extent - side) // 2) for extent in image.shape[1:])
        image = image[:, top : top + side, left : left + side]
    rng = torch.Generator().manual_seed(key)
    make = {"denoise": _noise, "inpaint": _holes, "super_resolution": _shrunk}
    return make[config.task](config, image, rng)


def _noise(config: Any, image: Tensor, rng: torch.Generator) -> Problem:
    clean = as_float(image)
    if config.degraded:
        return Problem("denoise", clean, nn.Identity(), clean, None)
    noisy = (clean + torch.randn(clean.shape, generator=rng) * config.sigma / 255).clamp(
        0, 1
    )  # clipped, as a camera would
    return Problem("denoise", noisy, nn.Identity(), noisy, clean)


def _holes(config: Any, image: Tensor, rng: torch.Generator) -> Problem:
    clean = as_float(image)
    if config.mask is not None:
        known = read_image(config.mask)
        if known.shape != image.shape:
            sizes = f"{known.shape[2]}x{known.shape[1]} pixels; the image has {image.shape[2]}x{image.shape[1]}"
            raise DataError(config.mask, f"the mask has {sizes}")
        mask = (known.float().mean(0) > 127).float()[None, None]
    elif config.degraded:
        raise PaperZooError("inpainting a degraded image needs --mask, an image that is black where pixels are missing")
    else:
        mask = (torch.rand(1, 1, *image.shape[1:], generator=rng) >= config.missing).float()
    if not 0 < mask.mean() < 1:
        raise PaperZooError(
            f"the mask hides {'everything' if mask.mean() == 0 else 'nothing'}; it must hide a part of the image"
        )
    observed = clean * mask
    colour = observed.sum((2, 3), keepdim=True) / mask.sum()
    return Problem("inpaint", observed, Mask(mask), observed + (1 - mask) * colour, None if config.degraded else clean)


def _shrunk(config: Any, image: Tensor, rng: torch.Generator) -> Problem:
    factor = config.factor
    if config.degraded:
        small, clean = image, None
    else:
        height, width = (extent - extent % factor for extent in image.shape[1:])
        image = image[:, :height, :width]
        small, clean = resized(image, height // factor, width // factor, Image.Resampling.LANCZOS), as_float(image)
    bicubic = resized(small, small.shape[1] * factor, small.shape[2] * factor, Image.Resampling.BICUBIC)
    return Problem(
        "super_resolution", as_float(small), LanczosDownsample(factor), as_float(bicubic), clean, border=factor
    )


def resized(image: Tensor, height: int, width: int, filter: Image.Resampling) -> Tensor:
    """uint8 (3, H, W) resized by Pillow, whose filters widen when shrinking."""
    import numpy

    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((width, height), filter)
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).contiguous()


# -- pictures --------------------------------------------------------------------------------------------------------


def to_picture(image: Tensor) -> Image.Image:
    """(1, 3, H, W) or (3, H, W) in [0, 1] as a PIL image."""
    pixels = image.detach().float().cpu().reshape(-1, *image.shape[-2:]).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def side_by_side(pictures: dict[str, Image.Image], height: int = 256) -> Image.Image:
    """Captioned pictures in a row, all enlarged to the same height."""
    scaled = [
        p.resize((round(p.width * height / p.height), height), Image.Resampling.NEAREST) for p in pictures.values()
    ]
    canvas = Image.new("RGB", (sum(p.width for p in scaled) + 4 * (len(scaled) - 1), height + 16), "white")
    left = 0
    for caption, picture in zip(pictures, scaled, strict=True):
        canvas.paste(picture, (left, 0))
        ImageDraw.Draw(canvas).text((left + 2, height + 2), caption, fill="black")
        left += picture.width + 4
    return canvas


# -- the recipe ------------------------------------------------------------------------------------------------------


class RestorationRecipe(Recipe):
    """What recipes of one image share. A subclass sets `self.model`, learns in `step` and answers `restored()`."""

    config: Config
    monitor = ("psnr_gain", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None, image: Tensor | None = None) -> None:
        super().__init__(config, runtime, facts)
        self._image = image
        if not self.facts:
            height, width = self.problem.before.shape[2:]
            self.facts = {"height": height, "width": width}

    @cached_property
    def problem(self) -> Problem:
        image = open_photograph(self.config.data) if self._image is None else self._image
        return pose(self.config, image, self.runtime.key("degradation")).to(self.runtime.device)

    def restored(self) -> Tensor:
        """The answer so far, (1, 3, H, W) in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it restored")

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """PSNR, SSIM and the gain over the obvious answer. There is one image, whatever the split."""
        restored = self.restored().float()
        fit = F.mse_loss(self.problem.operator(restored), self.problem.observed)
        return self.problem.measure(restored) | {"psnr_fit": float(-10 * fit.clamp(min=1e-12).log10())}

    def predict(self, inputs: list) -> list[Restored]:
        """The recipe's own image by its name (`config.data`); any other degraded image is fitted from the start, which
        takes as long as training did. With task "inpaint", `config.mask` says what is missing."""
        return [self.answer() if value == self.config.data else self.fit(value).answer() for value in inputs]

    def fit(self, value: Any) -> RestorationRecipe:
        """A recipe of the same config that has restored this degraded image."""
        from tempfile import gettempdir

        from tqdm import tqdm

        from paperzoo.engine.loop import one_step

        runtime = Runtime(self.runtime.seed, str(self.runtime.device), self.runtime.precision)
        with torch.inference_mode(False), torch.enable_grad():
            other = type(self)(replace(self.config, degraded=True), runtime, image=to_image(value))
            for _ in tqdm(range(self.config.steps), desc=self.config.task, leave=False):
                one_step(other, Path(gettempdir()))
        return other

    @torch.inference_mode()
    def answer(self) -> Restored:
        restored, problem = self.restored().float(), self.problem
        found = problem.measure(restored)
        clean = None if problem.clean is None else to_picture(problem.clean)
        return Restored(
            to_picture(restored), to_picture(problem.before), found.get("psnr"), found.get("psnr_gain"), clean
        )

    def samples(self, folder: Path) -> list[str]:
        """The one image there is."""
        return [self.config.data]

    def draw(self, value: Any, result: Restored) -> Image.Image:
        gain = "" if result.psnr is None else f" {result.psnr:.2f} dB ({result.psnr_gain:+.2f})"
        pictures = {"before": result.before, f"restored{gain}": result.image}
        if result.clean is not None:
            pictures["clean"] = result.clean
        return side_by_side(pictures)

    def figures(self) -> dict[str, Image.Image]:
        return {"Before, after, clean": self.draw(None, self.answer())}


class Pixels(nn.Module):
    """The image itself as the parameter: no network, no prior. `forward(x)` ignores x's values and returns the image for each row."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.image.expand(len(x), -1, -1, -1)


class TotalVariationRecipe(RestorationRecipe):
    """The task's default: min over x of ||A(x) - y||^2 / n + weight * TV(x), from the obvious answer, by Adam."""

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None, image: Tensor | None = None) -> None:
        super().__init__(config, runtime, facts, image)
        self.model = runtime.place(Pixels(torch.zeros(1, 3, self.facts["height"], self.facts["width"])))
        if facts is None:
            self.model.image.data.copy_(self.problem.before)
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.steps)

    def step(self, batch: None) -> dict:
        image = self.model.image
        fit = F.mse_loss(self.problem.operator(image), self.problem.observed)
        return {"loss": fit + self.config.prior_weight * total_variation(image), "fit": fit.detach()}

    def restored(self) -> Tensor:
        return self.model.image.detach().clamp(0, 1)

    def example(self) -> tuple[Tensor]:
        return (torch.zeros(2, 3, 8, 8),)
