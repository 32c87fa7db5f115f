"""Geometric and semantic matching: where each place of one picture, the target, is in another one, the source; the source is bent until both agree.

A batch is a dict:
    source, target      float32 (B, 3, S, S), S = `config.image_size`, normalised as ImageNet's pictures are
    source_points       float32 (B, N, 2), x and y in -1 … 1 between the middles of the corner pixels; NaN where a pair has fewer   \\ where the data
    target_points       float32 (B, N, 2), the same things in the target                                                     / has points

In eval a network maps (source, target) to places float32 (B, h, w, 2), h and w its own: for a regular grid over the target, its corner pixels
included, the place in the source, in the same coordinates: what `grid_sample(source, places, align_corners=True)` takes. A network that regresses a few
parameters evaluates its map there, one that matches features reads its best matches. In training it may return anything its recipe's `loss` takes;
the default recipe takes places again, and learns from matching points. Its function takes `image_size` among its arguments.

A prediction is an `Alignment`, at the pictures' own sizes. What is asked is a pair (source, target), of any two sizes, or one string,
"source.png :: target.png". The metrics are those of `paperzoo.tasks.matching_metrics`: points of the target are carried into the source.
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

from paperzoo.data.images import to_image
from paperzoo.data.keypoint_pairs import Matches, open_matches
from paperzoo.engine.models import create
from paperzoo.engine.pictures import new_figure, tile, to_picture
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import matching_pictures as pictures
from paperzoo.tasks.matching_metrics import MatchingMetrics
from paperzoo.tasks.optical_flow import BETWEEN, Count, Fraction, NotNegative, Positive
from paperzoo.tasks.segmentation import DEVIATION, MEAN
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

TOGETHER = 16  # pairs that go through the network together when measuring
LINES = 6  # along each side of the target, in a drawing of matches
LARGEST = 0.3  # of the curve of correct points


@dataclass(frozen=True)
class Alignment:
    """The answer for one pair.

    places: float32 (2, h, w), for each pixel of the target x and y in pixels of the source.
    warped: uint8 (3, h, w), the source laid over the target.
    inside: bool (h, w), what the source shows.
    covered: its share, 0 to 1.
    affine: the affine map nearest to the places, six numbers by rows: x and y of the target, in pixels, to x and y of the source.
    """

    places: Tensor = field(repr=False)
    warped: Tensor = field(repr=False)
    inside: Tensor = field(repr=False)
    covered: float
    affine: tuple[float, float, float, float, float, float]

    def carry(self, points: Tensor) -> Tensor:
        """Places (N, 2) of the target, pixels, to the source."""
        unit = to_unit(points, self.places.shape[1:])
        return read_places(self.places[None].permute(0, 2, 3, 1), unit[None])[0]


@dataclass(frozen=True)
class Config:
    """The default recipe: a network that answers places and learns from matching points, Adam."""

    model: str = "cnngeo"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "bent_photographs"
    test_data: str | None = None  # another set to measure on
    image_size: Annotated[int, Field(ge=16)] = 240
    alpha: Positive = 0.1
    length: Literal["image", "box"] = "box"  # whose larger side alpha is a share of
    weights: str | None = None
    backbone_weights: str | None = None  # or a classifier's, for the features
    steps: Count = 10_000
    batch_size: Count = 16
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = False
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[Fraction, ...] = (0.5,)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip: Positive | None = None
    workers: Annotated[int, Field(ge=0)] = 0


# -- places --------------------------------------------------------------------------------------------------------------


def to_unit(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (…, 2) of a picture of (height, width) to -1 … 1 between the middles of its corner pixels."""
    extent = points.new_tensor([max(size[1] - 1, 1), max(size[0] - 1, 1)])
    return 2 * points / extent - 1


def to_pixels(unit: Tensor, size: tuple[int, int]) -> Tensor:
    """The way back."""
    return (unit + 1) / 2 * unit.new_tensor([size[1] - 1, size[0] - 1])


def read_places(places: Tensor, points: Tensor) -> Tensor:
    """A map (B, h, w, 2) at points (B, N, 2) of the target, in -1 … 1, read between its cells: (B, N, 2)."""
    read = F.grid_sample(
        places.permute(0, 3, 1, 2), points[:, None].to(places.dtype), padding_mode="border", align_corners=True
    )
    return read[:, :, 0].mT


def fitted(picture: Tensor, size: int) -> Tensor:
    """A picture uint8 (3, H, W) as a network sees it: float32 (3, size, size), normalised. Corner pixels stay corner pixels, as in the coordinates."""
    small = F.interpolate(picture[None].float() / 255, (size, size), mode="bilinear", align_corners=True)[0]
    return normalised(small)


def normalised(x: Tensor) -> Tensor:
    """Pictures (…, 3, H, W) in [0, 1]."""
    mean, deviation = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (MEAN, DEVIATION))
    return (x - mean) / deviation


class TrainingMatches(Dataset):
    """A set's items as a batch has them."""

    def __init__(self, data: Matches, size: int) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = self.data[i]
        found = {name: fitted(item[name], self.size) for name in ("source", "target")}
        for name in ("source", "target"):
            if f"{name}_points" in item:
                found[f"{name}_points"] = to_unit(item[f"{name}_points"], item[name].shape[-2:])
        return found


