"""Composed image retrieval: for a picture and a sentence that changes it, the gallery's pictures that come nearest to what is meant.

A batch is a dict:
    images   float32 (B, 3, S, S), normalised with the mean and deviation in `facts`: the pictures that are given
    tokens   int64 (B, T): the sentences' words, 0 for an unknown one and for padding; ids are places in `facts`, from 1
    lengths  int64 (B,): the sentences' lengths, 1 or more
    targets  float32 (B, 3, S, S): the pictures that are meant

A network is a module with
    model(images, tokens, lengths)   the query's features (B, D): what is exported
    model.embed_image(images)        a gallery picture's features (B, D)
    model.load_backbone(state_dict)  where it can start from a classifier's weights
and features are compared by their cosines. Its function takes `vocabulary_size`, `embed_dim` and what `model_arguments` says.

A prediction is `Neighbours`, as in image retrieval. What is asked is (image, sentence), or one string, "path :: sentence".
"""

from __future__ import annotations

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

from paperzoo.blocks.search import Backend, nearest
from paperzoo.data.composed_queries import ComposedQueries, open_composed, pad, to_ids
from paperzoo.data.images import to_image
from paperzoo.data.retrieval import RetrievalImages
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks import retrieval_metrics as measure
from paperzoo.tasks.classification import IMAGENET, Count, Fraction, Positive, statistics
from paperzoo.tasks.retrieval import CHUNK, CUTS, Neighbours, RetrievalRecipe
from paperzoo.tasks.retrieval_pictures import OPEN, RIGHT, WRONG, framed, in_a_row
from paperzoo.tasks.training import learning_rate_factor, make_optimizer

BETWEEN = " :: "


@dataclass(frozen=True)
class Config:
    """The default recipe: each query must be nearer to its own target than to the batch's other targets."""

    model: str = "tirg"
    data: str = "composed_shapes"
    gallery: str | None = None  # pictures to search in; None: the test split's own
    search: Backend = "exact"
    neighbours: Count = 10
    metric: Literal["cosine"] = "cosine"
    image_size: Count = 224
    crop: bool = True  # the central square of the resized picture; False: both sides resized
    normalise: Literal["data", "imagenet"] = "imagenet"
    embed_dim: Count = 512
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    weights: str | None = None  # of the whole network
    backbone_weights: str | None = None  # of a classifier, for the image encoder
    scale: Positive = 16.0  # of the cosines in the batch softmax
    steps: Count = 160_000
    batch_size: Annotated[int, Field(ge=2, multiple_of=2)] = 32  # queries
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "constant"
    milestones: tuple[Fraction, ...] = (0.5,)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    workers: Annotated[int, Field(ge=0)] = 0


class Prepared(Dataset):
    """Training items as the network sees them: a list of (image, ids, target image) each."""

    def __init__(self, data: ComposedQueries, transform: v2.Compose, known: dict[str, int]) -> None:
        self.data, self.transform, self.known = data, transform, known

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> list[tuple[Tensor, list[int], Tensor]]:
        return [(self.transform(a), to_ids(text, self.known), self.transform(b)) for a, text, b in self.data[i]]


class Queries(Dataset):
    """The queries of a split in order: (image, tokens (T,), length, number of the query)."""

    def __init__(self, data: ComposedQueries, transform: v2.Compose, known: dict[str, int]) -> None:
        self.data, self.transform = data, transform
        self.tokens, self.lengths = pad([to_ids(text, known) for text in data.texts])

    def __len__(self) -> int:
        return len(self.data.sources)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.transform(self.data.pool.image(self.data.sources[i])), self.tokens[i], self.lengths[i], i


def collate(items: list[list[tuple[Tensor, list[int], Tensor]]]) -> dict[str, Tensor]:
    """Training items to a batch, as the module's docstring says; the queries of an item stay together."""
    images, ids, targets = zip(*[query for item in items for query in item], strict=True)
    tokens, lengths = pad(ids)
    return {"images": torch.stack(images), "tokens": tokens, "lengths": lengths, "targets": torch.stack(targets)}


def batch_softmax(queries: Tensor, targets: Tensor, runtime: Runtime | None = None) -> Tensor:
    """Cross-entropy of each query over the batch's targets, its own being right: (B, D), (B, D), scaled already, -> a scalar.

    With several processes the targets of all count; the mean over processes is the loss of the whole batch.
    """
    offset = 0
    if runtime is not None and runtime.world > 1:
        offset, targets = runtime.rank * len(queries), runtime.gather(targets)
    return F.cross_entropy(queries @ targets.T, torch.arange(len(queries), device=queries.device) + offset)


