"""Explaining a classifier: for an image and a class, which places of the image speak for the class.

An explainer is any function `explain(model, images, classes) -> maps`:

    model     any module from images to logits (B, num_classes): one of PaperZoo by name (`classifier`), or the user's own
    images    float32 (B, C, H, W), as the network takes them
    classes   int64 (B,), the class that is explained in each image
    maps      float32 (B, H, W) in [0, 1], higher meaning more important

The model is left as it was found. Layers are named with dots as in `model.named_modules()`; a wrong name is answered with those
that are near. A prediction is an `Explanation`; `explanation_pictures.overlay` lays its map over the image. What maps are worth is
measured by `explanation_metrics`.

The default recipe trains a classifier (see `tasks.classification`) on images whose evidence is known and never shown to it, then
measures its maps. A paper overrides `explain` alone; its own metrics and pictures are added in `own_measures` and `own_figures`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from paperzoo.blocks.explaining import explaining, find_layer, layer_of
from paperzoo.data.chalk_scenes import CELLS, chalk_scenes
from paperzoo.data.images import Images, to_image
from paperzoo.data.scenes import LABELS
from paperzoo.engine.models import create
from paperzoo.tasks import classification
from paperzoo.tasks.classification import Classification, ClassificationRecipe, Count, captioned
from paperzoo.tasks.explanation_metrics import (
    Explainer,
    boxes_inside,
    cascade,
    centre_prior,
    confidence_change,
    deletion,
    energy_inside,
    insertion,
    localisation_overlap,
    pointing_game,
    random_maps,
    rank_correlation,
)
from paperzoo.tasks.explanation_pictures import curves, overlay

SCENES = "scenes"
BASELINES: dict[str, Explainer] = {"centre prior": centre_prior, "random map": random_maps}
"""Explainers that look at nothing: what a map has to beat."""


@dataclass(frozen=True)
class Config(classification.Config):
    """A classifier's settings, what is explained and on how many images."""

    data: str = SCENES  # the embedded scenes, or a folder of class folders
    layer: str | None = None  # dotted name of the explained layer; None: the last one with a height and a width
    instances: Annotated[int, Field(ge=1, le=CELLS)] = (
        1  # the most copies of the digit in a scene that is explained; those that are learned show one
    )
    train_scenes: Count = 2048
    test_scenes: Count = 256
    explained: Count = 256  # held-out images, the first ones, whose maps are measured
    perturbed: Count = 64  # of these, how many go through deletion, insertion and the sanity check
    perturbation_steps: Count = 16


@dataclass(frozen=True)
class Explanation(Classification):
    """A classification with its reason: `map` is float32 (image_size, image_size) in [0, 1], of the image as the network saw it."""

    map: Tensor


def classifier(model: str | nn.Module, **arguments: Any) -> nn.Module:
    """A model of PaperZoo by its name (`paperzoo.create`), or any module as it is; in eval mode."""
    return (create(model, **arguments) if isinstance(model, str) else model).eval()


def heat_maps(
    explain: Explainer, model: nn.Module, images: Tensor, classes: Tensor | None = None, batch_size: int = 64
) -> Tensor:
    """Maps of any number of images, a batch at a time: float32 (N, H, W) in [0, 1], on the CPU.

    Args:
        explain, model, images: see the module.
        classes: int64 (N,); None: the most probable ones.
    """
    found = []
    for i, part in enumerate(images.split(batch_size)):
        if classes is None:
            with explaining(model), torch.no_grad():
                chosen = model(part).argmax(1)
        else:
            chosen = classes[i * batch_size : i * batch_size + len(part)]
        found.append(explain(model, part, chosen).float().cpu())
    return torch.cat(found)


