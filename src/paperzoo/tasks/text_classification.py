"""Text classification: one class for a text, or for a pair of texts.

A batch is a dict: `input_ids` int64 (B, max_length), "[CLS] text [SEP]" or "[CLS] text [SEP] second text [SEP]", padded on
the right to one fixed length (networks that mix tokens without a mask depend on it); `token_type_ids` int64 of the same
shape, 1 in the second text; `targets` int64 (B,). A network maps (input_ids, token_type_ids) to logits (B, num_classes).
A prediction is a `Classification`, as for images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.classification import BinaryF1Score, MulticlassConfusionMatrix

from paperzoo.data.text import LabelledText, TextTokenizer, open_labelled_text
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import browser
from paperzoo.tasks.classification import Classification, answer
from paperzoo.tasks.text_pictures import text_sheet

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Config:
    """The default recipe: Adam with warm-up and linear decay, cross-entropy."""

    model: str = "fnet_base_classifier"
    data: str = "python_docs"
    tokenizer: str = "wordpiece"  # wordpiece, bpe, unigram, or a tokenizer.json
    vocab_size: Count = 32_000  # of a tokenizer that is trained here
    lowercase: bool = True
    max_length: Annotated[int, Field(ge=8)] = 512  # tokens; longer texts are cut
    embed_dim: Count | None = None  # None: the model's own sizes
    depth: Count | None = None
    hidden_dim: Count | None = None
    drop_rate: Fraction | None = None
    weights: str | None = None  # pre-trained weights; a head of another size stays random
    steps: Count = 1000
    batch_size: Count = 32
    learning_rate: Positive = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # not on biases and norms
    label_smoothing: Fraction = 0.0
    clip: Positive | None = 1.0


def warmup_linear_decay(step: int, warmup_steps: int, steps: int) -> float:
    """The learning rate's factor: up from zero in a straight line, then down to zero at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def adam(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """As BERT: decoupled weight decay on matrices and embeddings, none on biases and norms, eps 1e-6."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, learning_rate, eps=1e-6)


def start_from(model: nn.Module, weights: str) -> list[str]:
    """Load pre-trained weights under their own names; returns the names of the model that stay as they are.

    Raises:
        PaperZooError: if less than half of the model's tensors are in the file.
    """
    from pathlib import Path

    from paperzoo.engine.weights import read_state

    path = Path(weights).expanduser()
    state, here = read_state(path / "model.safetensors" if path.is_dir() else path), model.state_dict()
    fitting = {k: v for k, v in state.items() if k in here and here[k].shape == v.shape}
    left = [k for k in here if k not in fitting]
    if 2 * len(left) > len(here):
        raise PaperZooError(
            f"{path}: these weights do not fit this model: {len(left)} of its {len(here)} tensors are not there"
        )
    model.load_state_dict(fitting, strict=False)
    return left


def open_tokenizer(config: Any, facts: dict, texts: Any) -> TextTokenizer:
    """The tokenizer of a saved run, or that of the config: trained on `texts()`, or loaded."""
    if "tokenizer" in facts:
        return TextTokenizer.from_json(facts["tokenizer"])
    return TextTokenizer.make(config.tokenizer, texts, config.vocab_size, config.lowercase)