class ComposedRecipe(RetrievalRecipe):
    """The task's default recipe. A method overrides `loss` or `make_learner`."""

    config: Config
    reads_images = False  # a query is a picture and a sentence
    monitor = ("recall_at_1", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        Recipe.__init__(self, config, runtime, facts)
        if not self.facts:
            train = self.queries("train")
            mean, deviation = statistics(train.pool) if config.normalise == "data" else IMAGENET
            self.facts = {"vocabulary": train.vocabulary(), "mean": mean, "deviation": deviation}
        self.ids = {word: i for i, word in enumerate(self.facts["vocabulary"], 1)}
        self.model = runtime.place(self.build())
        self.make_learner()
        self.average = running_average(self.model, config.ema_decay)
        self.known: dict[str, list[str]] = {}
        self._gallery = None

    def build(self) -> nn.Module:
        config = self.config
        arguments = {"vocabulary_size": len(self.ids) + 1, "embed_dim": config.embed_dim, **config.model_arguments}
        model = create(config.model, weights=config.weights, **arguments)
        if config.backbone_weights is not None:
            from paperzoo.engine.weights import read_state

            try:
                model.load_backbone(read_state(Path(config.backbone_weights).expanduser()))
            except (ValueError, RuntimeError) as error:
                raise PaperZooError(f"{config.backbone_weights}: {' '.join(str(error).split())[:200]}") from None
        return model

    def make_learner(self) -> None:
        self.optimizer = make_optimizer(self.config, self.model)
        factor = lambda step: learning_rate_factor(self.config, step)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    # -- data ----------------------------------------------------------------------------------------------------

    def queries(self, split: str) -> ComposedQueries:
        """The raw queries of a split."""
        return open_composed(self.config.data, split)

    def open(self, split: str) -> RetrievalImages:
        """The pool of pictures of a split; "database" is the test split's."""
        return self.queries("train" if split == "train" else "test").pool

    @property  # a transform is a module, and would be taken for something to checkpoint
    def transform(self) -> v2.Compose:
        size = self.config.image_size
        resize = (
            [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
            if self.config.crop
            else [v2.Resize((size, size), antialias=True)]
        )
        return v2.Compose(resize + self.to_input())

    def seen(self, data: RetrievalImages) -> RetrievalImages:
        return data.with_transform(self.transform)

    @cached_property
    def train_data(self) -> Prepared:
        data = self.queries("train")
        if self.config.batch_size % data.queries_an_item:
            raise DataError(self.config.data, "has two queries an item, so batch_size must be even")
        return Prepared(data, self.transform, self.ids)

    @cached_property
    def test_data(self) -> ComposedQueries:
        return self.queries("test")

    @cached_property
    def batches(self):
        items = self.config.batch_size // self.train_data.data.queries_an_item
        return self.runtime.batches(self.train_data, items, workers=self.config.workers, collate=collate)

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, queries: Tensor, targets: Tensor) -> Tensor:
        """Of features (B, D) of the queries and of their targets."""
        scale = self.config.scale**0.5
        return batch_softmax(scale * F.normalize(queries, dim=1), scale * F.normalize(targets, dim=1), self.runtime)

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        queries = self.model(batch["images"], batch["tokens"], batch["lengths"]).float()
        targets = self.model.embed_image(batch["targets"]).float()
        with torch.no_grad():
            cosines = F.normalize(queries, dim=1) @ F.normalize(targets, dim=1).T
            hits = (cosines.argmax(1) == torch.arange(len(cosines), device=cosines.device)).float().mean()
        return {"loss": self.loss(queries, targets), "train_accuracy": hits}

    # -- encoding and evaluation ---------------------------------------------------------------------------------

    def encode_query(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.deployed(images, tokens, lengths)

    def encode_gallery(self, images: Tensor) -> Tensor:
        return self.deployed.embed_image(images)

    def rankings(self, split: str = "test"):
        """For chunks of queries: the first 100 of the split's pool (q, K), without the query's own picture, and whether they are meant (q, K)."""
        data = self.test_data if split == "test" else self.queries(split)
        if not data.sources:
            raise DataError(self.config.data, f"the split '{split}' has no fixed queries to be scored with")
        pool = self.seen(data.pool)
        codes, rows = self.encode(Queries(data, self.transform, self.ids), self.encode_query)
        gallery = self.gallery() if split == "test" and self.config.gallery is None else self.embedded(pool)
        place = torch.full((len(pool),), -1)  # of a picture among those that were embedded
        place[gallery.rows] = torch.arange(len(gallery.rows))
        groups = pool.targets[gallery.rows]
        for start in range(0, len(codes), CHUNK):
            numbers = rows[start : start + CHUNK].tolist()
            distances = gallery.index.distances(codes[start : start + CHUNK]).cpu()
            own = place[[data.sources[i] for i in numbers]]
            distances[torch.arange(len(own))[own >= 0], own[own >= 0]] = float("inf")
            wanted = pool.targets[[data.targets[i] for i in numbers]]
            _, order = nearest(distances, max(CUTS))
            yield numbers, gallery.rows[order], groups[order] == wanted[:, None]

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """R@k: the part of the queries for which one of the first k pictures is meant. The query's own picture is left out."""
        found = torch.cat([right for *_, right in self.rankings(split)])
        return {f"recall_at_{k}": measure.mean([measure.hit_at(found, k)]) for k in CUTS}

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Neighbours]:
        """(image, sentence) pairs, {"image": …, "text": …}, or strings "path :: sentence", to the gallery pictures that are meant.

        A gallery picture with the query's own path is left out.
        """
        gallery, transform = self.gallery(), self.transform
        self.deployed.eval()
        results: list[Neighbours] = []
        for start in range(0, len(inputs), 64):
            pairs = [split_query(value) for value in inputs[start : start + 64]]
            images = torch.stack([transform(to_image(image)) for image, _ in pairs])
            tokens, lengths = pad([to_ids(text, self.ids) for _, text in pairs])
            device = self.runtime.device
            codes = self.encode_query(images.to(device), tokens.to(device), lengths.to(device)).float()
            for (image, _), found in zip(pairs, self.answers(codes, gallery, self.config.neighbours + 1), strict=True):
                own = str(image) if isinstance(image, str | Path) else None
                kept = [i for i, item in enumerate(found.items) if item != own][: self.config.neighbours]
                parts = (found.items, found.labels, found.distances, found.indices)
                results.append(Neighbours(*([part[i] for i in kept] for part in parts)))
        return results

    def samples(self, folder: Path) -> list[str]:
        """Six held-out queries; the pictures are written as PNG files."""
        data, made = self.test_data, []
        for i in range(0, len(data.sources), max(1, len(data.sources) // 6))[:6]:
            path = folder / f"{i:05d}.png"
            Image.fromarray(data.pool.image(data.sources[i]).permute(1, 2, 0).contiguous().numpy()).save(path)
            made.append(f"{path}{BETWEEN}{data.texts[i]}")
            meant = (data.pool.targets == data.pool.targets[data.targets[i]]).nonzero().flatten().tolist()
            self.known[made[-1]] = [data.pool.path(j) for j in meant]
        return made

    def draw(self, value: Any, result: Neighbours) -> Image.Image:
        """The picture and the sentence, then what was found, framed in green where it is known to be meant."""
        image, text = split_query(value)
        truth = self.known.get(value, []) if isinstance(value, str) else []
        data = self.gallery().data
        right = [item in truth if truth else None for item in result.items]
        return query_row(to_image(image), text, [data.image(i) for i in result.indices[:6]], right, result.distances)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out queries with what was found."""
        from paperzoo.engine.pictures import tile

        data, shown = self.test_data, []
        wanted = set(range(0, len(data.sources), max(1, len(data.sources) // 12)))
        for numbers, found, right in self.rankings():
            for number, items, hits in zip(numbers, found.tolist(), right.tolist(), strict=True):
                if number in wanted and len(shown) < 12:
                    source = data.pool.image(data.sources[number])
                    shown.append(query_row(source, data.texts[number], [data.pool.image(i) for i in items[:8]], hits))
        return {"Held-out queries, and what was found first": tile(shown, 2, gap=10)}

    def example(self) -> tuple[Tensor, Tensor, Tensor]:
        size, generator = self.config.image_size, torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, size, size, generator=generator)
        tokens = torch.randint(1, len(self.ids) + 1, (2, 8), generator=generator)
        return images, tokens, torch.tensor([8, 5])


def split_query(value: Any) -> tuple[Any, str]:
    """What a user asked with, as (image, sentence).

    Raises:
        PaperZooError: if it is neither of the forms that `ComposedRecipe.predict` takes.
    """
    if isinstance(value, dict) and {"image", "text"} <= value.keys():
        return value["image"], str(value["text"])
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], str(value[1])
    if isinstance(value, str) and BETWEEN.strip() in value:
        path, _, text = value.partition(BETWEEN.strip())
        return path.strip(), text.strip()
    raise PaperZooError(
        f"a query is (image, sentence) or 'picture.png{BETWEEN}what to change', not {str(value)[:80]!r}"
    )


def query_row(
    image: Tensor, text: str, found: list[Tensor], right: list[bool | None], distances: list[float] | None = None
) -> Image.Image:
    """A picture, what was found, and the sentence above."""
    pictures = [framed(image, "query", "black")]
    for i, (picture, good) in enumerate(zip(found, right, strict=False)):
        caption = f"{i + 1}" if distances is None else f"{distances[i]:.2f}"
        pictures.append(framed(picture, caption, OPEN if good is None else RIGHT if good else WRONG))
    row = in_a_row(pictures)
    sheet = Image.new("RGB", (row.width, row.height + 14), "white")
    sheet.paste(row, (0, 14))
    ImageDraw.Draw(sheet).text((2, 1), text[:90], fill="black")
    return sheet
