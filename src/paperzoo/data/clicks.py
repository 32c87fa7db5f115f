"""The embedded click log: generated, so the true probability of every click, and with it the best possible AUC, is known.

Every value of every categorical column has a hidden number of its own (zero mean, unit variance), every dense column is
a standard normal number. The log-odds of a click are a polynomial of degree three in these eleven numbers: two
products of two columns, twenty of three, and two weak single effects. So each column alone says nearly nothing, and
products of columns nearly everything. The paper on DCN V2 studies such polynomials (its section on synthetic data).
"""

from __future__ import annotations

import functools

import numpy as np

from paperzoo.data.encoding import FIRST, Encoding
from paperzoo.data.tables import Table

SPARSE = ("country", "device", "hour", "site", "section", "advertiser", "campaign", "creative")
DENSE = ("relevance", "price", "age_of_ad")
VALUES = 30  # of each categorical column
PAIRS, TRIPLES = 2, 20  # products of two and of three columns in the log-odds
STRENGTH, OFFSET, SINGLE = 4.0, -1.0, 0.2
SIZES = {"train": 307_200, "validation": 20_000, "test": 30_000}


@functools.cache
def process() -> tuple[np.ndarray, list[tuple[float, tuple[int, ...]]]]:
    """The hidden numbers (columns, values), and the log-odds' terms: (weight, columns multiplied)."""
    generator = np.random.default_rng(2008)
    hidden = generator.normal(size=(len(SPARSE), VALUES))
    hidden = (hidden - hidden.mean(1, keepdims=True)) / hidden.std(1, keepdims=True)
    columns = len(SPARSE) + len(DENSE)
    size = STRENGTH / (PAIRS + TRIPLES) ** 0.5
    terms = [(SINGLE, (0,)), (SINGLE, (columns - 1,))]
    for count, degree in ((PAIRS, 2), (TRIPLES, 3)):
        for _ in range(count):
            chosen = tuple(int(i) for i in generator.choice(columns, degree, replace=False))
            terms.append((size * float(generator.choice([-1.0, 1.0])), chosen))
    return hidden, terms


@functools.cache
def clicks(split: str = "train") -> Table:
    """A split of the generated log; `table.probability` holds the true probability of every row's click."""
    hidden, terms = process()
    n = SIZES[split]
    generator = np.random.default_rng([13535, list(SIZES).index(split)])
    codes = generator.integers(0, VALUES, size=(n, len(SPARSE)))
    dense = generator.normal(size=(n, len(DENSE))).round(3)
    effects = [hidden[i, codes[:, i]] for i in range(len(SPARSE))] + list(dense.T)
    odds = OFFSET + sum(weight * np.prod([effects[i] for i in chosen], axis=0) for weight, chosen in terms)
    probability = 1 / (1 + np.exp(-odds))
    table = encoding()
    records = np.zeros(n, table.row_type)
    records["dense"], records["sparse"] = dense, codes + FIRST
    records["label"] = generator.random(n) < probability
    return Table(records, table, n, probability)


@functools.cache
def encoding() -> Encoding:
    """The log's columns: every value is known, dense values stay as they are."""
    statistics = {name: {"min": -5.0, "mean": 0.0, "deviation": 1.0} for name in DENSE}
    vocabulary: dict[str, list[str] | int] = {name: [f"{name}_{i:02d}" for i in range(VALUES)] for name in SPARSE}
    return Encoding("click", DENSE, SPARSE, "none", statistics, vocabulary)
