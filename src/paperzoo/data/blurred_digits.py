"""Blurred digits: short videos with exact boxes and tracks, whose frames are blurred or hidden now and then. Always there.

Real scans of handwritten digits move over a crop of a real photograph, slowly, at medium speed or fast, and turn back at the
border; the camera moves as well. Some frames are out of focus, some are smeared by the hand that holds the camera, and in some a piece of another
photograph passes in front of a digit: there, one frame does not tell which digit it is, but the frames before and after do.
Nothing is downloaded, everything follows from the seed. The splits share no scan and no part of a photograph.

Boxes are tight around the whole ink, whether it is sharp, blurred or hidden.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.data.moving_digits import pasted
from paperzoo.data.scenes import CHUNK, backgrounds, boxes_around, digit_scans
from paperzoo.data.video_boxes import VideoBoxes
from paperzoo.errors import PaperZooError

HAZE = 0.35  # the contrast that is left of a photograph
PAN = 6  # pixels that the camera moves at most to either side
SPEEDS = ((0.0, 0.15), (0.25, 0.6), (1.2, 2.2))  # pixels a frame in a picture of 64: slow, medium, fast
BORDER = 8  # pixels beyond the picture that a blur still sees
SHARP, DEFOCUS, SHAKE = 0, 1, 2


class BlurredDigits(VideoBoxes):
    """The embedded set.

    Args:
        videos: how many; of the test split a quarter.
        frames: of a video.
        size: height and width in pixels.
        digits: which there are: 0 … digits - 1.
        objects: 1 to so many in a video.
        share: about so many of the frames are blurred or hidden.
    """

    def __init__(
        self,
        split: str,
        videos: int = 128,
        frames: int = 16,
        size: int = 64,
        digits: int = 5,
        objects: int = 2,
        share: float = 0.45,
    ) -> None:
        if not 2 <= digits <= 10:
            raise PaperZooError(f"digits is {digits}; it must be 2 to 10")
        if size < 32 or frames < 2 or objects < 1 or not 0 <= share <= 1:
            raise PaperZooError(
                f"blurred_digits of {size} pixels, {frames} frames, {objects} objects, share {share}: "
                "at least 32, 2 and 1, and a share in [0, 1] are needed"
            )
        self.split, self.labels = split, [str(d) for d in range(digits)]
        count = videos if split == "train" else max(1, videos // 4)
        self.videos = draw_videos(count, split, frames, size, digits, objects, share)
        self.shape = size, size

    def __len__(self) -> int:
        return len(self.videos["frames"])

    def length(self, video: int) -> int:
        return self.videos["frames"].shape[1]

    def size(self, video: int) -> tuple[int, int]:
        return self.shape

    def path(self, video: int, frame: int = 0) -> str:
        return f"{self.split} video {video}, frame {frame}"

    def image(self, video: int, frame: int) -> Tensor:
        return self.videos["frames"][video, frame]

    def rows(self, video: int, frame: int) -> tuple:
        there = self.videos["there"][video]
        boxes = self.videos["boxes"][video, frame, there]
        tracks = there.nonzero()[:, 0]
        return boxes, self.videos["labels"][video, there], tracks, torch.zeros(len(tracks))

    def degraded(self, video: int) -> Tensor:
        return self.videos["degraded"][video]


@functools.lru_cache(maxsize=4)
def draw_videos(
    count: int,
    split: str = "train",
    frames: int = 16,
    size: int = 64,
    digits: int = 5,
    objects: int = 2,
    share: float = 0.45,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The videos; kept in memory, so treat the tensors as read-only. The first ones do not depend on `count`.

    Returns:
        frames: uint8 (V, T, 3, S, S); boxes: float32 (V, T, M, 4); labels: int64 (V, M); there: bool (V, M), whether
        a video has its m-th object; degraded: bool (V, T); blur: uint8 (V, T), SHARP, DEFOCUS or SHAKE.
    """
    chunks = [
        _chunk((seed * 100_003 + k) * 2 + (split != "train") + 5_000_011, split, frames, size, digits, objects, share)
        for k in range(-(-count // CHUNK))
    ]
    return {name: torch.cat([c[name] for c in chunks])[:count] for name in chunks[0]}


def _chunk(key: int, split: str, frames: int, size: int, digits: int, objects: int, share: float) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(key)
    scene = photograph(frames, size, split, rng)  # (B, T, 3, S, S)
    scans, kinds = digit_scans("train" if split == "train" else "test")
    scans, kinds = scans[kinds < digits], kinds[kinds < digits]
    there = torch.arange(objects) < torch.randint(1, objects + 1, (CHUNK, 1), generator=rng)
    boxes, labels = [], []
    for m in range(objects):
        chosen = torch.randint(len(scans), (CHUNK,), generator=rng)
        centre, side = paths(frames, size, m, objects, rng)
        angle = ((torch.rand(CHUNK, 1, generator=rng) - 0.5) * 0.4).expand(-1, frames)
        ink = pasted(scans[chosen], centre, side, angle, size) * there[:, m, None, None, None]
        colour = contrasting(scene.mean((1, 2, 3, 4)), rng)
        scene = torch.lerp(scene, colour[:, None, :, None, None], ink[:, :, None])
        boxes.append(boxes_around(ink.flatten(0, 1)[:, None] > 0.5)[0].reshape(CHUNK, frames, 4))
        labels.append(kinds[chosen])
    scene, hidden = with_passers(scene, torch.stack(boxes, 2), there, share / 3, split, rng)
    blur = torch.where(in_runs(frames, share * 0.8, rng), 1 + torch.randint(2, (CHUNK, frames), generator=rng), SHARP)
    scene = blurred(scene, blur, rng)
    scene = scene + 0.02 * torch.randn(scene.shape, generator=rng)
    return {
        "frames": (scene * 255).round().clamp(0, 255).to(torch.uint8),
        "boxes": torch.stack(boxes, 2),
        "labels": torch.stack(labels, 1),
        "there": there,
        "degraded": hidden | (blur != SHARP),
        "blur": blur.to(torch.uint8),
    }


def photograph(frames: int, size: int, split: str, rng: torch.Generator) -> Tensor:
    """A hazy part of a photograph for each video, seen by a camera that drifts: (B, T, 3, S, S) in [0, 1]."""
    large = backgrounds(size + 2 * PAN, "train" if split == "train" else "test", rng)
    middle = large.mean((1, 2, 3), keepdim=True)
    large = middle + HAZE * (large - middle)
    draw = torch.rand(CHUNK, 2, 2, generator=rng)
    time = torch.arange(frames) / max(1, frames - 1)
    shift = PAN * (
        1 + torch.sin(2 * math.pi * (draw[..., :1] + (0.3 + 0.7 * draw[..., 1:]) * time))
    )  # (B, 2, T), 0 … 2 PAN
    column, row = shift.round().long().unbind(1)  # (B, T): whole pixels, so that nothing is blurred yet
    views = large.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)  # (B, 2 PAN + 1, 2 PAN + 1, 3, S, S)
    return views[torch.arange(CHUNK)[:, None], row, column]


def paths(frames: int, size: int, m: int, objects: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where the m-th digits are, in parts of the picture's side: centres (B, T, 2) as x and y, sides (B, T)."""
    side = 0.42 + 0.16 * torch.rand(CHUNK, 1, generator=rng)
    pace = torch.randint(len(SPEEDS), (CHUNK,), generator=rng)
    low, high = torch.tensor(SPEEDS)[pace].unbind(1)
    speed = (low + (high - low) * torch.rand(CHUNK, generator=rng)) / 64
    heading = 2 * math.pi * torch.rand(CHUNK, generator=rng)
    step = speed[:, None] * torch.stack([heading.cos(), heading.sin()], 1)
    room = 1 - 0.8 * side  # the ink is smaller than its scan
    # several digits start in lanes of their own, so that not all of them hide each other
    lane = torch.tensor([1.0, 1.0 / objects])
    start = (torch.rand(CHUNK, 2, generator=rng) + torch.tensor([0.0, float(m)])) * lane * room
    way = start[:, None] + step[:, None] * torch.arange(frames)[None, :, None]
    folded = (way.remainder(2 * room[:, None]) - room[:, None]).abs()  # to and fro between the borders
    return 0.4 * side[:, None] + room[:, None] - folded, side.expand(-1, frames)


def contrasting(brightness: Tensor, rng: torch.Generator) -> Tensor:
    """Colours (B, 3) that are clearly lighter or darker than what lies under them."""
    brightness = brightness[:, None]
    wanted = torch.where(brightness < 0.5, brightness + 0.45, brightness - 0.45)
    return (torch.rand(CHUNK, 3, generator=rng) * 0.4 - 0.2 + wanted).clamp(0, 1)


def in_runs(frames: int, share: float, rng: torch.Generator) -> Tensor:
    """Which frames something befalls, one to three in a row: bool (B, T), about `share` of them."""
    start = torch.rand(CHUNK, frames, generator=rng) < share / 2 / max(1e-6, 1 - share / 2)
    length = torch.randint(1, 4, (CHUNK, frames), generator=rng)
    runs = start
    for later in (1, 2):
        runs = runs | F.pad(start & (length > later), (later, 0))[:, :frames]
    return runs


def with_passers(
    scene: Tensor, boxes: Tensor, there: Tensor, share: float, split: str, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A piece of another photograph in front of one object of a frame now and then; and where that hides most of one."""
    frames, size = scene.shape[1], scene.shape[-1]
    pieces = backgrounds(size, "train" if split == "train" else "test", rng)
    when = in_runs(frames, share, rng)
    box = boxes[:, :, 0]  # the first object is in every video
    extent = box[..., 2:] - box[..., :2]
    away = (torch.rand(CHUNK, frames, 2, generator=rng) - 0.5) * 0.3 * extent
    corner, end = (box[..., :2] + 0.1 * extent + away), (box[..., 2:] - 0.1 * extent + away)
    at = torch.arange(size) + 0.5
    x = (at >= corner[..., :1]) & (at < end[..., :1])  # (B, T, S)
    y = (at >= corner[..., 1:]) & (at < end[..., 1:])
    cover = (y[..., :, None] & x[..., None, :] & when[..., None, None])[:, :, None]
    return torch.where(cover, pieces[:, None], scene), when & there[:, :1]


def blurred(scene: Tensor, blur: Tensor, rng: torch.Generator) -> Tensor:
    """Frames (B, T, 3, S, S) out of focus (a disc) or smeared (a line) where `blur` says so."""
    size = scene.shape[-1]
    rows = (blur != SHARP).flatten().nonzero()[:, 0]
    kind = blur.flatten()[rows]
    draw = torch.rand(len(rows), 2, generator=rng)
    reach = torch.arange(-BORDER, BORDER + 1).float()
    y, x = torch.meshgrid(reach, reach, indexing="ij")
    radius = size / 64 * (3.5 + 2.5 * draw[:, :1, None])
    disc = (radius + 0.5 - (x.square() + y.square()).sqrt()).clamp(0, 1)
    angle, half = math.pi * draw[:, 1:, None], size / 64 * (5 + 3 * draw[:, :1, None])
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    line = (half + 0.5 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(min=0)
    kernel = torch.where((kind == DEFOCUS)[:, None, None], disc, line)
    kernel = kernel / kernel.sum((1, 2), keepdim=True)
    flat = scene.flatten(0, 1)
    wide = F.pad(flat[rows], (BORDER,) * 4, mode="replicate")
    large = tuple(n + 2 * BORDER for n in wide.shape[-2:])  # room for what a circular convolution carries over
    product = torch.fft.rfft2(wide, s=large) * torch.fft.rfft2(kernel, s=large)[:, None]
    found = torch.fft.irfft2(product, s=large)[..., 2 * BORDER : 2 * BORDER + size, 2 * BORDER : 2 * BORDER + size]
    return flat.index_copy(0, rows, found).reshape(scene.shape)
