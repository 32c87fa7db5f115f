"""Interest points: places that are found again in another picture of the same thing, with descriptors by which they are matched.

In eval a network maps grey pictures float32 (B, 1, H, W) in [0, 1], whose sides are multiples of its `stride`, to
    heat          float32 (B, H, W) in [0, 1], how likely each pixel is an interest point
    descriptors   float32 (B, D, H / stride, W / stride), of unit length in each cell
In training it may return whatever its recipe's `step` takes; what a batch is, too, is said there, since most detectors make their own labels.

From the heat come points: greedy suppression within `nms_radius`, then the strongest. What is asked of `predict` is a picture, answered with
`Points`; or a pair, (first, second) or "first.png :: second.png", answered with `Matches`: mutual nearest neighbours and the homography that
most of them agree with. The metrics are those of `paperzoo.tasks.point_matching_metrics`, measured on pairs with a known homography.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn

from paperzoo.blocks.homography import estimate
from paperzoo.blocks.interest_points import describe, mutual_nearest, strongest, suppress, suppress_boxes
from paperzoo.data.homographies import Pairs, open_pairs
from paperzoo.data.images import to_image
from paperzoo.engine.models import create
from paperzoo.engine.pictures import tile
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.depth_pictures import enlarged
from paperzoo.tasks.optical_flow import BETWEEN, Count, Fraction, NotNegative, Positive
from paperzoo.tasks.point_matching_metrics import DescriptorMetrics, DetectorMetrics, visible
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Whole = Annotated[int, Field(ge=0)]

GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R 601)
RIGHT, WRONG = (60, 200, 80), (220, 60, 50)


@dataclass(frozen=True)
class Points:
    """The answer for one picture: places float32 (N, 2), x and y in its pixels, the surest first; scores (N,) in [0, 1]; descriptors (N, D)."""

    places: Tensor = field(repr=False)
    scores: Tensor = field(repr=False)
    descriptors: Tensor = field(repr=False)
    count: int


@dataclass(frozen=True)
class Matches:
    """The answer for two pictures: the points of both, pairs int64 (M, 2) of their rows, distances (M,); the homography float64 (3, 3) from the
    first to the second that most pairs agree with, None without one; and which agree, bool (M,)."""

    first: Points
    second: Points
    pairs: Tensor = field(repr=False)
    distances: Tensor = field(repr=False)
    homography: Tensor | None = field(repr=False)
    agree: Tensor = field(repr=False)
    count: int


@dataclass(frozen=True)
class Config:
    """What finding, matching and measuring points needs; how a network learns is added by its paper."""

    model: str = "superpoint"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "warped_photographs"  # pictures to learn from
    test_data: str = "warped_photographs"  # pairs with homographies
    threshold: Fraction = 0.015  # the least heat of a point
    nms: Literal["greedy", "boxes"] = "greedy"
    nms_radius: Whole = 4
    border: Whole = 4  # pixels from the sides without points
    points: Count = 1000  # the most of a picture, in an answer
    # height and width at which repeatability is measured; None: the pictures' own
    detector_size: tuple[Count, Count] | None = (240, 320)
    detector_points: Count = 300
    descriptor_size: tuple[Count, Count] | None = (480, 640)
    descriptor_points: Count = 1000
    descriptor_radius: Whole = 8  # of suppression, where homographies are estimated
    weights: str | None = None
    steps: Count = 200_000
    batch_size: Count = 32
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = False
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[Fraction, ...] = (0.5,)
    gamma: Positive = 0.5
    warmup_steps: Whole = 0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip: Positive | None = None
    workers: Whole = 0


def grey(pictures: Tensor) -> Tensor:
    """uint8 (…, 3, H, W) to float32 (…, 1, H, W) in [0, 1]."""
    weights = torch.tensor(GREY, device=pictures.device)[:, None, None]
    return (pictures.float() * weights).sum(-3, keepdim=True) / 255


def resized(picture: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """A grey picture (1, H, W) at (height, width), and the homography (3, 3) from its old pixels to its new ones."""
    before = tuple(picture.shape[-2:])
    if size is None or before == tuple(size):
        return picture, torch.eye(3, dtype=torch.float64)
    small = F.interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    x, y = size[1] / before[1], size[0] / before[0]
    move = torch.tensor([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]], dtype=torch.float64)
    return small.clamp(0, 1), move


class InterestPointRecipe(Recipe):
    """Finds, matches, measures and draws. Papers add how it learns: `batch` and `step`."""

    config: Config
    monitor = ("homography_accuracy_3", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if facts is None:
            self.check_data()
        self.model = runtime.place(self.build())
        self.average = running_average(self.model, config.ema_decay)
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: learning_rate_factor(config, s))

    def build(self) -> nn.Module:
        return create(self.config.model, weights=self.config.weights, **self.config.model_arguments)

    def check_data(self) -> None:
        """What is wrong with the data is said before anything is built."""

    @cached_property
    def test_set(self) -> Pairs:
        return open_pairs(self.config.test_data, "test")

    # -- points --------------------------------------------------------------------------------------------------

    def infer(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Heat (B, H, W) and descriptors (B, D, h, w) of grey pictures (B, 1, H, W) of any size, by the deployed network.

        Sides that leave a remainder are continued to the right and below.
        """
        model = self.deployed.eval()
        height, width = pictures.shape[-2:]
        right, below = -width % model.stride, -height % model.stride
        heat, descriptors = model(F.pad(pictures, (0, right, 0, below), mode="replicate"))
        return heat.float()[:, :height, :width], descriptors.float()

    def extract(self, heat: Tensor, descriptors: Tensor, radius: int, count: int) -> list[Points]:
        """What `infer` returned, as points."""
        config = self.config
        if config.nms == "greedy":
            kept = suppress(torch.where(heat > config.threshold, heat, 0.0), radius)
        else:
            kept = torch.stack(
                [suppress_boxes(torch.where(h > config.threshold, h, 0.0), 2 * radius + 1) for h in heat]
            )
        found = []
        for one, maps in zip(kept, descriptors, strict=True):
            places, scores = strongest(one, count, config.threshold, config.border)
            found.append(Points(places, scores, describe(maps, places, self.deployed.stride), len(places)))
        return found

    def points_of(self, picture: Tensor, radius: int, count: int) -> Points:
        """Of one grey picture (1, H, W)."""
        return self.extract(*self.infer(picture[None].to(self.runtime.device)), radius, count)[0]

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Detector and descriptor on the pairs of a split, each at its own size and number of points."""
        config = self.config
        data = self.test_set if split == "test" else open_pairs(config.test_data, split)
        detector, descriptor = DetectorMetrics(), DescriptorMetrics()
        for i in range(len(data)):
            pair = data[i]
            for measure in ("detector", "descriptor"):
                size, count = getattr(config, f"{measure}_size"), getattr(config, f"{measure}_points")
                radius = config.nms_radius if measure == "detector" else config.descriptor_radius
                (a, move_a), (b, move_b) = (resized(grey(pair[k]), size) for k in ("first", "second"))
                matrix = (move_b @ pair["homography"] @ torch.linalg.inv(move_a)).to(self.runtime.device)
                first, second = (self.points_of(x, radius, count) for x in (a, b))
                sizes = (tuple(a.shape[-2:]), tuple(b.shape[-2:]))
                if measure == "detector":
                    detector.update(first.places, second.places, matrix, sizes, data.kind(i))
                else:
                    descriptor.update(
                        (first.places, first.descriptors), (second.places, second.descriptors), matrix, sizes
                    )
        return detector.compute() | descriptor.compute()

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Points | Matches]:
        """Pictures (paths, PIL images, arrays) to points; pairs, or strings "first.png :: second.png", to matches."""
        results: list[Points | Matches] = []
        for value in inputs:
            found = [self.answer(to_image(v)) for v in parts_of(value)]
            results.append(found[0] if len(found) == 1 else match(*found))
        return results

    def answer(self, picture: Tensor) -> Points:
        points = self.points_of(grey(picture), self.config.nms_radius, self.config.points)
        return Points(points.places.cpu(), points.scores.cpu(), points.descriptors.cpu(), points.count)

    def samples(self, folder: Path) -> list[str]:
        """Six held-out pairs, written as PNG files."""
        found, data = [], self.test_set
        for i in range(0, len(data), max(1, len(data) // 6))[:6]:
            paths = [str(folder / f"{i:05d}_{k}.png") for k in (1, 2)]
            pair = data[i]
            for path, name in zip(paths, ("first", "second"), strict=True):
                Image.fromarray(pair[name].permute(1, 2, 0).numpy()).save(path)
            found.append(BETWEEN.join(paths))
        return found

    def example(self) -> tuple[Tensor]:
        size = self.config.detector_size or (96, 128)
        return (torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Points | Matches) -> Image.Image:
        pictures = [to_image(v) for v in parts_of(value)]
        if isinstance(result, Points):
            return draw_points(pictures[0], result.places)
        places = [p.places[result.pairs[:, k]] for k, p in enumerate((result.first, result.second))]
        return draw_matches(*pictures, *places, result.agree)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Held-out pairs: their points, and their matches, those in green that the true homography confirms."""
        data, shown, joined = self.test_set, [], []
        for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:6].tolist():
            pair = data[i]
            result = self.predict([(pair["first"], pair["second"])])[0]
            shown += [draw_points(pair[k], getattr(result, k).places) for k in ("first", "second")]
            places = [p.places[result.pairs[:, k]] for k, p in enumerate((result.first, result.second))]
            moved, _ = visible(places[0], pair["homography"], tuple(pair["second"].shape[-2:]))
            joined.append(draw_matches(pair["first"], pair["second"], *places, (moved - places[1]).norm(dim=1) <= 3))
        return {
            "Held-out pairs and the points that were found": tile(shown, 4),
            "Matches: green where the true homography agrees within 3 pixels": tile(joined, 2),
        }


