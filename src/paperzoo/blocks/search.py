"""Nearest neighbours: exact search by inner product, cosine, Euclidean or Hamming distance, here or by FAISS.

    index = Index(gallery, "hamming")                 # or backend="faiss", if that is installed
    distances, rows = index.search(queries, 10)       # (Q, 10) each, nearest first

Whatever the metric, a smaller distance is nearer, and equal distances are in the order of the gallery's rows: the answer
is one, whichever way it is found and however the work is cut into chunks.

Binary codes are the signs of real numbers, packed into 64-bit words (`pack_bits`): 100,000 codes of 64 bits are 0.8 MB, and
a query is compared with all of them by one exclusive or and one count of bits a word.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.errors import MissingExtra, PaperZooError

Metric = Literal["inner", "cosine", "l2", "hamming"]
Backend = Literal["exact", "faiss"]

METRICS = ("inner", "cosine", "l2", "hamming")
WORD = 64  # bits
ENTRIES = 2**24  # distances that are held at a time: 64 MiB in float32


# -- bits --------------------------------------------------------------------------------------------------------------


def pack_bits(codes: Tensor) -> Tensor:
    """The signs of real numbers, packed: (N, D) -> int64 (N, ceil(D / 64)). A bit is set where the number is above zero.

    Bit j of word w is column 64 w + j; what is left of the last word is zero.
    """
    count, bits = codes.shape
    words = -(-bits // WORD)
    padded = torch.zeros(count, words * WORD, dtype=torch.int64, device=codes.device)
    padded[:, :bits] = codes > 0
    weights = torch.bitwise_left_shift(torch.ones((), dtype=torch.int64), torch.arange(WORD)).to(codes.device)
    return (padded.view(count, words, WORD) * weights).sum(2)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`: int64 (N, words) -> float32 (N, bits) of -1 and 1."""
    places = torch.arange(WORD, device=packed.device)
    on = torch.bitwise_right_shift(packed[:, :, None], places) & 1
    return on.flatten(1)[:, :bits].float() * 2 - 1


