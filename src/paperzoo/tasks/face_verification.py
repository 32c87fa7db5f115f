"""Face verification and recognition: are two pictures of one person, and whose is this face?

A batch is (images, labels): float32 (B, 3, H, W), RGB in [-1, 1], which is (x - 127.5) / 127.5 of the pixels; int64 (B,),
the identity, 0 … identities - 1. Pictures are aligned crops, the five landmarks on the template of
`blocks.face_alignment`.

A network maps images to embeddings (B, D) of any length; only their directions are compared. Its function takes
`num_features` (D), `image_size` and `drop_rate`, and, if it has a backbone, `backbone` and `backbone_weights`; the network
has `num_features`. What it learns by is apart: a head,
`head(embeddings, labels)` -> the mean loss, with parameters of its own where it has class centres. The head is part of the
recipe and is not deployed; a paper with another loss, proxies, triplets or a norm that means quality overrides `make_head`.
The identities that are tested are others than those that were learned, so nothing of the head is needed then.

A prediction is, for one picture, a `FaceEmbedding` (the embedding, and the most similar faces of a gallery); for two, given
as a tuple or as "a.png|b.png", a `Verification`. A picture is what `paperzoo.data.images.to_image` takes, an aligned crop,
or {"image": …, "landmarks": (5, 2)} to have it aligned here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from paperzoo.blocks import verification as measure
from paperzoo.blocks.face_alignment import align_face
from paperzoo.blocks.precision import full_precision
from paperzoo.data.face_identities import FaceSet, open_faces, open_gallery
from paperzoo.data.images import Images, to_image
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.classification import Count, Fraction, Positive
from paperzoo.tasks.training import learning_rate_factor, parameter_groups

NEAREST = 5  # faces of the gallery that a prediction names
GALLERY = 200  # faces that the gallery of a benchmark has at most


@dataclass(frozen=True)
class Neighbour:
    """A face of the gallery: whose, its cosine similarity in [-1, 1], its file or number."""

    identity: str
    similarity: float
    picture: str
    row: int


@dataclass(frozen=True)
class FaceEmbedding:
    """The answer for one picture.

    `identity` is that of the most similar face of the gallery, if their similarity reaches `threshold`, else None: a
    stranger. `nearest` are the most similar faces of different identities, best first; `embedding` has length 1.
    """

    identity: str | None
    threshold: float
    nearest: list[Neighbour]
    embedding: list[float]


@dataclass(frozen=True)
class Verification:
    """The answer for two pictures: one person or two, by whether the cosine similarity reaches the threshold."""

    same: bool
    similarity: float
    threshold: float


@dataclass(frozen=True)
class Config:
    """The default recipe: softmax over the cosines with class centres, scaled (NormFace, Wang et al. 2017), by SGD."""

    model: str = "iresnet50"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)  # what else its function takes
    embedding_size: Count = 512  # D
    data: str = "drawn_identities"  # the identities to learn
    benchmark: str | None = None  # the pairs to tell apart; None: the held-out identities of `data`
    gallery: str | None = None  # faces to look among when predicting; None: one of each identity of the benchmark
    image_size: Count = 112  # pixels; crops are resized to this square
    augment: Literal["none", "flip", "flip_shift"] = "flip"
    flip_test: bool = True  # embeddings of a picture and its mirror image are added, as the field does
    scale: Positive = 64.0  # s, of the cosines
    weights: str | None = None  # start from these weights of the network
    drop_rate: Fraction = 0.0
    steps: Count = 180_000
    batch_size: Count = 512
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (10 / 18, 16 / 18)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    workers: Annotated[int, Field(ge=0)] = 0


class NormalisedSoftmax(nn.Module):
    """Cross-entropy over s cos(theta_j), theta_j the angle to the j-th class centre: (B, D), int64 (B,) -> the mean loss.

    Computed in float32, autocast or not: at s = 64 half precision has steps of 0.03.

    Args:
        num_classes: identities; their centres are the rows of `weight` (num_classes, num_features).
        num_features: D.
        scale: s.
    """

    def __init__(self, num_classes: int, num_features: int, scale: float = 64.0) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.scale = num_classes, num_features, scale
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        nn.init.normal_(self.weight, 0.0, 0.01)

    def cosines(self, embeddings: Tensor) -> Tensor:
        """(B, num_classes), float32."""
        with full_precision(embeddings):
            return F.normalize(embeddings.to(self.weight.dtype)) @ F.normalize(self.weight).T

    def logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, num_classes), scaled."""
        return self.scale * self.cosines(embeddings)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(embeddings, labels), labels)


