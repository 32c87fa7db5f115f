"""How restoration papers spoil clean pictures: noise, MATLAB's bicubic resizing, blur, JPEG. Everything follows from a generator.

Images are float32 (C, H, W) in [0, 1] unless said otherwise. `Degradation` describes what is done; calling it with a picture and a
generator does it. Resized, blurred and JPEG pictures are rounded to 8 bits, as files would be; Gaussian noise is neither rounded nor
clipped, as DnCNN and its successors are trained and measured.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from paperzoo.errors import PaperZooError

CHUNK = 512  # outputs of a resizing that are computed together, so that large pictures need little memory

Task = Literal["denoise", "super_resolution", "deblur", "jpeg"]


# -- resizing ----------------------------------------------------------------------------------------------------------


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -1/2, as MATLAB's."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=256)
def resize_weights(size: int, out_size: int, scale: float) -> list[tuple[int, Tensor]]:
    """MATLAB's bicubic `imresize` along one axis: for each CHUNK of outputs the first input that counts and the weights, float64 (outputs, inputs).

    The kernel is widened by 1/scale when shrinking, and what lies beyond the border is the mirrored picture (the border row twice).
    """
    widened = min(scale, 1.0)
    width = 4 / widened
    mirror = torch.cat([torch.arange(size), torch.arange(size - 1, -1, -1)])
    parts = []
    for start in range(0, out_size, CHUNK):
        outputs = torch.arange(start + 1, min(out_size, start + CHUNK) + 1, dtype=torch.float64)  # counted from 1
        centre = outputs / scale + 0.5 * (1 - 1 / scale)
        places = torch.floor(centre - width / 2)[:, None] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)
        weights = widened * cubic(widened * (centre[:, None] - places))
        weights = weights / weights.sum(1, keepdim=True)
        columns = mirror[(places.long() - 1).remainder(2 * size)]
        low, high = int(columns.min()), int(columns.max()) + 1
        parts.append((low, torch.zeros(len(outputs), high - low, dtype=torch.float64)))
        parts[-1][1].scatter_add_(1, columns - low, weights)
    return parts


def imresize(images: Tensor, scale: float | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """MATLAB's `imresize(…, "bicubic")`, with its antialiasing: (…, H, W) to ceil(scale * H), ceil(scale * W), or to `size`.

    Floating-point images are neither rounded nor clipped. Integer images (uint8, uint16) are rounded and clipped to their range after
    each of the two axes, as MATLAB does it with integer classes; this is how published low-resolution pictures were made.

    Raises:
        ValueError: without a scale or a size, or for other integers.
    """
    height, width = images.shape[-2:]
    if size is not None:
        scales = (size[0] / height, size[1] / width)
    elif scale is not None:
        # 1/3 of 9 pixels are 3: a rounded factor must not make it 4
        size = (math.ceil(round(scale * height, 9)), math.ceil(round(scale * width, 9)))
        scales = (scale, scale)
    else:
        raise ValueError("imresize needs a scale or a size")
    whole = not images.is_floating_point()
    top = {torch.uint8: 255, torch.uint16: 65535}.get(images.dtype)
    if whole and top is None:
        raise ValueError(f"images are uint8, uint16 or floating point, not {images.dtype}")
    found = images.to(torch.float64 if images.dtype in (torch.float64, torch.uint16) else torch.float32)
    for axis in sorted((0, 1), key=lambda a: scales[a]):  # the axis that shrinks most comes first
        parts = []
        for low, weights in resize_weights(images.shape[-2 + axis], size[axis], scales[axis]):
            weights = weights.to(found)
            seen = found.narrow(-2 + axis, low, weights.shape[1])
            parts.append(weights @ seen if axis == 0 else seen @ weights.T)
        found = torch.cat(parts, -2 + axis)
        if whole:
            found = found.clamp_(0, top).add_(0.5).floor_()
    return found.to(images.dtype)


# -- blur --------------------------------------------------------------------------------------------------------------


def gaussian_kernel(sigma: float, size: int | None = None) -> Tensor:
    """MATLAB's `fspecial("gaussian", size, sigma)`: float64 (size, size), sum 1; reaching three sigma unless a size is given."""
    size = 2 * math.ceil(3 * sigma) + 1 if size is None else size
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-x.square() / (2 * sigma**2))
    kernel = line[:, None] * line[None, :]
    kernel = torch.where(kernel < torch.finfo(torch.float64).eps * kernel.max(), 0.0, kernel)
    return kernel / kernel.sum()


def motion_kernel(length: float, angle: float) -> Tensor:
    """MATLAB's `fspecial("motion", length, angle)`: a straight, even movement, float64 (rows, columns) with sum 1.

    Args:
        length: of the path in pixels, at least 1. angle: degrees, counter-clockwise from the right.
    """
    half, phi = (max(1.0, length) - 1) / 2, math.radians(angle % 180)
    cos, sin = math.cos(phi), math.sin(phi)
    sign = 1 if cos >= 0 else -1
    tiny = length * torch.finfo(torch.float64).eps
    right, down = math.trunc(half * cos + sign - tiny), math.trunc(half * sin + 1 - tiny)
    x = torch.arange(0, right + sign, sign, dtype=torch.float64)[None, :]
    y = torch.arange(0, down + 1, dtype=torch.float64)[:, None]
    off = y * cos - x * sin  # the distance to the line
    reach = (x.square() + y.square()).sqrt()
    last = (reach >= half) & (off.abs() <= 1)  # pixels at the end of the path count by their distance to that end
    beyond = half - ((x + off * sin) / (cos if cos != 0 else tiny)).abs()
    off = torch.where(last, (off.square() + beyond.square()).sqrt(), off)
    quarter = (1 - off.abs()).clamp(min=0)
    rows, columns = quarter.shape
    kernel = torch.zeros(2 * rows - 1, 2 * columns - 1, dtype=torch.float64)
    kernel[:rows, :columns] = quarter.rot90(2)
    kernel[rows - 1 :, columns - 1 :] = quarter
    kernel = kernel / kernel.sum()
    return kernel.flip(0) if cos > 0 else kernel


