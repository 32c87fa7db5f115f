"""Text detection: where the words or lines of a picture are, as polygons of any number of points.

A polygon is float32 (N, 2), x and y in pixels, clockwise as one sees them, the first point where reading begins; the centre of the
first pixel is (0.5, 0.5). Polygons may reach beyond the picture.

A batch is a dict:
    images   float32 (B, 3, H, W): resized, normalised with `facts`, zero-padded right and below; (H, W) is the canvas
    sizes    int64 (B, 2): height and width of each picture inside the canvas
    targets  for each picture {"polygons": list of (N, 2) in pixels of the canvas, "ignore": bool (T,), "texts": list of T str}, and
             whatever the network's `encode` made of them; T may be 0. What is ignored is neither text nor background
    truth    for evaluation: for each picture polygons (in pixels of the original), ignore, texts, size (height, width)

A detector is a module with three members, whether it segments, regresses, links components or also reads:
    model(images)                                raw outputs, a tensor or a tuple of tensors (B, …): what is exported
    model(images, targets)                       the losses, a dict of scalars; their sum is learned from
    model.postprocess(outputs, sizes, canvas)    for each picture {"polygons": list of (N, 2) in pixels of the canvas, "scores":
                                                 float32 (T,)}, best first, and "texts" from those that read; canvas = (H, W)
and two more where they make sense:
    model.encode(target, canvas)                 what is to be learned for one picture, as maps or tables: a dict of tensors, added
                                                 to its target. A light object of its own that can be pickled (not a method), for
                                                 loading processes run it
    model.load_backbone(state_dict)              to start from a classifier's weights

A prediction is a `TextRegions`, in pixels of the picture that was given.

Measured as ICDAR 2015 and, by IoU, Total-Text and CTW1500 do: `TextMatches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from paperzoo.blocks.boxes import pad_images
from paperzoo.blocks.polygons import intersection_areas
from paperzoo.data.images import to_image
from paperzoo.data.text_regions import open_text_regions
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.classification import IMAGENET, Count, Fraction, Positive
from paperzoo.tasks.detection import resized
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

COLOURS = ("#3cb44b", "#4363d8", "#f58231", "#911eb4", "#e6194b", "#008080", "#f032e6", "#9a6324", "#000075", "#808000")


@dataclass(frozen=True)
class TextRegions:
    """The texts in one picture, best first: one entry of each list a text. Polygons in pixels of the picture."""

    polygons: list[list[tuple[float, float]]]
    scores: list[float]
    texts: list[str] | None = None
    """What they say, from networks that also read."""

    def above(self, score: float) -> TextRegions:
        """Only the texts with at least this score."""
        kept = [i for i, s in enumerate(self.scores) if s >= score]
        texts = None if self.texts is None else [self.texts[i] for i in kept]
        return TextRegions([self.polygons[i] for i in kept], [self.scores[i] for i in kept], texts)


@dataclass(frozen=True)
class Config:
    """The default recipe: gradient descent on the sum of the detector's losses, random scale, turn and crop."""

    model: str = "pan_resnet18"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "text_scenes"
    scenes: Count = 512  # how many scenes to learn from, their pixels and texts, and so on: only for text_scenes
    scene_size: Count = 160
    scene_texts: Count = 4
    scene_scale: tuple[float, float] = (0.1, 0.22)
    scene_curved: Fraction = 0.4  # share of bent texts
    scene_tilt: Annotated[float, Field(ge=0)] = 0.4  # largest rotation, radians
    scene_lines: Fraction = 0.0  # share of texts of two words
    image_size: Count = 640  # the shortest side, for evaluation
    longest_side: Count = 2560  # no side is longer
    crop_size: Count = 640  # side of the square that is learned from
    scale: tuple[Positive, Positive] = (0.7, 1.3)  # random enlargement, of image_size
    rotate: Annotated[float, Field(ge=0)] = 10.0  # largest random turn, degrees
    flip: Fraction = 0.5
    jitter: bool = True  # random brightness and saturation
    aim: Fraction = 5 / 8  # share of crops that are made sure to hold text
    multiple: Count = 32  # pictures are padded to a multiple of it
    normalise: Literal["imagenet", "none"] = "imagenet"
    weights: str | None = None  # start from these weights of the whole detector
    backbone_weights: str | None = None  # or from a classifier's
    steps: Count = 36_000
    batch_size: Count = 16
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: Positive = 1e-3
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step", "poly"] = "poly"
    power: Positive = 0.9  # of the poly schedule (1 - step / steps) ** power
    milestones: tuple[Fraction, ...] = ()
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    count_above: Fraction = 0.0  # evaluation leaves out texts with a lower score
    show_above: Fraction = 0.5  # pictures show texts with at least this score
    workers: Annotated[int, Field(ge=0)] = 0


