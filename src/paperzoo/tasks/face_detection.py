"""Face detection: boxes with scores, and where the eyes, the nose and the corners of the mouth are.

Boxes are x1 y1 x2 y2 in pixels, x2 and y2 exclusive. Landmarks are five points x y in pixels: left eye, right eye, nose,
left and right corner of the mouth; left is the left of the picture.

A batch is a dict:
    images   float32 (B, 3, H, W): resized, normalised with `facts`, zero-padded right and below; (H, W) is the canvas
    sizes    int64 (B, 2): height and width of each image inside the canvas
    targets  for each image {"boxes": float32 (N, 4) in pixels of the canvas, "labels": int64 (N,), all 0, "landmarks":
             float32 (N, 5, 2), "has_landmarks": bool (N,)}; N may be 0. Faces that are to be ignored are not among them
    truth    for evaluation: for each image boxes, landmarks, has_landmarks, ignored, subsets (see `data/faces.py`) and
             size, in pixels of the original image

A face detector is a module with the members of a detector (`tasks/detection.py`):
    model(images)                                 raw outputs, a tuple of tensors (B, …): what is exported
    model(images, targets)                        the losses, a dict of scalars; their sum is learned from
    model.postprocess(outputs, sizes, canvas)     for each image {"boxes": (N, 4), "scores": (N,), "landmarks": (N, 5, 2)} in
                                                  pixels of the canvas, best first; a detector without landmarks leaves
                                                  them out
    model.num_classes                             1
    model.load_backbone(state_dict)               where it can start from a classifier's weights
What is no such module (a cascade, an ensemble) overrides `detect`, and `step` if it learns otherwise.

A prediction is a `Faces`, in pixels of the image that was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_iou
from torchvision.transforms import v2

from paperzoo.blocks.boxes import pad_images
from paperzoo.data.faces import POINTS, SUBSETS, open_face_detection
from paperzoo.data.images import to_image
from paperzoo.engine.runtime import Runtime
from paperzoo.tasks.classification import Count, Fraction, Positive
from paperzoo.tasks.detection import Collate, DetectionRecipe, scale, to_network

MIRRORED = (1, 0, 2, 4, 3)
"""The landmarks' order in a mirrored picture."""

NORMALISE = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "pixels": ([123 / 255, 117 / 255, 104 / 255], [1 / 255] * 3),  # 0 … 255 less a mean, as in Caffe's days
    "centred": ([0.5] * 3, [128 / 255] * 3),  # (pixel - 127.5) / 128
    "none": ([0.0] * 3, [1.0] * 3),
}
THRESHOLDS = 1000  # of scores, in WIDER FACE's evaluation
GREY = 120.0


@dataclass(frozen=True)
class Faces:
    """The faces in one image, best first: one entry of each list a face. Pixels of the image.

    `landmarks[i]` are five (x, y); the list is empty for a detector without landmarks.
    """

    boxes: list[tuple[float, float, float, float]]
    scores: list[float]
    landmarks: list[list[tuple[float, float]]]

    def above(self, score: float) -> Faces:
        """Only the faces with at least this score."""
        n = sum(s >= score for s in self.scores)
        return Faces(self.boxes[:n], self.scores[:n], self.landmarks[:n])


@dataclass(frozen=True)
class Config:
    """The default recipe: gradient descent on the sum of the detector's losses."""

    model: str = "retinaface_mobilenet025"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "drawn_faces"
    scenes: Count = 256  # how many scenes to learn from, their pixels and faces: only for drawn_faces
    scene_size: Count = 128
    scene_faces: Count = 3
    scene_scale: tuple[float, float] = (0.1, 0.5)
    resize: Literal["shortest", "square", "none"] = (
        "shortest"  # the shortest side to image_sizes, or both sides, or as it is
    )
    image_sizes: tuple[Count, ...] = (640,)  # drawn from while learning; the last one is for evaluation
    longest_side: Count = 2150  # with "shortest": no side is longer
    multiple: Count = 32  # images are padded to a multiple of it
    normalise: Literal["imagenet", "pixels", "centred", "none"] = "imagenet"
    augment: Literal["none", "flip", "square_crop"] = "square_crop"
    train_square: bool = True  # to learn, both sides become a size of image_sizes, whatever `resize` says
    weights: str | None = None  # start from these weights of the whole detector
    backbone_weights: str | None = None  # or from a classifier's
    freeze: tuple[str, ...] = ()  # parameters whose names begin so do not learn
    freeze_norms: bool = False  # batch norms keep their statistics and do not learn
    steps: Count = 100_000
    batch_size: Count = 32
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 1e-3
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (0.76, 0.88)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    show_above: Fraction = 0.5  # pictures show faces with at least this score
    workers: Annotated[int, Field(ge=0)] = 0


