"""Human pose, everybody in the image at once ("bottom-up"): no boxes are needed, and the time hardly depends on the number of people.

Keypoints are x and y in pixels; the middle of the first pixel is (0, 0).

A batch is a dict:
    images     float32 (B, 3, H, W), normalised with `facts`: parts of the images, randomly scaled, turned, mirrored
    keypoints  float32 (B, P, K, 2) in pixels of those; P is the largest number of people in the batch
    weight     float32 (B, P, K): 1 where a keypoint is annotated and within the part, else 0; rows of nobody are 0
    boxes      float32 (B, P, 4), x1 y1 x2 y2, of the whole person in the same pixels; of nobody 0
    mask       bool (B, H, W): False where people are not annotated (crowds, people without keypoints): nothing counts there

A network is a module with four members, whatever it assembles people from (affinity fields, tags, offsets, queries):
    model(images)                              raw outputs, a tensor or a tuple of tensors (B, …): what is exported
    model.losses(outputs, batch, skeleton)     a dict of scalars, their sum is learned from
    model.decode(outputs, skeleton)            for each image {"keypoints": (N, K, 2) in pixels of the input, "keypoint_scores":
                                               (N, K), 0 where a keypoint was not found, "scores": (N,)}, best first
    model.multiple                             images are padded to a multiple of it (32 where there is none)
or its recipe overrides `losses` and `detect`. Networks are made with `num_keypoints` (and what `arguments` adds).
The skeleton in `facts` is the network's; the data's keypoints are brought into its order by name. A prediction is a
`paperzoo.tasks.pose.Poses`.
"""

from __future__ import annotations

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

from paperzoo.data.images import to_image
from paperzoo.data.poses import EMBEDDED, PoseData, open_poses
from paperzoo.data.skeletons import Skeleton, translate
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError
from paperzoo.tasks.classification import IMAGENET, Count, Fraction, Positive
from paperzoo.tasks.pose import Poses, Share, as_poses, load_backbone
from paperzoo.tasks.pose_crops import PIXELS, apply, crop, crop_matrix, inverse, mirrored, normalised
from paperzoo.tasks.pose_metrics import oks_ap
from paperzoo.tasks.pose_pictures import draw_poses
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

GREY = 128.0  # what lies beyond an image
NORMALISATIONS = {
    "imagenet": IMAGENET,
    "none": ([0.0] * 3, [1.0] * 3),
    "half": ([128 / 255] * 3, [256 / 255] * 3),  # pixel / 256 - 0.5
}


@dataclass(frozen=True)
class Config:
    """The default recipe: the network's losses, parts of images around a random person, stochastic gradient descent."""

    model: str = "openpose_coco18"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "stick_crowds"
    figures: Count = 512  # how many embedded scenes to learn from, their pixels, people and sizes
    figure_size: Count = 160
    figure_people: Count = 4
    figure_scale: tuple[float, float] = (0.45, 0.75)
    image_size: tuple[Count, Count] = (368, 368)  # height and width of the parts that are learned from
    framing: Literal["person", "image"] = "person"  # around a random person of a random height, or the image's middle
    person_share: tuple[Positive, Positive] = (0.3, 0.66)  # person: that height as a part of the crop's
    image_scale: tuple[Positive, Positive] = (0.75, 1.5)  # image: its longer side as a part of the crop's
    shift: Share = 0.11  # the middle moves by up to this part of the crop
    flip: Share = 0.5
    rotate: Annotated[float, Field(ge=0)] = 40.0  # degrees to either side
    normalise: Literal["imagenet", "none", "half"] = "imagenet"
    test_size: Count | None = 368  # the height that images are brought to; None: as they are
    test_scales: tuple[Positive, ...] = (1.0,)  # factors on it, for networks whose recipe averages over them
    flip_test: bool = False
    weights: str | None = None  # start from these weights of the whole network
    backbone_weights: str | None = None  # or from a classifier's
    steps: Count = 600_000
    batch_size: Count = 10
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 4e-5
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = ()
    gamma: Positive = 0.333
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    show_above: Share = 0.2  # pictures show people with at least this score
    workers: Annotated[int, Field(ge=0)] = 0