def blur(images: Tensor, kernel: Tensor) -> Tensor:
    """(C, H, W) through a kernel (rows, columns) of odd extents; the border continues its last pixel, as MATLAB's "replicate"."""
    rows, columns = kernel.shape
    padded = F.pad(images[None], (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
    weight = kernel.flip(0, 1).to(images)[None, None].expand(len(images), 1, -1, -1)
    return F.conv2d(padded, weight, groups=len(images))[0]


# -- files -------------------------------------------------------------------------------------------------------------


def to_8_bits(images: Tensor) -> Tensor:
    """Clipped and rounded to 256 values, still float in [0, 1]."""
    return images.clamp(0, 1).mul(255).round().div(255)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """(1 or 3, H, W) after being stored as a JPEG file of this quality, 1 … 100 (colour with 4:2:0 subsampling, the usual)."""
    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "JPEG", quality=quality)
    found = torch.from_numpy(numpy.array(Image.open(buffer)))
    return (found[None] if found.ndim == 2 else found.permute(2, 0, 1)).float().div(255)


# -- what is done to a picture -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Degradation:
    """A published way of spoiling pictures. Pairs of numbers are ranges that each picture draws from uniformly ("blind").

    task: "denoise": Gaussian noise of `sigma` / 255. "super_resolution": MATLAB's bicubic shrinking by `factor`, enlarged again
        bicubically where `enlarge` says so (for networks that keep the size). "deblur": a Gaussian of deviation `blur` pixels,
        or a straight movement over `blur` pixels at a random angle. "jpeg": stored with `quality`.
    """

    task: Task = "denoise"
    sigma: float | tuple[float, float] = 25.0
    factor: int = 1
    enlarge: bool = False
    kind: Literal["gaussian", "motion"] = "gaussian"
    blur: float | tuple[float, float] = 1.6
    quality: int | tuple[int, int] = 40

    @property
    def scale(self) -> int:
        """How many times larger the clean picture is."""
        return self.factor if self.task == "super_resolution" and not self.enlarge else 1

    @property
    def unit(self) -> int:
        """Parts of a clean picture that start and end at multiples of this many pixels are degraded as in the whole."""
        return {"super_resolution": self.factor, "jpeg": 16}.get(self.task, 1)

    @property
    def reach(self) -> int:
        """Pixels of the degraded picture around a part of it that its clean surroundings still change."""
        if self.task == "super_resolution":
            return 6 * self.factor if self.enlarge else 3
        if self.task == "deblur":
            largest = self.blur[1] if isinstance(self.blur, tuple) else self.blur
            return math.ceil(3 * largest) + 1
        return 16 if self.task == "jpeg" else 0

    def __call__(self, clean: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """The degraded picture (C, h, w) of a clean one (C, h * scale, w * scale). Without a generator, torch's global one is used."""
        if self.task == "denoise":
            sigma = drawn(self.sigma, rng) / 255
            return clean + torch.randn(clean.shape, generator=rng) * sigma
        if self.task == "super_resolution":
            small = imresize(eight_bit(clean), 1 / self.factor)
            small = imresize(small, size=tuple(clean.shape[-2:])) if self.enlarge else small
            return small.float() / 255
        if self.task == "deblur":
            length = drawn(self.blur, rng)
            if self.kind == "gaussian":
                return to_8_bits(blur(clean, gaussian_kernel(length)))
            return to_8_bits(blur(clean, motion_kernel(length, drawn((0.0, 180.0), rng))))
        low, high = self.quality if isinstance(self.quality, tuple) else (self.quality, self.quality)
        return jpeg(clean, int(torch.randint(low, high + 1, (), generator=rng)))

    def fixed(self, **values: object) -> Degradation:
        """The same with other values; a value of None leaves the field, or the middle of its range."""
        given = {}
        for name, value in values.items():
            now = getattr(self, name)
            middle = sum(now) / 2 if isinstance(now, tuple) else now
            given[name] = (int(middle) if name == "quality" else middle) if value is None else value
        return replace(self, **given)


def eight_bit(clean: Tensor) -> Tensor:
    return clean.clamp(0, 1).mul(255).round().to(torch.uint8)


def drawn(value: float | tuple[float, float], rng: torch.Generator | None) -> float:
    """The number, or one drawn uniformly from a range."""
    if not isinstance(value, tuple):
        return float(value)
    low, high = value
    if low > high:
        raise PaperZooError(f"a range is (smallest, largest), not {value}")
    return low + (high - low) * float(torch.rand((), generator=rng))
