"""What text recognisers share: alphabets, losses over sequences, and decoding, all for a whole batch at once.

One numbering of tokens everywhere, with K characters in the alphabet:

    0 … K-1   the characters          K+1   padding
    K         the end of a text       K+2   a character that the alphabet lacks
                                      K+3   the start of a text: only ever an input
A network uses as many as it needs. A network for CTC has K + 1 outputs, and its blank is K; one that decodes step by step has
K + 3 outputs and K + 4 inputs.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.errors import DataError, PaperZooError

END, PAD, UNKNOWN, START = 0, 1, 2, 3
"""What is added to the number of characters."""

ALPHABETS = {
    "digits": string.digits,
    "lowercase": string.digits + string.ascii_lowercase,  # the 36 of most benchmarks
    "cased": string.digits + string.ascii_letters,
    "symbols": string.digits + string.ascii_letters + string.punctuation,  # the 94 of ASTER
}


class Alphabet:
    """The characters of a language, or its symbols: texts to token numbers and back.

    Args:
        symbols: in the order of their numbers. Each is one character, unless there is a separator.
        separator: what stands between symbols of several characters ("" for characters; " " for "\\\\frac { 1 } { 2 }").

    Raises:
        PaperZooError: if a symbol occurs twice, or there is none.
    """

    def __init__(self, symbols: Sequence[str], separator: str = "") -> None:
        self.symbols, self.separator = list(symbols), separator
        if len(set(self.symbols)) < len(self.symbols) or not self.symbols:
            twice = next((s for s in self.symbols if self.symbols.count(s) > 1), None)
            raise PaperZooError(f"an alphabet lists each symbol once; {twice!r} is there twice" if twice else "an alphabet needs a symbol")  # fmt: skip
        self.numbers = {s: i for i, s in enumerate(self.symbols)}
        k = len(self.symbols)
        self.end, self.pad, self.unknown, self.start = k + END, k + PAD, k + UNKNOWN, k + START
        # texts of an alphabet without capitals are read in small letters
        self.folds = not separator and not any(s != s.lower() for s in self.symbols)

    def __len__(self) -> int:
        return len(self.symbols)

    def split(self, text: str) -> list[str]:
        """A text as its symbols; in small letters where the alphabet has no capitals."""
        if self.separator:
            return [s for s in text.split(self.separator) if s]
        return list(text.lower() if self.folds else text)

    def outside(self, text: str) -> list[str]:
        """The symbols of a text that the alphabet lacks, each once, in order."""
        return list(dict.fromkeys(s for s in self.split(text) if s not in self.numbers))

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts to int64 (B, T), each its characters, an end token and padding, and their lengths int64 (B,) without the end."""
        rows = [[self.numbers.get(s, self.unknown) for s in self.split(text)] for text in texts]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        width = max((len(row) for row in rows), default=0) + 1
        padded = [row + [self.end] + [self.pad] * (width - len(row) - 1) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width), lengths

    def decode(self, tokens: Tensor) -> list[str]:
        """Tokens int64 (B, T) to texts: up to the first end or padding; unknown ones are left out."""
        return [self.separator.join(self.symbols[i] for i in row) for row in self.readable(tokens)]

    def readable(self, tokens: Tensor) -> list[list[int]]:
        """For each row the numbers of its characters, as `decode` reads them."""
        rows = []
        for row in tokens.tolist():
            stop = next((t for t, i in enumerate(row) if i in (self.end, self.pad)), len(row))
            rows.append([i for i in row[:stop] if i < len(self.symbols)])
        return rows


def find_alphabet(name: str, texts: Callable[[], Sequence[str]] | None = None) -> Alphabet:
    """An alphabet by name: one of `ALPHABETS`; "data" for the characters of `texts()`; a file with one symbol a line.

    Raises:
        DataError: for a name that is none of these, or a file that cannot be read.
    """
    if name in ALPHABETS:
        return Alphabet(ALPHABETS[name])
    if name == "data":
        if texts is None:
            raise PaperZooError("alphabet 'data' needs texts to collect its characters from")
        return Alphabet(sorted({c for text in texts() for c in text}))
    path = Path(name).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join([*ALPHABETS, "data"])
        raise DataError(
            path, f"no readable alphabet ({error}); give {known}, or a file with one symbol a line"
        ) from None
    symbols = [line.removesuffix("\r") for line in lines]
    symbols = [s for s in symbols if s]
    return Alphabet(symbols, "" if all(len(s) == 1 for s in symbols) else " ")


# -- losses ------------------------------------------------------------------------------------------------------------


