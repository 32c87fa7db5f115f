"""Video object detection's samples: a frame with some of its neighbours, as the network sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.blocks.boxes import pad_images
from paperzoo.data.coco import DetectionData
from paperzoo.data.video_boxes import VideoBoxes
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.detection_samples import relabelled, resized, scale


class Windows(Dataset):
    """Annotated frames of videos, each with random neighbours; random numbers from torch's global generator.

    Args:
        data: the videos.
        recipe: its config says sizes, flipping, neighbours and how many frames of a video are taken, evenly spread.
        neighbours: how many; 0 for the frame alone.
        stills: pictures without a video, drawn instead at `still_share`; each is its own neighbour, as DET's are in the released code.
    """

    def __init__(self, data: VideoBoxes, recipe: Any, neighbours: int, stills: DetectionData | None = None) -> None:
        self.data, self.config, self.facts, self.neighbours = data, recipe.config, recipe.facts, neighbours
        self.labels = torch.tensor(relabelled(data, recipe.facts["labels"]))
        if neighbours > 2 * self.config.spread + 1:
            most = 2 * self.config.spread + 1
            raise PaperZooError(f"neighbours is {neighbours}; within a spread of {self.config.spread} there are {most}")
        self.stills = stills
        self.still_labels = torch.tensor(relabelled(stills, recipe.facts["labels"])) if stills is not None else None
        self.rows: list[tuple[int, int]] = []
        for video in range(len(data)):
            frames = data.annotated(video)
            count = min(len(frames), self.config.frames_per_video or len(frames))
            self.rows += [(video, frames[i * len(frames) // count]) for i in range(count)]
        if not self.rows:
            raise DataError(data.path(0) if len(data) else self.config.data, "no frame of the videos is annotated")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        config = self.config
        if self.stills is not None and float(torch.rand(())) < config.still_share:
            item = self.stills[int(torch.randint(len(self.stills), ()))]
            frames = [item["image"]] * (1 + self.neighbours)
            offsets, labels = [0] * len(frames), self.still_labels[item["labels"]]
            tracks = torch.arange(len(labels))
        else:
            video, frame = self.rows[index]
            item = self.data.truth(video, frame)
            around = self.around(frame, self.data.length(video))
            frames = [self.data.image(video, t) for t in (frame, *around)]
            offsets = [0, *(t - frame for t in around)]
            labels, tracks = self.labels[item["labels"]], item["tracks"]
        solid = ~item["crowd"] & (item["boxes"][:, 2:] - item["boxes"][:, :2] >= 1).all(1)
        boxes, width = item["boxes"][solid], frames[0].shape[2]
        if config.augment == "flip" and float(torch.rand(())) < 0.5:
            frames = [f.flip(2) for f in frames]
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        size = config.image_sizes[int(torch.randint(len(config.image_sizes), ()))]
        images = together(frames, config, self.facts, size)
        return {
            "images": images,
            "offsets": torch.tensor(offsets),
            "boxes": boxes * scale(frames[0], images[0]),
            "labels": labels[solid],
            "tracks": tracks[solid],
        }

    def around(self, frame: int, length: int) -> list[int]:
        """Frames at distinct random distances up to `spread`; those beyond the video's ends are its first or last frame."""
        spread = self.config.spread
        chosen = torch.randperm(2 * spread + 1)[: self.neighbours] - spread
        return [min(max(frame + d, 0), length - 1) for d in chosen.tolist()]


class CollateWindows:
    """Samples of `Windows` to a batch, as the docstring of `tasks/video_detection.py` says."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple

    def __call__(self, samples: Sequence[dict]) -> dict:
        flat = pad_images([s["images"].flatten(0, 1) for s in samples], self.multiple)
        return {
            "images": flat.unflatten(1, (-1, 3)),
            "offsets": torch.stack([s["offsets"] for s in samples]),
            "sizes": torch.tensor([s["images"].shape[-2:] for s in samples]),
            "targets": [{k: s[k] for k in ("boxes", "labels", "tracks")} for s in samples],
        }


def alike(data: VideoBoxes, most: int) -> list[list[int]]:
    """Videos of one length and size in groups of at most `most`, which can go through a network side by side."""
    groups: dict[tuple, list[list[int]]] = {}
    for video in range(len(data)):
        kind = (data.length(video), *data.size(video))
        kept = groups.setdefault(kind, [[]])
        if len(kept[-1]) == most:
            kept.append([])
        kept[-1].append(video)
    return sorted((group for kept in groups.values() for group in kept), key=lambda group: group[0])


def together(frames: Sequence[Tensor], config: Any, facts: dict, size: int | None = None) -> Tensor:
    """Frames uint8 (3, H, W) of one size, normalised and resized as `to_network` does one by one: float32 (T, 3, h, w)."""
    mean, deviation = (torch.tensor(facts[key])[:, None, None] for key in ("mean", "deviation"))
    images = (torch.stack(list(frames)).float() / 255 - mean) / deviation
    size = config.image_sizes[-1] if size is None else size
    first = resized(images[0], config.resize, size, config.longest_side)
    if first.shape == images.shape[1:]:
        return images
    return torch.stack([first, *(resized(x, config.resize, size, config.longest_side) for x in images[1:])])


def whole_frames(frames: Sequence[Tensor], config: Any, facts: dict, multiple: int) -> tuple[Tensor, Tensor]:
    """Frames (3, H, W) of different videos, all of one size, as the network sees them: (B, 3, h, w), and their sizes (B, 2) inside."""
    images = together(frames, config, facts)
    flat = pad_images([images.flatten(0, 1)], multiple)[0].unflatten(0, (-1, 3))
    return flat, torch.tensor([images.shape[2:]] * len(images))