def sizes(config: Any, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The arguments of the model's function that config and tokenizer determine."""
    names = ("embed_dim", "depth", "hidden_dim", "drop_rate")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return given | {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id, "max_length": config.max_length}


class TextClassificationRecipe(Recipe):
    """The task's default recipe."""

    config: Config
    monitor = ("accuracy", "max")

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        self.tokenizer = open_tokenizer(config, self.facts, lambda: self.all_texts(self.train_text))
        if not self.facts:
            pairs = self.train_text.seconds is not None
            self.facts = {"labels": self.train_text.labels, "pairs": pairs, "tokenizer": self.tokenizer.to_json()}
        self.model = runtime.place(self.build())
        self.optimizer = adam(self.model, config.learning_rate, config.weight_decay)
        factor = lambda step: warmup_linear_decay(step, config.warmup_steps, config.steps)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def build(self) -> nn.Module:
        model = create(self.config.model, num_classes=len(self.facts["labels"]), **sizes(self.config, self.tokenizer))
        if self.config.weights is not None:
            start_from(model, self.config.weights)
        return model

    # -- data ----------------------------------------------------------------------------------------------------

    @staticmethod
    def all_texts(data: LabelledText) -> Iterable[str]:
        return [*data.texts, *(data.seconds or [])]

    @cached_property
    def train_text(self) -> LabelledText:
        return open_labelled_text(self.config.data, "train", self.facts.get("labels"))

    @cached_property
    def train_data(self) -> dict[str, Tensor]:
        return self.encode(self.train_text.texts, self.train_text.seconds) | {
            "targets": torch.tensor(self.train_text.targets)
        }

    def encode(self, texts: list[str], seconds: list[str] | None) -> dict[str, Tensor]:
        """`input_ids` and `token_type_ids` of every text, (N, max_length) each."""
        firsts = self.tokenizer.encode_all(texts)
        others = [None] * len(texts) if seconds is None else self.tokenizer.encode_all(seconds)
        length = self.config.max_length
        rows = [self.tokenizer.assemble(a, b, length) for a, b in zip(firsts, others, strict=True)]
        return {"input_ids": torch.tensor([r[0] for r in rows]), "token_type_ids": torch.tensor([r[1] for r in rows])}

    def batch(self) -> dict[str, Tensor]:
        rows = self.runtime.indices(len(self.train_text), self.config.batch_size)
        return self.runtime.to_device({name: t[rows] for name, t in self.train_data.items()})

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        logits = self.model(batch["input_ids"], batch["token_type_ids"])
        loss = F.cross_entropy(logits, batch["targets"], label_smoothing=self.config.label_smoothing)
        hits = (logits.detach().argmax(1) == batch["targets"]).float().mean()
        return {"loss": loss, "train_accuracy": hits}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Accuracy and cross-entropy over the split; with two classes also F1 of the second, as GLUE reports for pairs."""
        confusion, loss, f1 = self.confusion(split)
        metrics = {"accuracy": float(confusion.diag().sum() / confusion.sum()), "cross_entropy": loss}
        return metrics if f1 is None else metrics | {"f1": f1}

    @torch.inference_mode()
    def confusion(self, split: str = "test") -> tuple[Tensor, float, float | None]:
        """The confusion matrix (true, predicted) over a split, the mean cross-entropy, and F1 with two classes."""
        data, device = open_labelled_text(self.config.data, split, self.facts["labels"]), self.runtime.device
        model, classes = self.deployed.eval(), len(self.facts["labels"])
        matrix = MulticlassConfusionMatrix(classes).to(device)
        f1 = BinaryF1Score().to(device) if classes == 2 else None
        sums = torch.zeros(2, device=device)
        for pairs in self.runtime.loader(data, 128, collate=list):
            first = [t[0] if self.facts["pairs"] else t for t, _ in pairs]
            second = [t[1] for t, _ in pairs] if self.facts["pairs"] else None
            encoded = self.runtime.to_device(self.encode(first, second))
            targets = torch.tensor([target for _, target in pairs], device=device)
            logits = model(encoded["input_ids"], encoded["token_type_ids"]).float()
            matrix.update(logits, targets)
            if f1 is not None:
                f1.update(logits.argmax(1), targets)
            sums += torch.stack([F.cross_entropy(logits, targets, reduction="sum"), sums.new_tensor(len(pairs))])
        loss, count = self.runtime.mean(sums).tolist()
        return matrix.compute(), loss / count, None if f1 is None else float(f1.compute())

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Classification]:
        """Strings, or pairs of strings where the data were pairs, to their classes."""
        results: list[Classification] = []
        model = self.deployed.eval()
        for start in range(0, len(inputs), 64):
            firsts, seconds = zip(*map(self.check_input, inputs[start : start + 64]), strict=True)
            encoded = self.runtime.to_device(self.encode(list(firsts), list(seconds) if self.facts["pairs"] else None))
            rows = model(encoded["input_ids"], encoded["token_type_ids"]).float().softmax(1).cpu()
            results += [answer(row, self.facts["labels"]) for row in rows]
        return results

    def check_input(self, value: Any) -> tuple[str, str]:
        if not self.facts["pairs"]:
            if isinstance(value, str):
                return value, ""
            raise PaperZooError(f"a text is needed, but this is {type(value).__name__}")
        if isinstance(value, str) and "\t" in value:
            value = value.split("\t", 1)
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(t, str) for t in value):
            return value[0], value[1]
        raise PaperZooError("a pair of texts is needed: two strings, or one with a tab between them")

    def example(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.config.max_length)
        return torch.randint(5, self.tokenizer.vocab_size, shape, generator=generator), torch.zeros(
            shape, dtype=torch.int64
        )

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """The most likely classes."""
        return expected.argmax(1) == found.argmax(1)

    def browser(self) -> dict | None:
        """A text to the probabilities of the classes; None for pairs of texts, and for tokenizers that a page does not have."""
        tables = browser.tokenizer_tables(self.tokenizer)
        if tables is None or self.facts["pairs"] or type(self).predict is not TextClassificationRecipe.predict:
            return None
        data = open_labelled_text(self.config.data, "test", self.facts["labels"])
        short = [i for i, text in enumerate(data.texts) if len(text) <= 240]  # a button holds no longer one
        rows = [short[k] for k in browser.of_each_class([data.targets[i] for i in short], browser.SHOWN)]
        return {
            "input": {"kind": "text", "length": self.config.max_length, "tokenizer": tables},
            "output": {"kind": "classes", "labels": self.facts["labels"]},
            "samples": [{"text": data.texts[i], "truth": self.facts["labels"][data.targets[i]]} for i in rows],
            **browser.about(self.config.data),
        }

    def browser_network(self) -> tuple[nn.Module, tuple]:
        """Ids and token types, int64 (1, max_length) each -> probabilities (1, num_classes)."""
        return browser.Probabilities(self.deployed), tuple(x[:1] for x in self.example())

    def draw(self, value: Any, result: Classification) -> Image.Image | None:
        text = value if isinstance(value, str) else " | ".join(value)
        return text_sheet([(f"{result.label} {result.probability:.0%}", text)])

    def samples(self, folder: Path) -> list:
        """Eight held-out texts, or pairs of texts."""
        data = open_labelled_text(self.config.data, "test", self.facts["labels"])
        rows = range(0, len(data.texts), max(1, len(data.texts) // 8))[:8]
        return [data.texts[i] if data.seconds is None else (data.texts[i], data.seconds[i]) for i in rows]

    def figures(self) -> dict[str, Image.Image]:
        """The confusion matrix, and held-out texts with their answers."""
        from paperzoo.engine.pictures import confusion_matrix

        labels = self.facts["labels"]
        data = open_labelled_text(self.config.data, "test", labels)
        shown = [data[i] for i in range(min(12, len(data)))]
        lines = []
        for (text, target), result in zip(shown, self.predict([text for text, _ in shown]), strict=True):
            truth = "" if labels[target] == result.label else f" (is {labels[target]})"
            short = text if isinstance(text, str) else " | ".join(text)
            lines.append((f"{result.label} {result.probability:.0%}{truth}", short[:180]))
        pictures = {"Confusion matrix": confusion_matrix(self.confusion()[0].cpu(), labels)}
        sheet = text_sheet(lines)
        return pictures if sheet is None else pictures | {"Texts": sheet}
