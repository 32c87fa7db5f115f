"""Masked language modelling, with next-sentence prediction where the network has a head for it (BERT's pre-training).

A batch is a dict of int64 tensors: `input_ids` (B, max_length), "[CLS] A [SEP] B [SEP]" padded on the right, with tokens
hidden; `token_type_ids` (B, max_length), 1 in B; `positions` (B, P), where tokens were hidden, and `targets` (B, P), what
they were (-100 in unused places); `next_sentence` (B,), 0 if B follows A in its document, 1 if it is from another one.

A network maps (input_ids, token_type_ids, positions) to word logits (B, P, vocab_size), those of every token if
`positions` is left out; or to a pair, with next-sentence logits (B, 2) second. A prediction is a `FilledText`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.aggregation import SumMetric
from torchmetrics.classification import BinaryAccuracy

from paperzoo.data.text import Documents, TextTokenizer, open_documents
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.text_classification import adam, open_tokenizer, sizes, start_from, warmup_linear_decay
from paperzoo.tasks.text_pictures import text_sheet

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
UNUSED = -100


@dataclass(frozen=True)
class FilledText:
    """The text with its gaps filled, and for each gap the most probable tokens with their probabilities."""

    text: str
    gaps: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True)
class Config:
    """The default recipe: BERT's masking, Adam with warm-up and linear decay."""

    model: str = "fnet_base_pretraining"
    data: str = "python_docs"
    tokenizer: str = "unigram"  # unigram (as SentencePiece), wordpiece, bpe, or a tokenizer.json
    vocab_size: Count = 32_000
    lowercase: bool = True
    max_length: Annotated[int, Field(ge=8)] = 512
    embed_dim: Count | None = None  # None: the model's own sizes
    depth: Count | None = None
    hidden_dim: Count | None = None
    drop_rate: Fraction | None = None
    weights: str | None = None
    steps: Count = 1_000_000
    batch_size: Count = 256
    learning_rate: Positive = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 10_000
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Positive | None = None
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15  # share of tokens to predict
    max_predictions: Count = 80  # at most so many of a text
    mask_share: Fraction = 0.8  # of these, hidden behind [MASK] …
    random_share: Fraction = 0.1  # … or replaced by a random token; the others stay
    workers: Annotated[int, Field(ge=0)] = 0


def hide(
    ids: list[int], special: frozenset[int], tokenizer: TextTokenizer, config: Config
) -> tuple[list[int], list[int], list[int]]:
    """BERT's masking with torch's global generator: (ids with tokens hidden, their positions, what they were)."""
    places = [i for i, token in enumerate(ids) if token not in special]
    count = min(config.max_predictions, max(1, round(config.mask_rate * len(places))))
    chosen = sorted(places[i] for i in torch.randperm(len(places))[:count].tolist())
    out, fate = list(ids), torch.rand(len(chosen)).tolist()
    for place, u in zip(chosen, fate, strict=True):
        if u < config.mask_share:
            out[place] = tokenizer.mask_id
        elif u < config.mask_share + config.random_share:
            out[place] = int(torch.randint(tokenizer.vocab_size, ()))
    return out, chosen, [ids[i] for i in chosen]


