"""Depth from one image: how far away what each pixel shows is, along the optical axis.

A batch is a dict:
    image       float32 (B, 3, H, W) in [0, 1], RGB, as the network gets it (networks normalise it themselves)
    depth       float32 (B, 1, H, W), metres, 0 where it is unknown; where the data has depth and `config.depth_labels`
    target      float32 (B, 3, H, W): `image` before its colours were changed           \\
    frames      float32 (B, F, 3, H, W): `config.frames`, colours changed alike         |  only with `config.frames`,
    sources     float32 (B, F, 3, H, W): the same as they were                          |  for learning from video
    intrinsics  float32 (B, 3, 3), in pixels of the batch's images                      |  or from stereo pairs
    stereo      float32 (B, 4, 4), from the image's camera to the second one            /  only with "s" among them

In eval a network maps images to one map (B, 1, h, w) at whatever resolution it has; what the map means (metres, a disparity, a
logarithm) is said by the recipe: `to_depth` makes positive depth of it, `depth_at` brings it to an image's size. In training a network may
return anything its recipe's `loss` takes: a list of scales, a dict, bins. A recipe may hold more networks (camera motion, masks).

Whether the depth is in metres is said by `config.alignment`: "none" for metric depth; "median", "scale", "affine" and "affine_inverse"
bring a depth that is known up to a scale, or a scale and a shift, to the truth before it is measured; `silog` and `ordinal_error` need
no alignment. See `paperzoo.tasks.depth_metrics` for the protocol. A prediction is a `Depth`.
"""

from __future__ import annotations

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
from torchvision.transforms import v2

from paperzoo.data.depth import open_depth
from paperzoo.data.images import to_image
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.depth_metrics import Alignment, Crop, DepthMetrics
from paperzoo.tasks.depth_pictures import colours, enlarged, limits, side_by_side
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Frame = Annotated[int, Field(ge=-100, le=100)] | Literal["s"]

FLAT = 16  # images that are predicted together


@dataclass(frozen=True)
class Depth:
    """The answer for one image, at its own size.

    depth: float32 (H, W), positive, along the optical axis. metric: whether it is in metres; else only its proportions mean something.
    nearest, median, farthest: of the map.
    """

    depth: Tensor = field(repr=False)
    metric: bool
    nearest: float
    median: float
    farthest: float


@dataclass(frozen=True)
class Config:
    """The default recipe: an encoder-decoder and a loss on known depth, Adam."""

    model: str = "densedepth169"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "traced_scenes"
    depth_scale: Positive = 1000.0  # units a metre of the data's depth pictures
    focal_length: Positive = 0.8  # of cameras that the data says nothing about, in image widths
    image_size: tuple[Count, Count] = (
        480,
        640,
    )  # height and width that the network sees; images of other sizes are resized
    min_depth: Positive = 1e-3  # metres; nearer truth does not count
    max_depth: Positive = 10.0
    crop: Crop = "none"
    alignment: Alignment = "none"
    average: Literal["images", "pixels"] = "images"
    mirror_test: bool = False  # the mean of an image's and its mirror image's depth
    frames: tuple[Frame, ...] = ()  # other frames that learning needs
    depth_labels: bool = True  # whether learning sees depth
    flip: Fraction = 0.5  # probability of a mirrored image
    channel_swap: Fraction = 0.0  # probability of colour channels in another order
    colour_jitter: Fraction = 0.0  # probability of changed brightness, contrast, saturation, hue
    loss: Literal["l1", "berhu", "silog"] = "silog"
    weights: str | None = None  # start from these weights of the whole network
    backbone_weights: str | None = None  # a classifier's file for the encoder
    steps: Count = 100_000
    batch_size: Count = 8
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adam"
    learning_rate: Positive = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[Fraction, ...] = (
        0.75,
    )  # of "step": after these shares of the steps the rate is multiplied by gamma
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip: Positive | None = None
    workers: Annotated[int, Field(ge=0)] = 0


# -- samples to network inputs -------------------------------------------------------------------------------------------


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (…, 3, H, W) to float32 in [0, 1] of (height, width)."""
    values = images.float() / 255
    if tuple(images.shape[-2:]) == size:
        return values
    flat = values.reshape(-1, *values.shape[-3:])
    flat = F.interpolate(flat, size, mode="bilinear", align_corners=False, antialias=True)
    return flat.clamp(0, 1).reshape(*values.shape[:-2], *size)


def resized_camera(intrinsics: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Intrinsics (3, 3) of a resized image; pixels have whole coordinates at their middles, so half a pixel is what stays."""
    x, y = after[1] / before[1], after[0] / before[0]
    camera = intrinsics * torch.tensor([[x], [y], [1.0]])
    camera[0, 2] += (x - 1) / 2
    camera[1, 2] += (y - 1) / 2
    return camera


