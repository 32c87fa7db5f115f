"""Optical flow: where each pixel of one picture is in the next one.

A batch is a dict:
    first, second   float32 (B, 3, H, W) in [0, 1], RGB
    flow            float32 (B, 2, H, W), pixels to the right and down                \\ with `config.flow_labels`,
    valid           bool (B, 1, H, W), where the flow is known                         | where the data has flow
    occluded        bool (B, 1, H, W), what the second picture does not show          /

In eval a network maps (first, second) to the flow (B, 2, H, W) in pixels of its inputs, whatever it computes inside. In training it may return
anything its recipe's `loss` takes: scales, iterations, both directions. If it has a `divisor`, pictures are resized to multiples of
it before and the flow brought back after. A recipe that learns without flow sets `flow_labels` to false and gets the pictures alone.

A prediction is a `Flow`. What is asked is a pair (first, second), or one string, "first.png :: second.png". The metrics are those of
`paperzoo.tasks.flow_metrics`.
"""

from __future__ import annotations

from collections import defaultdict
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

from paperzoo.data.flow import FlowData, open_flow
from paperzoo.data.images import to_image
from paperzoo.engine.models import create
from paperzoo.engine.pictures import tile
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.depth_pictures import enlarged
from paperzoo.tasks.flow_augment import moved, recoloured
from paperzoo.tasks.flow_metrics import FlowMetrics, end_point_error
from paperzoo.tasks.flow_pictures import colours, errors, side_by_side
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

BETWEEN = " :: "
PIXELS = 2_000_000  # of pictures that go through the network together when measuring
UNSIZED = (64, 96)  # of the example, where the config names no size


@dataclass(frozen=True)
class Flow:
    """The answer for one pair: flow float32 (2, H, W) at the first picture's size, pixels to the right and down; the mean and the largest speed."""

    flow: Tensor = field(repr=False)
    mean_speed: float
    largest_speed: float


@dataclass(frozen=True)
class Config:
    """The default recipe: a network that learns from known flow, Adam."""

    model: str = "pwc_net"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "moving_layers"
    test_data: str | None = None  # another set to measure on, the whole of it
    render_pass: Literal["clean", "final", "both"] = "final"  # of Sintel and FlyingThings3D
    crop_size: tuple[Count, Count] | None = None  # height and width of what learning sees; None: whole pictures
    augment: Literal["none", "flip", "flownet"] = "flownet"  # "flip": left-right and, half as often, upside down
    flip: Fraction = 0.0  # probability of a mirrored pair, with "flownet"
    noise: NotNegative = 0.04  # largest deviation of added noise, with "flownet"
    flow_labels: bool = True  # whether learning sees flow
    weights: str | None = None
    steps: Count = 1_200_000
    batch_size: Count = 8
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = False
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[Fraction, ...] = (0.5,)  # of "step": after these shares of the steps the rate is multiplied
    gamma: Positive = 0.5
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip: Positive | None = None
    workers: Annotated[int, Field(ge=0)] = 0


# -- samples -------------------------------------------------------------------------------------------------------------


def mirrored(item: dict[str, Tensor], axis: int) -> dict[str, Tensor]:
    """An item turned around along its width (-1) or height (-2); the flow along it changes its sign."""
    found = {k: v.flip(axis) for k, v in item.items()}
    if "flow" in found:
        sign = torch.tensor([-1.0, 1.0] if axis == -1 else [1.0, -1.0])
        found["flow"] = found["flow"] * sign[:, None, None]
    return found


def cropped(item: dict[str, Tensor], size: tuple[int, int], where: str) -> dict[str, Tensor]:
    """A random part of (height, width); `where` names the item in an error."""
    height, width = item["first"].shape[-2:]
    if height < size[0] or width < size[1]:
        raise DataError(where, f"is {width} x {height} pixels, smaller than crop_size, {size[1]} x {size[0]}")
    top = int(torch.randint(height - size[0] + 1, ()))
    left = int(torch.randint(width - size[1] + 1, ()))
    return {k: v[..., top : top + size[0], left : left + size[1]] for k, v in item.items()}


class TrainingPairs(Dataset):
    """A flow set's items as a batch has them; random numbers from torch's global generator."""

    def __init__(self, data: FlowData, config: Config) -> None:
        self.data, self.config = data, config

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        config, item = self.config, dict(self.data[i])
        if not config.flow_labels:
            item = {k: item[k] for k in ("first", "second")}
        for k in ("first", "second"):
            item[k] = item[k].float() / 255
        size = None if config.crop_size is None else tuple(config.crop_size)
        if config.augment == "flownet":
            item = moved(item, size or tuple(item["first"].shape[-2:]))
            item["first"], item["second"] = recoloured(item["first"], item["second"], config.noise)
        elif size is not None:
            item = cropped(item, size, self.data.path(i))
        across, down = {"none": (0.0, 0.0), "flip": (0.5, 0.25), "flownet": (config.flip, 0.0)}[config.augment]
        for axis, chance in ((-1, across), (-2, down)):
            if chance and float(torch.rand(())) < chance:
                item = mirrored(item, axis)
        return item


