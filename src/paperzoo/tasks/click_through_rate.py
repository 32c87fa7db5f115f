"""Click-through rate: how probable is a click, from the columns of one row of a log?

A batch is (dense, sparse, labels): float32 (B, D), transformed by the encoding in `facts`; int64 (B, F), ids
0 … field_sizes[f] - 1, of which 0 is a rare or unknown value and 1 a missing one; float32 (B,), 0 or 1. A network takes
`num_dense` and `field_sizes` and maps (dense, sparse) to logits (B,). A prediction is a `Click`: a probability in [0, 1].
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from paperzoo.data.encoding import Encoding
from paperzoo.data.tables import Table, mapping_rows, open_table, read_rows
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Click:
    """The answer for one row."""

    probability: float


@dataclass(frozen=True)
class Clicks:
    """The answer for a file: the probability of a click for each of its rows, and their mean."""

    rows: int
    mean_probability: float
    probabilities: list[float]


@dataclass(frozen=True)
class Config:
    """The default recipe: Adam on the cross-entropy, one pass over the log."""

    model: str = "mlp"  # a model's name, or one of the plain ones here: mlp, logistic_regression
    data: str = "clicks"
    label: str = "label"  # see `paperzoo.data.tables.Layout` for these
    dense: tuple[str, ...] | None = None
    sparse: tuple[str, ...] | None = None
    transform: Literal["log", "standard", "none"] = "log"
    min_count: Count = 1
    max_values: Count = 100_000
    hold_out: Literal["random", "last"] = "random"
    hold_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    embed_dim: Count = 8
    hidden: tuple[Count, ...] = (64, 64)
    drop_rate: Fraction = 0.0
    weights: str | None = None
    steps: Count = 600
    batch_size: Count = 512
    learning_rate: Positive = 0.01
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: NotNegative = 0.0  # an L2 penalty, as in Adam
    clip: Positive | None = None
    ema_decay: Fraction | None = None


class Linear(nn.Module):
    """Logistic regression: one weight for every value of every column. (B, D), (B, F) -> logits (B,)."""

    def __init__(self, num_dense: int, field_sizes: Sequence[int]) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(field_sizes), 1)
        nn.init.zeros_(self.table.weight)
        self.dense = nn.Linear(num_dense, 1)
        self.register_buffer("offsets", offsets(field_sizes), persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        return self.table(sparse + self.offsets).sum((1, 2)) + self.dense(dense).squeeze(1)


class Perceptron(nn.Module):
    """Embeddings and dense values, concatenated, through an MLP. (B, D), (B, F) -> logits (B,)."""

    def __init__(
        self, num_dense: int, field_sizes: Sequence[int], embed_dim: int, hidden: Sequence[int], drop_rate: float
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(field_sizes), embed_dim)
        nn.init.normal_(self.table.weight, std=embed_dim**-0.5)
        self.register_buffer("offsets", offsets(field_sizes), persistent=False)
        layers: list[nn.Module] = []
        width = num_dense + len(field_sizes) * embed_dim
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(drop_rate)]
            nn.init.kaiming_normal_(layers[-3].weight)
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        return self.layers(torch.cat([self.table(sparse + self.offsets).flatten(1), dense], 1)).squeeze(1)


def offsets(field_sizes: Sequence[int]) -> Tensor:
    """Where each column's rows begin in a table that holds those of all columns."""
    return torch.tensor([0, *field_sizes], dtype=torch.int64).cumsum(0)[:-1]


