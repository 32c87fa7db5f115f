"""Click-through tables larger than memory: categorical and dense columns from CSV, TSV, gzip and Parquet.

    open_table("clicks", "train")                       the embedded set, generated (data/clicks.py)
    open_table("log.csv", "train", label="clicked")     one file; a fixed tenth of its rows is "test", a tenth "validation"
    open_table("folder", "test")                        train.* and test.* (or train/ and test/ with many parts)
    open_table("train.txt", …)                          Criteo's display-advertising log: no header, 40 columns, tabs

The files are streamed twice, a block at a time. The first pass fits an `Encoding` on the training rows: vocabularies (or
hash buckets) of the categorical columns, statistics of the dense ones. The second writes every row, encoded, with a fixed
width, into a file in the cache folder, from which batches are read through a memory map. So any row can be read at any
time, and the order of batches is the runtime's index stream: a pure function of (seed, step). Memory is bounded by one block
and `max_values` texts a column.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.encoding import Encoding, Fit
from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName

SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz", ".parquet", ".pq")
SPLITS = ("train", "validation", "test")
BLOCK_BYTES = 4 << 20  # of CSV text
BLOCK_ROWS = 1 << 16  # of a Parquet file
SAMPLE_ROWS = 10_000  # read to tell numbers from categories
CRITEO = ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))
VERSION = 1  # of the cache's format


@dataclass(frozen=True)
class Layout:
    """How a table is read. Columns that are neither named nor of a clear type are an error, not a guess.

    Args:
        label: the column with 0 or 1 (false or true).
        dense: numeric columns; None: the columns that hold nothing but numbers and are not in `sparse`.
        sparse: categorical columns; None: all others.
        transform: what is done to dense values, see `Encoding`.
        min_count: a value seen less often than this in training counts as unknown.
        max_values: a column with more distinct values than this is hashed into as many buckets.
        hold_out: where no test file is given, which fifth of the rows is held out (half "validation", half "test"):
            "random" rows, or the "last" ones, as a log in the order of time needs.
        hold_out_share: how many rows are held out.
    """

    label: str = "label"
    dense: tuple[str, ...] | None = None
    sparse: tuple[str, ...] | None = None
    transform: Literal["log", "standard", "none"] = "log"
    min_count: int = 1
    max_values: int = 100_000
    hold_out: Literal["random", "last"] = "random"
    hold_out_share: float = 0.2


class Table(Dataset):
    """Encoded rows of one split. `table.rows(indices)` is a batch: dense (B, D), sparse (B, F), labels (B,).

    Args:
        records: the rows, or the memory-mapped file that holds them.
        encoding: what made them, and makes new rows for prediction.
        count: how many rows the file holds.
        probability: the true click probabilities, known only where the data was generated.
    """

    def __init__(
        self, records: np.ndarray | Path, encoding: Encoding, count: int, probability: np.ndarray | None = None
    ) -> None:
        self.source, self.encoding, self.count, self.probability = records, encoding, count, probability
        self._records: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_records": None}  # workers map the file themselves

    @property
    def records(self) -> np.ndarray:
        """All rows as a structured array; a memory map where they live in a file."""
        if self._records is None:
            if isinstance(self.source, np.ndarray):
                self._records = self.source
            elif self.count:
                self._records = np.memmap(self.source, self.encoding.row_type, "r", shape=(self.count,))
            else:
                self._records = np.empty(0, self.encoding.row_type)
        return self._records

    def rows(self, indices: Sequence[int] | Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Dense float32 (B, D), sparse int64 (B, F), labels float32 (B,) of some rows."""
        rows = self.records[indices.numpy() if isinstance(indices, Tensor) else indices]
        return (
            torch.from_numpy(np.array(rows["dense"])),
            torch.from_numpy(rows["sparse"].astype(np.int64)),
            torch.from_numpy(np.array(rows["label"])),
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(part[0] for part in self.rows(slice(index, index + 1)))


def open_table(data: str | Path, split: str = "train", **layout: Any) -> Table:
    """A split ("train", "validation" or "test") of a click-through table.

    Args:
        data: "clicks", "criteo" ($PAPERZOO_DATA/criteo/train.txt), a file, or a folder; see the module's docstring.
        split: which rows.
        layout: see `Layout`. Embedded sets take none.

    Raises:
        DataError: for a missing, empty or broken file, or a broken row: names the file, the row, the column.
        UnknownName: if `data` is neither a set's name nor a path, or the split does not exist.
        MissingExtra: without pyarrow.
    """
    if split not in SPLITS:
        raise UnknownName("split", split, SPLITS)
    if str(data) == "clicks":
        from paperzoo.data.clicks import clicks

        return clicks(split)
    if str(data) == "criteo":
        from paperzoo.data.images import data_folder

        data = data_folder() / "criteo" / "train.txt"
    path = Path(data).expanduser()
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise DataError(path, f"no such file or folder; tables end in {', '.join(SUFFIXES)}")
        raise UnknownName("data set or path", str(data), ["clicks", "criteo"])
    return converted(find_files(path), Layout(**layout))[split]


def find_files(path: Path) -> dict[str, list[Path]]:
    """The files of each split; a single file or a folder without train and test has one entry, "all"."""

    def parts(place: Path) -> list[Path]:
        if place.is_file():
            return [place]
        return sorted(p for p in place.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))

    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise DataError(path, f"not a table; tables end in {', '.join(SUFFIXES)}")
        return {"all": [path]}
    named: dict[str, list[Path]] = {}
    aliases = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
    for place in sorted(path.iterdir()):
        split = aliases.get(place.name.split(".")[0].lower())
        if split and parts(place) and (place.is_dir() or place.name.lower().endswith(SUFFIXES)):
            named.setdefault(split, []).extend(parts(place))
    if "train" in named and ("test" in named or "validation" in named):
        return named
    if not parts(path):
        raise DataError(path, f"no tables in this folder; tables end in {', '.join(SUFFIXES)}")
    return {"all": parts(path)}


