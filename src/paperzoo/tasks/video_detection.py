"""Object detection in videos: boxes with classes and scores in every frame, found with the help of the frames around it.

Boxes are x1 y1 x2 y2 in pixels, x2 and y2 exclusive. Labels are 0 … num_classes - 1, without a class for background.

A batch is a dict:
    images   float32 (B, 1 + N, 3, H, W): a frame, and after it its N neighbours, resized, normalised with `facts`, zero-padded right and below
    offsets  int64 (B, 1 + N): how many frames each one lies after the first of the row, negative before it; the first is 0
    sizes    int64 (B, 2): height and width of each video inside the canvas (H, W)
    targets  for each frame images[:, 0]: {"boxes": float32 (M, 4) in pixels of the canvas, "labels": int64 (M,), "tracks": int64 (M,)};
             tracks are equal for the same object within a video; M may be 0

A detector is a module with the members that `tasks/detection.py` asks for, and looks at five-dimensional images:
    model(images)                                 raw outputs for images[:, 0], a tuple of tensors (B, …); N may be 0
    model(images, targets)                        the losses, a dict of scalars; their sum is learned from
    model.postprocess(outputs, sizes, canvas)     for each frame {"boxes", "scores", "labels"}, best first; a model for `seq_nms` takes
                                                  `suppress=False`, which leaves non-maximum suppression to the sequence
    model.num_classes, and where they make sense `reset_classifier(num_classes)`, `load_backbone(state_dict)`
and one more, to look at each frame of a video once:
    model.stream(frames, reach)                   frames: an iterable of (B, 3, H, W), those of B videos side by side, in the order of time;
                                                  yields the raw outputs of each, in that order, made from at most `reach` frames to either side
Without it, each frame goes through `model(images)` with the frames around it as neighbours, itself not among them. A detector of single frames, of key
frames with others in between, with a memory or with frames drawn from all of the video has its own `stream`.

A prediction is a `VideoDetection`, for a video as `paperzoo.data.videos.open_video` takes it: a file, a folder of frames, an array.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.blocks.sequence_nms import sequence_nms
from paperzoo.data.video_boxes import VideoBoxes, open_stills, open_video_boxes
from paperzoo.data.videos import open_video, write_video
from paperzoo.tasks.classification import Count, Fraction, Positive
from paperzoo.tasks.detection import Detection, DetectionRecipe, answer, coco_numbers, drawn, relabelled
from paperzoo.tasks.video_detection_metrics import VideoAP, motion_iou
from paperzoo.tasks.video_detection_samples import CollateWindows, Windows, alike, whole_frames

DECODED = 32  # frames of a film that are decoded together
STRIP = 6  # frames of a video in a picture


@dataclass(frozen=True)
class VideoDetection:
    """The objects in each frame of a video, boxes in pixels of the frame; frames a second."""

    frames: list[Detection] = field(repr=False)
    rate: float

    def above(self, score: float) -> VideoDetection:
        """Only the objects with at least this score."""
        return VideoDetection([f.above(score) for f in self.frames], self.rate)


@dataclass(frozen=True)
class Config:
    """The default recipe: gradient descent on the sum of the detector's losses, for frames with random neighbours."""

    model: str = "fgfa_rfcn_resnet101"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "blurred_digits"
    videos: Count = 128  # of blurred_digits alone: videos to learn from, their frames, pixels, digits and objects
    video_frames: Annotated[int, Field(ge=2)] = 16
    video_size: Annotated[int, Field(ge=32)] = 64
    digits: Annotated[int, Field(ge=2, le=10)] = 5
    video_objects: Count = 2
    frames_per_video: Count | None = None  # that are learned from, evenly spread; None: all
    stills: str | None = None  # pictures to learn from as well, see `open_stills`; their classes are among the videos'
    still_share: Fraction = 0.0  # so many of the samples are from there
    neighbours: Annotated[int, Field(ge=0)] = 2  # frames beside the one that is learned from
    spread: Count = 10  # their largest distance
    reach: Annotated[int, Field(ge=0)] = 10  # frames to either side that are looked at in tests
    seq_nms: bool = False  # chains through the frames instead of non-maximum suppression in each
    coco_metrics: bool = True  # COCO's metrics, too; for hundreds of thousands of frames they take very long
    test_videos: Count = 1  # that are looked at side by side, where they have one length and size
    resize: Literal["shortest", "square"] = "shortest"
    image_sizes: tuple[Count, ...] = (600,)  # drawn from for each sample while learning; the last one is for evaluation
    longest_side: Count = 1000
    multiple: Count = 1  # images are padded to a multiple of it
    normalise: Literal["imagenet", "none"] = "imagenet"
    augment: Literal["none", "flip"] = "flip"
    weights: str | None = None  # start from these weights of the whole detector
    backbone_weights: str | None = None  # or from a classifier's
    freeze: tuple[str, ...] = ()  # parameters whose names begin so do not learn
    freeze_norms: bool = False  # batch norms keep their statistics and do not learn
    steps: Count = 60_000
    batch_size: Count = 4
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.001
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (2 / 3,)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    show_above: Fraction = 0.5  # pictures show objects with at least this score
    workers: Annotated[int, Field(ge=0)] = 0


