"""Image retrieval: for a picture, the gallery's images that are like it, best first.

A batch is (images, targets): float32 (B, 3, H, W), normalised with the mean and deviation in `facts`; int64 (B,), the class, or
float32 (B, num_classes) of 0 and 1 where images have several labels. A network maps images to embeddings or codes (B, D),
any real numbers; what the distance is, and whether only signs count ("hamming", binary codes), says `Config.metric`.
Two images are relevant to each other if they share a label.

What is searched with may be embedded otherwise than what is searched: a method with two networks, or with a query of
more than an image, overrides `encode_query` and `encode_gallery`, which are the deployed network both. Queries whose input is
no plain image (an image and a sentence) are a task of their own, `tasks/composed_retrieval.py`.

The gallery is not part of the weights: it is embedded anew when it is first needed after training or loading, from
`Config.gallery` or the data's own database. A prediction is `Neighbours`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from paperzoo.blocks.search import Backend, Index, Metric, nearest
from paperzoo.data.images import to_image
from paperzoo.data.retrieval import UNKNOWN, RetrievalImages, open_retrieval
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError
from paperzoo.tasks import retrieval_metrics as measure
from paperzoo.tasks.classification import IMAGENET, ClassificationRecipe, Count, statistics
from paperzoo.tasks.classification import Config as ClassificationConfig
from paperzoo.tasks.retrieval_pictures import OPEN, RIGHT, WRONG, distance_plot, framed, in_a_row, precision_recall_plot
from paperzoo.tasks.training import make_optimizer

CUTS = (1, 5, 10, 50, 100)
CHUNK = 128  # queries that are ranked together


@dataclass(frozen=True)
class Neighbours:
    """The answer for one query, nearest first: one entry of each list a gallery image.

    items: its path, or its number. labels: the names of its labels, none where they are not known. distances: in the
    metric's unit, smaller is nearer (bits for "hamming"). indices: its row in the gallery.
    """

    items: list[str]
    labels: list[list[str]]
    distances: list[float]
    indices: list[int] = field(repr=False)


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """The default recipe: an embedding from which a linear layer tells the classes apart."""

    model: str = "resnet50"
    data: str = "digits"
    embedding_size: Count = 128
    metric: Metric = "cosine"
    search: Backend = "exact"  # or "faiss", where it is installed: what predictions search with
    gallery: str | None = None  # what is searched; None: the data's own database
    neighbours: Count = 10  # of a prediction
    map_at: Count | None = None  # the depth of mAP; None: the whole gallery
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)


class Numbered(Dataset):
    """A set with the number of each sample beside it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.data[i], i


@dataclass(eq=False)
class Gallery:
    """A set that is searched: `rows` (N,) are the numbers in `data` of the rows of `index`."""

    data: Any
    rows: Tensor
    index: Index
    key: tuple