# -- samples -----------------------------------------------------------------------------------------------------------


def flip(sample: dict) -> dict:
    """A mirrored sample; what was a left landmark is a right one then."""
    width = sample["image"].shape[2]
    boxes, points = sample["boxes"], sample["landmarks"][:, MIRRORED]
    points = torch.stack([width - points[..., 0], points[..., 1]], dim=-1)
    boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    return sample | {"image": sample["image"].flip(2), "boxes": boxes, "landmarks": points}


def square_crop(sample: dict, smallest: float = 0.3, tries: int = 250) -> dict:
    """A random square of 0.3 to 1 of the shorter side which has a whole face in it; faces with their centre outside are dropped.

    As RetinaFace crops (sec. 4.2), with the details of its public PyTorch code: a fifth of the squares have the full
    size; where no try holds a face, the image is padded to a square. Draws from torch's global generator.
    """
    image, boxes = sample["image"], sample["boxes"]
    height, width = image.shape[1:]
    whole = torch.rand(tries) < 0.2
    side = torch.where(whole, 1.0, smallest + (1 - smallest) * torch.rand(tries)) * min(height, width)
    side = side.floor().clamp(min=1)
    corner = (torch.rand(tries, 2) * (torch.tensor([width, height]) - side[:, None] + 1)).floor()
    squares = torch.cat([corner, corner + side[:, None]], dim=1)  # (T, 4)
    inside = (boxes[None, :, :2] >= squares[:, None, :2]) & (boxes[None, :, 2:] <= squares[:, None, 2:])
    good = inside.all(2).any(1)
    if not bool(good.any()):
        longest = max(height, width)
        grey = F.pad(image.float(), (0, longest - width, 0, longest - height), value=GREY)
        return sample | {"image": grey.to(image.dtype)}
    left, top, right, bottom = squares[int(good.float().argmax())].tolist()
    square = torch.tensor([left, top, right, bottom])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = ((centre > square[:2]) & (centre < square[2:])).all(1)
    shift = square[:2]
    boxes = (boxes[kept].maximum(shift.repeat(2)).minimum(square[2:].repeat(2))) - shift.repeat(2)
    return {
        "image": image[:, int(top) : int(bottom), int(left) : int(right)],
        "boxes": boxes,
        "landmarks": sample["landmarks"][kept] - shift,
        "has_landmarks": sample["has_landmarks"][kept],
    }


class Prepared(Dataset):
    """Face detection data as the network sees it: random transforms and a random size to learn from, or neither."""

    def __init__(self, data: Any, recipe: FaceDetectionRecipe, train: bool) -> None:
        self.data, self.config, self.facts, self.train = data, recipe.config, recipe.facts, train
        self.distort = v2.RandomPhotometricDistort()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        item = self.data[index]
        keys = ("boxes", "landmarks", "has_landmarks")
        if not self.train:
            truth = {key: item[key] for key in (*keys, "ignored", "subsets") if key in item}
            image = ready(item["image"], self.config, self.facts)
            return {"image": image, "truth": truth | {"size": torch.tensor(item["image"].shape[1:])}}
        sample = {"image": item["image"]} | {key: item[key][~item["ignored"]] for key in keys}
        if self.config.augment == "square_crop":
            sample = square_crop(sample)
            sample["image"] = self.distort(sample["image"])
        if self.config.augment != "none" and float(torch.rand(())) < 0.5:
            sample = flip(sample)
        size = self.config.image_sizes[int(torch.randint(len(self.config.image_sizes), ()))]
        image = ready(sample["image"], self.config, self.facts, size, self.config.train_square)
        factor = scale(sample["image"], image)
        boxes = sample["boxes"] * factor
        seen = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)  # less than a pixel is no face any more
        return {
            "image": image,
            "boxes": boxes[seen],
            "labels": torch.zeros(int(seen.sum()), dtype=torch.int64),
            "landmarks": (sample["landmarks"] * factor[:2])[seen],
            "has_landmarks": sample["has_landmarks"][seen],
        }


