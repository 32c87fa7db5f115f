"""Human pose, one person at a time ("top-down"): where the joints of the person in a box are.

Keypoints are x and y in pixels; the middle of the first pixel is (0, 0). Boxes are x1 y1 x2 y2, x2 and y2 exclusive.

A batch is a dict:
    images     float32 (B, 3, H, W): the crops around boxes, normalised with `facts`
    keypoints  float32 (B, K, 2), in pixels of the crop; they may lie outside of it
    weight     float32 (B, K): 1 where a keypoint is annotated (hidden ones too), 0 where it is not
and to evaluate also
    centre, scale   float32 (B, 2) each: the crop's middle in pixels of the image, its sides in units of 200 pixels
    row             int64 (B,): the row of `data.people`, or of the detected boxes

A network is a module that maps images to
    heat maps (B, K, H / stride, W / stride), or those of several stages (B, S, K, H / stride, W / stride), the last one the best.
`model.stride` (4 where there is none) is the cells' size; cell u lies at pixel stride * u. What works otherwise (a regressor of
coordinates, one-dimensional classes for x and y) says so itself, with any of
    model.losses(outputs, batch)   a dict of scalars, in place of the squared error to Gaussians
    model.decode(outputs)          keypoints (B, K, 2) in pixels of the crop, and scores (B, K)
    model.flip(outputs, flip)      the outputs for mirrored images as those for the images, for the flip test
The skeleton (`paperzoo.data.skeletons`) is in `facts`: names, mirror images, limbs, OKS's deviations. A network is made with
`num_keypoints`. A prediction is a `Poses`, in pixels of the image that was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from paperzoo.blocks.heatmaps import flip_back, gaussian_heatmaps, maxima, quarter_offset, taylor_offset
from paperzoo.data.images import to_image
from paperzoo.data.poses import EMBEDDED, PoseData, open_poses
from paperzoo.data.skeletons import Skeleton
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.classification import IMAGENET, Count, Fraction, Positive
from paperzoo.tasks.pose_boxes import Boxes, PersonDetector
from paperzoo.tasks.pose_crops import PADDING, PIXELS, Crops, apply, centre_and_scale, crop, crop_matrix, normalised
from paperzoo.tasks.pose_metrics import oks_ap, oks_nms, pckh
from paperzoo.tasks.pose_pictures import draw_poses
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Poses:
    """The people in one image, best first: one entry of each list a person. In pixels of the image.

    keypoints: K pairs of x and y for each person; keypoint_scores: K each, usually in [0, 1]; names: of the K keypoints.
    """

    keypoints: list[list[tuple[float, float]]]
    keypoint_scores: list[list[float]]
    scores: list[float]
    boxes: list[tuple[float, float, float, float]]
    names: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Config:
    """The default recipe: squared error of heat maps, Adam, and the augmentation that the released code of the field shares."""

    model: str = "pose_resnet50"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "stick_figures"
    figures: Count = 512  # how many embedded scenes to learn from, and their pixels
    figure_size: Count = 96
    image_size: tuple[Count, Count] = (256, 192)  # height and width of the crops
    sigma: Positive = 2.0  # of the targets, in cells of the heat map
    rounded_targets: bool = True  # centred on whole cells; False: unbiased, on the place itself
    weighted: bool = True  # keypoints that are not annotated do not count; False: their maps are to be empty
    normalise: Literal["imagenet", "none"] = "imagenet"
    flip: Share = 0.5
    scale_jitter: NotNegative = 0.3
    rotate: NotNegative = 40.0  # degrees
    rotate_share: Share = 0.6  # so many of the crops are turned
    jitter: Literal["normal", "uniform"] = "normal"  # normal: that deviation, cut at one (scale) and two (angle)
    half_body: Share = 0.0  # so many of the crops show the upper or the lower half alone
    colour_jitter: NotNegative = 0.0  # brightness, contrast and saturation change by up to this part
    weights: str | None = None  # start from these weights of the whole network
    backbone_weights: str | None = None  # or from a classifier's
    steps: Count = 140 * 1170
    batch_size: Count = 128
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"
    learning_rate: Positive = 1e-3
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (90 / 140, 120 / 140)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    decode: Literal["quarter", "taylor", "cell"] = "quarter"
    flip_test: bool = True
    flip_shift: bool = True  # mirrored heat maps are moved by a cell before they are averaged
    detections: str | None = None  # to evaluate: a COCO result file with people's boxes; None: the annotated boxes
    detector: str | None = None  # to predict: the folder of a finished detection run that finds the boxes
    visible_above: NotNegative = 0.2  # keypoints with more count for a person's score
    nms_oks: Share = 0.9  # of poses more alike than this, the best is kept
    workers: Annotated[int, Field(ge=0)] = 0


# -- the recipe ----------------------------------------------------------------------------------------------------------


class PoseRecipe(Recipe):
    """The task's default recipe. A paper with another way to learn overrides `losses` or gives its network the members above."""

    config: Config
    reads_images = True
    monitor = ("AP", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            mean, deviation = IMAGENET if config.normalise == "imagenet" else ([0.0] * 3, [1.0] * 3)
            self.facts = {"skeleton": self.open("train").skeleton.facts(), "mean": mean, "deviation": deviation}
        self.model = runtime.place(self.build(fresh=facts is None))
        self.optimizer = self.make_optimizer()
        factor = lambda step: learning_rate_factor(config, step)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = running_average(self.model, config.ema_decay)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.config, self.model)

    @cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton.read(self.facts["skeleton"])

    def build(self, fresh: bool) -> nn.Module:
        """The network for the data's keypoints; a fresh one starts from the weights that were asked for."""
        config = self.config
        arguments = {"num_keypoints": len(self.skeleton), **config.model_arguments}
        model = create(config.model, weights=config.weights if fresh else None, **arguments)
        if fresh and config.backbone_weights is not None:
            load_backbone(model, config.model, config.backbone_weights)
        return model

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> PoseData:
        """The raw data of a split."""
        c = self.config
        if c.data not in EMBEDDED:
            return open_poses(c.data, split)
        count = c.figures if split == "train" else min(256, c.figures)
        return open_poses(c.data, split, count=count, size=c.figure_size)

    @cached_property
    def train_data(self) -> Dataset:
        return Crops(self.open("train"), self.config, self.facts, train=True)

    @cached_property
    def test_data(self) -> Crops:
        data = self.open("test")
        boxes = None if self.config.detections is None else Boxes.read(self.config.detections, data)
        return Crops(data, self.config, self.facts, train=False, boxes=boxes)

    @cached_property
    def batches(self):
        return self.runtime.batches(self.train_data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> dict[str, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:
        return getattr(self.model, "stride", 4)

    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Heat maps (B, K, h, w) to learn, and what each one counts (B, K)."""
        height, width = (side // self.stride for side in batch["images"].shape[-2:])
        c = self.config
        maps, weight = gaussian_heatmaps(
            batch["keypoints"] / self.stride, batch["weight"], (height, width), c.sigma, c.rounded_targets
        )
        return maps, weight if c.weighted else torch.ones_like(weight)

    def losses(self, outputs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Half the mean squared error of the heat maps, summed over stages; or what the network says."""
        if hasattr(self.model, "losses"):
            return self.model.losses(outputs, batch)
        maps, weight = self.targets(batch)
        outputs = outputs.float()
        stages = outputs if outputs.ndim == 5 else outputs[:, None]
        error = (stages - maps[:, None]).square() * weight[:, None, :, None, None].square()
        return {"heatmap": 0.5 * error.mean((0, 2, 3, 4)).sum()}

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        losses = self.losses(self.model(batch["images"]), batch)
        logged = {f"{name}_loss": loss.detach() for name, loss in losses.items()} if len(losses) > 1 else {}
        return {"loss": sum(losses.values())} | logged

    # -- from outputs to poses -----------------------------------------------------------------------------------

    def outputs(self, images: Tensor) -> Any:
        """The deployed network's outputs, the last stage alone; averaged with those of the mirrored images in a flip test."""
        model = self.deployed.eval()
        last = lambda y: y[:, -1] if isinstance(y, Tensor) and y.ndim == 5 else y  # noqa: E731
        output = last(model(images))
        if not self.config.flip_test:
            return output
        other = last(model(images.flip(-1)))
        if hasattr(model, "flip"):
            other = model.flip(other, self.skeleton.flip)
        else:
            other = flip_back(other, self.skeleton.flip, self.config.flip_shift)
        return (output + other) / 2

    def decode(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs -> keypoints (B, K, 2) in pixels of the crop, and scores (B, K)."""
        if hasattr(self.deployed, "decode"):
            return self.deployed.decode(outputs)
        heatmaps = outputs.float()
        place, scores = maxima(heatmaps)
        if self.config.decode == "quarter":
            place = quarter_offset(heatmaps, place)
        elif self.config.decode == "taylor":
            place = taylor_offset(heatmaps, place, 17 if self.config.sigma >= 3 else 11)
        return place * self.stride, scores

    def poses(self, images: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Crops -> keypoints (B, K, 2) in pixels of their images, and scores (B, K); on the CPU."""
        places, scores = self.decode(self.outputs(images))
        places = places.to("cpu", torch.float32)
        matrix = crop_matrix(centre.cpu(), scale.cpu(), torch.zeros(len(places)), self.config.image_size)
        return apply(matrix, places), scores.float().cpu()

    def person_scores(self, scores: Tensor) -> Tensor:
        """(N, K) -> (N,): the mean over the keypoints that seem to be visible, 0 without any."""
        seen = scores > self.config.visible_above
        return (scores * seen).sum(1) / seen.sum(1).clamp(min=1)

    @torch.inference_mode()
    def find(self, data: Crops) -> dict[str, Tensor]:
        """The poses in a data set's boxes: row (N,), keypoints (N, K, 2), scores (N, K), of all ranks, sorted by row."""
        columns: list[tuple[Tensor, ...]] = []
        for batch in self.runtime.loader(data, min(self.config.batch_size, 64), self.config.workers):
            columns.append((batch["row"].cpu(), *self.poses(batch["images"], batch["centre"], batch["scale"])))
        joints = len(self.skeleton)
        empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, joints, 2), torch.zeros(0, joints))
        row, keypoints, scores = (torch.cat(c) for c in zip(empty, *columns, strict=True))
        if self.runtime.world > 1:
            parts: list[Any] = [None] * self.runtime.world
            torch.distributed.all_gather_object(parts, (row, keypoints, scores))
            row, keypoints, scores = (torch.cat(c) for c in zip(*parts, strict=True))
        order = row.argsort()
        return {"row": row[order], "keypoints": keypoints[order], "scores": scores[order]}

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """AP over OKS (COCO's protocol, pycocotools); and PCKh at 0.5 and 0.1 of the head size, in annotated boxes alone."""
        crops = self.test_data if split == "test" else Crops(self.open(split), self.config, self.facts, train=False)
        found, data = self.find(crops), crops.data
        metrics = oks_ap(self.ranked(found, crops), data)
        if crops.boxes is not None:
            return metrics
        people, row = data.people, found["row"]
        head = people.head_size[row]
        if bool((head > 0).any()):
            arguments = (found["keypoints"], people.keypoints[row], people.visible[row] > 0, head, data.skeleton)
            metrics |= {"PCKh": pckh(*arguments)[0], "PCKh_01": pckh(*arguments, threshold=0.1)[0]}
        return metrics

    def ranked(self, found: dict[str, Tensor], crops: Crops) -> list[dict[str, Any]]:
        """Poses as `oks_ap` takes them: scored by box and keypoints; of near duplicates in an image the best alone."""
        scores = self.person_scores(found["scores"])
        people = crops.data.people
        if crops.boxes is None:
            image, boxes = people.image[found["row"]], people.boxes[found["row"]]
        else:
            image, boxes = crops.boxes.image[found["row"]], crops.boxes.boxes[found["row"]]
            scores = scores * crops.boxes.scores[found["row"]]
        _, sides = centre_and_scale(boxes, self.config.image_size)
        area = sides.prod(1) * PIXELS**2
        results = []
        for i in image.unique().tolist():
            rows = (image == i).nonzero()[:, 0]
            kept = oks_nms(
                found["keypoints"][rows], scores[rows], area[rows], self.skeleton.sigmas, self.config.nms_oks
            )
            results += [
                {"image": i, "keypoints": found["keypoints"][r], "score": float(scores[r])} for r in rows[kept].tolist()
            ]
        return results

    # -- use -----------------------------------------------------------------------------------------------------

    @cached_property
    def person_detector(self) -> PersonDetector | None:
        return None if self.config.detector is None else PersonDetector(self.config.detector, self.runtime.device)

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Poses]:
        """Images to the people in them.

        An input is an image (a path, PIL image or array, see `paperzoo.data.images.to_image`), or a pair of an image and
        people's boxes, [[x1, y1, x2, y2], …] in its pixels. Without boxes they come from the `detector` of the config; without
        one the whole image is taken for the box of one person.
        """
        results = []
        for value in inputs:
            image, boxes = image_and_boxes(value)
            certain = torch.ones(0 if boxes is None else len(boxes))
            if boxes is None and self.person_detector is not None:
                boxes, certain = self.person_detector(image)
            elif boxes is None:
                boxes, certain = torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]]), torch.ones(1)
                boxes = unpadded(boxes)
            results.append(self.pose_in(image, boxes, certain))
        return results

    def pose_in(self, image: Tensor, boxes: Tensor, certain: Tensor) -> Poses:
        size, parts = self.config.image_size, []
        centre, scale = centre_and_scale(boxes, size)
        picture = image.float()
        for start in range(0, len(boxes), 32):
            part = slice(start, start + 32)
            matrix = crop_matrix(centre[part], scale[part], torch.zeros(len(centre[part])), size)
            crops = normalised(crop(picture, matrix, size), self.facts).to(self.runtime.device)
            parts.append(self.poses(crops, centre[part], scale[part]))
        if not parts:
            return Poses([], [], [], [], self.skeleton.names)
        keypoints, scores = (torch.cat(p) for p in zip(*parts, strict=True))
        people = self.person_scores(scores) * certain
        order = people.argsort(descending=True, stable=True)
        return as_poses(keypoints[order], scores[order], people[order], boxes[order], self.skeleton.names)

    def samples(self, folder: Path) -> list[tuple[str, list]]:
        """Eight held-out images, written as PNG files, each with the boxes of its people."""
        data, samples = self.open("test"), []
        for i in range(0, len(data), max(1, len(data) // 8))[:8]:
            path = folder / f"{i:05d}.png"
            Image.fromarray(data.image(i).permute(1, 2, 0).numpy()).save(path)
            samples.append((str(path), data.people.boxes[data.rows(i)].tolist()))
        return samples

    def example(self) -> tuple[Tensor]:
        return (torch.randn(2, 3, *self.config.image_size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Poses) -> Image.Image:
        return draw_poses(image_and_boxes(value)[0], result, self.skeleton, self.config.visible_above)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with the poses that were found, and those that are there."""
        from paperzoo.engine.pictures import tile

        data = self.open("test")
        found, true = [], []
        for i in range(0, len(data), max(1, len(data) // 16))[:16]:
            item = data[i]
            kept = ~item["crowd"] & (item["visible"] > 0).any(1)
            result = self.predict([(item["image"], item["boxes"][kept].tolist())])[0]
            found.append(draw_poses(item["image"], result, self.skeleton, self.config.visible_above))
            there = as_poses(
                item["keypoints"][kept],
                (item["visible"][kept] > 0).float(),
                torch.ones(int(kept.sum())),
                item["boxes"][kept],
                self.skeleton.names,
            )
            true.append(draw_poses(item["image"], there, self.skeleton, 0.5))
        return {"Found": tile(found, 4), "There": tile(true, 4)}


def load_backbone(model: nn.Module, name: str, weights: str) -> None:
    """Fill a network's backbone from a classifier's file.

    Raises:
        PaperZooError: if the network takes none, or they do not fit.
    """
    from paperzoo.engine.weights import read_state

    if not hasattr(model, "load_backbone"):
        raise PaperZooError(f"backbone_weights: {name} has no backbone that a classifier's weights fit")
    try:
        model.load_backbone(read_state(Path(weights).expanduser()))
    except (ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise PaperZooError(f"{weights}: these weights do not fit the backbone of {name}: {line}") from None


def unpadded(boxes: Tensor) -> Tensor:
    """Boxes made narrower, so that their crops, a quarter wider, show just them."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 / PADDING
    return torch.cat([middle - half, middle + half], 1)


def image_and_boxes(value: Any) -> tuple[Tensor, Tensor | None]:
    """What a user gave: an image, or an image with boxes, as uint8 (3, H, W) and float32 (N, 4) or None.

    Raises:
        PaperZooError: if the boxes are no rows of x1 y1 x2 y2 with positive width and height.
    """
    if not (isinstance(value, tuple | list) and len(value) == 2):
        return to_image(value), None
    image, boxes = value
    try:
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    except (TypeError, ValueError, RuntimeError):
        raise PaperZooError("boxes are rows of four numbers: x1, y1, x2, y2 in pixels of the image") from None
    if not bool(torch.isfinite(boxes).all()) or not bool((boxes[:, 2:] > boxes[:, :2]).all()):
        raise PaperZooError("a box needs x1 < x2 and y1 < y2, in pixels of the image")
    return to_image(image), boxes


def as_poses(keypoints: Tensor, scores: Tensor, people: Tensor, boxes: Tensor, names: Sequence[str]) -> Poses:
    """Tensors (N, K, 2), (N, K), (N,), (N, 4) as a `Poses`."""
    rounded = lambda rows: [tuple(round(v, 2) for v in row) for row in rows]  # noqa: E731
    points = [rounded(person) for person in keypoints.tolist()]
    return Poses(points, scores.tolist(), people.tolist(), rounded(boxes.tolist()), tuple(names))
