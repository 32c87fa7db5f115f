"""Anomaly detection in images: learn from normal images alone what is normal; say which images, and which of their pixels, are not.

A batch is (images, labels, masks): float32 (B, 3, S, S), normalised with the mean and deviation in `facts`; int64 (B,), 1 for a
defect; bool (B, S, S), the defect's pixels. Training batches hold normal images only. A network maps images to {"map": (B, S, S),
"score": (B,)}: any real numbers, larger is more anomalous; its buffer `threshold` () says from which score on an image counts as
anomalous. A prediction is an `Anomaly`, at the image's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.blocks.region_overlap import RegionOverlap
from paperzoo.data.anomaly import PictureCrops, open_anomaly
from paperzoo.data.images import to_image
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which pretrained backbones expect


@dataclass(frozen=True)
class Anomaly:
    """The answer for one image.

    score: how anomalous the image is, in the method's own unit. anomalous: whether that reaches `threshold`.
    heat_map: float32 (H, W) at the image's own size; the recipe's `floor` outside the central crop that the network sees.
    """

    score: float
    anomalous: bool
    threshold: float
    heat_map: Tensor = field(repr=False)


class Prepared(Dataset):
    """An anomaly set as the network sees it: resized (shorter side), cropped in the middle, normalised."""

    def __init__(self, data: Any, transform: v2.Compose) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        image, label, mask = self.data[i]
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image, label, mask


class AnomalyRecipe(Recipe):
    """What every method shares: data, metrics, prediction, pictures. A method brings `self.model` and `step`.

    The config has `data`, `resize` and `crop_size` (pixels), `batch_size` and `workers`.
    """

    reads_images = True
    monitor = ("image_auroc", "max")
    floor: ClassVar[float] = 0.0
    """What a map shows where nothing is anomalous: the colder end of the colours, and the rest of an image that was cropped."""

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.crop_size > config.resize:
            raise PaperZooError(
                f"crop_size {config.crop_size} is larger than resize {config.resize}, from which it is cut"
            )
        if not self.facts:
            self.facts = {"mean": MEAN, "deviation": DEVIATION, "images": len(self.train_set)}

    @cached_property
    def train_set(self):
        return open_anomaly(self.config.data, "train")

    @cached_property
    def test_set(self):
        return open_anomaly(self.config.data, "test")

    @property
    def evaluation_batch(self) -> int:
        """How many images are looked at together where nothing is learned from them."""
        return getattr(self.config, "test_batch_size", self.config.batch_size)

    @cached_property
    def prepared(self) -> Prepared:
        return Prepared(self.train_set, self.transform)

    def normal_images(self, at: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch with number `at` of one pass over the normal images: their numbers int64 (B,), images (B, 3, S, S), and bool (B,),
        which of them could be read. After the last image follows the first."""
        size = self.evaluation_batch
        rows = self.runtime.shard(torch.arange(at * size, (at + 1) * size) % len(self.prepared))
        images, read = [], []
        for row in rows.tolist():
            try:
                images.append(self.prepared[row][0])
            except DataError as error:
                from paperzoo.engine.feeding import note_broken

                note_broken(self.runtime, [(error.path, error.problem)], len(self.prepared))
                images.append(torch.zeros(3, self.config.crop_size, self.config.crop_size))
            else:
                read.append(row)
        return rows, self.runtime.to_device(torch.stack(images)), torch.isin(rows, torch.tensor(read))

    @property  # not kept on self: a transform is a module, and would be taken for something to checkpoint
    def transform(self) -> v2.Compose:
        dtypes = {tv_tensors.Image: torch.float32, "others": None}
        return v2.Compose(
            [
                v2.Resize(self.config.resize, antialias=True),
                v2.CenterCrop(self.config.crop_size),
                v2.ToDtype(dtypes, scale=True),
                v2.Normalize(self.facts["mean"], self.facts["deviation"]),
                v2.ToPureTensor(),
            ]
        )

    @torch.inference_mode()
    def outputs(self, split: str = "test") -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """The network's outputs with labels and masks, over this rank's part of a split."""
        model = self.deployed.eval()
        data = Prepared(self.test_set if split == "test" else self.train_set, self.transform)
        for images, labels, masks in self.runtime.loader(data, self.evaluation_batch, self.config.workers):
            yield model(images), labels, masks

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """AUROC over all images and over all pixels of the split, per-region overlap up to a false positive rate of 30%, and the
        accuracy of the yes-or-no answers."""
        device, threshold = self.runtime.device, self.deployed.threshold
        of_images, of_pixels, accuracy = BinaryAUROC().to(device), BinaryAUROC().to(device), BinaryAccuracy().to(device)
        of_regions = RegionOverlap(0.3).to(device)
        for output, labels, masks in self.outputs(split):
            # torchmetrics squashes values outside [0, 1] by a sigmoid, where large scores would become equal
            of_images.update(squash(output["score"]), labels)
            of_pixels.update(squash(output["map"]).flatten(), masks.flatten().long())
            of_regions.update(output["map"], masks)
            accuracy.update((output["score"] >= threshold).long(), labels)
        return {
            "image_auroc": float(of_images.compute()),
            "pixel_auroc": float(of_pixels.compute()),
            "pro": float(of_regions.compute()),
            "accuracy": float(accuracy.compute()),
        }

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Anomaly]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to scores and heat maps."""
        model, results = self.deployed.eval(), []
        for value in inputs:
            raw = to_image(value)
            output = model(self.transform(tv_tensors.Image(raw))[None].to(self.runtime.device))
            score, threshold = float(output["score"][0]), float(model.threshold)
            results.append(
                Anomaly(score, score >= threshold, threshold, self.to_own_size(output["map"][0].cpu(), raw.shape[-2:]))
            )
        return results

    def to_own_size(self, heat: Tensor, size: tuple[int, int]) -> Tensor:
        """A map (S, S) of the central crop put back into the whole image: (H, W)."""
        resized = v2.functional.resize(torch.zeros(1, *size), [self.config.resize]).shape[-2:]
        top, left = (round((extent - self.config.crop_size) / 2) for extent in resized)
        canvas = F.pad(
            heat, (left, resized[1] - left - heat.shape[1], top, resized[0] - top - heat.shape[0]), value=self.floor
        )
        return F.interpolate(canvas[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out images, written as PNG files."""
        paths = []
        for i in range(0, len(self.test_set), max(1, len(self.test_set) // 8))[:8]:
            image, label, _ = self.test_set[i]
            paths.append(str(folder / f"{i:05d}_{'defect' if label else 'good'}.png"))
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor]:
        size = self.config.crop_size
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Anomaly) -> Image.Image:
        """The image beside itself under the heat map, with the score."""
        image = to_image(value)
        known = result.threshold < float("inf")
        top = max((result.threshold if known else float(result.heat_map.max())) - self.floor, 1e-12)
        word = "anomalous" if result.anomalous else "normal"
        return captioned(
            [as_picture(image), heat_picture(image, (result.heat_map - self.floor) / (1.5 * top))],
            f"{word}, {result.score:.3g}",
        )

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with truth and heat map, and how the scores of normal and defective images lie."""
        from paperzoo.engine.pictures import new_figure, tile, to_picture

        rows = range(0, len(self.test_set), max(1, len(self.test_set) // 12))[:12]
        pictures = []
        for i in rows:
            image, label, mask = self.test_set[i]
            result = self.predict([image])[0]
            marked = torch.where(mask, torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None], image)
            pictures.append(
                captioned([as_picture(marked), self.draw(image, result)], "has a defect" if label else "is good")
            )
        normal, defect = [], []
        for output, labels, _ in self.outputs():
            normal += output["score"][labels == 0].tolist()
            defect += output["score"][labels == 1].tolist()
        figure, axes = new_figure()
        axes.hist([normal, defect], bins=24, label=["normal", "defect"], stacked=False)
        threshold = float(self.deployed.threshold)
        if threshold < float("inf"):
            axes.axvline(threshold, color="black", linestyle="--", label="threshold")
        axes.set_xlabel("score")
        axes.legend(fontsize=8)
        return {
            "Held-out images: truth, picture, heat map": tile(pictures, 3),
            "Scores of held-out images": to_picture(figure),
        }


class PretrainedRecipe(AnomalyRecipe):
    """For methods that look at the features of a pretrained backbone, which itself is not adapted to the normal images.

    The backbone's weights come from a classifier's file, `config.weights`. Where no such file can be had, `pretrain_steps` trains it
    for a moment first: to tell from which of 14 photographs a crop comes. That stands in for ImageNet and is no part of any paper.

    The config has, further: `weights`, `steps`, `pretrain_steps`, `pretrain_size`, `pretrain_batch_size`, `pretrain_rate`. A method
    calls `prepare_backbone` when it is built, `pretrain(*batch)` while `pretraining`, and does its own steps afterwards.
    """

    @property
    def backbone(self) -> nn.Module:
        """Images (B, 3, H, W) -> list of maps."""
        return self.model.backbone

    def deepest(self, images: Tensor) -> Tensor:
        """The backbone's last map of images (B, 3, H, W): (B, C, h, w)."""
        return self.backbone(images)[-1]

    def prepare_backbone(self, channels: int, load: Callable[[Mapping[str, Tensor]], None], steps: int) -> None:
        """Load the given weights, or make ready to train some. The model is already placed.

        Args:
            channels: of the backbone's last map.
            load: takes a classifier's state dict over into the backbone.
            steps: of the whole run; the last one is always the method's own.

        Raises:
            PaperZooError: if the file does not fit.
        """
        config = self.config
        if config.weights is not None:
            from paperzoo.engine.weights import read_state

            try:
                load(read_state(Path(config.weights)))
            except RuntimeError as error:
                line = " ".join(str(error).split())[:200]
                raise PaperZooError(f"{config.weights}: does not fit the backbone of {config.model}: {line}") from error
        self.pretrain_steps = min(config.pretrain_steps, steps - 1)
        if self.pretrain_steps:
            self.head = self.runtime.place(nn.Linear(channels, len(PictureCrops.labels)))
            trained = [*self.backbone.parameters(), *self.head.parameters()]
            self.pretrain_optimizer = torch.optim.AdamW(trained, config.pretrain_rate, weight_decay=0.01)
            self.pretrain_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
                self.pretrain_optimizer, self.pretrain_steps
            )

    @property
    def pretraining(self) -> bool:
        return self.runtime.step < self.pretrain_steps

    @cached_property
    def crops(self):
        config = self.config
        to_input = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.facts["mean"], self.facts["deviation"])]
        )
        data = Labelled(PictureCrops(config.pretrain_size), to_input)
        return self.runtime.batches(data, config.pretrain_batch_size, "crops", config.workers)

    def pretrain(self, images: Tensor, labels: Tensor) -> dict:
        """One step of the stand-in for ImageNet: which photograph is it?"""
        self.backbone.train()
        logits = self.head(self.deepest(images).mean((2, 3)))
        loss = F.cross_entropy(logits.float(), labels)
        self.runtime.update(self.pretrain_optimizer, loss)
        if self.runtime.micro == self.runtime.accumulate - 1:
            self.pretrain_schedule.step()
        hits = (logits.detach().argmax(1) == labels).float().mean()
        self.backbone.eval()
        return {"pretrain_loss": loss.detach(), "train_accuracy": hits}


