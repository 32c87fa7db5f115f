"""Random Erasing Data Augmentation (Zhong et al., AAAI 2020, arXiv:1708.04896).

`RandomErasing` is a torchvision v2 transform: it takes tensors, PIL images and tv_tensors, alone or inside a sample of any
structure, and erases the same region in every image of a sample.

Following the released code, a rectangle's size is drawn first (again, if it does not fit) and then its place among those
where it fits; algorithm 1 of the paper draws size and place together and rejects both, which favours small rectangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F2

TRIES = 100  # sizes drawn before an image is left as it is; as in the released code

Value = Literal["random", "mean"] | float | Sequence[float]


class RandomErasing(v2.Transform):
    """Overwrites a random rectangle (algorithm 1).

    Images are (C, H, W) or batches (…, C, H, W) in which every image has a rectangle of its own; a video (…, T, C, H, W) has
    one for all its frames; a PIL image comes back as one. Bounding boxes, key points and labels pass through unchanged: the
    object is still there, behind something. So do masks, unless `mask_fill` says otherwise.

    Args:
        p: the probability that a region is erased.
        sl, sh: smallest and largest erased area, as a part of the image (or of the object).
        r1, r2: smallest and largest aspect ratio, height over width, uniform; the paper has r2 = 1 / r1.
        value: "random": every pixel and channel uniform over the range of the image (0 to 255 for uint8, 0 to 1 for floats; the
            paper's RE-R, its best); "mean": `mean` (RE-M); a number, or one for each channel, in the image's own units: 0 is
            RE-0, and 255 (for floats 1.0) is RE-255.
        mean: for value="mean", in [0, 1]; ImageNet's by default.
        region: "image" (IRE); "objects" (ORE): one rectangle inside each bounding box of the sample; "both" (I+ORE).
        mask_fill: None leaves masks alone; a number (0, or the index that a loss ignores) is written where the image was erased.

    Raises:
        ValueError: for a value outside its range; when called, for region "objects" or "both" without bounding boxes or with
            a batch, and for images that are not (…, C, H, W) or not of one size.
    """

    def __init__(
        self,
        p: float = 0.5,
        sl: float = 0.02,
        sh: float = 0.4,
        r1: float = 0.3,
        r2: float = 1 / 0.3,
        value: Value = "random",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        region: Literal["image", "objects", "both"] = "image",
        mask_fill: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability from 0 to 1, got {p}")
        if not 0 <= sl <= sh <= 1:
            raise ValueError(f"sl and sh are parts of the area with 0 <= sl <= sh <= 1, got {sl} and {sh}")
        if not 0 < r1 <= r2:
            raise ValueError(f"r1 and r2 are aspect ratios with 0 < r1 <= r2, got {r1} and {r2}")
        if isinstance(value, str) and value not in ("random", "mean"):
            raise ValueError(f"value is 'random', 'mean', a number or one number a channel, got '{value}'")
        if region not in ("image", "objects", "both"):
            raise ValueError(f"region is 'image', 'objects' or 'both', got '{region}'")
        self.p, self.sl, self.sh, self.r1, self.r2 = p, sl, sh, r1, r2
        self.value, self.mean, self.region, self.mask_fill = value, tuple(mean), region, mask_fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """{"erased": bool (…, H, W)}: the pixels to overwrite in this call."""
        shapes = {shape_of(i) for i in flat_inputs if is_image(i)}
        if len(shapes) != 1:
            raise ValueError(f"a sample's images must have one batch shape and size, got {sorted(shapes)}")
        *batch, height, width = shapes.pop()
        erased = torch.zeros(*batch, height, width, dtype=torch.bool)
        if self.region in ("image", "both"):
            count = erased[..., 0, 0].numel()
            window = torch.tensor([0, 0, height, width]).expand(count, 4)
            erased |= inside(self.draw(window), height, width).view_as(erased)
        if self.region in ("objects", "both"):
            boxes = [i for i in flat_inputs if isinstance(i, tv_tensors.BoundingBoxes)]
            if batch or not boxes:
                problem = (
                    "a batch was given; pass one image at a time"
                    if batch
                    else "the sample has no tv_tensors.BoundingBoxes"
                )
                raise ValueError(f"region='{self.region}' erases inside bounding boxes: {problem}")
            for each in boxes:
                erased |= inside(self.draw(windows(each, height, width)), height, width).any(0)
        return {"erased": erased}

    def draw(self, windows: Tensor) -> Tensor:
        """A rectangle inside each window, with probability p; see `rectangles`."""
        return rectangles(windows, self.p, self.sl, self.sh, self.r1, self.r2)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        erased: Tensor = params["erased"]
        if not erased.any():
            return inpt
        if isinstance(inpt, Image.Image):
            pixels = F2.pil_to_tensor(inpt)
            return F2.to_pil_image(torch.where(erased, self.fill(pixels), pixels), mode=inpt.mode)
        if isinstance(inpt, tv_tensors.Mask) and self.mask_fill is not None:
            leading = inpt.ndim - erased.ndim  # instance masks (…, N, H, W) of one image
            batch = erased.shape[:-2]
            here = erased.reshape(*batch, *[1] * leading, *erased.shape[-2:]).to(inpt.device)
            return tv_tensors.wrap(inpt.as_subclass(Tensor).masked_fill(here, self.mask_fill), like=inpt)
        if not is_image(inpt):
            return inpt
        pixels = inpt.as_subclass(Tensor)
        here = erased.unsqueeze(-3).to(pixels.device)  # over channels
        if isinstance(inpt, tv_tensors.Video):
            here = here.unsqueeze(-4)  # over frames
        result = torch.where(here, self.fill(pixels), pixels)
        return tv_tensors.wrap(result, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else result

    def fill(self, pixels: Tensor) -> Tensor:
        """What the erased pixels become: broadcastable to `pixels` (…, C, H, W), of its dtype."""
        largest = 1 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
        if self.value == "random":
            if pixels.is_floating_point():
                return torch.rand_like(pixels)
            return torch.randint(0, largest + 1, pixels.shape, dtype=pixels.dtype, device=pixels.device)
        numbers = torch.tensor([m * largest for m in self.mean] if self.value == "mean" else self.value)
        numbers = numbers.to(pixels.device).reshape(-1, 1, 1)
        if len(numbers) not in (1, pixels.shape[-3]):
            raise ValueError(
                f"value has {len(numbers)} numbers; an image of {pixels.shape[-3]} channels takes that many, or one"
            )
        return numbers.to(pixels.dtype) if pixels.is_floating_point() else numbers.round().to(pixels.dtype)


def rectangles(windows: Tensor, p: float, sl: float, sh: float, r1: float, r2: float) -> Tensor:
    """Random rectangles, one inside each window, all drawn at once from torch's global generator.

    Args:
        windows: (N, 4) integers, top left bottom right; bottom and right exclusive.
        p, sl, sh, r1, r2: as in `RandomErasing`.

    Returns:
        (N, 4) integers in the same form; empty (bottom == top) where nothing is to be erased: with probability 1 - p, and
        where no size fitted.
    """
    count = len(windows)
    top, left, bottom, right = windows.double().unbind(1)
    height, width = bottom - top, right - left
    chosen = torch.rand(count) < p
    if not chosen.any():
        return torch.zeros(count, 4, dtype=torch.int64)
    area = (height * width)[:, None] * torch.empty(count, TRIES, dtype=torch.float64).uniform_(sl, sh)  # S_e
    ratio = torch.empty(count, TRIES, dtype=torch.float64).uniform_(r1, r2)  # r_e
    h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # H_e, W_e
    fits = (h < height[:, None]) & (w < width[:, None])
    first = fits.double().argmax(1, keepdim=True)
    h, w, fits = (t.gather(1, first)[:, 0] for t in (h, w, fits))
    place = torch.rand(count, 2, dtype=torch.float64)
    y = top + (place[:, 0] * (height - h + 1)).floor()
    x = left + (place[:, 1] * (width - w + 1)).floor()
    found = torch.stack([y, x, y + h, x + w], dim=1)
    return torch.where((chosen & fits)[:, None], found, torch.zeros(4, dtype=torch.float64)).long()


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """The pixels of each rectangle (N, 4): bool (N, height, width)."""
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def windows(boxes: tv_tensors.BoundingBoxes, height: int, width: int) -> Tensor:
    """The whole pixels that bounding boxes of any format touch: (N, 4) integers, top left bottom right."""
    corners = F2.convert_bounding_box_format(boxes, new_format="XYXY").as_subclass(Tensor).cpu().double()
    x1, y1, x2, y2 = corners.reshape(-1, 4).unbind(1)
    low, high = torch.stack([y1, x1], 1).floor(), torch.stack([y2, x2], 1).ceil()
    limit = torch.tensor([height, width])
    return torch.cat([low.clamp_min(0).minimum(limit), high.clamp_min(0).minimum(limit)], 1).long()


def is_image(value: Any) -> bool:
    """Whether something in a sample has pixels to erase: an image, a video, a PIL image or a plain tensor."""
    return isinstance(value, Image.Image | tv_tensors.Image | tv_tensors.Video) or (
        isinstance(value, Tensor) and not isinstance(value, tv_tensors.TVTensor)
    )


def shape_of(image: Any) -> tuple[int, ...]:
    """(*batch, height, width)."""
    if isinstance(image, Image.Image):
        return (image.height, image.width)
    dims = 4 if isinstance(image, tv_tensors.Video) else 3
    if image.ndim < dims:
        raise ValueError(f"an image is (…, C, H, W) and a video (…, T, C, H, W), got {tuple(image.shape)}")
    return (*image.shape[:-dims], *image.shape[-2:])
