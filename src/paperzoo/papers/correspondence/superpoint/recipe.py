"""How SuperPoint learns: corners of synthetic shapes first; then its own points on photographs, seen from many places; then points and descriptors together."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from paperzoo.blocks.homography import HomographyRange, random_homographies, transform, warp
from paperzoo.blocks.interest_points import strongest, suppress
from paperzoo.data.homographies import open_pictures
from paperzoo.data.keypoint_pairs import Photographs
from paperzoo.data.synthetic_shapes import point_map, shape_sheets, synthetic_shapes
from paperzoo.engine.pictures import tile
from paperzoo.errors import PaperZooError
from paperzoo.papers.correspondence.superpoint.technique import (
    BALANCE,
    NEGATIVE,
    POSITIVE,
    cell_labels,
    descriptor_loss,
    detector_loss,
    homographic_adaptation,
    relit,
)
from paperzoo.tasks import interest_points
from paperzoo.tasks.interest_points import (
    Count,
    Fraction,
    InterestPointRecipe,
    NotNegative,
    Positive,
    Whole,
    draw_points,
    grey,
)


@dataclass(frozen=True)
class Config(interest_points.Config):
    """The settings of sec. 4 to 6. `steps` counts all of them: shapes first, then `rounds` equally long rounds on pictures, each of which begins by labelling anew."""

    image_size: tuple[Count, Count] = (240, 320)
    shape_share: Annotated[float, Field(gt=0, lt=1)] = 1 / 3  # of the steps, on shapes
    shapes: Whole = 0  # pictures of shapes that are drawn once and used again; 0: new ones in each step
    shape_tiles: Count = 1  # pictures of shapes along each side of what learning sees
    rounds: Count = 2  # of homographic adaptation
    homographies: Count = 100  # N_h
    label_points: Count = 300  # the most of a picture
    label_threshold: Fraction = 0.015
    view_angle: NotNegative = math.pi / 2  # the largest turn of the second picture of a training pair, radians
    empty_weight: Positive = 1.0  # of cells without a point, in the detector's loss; 1 in the paper
    positive: Positive = POSITIVE  # m_p
    negative: NotNegative = NEGATIVE  # m_n
    descriptor_balance: Positive = BALANCE  # lambda_d
    descriptor_weight: NotNegative = 1e-4  # lambda


class SuperPointRecipe(InterestPointRecipe):
    """`self.teacher` is the network as it was when a round began; all labels of the round are its."""

    config: Config

    def __init__(self, config: Any, runtime: Any, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if any(side % self.model.stride for side in config.image_size):
            raise PaperZooError(
                f"image_size is {config.image_size}; both sides must be multiples of {self.model.stride}"
            )
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.labels: dict[tuple[int, int], Tensor] = {}  # (round, picture) -> points; follows from the teacher

    def check_data(self) -> None:
        _ = self.pictures

    # -- data ----------------------------------------------------------------------------------------------------

    @cached_property
    def pictures(self) -> Photographs:
        return open_pictures(self.config.data, "train")

    @cached_property
    def batches(self):
        data = Grey(self.pictures, tuple(self.config.image_size))
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor]:
        config = self.config
        return drawn_once(config.shapes, tuple(config.image_size), config.shape_tiles, self.runtime.key("shapes"))

    @property
    def shape_steps(self) -> int:
        """Steps on shapes: at least one, and if there are two, at least one is left for pictures."""
        return max(1, min(round(self.config.shape_share * self.config.steps), self.config.steps - 1))

    def round(self) -> int:
        """Which round this step belongs to, from 1; 0 while shapes are learned."""
        step, shapes = self.runtime.step, self.shape_steps
        if step < shapes:
            return 0
        return 1 + (step - shapes) * self.config.rounds // (self.config.steps - shapes)

    def batch(self) -> dict[str, Tensor]:
        if self.round() > 0:
            return self.batches.next()
        config, runtime = self.config, self.runtime
        if config.shapes:
            rows = runtime.indices(config.shapes, config.batch_size, "shapes")
            pictures, points = mirrored(*(x[rows] for x in self.drawn), runtime.rng("mirror"))
        else:
            count, size = runtime.share(config.batch_size), tuple(config.image_size)
            pictures, points = shape_sheets(count, size, config.shape_tiles, runtime.rng("shapes"))
        return runtime.to_device({"pictures": pictures, "points": points})

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: dict[str, Tensor]) -> dict:
        if self.round() > 0:
            return self.learn_pictures(batch)
        self.model.train()
        logits, _ = self.model(relit(batch["pictures"]))
        labels = cell_labels(point_map(batch["points"], tuple(self.config.image_size)), self.model.stride)
        return {"loss": detector_loss(logits, labels, empty=self.config.empty_weight)}

    def learn_pictures(self, batch: dict[str, Tensor]) -> dict:
        """L(X, X', D, D'; Y, Y', S) = L_p(X, Y) + L_p(X', Y') + lambda L_d(D, D', S), eq. (1)."""
        config, size = self.config, tuple(self.config.image_size)
        self.refresh_teacher()
        pictures = batch["pictures"]
        points = self.label(pictures, batch["number"])
        ranges = HomographyRange(patch=0.8, perspective=0.2, zoom=0.15, angle=config.view_angle)
        views = random_homographies(len(pictures), size, ranges, self.runtime.rng("views")).to(pictures)
        warped, inside = warp(pictures, views, size)
        moved = transform(views, points)
        self.model.train()
        logits, descriptors = self.model(torch.cat([relit(pictures), relit(warped)]))
        cell = self.model.stride
        labels = cell_labels(torch.cat([point_map(points, size), point_map(moved, size)]), cell)
        whole = -F.max_pool2d(-inside.float(), cell)[:, 0] > 0  # cells of which every pixel shows the picture
        detector = detector_loss(logits, labels, torch.cat([torch.ones_like(whole), whole]), config.empty_weight)
        descriptor = descriptor_loss(
            *descriptors.chunk(2), views, whole, config.descriptor_balance, config.positive, config.negative, cell
        )
        loss = 2 * detector + config.descriptor_weight * descriptor
        return {"loss": loss, "detector": detector.detach(), "descriptor": descriptor.detach()}

    def refresh_teacher(self) -> None:
        """At a round's first step the network becomes the teacher of the round."""
        config, step, now = self.config, self.runtime.step, self.round()
        first = self.shape_steps + -(-(now - 1) * (config.steps - self.shape_steps) // config.rounds)
        if step == first and self.runtime.micro == 0:
            self.teacher.load_state_dict(self.model.state_dict())
            self.labels.clear()

    def label(self, pictures: Tensor, numbers: Tensor) -> Tensor:
        """Points of pictures (B, 1, H, W) by homographic adaptation, kept for the round: (B, N, 2), NaN for none."""
        found = torch.full((len(pictures), self.config.label_points, 2), float("nan"), device=pictures.device)
        for i, number in enumerate(numbers.tolist()):
            key = (self.round(), number)
            if key not in self.labels:
                self.labels[key] = self.adapt(pictures[i], key)
            points = self.labels[key]
            found[i, : len(points)] = points
        return found

    def adapt(self, picture: Tensor, key: tuple[int, int]) -> Tensor:
        config = self.config
        rng = torch.Generator().manual_seed(self.runtime.key("adaptation", *key))
        mean = homographic_adaptation(lambda x: self.teacher(x)[0].float(), picture, config.homographies, rng=rng)
        kept = suppress(torch.where(mean > config.label_threshold, mean, 0.0)[None], config.nms_radius)[0]
        return strongest(kept, config.label_points, config.label_threshold)[0]

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """The task's pictures; shapes with their true and their found points; and photographs with the points that taught."""
        config, size = self.config, tuple(self.config.image_size)
        shapes, truth = synthetic_shapes(8, size, torch.Generator().manual_seed(1))
        maps = self.infer(shapes.to(self.runtime.device))
        found = self.extract(*maps, config.nms_radius, config.label_points)
        rows = []
        for shape, points, answer in zip(shapes, truth, found, strict=True):
            picture = (shape.expand(3, -1, -1) * 255).to(torch.uint8)
            rows += [draw_points(picture, points[~points[:, 0].isnan()]), draw_points(picture, answer.places.cpu())]
        taught = []
        for (_, number), points in list(self.labels.items())[:8]:
            picture = Grey(self.pictures, size)[number]["pictures"]
            taught.append(draw_points((picture.expand(3, -1, -1) * 255).to(torch.uint8), points.cpu()))
        shown = {"Synthetic shapes: true corners, points that are found": tile(rows, 4)}
        if taught:
            shown["Photographs with the points that homographic adaptation gave them"] = tile(taught, 4)
        return super().figures() | shown


class Grey(torch.utils.data.Dataset):
    """Pictures made grey and of one size, with their numbers."""

    def __init__(self, pictures: Photographs, size: tuple[int, int]) -> None:
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pictures": interest_points.resized(grey(self.pictures[i]), self.size)[0], "number": i}


def mirrored(pictures: Tensor, points: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shapes that were seen before, by chance with left and right, top and bottom exchanged: pictures (B, 1, H, W), points (B, N, 2)."""
    x, y = points.unbind(2)
    right, below = (torch.rand(2, generator=rng) < 0.5).tolist()
    if right:
        pictures, x = pictures.flip(3), pictures.shape[3] - 1 - x
    if below:
        pictures, y = pictures.flip(2), pictures.shape[2] - 1 - y
    return pictures, torch.stack([x, y], 2)


@functools.lru_cache(maxsize=2)
def drawn_once(count: int, size: tuple[int, int], tiles: int, seed: int) -> tuple[Tensor, Tensor]:
    """Shapes that are used again and again; treat them as read-only."""
    return shape_sheets(count, size, tiles, torch.Generator().manual_seed(seed))


RECIPE = SuperPointRecipe

PRESETS = {
    "embedded": Config(
        model="superpoint_slim",
        data="warped_photographs",
        image_size=(72, 96),
        threshold=0.001,  # after seconds of learning no pixel is sure; the strongest are taken
        points=80,
        detector_size=None,
        descriptor_size=None,
        detector_points=60,
        descriptor_points=100,
        descriptor_radius=2,
        nms_radius=3,
        shapes=128,
        shape_tiles=2,
        shape_share=0.5,
        rounds=1,
        homographies=8,
        label_points=40,
        label_threshold=0.01,
        view_angle=0.4,
        empty_weight=0.3,
        descriptor_balance=90.0,  # a cell has about three that fit, of 432 here, of 1,200 in the paper
        descriptor_weight=3.0,
        steps=185,
        batch_size=6,
        learning_rate=6e-3,
        schedule="step",  # a cosine would leave little for the descriptors, which begin half-way
        milestones=(0.8,),
        gamma=0.2,
        warmup_steps=10,
    ),
    # Sec. 4 to 6: 200,000 steps on shapes that are drawn as they are needed, then MS-COCO's 80,000 training pictures in grey at 240 x 320, labelled with
    # 100 homographies and, after a first round, labelled once more; batches of 32, Adam at 0.001.
    "published": Config(data="train2014", test_data="hpatches-sequences-release", steps=600_000, workers=8),
}