class Labelled(Dataset):
    """(image, label) pairs with the image transformed."""

    def __init__(self, data: Any, transform: v2.Compose) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = self.data[i]
        return self.transform(image), label


def squash(values: Tensor) -> Tensor:
    """An increasing map of any real number into (0, 1), in float64 so that large values stay apart."""
    values = values.double()
    return 0.5 + 0.5 * values / (1 + values.abs())


def as_picture(image: Tensor) -> Image.Image:
    """uint8 (3, H, W), enlarged to at least 96 pixels."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, round(96 / min(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def heat_picture(image: Tensor, heat: Tensor) -> Image.Image:
    """A grey version of uint8 (3, H, W) under a heat map (H, W) in [0, 1] from blue over green to red."""
    heat = heat.clamp(0, 1)
    colours = torch.stack([1.5 - (4 * heat - 3).abs(), 1.5 - (4 * heat - 2).abs(), 1.5 - (4 * heat - 1).abs()]).clamp(
        0, 1
    )
    grey = image.float().mean(0, keepdim=True)
    return as_picture((0.5 * grey + 0.5 * 255 * colours).round().clamp(0, 255).to(torch.uint8))


def captioned(pictures: list[Image.Image], text: str) -> Image.Image:
    """Pictures side by side with a line of text below."""
    width, height = sum(p.width for p in pictures), max(p.height for p in pictures)
    framed = Image.new("RGB", (width, height + 14), "white")
    x = 0
    for picture in pictures:
        framed.paste(picture, (x, 0))
        x += picture.width
    ImageDraw.Draw(framed).text((2, height + 1), text, fill="black")
    return framed
