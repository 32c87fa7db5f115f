"""Fast R-CNN learns by detection's default recipe; here are its settings, and regions that are read from files.

The embedded preset uses no selective search: its regions are windows of a regular grid, the same for every picture, and
while learning eight shaken copies of each true box besides. The test sees the grid alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision import tv_tensors

from paperzoo.papers.detection.fast_rcnn.proposals import read_proposals
from paperzoo.tasks import detection as task


@dataclass(frozen=True)
class Config(task.Config):
    """The task's fields, and where regions come from: "windows", or a file as `proposals.read_proposals` takes it."""

    train_proposals: str = "windows"
    test_proposals: str = "windows"
    most_proposals: task.Count = 2000  # of an image; the file has the best first


class WithRegions(task.Prepared):
    """A prepared data set whose samples carry the regions of a file through the same transforms."""

    def __init__(self, data: task.DetectionData, recipe: FastRCNNRecipe, train: bool, file: str) -> None:
        super().__init__(data, recipe, train)
        names = [Path(data.path(i)).stem for i in range(len(data))]
        self.regions = [r[: recipe.config.most_proposals] for r in read_proposals(file, names)]

    def __getitem__(self, index: int) -> dict:
        item, regions = self.data[index], self.regions[index]
        labels = self.labels[item["labels"]]
        if not self.train:
            image = task.to_network(item["image"], self.config, self.facts)
            truth = {"boxes": item["boxes"], "labels": labels, "iscrowd": item["crowd"].long(), "area": item["area"]}
            truth |= {"size": torch.tensor(item["image"].shape[1:])}
            return {"image": image, "truth": truth, "proposals": regions * task.scale(item["image"], image)}
        solid = ~item["crowd"]
        joined = torch.cat([item["boxes"][solid], regions])
        marks = torch.cat([labels[solid], torch.full((len(regions),), -1)])  # a region is a box of class -1
        size = tuple(item["image"].shape[1:])
        sample = {
            "image": tv_tensors.Image(item["image"]),
            "boxes": tv_tensors.BoundingBoxes(joined, format="XYXY", canvas_size=size),
            "labels": marks,
        }
        sample = self.transform(sample)
        choice = int(torch.randint(len(self.config.image_sizes), ()))
        picture, marks = sample["image"].as_subclass(Tensor), sample["labels"]
        image = task.to_network(picture, self.config, self.facts, self.config.image_sizes[choice])
        boxes = sample["boxes"].as_subclass(Tensor).float() * task.scale(picture, image)
        true = marks >= 0
        return {"image": image, "boxes": boxes[true], "labels": marks[true], "proposals": boxes[~true]}


class Collate(task.Collate):
    """The task's batch, with "proposals" (B, P, 4), filled up with empty boxes, where samples have them."""

    def __call__(self, samples: list[dict]) -> dict:
        batch = super().__call__(samples)
        if "proposals" not in samples[0]:
            return batch
        return batch | {"proposals": pad_sequence([s["proposals"] for s in samples], batch_first=True)}


class FastRCNNRecipe(task.DetectionRecipe):
    """The task's recipe, where a batch may bring regions along."""

    config: Config

    def prepared(self, split: str, train: bool) -> task.Prepared:
        file = self.config.train_proposals if split == "train" else self.config.test_proposals
        data = self.open(split)
        return task.Prepared(data, self, train) if file == "windows" else WithRegions(data, self, train, file)

    @cached_property
    def train_data(self) -> task.Prepared:
        return self.prepared("train", train=True)

    @cached_property
    def batches(self):
        collate, workers = Collate(self.config.multiple), self.config.workers
        return self.runtime.batches(self.train_data, self.config.batch_size, workers=workers, collate=collate)

    def step(self, batch: dict) -> dict:
        self.model.train()
        if self.config.freeze_norms:
            for norm in task.batch_norms(self.model):
                norm.eval()
        losses = self.model(batch["images"], batch["targets"], batch.get("proposals"))
        return {"loss": sum(losses.values())} | {f"{name}_loss": loss.detach() for name, loss in losses.items()}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """As the task's, with the regions of the split."""
        if self.config.test_proposals == "windows":
            return super().evaluate(split)
        metric, model = self.metric(), self.deployed.eval()
        collate, data = Collate(self.config.multiple), self.prepared(split, train=False)
        for batch in self.runtime.loader(data, min(self.config.batch_size, 32), self.config.workers, collate):
            outputs = model(batch["images"], proposals=batch["proposals"])
            found = model.postprocess(outputs, batch["sizes"], tuple(batch["images"].shape[-2:]))
            for objects, size, truth in zip(found, batch["sizes"], batch["truth"], strict=True):
                factor = (truth["size"].to(size.device) / size).flip(0).repeat(2)
                objects["boxes"] = objects["boxes"] * factor
            metric.update(found, batch["truth"])
        return task.coco_numbers(metric.compute())


RECIPE = FastRCNNRecipe

PRESETS = {
    "embedded": Config(
        model="fast_rcnn_small",
        data="digit_scenes",
        scenes=1024,
        scene_size=64,
        scene_objects=3,
        scene_scale=(0.45, 0.8),  # 29 to 51 pixels
        image_sizes=(64,),
        augment="none",  # a mirrored digit is no digit
        steps=1200,
        batch_size=8,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
    ),
    # sec. 2.3, 4.1: two images a step, SGD at 0.001 for 30k steps and 0.0001 for 10k, images of 600 pixels, flipping; VGG-16
    # from ImageNet (give --backbone-weights), conv1 and conv2 as they are (sec. 4.5). Selective search's 2000 regions from the
    # author's files (give --train-proposals and --test-proposals); the windows of a grid without them
    "published": Config(
        model="fast_rcnn_vgg16",
        data="VOC2007",
        train_proposals="windows",
        test_proposals="windows",
        image_sizes=(600,),
        longest_side=1000,
        augment="flip",
        freeze=tuple(f"backbone.body.features.{i}." for i in (0, 2, 5, 7)),
        steps=40_000,
        batch_size=2,
        learning_rate=0.001,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="step",
        milestones=(0.75,),
        warmup_steps=0,
        workers=4,
    ),
}
