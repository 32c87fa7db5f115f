"""Translation: one sequence of tokens to another.

A batch is a dict: `source` int64 (B, S), each row the tokens and an end token; `target` int64 (B, T), each row a start
token, the tokens and an end token; both padded on the right with the tokenizer's pad id. A network has

    model(source, target) -> logits (B, T, vocab_size) of the token after each target position
    model.start(source) -> state                        a flat dict of tensors, batch first
    model.advance(tokens (B,), state) -> (logits (B, vocab_size), state)

A prediction is a `Translation`. BLEU is sacreBLEU's, 0 … 100, over the whole split (torchmetrics).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchmetrics.text import SacreBLEUScore

from paperzoo.data.text import ParallelText, TextTokenizer, open_parallel_text
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.text_pictures import text_sheet

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Translation:
    """The best translation of one text, its score (log-probability over the length penalty), and the next best ones."""

    text: str
    score: float
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Config:
    """The default recipe: Adam with warm-up and inverse square root decay, label smoothing, beam search."""

    model: str = "transformer_base"
    data: str = "diary_en_zh"
    source: str = ""  # endings of line-aligned files, as in train.en and train.de
    target: str = ""
    tokenizer: str = "bpe"  # bpe, unigram, wordpiece, or a tokenizer.json; one vocabulary for both languages
    vocab_size: Count = 37_000
    max_length: Count = 256  # tokens of a training sentence; longer pairs are left out
    embed_dim: Count | None = None  # None: the model's own sizes
    depth: Count | None = None
    num_heads: Count | None = None
    hidden_dim: Count | None = None
    drop_rate: Fraction | None = None
    weights: str | None = None
    steps: Count = 100_000
    batch_size: Count = 128  # sentence pairs
    batch_tokens: Count | None = (
        None  # instead: about so many source and target tokens, sentences of one length together
    )
    learning_rate: Positive = 1.0  # factor of the schedule d^-0.5 min(step^-0.5, step warmup^-1.5)
    warmup_steps: Count = 4000
    beta2: Fraction = 0.98
    label_smoothing: Fraction = 0.1
    clip: Positive | None = None
    average_last: Annotated[int, Field(ge=0)] = 0  # use the mean of so many last checkpoints …
    average_every: Count = 1000  # … that lie so many steps apart
    beam_size: Count = 4
    length_penalty: Annotated[float, Field(ge=0)] = 0.6
    extra_length: Count = 50  # an output has at most the source's tokens and so many more
    bleu: Literal["13a", "zh", "char", "intl", "none"] = "13a"  # how sacreBLEU splits sentences


# -- learning rate, loss, averaging ------------------------------------------------------------------------------------


def warmup_inverse_sqrt(step: int, embed_dim: int, warmup_steps: int) -> float:
    """Equation 3 of "Attention Is All You Need": d^-0.5 min(step^-0.5, step warmup^-1.5), steps counted from 1."""
    return embed_dim**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)


def smoothed_loss(logits: Tensor, targets: Tensor, smoothing: float, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy with smoothed labels, summed over tokens that are not padding, and their number.

    The true token has probability 1 - smoothing + smoothing / V, every other smoothing / V.
    """
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=pad_id, label_smoothing=smoothing, reduction="sum"
    )
    return loss, (targets != pad_id).sum()


class LastCheckpoints(AveragedModel):
    """The mean of a network's last `count` checkpoints, `every` steps apart; before the first it is the network itself."""

    def __init__(self, model: nn.Module, steps: int, count: int, every: int) -> None:
        super().__init__(model)
        self.first, self.every = max(1, steps - (count - 1) * every), every
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def update_parameters(self, model: nn.Module) -> None:
        self.calls += 1
        calls = int(self.calls)
        if calls <= self.first:
            self.n_averaged.zero_()
        if calls <= self.first or (calls - self.first) % self.every == 0:
            super().update_parameters(model)


# -- search ------------------------------------------------------------------------------------------------------------


def length_penalty(length: Tensor | int, alpha: float) -> Any:
    """((5 + length) / 6)^alpha (Wu et al. 2016, equation 14)."""
    return ((5 + length) / 6) ** alpha


@torch.no_grad()
def greedy_search(model: Any, source: Tensor, start_id: int, end_id: int, limits: Tensor) -> list[list[int]]:
    """The most probable next token, again and again, until the end token or the limit (B,) of each row."""
    state, tokens = model.start(source), torch.full((len(source),), start_id, device=source.device)
    done, rows = torch.zeros_like(tokens, dtype=torch.bool), []
    for step in range(int(limits.max())):
        logits, state = model.advance(tokens, state)
        tokens = logits.argmax(-1).masked_fill(done, end_id)
        rows.append(tokens)
        done = done | (tokens == end_id) | (step + 1 >= limits)
        if bool(done.all()):
            break
    return [cut(row, end_id, int(limit)) for row, limit in zip(torch.stack(rows, 1).tolist(), limits, strict=True)]


