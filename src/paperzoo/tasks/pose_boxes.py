"""Where people are, for networks that look at one person at a time: result files and finished detectors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paperzoo.data.poses import PoseData
from paperzoo.errors import DataError, PaperZooError


@dataclass(frozen=True)
class Boxes:
    """Boxes of people that a detector found: image int64 (N,), boxes float32 (N, 4) as x1 y1 x2 y2, scores (N,)."""

    image: Tensor
    boxes: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def read(cls, file: str | Path, data: PoseData) -> Boxes:
        """A COCO result file: a list of {"image_id", "category_id", "bbox", "score"}; category 1 is a person.

        Raises:
            DataError: naming the row that does not fit, or if there is no person at all.
        """
        path = Path(file).expanduser()
        try:
            rows = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(path, f"cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise DataError(path, f"is no JSON file: {error}") from None
        if not isinstance(rows, list):
            raise DataError(path, "is no list of detections; a COCO result file is one")
        position = {number: i for i, number in enumerate(data.ids)}
        images, boxes, scores = [], [], []
        for i, row in enumerate(rows):
            try:
                if row["category_id"] != 1 or row["image_id"] not in position:
                    continue
                x, y, width, height = map(float, row["bbox"])
                score = float(row["score"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    path, f"detection {i + 1}: needs image_id, category_id, bbox, score: {error!r}"
                ) from None
            if width > 0 and height > 0:
                images.append(position[row["image_id"]])
                boxes.append([x, y, x + width, y + height])
                scores.append(score)
        if not images:
            raise DataError(path, "has no person (category_id 1) in an image of this data")
        return cls(torch.tensor(images), torch.tensor(boxes), torch.tensor(scores))


class PersonDetector:
    """A finished detection run as a finder of people: an image uint8 (3, H, W) -> boxes (N, 4) and scores (N,).

    Args:
        folder: of the run. If one of its classes is called "person" only that counts, else all do.
        above: the least score of a box.
    """

    def __init__(self, folder: str | Path, device: Any, above: float = 0.5) -> None:
        from paperzoo.engine.run import load
        from paperzoo.tasks.detection import DetectionRecipe

        self.recipe, self.above = load(folder, device=str(device)), above
        if not isinstance(self.recipe, DetectionRecipe):
            raise PaperZooError(f"{folder}: detector must be the folder of a finished detection run")

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.recipe.predict([image])[0].above(self.above)
        only = "person" in self.recipe.facts["labels"]
        kept = [i for i, label in enumerate(found.labels) if not only or label == "person"]
        boxes = torch.tensor([found.boxes[i] for i in kept]).reshape(-1, 4)
        return boxes, torch.tensor([found.scores[i] for i in kept])
