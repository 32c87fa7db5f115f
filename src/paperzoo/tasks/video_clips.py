"""From videos to clips: when frames are taken, how they are cut and changed, and the views of a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as change

from paperzoo.data.videos import Video, Videos
from paperzoo.errors import DataError


def moments(video: Video, start: float, frames: int, interval: float, short: str) -> list[float]:
    """The times of a clip's frames, seconds, every `interval` from `start`. Where a video ends before its clip, its last frame is
    held ("hold") or it starts anew ("loop")."""
    times = [start + k * interval for k in range(frames)]
    return [t % video.duration for t in times] if short == "loop" else times


def latest_start(video: Video, frames: int, interval: float) -> float:
    """The last moment at which a clip can start so that its last frame is still there; 0 for a video that is shorter."""
    return max(0.0, float(video.times[-1]) - (frames - 1) * interval)


def starts(video: Video, count: int, frames: int, interval: float) -> list[float]:
    """Where `count` clips start that are spread evenly over a video; the middle for one."""
    last = latest_start(video, frames, interval)
    return [last * (k / (count - 1) if count > 1 else 0.5) for k in range(count)]


def interval_of(video: Video, config: Any) -> float:
    """Seconds between a clip's frames: `config.stride` frames at `config.rate` a second, or at the video's own rate."""
    return config.stride / (config.rate or video.rate)


class Clips(Dataset):
    """Training samples: a random clip of a video, float32 (3, T, H, W), and its class.

    Every random choice (moment, size, place, mirroring, RandAugment) holds for the whole clip, and is drawn from torch's global generator.
    """

    def __init__(self, videos: Videos, config: Any, facts: dict) -> None:
        self.videos, self.config, self.facts = videos, config, facts
        self.policy = v2.RandAugment(2, config.randaugment) if config.randaugment else None

    def __len__(self) -> int:
        return len(self.videos)

    def path(self, i: int) -> str:
        return self.videos.path(i)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        config = self.config
        video, target = self.videos[i]
        interval = interval_of(video, config)
        start = float(torch.rand(())) * latest_start(video, config.frames, interval)
        shortest, longest = config.short_side or (None, None)
        side = None if shortest is None else int(torch.randint(shortest, longest + 1, ()))
        pixels = video.frames(moments(video, start, config.frames, interval, config.short), side)
        pixels = crop(pixels, config.image_size, torch.rand(2).tolist(), self.videos.path(i))
        if config.flip and float(torch.rand(())) < 0.5:
            pixels = pixels.flip(-1)
        if self.policy is not None:
            pixels = self.policy(pixels)
        return to_input(pixels, self.facts, config.still), target


class Views(Dataset):
    """Test samples: all views of a video, float32 (clips x crops, 3, T, H, W), and its class."""

    def __init__(self, videos: Videos, config: Any, facts: dict) -> None:
        self.videos, self.config, self.facts = videos, config, facts

    def __len__(self) -> int:
        return len(self.videos)

    def path(self, i: int) -> str:
        return self.videos.path(i)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        video, target = self.videos[i]
        return views(video, self.config, self.facts), target


def views(video: Video, config: Any, facts: dict) -> Tensor:
    """`test_clips` clips spread over the video, `test_crops` crops along the longer side of each: (V, 3, T, H, W)."""
    frames, size = config.test_frames or config.frames, config.test_size or config.image_size
    interval = interval_of(video, config)
    if config.short_side is None:
        side = None
    else:  # several crops cover the whole picture; one is seen as in training
        side = size if config.test_crops > 1 else round(config.short_side[0] * size / config.image_size)
    made = []
    for start in starts(video, config.test_clips, frames, interval):
        pixels = video.frames(moments(video, start, frames, interval, config.short), side)
        for place in places(config.test_crops):
            landscape = pixels.shape[-1] >= pixels.shape[-2]
            at = (0.5, place) if landscape else (place, 0.5)
            made.append(to_input(crop(pixels, size, at, video.name), facts, config.still))
    return torch.stack(made)


def places(crops: int) -> list[float]:
    """Where crops lie along the longer side, 0 … 1: the middle, or from one end to the other."""
    return [0.5] if crops == 1 else [k / (crops - 1) for k in range(crops)]


def crop(pixels: Tensor, size: int, at: Sequence[float], name: str) -> Tensor:
    """A square of `size` pixels; `at` 0 is the upper or left end, 1 the other one.

    Raises:
        DataError: if the pictures are smaller.
    """
    height, width = pixels.shape[-2:]
    if min(height, width) < size:
        raise DataError(
            name,
            f"its pictures are {width} x {height} pixels, smaller than {size}; give short_side, and they are enlarged",
        )
    top, left = round(at[0] * (height - size)), round(at[1] * (width - size))
    return pixels[..., top : top + size, left : left + size]


def to_input(pixels: Tensor, facts: dict, still: bool) -> Tensor:
    """uint8 (T, 3, H, W) -> float32 (3, T, H, W), normalised; `still` shows the middle frame all the time."""
    if still:
        pixels = pixels[len(pixels) // 2].expand_as(pixels)
    scaled = change.normalize(pixels.float() / 255, facts["mean"], facts["deviation"])
    return scaled.transpose(0, 1).contiguous()


def statistics(videos: Videos, count: int = 200) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel in [0, 1], over the middle frames of at most `count` videos spread over the set."""
    sums, squares, pixels = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for i in range(0, len(videos), max(1, len(videos) // count)):
        try:
            video, _ = videos[i]
            frame = video.frames([video.duration / 2])[0].double() / 255
        except DataError:  # told and counted when it is fed
            continue
        sums, squares = sums + frame.sum((1, 2)), squares + frame.square().sum((1, 2))
        pixels += frame[0].numel()
    mean = sums / max(1, pixels)
    deviation = (squares / max(1, pixels) - mean**2).clamp(min=1e-6).sqrt()
    return [round(float(m), 4) for m in mean], [round(float(d), 4) for d in deviation]