def ready(image: Tensor, config: Any, facts: dict, size: int | None = None, square: bool = False) -> Tensor:
    """A uint8 image (3, H, W), normalised and resized as the config says: float32 (3, h, w)."""
    if config.resize == "none" and not square:
        mean, deviation = (torch.tensor(facts[key])[:, None, None] for key in ("mean", "deviation"))
        return (image.float() / 255 - mean) / deviation
    return to_network(image, Square(config) if square else config, facts, size)


class Square:
    """A config that resizes to squares."""

    resize = "square"

    def __init__(self, config: Any) -> None:
        self.image_sizes, self.longest_side = config.image_sizes, config.longest_side


class FaceCollate(Collate):
    """Samples of `Prepared` to a batch, as the module's docstring says."""

    def __call__(self, samples: list[dict]) -> dict:
        batch = super().__call__(samples)
        if "truth" not in samples[0]:
            keys = ("boxes", "labels", "landmarks", "has_landmarks")
            batch["targets"] = [{key: sample[key] for key in keys} for sample in samples]
        return batch


# -- metrics -----------------------------------------------------------------------------------------------------------


def inclusive_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (N, 4) and (M, 4) whose last pixel counts, as WIDER FACE's evaluation has it: (N, M)."""
    one = torch.tensor([0.0, 0.0, 1.0, 1.0], device=a.device)
    return box_iou(a + one, b + one)