class TrainingSamples(Dataset):
    """A depth set's items as a batch has them: resized, mirrored, with changed colours; random numbers from torch's global generator."""

    def __init__(self, data: Any, config: Config) -> None:
        self.data, self.config = data, config
        self.jitter = v2.ColorJitter(0.2, 0.2, 0.2, 0.1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item, config = self.data[i], self.config
        before, size = tuple(item["image"].shape[-2:]), tuple(config.image_size)
        views = resized(
            torch.cat([item["image"][None], item["frames"]]) if "frames" in item else item["image"][None], size
        )
        found: dict[str, Tensor] = {}
        if "depth" in item:
            found["depth"] = F.interpolate(item["depth"][None], size, mode="nearest-exact")[0]
        if "frames" in item:
            found["intrinsics"] = resized_camera(item["intrinsics"], before, size)
        if "stereo" in item:
            found["stereo"] = item["stereo"].clone()
        mirror, swap, jitter = (
            torch.rand(3) < torch.tensor([config.flip, config.channel_swap, config.colour_jitter])
        ).tolist()
        if mirror:
            views = views.flip(-1)
            if "depth" in found:
                found["depth"] = found["depth"].flip(-1)
            if "intrinsics" in found:
                found["intrinsics"][0, 2] = size[1] - 1 - found["intrinsics"][0, 2]
            if "stereo" in found:
                found["stereo"][0, 3] = -found["stereo"][0, 3]
        plain = views
        if jitter:
            views = self.jitter(views)  # one draw for all frames, so that they stay comparable
        if swap:
            views = views[:, torch.randperm(3)]
        found["image"] = views[0]
        if "frames" in item:
            found |= {"target": plain[0], "frames": views[1:], "sources": plain[1:]}
        return found


class TestSamples(Dataset):
    """A depth set's items for measuring: the network's input, and the depth at its own size."""

    def __init__(self, data: Any, size: tuple[int, int]) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        item = self.data[i]
        return resized(item["image"], self.size), item["depth"][0]


def as_list(samples: list) -> tuple[Tensor, list[Tensor]]:
    """Collates network inputs of one size with depth maps of any."""
    return torch.stack([s[0] for s in samples]), [s[1] for s in samples]


# -- losses --------------------------------------------------------------------------------------------------------------


def depth_loss(depth: Tensor, truth: Tensor, kind: str) -> Tensor:
    """A loss of positive depth (B, 1, H, W) where the truth (of the same shape) is not 0.

    "l1": the mean distance. "berhu": the same, squared beyond a fifth of the batch's largest (Laina et al. 2016). "silog": the
    scale-invariant log error with lambda = 0.5 (Eigen et al. 2014), the root of it.
    """
    known = truth > 0
    count = known.sum().clamp(min=1)
    if kind == "silog":
        apart = torch.where(known, depth.clamp(min=1e-6).log() - truth.clamp(min=1e-6).log(), 0.0)
        mean = apart.sum() / count
        return (apart.square().sum() / count - 0.5 * mean.square()).clamp(min=1e-8).sqrt()
    apart = torch.where(known, (depth - truth).abs(), 0.0)
    if kind == "berhu":
        border = (0.2 * apart.detach().max()).clamp(min=1e-6)
        apart = torch.where(apart <= border, apart, (apart.square() + border**2) / (2 * border))
    return apart.sum() / count


class DepthRecipe(Recipe):
    """The task's default recipe. Papers override `loss`, `to_depth` or `step`, and add networks in `build_more`."""

    config: Config
    reads_images = True
    monitor = ("abs_rel", "min")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.min_depth >= config.max_depth:
            raise PaperZooError(f"min_depth is {config.min_depth}; it must be below max_depth, {config.max_depth}")
        if 0 in config.frames:
            raise PaperZooError("frames holds 0, which is the image itself; -1 is the one before, 1 the one after")
        if facts is None:
            self.facts = {"metric": config.alignment == "none"}
            _ = self.train_set  # what is wrong with the data is said before anything is built
        self.model = runtime.place(self.build(fresh=facts is None))
        self.build_more(fresh=facts is None)
        self.average = running_average(self.model, config.ema_decay)
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: learning_rate_factor(config, s))

    def build(self, fresh: bool) -> nn.Module:
        """The network; a fresh one starts from the encoder's weights that were asked for."""
        config = self.config
        model = create(config.model, weights=config.weights, **config.model_arguments)
        if fresh and config.backbone_weights is not None:
            self.load_backbone(model)
        return model

    def load_backbone(self, model: nn.Module) -> None:
        """Fill a network's encoder from the classifier's file at `backbone_weights`."""
        from paperzoo.engine.weights import read_state

        place = self.config.backbone_weights
        try:
            model.load_backbone(read_state(Path(place).expanduser()))
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            line = " ".join(str(error).split())[:200]
            raise PaperZooError(f"{place}: does not fit the encoder of {type(model).__name__}: {line}") from error

    def build_more(self, fresh: bool) -> None:
        """Networks besides `self.model`."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.config, self.model)

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str, learning: bool = False):
        """A split's images with their depth; with what learning needs besides, or instead, if `learning`."""
        config = self.config
        return open_depth(
            config.data,
            split,
            frames=config.frames if learning else (),
            depth=config.depth_labels or not learning,
            depth_scale=config.depth_scale,
            focal_length=config.focal_length,
        )

    @cached_property
    def train_set(self):
        data = self.open("train", learning=True)
        if self.config.depth_labels and not data.has_depth:
            raise PaperZooError(
                f"{self.config.data} has no depth, from which this recipe learns; give images/ and depth/"
            )
        return data

    @cached_property
    def test_set(self):
        return self.open("test")

    @cached_property
    def batches(self):
        data = TrainingSamples(self.train_set, self.config)
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> dict[str, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def to_depth(self, output: Tensor) -> Tensor:
        """What the deployed network returns, as positive depth of the same shape: here it is depth already."""
        return output.clamp(min=1e-6)

    def depth_at(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """The network's output (B, 1, h, w) as depth (B, 1, H, W): enlarged first, then made depth."""
        return self.to_depth(F.interpolate(output, size, mode="bilinear", align_corners=False))

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """The loss of what the network returned in training."""
        depth = self.to_depth(F.interpolate(output, batch["depth"].shape[-2:], mode="bilinear", align_corners=False))
        return depth_loss(depth, batch["depth"], self.config.loss)

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        return {"loss": self.loss(self.model(batch["image"]), batch)}

    def infer(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Depth (B, 1, H, W) of network inputs, by the deployed network."""
        model = self.deployed.eval()
        depth = self.depth_at(model(images).float(), size)
        if self.config.mirror_test:
            depth = (depth + self.depth_at(model(images.flip(-1)).float(), size).flip(-1)) / 2
        return depth

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The metrics of `DepthMetrics`; nothing where the data has no depth."""
        data, config = self.test_set if split == "test" else self.open(split), self.config
        if not data.has_depth:
            return {}
        metrics = DepthMetrics(config.crop, config.alignment, config.min_depth, config.max_depth, config.average)
        metrics = metrics.to(self.runtime.device)
        samples = TestSamples(data, tuple(config.image_size))
        for images, truths in self.runtime.loader(samples, FLAT, config.workers, collate=as_list):
            sizes = {tuple(t.shape) for t in truths}
            for size in sizes:
                rows = [i for i, t in enumerate(truths) if tuple(t.shape) == size]
                for row, depth in zip(rows, self.infer(images[rows], size), strict=True):
                    metrics.update(depth[0], truths[row])
        return metrics.compute()

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Depth]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to depth maps of the same height and width."""
        size, results = tuple(self.config.image_size), []
        for start in range(0, len(inputs), FLAT):
            images = [to_image(value) for value in inputs[start : start + FLAT]]
            batch = torch.stack([resized(image, size) for image in images]).to(self.runtime.device)
            own = [tuple(image.shape[-2:]) for image in images]
            found: dict[int, Tensor] = {}
            for wanted in set(own):
                rows = [i for i, s in enumerate(own) if s == wanted]
                found.update(zip(rows, self.infer(batch[rows], wanted).cpu(), strict=True))
            results += [self.answer(found[i][0]) for i in range(len(images))]
        return results

    def answer(self, depth: Tensor) -> Depth:
        depth = depth.clamp(max=self.config.max_depth) if self.facts["metric"] else depth
        return Depth(depth, self.facts["metric"], float(depth.min()), float(depth.median()), float(depth.max()))

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out images, written as PNG files."""
        paths, data = [], self.test_set
        for i in range(0, len(data), max(1, len(data) // 8))[:8]:
            paths.append(str(folder / f"{i:05d}.png"))
            Image.fromarray(data.image(i).permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor]:
        return (torch.rand(2, 3, *self.config.image_size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Depth) -> Image.Image:
        return side_by_side(to_image(value), result.depth, result.metric)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images, their true depth and the answer, in the same colours; an answer without a scale is brought to the truth's."""
        from paperzoo.engine.pictures import tile
        from paperzoo.tasks.depth_metrics import align

        data, pictures = self.test_set, []
        shown = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:8].tolist()
        for i in shown:
            item = data[i]
            depth = self.predict([item["image"]])[0].depth
            pictures.append(enlarged(Image.fromarray(item["image"].permute(1, 2, 0).numpy())))
            if not data.has_depth:
                pictures.append(enlarged(colours(depth)))
                continue
            truth = item["depth"][0]
            known, span = truth > 0, limits(truth)
            if bool(known.any()):
                scale = align(depth[known], truth[known], self.config.alignment).sum() / depth[known].sum()
                depth = depth * scale if self.config.alignment in ("median", "scale") else depth
            pictures += [enlarged(colours(truth, span)), enlarged(colours(depth, span))]
        title = "Held-out images: picture, true depth, answer" if data.has_depth else "Held-out images: picture, answer"
        return {title: tile(pictures, 6)}
