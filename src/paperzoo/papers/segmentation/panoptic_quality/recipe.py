"""PQ at work: the thresholds of the merging heuristic, found by a grid search for the highest PQ, as in sec. 7.

Each step merges all training images with one combination of the grid and keeps it if its PQ is the highest so far; evaluation
merges held-out images with what was kept. The embedded outputs are the truth of generated scenes with known faults
(`degraded.py`); of a user's data, those of any two networks: a COCO panoptic set, and beside it
predictions/<name of the map without suffix>.npz with masks (N, H, W), scores (N,), labels (N,) and semantic (H, W), in the order
of the set's categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.blocks.panoptic import PanopticMap
from paperzoo.data.panoptic import PanopticScenes, open_panoptic
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError
from paperzoo.papers.segmentation.panoptic_quality.degraded import Outputs, degraded
from paperzoo.papers.segmentation.panoptic_quality.technique import PanopticQuality, merge
from paperzoo.tasks.panoptic_pictures import drawn_map
from paperzoo.tasks.segmentation import Count, Fraction


@dataclass(frozen=True)
class Config:
    """The grid: each step tries a combination, the first thresholds first; more steps than combinations begin again."""

    data: str = "panoptic_scenes"
    scenes: Count = 48  # to search on and to test on: only for panoptic_scenes
    scene_size: Count = 96
    confidences: tuple[Fraction, ...] = (0.0, 0.25, 0.5, 0.75)
    overlaps: tuple[Fraction, ...] = (0.25, 0.5, 0.75)
    smallest: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 0.02, 0.1)  # regions of stuff, as a part of the image
    steps: Count = 36


class Thresholds(nn.Module):
    """What the search has found: buffers, so that they are saved. Nothing is dropped before it has begun."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("confidence", 0.0), ("overlap", 1.0), ("smallest", 0.0), ("best", -1.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def forward(self, outputs: Outputs, things: frozenset[int]) -> PanopticMap:
        area = float(self.smallest) * outputs.semantic.numel()
        o, confidence, overlap = outputs, float(self.confidence), float(self.overlap)
        return merge(o.masks, o.scores, o.labels, o.semantic, things, confidence, overlap, area)