class Evidence(Dataset):
    """Images with what speaks for their class: (input, label, bool (instances, S, S)), no True where that is not known."""

    def __init__(self, images: Images, boxes: list[Tensor] | None, size: int, instances: int) -> None:
        self.images, self.boxes, self.size, self.instances = images, boxes, size, instances

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        image, label = self.images[i]
        inside = torch.zeros(self.instances, self.size, self.size, dtype=torch.bool)
        if self.boxes is not None:
            found = boxes_inside(list(self.boxes[i][:, None]), self.size, self.size)
            inside[: len(found)] = found
        return image, label, inside


class ExplanationRecipe(ClassificationRecipe):
    """The classification recipe whose answers come with a map, and whose evaluation measures the maps."""

    config: Config
    monitor = ("accuracy", "max")

    def explain(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """The paper's explainer; see the module for what goes in and out."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it explains")

    @property
    def layer(self) -> str:
        """The name of the explained layer.

        Raises:
            UnknownName: if the configuration names one that the network does not have.
        """
        if self.config.layer is not None:
            layer_of(self.deployed, self.config.layer)
            return self.config.layer
        return find_layer(self.deployed, self.example()[0][:1].to(self.runtime.device))

    # -- data ----------------------------------------------------------------------------------------------------------

    def scenes(self, split: str) -> list[dict[str, Tensor]]:
        """The embedded scenes that are learned, and that accuracy is measured on: one digit each."""
        count = self.config.train_scenes if split == "train" else self.config.test_scenes
        return chalk_scenes(count, self.config.image_size, split)

    def explained_scenes(self, split: str) -> list[dict[str, Tensor]]:
        """The embedded scenes whose maps are measured; the first label's class is explained, all boxes are its evidence."""
        config = self.config
        if config.instances == 1:
            return self.scenes(split)[: config.explained]
        return chalk_scenes(config.explained, config.image_size, split, config.instances)

    def open(self, split: str) -> Images:
        return labelled(self.scenes(split)) if self.config.data == SCENES else super().open(split)

    def evidence(self, split: str) -> Dataset:
        """A split as it is explained: its first `explained` images."""
        size, instances = self.config.image_size, self.config.instances
        if self.config.data == SCENES:
            found = self.explained_scenes(split)
            images = labelled(found).with_transform(v2.Compose(self.view(size) + self.to_input()))
            return Evidence(images, [scene["boxes"] / scene["image"].shape[-1] for scene in found], size, instances)
        images = self.test_data if split == "test" else self.evaluation_data(split)
        whole = Evidence(images, None, size, instances)
        return Subset(whole, range(min(self.config.explained, len(whole))))

    # -- measuring -----------------------------------------------------------------------------------------------------

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Accuracy, cross-entropy, and what the maps of the true classes are worth; see `measure`."""
        return super().evaluate(split) | self.measure(self.explain, split)

    def measure(self, explain: Explainer, split: str = "test") -> dict[str, float]:
        """Any explainer on this recipe's network and images, each value a mean over images in [0, 1] (correlation: [-1, 1]).

        Where the evidence is known (boxes were never trained on):
        energy_inside: the share of the map inside the boxes (a flat map has `box_area`).
        pointing_game: how often the highest place of the map lies in a box.
        overlap: intersection over union of the boxes and the map above a quarter of its height (Grad-CAM++, sec. 5.2).
        faintest_instance: the map's mean in the box where it is least, less its mean outside of all boxes (a flat map has 0).

        Everywhere:
        average_drop, confidence_increase: see `explanation_metrics`.
        deletion, insertion: areas under RISE's curves, from grey and from a blurred image.
        sanity_correlation: rank correlation with the maps of the same network after all of its weights were randomised.
        """
        return self.means(self.placed(explain, split)) | self.means(self.perturbed(explain, split))

    def against(
        self, name: str, explain: Explainer, metrics: tuple[str, ...], found: dict[str, float], split: str
    ) -> dict[str, float]:
        """Another explainer on the same network and images, and by how much it is beaten.

        Args:
            name: what it is called in the metrics.
            explain: the other one.
            metrics: of those that `placed` gives; of "average_drop" less is better, of the others more.
            found: what this recipe's own explainer has.
            split: of the data.

        Returns:
            "{name}_{metric}" and "{metric}_gain" of each.
        """
        others, values = self.means(self.placed(explain, split)), {}
        for metric in metrics:
            better = -1 if metric == "average_drop" else 1
            values |= {f"{name}_{metric}": others[metric], f"{metric}_gain": better * (found[metric] - others[metric])}
        return values

    def placed(self, explain: Explainer, split: str) -> Iterator[dict[str, Tensor]]:
        """Values (B,) by name, a batch at a time, of what takes a map and two forward passes an image."""
        for images, labels, instances in self.runtime.loader(self.evidence(split), self.explained_at_once):
            maps = explain(self.deployed, images, labels)
            full, kept = confidence_change(self.deployed, images, labels, maps)
            values = {
                "average_drop": (full - kept).clamp_min(0) / full.clamp_min(torch.finfo(full.dtype).tiny),
                "confidence_increase": kept > full,
            }
            if self.config.data != SCENES:
                yield values
                continue
            maps, instances = maps.cpu(), instances.cpu()
            inside, alive = instances.any(1), instances.any(3).any(2)
            means = (maps[:, None] * instances).sum((2, 3)) / instances.sum((2, 3)).clamp_min(1)
            around = (maps * ~inside).sum((1, 2)) / (~inside).sum((1, 2)).clamp_min(1)
            yield (
                values
                | {
                    "energy_inside": energy_inside(maps, inside),
                    "pointing_game": pointing_game(maps, inside),
                    "overlap": localisation_overlap(maps, inside, 0.25),
                    "faintest_instance": means.masked_fill(~alive, torch.inf).amin(1) - around,
                    "box_area": inside.float().mean((1, 2)),
                }
                | self.own_measures(maps, images, labels, instances)
            )

    def perturbed(self, explain: Explainer, split: str) -> Iterator[dict[str, Tensor]]:
        """Values (B,) by name, a batch at a time, of what takes many forward passes an image."""
        data = self.evidence(split)
        data = Subset(data, range(min(self.config.perturbed, len(data))))
        model, steps = self.deployed, self.config.perturbation_steps
        *_, (_, randomised) = cascade(model, self.example()[0].to(self.runtime.device))
        for images, labels, _ in self.runtime.loader(data, self.explained_at_once):
            maps = explain(model, images, labels)
            yield {
                "deletion": deletion(model, images, labels, maps, steps).area,
                "insertion": insertion(model, images, labels, maps, steps).area,
                "sanity_correlation": rank_correlation(maps, explain(randomised, images, labels)),
            }

    def own_measures(self, maps: Tensor, images: Tensor, labels: Tensor, instances: Tensor) -> dict[str, Tensor]:
        """A paper's further values, (B,) each: of maps (B, S, S) in [0, 1] with instances bool (B, N, S, S), both on the CPU."""
        return {}

    @property
    def explained_at_once(self) -> int:
        return min(64, self.config.batch_size * 2)

    def means(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """The mean of each value over all images and ranks."""
        sums: dict[str, Tensor] = {}
        for values in batches:
            for name, value in values.items():
                part = torch.stack([value.float().sum(), torch.tensor(float(len(value)), device=value.device)]).cpu()
                sums[name] = sums.get(name, 0) + part
        if not sums:
            return {}
        totals = self.runtime.mean(torch.stack(list(sums.values())).to(self.runtime.device)).cpu()
        return dict(zip(sums, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))

    # -- use -----------------------------------------------------------------------------------------------------------

    def predict(self, inputs: list) -> list[Explanation]:
        """Paths, PIL images or arrays to their classes, each with the map of its most probable class."""
        answers = ClassificationRecipe.predict(self, inputs)
        results: list[Explanation] = []
        for start in range(0, len(inputs), 16):
            part = answers[start : start + 16]
            images = torch.stack([self.as_input(value) for value in inputs[start : start + 16]])
            classes = torch.tensor([answer.index for answer in part], device=self.runtime.device)
            maps = self.explain(self.deployed, images.to(self.runtime.device), classes).float().cpu()
            results += [Explanation(**asdict(a), map=m) for a, m in zip(part, maps, strict=True)]
        return results

    def browser(self) -> None:
        """Nothing: explanations need gradients or the inside of a network, which a page does not have."""
        return None

    def seen(self, value: Any) -> Tensor:
        """An image as the network sees it, before normalisation: uint8 (3, S, S)."""
        return v2.Compose(self.view(self.config.image_size))(to_image(value))

    def as_input(self, value: Any) -> Tensor:
        """An image as the network takes it: float32 (3, S, S)."""
        return v2.Compose(self.to_input())(self.seen(value))

    def draw(self, value: Any, result: Explanation) -> Image.Image:
        return self.heat(value, result.map, f"{result.label} {result.probability:.0%}")

    def heat(self, value: Any, found: Tensor, caption: str) -> Image.Image:
        """An image under a map, with a line of text below."""
        pixels = v2.functional.pil_to_tensor(overlay(self.seen(value), found))
        return captioned(pixels, caption, max(96, self.config.image_size))

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with their maps and those of the runner-up class, deletion and insertion, the confusion matrix."""
        from paperzoo.engine.pictures import confusion_matrix, tile

        images = self.shown()
        results, side = self.predict(images), max(96, self.config.image_size)
        labels = self.facts["labels"]
        second = [sorted(r.probabilities, key=r.probabilities.get)[-2:][0] for r in results]
        inputs = torch.stack([self.as_input(image) for image in images]).to(self.runtime.device)
        others = torch.tensor([labels.index(name) for name in second], device=self.runtime.device)
        maps = self.explain(self.deployed, inputs, others).cpu()
        rows = [captioned(self.seen(image), "image", side) for image in images]
        rows += [self.draw(image, result) for image, result in zip(images, results, strict=True)]
        rows += [self.heat(image, m, f"{name}?") for image, m, name in zip(images, maps, second, strict=True)]
        sheets = {"Explanations": tile(rows, len(images))} | self.own_figures(images, inputs, results)
        matrix = confusion_matrix(self.confusion("test")[0].cpu(), labels)
        return sheets | {"Deletion and insertion": self.curves(), "Confusion matrix": matrix}

    def shown(self) -> list:
        """Eight held-out images for the report."""
        if self.config.data == SCENES:
            return [scene["image"] for scene in self.explained_scenes("test")[:8]]
        raw = self.test_data.with_transform(None)
        return [raw[i][0] for i in range(min(8, len(raw)))]

    def own_figures(self, images: list, inputs: Tensor, results: list[Explanation]) -> dict[str, Image.Image]:
        """A paper's further pictures of the images (as given, and as the network takes them) and what was found for them."""
        return {}

    def curves(self) -> Image.Image:
        """Mean confidence under deletion and insertion, by this explainer and by the centre prior."""
        data = self.evidence("test")
        rows = [data[i] for i in range(min(32, self.config.perturbed, len(data)))]
        images = torch.stack([row[0] for row in rows]).to(self.runtime.device)
        classes = torch.tensor([row[1] for row in rows], device=self.runtime.device)
        lines: dict[str, Tensor] = {}
        for name, explain in {"": self.explain, ", centre prior": centre_prior}.items():
            maps = explain(self.deployed, images, classes)
            for kind in (deletion, insertion):
                scores = kind(self.deployed, images, classes, maps, self.config.perturbation_steps).scores
                lines[kind.__name__ + name] = scores.mean(0).cpu()
        return curves(lines)


def labelled(scenes: list[dict[str, Tensor]]) -> Images:
    """Scenes as images with the first digit's class."""
    return Images(LABELS, [int(s["labels"][0]) for s in scenes], None, torch.stack([s["image"] for s in scenes]))