# -- the one-time conversion ---------------------------------------------------------------------------------------------


def converted(files: dict[str, list[Path]], layout: Layout) -> dict[str, Table]:
    """The splits of a table from the cache, which is filled on the first call: atomically, by one process."""
    from filelock import FileLock

    from paperzoo.catalog.cards import cache_folder

    home = cache_folder() / "tables" / cache_key(files, layout)
    if not (home / "meta.json").is_file():
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{home}.lock"):  # the operating system lets go of it if the process dies
            if not (home / "meta.json").is_file():
                partial = home.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    convert(files, layout, partial)
                    os.replace(partial, home)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    meta = json.loads((home / "meta.json").read_text(encoding="utf-8"))
    encoding = Encoding.from_facts(meta["encoding"])
    return {split: Table(home / f"{split}.rows", encoding, meta["counts"][split]) for split in SPLITS}


def cache_key(files: dict[str, list[Path]], layout: Layout) -> str:
    """A name for what would be converted: changes with every file's time or size, and with the layout."""
    import hashlib

    stamps = [
        (split, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for split, paths in files.items()
        for file in paths
    ]
    options = [(f.name, getattr(layout, f.name)) for f in fields(layout)]
    return hashlib.blake2b(json.dumps([VERSION, stamps, options]).encode(), digest_size=12).hexdigest()


def convert(files: dict[str, list[Path]], layout: Layout, home: Path) -> Encoding:
    """Stream the files twice: fit the encoding on the training rows, then write all rows encoded. See the module."""
    everything = [(split, file) for split, paths in files.items() for file in paths]
    first = next((file for split, file in everything if split in ("train", "all")), everything[0][1])
    label, dense, sparse = choose_columns(first, layout)
    total = None
    if layout.hold_out == "last" and "all" in files:
        total = sum(count_rows(file) for file in files["all"])

    def blocks(what: str, wanted: set[str]) -> Iterator[tuple[Block, np.ndarray]]:
        """Every block of the wanted files with the split of each row, as an index into SPLITS."""
        place = 0
        with progress(what) as advance:
            for split, file in everything:
                if split not in wanted:
                    continue
                for block in read_blocks(file, (label, *dense, *sparse)):
                    n = block.columns.num_rows
                    if split == "all":
                        assigned = assign(np.arange(place, place + n), total, layout.hold_out_share)
                        place += n
                    else:
                        assigned = np.full(n, SPLITS.index(split))
                    advance(n)
                    yield block, assigned

    fit = Fit(label, dense, sparse, layout.transform, layout.min_count, layout.max_values)
    for block, assigned in blocks("reading", {"train", "all"}):
        fit.add(block, assigned == 0)
    if not fit.rows:
        raise DataError(first, "no training rows; a table needs a header and rows below it")
    encoding = fit.encoding()
    counts = dict.fromkeys(SPLITS, 0)
    out = {split: (home / f"{split}.rows").open("wb") for split in SPLITS}
    try:
        for block, assigned in blocks("encoding", set(files)):
            records = encoding.block(block)
            for i, split in enumerate(SPLITS):
                mine = records[assigned == i]
                out[split].write(mine.tobytes())
                counts[split] += len(mine)
    finally:
        for file in out.values():
            file.close()
    if "all" not in files and not counts["test"]:  # train and validation were given: the latter is what is tested on
        (home / "validation.rows").replace(home / "test.rows")
        (home / "validation.rows").touch()
        counts["test"], counts["validation"] = counts["validation"], 0
    meta = {"encoding": encoding.to_facts(), "counts": counts, "files": [str(f) for _, f in everything]}
    (home / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
    return encoding


def assign(places: np.ndarray, total: int | None, share: float) -> np.ndarray:
    """The split of each row by its number: 0 train, 1 validation, 2 test. With a total, the last rows are held out."""
    mixed = places.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    if total is None:
        held_out = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
    else:
        held_out = places >= round(total * (1 - share))
    return np.where(held_out, 1 + (mixed & np.uint64(1)).astype(np.int64), 0)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    with tqdm(desc=f"{what} rows", unit=" rows", unit_scale=True, delay=1, disable=None, leave=False) as bar:
        yield bar.update


# -- reading -------------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Some consecutive rows of a file. `first` is the number of the first: the line of a text file, the row of a Parquet file."""

    file: Path
    first: int
    columns: Any  # pyarrow.RecordBatch

    def fail(self, row: int, problem: str) -> DataError:
        return DataError(self.file, f"row {self.first + row}: {problem}")


def need_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtra("pyarrow", "tables", "reading tables") from None
    return pyarrow


def is_parquet(file: Path) -> bool:
    return file.name.lower().endswith((".parquet", ".pq"))


def header(file: Path) -> tuple[list[str], bool]:
    """The column names of a file, and whether its first line is the header (Criteo's files have none)."""
    if is_parquet(file):
        return open_parquet(file).schema_arrow.names, True
    import csv
    import gzip

    opener = gzip.open if file.name.lower().endswith(".gz") else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as text:
            names = next(csv.reader(text, delimiter=delimiter(file)), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(file, f"not a readable table ({error})") from None
    if not names:
        raise DataError(file, "the file is empty; a header line is needed")
    if len(names) in (len(CRITEO) - 1, len(CRITEO)) and names[0].lstrip("-").isdigit() and delimiter(file) == "\t":
        return list(CRITEO[-len(names) :]), False  # its test.txt has no labels
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(file, f"the header names '{repeated[0]}' twice")
    return names, True


def delimiter(file: Path) -> str:
    return "," if ".csv" in file.name.lower() else "\t"


def open_parquet(file: Path) -> Any:
    need_pyarrow()
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(file, f"not a readable Parquet file ({one_line(error)})") from None


def read_blocks(file: Path, names: Sequence[str]) -> Iterator[Block]:
    """The named columns of a file, block by block: texts from a text file, their own types from Parquet."""
    pyarrow = need_pyarrow()
    present, has_header = header(file)
    missing = [name for name in names if name not in present]
    if missing:
        raise DataError(file, f"no column '{missing[0]}'; the columns are {', '.join(present[:50])}")
    row = 1
    broken: list[str] = []  # rows with too few or too many columns
    try:
        if is_parquet(file):
            for batch in open_parquet(file).iter_batches(BLOCK_ROWS, columns=list(names), use_threads=False):
                yield Block(file, row, batch)
                row += batch.num_rows
            return
        row = 2 if has_header else 1
        for batch in open_csv(file, names, present, has_header, broken):
            yield Block(file, row, batch)
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        problem = broken[0] if broken else f"cannot be read after row {row - 1} ({one_line(error)})"
        raise DataError(file, problem) from None


def open_csv(file: Path, names: Sequence[str], present: list[str], has_header: bool, broken: list[str]) -> Any:
    from pyarrow import csv, string

    def note(row: Any) -> str:
        text = row.text if len(row.text) < 80 else row.text[:77] + "…"
        broken.append(f"row {row.number}: {row.actual_columns} columns instead of {row.expected_columns}: {text}")
        return "error"

    return csv.open_csv(
        file,
        read_options=csv.ReadOptions(
            use_threads=False,  # else rows have no numbers in errors
            block_size=BLOCK_BYTES,
            column_names=present,
            skip_rows=int(has_header),
        ),
        parse_options=csv.ParseOptions(delimiter=delimiter(file), invalid_row_handler=note),
        convert_options=csv.ConvertOptions(
            include_columns=list(names),
            column_types=dict.fromkeys(names, string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        ),
    )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def count_rows(file: Path) -> int:
    if is_parquet(file):
        return open_parquet(file).metadata.num_rows
    names, _ = header(file)
    return sum(block.columns.num_rows for block in read_blocks(file, names[:1]))


def choose_columns(file: Path, layout: Layout) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(label, dense columns, sparse columns), from the layout and the first rows of a file."""
    present, _ = header(file)
    named = [layout.label, *(layout.dense or ()), *(layout.sparse or ())]
    for name in named:
        if name not in present:
            raise DataError(file, f"no column '{name}'; the columns are {', '.join(present[:50])}")
    if len(set(named)) < len(named):
        raise PaperZooError(f"label, dense and sparse name the column '{max(named, key=named.count)}' twice")
    rest = [name for name in present if name not in named]
    dense, sparse = layout.dense, layout.sparse
    if tuple(present) == CRITEO and dense is None and sparse is None:
        dense, sparse = CRITEO[1:14], CRITEO[14:]
    elif dense is None and sparse is None:
        numeric = numeric_columns(file, rest)
        dense, sparse = tuple(n for n in rest if n in numeric), tuple(n for n in rest if n not in numeric)
    elif dense is None:
        dense = tuple(n for n in rest if n in numeric_columns(file, rest))
    elif sparse is None:
        sparse = tuple(rest)
    if not dense and not sparse:
        raise DataError(file, f"no feature columns beside the label '{layout.label}'")
    return layout.label, tuple(dense), tuple(sparse)


def numeric_columns(file: Path, names: list[str]) -> set[str]:
    """Which columns hold nothing but numbers (and gaps) in the first rows."""
    from paperzoo.data.encoding import is_number

    block = next(read_blocks(file, names), None)
    if block is None:
        raise DataError(file, "no rows below the header")
    head = block.columns.slice(0, SAMPLE_ROWS)
    return {name for name in names if is_number(head.column(name))}


def read_rows(source: str | Path, encoding: Encoding) -> Iterator[tuple[Tensor, Tensor]]:
    """A table without (or with) labels for prediction, block by block: dense (n, D), sparse (n, F)."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(path, f"no such file; tables end in {', '.join(SUFFIXES)}")
    for block in read_blocks(path, (*encoding.dense, *encoding.sparse)):
        records = encoding.block(block, labelled=False)
        yield torch.from_numpy(np.array(records["dense"])), torch.from_numpy(records["sparse"].astype(np.int64))


def mapping_rows(rows: Sequence[Mapping[str, Any]], encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Rows given as dicts {column: value} for prediction: dense (n, D), sparse (n, F). Columns left out are missing."""
    records = encoding.mappings(rows)
    return torch.from_numpy(np.array(records["dense"])), torch.from_numpy(records["sparse"].astype(np.int64))