def count_bits(words: Tensor) -> Tensor:
    """How many bits of each 64-bit word are set: int64 of any shape -> int64.

    On the CPU NumPy's bitwise_count, where it has one (2.0), which is one instruction a word; else sums of neighbouring
    bits, pairs, nibbles, bytes.
    """
    if words.device.type == "cpu" and hasattr(np, "bitwise_count"):
        return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint64))).long()
    x = words - (torch.bitwise_right_shift(words, 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + (torch.bitwise_right_shift(x, 2) & 0x3333333333333333)
    x = (x + torch.bitwise_right_shift(x, 4)) & 0x0F0F0F0F0F0F0F0F
    return torch.bitwise_right_shift(x * 0x0101010101010101, 56) & 0x7F


def hamming_distances(a: Tensor, b: Tensor) -> Tensor:
    """In how many bits packed codes differ: int64 (Q, W), (N, W) -> int16 (Q, N)."""
    if a.device.type != "cpu" or not hasattr(np, "bitwise_count"):
        return sum(count_bits(a[:, None, w] ^ b[None, :, w]) for w in range(a.shape[1])).to(torch.int16)
    queries, columns = a.numpy().view(np.uint64), np.ascontiguousarray(b.numpy().view(np.uint64).T)
    total = np.zeros((len(a), len(b)), dtype=np.int16)
    for query, row in zip(queries, total, strict=True):  # one at a time: what lies between stays in the cache
        for word, column in zip(query, columns, strict=True):
            row += np.bitwise_count(column ^ word)
    return torch.from_numpy(total)


# -- the nearest -------------------------------------------------------------------------------------------------------


def nearest(found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, smallest first, equal ones by their column: (Q, N) -> values (Q, k), int64 columns (Q, k).

    `torch.topk` leaves the order of equal values open, and which of them are among the k. NaN counts as infinite.
    """
    if found.is_floating_point():
        found = found.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    k = min(k, found.shape[1])
    if 4 * k >= found.shape[1] or not len(found):
        values, columns = found.sort(dim=1, stable=True)
        return values[:, :k], columns[:, :k]
    border = found.topk(k, dim=1, largest=False).values[:, -1:]
    rows, columns = (found <= border).nonzero(as_tuple=True)  # k of each row, or more where they are equal; by column
    counts = torch.bincount(rows, minlength=len(found))
    values = found[rows, columns]
    order = values.sort(stable=True).indices
    order = order[rows[order].sort(stable=True).indices]  # by row, then value, then column
    first = (counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=found.device)
    return values[order][first], columns[order][first]


def in_order(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours (Q, k) by value, equal ones by column."""
    columns, order = columns.sort(dim=1)
    values, again = values.gather(1, order).sort(dim=1, stable=True)
    return values, columns.gather(1, again)


# -- the index ---------------------------------------------------------------------------------------------------------


class Index:
    """A gallery that can be searched, exactly.

    Args:
        codes: (N, D); for "hamming" their signs count. N may be 0.
        metric: "inner" is the inner product, negated; "cosine" one minus the cosine; "l2" the Euclidean distance; "hamming"
            the number of signs that differ, int16.
        backend: "exact" is this file, on the codes' device; "faiss" the library FAISS, on the CPU, with all its threads.

    Raises:
        PaperZooError: for an unknown metric or backend.
        MissingExtra: for FAISS where it is not installed.
    """

    def __init__(self, codes: Tensor, metric: Metric = "cosine", backend: Backend = "exact") -> None:
        if metric not in METRICS:
            raise PaperZooError(f"metric '{metric}' is not known; it is one of {', '.join(METRICS)}")
        if backend not in ("exact", "faiss"):
            raise PaperZooError(f"search backend '{backend}' is not known; it is exact or faiss")
        self.metric, self.backend = metric, backend
        self.size, self.width = codes.shape
        self.codes = prepared(codes.detach(), metric)
        self.index: Any = None
        if backend == "faiss":
            faiss = library()
            if metric == "hamming":
                self.index = faiss.IndexBinaryFlat(self.codes.shape[1] * WORD)
            else:
                self.index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(self.width)
            self.index.add(for_faiss(self.codes))

    def __len__(self) -> int:
        return self.size

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of each query, nearest first: (Q, D) -> distances (Q, k), rows int64 (Q, k). k is cut to the gallery's size."""
        if queries.shape[1] != self.width:
            raise PaperZooError(
                f"queries have {queries.shape[1]} columns, the gallery has {self.width}: they come from different networks"
            )
        k = min(k, self.size)
        queries = prepared(queries.detach(), self.metric)
        if self.index is not None:
            return self.search_faiss(queries, k)
        kind = torch.int16 if self.metric == "hamming" else queries.dtype
        found = queries.new_empty(len(queries), k, dtype=kind)
        rows = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        step = max(1, ENTRIES // max(1, self.size))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            found[part], rows[part] = nearest(self.between(queries[part]), k)
        return found, rows

    def distances(self, queries: Tensor) -> Tensor:
        """Of queries (Q, D) to the whole gallery: (Q, N)."""
        return self.between(prepared(queries.detach(), self.metric))

    def between(self, prepared_queries: Tensor) -> Tensor:
        """The distances of prepared queries to the whole gallery: (q, N)."""
        if self.metric == "hamming":
            return hamming_distances(prepared_queries, self.codes)
        if self.metric == "l2":
            return torch.cdist(prepared_queries, self.codes)
        product = prepared_queries @ self.codes.T
        return 1 - product if self.metric == "cosine" else -product

    def search_faiss(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not len(queries) or not k:
            return torch.zeros(len(queries), k), torch.zeros(len(queries), k, dtype=torch.int64)
        found, rows = (torch.from_numpy(array) for array in self.index.search(for_faiss(queries), k))
        if self.metric == "hamming":
            found = found.to(torch.int16)
        elif self.metric == "l2":  # FAISS gives squares
            found = found.clamp(min=0).sqrt()
        else:
            found = 1 - found if self.metric == "cosine" else -found
        found, rows = in_order(found, rows)
        return found.to(queries.device), rows.to(queries.device)


def prepared(codes: Tensor, metric: Metric) -> Tensor:
    """Codes as they are compared: packed for "hamming", of length one for "cosine"."""
    if metric == "hamming":
        return pack_bits(codes)
    return F.normalize(codes.float(), dim=1) if metric == "cosine" else codes.float()


def for_faiss(codes: Tensor) -> np.ndarray:
    array = codes.cpu().contiguous().numpy()
    return array.view(np.uint8) if array.dtype == np.int64 else array


def library() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtra("faiss-cpu", "retrieval", "searching with FAISS") from None
    return faiss