class Parts(Dataset):
    """Random parts of a data set's images with everybody in them, as the module's docstring says, for one image."""

    def __init__(self, data: PoseData, config: Any, facts: dict) -> None:
        self.data, self.config, self.facts = data, config, facts
        self.skeleton = Skeleton.read(facts["skeleton"])
        self.images = data.people.image[data.people.learnable()].unique().tolist()
        if not self.images:
            raise DataError(data.path(0), "no image with an annotated person in this split")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        c, item = self.config, self.data[self.images[index]]
        size, image = c.image_size, item["image"].float()
        keypoints, visible = translate(item["keypoints"], item["visible"], self.data.skeleton, self.skeleton)
        centre, width = self.frame(item)
        scale = torch.stack([width, width * size[0] / size[1]])[None] / PIXELS
        degrees = (2 * torch.rand(1) - 1) * c.rotate
        if float(torch.rand(())) < c.flip:
            matrix = mirrored(centre[None], scale, degrees, size, image.shape[2])
            keypoints, visible = keypoints[:, self.skeleton.flip], visible[:, self.skeleton.flip]
        else:
            matrix = crop_matrix(centre[None], scale, degrees, size)
        picture = normalised(crop(image, matrix, size, GREY), self.facts)[0]
        mask = crop((~item["mask"]).float()[None], matrix, size)[0, 0] < 0.5
        back, people = inverse(matrix), len(keypoints)
        keypoints = apply(back.expand(people, -1, -1), keypoints)
        limit = torch.tensor([size[1], size[0]])
        inside = ((keypoints >= 0) & (keypoints < limit)).all(2)
        x1, y1, x2, y2 = (item["boxes"] - 0.5).unbind(1)
        corners = torch.stack([torch.stack([x, y], 1) for x in (x1, x2) for y in (y1, y2)], 1)
        corners = apply(back.expand(people, -1, -1), corners) + 0.5
        boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
        kept = ~item["crowd"] & (visible > 0).any(1)
        weight = ((visible > 0) & inside).float()
        return {
            "images": picture,
            "keypoints": keypoints[kept],
            "weight": weight[kept],
            "boxes": boxes[kept],
            "mask": mask,
        }

    def frame(self, item: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Which part: its middle (2,) and its width in pixels of the image."""
        c, (height, width) = self.config, self.config.image_size
        draw = lambda low, high: low + (high - low) * torch.rand(())  # noqa: E731
        extent = torch.tensor(item["image"].shape[1:]).float()
        if c.framing == "person":
            rows = (~item["crowd"] & (item["visible"] > 0).any(1)).nonzero()[:, 0]
            box = item["boxes"][rows[int(torch.randint(len(rows), ()))]]
            centre = (box[:2] + box[2:]) / 2 - 0.5
            tall = (box[3] - box[1]).clamp(min=1) / draw(*c.person_share)
        else:
            centre = extent.flip(0) / 2 - 0.5
            tall = torch.maximum(extent[0], extent[1] * height / width) / draw(*c.image_scale)
        across = tall * width / height
        centre = centre + (2 * torch.rand(2) - 1) * c.shift * torch.stack([across, tall])
        return centre, across


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples of `Parts` to a batch: with nobody in the rows that an image has too few people for."""
    most = max(1, *(len(s["keypoints"]) for s in samples))
    batch = {key: torch.stack([s[key] for s in samples]) for key in ("images", "mask")}
    for key in ("keypoints", "weight", "boxes"):
        padded = [F.pad(s[key], (0, 0) * (s[key].ndim - 1) + (0, most - len(s[key]))) for s in samples]
        batch[key] = torch.stack(padded)
    return batch


class Whole(Dataset):
    """The images of a data set as they are, with their positions."""

    def __init__(self, data: PoseData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.data.image(index)


def as_list(samples: list) -> list:
    return samples


class MultiPoseRecipe(Recipe):
    """The task's default recipe. Its network has the members that the module's docstring names, or a subclass says what they are."""

    config: Config
    reads_images = True
    monitor = ("AP", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            mean, deviation = NORMALISATIONS[config.normalise]
            skeleton = self.network_skeleton(self.open("train").skeleton)
            self.facts = {"skeleton": skeleton.facts(), "mean": list(mean), "deviation": list(deviation)}
        self.model = runtime.place(self.build(fresh=facts is None))
        self.optimizer = self.make_optimizer()
        factor = lambda step: learning_rate_factor(config, step)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = running_average(self.model, config.ema_decay)

    def network_skeleton(self, skeleton: Skeleton) -> Skeleton:
        """The keypoints that the network finds, for data with these ones."""
        return skeleton

    def arguments(self) -> dict[str, Any]:
        """What the network is made with."""
        return {"num_keypoints": len(self.skeleton)}

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.config, self.model)

    @cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton.read(self.facts["skeleton"])

    def build(self, fresh: bool) -> nn.Module:
        config = self.config
        arguments = {**self.arguments(), **config.model_arguments}
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
        count = c.figures if split == "train" else min(128, c.figures)
        options = {"max_people": c.figure_people, "scale": c.figure_scale}
        return open_poses(c.data, split, count=count, size=c.figure_size, **options)

    @cached_property
    def train_data(self) -> Dataset:
        return Parts(self.open("train"), self.config, self.facts)

    @cached_property
    def test_data(self) -> Whole:
        return Whole(self.open("test"))

    @cached_property
    def batches(self):
        c = self.config
        return self.runtime.batches(self.train_data, c.batch_size, workers=c.workers, collate=collate)

    def batch(self) -> dict[str, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def losses(self, outputs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.losses(outputs, batch, self.skeleton)

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        losses = self.losses(self.model(batch["images"]), batch)
        return {"loss": sum(losses.values())} | {f"{name}_loss": loss.detach() for name, loss in losses.items()}

    # -- use -----------------------------------------------------------------------------------------------------

    def network_input(self, images: Tensor, scale: float = 1.0) -> tuple[Tensor, float]:
        """Images of one size, uint8 (B, 3, H, W), brought to the test size and padded with grey on the right and below.

        Returns:
            float32 (B, 3, h, w) on the device, and the factor that the images were enlarged by.
        """
        c, multiple = self.config, getattr(self.model, "multiple", 32)
        factor = scale * (1.0 if c.test_size is None else c.test_size / images.shape[2])
        pixels = images.to(self.runtime.device).float()
        if factor != 1.0:
            size = [max(1, round(side * factor)) for side in images.shape[2:]]
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        height, width = pixels.shape[2:]
        pixels = F.pad(pixels, (0, -width % multiple, 0, -height % multiple), value=GREY)
        return normalised(pixels, self.facts), factor

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Images of one size, uint8 (B, 3, H, W), to everybody in them, in their pixels: as `model.decode` says it."""
        model = self.deployed.eval()
        inputs, factor = self.network_input(images)
        found = model.decode(model(inputs), self.skeleton)
        for people in found:  # the middles of pixels lie half a pixel within their edges
            people["keypoints"] = (people["keypoints"] + 0.5) / factor - 0.5
        return found

    def detect_all(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The same for images of any sizes, on the CPU; those of one size together."""
        results: list[Any] = [None] * len(images)
        for shape in dict.fromkeys(image.shape for image in images):
            rows = [i for i, image in enumerate(images) if image.shape == shape]
            found = self.detect(torch.stack([images[i] for i in rows]))
            for i, people in zip(rows, found, strict=True):
                results[i] = {key: value.detach().float().cpu() for key, value in people.items()}
        return results

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """AP over OKS (COCO's protocol, pycocotools) of everybody in every image."""
        data = self.test_data if split == "test" else Whole(self.open(split))
        found = []
        for samples in self.runtime.loader(data, min(self.config.batch_size, 16), self.config.workers, as_list):
            for (index, _), people in zip(samples, self.detect_all([image for _, image in samples]), strict=True):
                points, _ = translate(people["keypoints"], people["keypoint_scores"], self.skeleton, data.data.skeleton)
                found += [
                    {"image": index, "keypoints": p, "score": float(s)}
                    for p, s in zip(points, people["scores"], strict=True)
                ]
        if self.runtime.world > 1:
            parts: list[Any] = [None] * self.runtime.world
            torch.distributed.all_gather_object(parts, found)
            found = sorted((pose for part in parts for pose in part), key=lambda pose: pose["image"])
        return oks_ap(found, data.data)

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Poses]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to everybody in them."""
        results = []
        for start in range(0, len(inputs), 8):
            images = [to_image(value) for value in inputs[start : start + 8]]
            results += [self.answer(people) for people in self.detect_all(images)]
        return results

    def answer(self, people: dict[str, Tensor]) -> Poses:
        keypoints, scores = people["keypoints"], people["keypoint_scores"]
        seen = (scores > 0)[..., None]
        low = keypoints.masked_fill(~seen, torch.inf).amin(1) if len(keypoints) else torch.zeros(0, 2)
        high = keypoints.masked_fill(~seen, -torch.inf).amax(1) if len(keypoints) else torch.zeros(0, 2)
        boxes = torch.cat([low, high + 1], 1).nan_to_num(0.0, 0.0, 0.0)
        return as_poses(keypoints, scores, people["scores"], boxes, self.skeleton.names)

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out images, written as PNG files."""
        data, paths = self.open("test"), []
        for i in range(0, len(data), max(1, len(data) // 8))[:8]:
            paths.append(str(folder / f"{i:05d}.png"))
            Image.fromarray(data.image(i).permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor]:
        return (torch.randn(2, 3, *self.config.image_size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Poses) -> Image.Image:
        shown = sum(s >= self.config.show_above for s in result.scores)
        best = Poses(
            *(part[:shown] for part in (result.keypoints, result.keypoint_scores, result.scores, result.boxes)),
            result.names,
        )
        return draw_poses(to_image(value), best, self.skeleton, 0.0)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with everybody who was found, and everybody who is there."""
        from paperzoo.engine.pictures import tile

        data = self.open("test")
        chosen = range(0, len(data), max(1, len(data) // 12))[:12]
        results = self.predict([data.image(i) for i in chosen])
        found = [self.draw(data.image(i), r) for i, r in zip(chosen, results, strict=True)]
        true = []
        for i in chosen:
            item = data[i]
            ones = torch.ones(len(item["boxes"]))
            there = as_poses(item["keypoints"], (item["visible"] > 0).float(), ones, item["boxes"], data.skeleton.names)
            true.append(draw_poses(item["image"], there, data.skeleton, 0.5))
        return {"Found": tile(found, 4), "There": tile(true, 4)}
