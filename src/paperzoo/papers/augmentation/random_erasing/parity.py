"""Random Erasing against torchvision, and against the algorithm written as plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from paperzoo.engine.parity import Case
from paperzoo.papers.augmentation.random_erasing.technique import TRIES, RandomErasing, rectangles


def cases() -> Iterator[Case]:
    import torchvision
    from torchvision.transforms import v2

    tv = f"torchvision {torchvision.__version__.split('+')[0]}"
    exact = {"rtol": 0.0, "atol": 0.0}

    # The rectangles, from the same random numbers.
    windows = torch.tensor([[0, 0, 32, 32], [0, 0, 7, 50], [5, 9, 12, 40], [3, 3, 4, 9], [2, 1, 2, 8]]).repeat(40, 1)
    for name, limits in (("paper", (0.5, 0.02, 0.4, 0.3, 1 / 0.3)), ("large", (1.0, 0.6, 1.0, 0.2, 9.0))):
        yield Case(f"rectangles, {name} settings", seeded(lambda limits=limits: rectangles(windows, *limits)),
                   seeded(lambda limits=limits: slow_rectangles(windows, *limits)), (), "released code as loops", **exact)  # fmt: skip

    # One image, one region: torchvision's functional erase with the rectangle and the value.
    image = torch.rand(3, 21, 30)
    for value, colour in ((0.0, [0, 0, 0]), ("mean", [0.485, 0.456, 0.406]), ((0.1, 0.5, 1.0), [0.1, 0.5, 1.0])):
        ours = RandomErasing(p=1.0, value=value)
        yield Case(f"one image, value {value}", seeded(lambda x, ours=ours: ours(x)),
                   seeded(lambda x, colour=colour: erase_one(v2.functional.erase, x, colour)), (image,), f"{tv} erase", **exact)  # fmt: skip
    pixels = torch.randint(0, 256, (3, 21, 30), dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    ours = RandomErasing(p=1.0, value=255)
    yield Case("PIL image, RE-255", seeded(lambda: numpy.asarray(ours(picture)).copy()),
               seeded(lambda: erase_one(v2.functional.erase, pixels, [255, 255, 255]).permute(1, 2, 0)), (),
               f"{tv} erase", **exact)  # fmt: skip

    # A batch, each image with its own rectangle; what lies outside is untouched, for every value.
    batch = torch.rand(6, 4, 3, 17, 13)
    for value in ("random", 0.25):
        ours = RandomErasing(value=value)
        yield Case(f"batch, value {value}", seeded(ours), seeded(lambda x, v=value: slow_batch(x, v)), (batch,),
                   "loops over images and pixels", **exact)  # fmt: skip

    # Objects: one rectangle inside each box, and one in the image; masks follow, boxes do not.
    boxes = tv_tensors.BoundingBoxes([[2, 3, 12, 9], [10, 8, 9, 12]], format="XYWH", canvas_size=(21, 30))
    masks = tv_tensors.Mask(torch.ones(2, 21, 30, dtype=torch.uint8))
    sample = (tv_tensors.Image(image), {"boxes": boxes, "masks": masks, "labels": torch.tensor([1, 2])})
    for region in ("objects", "both"):
        ours = RandomErasing(p=1.0, value=0.0, region=region, mask_fill=0)
        yield Case(f"region {region}", seeded(lambda ours=ours: plain(ours(*sample))),
                   seeded(lambda region=region: slow_objects(image, boxes, region)), (), "loops over boxes and pixels", **exact)  # fmt: skip

    # The same distribution as torchvision where both define one: square rectangles, so that the law of the ratio is no matter.
    theirs = v2.RandomErasing(p=0.5, scale=(0.02, 0.4), ratio=(1.0, 1.0), value=0)
    ones, count = torch.ones(1, 12, 16), 20_000
    ours = RandomErasing(p=0.5, sl=0.02, sh=0.4, r1=1.0, r2=1.0, value=0)
    yield Case("how often each pixel is erased", seeded(lambda: moments(ours(ones.expand(count, 1, 12, 16)))),
               seeded(lambda: moments(torch.stack([theirs(ones) for _ in range(count)]))), (),
               f"{tv} v2.RandomErasing, {count} draws", rtol=0.0, atol=0.02)  # fmt: skip
    values = RandomErasing(p=1.0, sl=0.3, sh=0.4)
    for dtype, top in ((torch.uint8, 255), (torch.float32, 1.0)):
        yield Case(f"law of the random values, {dtype}", seeded(lambda d=dtype, top=top: law(values, d, top)),
                   lambda: {"mean": 0.5, "deviation": 1 / math.sqrt(12), "low": 0.0, "high": 1.0}, (),
                   "uniform over the range (algorithm 1)", rtol=0.0, atol=0.01)  # fmt: skip


def seeded(function):
    """The function, from the same seed at each call."""

    def call(*inputs):
        torch.manual_seed(7)
        return function(*inputs)

    return call


def slow_rectangles(windows: Tensor, p: float, sl: float, sh: float, r1: float, r2: float) -> Tensor:
    """The released code, one window and one try at a time, on the numbers that `rectangles` draws."""
    n = len(windows)
    chance = torch.rand(n).tolist()
    areas = torch.empty(n, TRIES, dtype=torch.float64).uniform_(sl, sh).tolist()
    ratios = torch.empty(n, TRIES, dtype=torch.float64).uniform_(r1, r2).tolist()
    places = torch.rand(n, 2, dtype=torch.float64).tolist()
    found = []
    for i, (top, left, bottom, right) in enumerate(windows.tolist()):
        box, height, width = [0, 0, 0, 0], bottom - top, right - left
        for part, ratio in zip(areas[i], ratios[i], strict=True):
            area = height * width * part
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                y, x = top + int(places[i][0] * (height - h + 1)), left + int(places[i][1] * (width - w + 1))
                box = [y, x, y + h, x + w]
                break
        found.append(box if chance[i] < p else [0, 0, 0, 0])
    return torch.tensor(found)


def erase_one(erase, image: Tensor, colour: list) -> Tensor:
    height, width = image.shape[-2:]
    y1, x1, y2, x2 = slow_rectangles(torch.tensor([[0, 0, height, width]]), 1.0, 0.02, 0.4, 0.3, 1 / 0.3)[0].tolist()
    fill = torch.tensor(colour)[:, None, None].to(image.dtype)
    return erase(image, y1, x1, y2 - y1, x2 - x1, fill.expand(-1, y2 - y1, x2 - x1))


def slow_batch(batch: Tensor, value: str | float) -> Tensor:
    *leading, _, height, width = batch.shape
    images = batch.clone().flatten(0, len(leading) - 1)
    boxes = slow_rectangles(torch.tensor([[0, 0, height, width]] * len(images)), 0.5, 0.02, 0.4, 0.3, 1 / 0.3)
    noise = torch.rand_like(batch).flatten(0, len(leading) - 1) if value == "random" else torch.full_like(images, value)
    for i, (y1, x1, y2, x2) in enumerate(boxes.tolist()):
        for y in range(y1, y2):
            for x in range(x1, x2):
                images[i, :, y, x] = noise[i, :, y, x]
    return images.view_as(batch)


def slow_objects(image: Tensor, boxes: Tensor, region: str) -> dict:
    image, masks = image.clone(), torch.ones(2, *image.shape[-2:], dtype=torch.uint8)
    settings = (1.0, 0.02, 0.4, 0.3, 1 / 0.3)
    found = []
    if region == "both":
        found += slow_rectangles(torch.tensor([[0, 0, *image.shape[-2:]]]), *settings).tolist()
    found += slow_rectangles(torch.tensor([[y, x, y + h, x + w] for x, y, w, h in boxes.tolist()]), *settings).tolist()
    for y1, x1, y2, x2 in found:
        for y in range(y1, y2):
            for x in range(x1, x2):
                image[:, y, x], masks[:, y, x] = 0, 0
    return {"image": image, "boxes": boxes.as_subclass(Tensor), "masks": masks, "labels": torch.tensor([1, 2])}


def plain(sample: tuple) -> dict:
    """A sample's tensors without their types, after checking that the types came through."""
    image, target = sample
    assert isinstance(image, tv_tensors.Image) and isinstance(target["masks"], tv_tensors.Mask)
    return {k: v.as_subclass(Tensor) for k, v in {"image": image, **target}.items()}


def moments(images: Tensor) -> dict:
    """Of images that were ones: how often each pixel, and each image, was erased, and the erased area's mean and deviation."""
    erased = images == 0
    areas = erased.double().mean((1, 2, 3))
    return {
        "pixels": erased.double().mean(0),
        "share": (areas > 0).double().mean(),
        "area": areas.mean(),
        "spread": areas.std(),
    }


def law(transform: RandomErasing, dtype: torch.dtype, top: float) -> dict:
    """The erased values of an image, over `top`."""
    before = torch.full((64, 3, 32, 32), 7 if dtype == torch.uint8 else 7.0, dtype=dtype)
    after = transform(before)
    values = after[(after != before).any(1, keepdim=True).expand_as(after)].double() / top
    return {"mean": values.mean(), "deviation": values.std(), "low": values.min(), "high": values.max()}