def judge(boxes: Tensor, faces: Tensor, counted: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """What the detections of an image are worth (WIDER FACE's evaluation).

    Each detection belongs to the face it overlaps most. On a face that does not count it is passed over; on one that
    counts, the best-scored one is right, further ones are wrong.

    Args:
        boxes: (N, 4), best first.
        faces: (M, 4); counted: bool (M,).

    Returns:
        two bool (N,): the detections that are held to be right or wrong, and the right ones.
    """
    if not len(boxes) or not len(faces):
        return torch.ones(len(boxes), dtype=torch.bool), torch.zeros(len(boxes), dtype=torch.bool)
    overlap, face = inclusive_iou(boxes, faces).max(1)
    hit = overlap >= threshold
    order = torch.arange(len(boxes))
    claims = torch.where(hit, order, len(boxes))
    first = torch.full((len(faces),), len(boxes)).scatter_reduce(0, face, claims, "amin")
    return ~(hit & ~counted[face]), hit & counted[face] & (first[face] == order)


def wider_ap(
    found: Sequence[dict],
    faces: Sequence[Tensor],
    counted: Sequence[Tensor],
    threshold: float = 0.5,
    official: bool = True,
) -> float:
    """Average precision as WIDER FACE's evaluation computes it.

    Scores are stretched to 0 … 1 over the whole set; precision and recall are taken at 1000 thresholds, and the area under
    the precision's envelope is summed over the changes of recall.

    Args:
        found: for each image "boxes" (N, 4) and "scores" (N,), best first.
        faces, counted: for each image (M, 4) and bool (M,): the faces, and those of the subset.
        threshold: IoU from which a detection is on a face.
        official: what is found in images without any face is passed over, as there; else it is wrong.

    Returns:
        0 … 1; 0 where no face counts.
    """
    total = int(sum(c.sum() for c in counted))
    scores = torch.cat([f["scores"].double() for f in found]) if found else torch.empty(0)
    if total == 0 or not len(scores):
        return 0.0
    low, high = scores.min(), scores.max()
    verdicts = [judge(f["boxes"], boxes, c, threshold) for f, boxes, c in zip(found, faces, counted, strict=True)]
    outside = [torch.full((len(f["scores"]),), official and not len(b)) for f, b in zip(found, faces, strict=True)]
    proposed = torch.cat([p for p, _ in verdicts]) & ~torch.cat(outside)
    right = torch.cat([r for _, r in verdicts])
    stretched = (scores - low) / (high - low) if high > low else torch.ones_like(scores)
    least = 1 - (torch.arange(THRESHOLDS, dtype=torch.float64) + 1) / THRESHOLDS
    order = stretched.argsort()
    passed = len(scores) - torch.searchsorted(stretched[order], least)  # how many have at least that score
    sums = [torch.cat([torch.zeros(1), x[order].flip(0).double().cumsum(0)])[passed] for x in (proposed, right)]
    precision, recall = sums[1] / sums[0].clamp(min=1), sums[1] / total
    recall = torch.cat([torch.zeros(1), recall, torch.ones(1)])
    precision = torch.cat([torch.zeros(1), precision, torch.zeros(1)])
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float(((recall[1:] - recall[:-1]) * envelope[1:]).sum())


def landmark_errors(found: dict, truth: dict, threshold: float = 0.5) -> Tensor:
    """How far the landmarks of the faces that were found are from the true ones: float64 (F, 2).

    A face is found by the best-scored detection that overlaps it by at least `threshold`. The mean distance of the five
    points is divided by the square root of the face's area (RetinaFace, sec. 4.4), and by the distance of its eyes (MTCNN,
    sec. III-B).
    """
    asked = truth["has_landmarks"] & ~truth["ignored"]
    faces, points = truth["boxes"][asked], truth["landmarks"][asked].double()
    if not len(faces) or not len(found["boxes"]) or "landmarks" not in found:
        return torch.empty(0, 2, dtype=torch.float64)
    hit = box_iou(faces, found["boxes"]) >= threshold  # (M, N), best first
    seen = hit.any(1)
    chosen = hit.float().argmax(1)[seen]
    distance = (found["landmarks"][chosen].double() - points[seen]).norm(dim=-1).mean(1)
    size = (faces[:, 2:] - faces[:, :2]).double().prod(1).sqrt()[seen]
    eyes = (points[seen, 0] - points[seen, 1]).norm(dim=-1).clamp(min=1)
    return torch.stack([distance / size, distance / eyes], dim=1)


def face_metrics(found: Sequence[dict], truth: Sequence[dict]) -> dict[str, float]:
    """The task's metrics over a set: what is found and what is there, an entry an image.

    AP: over all faces that are not ignored, images without faces included. AP_easy, AP_medium, AP_hard: WIDER FACE's, where
    the truth has subsets. NME and NME_eyes: the mean of `landmark_errors`; found: the share of the faces with landmarks
    that it is taken over.
    """
    faces, judged = [t["boxes"] for t in truth], [~t["ignored"] for t in truth]
    metrics = {"AP": wider_ap(found, faces, judged, official=False)}
    if truth and all("subsets" in t for t in truth):
        for k, subset in enumerate(SUBSETS):
            metrics[f"AP_{subset}"] = wider_ap(found, faces, [t["subsets"][:, k] for t in truth])
    marked = int(sum((t["has_landmarks"] & ~t["ignored"]).sum() for t in truth))
    errors = torch.cat([landmark_errors(f, t) for f, t in zip(found, truth, strict=True)])
    if len(errors):
        metrics["NME"], metrics["NME_eyes"] = errors.mean(0).tolist()
    if marked:
        metrics["found"] = len(errors) / marked
    return metrics


# -- the recipe --------------------------------------------------------------------------------------------------------


class FaceDetectionRecipe(DetectionRecipe):
    """The task's default recipe: detection's, with landmarks, WIDER FACE's evaluation and pictures with points."""

    config: Config
    reads_images = True
    monitor = ("AP", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        if facts is None:
            mean, deviation = NORMALISE[config.normalise]
            facts = {"labels": ["face"], "mean": mean, "deviation": deviation}
        super().__init__(config, runtime, facts)

    def open(self, split: str) -> Any:
        """The raw data of a split."""
        c = self.config
        if c.data != "drawn_faces":
            return open_face_detection(c.data, split)
        count = c.scenes if split == "train" else max(1, min(96, c.scenes))
        return open_face_detection(
            c.data, split, count=count, size=c.scene_size, max_faces=c.scene_faces, scale=c.scene_scale
        )

    @cached_property
    def train_data(self) -> Dataset:
        return Prepared(self.open("train"), self, train=True)

    @cached_property
    def test_data(self) -> Dataset:
        return Prepared(self.open("test"), self, train=False)

    @cached_property
    def batches(self):
        collate = FaceCollate(self.config.multiple)
        return self.runtime.batches(
            self.train_data, self.config.batch_size, workers=self.config.workers, collate=collate
        )

    def batch(self) -> dict:
        return self.batches.next()

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """`face_metrics` over the whole split."""
        data = self.test_data if split == "test" else Prepared(self.open(split), self, train=False)
        pairs: list[tuple[dict, dict]] = []
        # images of their own sizes would be padded to the largest of a batch
        batch_size = 1 if self.config.resize == "none" else min(self.config.batch_size, 32)
        for batch in self.runtime.loader(data, batch_size, self.config.workers, FaceCollate(self.config.multiple)):
            found = self.detect(batch["images"], batch["sizes"], [t["size"] for t in batch["truth"]])
            rows = zip(found, batch["truth"], strict=True)
            pairs += [({k: v.cpu().float() for k, v in f.items()}, {k: v.cpu() for k, v in t.items()}) for f, t in rows]
        if self.runtime.world > 1:
            parts: list[Any] = [None] * self.runtime.world
            dist.all_gather_object(parts, pairs)
            pairs = [pair for part in parts for pair in part]
        return face_metrics([found for found, _ in pairs], [truth for _, truth in pairs])

    def detect(self, images: Tensor, sizes: Tensor, originals: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """A batch of network inputs to boxes, scores and landmarks in pixels of the original images (height, width)."""
        model = self.deployed.eval()
        found = model.postprocess(model(images), sizes, tuple(images.shape[-2:]))
        for faces, size, original in zip(found, sizes, originals, strict=True):
            factor = (torch.as_tensor(original, device=sizes.device) / size).flip(0).to(faces["boxes"].dtype)
            faces["boxes"] = faces["boxes"] * factor.repeat(2)
            if "landmarks" in faces:
                faces["landmarks"] = faces["landmarks"] * factor
        return found

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Faces]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to the faces in them."""
        results: list[Faces] = []
        step = 1 if self.config.resize == "none" else 8
        for start in range(0, len(inputs), step):
            raw = [to_image(value) for value in inputs[start : start + step]]
            images = [ready(image, self.config, self.facts) for image in raw]
            sizes = torch.tensor([x.shape[1:] for x in images], device=self.runtime.device)
            batch = pad_images(images, self.config.multiple).to(self.runtime.device)
            results += [answer(f) for f in self.detect(batch, sizes, [torch.tensor(x.shape[1:]) for x in raw])]
        return results

    def browser(self) -> dict | None:
        """A page has no kind of output for landmarks."""
        return None

    def draw(self, value: Any, result: Faces) -> Image.Image:
        shown = result.above(self.config.show_above)
        return drawn_with_points(to_image(value), shown.boxes, shown.landmarks, [f"{s:.0%}" for s in shown.scores])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with what was found, and with what is there."""
        from paperzoo.engine.pictures import tile

        data = self.open("test")
        items = [data[i] for i in range(0, len(data), max(1, len(data) // 16))[:16]]
        results = self.predict([item["image"] for item in items])
        found = [self.draw(item["image"], result) for item, result in zip(items, results, strict=True)]
        there = []
        for item in items:
            points = [
                p.tolist() if has else [] for p, has in zip(item["landmarks"], item["has_landmarks"], strict=True)
            ]
            captions = ["ignored" if ignored else "" for ignored in item["ignored"]]
            there.append(drawn_with_points(item["image"], item["boxes"].tolist(), points, captions))
        return {"Found": tile(found, 4), "There": tile(there, 4)}


def answer(faces: dict[str, Tensor]) -> Faces:
    boxes = [tuple(round(x, 2) for x in box) for box in faces["boxes"].tolist()]
    points = faces["landmarks"].reshape(-1, POINTS, 2).tolist() if "landmarks" in faces else []
    return Faces(boxes, faces["scores"].tolist(), [[(round(x, 2), round(y, 2)) for x, y in face] for face in points])


def drawn_with_points(
    image: Tensor,
    boxes: Sequence[Sequence[float]],
    landmarks: Sequence[Sequence[Sequence[float]]],
    captions: Sequence[str],
    least: int = 256,
) -> Image.Image:
    """A uint8 image (3, H, W) with boxes and landmarks; small images are enlarged to `least` pixels."""
    factor = max(1, -(-least // max(image.shape[1:])))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for k in reversed(range(len(boxes))):  # the best on top
        x1, y1, x2, y2 = (factor * v for v in boxes[k])
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline="#3cf06a", width=2)
        if captions[k]:
            left, top, right, bottom = pen.textbbox((x1 + 2, max(0, y1 - 12)), captions[k])
            pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill="#176b30")
            pen.text((x1 + 2, max(0, y1 - 12)), captions[k], fill="white")
        for i, (x, y) in enumerate(landmarks[k] if landmarks else ()):
            colour = ("#ff4040", "#40a0ff", "#ffe040", "#ff40d0", "#40ffe0")[i]
            pen.ellipse((factor * x - 2, factor * y - 2, factor * x + 2, factor * y + 2), fill=colour)
    return picture