def as_lists(items: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Pairs of any sizes, as they are."""
    return items


# -- recipe --------------------------------------------------------------------------------------------------------------


class FlowRecipe(Recipe):
    """The task's default recipe. Papers override `loss` or `step`."""

    config: Config
    monitor = ("epe", "min")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if facts is None:
            _ = self.train_set  # what is wrong with the data is said before anything is built
        self.model = runtime.place(self.build())
        self.average = running_average(self.model, config.ema_decay)
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: learning_rate_factor(config, s))

    def build(self) -> nn.Module:
        return create(self.config.model, weights=self.config.weights, **self.config.model_arguments)

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> FlowData:
        if split == "test" and self.config.test_data is not None:
            return open_flow(self.config.test_data, "all", self.config.render_pass)
        return open_flow(self.config.data, split, self.config.render_pass)

    @cached_property
    def train_set(self) -> FlowData:
        data = self.open("train")
        if self.config.flow_labels and not data.has_flow:
            raise PaperZooError(
                f"{self.config.data} has no flow, from which this recipe learns; give first/, second/ and flow/"
            )
        return data

    @cached_property
    def test_set(self) -> FlowData:
        return self.open("test")

    @cached_property
    def batches(self):
        data = TrainingPairs(self.train_set, self.config)
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> dict[str, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """The loss of what the network returned in training: here one flow, and its mean end-point error."""
        error = end_point_error(output.float(), batch["flow"])
        return torch.where(batch["valid"], error, 0.0).sum() / batch["valid"].sum().clamp(min=1)

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        return {"loss": self.loss(self.model(batch["first"], batch["second"]), batch)}

    def infer(self, first: Tensor, second: Tensor) -> Tensor:
        """The deployed network's flow (B, 2, H, W) for pictures (B, 3, H, W) in [0, 1] of any size."""
        model = self.deployed.eval()
        size = height, width = tuple(first.shape[-2:])
        divisor = getattr(model, "divisor", 1)
        fitting = tuple(-(-n // divisor) * divisor for n in size)
        if fitting == size:
            return model(first, second).float()
        pictures = F.interpolate(torch.cat([first, second]), fitting, mode="bilinear", align_corners=False)
        flow = model(*pictures.chunk(2)).float()
        back = flow.new_tensor([width / fitting[1], height / fitting[0]])[:, None, None]
        return back * F.interpolate(flow, size, mode="bilinear", align_corners=False)

    def infer_all(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Flows (2, H, W) of pairs uint8 (3, H, W) of any sizes, those of equal size together."""
        rows: dict[tuple, list[int]] = defaultdict(list)
        for i, (first, _) in enumerate(pairs):
            rows[tuple(first.shape)].append(i)
        found: dict[int, Tensor] = {}
        for shape, same in rows.items():
            chunk = max(1, PIXELS // (shape[1] * shape[2]))
            for start in range(0, len(same), chunk):
                part = same[start : start + chunk]
                sides = [torch.stack([pairs[i][k] for i in part]).to(self.runtime.device).float() / 255 for k in (0, 1)]
                found.update(zip(part, self.infer(*sides), strict=True))
        return [found[i] for i in range(len(pairs))]

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The metrics of `FlowMetrics`; nothing where the data has no flow."""
        data = self.test_set if split == "test" else self.open(split)
        if not data.has_flow:
            return {}
        metrics = FlowMetrics().to(self.runtime.device)
        for items in self.runtime.loader(data, 32, self.config.workers, collate=as_lists):
            flows = self.infer_all([(item["first"], item["second"]) for item in items])
            for flow, item in zip(flows, items, strict=True):
                metrics.update(flow, item["flow"], item["valid"], item["occluded"] if data.has_occlusion else None)
        return metrics.compute()

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Flow]:
        """Pairs of paths, PIL images or arrays, or strings "first.png :: second.png", to flows at the pictures' own size."""
        return [self.answer(flow.cpu()) for flow in self.infer_all([to_pair(value) for value in inputs])]

    def answer(self, flow: Tensor) -> Flow:
        speed = flow.norm(dim=0)
        return Flow(flow, float(speed.mean()), float(speed.max()))

    def samples(self, folder: Path) -> list[str]:
        """Six held-out pairs, written as PNG files."""
        found, data = [], self.test_set
        for i in range(0, len(data), max(1, len(data) // 6))[:6]:
            paths = [str(folder / f"{i:05d}_{k}.png") for k in (1, 2)]
            for path, picture in zip(paths, data.images(i), strict=True):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
            found.append(BETWEEN.join(paths))
        return found

    def example(self) -> tuple[Tensor, Tensor]:
        size = self.config.crop_size or UNSIZED
        first = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        return first, first.roll((1, 2), (2, 3))

    def draw(self, value: Any, result: Flow) -> Image.Image:
        return side_by_side(*to_pair(value), result.flow)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Held-out pairs, their true flow and the answer in the same colours, and the end-point error."""
        data, pictures = self.test_set, []
        for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:6].tolist():
            item = data[i]
            flow = self.predict([(item["first"], item["second"])])[0].flow
            row = [Image.fromarray(item[k].permute(1, 2, 0).numpy()) for k in ("first", "second")]
            if data.has_flow:
                row += [
                    *colours([item["flow"], flow]),
                    errors(end_point_error(flow, item["flow"]) * item["valid"], 5.0),
                ]
            else:
                row += colours([flow])
            pictures += [enlarged(p) for p in row]
        if data.has_flow:
            return {
                "Held-out pairs: first, second, true flow, answer, error (white: 5 pixels and more)": tile(pictures, 5)
            }
        return {"Held-out pairs: first, second, answer": tile(pictures, 3)}


def to_pair(value: Any) -> tuple[Tensor, Tensor]:
    """What a user may call a pair, as two pictures uint8 (3, H, W) of one size.

    Raises:
        PaperZooError: if it is none, or the pictures have different sizes.
    """
    if isinstance(value, str):
        value = value.split(BETWEEN)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise PaperZooError("a pair is (first, second), or one string 'first.png :: second.png'")
    first, second = (to_image(v.strip() if isinstance(v, str) else v) for v in value)
    if first.shape != second.shape:
        sizes = " and ".join(f"{p.shape[2]} x {p.shape[1]}" for p in (first, second))
        raise PaperZooError(f"the two pictures of a pair must be of one size; these are {sizes}")
    return first, second