class RetrievalRecipe(ClassificationRecipe):
    """The task's default recipe. A method overrides `build`, `step`, or what encodes."""

    config: Config
    monitor = ("mAP", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        Recipe.__init__(self, config, runtime, facts)  # not the classifier's: its optimizer would know no second head
        if not self.facts:
            train = self.open("train")
            mean, deviation = statistics(train) if config.normalise == "data" else IMAGENET
            several = train.targets.ndim == 2
            self.facts = {"labels": train.labels, "several": several, "mean": mean, "deviation": deviation}
        self.model = runtime.place(self.build())
        self.make_learner()
        self.average = running_average(self.model, config.ema_decay)
        self.known: dict[str, list[str]] = {}  # samples of ours: path -> labels, for pictures
        self._gallery: Gallery | None = None

    def build(self) -> nn.Module:
        """The network, (B, 3, H, W) -> (B, embedding_size): a classifier whose last layer is the embedding."""
        config = self.config
        arguments = {"drop_rate": config.drop_rate} if config.drop_rate else {}
        if config.weights is None:
            return create(config.model, num_classes=config.embedding_size, **arguments, **config.model_arguments)
        model = create(config.model, weights=config.weights, **arguments, **config.model_arguments)
        model.reset_classifier(config.embedding_size)
        model.paperzoo["arguments"]["num_classes"] = config.embedding_size
        return model

    def make_learner(self) -> None:
        """What training needs beside the network: here a linear layer over the embedding, and the optimizer of both."""
        self.head = self.runtime.place(nn.Linear(self.config.embedding_size, len(self.facts["labels"])))
        self.optimizer = make_optimizer(self.config, nn.ModuleList([self.model, self.head]))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> RetrievalImages:
        """The raw images of a role: "train", "database" or "query"; "test" are the queries."""
        return open_retrieval(self.config.data, "query" if split == "test" else split)

    @cached_property
    def train_data(self) -> RetrievalImages:
        data = self.open("train")
        if data.targets.ndim == 1 and bool((data.targets == UNKNOWN).any()):
            data = data.subset((data.targets != UNKNOWN).nonzero().flatten().tolist())
        if not len(data):
            raise DataError(self.config.data, "none of the training images has a class")
        return data.with_transform(v2.Compose(self.augmentation() + self.to_input()))

    @cached_property
    def test_data(self) -> RetrievalImages:
        return self.seen(self.open("query"))

    def seen(self, data: RetrievalImages) -> RetrievalImages:
        """Images as evaluation sees them."""
        return data.with_transform(v2.Compose(self.view(self.config.image_size) + self.to_input()))

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        """Cross-entropy over the classes; with several labels an image, binary cross-entropy of each, summed over classes."""
        images, targets = batch
        self.model.train()
        logits = self.head(self.model(images))
        if targets.ndim == 2:
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)
            return {"loss": loss}
        hits = (logits.detach().argmax(1) == targets).float().mean()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "train_accuracy": hits}

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode_query(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), as it is compared with the gallery."""
        return self.deployed(images)

    def encode_gallery(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.deployed(images)

    @torch.inference_mode()
    def encode(self, data: Any, encoder: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """A whole set, the same on every process: codes float32 (N, D) on the device, and int64 (N,) which samples they are.

        The two have fewer rows than the set where files are broken. `encoder` is called with what a sample holds beside its target.
        """
        self.deployed.eval()
        codes: list[Tensor] = []
        numbers: list[Tensor] = []
        loader = self.runtime.loader(Numbered(data), min(256, self.config.batch_size * 2), self.config.workers)
        for (*inputs, _), rows in loader:
            codes.append(encoder(*inputs).float())
            numbers.append(rows)
        if not numbers:
            raise DataError(self.config.data, "none of the images to be searched or to search with can be read")
        found, rows = torch.cat(codes), torch.cat(numbers)
        if self.runtime.world > 1:  # processes may have a row more or less
            share = -(-len(data) // self.runtime.world)
            short = share - len(rows)
            found = self.runtime.gather(F.pad(found, (0, 0, 0, short)))
            rows = self.runtime.gather(F.pad(rows, (0, short), value=-1))
            found, rows = found[rows >= 0], rows[rows >= 0]
        order = rows.argsort()
        return found[order].clone(), rows[order].cpu()

    def database(self) -> RetrievalImages:
        """What is searched."""
        gallery = self.config.gallery
        return self.open("database") if gallery is None else open_retrieval(gallery, "database")

    def gallery(self) -> Gallery:
        """The embedded gallery, made anew when the network has changed since."""
        key = tuple((id(t), t._version) for t in self.deployed.state_dict(keep_vars=True).values())
        if self._gallery is None or self._gallery.key != key:
            self._gallery = self.embedded(self.seen(self.database()), key)
        return self._gallery

    def embedded(self, data: RetrievalImages, key: tuple = ()) -> Gallery:
        """A set as a gallery."""
        codes, rows = self.encode(data, self.encode_gallery)
        return Gallery(data, rows, Index(codes, self.config.metric, self.config.search), key)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def rankings(self, split: str = "test"):
        """For chunks of queries: distances (q, N) to the gallery, and how many labels are shared (q, N), in the gallery's order.

        Raises:
            DataError: if queries and gallery have other classes than each other.
        """
        data, gallery = self.test_data if split == "test" else self.seen(self.open(split)), self.gallery()
        if data.labels != gallery.data.labels or data.targets.ndim != gallery.data.targets.ndim:
            raise DataError(
                self.config.gallery or self.config.data,
                f"the gallery's classes {gallery.data.labels[:5]} are not the queries' {data.labels[:5]}: nothing can be scored",
            )
        codes, rows = self.encode(data, self.encode_query)
        index = gallery.index
        queries = data.targets[rows].to(codes.device)
        searched = gallery.data.targets[gallery.rows].to(codes.device)
        # equal distances come in the gallery's order, which may be by class: shuffled, so that it tells nothing
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0)).to(codes.device)
        for start in range(0, len(codes), CHUNK):
            distances = index.distances(codes[start : start + CHUNK])
            yield distances[:, order], measure.shared_labels(queries[start : start + CHUNK], searched[order])

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """mAP to the depth `map_at`, R@k (is one of the first k relevant?), precision of the first 100; and where they apply,
        precision within Hamming radius 2 and NDCG of the first 100 (labels shared).

        mAP as in HashNet's released code: see `retrieval_metrics.average_precision`.
        """
        parts: dict[str, list[Tensor]] = {}
        for distances, shared in self.rankings(split):
            count = distances.shape[1]
            _, order = nearest(distances, count)
            ranked = shared.gather(1, order)
            relevant = ranked > 0
            values = {"mAP": measure.average_precision(relevant[:, : self.config.map_at or count])}
            values |= {f"recall_at_{k}": measure.hit_at(relevant, k) for k in CUTS[:3] if k <= count}
            values["precision_at_100"] = measure.precision_at(relevant, 100)
            if self.config.metric == "hamming":
                values["precision_radius_2"] = measure.precision_within(distances, shared > 0, 2)
            if self.facts["several"]:
                values["ndcg_at_100"] = measure.ndcg_at(ranked, 100)
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
        return {name: measure.mean(value) for name, value in parts.items()}

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Neighbours]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to the gallery images nearest to them."""
        gallery, transform = self.gallery(), v2.Compose(self.view(self.config.image_size) + self.to_input())
        self.deployed.eval()
        results: list[Neighbours] = []
        for start in range(0, len(inputs), 64):
            images = torch.stack([transform(to_image(value)) for value in inputs[start : start + 64]])
            results += self.answers(self.encode_query(images.to(self.runtime.device)).float(), gallery)
        return results

    def answers(self, codes: Tensor, gallery: Gallery, count: int | None = None) -> list[Neighbours]:
        """The neighbours of embedded queries (Q, D)."""
        distances, rows = gallery.index.search(codes, count or self.config.neighbours)
        results = []
        for near, found in zip(distances.tolist(), gallery.rows[rows.cpu()].tolist(), strict=True):
            items, labels = [gallery.data.path(i) for i in found], [gallery.data.names(i) for i in found]
            results.append(Neighbours(items, labels, [float(d) for d in near], found))
        return results

    def samples(self, folder: Path) -> list[str]:
        """Six held-out queries, written as PNG files."""
        raw, paths = self.test_data, []
        for i in range(0, len(raw), max(1, len(raw) // 6))[:6]:
            label = "".join(c if c.isalnum() else "_" for c in "_".join(raw.names(i)))[:40] or "unlabelled"
            paths.append(str(folder / f"{i:05d}_{label}.png"))
            Image.fromarray(raw.image(i).permute(1, 2, 0).contiguous().numpy()).save(paths[-1])
            self.known[paths[-1]] = raw.names(i)
        return paths

    def draw(self, value: Any, result: Neighbours) -> Image.Image:
        """The query, then what was found, framed in green or red where it is known whether they share a label."""
        truth = self.known.get(str(value), []) if isinstance(value, str | Path) else []
        return self.drawn(to_image(value), truth, result, 6)

    def drawn(self, image: Tensor, truth: list[str], result: Neighbours, count: int = 10) -> Image.Image:
        """`draw` for a raw image, with the names of its labels if they are known."""
        data, pictures = self.gallery().data, [framed(image, ", ".join(truth)[:11] or "query", "black")]
        for i, labels, distance in list(zip(result.indices, result.labels, result.distances, strict=True))[:count]:
            colour = OPEN if not truth or not labels else RIGHT if set(truth) & set(labels) else WRONG
            shown = f"{distance:.0f}" if self.config.metric == "hamming" else f"{distance:.2f}"
            pictures.append(framed(data.image(i), f"{', '.join(labels)[:8]}  d {shown}".strip(), colour))
        return in_a_row(pictures)

    def browser(self) -> dict | None:
        return None

    def figures(self) -> dict[str, Image.Image]:
        """Held-out queries with what was found; precision against recall; how far images with and without a common label are."""
        from paperzoo.engine.pictures import tile

        raw = self.test_data
        rows = list(range(0, len(raw), max(1, len(raw) // 10)))[:10]
        found = self.predict([raw.image(i) for i in rows])
        shown = [self.drawn(raw.image(i), raw.names(i), result) for i, result in zip(rows, found, strict=True)]
        pictures = {"Held-out queries, and what was found first": tile(shown, 1, gap=6)}
        relevant, near, far = [], [], []
        for distances, shared in self.rankings():
            relevant.append((shared.gather(1, nearest(distances, distances.shape[1])[1]) > 0).cpu())
            near.append(distances[shared > 0][:20_000].float().cpu())
            far.append(distances[shared == 0][:20_000].float().cpu())
        points = measure.precision_recall(torch.cat(relevant[: 2000 // CHUNK]))
        pictures["Precision against recall"] = precision_recall_plot(points)
        title = "Distances of pairs with and without a common label"
        pictures[title] = distance_plot(torch.cat(near), torch.cat(far), self.config.metric)
        return pictures