def sequence_cross_entropy(
    logits: Tensor, targets: Tensor, lengths: Tensor, mean: str = "samples", label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each text's characters and its end, padding left out.

    Args:
        logits: (B, T, C). targets: int64 (B, T'), T' up to T; only their first T are counted if T' is longer.
        lengths: int64 (B,), without the end.
        mean: "samples": summed over a text, averaged over texts; "tokens": averaged over all tokens.
    """
    steps = min(logits.shape[1], targets.shape[1])
    inside = torch.arange(steps, device=targets.device) <= lengths[:, None]
    losses = F.cross_entropy(
        logits[:, :steps].transpose(1, 2).float(), targets[:, :steps].where(inside, 0),
        reduction="none", label_smoothing=label_smoothing,
    )  # fmt: skip
    return (losses * inside).sum() / (inside.sum() if mean == "tokens" else len(targets))


def ctc_loss(logits: Tensor, targets: Tensor, lengths: Tensor, frames: Tensor | None = None) -> Tensor:
    """Connectionist temporal classification (Graves et al. 2006): -log P(text) over its length, averaged over texts.

    Args:
        logits: (B, T, K + 1), the blank last.
        targets, lengths: as `Alphabet.encode` gives them; the end tokens are not part of a text here.
        frames: int64 (B,), how many of the T frames of each sample count; all unless given. A text that needs more frames than
            there are has no alignment and is left out.
    """
    blank = logits.shape[2] - 1
    if frames is None:
        frames = torch.full_like(lengths, logits.shape[1])
    inside = torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]
    log_p = logits.float().log_softmax(2).transpose(0, 1)
    return F.ctc_loss(log_p, targets.where(inside, 0), frames, lengths, blank=blank, zero_infinity=True)


# -- connectionist temporal classification: decoding -------------------------------------------------------------------


def ctc_greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable symbol of each frame, repetitions joined, blanks left out.

    Returns:
        tokens int64 (B, T), filled up with the end token (the blank's number), and float32 (B, T): the probability of the
        first frame of each, 1 behind the end.
    """
    blank = logits.shape[2] - 1
    best, tokens = logits.float().softmax(2).max(2)
    before = F.pad(tokens[:, :-1], (1, 0), value=blank)
    kept = (tokens != blank) & (tokens != before)
    order = torch.argsort((~kept).to(torch.int8), dim=1, stable=True)  # those that are kept first, in order
    kept = kept.gather(1, order)
    return tokens.gather(1, order).where(kept, blank), best.gather(1, order).where(kept, 1.0)


@torch.no_grad()
def ctc_beam_search(logits: Tensor, beam_size: int = 10) -> tuple[Tensor, Tensor]:
    """Prefix beam search: the text with the largest probability summed over its alignments (Hannun et al. 2014, no language model).

    Args:
        logits: (B, T, K + 1), the blank last.

    Returns:
        tokens int64 (B, beam_size, T), best first, filled up with the blank's number, and log-probabilities (B, beam_size);
        a beam that does not exist has -inf.
    """
    log_p = logits.float().log_softmax(2)
    b, frames, width = log_p.shape
    k, blank = width - 1, width - 1
    prefix = torch.full((b, beam_size, frames), blank, device=logits.device)
    length = torch.zeros(b, beam_size, dtype=torch.int64, device=logits.device)
    ends_blank = torch.full((b, beam_size), -math.inf, device=logits.device)
    ends_blank[:, 0] = 0.0  # the empty text
    ends_symbol = torch.full_like(ends_blank, -math.inf)
    places = torch.arange(frames, device=logits.device)
    for t in range(frames):
        now = log_p[:, t]
        last = prefix.gather(2, (length - 1).clamp(min=0)[..., None])[..., 0]
        some = length > 0
        total = torch.logaddexp(ends_blank, ends_symbol)
        # the same text: a blank, or its last symbol once more
        repeat = now.gather(1, last).where(some, -math.inf)
        stay_blank, stay_symbol = total + now[:, None, blank], ends_symbol + repeat
        # one symbol more; a second time the same only behind a blank
        same = F.one_hot(last, width)[..., :k].bool() & some[..., None]
        longer = torch.where(same, ends_blank[..., None], total[..., None]) + now[:, None, :k]
        # a longer text that is in the beam already is counted there: j is i and its last symbol (beams of no text do not count)
        shorter = prefix.masked_fill(places == (length - 1)[..., None], blank)
        is_child = (prefix[:, :, None] == shorter[:, None]).all(3) & (length[:, :, None] + 1 == length[:, None])
        is_child &= ~total.isneginf()[:, None]
        joining = longer.gather(2, last.where(some, 0)[:, None].expand(-1, beam_size, -1)).where(is_child, -math.inf)
        stay_symbol = torch.logaddexp(stay_symbol, joining.logsumexp(1))
        taken = (F.one_hot(last.where(some, 0), width)[:, None, :, :k].bool() & is_child[..., None]).any(2)
        longer = longer.masked_fill(taken, -math.inf)
        every = torch.cat([torch.logaddexp(stay_blank, stay_symbol), longer.flatten(1)], 1)
        _, chosen = every.topk(beam_size, 1)
        stays = chosen < beam_size
        parent = torch.where(stays, chosen, (chosen - beam_size) // k)
        symbol = (chosen - beam_size) % k
        prefix = prefix.gather(1, parent[..., None].expand(-1, -1, frames))
        length = length.gather(1, parent)
        at_end = (places == length[..., None]) & ~stays[..., None]
        prefix = torch.where(at_end, symbol[..., None], prefix)
        ends_symbol = torch.where(stays, stay_symbol.gather(1, parent), longer.flatten(1).gather(1, (chosen - beam_size).clamp(min=0)))  # fmt: skip
        ends_blank = stay_blank.gather(1, parent).where(stays, -math.inf)
        length = length + (~stays).long()
    scores, order = torch.logaddexp(ends_blank, ends_symbol).sort(dim=1, descending=True)
    return prefix.gather(1, order[..., None].expand_as(prefix)), scores


# -- one symbol after the other ----------------------------------------------------------------------------------------

State = dict[str, Tensor]
Advance = Callable[[Tensor, State], tuple[Tensor, State]]
"""Feeds tokens int64 (B,): the logits (B, C) of what follows and the new state, a flat dict of tensors whose first axis is the batch."""


def greedy_steps(advance: Advance, state: State, start: Tensor, steps: int, end: int | None = None) -> Tensor:
    """The most probable symbol, fed back, again and again: logits (B, steps, C).

    The number of steps is fixed, so the loop unrolls and can be exported; what stands behind an end token has no meaning.

    Args:
        start: int64 (B,), the start tokens.
        end: stop, with fewer steps, when every row has come to this token; not for export.
    """
    tokens, found = start, []
    done = torch.zeros_like(start, dtype=torch.bool) if end is not None else None
    for _ in range(steps):
        logits, state = advance(tokens, state)
        found.append(logits)
        tokens = logits.argmax(1)
        if done is not None:
            done = done | (tokens == end)
            if bool(done.all()):
                break
    return torch.stack(found, 1)


def read_greedy(logits: Tensor, end: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, T, C) to what they say.

    Returns:
        tokens int64 (B, T), padded behind the end; the probability of each float32 (B, T), 1 behind the end; and the
        log-probability (B,) of the text with its end.
    """
    best, tokens = logits.float().log_softmax(2).max(2)
    behind = F.pad((tokens == end).long().cumsum(1)[:, :-1], (1, 0)) > 0
    best = best.masked_fill(behind, 0.0)
    return tokens.masked_fill(behind, pad), best.exp(), best.sum(1)


@torch.no_grad()
def beam_search_steps(
    advance: Advance, state: State, start: Tensor, steps: int, end: int, pad: int, beam_size: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """The `beam_size` best texts by their log-probability, without a length penalty. A text that has ended keeps its place.

    Args:
        start: int64 (B,), the start tokens.
        steps: the most tokens of a text, its end among them.

    Returns:
        tokens int64 (B, beam_size, T), best first, padded behind the end; the probability of each token, 1 behind the end; and
        log-probabilities (B, beam_size), -inf where there are fewer texts than beams. T is up to `steps`.
    """
    b, k, device = len(start), beam_size, start.device
    state = {name: value.repeat_interleave(k, 0) for name, value in state.items()}
    last = start.repeat_interleave(k)
    total = torch.full((b, k), -math.inf, device=device)
    total[:, 0] = 0.0  # the copies of the start are one text
    done = torch.zeros(b, k, dtype=torch.bool, device=device)
    tokens = torch.zeros(b, k, 0, dtype=torch.int64, device=device)
    each = torch.zeros(b, k, 0, device=device)
    rows = torch.arange(b, device=device)[:, None] * k
    for _ in range(steps):
        logits, state = advance(last, state)
        log_p = logits.float().log_softmax(1).view(b, k, -1)
        width = log_p.shape[2]
        # an ended text goes on in one way only, with padding that costs nothing
        idle = torch.full((width,), -math.inf, device=device)
        idle[end] = 0.0
        log_p = torch.where(done[..., None], idle, log_p)
        total, chosen = (total[..., None] + log_p).flatten(1).topk(k, 1)
        parent, symbol = chosen // width, chosen % width
        was_done = done.gather(1, parent)
        step = log_p.flatten(1).gather(1, chosen)
        keep = parent[..., None].expand(-1, -1, tokens.shape[2])
        tokens = torch.cat([tokens.gather(1, keep), symbol.masked_fill(was_done, pad)[..., None]], 2)
        each = torch.cat([each.gather(1, keep), step[..., None]], 2)
        done = was_done | (symbol == end)
        state = {name: value.index_select(0, (parent + rows).flatten()) for name, value in state.items()}
        last = symbol.flatten()
        if bool(done.all()):
            break
    return tokens, each.exp(), total