def cut(tokens: list[int], end_id: int, limit: int) -> list[int]:
    tokens = tokens[:limit]
    return tokens[: tokens.index(end_id)] if end_id in tokens else tokens


@torch.no_grad()
def beam_search(
    model: Any,
    source: Tensor,
    start_id: int,
    end_id: int,
    limits: Tensor,
    beam_size: int = 4,
    alpha: float = 0.6,
    forbidden: tuple[int, ...] = (),
) -> list[list[tuple[list[int], float]]]:
    """The best outputs of every row, by log P / length penalty; the length counts the end token.

    A beam keeps the `beam_size` best unfinished prefixes. A row is done when no unfinished prefix can still overtake
    its worst kept output, or at its limit.

    Args:
        source: int64 (B, S).
        limits: int64 (B,), the most tokens of an output, without the end token.
        forbidden: ids that are never produced.

    Returns:
        For each row, best first, up to `beam_size` pairs (ids without start and end, score).
    """
    b, k, device = len(source), beam_size, source.device
    state = {name: t.repeat_interleave(k, 0) for name, t in model.start(source).items()}
    tokens = torch.full((b, k, 0), start_id, device=device)
    alive = torch.full((b, k), -math.inf, device=device)
    alive[:, 0] = 0.0  # the copies of the first prefix are one prefix
    last = torch.full((b * k,), start_id, device=device)
    found: list[list[tuple[float, list[int]]]] = [[] for _ in range(b)]
    longest = length_penalty(limits.to(device) + 1, alpha)
    done = torch.zeros(b, dtype=torch.bool, device=device)
    row_offset = torch.arange(b, device=device)[:, None] * k
    for step in range(int(limits.max()) + 1):
        logits, state = model.advance(last, state)
        log_p = logits.float().log_softmax(-1).view(b, k, -1)
        if forbidden:
            log_p[..., list(forbidden)] = -math.inf
        total = alive[..., None] + log_p
        ends = total[..., end_id] / length_penalty(step + 1, alpha)  # every prefix may end here
        collect(found, tokens, ends.masked_fill(done[:, None], -math.inf), k)
        worst = torch.tensor([f[-1][0] if len(f) == k else -math.inf for f in found], device=device)
        total[..., end_id] = -math.inf
        alive, flat = total.flatten(1).topk(min(k, total[0].numel()))
        if alive.shape[1] < k:  # a vocabulary smaller than the beam
            alive, flat = (F.pad(t, (0, k - t.shape[1]), value=v) for t, v in ((alive, -math.inf), (flat, 0)))
        done = done | (step >= limits.to(device)) | (alive[:, 0] / longest <= worst) | alive[:, 0].isneginf()
        if bool(done.all()):
            break
        parent, last = flat // log_p.shape[-1], flat % log_p.shape[-1]
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand(-1, -1, step)), last[..., None]], 2)
        rows, last = (parent + row_offset).flatten(), last.flatten()
        state = {name: t.index_select(0, rows) for name, t in state.items()}
    return [[(ids, score) for score, ids in row] for row in found]


def collect(found: list[list[tuple[float, list[int]]]], tokens: Tensor, scores: Tensor, keep: int) -> None:
    """Add the outputs that end now to each row's best."""
    table = scores.tolist()
    for row, kept in enumerate(found):
        fresh = [
            (s, beam) for beam, s in enumerate(table[row]) if s > (kept[-1][0] if len(kept) == keep else -math.inf)
        ]
        if fresh:
            kept += [(s, tokens[row, beam].tolist()) for s, beam in fresh]
            kept.sort(key=lambda pair: -pair[0])
            del kept[keep:]


# -- data --------------------------------------------------------------------------------------------------------------


class Ragged:
    """Many sequences of ids in one flat array."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.lengths = numpy.fromiter(map(len, rows), dtype=numpy.int64, count=len(rows))
        self.ends = numpy.cumsum(self.lengths)
        self.flat = numpy.fromiter((i for row in rows for i in row), dtype=numpy.int32, count=int(self.lengths.sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    def pad(self, rows: list[int], pad_id: int, start: int | None, end: int) -> Tensor:
        """int64 (len(rows), longest): each with an end token, and a start token if there is one."""
        extra = 1 if start is None else 2
        out = torch.full((len(rows), int(self.lengths[rows].max()) + extra), pad_id)
        for i, row in enumerate(rows):
            ids = self.flat[self.ends[row] - self.lengths[row] : self.ends[row]]
            ids = [*([] if start is None else [start]), *ids.tolist(), end]
            out[i, : len(ids)] = torch.tensor(ids)
        return out


def token_batches(lengths: numpy.ndarray, budget: int) -> list[list[int]]:
    """Rows of similar length together, so that rows times the longest is at most `budget` (one row at the least)."""
    batches: list[list[int]] = []
    current: list[int] = []
    for row in numpy.argsort(lengths, kind="stable").tolist():
        if current and (len(current) + 1) * int(lengths[row]) > budget:
            batches.append(current)
            current = []
        current.append(row)
    return [*batches, current] if current else batches


class TranslationRecipe(Recipe):
    """The task's default recipe."""

    config: Config
    monitor = ("bleu", "max")
    engine_parts = ("start", "advance")  # beam search's

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            texts = lambda: [*self.train_text.sources, *self.train_text.targets]  # noqa: E731
            tokenizer = TextTokenizer.make(config.tokenizer, texts, config.vocab_size)
            self.facts = {"tokenizer": tokenizer.to_json()}
        self.tokenizer = TextTokenizer.from_json(self.facts["tokenizer"])
        self.model = runtime.place(self.build())
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), config.learning_rate, betas=(0.9, config.beta2), eps=1e-9
        )
        factor = lambda step: warmup_inverse_sqrt(step + 1, self.model.embed_dim, config.warmup_steps)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = None
        if config.average_last:
            self.average = LastCheckpoints(self.model, config.steps, config.average_last, config.average_every)

    def build(self) -> nn.Module:
        sizes = ("embed_dim", "depth", "num_heads", "hidden_dim", "drop_rate")
        arguments = {name: getattr(self.config, name) for name in sizes if getattr(self.config, name) is not None}
        arguments |= {"vocab_size": self.tokenizer.vocab_size, "pad_id": self.tokenizer.pad_id}
        arguments["max_length"] = 2 * (self.config.max_length + self.config.extra_length) + 2
        return create(self.config.model, weights=self.config.weights, **arguments)

    # -- data ----------------------------------------------------------------------------------------------------

    @cached_property
    def train_text(self) -> ParallelText:
        return open_parallel_text(self.config.data, "train", self.config.source, self.config.target)

    @cached_property
    def train_ids(self) -> tuple[Ragged, Ragged]:
        sources, targets = (self.tokenizer.encode_all(t) for t in (self.train_text.sources, self.train_text.targets))
        pairs = [p for p in zip(sources, targets, strict=True) if max(map(len, p)) <= self.config.max_length]
        if not pairs:
            raise PaperZooError(f"max_length {self.config.max_length} leaves no sentence pair; give a larger one")
        return Ragged([s for s, _ in pairs]), Ragged([t for _, t in pairs])

    @cached_property
    def buckets(self) -> list[list[int]]:
        sources, targets = self.train_ids
        found = token_batches(numpy.maximum(sources.lengths + 1, targets.lengths + 2), self.config.batch_tokens)
        if min(map(len, found)) < self.runtime.world:
            raise PaperZooError(
                f"batch_tokens {self.config.batch_tokens} is too small for {self.runtime.world} processes"
            )
        return found

    def rows(self) -> list[int]:
        """This rank's sentence pairs of this step."""
        if self.config.batch_tokens is None:
            return self.runtime.indices(len(self.train_ids[0]), self.config.batch_size).tolist()
        epoch, i = divmod(self.runtime.position, len(self.buckets))
        if self.__dict__.get("_order", (None,))[0] != epoch:
            generator = torch.Generator().manual_seed(self.runtime.key("token batches", epoch))
            self._order = (epoch, torch.randperm(len(self.buckets), generator=generator))
        return self.buckets[int(self._order[1][i])][self.runtime.rank :: self.runtime.world]

    def batch(self) -> dict[str, Tensor]:
        (sources, targets), rows, t = self.train_ids, self.rows(), self.tokenizer
        batch = {"source": sources.pad(rows, t.pad_id, None, t.end_id)}
        batch["target"] = targets.pad(rows, t.pad_id, t.start_id, t.end_id)
        return self.runtime.to_device(batch)

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        logits, following = self.model(batch["source"], batch["target"][:, :-1]), batch["target"][:, 1:]
        loss, count = smoothed_loss(logits, following, self.config.label_smoothing, self.tokenizer.pad_id)
        right = (logits.detach().argmax(-1) == following) & (following != self.tokenizer.pad_id)
        loss = loss / self.runtime.mean(count.float())  # the mean over the tokens of all ranks
        return {"loss": loss, "token_accuracy": right.sum() / count}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """BLEU of the beam's best translation, the share of sentences that are exactly right, and perplexity."""
        data, device = (
            open_parallel_text(self.config.data, split, self.config.source, self.config.target),
            self.runtime.device,
        )
        bleu = SacreBLEUScore(tokenize=self.config.bleu).to(device)
        sums = torch.zeros(4, device=device)
        for pairs in self.runtime.loader(data, 128, collate=list):
            sources, references = [s for s, _ in pairs], [t for _, t in pairs]
            answers = [found.text for found in self.predict(sources)]
            bleu.update(answers, [[reference] for reference in references])
            exact = sum(a == r for a, r in zip(answers, references, strict=True))
            sums += torch.stack(
                [sums.new_tensor(exact), sums.new_tensor(len(pairs)), *self.log_loss(sources, references)]
            )
        exact, count, loss, tokens = self.runtime.mean(sums).tolist()
        metrics = {"bleu": 100 * float(bleu.compute()), "exact": exact / count}
        return metrics | {"perplexity": math.exp(min(50.0, loss / max(1.0, tokens)))}

    def log_loss(self, sources: list[str], references: list[str]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the references without smoothing, summed, and the number of tokens."""
        t, room = self.tokenizer, self.model.max_length - 2
        source, target = (Ragged([ids[:room] for ids in t.encode_all(texts)]) for texts in (sources, references))
        rows = list(range(len(sources)))
        source = source.pad(rows, t.pad_id, None, t.end_id).to(self.runtime.device)
        target = target.pad(rows, t.pad_id, t.start_id, t.end_id).to(self.runtime.device)
        logits = self.deployed.eval()(source, target[:, :-1])
        loss, count = smoothed_loss(logits, target[:, 1:], 0.0, t.pad_id)
        return loss, count.float()

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list[str]) -> list[Translation]:
        """Texts to their translations, by beam search (greedy where beam_size is 1)."""
        model, t, config = self.deployed.eval(), self.tokenizer, self.config
        room = self.model.max_length - config.extra_length - 2
        ids = [row[:room] for row in t.encode_all([check_text(text) for text in inputs])]
        results: list[Translation | None] = [None] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda i: len(ids[i]))  # equal lengths together: little padding
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            ragged = Ragged([ids[i] for i in chosen])
            source = ragged.pad(list(range(len(chosen))), t.pad_id, None, t.end_id).to(self.runtime.device)
            limits = torch.from_numpy(ragged.lengths) + config.extra_length
            silent = (t.pad_id, t.start_id)
            found = beam_search(
                model, source, t.start_id, t.end_id, limits, config.beam_size, config.length_penalty, silent
            )
            for i, outputs in zip(chosen, found, strict=True):
                texts: dict[str, float] = {}
                for tokens, score in outputs:  # one text may be split into tokens in several ways; the best one counts
                    texts.setdefault(t.decode(tokens), score)
                (text, score), *others = texts.items() or [("", -math.inf)]
                results[i] = Translation(text, score, tuple(others))
        return results

    def example(self) -> tuple[Tensor, Tensor]:
        """Source and target ids (2, 12) and (2, 10) for the network's forward."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, self.tokenizer.vocab_size, (2, 22), generator=generator)
        return ids[:, :12], ids[:, 12:]

    def draw(self, value: str, result: Translation) -> Image.Image | None:
        return text_sheet([("source", value), ("translation", result.text)])

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out sentences."""
        data = open_parallel_text(self.config.data, "test", self.config.source, self.config.target)
        return [data.sources[i] for i in range(0, len(data.sources), max(1, len(data.sources) // 8))[:8]]

    def figures(self) -> dict[str, Image.Image]:
        """Held-out sentences with their translations and references."""
        data = open_parallel_text(self.config.data, "test", self.config.source, self.config.target)
        lines: list[tuple[str, str]] = []
        for i, result in enumerate(self.predict(data.sources[:8])):
            lines += [
                ("source", data.sources[i]),
                ("translation", result.text),
                ("reference", data.targets[i]),
                ("", ""),
            ]
        picture = text_sheet(lines)
        return {} if picture is None else {"Translations": picture}


def check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise PaperZooError(f"a text is needed, but this is {type(value).__name__}")
    return value