class VideoDetectionRecipe(DetectionRecipe):
    """The task's default recipe. A detector with another way to learn overrides `step` or `batch`."""

    config: Config
    reads_images = False
    any_size = False  # frames and their number; sizes halve in many ways on the way to a map
    monitor = ("vid_mAP", "max")

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> VideoBoxes:
        """The videos of a split."""
        c = self.config
        if c.data != "blurred_digits":
            return open_video_boxes(c.data, split)
        options = {"videos": c.videos, "frames": c.video_frames, "size": c.video_size}
        return open_video_boxes(c.data, split, **options, digits=c.digits, objects=c.video_objects)

    def windows(self, neighbours: int) -> Windows:
        """What is learned from, with so many neighbours of each frame."""
        stills = self.config.stills
        return Windows(self.open("train"), self, neighbours, stills and open_stills(stills))

    @cached_property
    def train_data(self) -> Windows:
        return self.windows(self.config.neighbours)

    @cached_property
    def test_data(self) -> VideoBoxes:
        return self.open("test")

    @cached_property
    def batches(self):
        c = self.config
        return self.runtime.batches(
            self.train_data, c.batch_size, workers=c.workers, collate=CollateWindows(c.multiple)
        )

    def batch(self) -> dict:
        return self.batches.next()

    # -- tests ---------------------------------------------------------------------------------------------------

    def watch(self, moments: Iterable[list[Tensor]]) -> Iterator[list[dict[str, Tensor]]]:
        """Videos side by side, frame by frame: lists of uint8 (3, H, W) of one size -> the objects in each, in pixels of the frames."""
        model, config = self.deployed.eval(), self.config
        seen: dict[str, Any] = {}

        def ready() -> Iterator[Tensor]:
            for frames in moments:
                images, sizes = whole_frames(frames, config, self.facts, config.multiple)
                if not seen:
                    original = torch.tensor(frames[0].shape[1:])
                    factor = (original / sizes[0]).flip(0).repeat(2)
                    device = self.runtime.device
                    seen.update(sizes=sizes.to(device), factor=factor.to(device), canvas=tuple(images.shape[-2:]))
                yield images.to(self.runtime.device)

        stream = model.stream if hasattr(model, "stream") else lambda frames, reach: windowed(model, frames, reach)
        options = {"suppress": False} if config.seq_nms else {}
        for outputs in stream(ready(), config.reach):
            found = model.postprocess(outputs, seen["sizes"], seen["canvas"], **options)
            yield [o | {"boxes": o["boxes"] * seen["factor"].to(o["boxes"].dtype)} for o in found]

    def watched(self, moments: Iterable[list[Tensor]]) -> list[list[dict[str, Tensor]]]:
        """The same for each video: its frames' objects."""
        videos = [list(frames) for frames in zip(*self.watch(moments), strict=True)]
        return [sequence_nms(frames) for frames in videos] if self.config.seq_nms else videos

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """ImageNet VID's numbers (see `VideoAP`) and COCO's, over the annotated frames of the whole split.

        vid_mAP is at IoU 0.5; vid_mAP_slow, _medium, _fast by motion IoU; vid_mAP_degraded in frames known to be blurred or hidden.
        """
        data = self.test_data if split == "test" else self.open(split)
        numbers = torch.tensor(relabelled(data, self.facts["labels"]))
        ap, coco = VideoAP(len(self.facts["labels"])), self.metric()
        groups = alike(data, self.config.test_videos)
        for group in groups[self.runtime.rank :: self.runtime.world]:
            moments = ([data.image(v, t) for v in group] for t in range(data.length(group[0])))
            for video, found in zip(group, self.watched(moments), strict=True):
                frames = data.annotated(video)
                truth = [data.truth(video, t) for t in frames]
                truth = [t | {"labels": numbers[t["labels"]]} for t in truth]
                degraded = data.degraded(video)
                for t, objects, speed in zip(frames, truth, motion_iou(frames, truth), strict=True):
                    ap.update(found[t], objects, speed, None if degraded is None else bool(degraded[t]))
                    if self.config.coco_metrics:
                        wanted = {k: objects[k] for k in ("boxes", "labels", "area")}
                        wanted["iscrowd"] = objects["crowd"].long()
                        coco.update([found[t]], [self.runtime.to_device(wanted)])
        if self.runtime.world > 1:
            every: list[Any] = [None] * self.runtime.world
            dist.all_gather_object(every, ap.frames)
            ap.frames = [frame for part in every for frame in part]
        return ap.compute() | (coco_numbers(coco.compute()) if self.config.coco_metrics else {})

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[VideoDetection]:
        """Video files, folders of frames or arrays (see `paperzoo.data.videos.open_video`) to the objects in every frame."""
        results = []
        for value in inputs:
            video = open_video(value)
            times = video.times.tolist()
            parts = (video.frames(times[i : i + DECODED]) for i in range(0, len(times), DECODED))
            found = self.watched([frame] for part in parts for frame in part)[0]
            results.append(VideoDetection([answer(objects, self.facts["labels"]) for objects in found], video.rate))
        return results

    def samples(self, folder: Path) -> list[str]:
        """Four held-out videos as files: .mp4, or .npz where PyAV is not installed; the first 64 frames of each."""
        import importlib.util

        ending = ".mp4" if importlib.util.find_spec("av") else ".npz"
        data, paths = self.test_data, []
        for v in range(0, len(data), max(1, len(data) // 4))[:4]:
            frames = torch.stack([data.image(v, t) for t in range(min(64, data.length(v)))])
            paths.append(str(write_video(folder / f"{v:05d}{ending}", frames, 12.0)))
        return paths

    def example(self) -> tuple[Tensor]:
        size = -(-self.config.image_sizes[-1] // self.config.multiple) * self.config.multiple
        shape = (2, 1 + self.config.neighbours, 3, size, size)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: VideoDetection) -> Image.Image:
        """Six frames in the order of time, with what was found in them."""
        from paperzoo.engine.pictures import tile

        video = open_video(value)
        chosen = strip_of(len(result.frames), [])
        frames = video.frames([float(video.times[k]) for k in chosen])
        return tile([self.picture(f, result.frames[k]) for f, k in zip(frames, chosen, strict=True)], STRIP)

    def picture(self, frame: Tensor, objects: Detection) -> Image.Image:
        shown = objects.above(self.config.show_above)
        captions = [f"{label} {score:.0%}" for label, score in zip(shown.labels, shown.scores, strict=True)]
        return drawn(frame, shown.boxes, captions, shown.indices, 160)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Frames of held-out videos, degraded ones where they are known: what was found, and what is there."""
        from paperzoo.engine.pictures import tile

        data, found, there = self.test_data, [], []
        numbers = relabelled(data, self.facts["labels"])
        for v in range(0, len(data), max(1, len(data) // 4))[:4]:
            length = min(64, data.length(v))
            results = self.watched([data.image(v, t)] for t in range(length))[0]
            degraded = data.degraded(v)
            for t in strip_of(length, [] if degraded is None else degraded[:length].nonzero()[:, 0].tolist()):
                image, truth = data.image(v, t), data.truth(v, t)
                found.append(self.picture(image, answer(results[t], self.facts["labels"])))
                labels = [numbers[k] for k in truth["labels"].tolist()]
                captions = [self.facts["labels"][k] for k in labels]
                there.append(drawn(image, truth["boxes"].tolist(), captions, labels, 160))
        return {"Found": tile(found, STRIP), "There": tile(there, STRIP)}


def strip_of(length: int, preferred: list[int]) -> list[int]:
    """Up to STRIP of `length` frames, spread over the video: of the preferred ones, or those and the first others if they are few."""
    others = [t for t in range(length) if t not in preferred]
    few = sorted(preferred + others[: max(0, STRIP - len(preferred))]) if preferred else others
    count = min(STRIP, len(few))
    return [few[k * len(few) // count] for k in range(count)]


def windowed(model: nn.Module, frames: Iterable[Tensor], reach: int) -> Iterator[tuple[Tensor, ...]]:
    """Each frame of videos with the frames at most `reach` before and after it through `model(images)`, whatever it computes anew.

    frames: (B, 3, H, W) each, in the order of time. At the ends of a video there are fewer neighbours.
    """
    for before, frame, after in around(frames, reach):
        yield model(torch.stack([frame, *before, *after], 1))


def around(items: Iterable[Any], reach: int) -> Iterator[tuple[list[Any], Any, list[Any]]]:
    """Each item of a sequence with up to `reach` items before and after it; no more than 2 * reach + 1 are held."""
    kept: deque[Any] = deque(maxlen=2 * reach + 1)
    seen = answered = 0

    def answer_next() -> tuple[list[Any], Any, list[Any]]:
        first = seen - len(kept)
        every, here = list(kept), answered - first
        return every[max(0, here - reach) : here], every[here], every[here + 1 : here + 1 + reach]

    for item in items:
        kept.append(item)
        seen += 1
        if seen > answered + reach:
            yield answer_next()
            answered += 1
    while answered < seen:
        yield answer_next()
        answered += 1
