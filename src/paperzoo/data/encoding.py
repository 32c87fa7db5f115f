"""How a table's values become numbers: vocabularies or hash buckets for categories, transforms for dense values.

An `Encoding` is fitted in one pass over blocks of rows (`Fit`), lives as plain JSON values in a recipe's facts, and encodes
training blocks and a user's rows alike.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from paperzoo.errors import PaperZooError

if TYPE_CHECKING:
    from paperzoo.data.tables import Block

UNKNOWN, MISSING, FIRST = 0, 1, 2  # ids: rare or never seen; no value; the first value of the vocabulary
GAPS = {"", "na", "n/a", "nan", "null", "none", "\\n", "-nan"}  # texts that mean "no value" in a dense column


@dataclass(frozen=True)
class Encoding:
    """What a table's columns are and how their values become numbers.

    Args:
        label, dense, sparse: column names.
        transform: for dense values. "log": log(x - min + 1), which on Criteo is the usual log(x + 1), and log(x + 4) for
            its second column; smaller values than any in training count as the minimum. "standard": zero mean and unit
            deviation. "none". A missing value becomes 0, for all three.
        statistics: column -> {"min", "mean", "deviation"} over the training rows.
        vocabulary: column -> its values, most frequent first, or the number of hash buckets.
    """

    label: str
    dense: tuple[str, ...]
    sparse: tuple[str, ...]
    transform: str
    statistics: dict[str, dict[str, float]]
    vocabulary: dict[str, list[str] | int]

    def to_facts(self) -> dict:
        """Plain JSON values, for a recipe's facts."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"dense": list(self.dense), "sparse": list(self.sparse)}

    @classmethod
    def from_facts(cls, facts: dict) -> Encoding:
        return cls(**facts | {"dense": tuple(facts["dense"]), "sparse": tuple(facts["sparse"])})

    @property
    def field_sizes(self) -> tuple[int, ...]:
        """How many ids each categorical column has, unknown and missing included."""
        sizes = [self.vocabulary[name] for name in self.sparse]
        return tuple(FIRST + (size if isinstance(size, int) else len(size)) for size in sizes)

    @property
    def row_type(self) -> np.dtype:
        """One encoded row: label float32, dense float32 (D,), sparse int32 (F,)."""
        return np.dtype(
            [
                ("label", np.float32),
                ("dense", np.float32, (len(self.dense),)),
                ("sparse", np.int32, (len(self.sparse),)),
            ]
        )

    @cached_property
    def ids(self) -> dict[str, dict[str, int]]:
        """Value -> id, for the columns that have a vocabulary."""
        tables = {name: values for name, values in self.vocabulary.items() if not isinstance(values, int)}
        return {name: {value: i for i, value in enumerate(values, FIRST)} for name, values in tables.items()}

    def id_of(self, name: str, value: str) -> int:
        """The id of a value that is there."""
        size = self.vocabulary[name]
        if isinstance(size, int):
            return FIRST + zlib.crc32(f"{name}={value}".encode()) % size
        return self.ids[name].get(value, UNKNOWN)

    def value_of(self, name: str, number: int) -> str | None:
        """The value behind an id; None for unknown, missing and hashed values."""
        values = self.vocabulary[name]
        return None if number < FIRST or isinstance(values, int) else values[number - FIRST]

    def original(self, name: str, value: float) -> float:
        """The dense value behind a transformed one, to six digits."""
        known = self.statistics[name]
        if self.transform == "log":
            value = math.expm1(value) + known["min"]
        elif self.transform == "standard":
            value = value * (known["deviation"] or 1.0) + known["mean"]
        return float(f"{value:.6g}")

    def transformed(self, name: str, values: np.ndarray) -> np.ndarray:
        """Float64 dense values of a column, NaN where missing, as the float32 that a network sees."""
        known = self.statistics[name]
        if self.transform == "log":
            values = np.log1p(np.maximum(values - known["min"], 0.0))
        elif self.transform == "standard":
            values = (values - known["mean"]) / (known["deviation"] or 1.0)
        return np.nan_to_num(values, nan=0.0).astype(np.float32)

    def block(self, block: Block, labelled: bool = True) -> np.ndarray:
        """The rows of a block, encoded; a structured array of `row_type`."""
        records = np.zeros(block.columns.num_rows, self.row_type)
        if labelled:
            records["label"] = labels(block, self.label)
        for i, name in enumerate(self.dense):
            records["dense"][:, i] = self.transformed(name, numbers(block, name))
        for i, name in enumerate(self.sparse):
            coded = texts(block, name).dictionary_encode()
            table = np.array([*(self.id_of(name, v) for v in coded.dictionary.to_pylist()), MISSING], np.int32)
            # a gap has no code: it takes the last entry of the table
            records["sparse"][:, i] = table[coded.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)]
        return records

    def mappings(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Rows given as {column: value}, encoded, labels 0. Columns left out are missing values.

        Raises:
            PaperZooError: for a column that the table does not have, or a dense value that is no number.
        """
        records = np.zeros(len(rows), self.row_type)
        known = {self.label, *self.dense, *self.sparse}
        for n, row in enumerate(rows):
            unknown = sorted(set(row) - known)
            if unknown:
                columns = ", ".join([*self.dense, *self.sparse])
                raise PaperZooError(
                    f"row {n}: no column '{unknown[0]}' in this model's table; its columns are {columns}"
                )
            for i, name in enumerate(self.dense):
                number = to_number(row.get(name))
                if number is None:
                    raise PaperZooError(f"row {n}: '{row[name]}' in the column '{name}' is no finite number")
                records["dense"][n, i] = self.transformed(name, np.array([number]))[0]
            for i, name in enumerate(self.sparse):
                text = to_text(row.get(name))
                records["sparse"][n, i] = MISSING if text is None else self.id_of(name, text)
        return records


class Fit:
    """One pass over blocks of rows; `encoding()` is the result. Memory: at most `max_values` texts a column."""

    def __init__(
        self, label: str, dense: Sequence[str], sparse: Sequence[str], transform: str, min_count: int, max_values: int
    ) -> None:
        self.label, self.dense, self.sparse, self.transform = label, tuple(dense), tuple(sparse), transform
        self.min_count, self.max_values = min_count, max_values
        self.rows = 0
        self.moments = {name: Moments() for name in self.dense}
        self.counts: dict[str, Counter | None] = {name: Counter() for name in self.sparse}  # None: hashed

    def add(self, block: Block, chosen: np.ndarray) -> None:
        """Take in the chosen rows of a block (a boolean for each)."""
        import pyarrow

        self.rows += int(chosen.sum())
        for name in self.dense:
            self.moments[name].add(numbers(block, name)[chosen])
        for name in self.sparse:
            counts = self.counts[name]
            if counts is None:
                continue
            found = texts(block, name).filter(pyarrow.array(chosen)).drop_null().value_counts()
            for value, count in zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True):
                counts[value] += count
            if len(counts) > self.max_values:
                self.counts[name] = None

    def encoding(self) -> Encoding:
        vocabulary: dict[str, list[str] | int] = {}
        for name, counts in self.counts.items():
            if counts is None:
                vocabulary[name] = self.max_values
                continue
            ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            vocabulary[name] = [value for value, count in ranked if count >= self.min_count]
        statistics = {name: moments.result() for name, moments in self.moments.items()}
        return Encoding(self.label, self.dense, self.sparse, self.transform, statistics, vocabulary)


class Moments:
    """Minimum, mean and deviation of a stream, merged block by block (Chan, Golub and LeVeque)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares, self.min = 0, 0.0, 0.0, math.inf

    def add(self, values: np.ndarray) -> None:
        values = values[~np.isnan(values)]
        if not len(values):
            return
        n, mean = len(values), float(values.mean())
        total, shift = self.count + n, mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + shift * shift * self.count * n / total
        self.mean += shift * n / total
        self.count, self.min = total, min(self.min, float(values.min()))

    def result(self) -> dict[str, float]:
        if not self.count:
            return {"min": 0.0, "mean": 0.0, "deviation": 0.0}
        return {"min": self.min, "mean": self.mean, "deviation": math.sqrt(self.squares / self.count)}


# -- the columns of a block ----------------------------------------------------------------------------------------------


def numbers(block: Block, name: str) -> np.ndarray:
    """A dense column as float64, NaN where there is no value.

    Raises:
        DataError: with file, row and column, for a text that is no number and for infinity.
    """
    import pyarrow

    column = block.columns.column(name)
    try:
        values = column.cast(pyarrow.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    except pyarrow.ArrowException:  # spaces, texts for "no value", or a broken value: look at each
        values = np.empty(len(column))
        for i, value in enumerate(column.to_pylist()):
            number = to_number(value)
            if number is None:
                raise block.fail(i, f"'{value}' in the dense column '{name}' is no finite number") from None
            values[i] = number
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        raise block.fail(int(infinite[0]), f"the dense column '{name}' holds an infinite value")
    return values


def texts(block: Block, name: str) -> Any:
    """A categorical column as a pyarrow array of strings, null where there is no value."""
    import pyarrow

    column = block.columns.column(name)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_nested(column.type):
        raise block.fail(0, f"the column '{name}' holds lists or structures; one value a row is needed")
    if not pyarrow.types.is_string(column.type):
        try:
            column = column.cast(pyarrow.string())
        except pyarrow.ArrowException:
            raise block.fail(0, f"the column '{name}' of type {column.type} cannot be read as categories") from None
    return column


def labels(block: Block, name: str) -> np.ndarray:
    """The label column as float32 zeros and ones.

    Raises:
        DataError: with file and row, for anything else.
    """
    column = texts(block, name).dictionary_encode()
    known = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
    table = np.array([*(known.get(v.strip().lower(), math.nan) for v in column.dictionary.to_pylist()), math.nan])
    values = table[column.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)]
    wrong = np.flatnonzero(np.isnan(values))
    if len(wrong):
        value = block.columns.column(name)[int(wrong[0])].as_py()
        shown = "empty" if value is None else f"'{value}'"
        raise block.fail(int(wrong[0]), f"the label column '{name}' is {shown}; it must be 0 or 1")
    return values.astype(np.float32)


def is_number(column: Any) -> bool:
    """Whether a column holds nothing but numbers and gaps, and at least one number."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind):
        return True
    if not pyarrow.types.is_string(kind):
        return False
    seen = [to_number(value) for value in column.to_pylist()]
    return None not in seen and any(not math.isnan(number) for number in seen)


def to_number(value: Any) -> float | None:
    """A float; NaN for a gap; None for what is no finite number."""
    if value is None:
        return math.nan
    if isinstance(value, str) and value.strip().lower() in GAPS:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isinf(number) else number


def to_text(value: Any) -> str | None:
    """A category as the text it has in a table; None for a gap."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)