class CTRRecipe(Recipe):
    """The task's default recipe."""

    config: Config
    monitor = ("auc", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            train = self.open("train")
            self.facts = {"encoding": train.encoding.to_facts()}
        self.encoding = Encoding.from_facts(self.facts["encoding"])
        self.model = runtime.place(self.build())
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)
        self.average = running_average(self.model, config.ema_decay)

    def factor(self, step: int) -> float:
        """The learning rate of a step, as a factor of the config's."""
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.config.steps)))

    def build(self) -> nn.Module:
        """The network for the table's columns."""
        sizes = {"num_dense": len(self.encoding.dense), "field_sizes": self.encoding.field_sizes}
        config = self.config
        if config.model == "logistic_regression":
            return Linear(**sizes)
        if config.model == "mlp":
            return Perceptron(**sizes, embed_dim=config.embed_dim, hidden=config.hidden, drop_rate=config.drop_rate)
        return create(config.model, weights=config.weights, **sizes, **self.model_arguments())

    def model_arguments(self) -> dict[str, Any]:
        """What the config says to the model's function, besides the table's sizes."""
        config = self.config
        return {"embed_dim": config.embed_dim, "hidden": config.hidden, "drop_rate": config.drop_rate}

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> Table:
        c = self.config
        return open_table(
            c.data,
            split,
            label=c.label,
            dense=c.dense,
            sparse=c.sparse,
            transform=c.transform,
            min_count=c.min_count,
            max_values=c.max_values,
            hold_out=c.hold_out,
            hold_out_share=c.hold_out_share,
        )

    @cached_property
    def train_data(self) -> Table:
        return self.open("train")

    @cached_property
    def test_data(self) -> Table:
        return self.open("test")

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.runtime.indices(len(self.train_data), self.config.batch_size)
        return self.runtime.to_device(self.train_data.rows(rows))

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict:
        dense, sparse, labels = batch
        self.model.train()
        return {"loss": F.binary_cross_entropy_with_logits(self.model(dense, sparse), labels)}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """AUC and log loss over the whole split; where the log was generated, also the best AUC that is possible."""
        data = self.test_data if split == "test" else self.open(split)
        if not len(data):
            raise PaperZooError(f"data '{self.config.data}': no rows for the split '{split}'")
        auc = BinaryAUROC().to(self.runtime.device)
        loss = torch.zeros(2, dtype=torch.float64)
        for logits, labels in self.scores(data):
            auc.update(logits.sigmoid(), labels.long())
            total = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum")
            loss += torch.tensor([float(total), len(labels)], dtype=torch.float64)
        total, count = self.runtime.mean(loss).tolist()
        metrics = {"auc": float(auc.compute()), "log_loss": total / count}
        if data.probability is not None:
            truth = torch.from_numpy(data.probability), torch.from_numpy(data.records["label"].astype("int64"))
            best = BinaryAUROC()
            best.update(*truth)
            metrics["best_possible_auc"] = float(best.compute())
        return metrics

    def scores(self, data: Table, block: int = 4096):
        """This rank's (logits, labels) of a split, block by block."""
        model = self.deployed.eval()
        for start in range(self.runtime.rank * block, len(data), self.runtime.world * block):
            dense, sparse, labels = self.runtime.to_device(data.rows(slice(start, start + block)))
            yield model(dense, sparse).float(), labels

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Click | Clicks]:
        """Rows as dicts {column: value} to `Click`s; paths of tables to `Clicks`. Values never seen count as unknown.

        Raises:
            DataError: for a table that cannot be read. PaperZooError: for a row that does not fit the table's columns.
        """
        model, device = self.deployed.eval(), self.runtime.device
        results: list[Click | Clicks] = []
        for value in inputs:
            if isinstance(value, str | Path):
                blocks = [model(d.to(device), s.to(device)).sigmoid() for d, s in read_rows(value, self.encoding)]
                odds = torch.cat(blocks).tolist() if blocks else []
                results.append(Clicks(len(odds), sum(odds) / max(1, len(odds)), odds))
            elif isinstance(value, Mapping):
                dense, sparse = mapping_rows([value], self.encoding)
                results.append(Click(float(model(dense.to(device), sparse.to(device)).sigmoid())))
            else:
                raise PaperZooError(f"a row is a dict of columns, or the path of a table, not {type(value).__name__}")
        return results

    def samples(self, folder: Path) -> list[str]:
        """Twenty rows of the held-out log, without their labels, as a CSV file."""
        path = folder / "rows.csv"
        rows = as_mappings(self.test_data, range(min(20, len(self.test_data))))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*self.encoding.dense, *self.encoding.sparse])
            writer.writeheader()
            writer.writerows(rows)
        return [str(path)]

    def example(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        dense = torch.rand(2, len(self.encoding.dense), generator=generator)
        columns = [torch.randint(size, (2,), generator=generator) for size in self.encoding.field_sizes]
        return dense, torch.stack(columns, 1) if columns else torch.zeros(2, 0, dtype=torch.int64)

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """Whether a click is more likely than not."""
        return (expected > 0) == (found > 0)

    def draw(self, value: Any, result: Click | Clicks) -> Image.Image:
        """The probability of a row as a bar, or the histogram of a file's."""
        from paperzoo.engine.pictures import new_figure, to_picture

        if isinstance(result, Clicks):
            figure, axes = new_figure(4.0, 2.4)
            axes.hist(result.probabilities, bins=20, range=(0, 1))
            axes.set_title(f"{result.rows} rows, {result.mean_probability:.1%} clicks expected", fontsize=9)
        else:
            figure, axes = new_figure(4.0, 0.8)
            axes.barh([0], [result.probability])
            axes.set_xlim(0, 1)
            axes.set_yticks([])
            axes.set_title(f"click: {result.probability:.1%}", fontsize=9)
        return to_picture(figure)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """The ROC curve, and predicted against actual click rates in bins of equal size."""
        from torchmetrics.functional.classification import binary_auroc, binary_roc

        from paperzoo.engine.pictures import new_figure, to_picture

        data = self.test_data
        pairs = []
        for start in range(0, min(len(data), 200_000), 4096):
            dense, sparse, labels = self.runtime.to_device(data.rows(slice(start, start + 4096)))
            pairs.append((self.deployed.eval()(dense, sparse).float().sigmoid().cpu(), labels.cpu()))
        odds, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        curves = {"model": odds}
        if data.probability is not None:
            curves["best possible"] = torch.from_numpy(data.probability[: len(odds)]).float()
        figure, axes = new_figure(4.2, 4.0)
        for name, scores in curves.items():
            false, true, _ = binary_roc(scores, labels.long(), thresholds=200)
            axes.plot(false, true, label=f"{name}: AUC {float(binary_auroc(scores, labels.long())):.4f}")
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set_xlabel("share of the rows without a click")
        axes.set_ylabel("share of the clicks found")
        axes.legend(fontsize=8)
        roc = to_picture(figure)
        order = odds.argsort().tensor_split(20)
        figure, axes = new_figure(4.2, 4.0)
        axes.plot([odds[part].mean() for part in order], [labels[part].mean() for part in order], marker="o")
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set_xlabel("predicted click rate")
        axes.set_ylabel("actual click rate")
        return {"ROC curve": roc, "Calibration (twenty bins of equal size)": to_picture(figure)}


def as_mappings(table: Table, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Encoded rows as a user would write them. Rare and hashed values are left out."""
    dense, sparse, _ = table.rows(torch.tensor(list(indices)))
    encoding = table.encoding
    rows = []
    for numbers, ids in zip(dense.tolist(), sparse.tolist(), strict=True):
        row: dict[str, Any] = {
            name: encoding.original(name, v) for name, v in zip(encoding.dense, numbers, strict=True)
        }
        row |= {name: encoding.value_of(name, i) for name, i in zip(encoding.sparse, ids, strict=True)}
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows
