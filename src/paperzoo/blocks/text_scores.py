"""How well texts were read: edit distances, and the metrics that benchmarks of text recognition compare.

word_accuracy         share of texts read without a mistake. "alphanumeric": in small letters, digits and Latin letters alone, as
                      the benchmarks of scene text do it; texts that have none of these are left out. "exact": as they are
exact_accuracy        the same, of texts as they are written, whatever the protocol
one_minus_ned         1 - mean of edit distance / length of the longer (ICDAR 2019's 1-N.E.D.)
character_error_rate  edit distances of all texts / characters of all texts
word_accuracy_lexicon each answer replaced by the nearest word of a lexicon first
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from paperzoo.blocks.sequence_decoding import Alphabet

if TYPE_CHECKING:
    from paperzoo.engine.runtime import Runtime


def edit_distances(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Levenshtein's distance of each pair: int64 (N,). Rows of the table one after the other, all pairs at once."""
    one, lengths_one = _codes(first)
    two, lengths_two = _codes(second)
    columns = np.arange(two.shape[1] + 1)
    row = np.broadcast_to(columns, (len(one), len(columns))).copy()
    found = np.take_along_axis(row, lengths_two[:, None], 1)[:, 0]
    for i in range(one.shape[1]):
        best = np.empty_like(row)
        best[:, 0] = i + 1
        np.minimum(row[:, :-1] + (one[:, i : i + 1] != two), row[:, 1:] + 1, out=best[:, 1:])
        # insertions: the least of best[k] + (j - k) over k up to j
        row = np.minimum.accumulate(best - columns, axis=1) + columns
        here = lengths_one == i + 1
        found[here] = np.take_along_axis(row[here], lengths_two[here][:, None], 1)[:, 0]
    return found


def _codes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(t) for t in texts], dtype=np.int64)
    table = np.zeros((len(texts), int(lengths.max(initial=0))), dtype=np.int32)
    for i, text in enumerate(texts):
        table[i, : len(text)] = np.frombuffer(text.encode("utf-32-le"), dtype=np.int32)
    return table, lengths


def nearest_word(text: str, lexicon: Sequence[str], keys: Sequence[str] | None = None) -> str:
    """The word of a lexicon with the least edit distance, the first of several; `keys` are what is compared instead of the words."""
    keys = lexicon if keys is None else keys
    if not len(lexicon):
        return text
    return lexicon[int(edit_distances([text] * len(keys), keys).argmin())]


def alphanumeric(text: str) -> str:
    """Digits and Latin letters alone, small: what the benchmarks of scene text compare."""
    return "".join(c for c in text if c in string.ascii_letters or c in string.digits).lower()


class WordScores:
    """Counts for the metrics above: `update` with texts, and `compute`."""

    def __init__(self, protocol: str = "alphanumeric", alphabet: Alphabet | None = None) -> None:
        self.protocol, self.alphabet = protocol, alphabet
        self.sums = torch.zeros(
            8, dtype=torch.float64
        )  # n, hits, all, exact, normalised, distance, characters, lexicon
        self.codes: dict[str, str] = {}

    def comparable(self, text: str) -> str:
        """A text as one character a symbol, by the protocol."""
        if self.alphabet is not None and self.alphabet.separator:
            return "".join(self.codes.setdefault(s, chr(0xF0000 + len(self.codes))) for s in self.alphabet.split(text))
        return alphanumeric(text) if self.protocol == "alphanumeric" else text

    def update(
        self, found: Sequence[str], truth: Sequence[str], lexicons: Sequence[Sequence[str]] | None = None
    ) -> None:
        self.sums[2] += len(truth)
        self.sums[3] += sum(f == t for f, t in zip(found, truth, strict=True))
        pairs = [(self.comparable(f), self.comparable(t)) for f, t in zip(found, truth, strict=True)]
        kept = [i for i, (_, t) in enumerate(pairs) if t or self.protocol == "exact"]
        if not kept:
            return
        one, two = [pairs[i][0] for i in kept], [pairs[i][1] for i in kept]
        distances = edit_distances(one, two)
        longest = [max(len(a), len(b), 1) for a, b in zip(one, two, strict=True)]
        self.sums[0] += len(kept)
        self.sums[1] += int((distances == 0).sum())
        self.sums[4] += float(sum(d / n for d, n in zip(distances.tolist(), longest, strict=True)))
        self.sums[5] += int(distances.sum())
        self.sums[6] += sum(map(len, two))
        if lexicons is not None:
            for i, a, b in zip(kept, one, two, strict=True):
                keys = [self.comparable(w) for w in lexicons[i]]
                self.sums[7] += nearest_word(a, keys) == b

    def compute(self, runtime: Runtime | None = None, lexicon: bool = False) -> dict[str, float]:
        sums = self.sums if runtime is None else runtime.mean(self.sums)
        n, hits, every, exact, normalised, distance, characters, nearest = sums.tolist()
        metrics = {
            "word_accuracy": hits / max(n, 1e-9),
            "exact_accuracy": exact / max(every, 1e-9),
            "one_minus_ned": 1 - normalised / max(n, 1e-9) if n else 0.0,
            "character_error_rate": distance / max(characters, 1e-9),
        }
        return metrics | ({"word_accuracy_lexicon": nearest / max(n, 1e-9)} if lexicon else {})