class Numbered(Dataset):
    """Some of a set's pictures, transformed, each with its place in the list of rows."""

    def __init__(self, images: Images, rows: Sequence[int]) -> None:
        self.images, self.rows = images, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.images[self.rows[place]][0], place


@dataclass(frozen=True)
class Gallery:
    """Known faces: pictures, whose they are, and embeddings (N, D) of length 1."""

    images: Images
    rows: list[int]
    embeddings: Tensor


class FaceRecipe(Recipe):
    """The task's default recipe. Another loss overrides `make_head`; one that needs more of a batch, `step`."""

    config: Config
    reads_images = True
    monitor = ("accuracy", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        fresh = not self.facts
        if fresh:
            self.facts = {"identities": len(self.train_set.images.labels), "threshold": None}
        self.model = runtime.place(self.build(fresh))
        self.head = runtime.place(self.make_head(self.facts["identities"], self.model.num_features))
        self.optimizer = self.make_optimizer(self.learners())
        factor = lambda step: learning_rate_factor(config, step)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = running_average(self.model, config.ema_decay)

    def build(self, fresh: bool = True) -> nn.Module:
        """The network that embeds. Only a fresh one starts from its backbone's weights; a finished run has its own."""
        config = self.config
        arguments: dict[str, Any] = {"num_features": config.embedding_size, "image_size": config.image_size}
        if config.drop_rate:
            arguments["drop_rate"] = config.drop_rate
        arguments |= {k: v for k, v in config.model_arguments.items() if fresh or k != "backbone_weights"}
        return create(config.model, weights=config.weights, **arguments)

    def make_head(self, identities: int, num_features: int) -> nn.Module:
        """What is learned by: a module of (embeddings, labels) -> loss."""
        return NormalisedSoftmax(identities, num_features, self.config.scale)

    def learners(self) -> nn.Module:
        """The modules whose parameters `optimizer` updates."""
        return nn.ModuleList([self.model, self.head])

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        groups = parameter_groups(module, c.weight_decay, c.decay_all)
        if c.optimizer == "sgd":
            return torch.optim.SGD(groups, c.learning_rate, momentum=c.momentum, nesterov=c.nesterov and c.momentum > 0)
        kind = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, c.learning_rate)

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> FaceSet:
        """The faces of a split: "train" of `data`, all others of `benchmark`."""
        return open_faces(self.config.data if split == "train" else self.config.benchmark or self.config.data, split)

    def to_input(self) -> list[nn.Module]:
        """What makes the network's input of a uint8 picture."""
        size = self.config.image_size
        tidy = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
        return [v2.Resize((size, size), antialias=True), *tidy]

    def augmentation(self) -> list[nn.Module]:
        """The random transforms of training pictures, before `to_input`."""
        flip, size = v2.RandomHorizontalFlip(), self.config.image_size
        shift = [v2.Resize((size, size), antialias=True), v2.RandomCrop(size, padding=size // 16, padding_mode="edge")]
        return {"none": [], "flip": [flip], "flip_shift": [*shift, flip]}[self.config.augment]

    @cached_property
    def train_set(self) -> FaceSet:
        return self.open("train")

    @cached_property
    def train_data(self) -> Images:
        return self.train_set.images.with_transform(v2.Compose(self.augmentation() + self.to_input()))

    @cached_property
    def test_data(self) -> FaceSet:
        return self.open("test")

    @cached_property
    def batches(self):
        return self.runtime.batches(self.train_data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, labels = batch
        self.model.train()
        return {"loss": self.head(self.model(images), labels)}

    def embed(self, images: Tensor) -> Tensor:
        """Network inputs (B, 3, H, W) -> embeddings (B, D) of length 1, float32; with `flip_test`, of both mirror images."""
        model = self.deployed.eval()
        embeddings = model(images).float()
        if self.config.flip_test:
            embeddings = embeddings + model(images.flip(3)).float()
        return F.normalize(embeddings)

    def embed_rows(self, images: Images, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Some of a set's raw pictures: embeddings (N, D), and bool (N,), False for those whose file is broken. On all processes alike."""
        data = Numbered(images.with_transform(v2.Compose(self.to_input())), rows)
        device = self.runtime.device
        table = torch.zeros(len(data), self.model.num_features + 1, device=device)
        for batch, places in self.runtime.loader(data, min(256, self.config.batch_size * 2), self.config.workers):
            table[places.to(device)] = F.pad(self.embed(batch), (0, 1), value=1.0)
        table = (self.runtime.mean(table) * self.runtime.world).cpu()
        return table[:, :-1], table[:, -1] > 0.5

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Verification by LFW's protocol, over ten folds: accuracy and its deviation; of all pairs: area under the ROC curve,
        equal error rate, true accepts at the rates of false accepts that the number of pairs resolves. Identification:
        rank1 with one picture of each identity (and the distractors) as the gallery, and rank1_distractors as MegaFace has it.

        The mean of the folds' thresholds becomes the one that predictions use.
        """
        scores, same, folds, metrics = self.similarities(split)
        accuracies, thresholds = measure.ten_folds(scores, same, folds)
        if split == "test":
            self.facts["threshold"] = round(float(thresholds.mean()), 6)
        far, tar, _ = measure.accept_rates(scores, same)
        rates = measure.true_accepts(scores, same)
        return (
            {
                "accuracy": float(accuracies.mean()),
                "accuracy_deviation": float(accuracies.std(correction=0)),
                "auc": float(torch.trapezoid(tar, far)),
                "equal_error_rate": measure.equal_error_rate(scores, same),
            }
            | {f"tar_at_far_{rate:.0e}".replace("e-0", "e-"): accepted for rate, (accepted, _) in rates.items()}
            | metrics
        )

    @torch.inference_mode()
    def similarities(self, split: str = "test") -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
        """The pairs of a split: cosine similarities (N,), bool same (N,), int64 folds (N,); and the metrics of identification.

        Pairs with a broken picture are left out.
        """
        data = self.test_data if split == "test" else self.open(split)
        if data.pairs is None:
            raise PaperZooError(f"the split '{split}' has no pairs; evaluate on test")
        pairs, rows = data.pairs, sorted({*data.pairs.first, *data.pairs.second})
        place = {row: i for i, row in enumerate(rows)}
        embeddings, there = self.embed_rows(data.images, rows)
        first, second = (torch.tensor([place[row] for row in side]) for side in (pairs.first, pairs.second))
        scores = (embeddings[first] * embeddings[second]).sum(1)
        whole = there[first] & there[second]
        same, folds = torch.tensor(pairs.same), torch.tensor(pairs.folds)
        labels = torch.tensor([data.images.targets[row] for row in rows])[there]
        metrics = self.identification(embeddings[there], labels, data.distractors)
        return scores[whole], same[whole], folds[whole], metrics

    def identification(self, embeddings: Tensor, labels: Tensor, distractors: Images | None) -> dict[str, float]:
        first = torch.ones(
            len(labels), dtype=torch.bool
        )  # the first picture of each identity is its entry in the gallery
        order = labels.argsort(stable=True)
        first[order[1:]] = labels[order[1:]] != labels[order[:-1]]
        gallery, owners = embeddings[first], labels[first]
        metrics = {}
        if distractors is not None:
            others, there = self.embed_rows(distractors, range(len(distractors)))
            metrics["rank1_distractors"] = measure.rank1_among_distractors(embeddings, labels, others[there])
            gallery = torch.cat([gallery, others[there]])
            owners = torch.cat([owners, owners.new_full((int(there.sum()),), -1)])
        if bool((~first).any()):
            metrics["rank1"] = measure.rank1_in_gallery(embeddings[~first], labels[~first], gallery, owners)
        return metrics

    # -- use -----------------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """The similarity from which two faces are one person's."""
        if self.facts.get("threshold") is None:
            self.evaluate("test")
        return self.facts["threshold"]

    def gallery(self) -> Gallery | None:
        """The faces that predictions are compared with; None where the benchmark's pictures are not at hand.

        Raises:
            DataError: if `gallery` names a place that cannot be read.
        """
        kept = self.__dict__.get("_gallery")
        if kept is None or kept[0] != self.runtime.step:
            if self.config.gallery is not None:
                images = open_gallery(self.config.gallery)
                rows = list(range(len(images)))
            else:
                try:
                    images = self.test_data.images
                except DataError:
                    return None
                first: dict[int, int] = {}
                for row, target in enumerate(images.targets):
                    first.setdefault(target, row)
                rows = list(first.values())[:GALLERY]
            embeddings, there = self.embed_rows(images, rows)
            rows = [row for row, good in zip(rows, there.tolist(), strict=True) if good]
            kept = (self.runtime.step, Gallery(images, rows, embeddings[there]))
            self._gallery = kept
        return kept[1]

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[FaceEmbedding | Verification]:
        """Pictures to their embeddings and nearest faces, pairs to same or different; see the module's docstring."""
        parts = [parts_of(value) for value in inputs]
        pictures = [picture for group in parts for picture in group]
        transform, rows = v2.Compose(self.to_input()), []
        for start in range(0, len(pictures), 64):
            images = torch.stack([transform(to_face(picture)) for picture in pictures[start : start + 64]])
            rows.append(self.embed(images.to(self.runtime.device)).cpu())
        embeddings = iter(torch.cat(rows)) if rows else iter(())
        results: list[FaceEmbedding | Verification] = []
        for group in parts:
            if len(group) == 2:
                similarity = float(next(embeddings) @ next(embeddings))
                results.append(Verification(similarity >= self.threshold, similarity, self.threshold))
            else:
                results.append(self.recognised(next(embeddings)))
        return results

    def recognised(self, embedding: Tensor) -> FaceEmbedding:
        gallery, nearest, seen = self.gallery(), [], set()
        if gallery is not None:
            similar = gallery.embeddings @ embedding
            for place in similar.argsort(descending=True).tolist():
                row = gallery.rows[place]
                identity = gallery.images.labels[gallery.images.targets[row]]
                if identity not in seen and len(nearest) < NEAREST:
                    seen.add(identity)
                    nearest.append(Neighbour(identity, float(similar[place]), gallery.images.path(row), row))
        known = nearest and nearest[0].similarity >= self.threshold
        return FaceEmbedding(nearest[0].identity if known else None, self.threshold, nearest, embedding.tolist())

    def samples(self, folder: Path) -> list[str]:
        """Six held-out pictures that are not in the gallery, and two pairs, "a.png|b.png", of one person and of two."""
        data, seen, rows = self.test_data, set(), []
        for row, target in enumerate(data.images.targets):
            if target in seen:
                rows.append(row)
            seen.add(target)
        rows = rows[:: max(1, len(rows) // 6)][:6]
        paths = []
        for row in rows:
            paths.append(self.write(row, folder))
        for kind in (True, False):
            k = data.pairs.same.index(kind)
            paths.append("|".join(self.write(row, folder) for row in (data.pairs.first[k], data.pairs.second[k])))
        return paths

    def write(self, row: int, folder: Path) -> str:
        image, target = self.test_data.images[row]
        name = "".join(c if c.isalnum() else "_" for c in self.test_data.images.labels[target])
        path = folder / f"{name}_{row:05d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        return str(path)

    def example(self) -> tuple[Tensor]:
        size = self.config.image_size
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: FaceEmbedding | Verification) -> Image.Image:
        """A pair side by side, or a picture followed by the faces of the gallery that are most similar; green from the threshold on."""
        from paperzoo.engine.pictures import tile

        pictures = [to_face(part) for part in parts_of(value)]
        if isinstance(result, Verification):
            words = "one person" if result.same else "two people"
            captions = (f"{words} {result.similarity:.2f}", f"threshold {result.threshold:.2f}")
            return tile([framed(p, c, result.same) for p, c in zip(pictures, captions, strict=True)], 2)
        shown = [framed(pictures[0], result.identity or "nobody known", None)]
        gallery = self.gallery() if result.nearest else None
        for near in result.nearest:
            reached = near.similarity >= result.threshold
            shown.append(framed(gallery.images[near.row][0], f"{near.identity} {near.similarity:.2f}", reached))
        return tile(shown, 1 + NEAREST)

    def figures(self) -> dict[str, Image.Image]:
        """How similar pairs of one person and of two are; the ROC curve; the pairs that were hardest."""
        from paperzoo.engine.pictures import new_figure, tile, to_picture

        scores, same, _, _ = self.similarities("test")
        figure, axes = new_figure(5.4, 3.2)
        for kind, name, colour in ((True, "one person", "#2a7f3f"), (False, "two people", "#c2410c")):
            axes.hist(scores[same == kind].numpy(), bins=60, range=(-1, 1), alpha=0.6, label=name, color=colour)
        axes.axvline(self.threshold, color="black", linewidth=1, label="threshold")
        axes.set(xlabel="cosine similarity", ylabel="pairs")
        axes.legend(fontsize=8)
        pictures = {"Similarities of pairs": to_picture(figure)}
        figure, axes = new_figure(4.2, 3.2)
        far, tar, _ = measure.accept_rates(scores, same)
        axes.plot(far.clamp(min=0.3 / int((~same).sum())), tar, drawstyle="steps-post", linewidth=1.4)
        axes.set(xscale="log", xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.02))
        pictures["True accepts at false accepts"] = to_picture(figure)
        pairs, shown = self.test_data.pairs, []
        if len(scores) == len(pairs):  # no picture was broken
            for kind in (True, False):
                mine = (same == kind).nonzero().flatten()
                for k in mine[scores[mine].argsort(descending=not kind)][:6].tolist():
                    words = f"{'one' if kind else 'two'}, {float(scores[k]):.2f}"
                    right = (float(scores[k]) >= self.threshold) == kind
                    couple = [self.test_data.images[row][0] for row in (pairs.first[k], pairs.second[k])]
                    shown.append(tile([framed(image, words, right) for image in couple], 2, 0))
            pictures["The hardest pairs of one person, and of two"] = tile(shown, 3, 10)
        return pictures


def parts_of(value: Any) -> list:
    """The picture or the two pictures of an input."""
    if isinstance(value, str) and "|" in value and not Path(value).exists():
        parts = [part.strip() for part in value.split("|")]
        if len(parts) != 2 or not all(parts):
            raise PaperZooError(f"'{value}': a pair is two paths with one | between them")
        return parts
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise PaperZooError(f"a pair of pictures has two, not {len(value)}")
        return list(value)
    return [value]


def to_face(value: Any) -> Tensor:
    """A picture as uint8 (3, H, W); aligned where landmarks come with it.

    Raises:
        PaperZooError: if it is no picture, or the landmarks are not five points.
    """
    if not isinstance(value, dict):
        return to_image(value)
    if value.keys() != {"image", "landmarks"}:
        raise PaperZooError(f"a face with landmarks has the keys image and landmarks, not {', '.join(map(str, value))}")
    try:
        return align_face(to_image(value["image"]), torch.as_tensor(value["landmarks"], dtype=torch.float32))
    except (ValueError, TypeError) as error:
        raise PaperZooError(f"landmarks: {error}") from None


def framed(image: Tensor, caption: str, good: bool | None, size: int = 96) -> Image.Image:
    """A uint8 picture (3, H, W) in a frame, green, red or grey, with a line of text below."""
    colour = {True: "#2a7f3f", False: "#c2410c", None: "#8a93a3"}[good]
    picture = Image.new("RGB", (size + 6, size + 21), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, size + 5, size + 5), fill=colour)
    face = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
    picture.paste(face, (3, 3))
    pen.text((2, size + 8), caption, fill="black")
    return picture