class MaskedText:
    """Documents as training samples: two segments, the second half the time from another document, tokens hidden.

    Randomness is torch's global generator, which the runtime seeds for every sample.
    """

    def __init__(self, documents: Documents, tokenizer: TextTokenizer, config: Config) -> None:
        self.documents, self.tokenizer, self.config = documents, tokenizer, config
        if tokenizer.mask_id is None:
            raise PaperZooError("masked language modelling needs a tokenizer with the token [MASK]")
        self.encoded = None if documents.texts is None else tokenizer.encode_all(documents.texts)

    def ids(self, i: int) -> list[int]:
        return self.tokenizer.encode(self.documents[i]) if self.encoded is None else self.encoded[i]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        config, room = self.config, self.config.max_length - 3
        ids = self.ids(i)
        first = int(torch.randint(max(1, len(ids) - room + 1), ()))
        ids = ids[first : first + room]
        border = max(1, int(torch.randint(max(1, len(ids) // 4), max(2, 3 * len(ids) // 4 + 1), ())))
        a, b = ids[:border], ids[border:]
        follows = bool(torch.rand(()) < 0.5) or len(self.documents) == 1
        if not follows:
            other = (i + 1 + int(torch.randint(len(self.documents) - 1, ()))) % len(self.documents)
            others = self.ids(other)
            first = int(torch.randint(max(1, len(others) - len(b) + 1), ()))
            b = others[first : first + len(b)]
        packed, types = self.tokenizer.assemble(a, b, config.max_length)
        hidden, positions, targets = hide(packed, self.tokenizer.special_ids, self.tokenizer, config)
        empty = min(config.max_predictions, math.ceil(config.mask_rate * config.max_length)) - len(positions)
        return {
            "input_ids": torch.tensor(hidden),
            "token_type_ids": torch.tensor(types),
            "positions": torch.tensor(positions + [0] * empty),
            "targets": torch.tensor(targets + [UNUSED] * empty),
            "next_sentence": torch.tensor(0 if follows else 1),
        }


class MaskedLanguageModellingRecipe(Recipe):
    """The task's default recipe."""

    config: Config
    monitor = ("masked_accuracy", "max")

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        self.tokenizer = open_tokenizer(config, self.facts, self.sample_of_texts)
        if not self.facts:
            self.facts = {"tokenizer": self.tokenizer.to_json()}
        model = create(config.model, **sizes(config, self.tokenizer))
        if config.weights is not None:
            start_from(model, config.weights)
        self.model = runtime.place(model)
        self.optimizer = adam(self.model, config.learning_rate, config.weight_decay)
        factor = lambda step: warmup_linear_decay(step, config.warmup_steps, config.steps)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def sample_of_texts(self) -> list[str]:
        """Up to 200,000 documents, spread over the set, for training a tokenizer."""
        documents = open_documents(self.config.data, "train")
        return [documents[i] for i in range(0, len(documents), max(1, len(documents) // 200_000))]

    @cached_property
    def batches(self):
        data = MaskedText(open_documents(self.config.data, "train"), self.tokenizer, self.config)
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> dict[str, Tensor]:
        return self.batches.next()

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Word logits at the hidden places, and next-sentence logits where the network has them."""
        found = model(batch["input_ids"], batch["token_type_ids"], batch["positions"])
        return found if isinstance(found, tuple) else (found, None)

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        words, sentences = self.outputs(self.model, batch)
        total = F.cross_entropy(words.flatten(0, 1), batch["targets"].flatten(), ignore_index=UNUSED, reduction="sum")
        loss = total / self.runtime.mean((batch["targets"] != UNUSED).sum().float())  # over the tokens of all ranks
        values = {"masked_loss": loss.detach()}
        if sentences is not None:
            next_loss = F.cross_entropy(sentences, batch["next_sentence"])
            loss, values["next_sentence_loss"] = loss + next_loss, next_loss.detach()
        return {"loss": loss} | values

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Accuracy on hidden tokens and perplexity, pooled over the split, and next-sentence accuracy.

        Which tokens are hidden is a function of the run's seed and the document, so two evaluations hide the same.
        """
        data = MaskedText(open_documents(self.config.data, split), self.tokenizer, self.config)
        model, device = self.deployed.eval(), self.runtime.device
        hits, count, loss = (SumMetric().to(device) for _ in range(3))
        following = BinaryAccuracy().to(device)
        pairs = False
        for batch in self.runtime.loader(data, 64, self.config.workers):
            words, sentences = self.outputs(model, batch)
            used = batch["targets"] != UNUSED
            logits, targets = words[used].float(), batch["targets"][used]
            hits.update((logits.argmax(-1) == targets).sum())
            count.update(len(targets))
            loss.update(F.cross_entropy(logits, targets, reduction="sum"))
            if sentences is not None:
                pairs = True
                following.update(sentences.argmax(-1), batch["next_sentence"])
        total = float(count.compute())
        metrics = {"masked_accuracy": float(hits.compute()) / total}
        metrics["perplexity"] = math.exp(min(50.0, float(loss.compute()) / total))
        return metrics | {"next_sentence_accuracy": float(following.compute())} if pairs else metrics

    @torch.inference_mode()
    def predict(self, inputs: list[str]) -> list[FilledText]:
        """Texts with the word [MASK] in one or more places, to the same texts with the gaps filled."""
        model, t = self.deployed.eval(), self.tokenizer
        return [self.fill(model, t, text) for text in inputs]

    def fill(self, model: nn.Module, t: TextTokenizer, text: str) -> FilledText:
        if not isinstance(text, str) or "[MASK]" not in text:
            raise PaperZooError('a text with "[MASK]" in it is needed, for example "Return the [MASK] of a list."')
        pieces = [t.encode(part.strip()) for part in text.split("[MASK]")]
        ids = pieces[0] + [i for piece in pieces[1:] for i in (t.mask_id, *piece)]
        ids, types = t.assemble(ids, None, self.config.max_length)
        places = [i for i, token in enumerate(ids) if token == t.mask_id]
        if not places:
            raise PaperZooError(f"[MASK] stands after the first {self.config.max_length - 2} tokens; shorten the text")
        tensors = (torch.tensor([row], device=self.runtime.device) for row in (ids, types, places))
        found = model(*tensors)
        logits = (found[0] if isinstance(found, tuple) else found)[0].float()
        logits[:, sorted(t.special_ids)] = -math.inf
        best = logits.softmax(-1).topk(5)
        for place, choice in zip(places, best.indices.tolist(), strict=True):
            ids[place] = choice[0]
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        gaps = tuple(tuple((t.token(i), p) for i, p in zip(*row, strict=True)) for row in rows)
        return FilledText(t.decode(ids), gaps)

    def example(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.config.max_length)
        return torch.randint(5, self.tokenizer.vocab_size, shape, generator=generator), torch.zeros(
            shape, dtype=torch.int64
        )

    def same_answers(self, expected: Any, found: Any) -> Tensor:
        """The most likely token of each place."""
        words = [x[0] if isinstance(x, tuple | list) else x for x in (expected, found)]
        return words[0].argmax(-1) == words[1].argmax(-1)

    def draw(self, value: str, result: FilledText) -> Image.Image | None:
        gaps = [("", "  ".join(f"{token} {p:.0%}" for token, p in gap)) for gap in result.gaps]
        return text_sheet([("text", value), ("filled", result.text), *gaps])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out sentences with one word hidden, and what the network puts there."""
        documents = open_documents(self.config.data, "test")
        lines: list[tuple[str, str]] = []
        for i in range(min(8, len(documents))):
            words = documents[i].split()[:16]
            while words and len(self.tokenizer.encode(" ".join(words))) > self.config.max_length - 2:
                words.pop()  # the gap in the middle has to be among the tokens that are read
            if not words:
                continue
            hidden = words[len(words) // 2]
            words[len(words) // 2] = "[MASK]"
            result = self.predict([" ".join(words)])[0]
            guesses = "  ".join(f"{token} {p:.0%}" for token, p in result.gaps[0])
            lines += [("text", " ".join(words)), ("guesses", guesses), ("was", hidden), ("", "")]
        picture = text_sheet(lines)
        return {} if picture is None else {"Hidden words": picture}

    @staticmethod
    def most_frequent(data: MaskedText) -> float:
        """The baseline: the accuracy of always answering the most frequent hidden token of `data`."""
        tokens = torch.cat([data[i]["targets"] for i in range(len(data))])
        return float(torch.bincount(tokens[tokens != UNUSED]).max() / (tokens != UNUSED).sum())