def parts_of(value: Any) -> list:
    """One picture, or two."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(BETWEEN)]
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise PaperZooError(
                f"a pair is (first, second), or one string 'first.png :: second.png', not {len(value)} pictures"
            )
        return list(value)
    return [value]


def match(first: Points, second: Points) -> Matches:
    """Mutual nearest neighbours, and the homography that most of them agree with."""
    pairs, distances = mutual_nearest(first.descriptors, second.descriptors)
    homography, agree = estimate(first.places[pairs[:, 0]], second.places[pairs[:, 1]])
    return Matches(first, second, pairs, distances, homography, agree, len(pairs))


# -- pictures ------------------------------------------------------------------------------------------------------------


def draw_points(picture: Tensor, places: Tensor) -> Image.Image:
    """A picture uint8 (3, H, W) with its points, small ones enlarged."""
    image, factor = shown(picture)
    draw = ImageDraw.Draw(image)
    for x, y in ((places + 0.5) * factor).tolist():
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=RIGHT, width=1)
    return image


def draw_matches(first: Tensor, second: Tensor, here: Tensor, there: Tensor, right: Tensor) -> Image.Image:
    """Two pictures side by side, lines (M, 2) to (M, 2) between them: green where `right`, else red."""
    (a, factor), (b, other) = shown(first), shown(second)
    sheet = tile([a, b], 2, gap=4)
    shift = max(a.width, b.width) + 4
    draw = ImageDraw.Draw(sheet)
    starts, ends = ((here + 0.5) * factor).tolist(), ((there + 0.5) * other).tolist()
    for good in (False, True):  # right ones on top
        for (x, y), (u, v), ok in zip(starts, ends, right.tolist(), strict=True):
            if ok == good:
                draw.line((x, y, u + shift, v), fill=RIGHT if ok else WRONG, width=1)
    return sheet


def shown(picture: Tensor) -> tuple[Image.Image, float]:
    """A picture as it is drawn, and how much larger it is than itself."""
    image = enlarged(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    return image, image.width / picture.shape[-1]