def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of items; points filled up with NaN."""
    most = max(len(item.get("source_points", ())) for item in items)
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name.endswith("_points"):
            values = [F.pad(v, (0, 0, 0, most - len(v)), value=float("nan")) for v in values]
        batch[name] = torch.stack(values)
    return batch


def as_lists(items: list) -> list:
    """Pairs of any sizes, as they are."""
    return items


# -- recipe --------------------------------------------------------------------------------------------------------------


class MatchingRecipe(Recipe):
    """The task's default recipe. Papers override `loss`, or `batch` and `step`."""

    config: Config
    monitor = ("pck", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if facts is None:
            self.check_data()
        self.model = runtime.place(self.build(fresh=facts is None))
        self.average = running_average(self.model, config.ema_decay)
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: learning_rate_factor(config, s))

    def check_data(self) -> None:
        """What is wrong with the data is said before anything is built."""
        if not self.train_set.has_points:
            raise PaperZooError(f"{self.config.data} has no matching points, from which this recipe learns")

    def build(self, fresh: bool) -> nn.Module:
        config = self.config
        if "image_size" in config.model_arguments:
            raise PaperZooError("model_arguments: image_size is the recipe's own setting; set image_size there")
        arguments = {"image_size": config.image_size, **config.model_arguments}
        model = create(config.model, weights=config.weights, **arguments)
        if fresh and config.backbone_weights is not None:
            from paperzoo.engine.weights import read_state

            try:
                model.load_backbone(read_state(Path(config.backbone_weights).expanduser()))
            except (RuntimeError, ValueError, KeyError) as error:
                line = " ".join(str(error).split())[:200]
                raise PaperZooError(
                    f"{config.backbone_weights}: does not fit the features of {config.model}: {line}"
                ) from error
        return model

    # -- data ----------------------------------------------------------------------------------------------------

    @cached_property
    def train_set(self) -> Matches:
        return open_matches(self.config.data, "train")

    @cached_property
    def test_set(self) -> Matches:
        return open_matches(self.config.test_data or self.config.data, "test")

    @cached_property
    def batches(self):
        data = TrainingMatches(self.train_set, self.config.image_size)
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers, collate=padded)

    def batch(self) -> dict[str, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """The loss of what the network returned in training: here places, and the mean square distance of the points that they carry."""
        known = ~batch["target_points"][..., 0].isnan()
        found = read_places(output.float(), batch["target_points"].nan_to_num(0.0))
        distance = (found - batch["source_points"].nan_to_num(0.0)).square().sum(2)
        return torch.where(known, distance, 0.0).sum() / known.sum().clamp(min=1)

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        return {"loss": self.loss(self.model(batch["source"], batch["target"]), batch)}

    # -- measuring -----------------------------------------------------------------------------------------------

    def infer(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The deployed network's places (B, h, w, 2) for pairs of pictures uint8 (3, H, W) of any sizes."""
        model, size = self.deployed.eval(), self.config.image_size
        sides = (torch.stack([fitted(pair[k], size) for pair in pairs]).to(self.runtime.device) for k in (0, 1))
        return model(*sides).float()

    def carried(self, items: list[dict[str, Tensor]]) -> list[Tensor]:
        """The target's points of each item, where the network sees them in the source: (N, 2), pixels."""
        places = self.infer([(item["source"], item["target"]) for item in items]).cpu()
        found = []
        for one, item in zip(places, items, strict=True):
            unit = to_unit(item["target_points"], item["target"].shape[-2:])
            found.append(to_pixels(read_places(one[None], unit[None])[0], item["source"].shape[-2:]))
        return found

    def length(self, item: dict[str, Tensor]) -> float:
        """What counts as 1 when distances in the source are measured."""
        return float(max(item["source"].shape[-2:])) if self.config.length == "image" else float(item["extent"])

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The metrics of `MatchingMetrics`; nothing where the data has no points."""
        data = self.test_set if split == "test" else open_matches(self.config.data, split)
        if not data.has_points:
            return {}
        metrics = MatchingMetrics(self.config.alpha)
        for items in self.runtime.loader(data, TOGETHER, self.config.workers, collate=as_lists):
            items = [{name: value.cpu() for name, value in item.items()} for item in items]
            for found, item in zip(self.carried(items), items, strict=True):
                metrics.update(found, item["source_points"], self.length(item))
        return metrics.to(self.runtime.device).compute()

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Alignment]:
        """Pairs of paths, PIL images or arrays, or strings "source.png :: target.png", to maps at the pictures' own sizes."""
        answers: list[Alignment] = []
        for start in range(0, len(inputs), TOGETHER):
            pairs = [to_pair(value) for value in inputs[start : start + TOGETHER]]
            answers += [self.answer(*pair, one) for pair, one in zip(pairs, self.infer(pairs).cpu(), strict=True)]
        return answers

    def answer(self, source: Tensor, target: Tensor, places: Tensor) -> Alignment:
        """A network's places (h, w, 2) for one pair, at the pictures' sizes."""
        size, other = tuple(target.shape[-2:]), tuple(source.shape[-2:])
        unit = F.interpolate(places.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=True)[0]
        unit = unit.permute(1, 2, 0)
        inside = (unit.abs() <= 1).all(2)
        warped = F.grid_sample(source[None].float(), unit[None], padding_mode="border", align_corners=True)[0]
        warped = torch.where(inside, warped.round().clamp(0, 255), float(pictures.OUTSIDE)).to(torch.uint8)
        pixels = to_pixels(unit, other)
        return Alignment(pixels.permute(2, 0, 1), warped, inside, float(inside.float().mean()), nearest_affine(pixels))

    def samples(self, folder: Path) -> list[str]:
        """Six held-out pairs, written as PNG files."""
        found, data = [], self.test_set
        for i in range(0, len(data), max(1, len(data) // 6))[:6]:
            item, paths = data[i], [str(folder / f"{i:05d}_{name}.png") for name in ("source", "target")]
            for path, name in zip(paths, ("source", "target"), strict=True):
                pictures.to_pil(item[name]).save(path)
            found.append(BETWEEN.join(paths))
        return found

    def example(self) -> tuple[Tensor, Tensor]:
        size = self.config.image_size
        source = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        return source, source.roll((1, 2), (2, 3))

    def draw(self, value: Any, result: Alignment) -> Image.Image:
        """Source and target with places that match; below, the source bent, and both on top of each other."""
        source, target = to_pair(value)
        both = pictures.overlay(target, result.warped, result.inside)
        below = tile([pictures.enlarged(p)[0] for p in (result.warped, both)], 2)
        height, width = target.shape[-2:]
        at = [(torch.arange(LINES) + 0.5) / LINES * n - 0.5 for n in (width, height)]
        here = torch.stack([at[0].repeat(LINES), at[1].repeat_interleave(LINES)], 1)
        return tile([pictures.draw_matches(source, target, result.carry(here), here), below], 1)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Held-out pairs with their points, and the share of correct points at every distance, by class where there are few."""
        data, rows = self.test_set, []
        for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:6].tolist():
            item = data[i]
            result = self.predict([(item["source"], item["target"])])[0]
            both = pictures.overlay(item["target"], result.warped, result.inside)
            if data.has_points:
                rows += [
                    pictures.draw_points(item["target"], item["target_points"]),
                    pictures.draw_transfer(item["source"], item["source_points"], result.carry(item["target_points"])),
                ]
            else:
                rows += [pictures.enlarged(item[k])[0] for k in ("target", "source")]
            rows += [pictures.enlarged(p)[0] for p in (result.warped, both)]
        shown = {"Held-out pairs: target, source (green: true places, yellow: found), bent source, both": tile(rows, 4)}
        return shown | ({"Correct points": self.curve()} if data.has_points else {})

    def curve(self) -> Image.Image:
        data, distances = self.test_set, {}
        for start in range(0, len(data), TOGETHER):
            numbers = range(start, min(start + TOGETHER, len(data)))
            items = [data[i] for i in numbers]
            for i, found, item in zip(numbers, self.carried(items), items, strict=True):
                away = (found - item["source_points"]).norm(dim=1) / max(self.length(item), 1e-9)
                still = to_pixels(to_unit(item["target_points"], item["target"].shape[-2:]), item["source"].shape[-2:])
                distances.setdefault("all", []).append(away)
                distances.setdefault("no motion", []).append(
                    (still - item["source_points"]).norm(dim=1) / max(self.length(item), 1e-9)
                )
                distances.setdefault(data.kind(i), []).append(away)
        figure, axes = new_figure()
        at = torch.linspace(0, LARGEST, 61)
        for name, values in distances.items():
            if name and (name in ("all", "no motion") or len(distances) <= 8):
                shares = (torch.cat(values)[:, None] <= at).float().mean(0)
                axes.plot(at, shares, label=name, linewidth=2.0 if name == "all" else 1.0)
        axes.set_xlabel("distance, as a share of the length")
        axes.set_ylabel("points within it")
        axes.legend(fontsize=8)
        return to_picture(figure)


def nearest_affine(pixels: Tensor) -> tuple[float, ...]:
    """The affine map with the least squares over places (h, w, 2) of the source, by pixels of the target: six numbers by rows."""
    height, width = pixels.shape[:2]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ones = torch.ones(height * width, dtype=torch.float64)
    system = torch.stack([x.flatten().double(), y.flatten().double(), ones], 1)
    found = torch.linalg.lstsq(system, pixels.reshape(-1, 2).double(), driver="gelsd").solution.T
    return tuple(round(float(v), 5) for v in found.flatten())


def to_pair(value: Any) -> tuple[Tensor, Tensor]:
    """What a user may call a pair, as two pictures uint8 (3, H, W) and (3, h, w).

    Raises:
        PaperZooError: if it is none.
    """
    if isinstance(value, str):
        value = [part.strip() for part in value.split(BETWEEN.strip())]
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise PaperZooError("a pair is (source, target), or one string 'source.png :: target.png'")
    source, target = (to_image(v) for v in value)
    return source, target