class PanopticQualityRecipe(Recipe):
    """See the module's docstring. `predict` takes .npz files, dicts of arrays, or `Outputs`, and returns panoptic maps."""

    config: Config
    monitor = ("PQ", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            data = self.open("train")
            self.facts = {"labels": list(data.labels), "things": sorted(data.things)}
        self.model = Thresholds()

    @property
    def things(self) -> frozenset[int]:
        return frozenset(self.facts["things"])

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> Any:
        c = self.config
        options = {"count": c.scenes, "size": c.scene_size} if c.data == "panoptic_scenes" else {}
        return open_panoptic(c.data, split, **options)

    def outputs(self, data: Any, split: str, index: int, truth: PanopticMap) -> Outputs:
        """What the two networks say of an image."""
        if isinstance(data, PanopticScenes):
            stuff = [k for k in range(len(data.labels)) if k not in data.things]
            rng = torch.Generator().manual_seed(index * 2 + (split == "test"))
            return degraded(truth, sorted(data.things), stuff, rng)
        name = Path(data.entries[index]["file_name"]).with_suffix(".npz")
        return read_outputs(data.file.parent.parent / "predictions" / name)

    @cached_property
    def searched(self) -> list[tuple[Outputs, PanopticMap]]:
        return list(self.pairs("train"))

    def pairs(self, split: str):
        """This rank's images: outputs and truth."""
        data = self.open(split)
        for i in range(self.runtime.rank, len(data), self.runtime.world):
            truth = data[i]["map"] if isinstance(data, PanopticScenes) else data.map(i)
            yield self.outputs(data, split, i, truth), truth

    # -- the search ----------------------------------------------------------------------------------------------

    def step(self, batch: Any) -> dict:
        c = self.config
        grid = list(product(c.confidences, c.overlaps, c.smallest))
        tried = Thresholds()
        for name, value in zip(("confidence", "overlap", "smallest"), grid[self.runtime.step % len(grid)], strict=True):
            getattr(tried, name).fill_(value)
        quality = self.quality(tried, self.searched)["PQ"]
        if quality > float(self.model.best):
            tried.best.fill_(quality)
            self.model.load_state_dict(tried.state_dict())
        return {"train_PQ": quality, "best_PQ": float(self.model.best)}

    def quality(self, thresholds: Thresholds, pairs: Any) -> dict[str, float]:
        metric = PanopticQuality(len(self.facts["labels"]), self.things)
        for outputs, truth in pairs:
            metric.update([thresholds(outputs, self.things)], [truth])
        return metric.compute()

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """PQ, SQ and RQ over the whole split, of all categories, of things and of stuff; and those of merging without thresholds."""
        pairs = list(self.pairs(split))
        numbers = self.quality(self.model, pairs)
        return numbers | {"PQ_unfiltered": self.quality(Thresholds(), pairs)["PQ"]}

    # -- use -----------------------------------------------------------------------------------------------------

    def predict(self, inputs: list) -> list[PanopticMap]:
        return [self.model(read_outputs(value), self.things) for value in inputs]

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out images' outputs, written as .npz files."""
        paths = []
        for i, (outputs, _) in enumerate(self.pairs("test")):
            if i < 8:
                paths.append(str(folder / f"{i:05d}.npz"))
                np.savez_compressed(paths[-1], **outputs.arrays())
        return paths

    def draw(self, value: Any, result: PanopticMap) -> Image.Image:
        return drawn_map(torch.full((3, *result.ids.shape), 128, dtype=torch.uint8), result, self.facts["labels"])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with their truth, merged without thresholds and with them; and PQ by category."""
        from paperzoo.engine.pictures import new_figure, tile, to_picture

        data, labels, pictures = self.open("test"), self.facts["labels"], []
        metric = PanopticQuality(len(labels), self.things)
        for i in range(min(6, len(data))):
            item = data[i]
            outputs = self.outputs(data, "test", i, item["map"])
            found = self.model(outputs, self.things)
            metric.update([found], [item["map"]])
            for shown in (item["map"], Thresholds()(outputs, self.things), found):
                pictures.append(drawn_map(item["image"], shown, labels))
        figure, axes = new_figure(6, 1.2 + 0.25 * len(labels))
        each = metric.by_category()
        for name, colour, height in (("SQ", "#93c5fd", 0.8), ("RQ", "#3b82f6", 0.5), ("PQ", "#1e3a8a", 0.25)):
            axes.barh(labels, each[name].nan_to_num().tolist(), height, color=colour, label=name)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.legend(fontsize=8)
        return {"Truth, merged without thresholds, merged": tile(pictures, 6), "By category": to_picture(figure)}


def read_outputs(value: Any) -> Outputs:
    """Outputs from a .npz file, a dict of arrays, or as they are.

    Raises:
        DataError: if the file cannot be read, or an array is missing or does not fit the others.
    """
    if isinstance(value, Outputs):
        return value
    where = "a dict of arrays" if isinstance(value, dict) else value
    try:
        stored = value if isinstance(value, dict) else dict(np.load(Path(value), allow_pickle=False))
        fields = {name: torch.as_tensor(np.asarray(stored[name])) for name in ("masks", "scores", "labels", "semantic")}
    except KeyError as error:
        raise DataError(where, f"has no {error}; masks, scores, labels and semantic are needed") from None
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(where, f"is no .npz file of arrays: {error}") from None
    masks, semantic = fields["masks"], fields["semantic"]
    count = len(masks) if masks.ndim else 0
    if semantic.ndim != 2 or masks.shape != (count, *semantic.shape) or not same_length(fields, count):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in fields.items())
        raise DataError(where, f"has {shapes}; masks (N, H, W), scores (N,), labels (N,), semantic (H, W) are needed")
    return Outputs(masks.bool(), fields["scores"].double(), fields["labels"].long(), semantic.long())


def same_length(fields: dict[str, Tensor], count: int) -> bool:
    return fields["scores"].shape == fields["labels"].shape == (count,)


RECIPE = PanopticQualityRecipe

PRESETS = {
    "embedded": Config(),
    # sec. 7: outputs of Mask R-CNN and PSPNet, merged with thresholds found by grid search; the released code's own are 0.5, 0.5
    # and 4096 pixels, 1.3% of a picture of 640 x 480
    "published": Config(
        data="coco",
        confidences=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        overlaps=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        smallest=(0.0, 0.0066, 0.0133, 0.0266),
        steps=144,
    ),
}