# -- the measure -------------------------------------------------------------------------------------------------------


def match_regions(
    found: Sequence[Tensor], truth: Sequence[Tensor], ignore: Tensor, iou: float = 0.5, overlap: float = 0.5
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """ICDAR 2015's matching in one picture.

    A finding of whose area more than `overlap` lies in one ignored text is not counted. Then, text by text and finding by finding in
    their order, the first pair whose IoU is above `iou` and of which neither is taken is a match.

    Returns:
        (row of truth, row of found) of each match, and which findings are counted, bool (len(found),).
    """
    shared, theirs, ours = intersection_areas([p.cpu() for p in truth], [p.cpu() for p in found])
    ignored = np.asarray(ignore.cpu(), dtype=bool)
    covered = shared[ignored] / np.maximum(ours, 1e-12)
    counted = ~(covered > overlap).any(0) if len(found) else np.zeros(0, dtype=bool)
    union = np.maximum(theirs[:, None] + ours[None] - shared, 1e-12)
    good = (shared / union > iou) & ~ignored[:, None] & counted[None]
    pairs, free = [], np.ones(len(found), dtype=bool)
    for row in range(len(truth)):
        column = np.flatnonzero(good[row] & free)[:1]
        if len(column):
            pairs.append((row, int(column[0])))
            free[column[0]] = False
    return pairs, counted


class TextMatches:
    """Precision, recall and their harmonic mean over a set: matches of `match_regions` over all that was counted.

    precision = matches / counted findings, recall = matches / texts that are not ignored, hmean = 2 p r / (p + r); 0 where there is
    nothing to divide by. As the official script has it, the sums run over the whole set, not over pictures.
    """

    def __init__(self, iou: float = 0.5, overlap: float = 0.5) -> None:
        self.iou, self.overlap = iou, overlap
        self.counts = torch.zeros(3, dtype=torch.float64)  # matches, texts, findings

    def update(self, found: Sequence[Tensor], truth: Sequence[Tensor], ignore: Tensor) -> None:
        """One picture: polygons that were found, those that are there, and which of these are to be ignored, bool (T,)."""
        pairs, counted = match_regions(found, truth, ignore, self.iou, self.overlap)
        self.counts += torch.tensor([len(pairs), int((~ignore).sum()), int(counted.sum())], dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        matches, texts, findings = self.counts.tolist()
        recall, precision = (matches / texts if texts else 0.0), (matches / findings if findings else 0.0)
        hmean = 2 * precision * recall / (precision + recall) if matches else 0.0
        return {"precision": precision, "recall": recall, "hmean": hmean}


# -- pictures to batches -----------------------------------------------------------------------------------------------


def moved(polygons: Sequence[Tensor], matrix: np.ndarray) -> list[Tensor]:
    """Polygons (N, 2) through an affine map, (2, 3) or (3, 3); one that mirrors turns their order round, so that they stay clockwise."""
    matrix = torch.from_numpy(np.asarray(matrix[:2], dtype=np.float32))
    points = [p @ matrix[:, :2].T + matrix[:, 2] for p in polygons]
    mirrored = float(torch.linalg.det(matrix[:, :2])) < 0
    return [torch.cat([p[:1], p[1:].flip(0)]) for p in points] if mirrored else points


def random_crop(image: Tensor, polygons: Sequence[Tensor], config: Config) -> tuple[Tensor, list[Tensor]]:
    """A random scale, mirror, turn and crop of a uint8 picture (3, H, W), black where it does not reach; and its polygons.

    As PAN's released code does it: the shortest side becomes `image_size` times a random number, the turn is about the middle, and
    a crop is aimed at the text with the probability `aim`. Drawn from torch's global generator.
    """
    side, (height, width) = config.crop_size, image.shape[1:]
    drawn = torch.rand(6).tolist()
    factor = (config.scale[0] + (config.scale[1] - config.scale[0]) * drawn[0]) * config.image_size / min(height, width)
    w, h = max(1, round(width * factor)), max(1, round(height * factor))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if (w, h) != picture.size:
        picture = picture.resize((w, h), Image.Resampling.BILINEAR)
    matrix = np.diag([w / width, h / height, 1.0])
    if drawn[1] < config.flip:
        matrix = np.array([[-1, 0, w], [0, 1, 0], [0, 0, 1.0]]) @ matrix
    angle = math.radians((2 * drawn[2] - 1) * config.rotate)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, (w - cos * w + sin * h) / 2], [sin, cos, (h - sin * w - cos * h) / 2], [0, 0, 1]])
    matrix = turn @ matrix
    outlines = moved(polygons, matrix)
    corner = []
    for axis, length in enumerate((w, h)):
        low, high = 0.0, float(max(0, length - side))
        if outlines and drawn[3] < config.aim:  # the crop reaches some text on either axis
            values = torch.cat([p[:, axis] for p in outlines])
            low = min(high, max(0.0, float(values.min()) - side))
            high = max(low, min(high, float(values.max())))
        corner.append(round(low + (high - low) * drawn[4 + axis]))
    shift = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]], [0, 0, 1.0]])
    back = np.linalg.inv(shift @ matrix @ np.diag([width / w, height / h, 1.0]))
    cut = picture.transform((side, side), Image.Transform.AFFINE, back[:2].ravel().tolist(), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous(), moved(outlines, shift)


def to_network(image: Tensor, config: Config, facts: dict) -> Tensor:
    """A uint8 picture (3, H, W), normalised and resized for evaluation: float32 (3, h, w)."""
    return resized(normalised(image, facts), "shortest", config.image_size, config.longest_side)


def normalised(image: Tensor, facts: dict) -> Tensor:
    mean, deviation = (torch.tensor(facts[key])[:, None, None] for key in ("mean", "deviation"))
    return (image.float() / 255 - mean) / deviation


class Prepared(Dataset):
    """A text detection data set as the network sees it: random crops to learn from, whole pictures for evaluation."""

    def __init__(self, data: Dataset, config: Config, facts: dict, train: bool) -> None:
        self.data, self.config, self.facts, self.train = data, config, facts, train
        self.jitter = v2.ColorJitter(brightness=32 / 255, saturation=0.5) if config.jitter else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        item = self.data[index]
        if not self.train:
            truth = {"polygons": item["polygons"], "ignore": item["ignore"], "texts": item["texts"]}
            image = to_network(item["image"], self.config, self.facts)
            return {"image": image, "truth": truth | {"size": torch.tensor(item["image"].shape[1:])}}
        image, polygons = random_crop(item["image"], item["polygons"], self.config)
        side = self.config.crop_size
        seen = [bool((p.amax(0) > 0).all() and (p.amin(0) < side).all()) for p in polygons]
        if self.jitter is not None:
            image = self.jitter(image)
        return {
            "image": normalised(image, self.facts),
            "polygons": [p for p, s in zip(polygons, seen, strict=True) if s],
            "ignore": item["ignore"][torch.tensor(seen, dtype=torch.bool)],
            "texts": [t for t, s in zip(item["texts"], seen, strict=True) if s],
        }


class Collate:
    """Samples of `Prepared` to a batch, as the module's docstring says; `encode` is the network's."""

    def __init__(self, multiple: int, encode: Callable | None = None) -> None:
        self.multiple, self.encode = multiple, encode

    def __call__(self, samples: list[dict]) -> dict:
        images = [s["image"] for s in samples]
        batch = {"images": pad_images(images, self.multiple), "sizes": torch.tensor([x.shape[1:] for x in images])}
        if "truth" in samples[0]:
            return batch | {"truth": [s["truth"] for s in samples]}
        targets = [{key: s[key] for key in ("polygons", "ignore", "texts")} for s in samples]
        if self.encode is not None:
            targets = [target | self.encode(target, tuple(batch["images"].shape[-2:])) for target in targets]
        return batch | {"targets": targets}


# -- the recipe --------------------------------------------------------------------------------------------------------


class TextDetectionRecipe(Recipe):
    """The task's default recipe. A detector with another way to learn overrides `step` or `train_data`."""

    config: Config
    reads_images = True
    monitor = ("hmean", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            mean, deviation = IMAGENET if config.normalise == "imagenet" else ([0.0] * 3, [1.0] * 3)
            self.facts = {"mean": list(mean), "deviation": list(deviation)}
        self.model = runtime.place(self.build())
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.average = running_average(self.model, config.ema_decay)

    def build(self) -> nn.Module:
        config = self.config
        model = create(config.model, weights=config.weights, **config.model_arguments)
        if config.backbone_weights is not None:
            from paperzoo.engine.weights import read_state

            path = Path(config.backbone_weights).expanduser()
            try:
                model.load_backbone(read_state(path))
            except (ValueError, RuntimeError) as error:
                raise PaperZooError(
                    f"{path}: these weights do not fit the backbone of {config.model}: {error}"
                ) from None
        return model

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a factor."""
        config = self.config
        if config.schedule != "poly" or step < config.warmup_steps:
            return learning_rate_factor(config, step)
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return (1 - min(1.0, progress)) ** config.power

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> Dataset:
        """The raw data of a split."""
        c = self.config
        if c.data != "text_scenes":
            return open_text_regions(c.data, split)
        count = c.scenes if split == "train" else min(96, c.scenes)
        shape = {"count": count, "size": c.scene_size, "most": c.scene_texts, "scale": tuple(c.scene_scale)}
        style = {"curved": c.scene_curved, "tilt": c.scene_tilt, "lines": c.scene_lines}
        return open_text_regions(c.data, split, **shape, **style)

    @cached_property
    def train_data(self) -> Dataset:
        return Prepared(self.open("train"), self.config, self.facts, train=True)

    @cached_property
    def test_data(self) -> Dataset:
        return Prepared(self.open("test"), self.config, self.facts, train=False)

    @cached_property
    def batches(self):
        collate = Collate(self.config.multiple, getattr(self.model, "encode", None))
        return self.runtime.batches(
            self.train_data, self.config.batch_size, workers=self.config.workers, collate=collate
        )

    def batch(self) -> dict:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: dict) -> dict:
        self.model.train()
        losses = self.model(batch["images"], batch["targets"])
        return {"loss": sum(losses.values())} | {f"{name}_loss": loss.detach() for name, loss in losses.items()}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Precision, recall and hmean at IoU 0.5 over the whole split; see `TextMatches`."""
        matches = TextMatches()
        data = self.test_data if split == "test" else Prepared(self.open(split), self.config, self.facts, train=False)
        loader = self.runtime.loader(
            data, min(self.config.batch_size, 32), self.config.workers, Collate(self.config.multiple)
        )
        for batch in loader:
            found = self.detect(batch["images"], batch["sizes"], [t["size"] for t in batch["truth"]])
            for texts, truth in zip(found, batch["truth"], strict=True):
                kept = [
                    p for p, s in zip(texts["polygons"], texts["scores"], strict=True) if s >= self.config.count_above
                ]
                matches.update(kept, truth["polygons"], truth["ignore"].cpu())
        matches.counts = (self.runtime.mean(matches.counts) * self.runtime.world).cpu()
        return matches.compute()

    # -- use -----------------------------------------------------------------------------------------------------

    def detect(self, images: Tensor, sizes: Tensor, originals: Sequence[Tensor]) -> list[dict]:
        """A batch of network inputs to what `postprocess` gives, in pixels of the original pictures (height, width)."""
        model = self.deployed.eval()
        found = model.postprocess(model(images), sizes, tuple(images.shape[-2:]))
        for texts, size, original in zip(found, sizes, originals, strict=True):
            factor = (original.cpu() / size.cpu()).flip(0).float()
            texts["polygons"] = [p.cpu() * factor for p in texts["polygons"]]
        return found

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[TextRegions]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to the texts in them."""
        results: list[TextRegions] = []
        for start in range(0, len(inputs), 8):
            raw = [to_image(value) for value in inputs[start : start + 8]]
            images = [to_network(image, self.config, self.facts) for image in raw]
            sizes = torch.tensor([x.shape[1:] for x in images], device=self.runtime.device)
            batch = pad_images(images, self.config.multiple).to(self.runtime.device)
            found = self.detect(batch, sizes, [torch.tensor(image.shape[1:]) for image in raw])
            results += [answer(texts) for texts in found]
        return results

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out pictures, written as PNG files."""
        data, paths = self.open("test"), []
        for i in range(0, len(data), max(1, len(data) // 8))[:8]:
            paths.append(str(folder / f"{i:05d}.png"))
            Image.fromarray(data[i]["image"].permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor]:
        size = -(-self.config.image_size // self.config.multiple) * self.config.multiple
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: TextRegions) -> Image.Image:
        shown = result.above(self.config.show_above)
        return drawn(to_image(value), shown.polygons, shown.texts)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out pictures with what was found, and with what is there; ignored texts in grey."""
        from paperzoo.engine.pictures import tile

        data = self.open("test")
        items = [data[i] for i in range(0, len(data), max(1, len(data) // 12))[:12]]
        found = [
            self.draw(item["image"], r)
            for item, r in zip(items, self.predict([i["image"] for i in items]), strict=True)
        ]
        true = [drawn(i["image"], [p.tolist() for p in i["polygons"]], i["texts"], i["ignore"].tolist()) for i in items]
        return {"Found": tile(found, 4), "There": tile(true, 4)}


def answer(texts: dict) -> TextRegions:
    polygons = [[(round(x, 2), round(y, 2)) for x, y in p.tolist()] for p in texts["polygons"]]
    return TextRegions(polygons, texts["scores"].tolist(), texts.get("texts"))


def drawn(
    image: Tensor,
    polygons: Sequence[Sequence[Sequence[float]]],
    texts: Sequence[str] | None = None,
    ignore: Sequence[bool] | None = None,
    least: int = 320,
) -> Image.Image:
    """A uint8 picture (3, H, W) with outlines, each in a colour of its own, and what they say; ignored ones in grey.

    Small pictures are enlarged to `least` pixels.
    """
    factor = max(1, -(-least // max(image.shape[1:])))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for i, polygon in enumerate(polygons):
        points = [(factor * x, factor * y) for x, y in polygon]
        colour = "#a0a0a0" if ignore is not None and ignore[i] else COLOURS[i % len(COLOURS)]
        pen.line([*points, points[0]], fill=colour, width=2, joint="curve")
        if texts is not None and texts[i]:
            x, y = points[0][0], max(0, points[0][1] - 12)
            left, top, right, bottom = pen.textbbox((x, y), texts[i])
            pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
            pen.text((x, y), texts[i], fill="white")
    return picture
