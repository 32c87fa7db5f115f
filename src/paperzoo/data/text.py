"""Text as the field keeps it: labelled texts, line-aligned parallel texts, plain documents; and tokenizers.

    open_labelled_text(name or path, split)    -> LabelledText      for classification of one text or of a pair
    open_parallel_text(name or path, split)    -> ParallelText      for translation
    open_documents(name or path, split)        -> Documents         for masked language modelling
    TextTokenizer.train(texts, "bpe")          -> TextTokenizer     BPE, WordPiece or unigram, by the library `tokenizers`

A path without separate files for training and testing is split by row: every tenth row is for testing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy

from paperzoo.data import embedded_text
from paperzoo.errors import DataError, MissingExtra, PaperZooError

TEXT_COLUMNS = ("text", "sentence", "sentence1", "question1", "question", "premise", "content", "review")
SECOND_COLUMNS = ("text2", "second", "sentence2", "question2", "hypothesis")
LABEL_COLUMNS = ("label", "class", "category", "target", "is_duplicate", "gold_label")
TABLES = (".csv", ".tsv", ".jsonl")
SPLITS = {"train": ("train",), "test": ("test", "dev", "valid", "validation", "val")}
HELD_OUT = 10  # one row in so many is for testing where the data have no split of their own


# -- files -----------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without line ends. Only a line feed ends a line, so that aligned files stay aligned.

    Raises:
        DataError: if the file is not there or not UTF-8; names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}", "is not UTF-8; convert the file, for example with iconv -t utf-8") from None
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def split_file(folder: Path, split: str, endings: Iterable[str]) -> Path | None:
    """The file of a split in a folder: train.csv, or test.csv, else dev.csv, …"""
    for stem in SPLITS.get(split, (split,)):
        for ending in endings:
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    return None


def held_out(count: int, split: str) -> list[int]:
    """The rows of a split where the data have none: every tenth is for testing, the others for training."""
    return [i for i in range(count) if (i % HELD_OUT == HELD_OUT - 1) == (split != "train")]


def existing(name: str, known: Iterable[str], what: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(name, f"is neither a file or folder nor an embedded set of {what} ({', '.join(known)})")
    return path


# -- labelled text ---------------------------------------------------------------------------------------------------


@dataclass
class LabelledText:
    """Texts with a class each. Item: (text, or a pair of texts; int class). `labels` are the names of the classes."""

    texts: list[str]
    targets: list[int]
    labels: list[str]
    seconds: list[str] | None = None  # the second text of each pair

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> tuple[str | tuple[str, str], int]:
        text = self.texts[i] if self.seconds is None else (self.texts[i], self.seconds[i])
        return text, self.targets[i]


@dataclass
class Row:
    """A text as it was found: where it stands, the text or texts, the name of its class."""

    place: str
    text: str
    second: str | None
    label: str


def open_labelled_text(name: str, split: str = "train", labels: list[str] | None = None) -> LabelledText:
    """Labelled texts from an embedded set ("python_docs") or from a path.

    A path is a table (.csv or .tsv with a header, .jsonl) with a text and a label column and perhaps a second text; a
    folder with train and test (or dev) tables; a folder of <class>/*.txt; or one with train/ and test/ of such folders.

    Args:
        split: "train" or "test".
        labels: the classes that are known already, in order. None: those of the training split, sorted.

    Raises:
        DataError: names the file, and the line where there is one.
    """
    if name in embedded_text.LABELLED:
        rows = [Row(name, text, None, label) for text, label in embedded_text.LABELLED[name](split)]
    else:
        rows = labelled_rows(existing(name, embedded_text.LABELLED, "labelled text"), split)
    if not rows:
        raise DataError(name, f"holds no labelled text for the split '{split}'")
    if labels is None:
        known = split == "train"
        labels = sort_labels({row.label for row in rows}) if known else open_labelled_text(name, "train").labels
    number = {label: i for i, label in enumerate(labels)}
    for row in rows:
        if row.label not in number:
            raise DataError(row.place, f"the label '{row.label}' is none of the known ones ({', '.join(labels[:12])})")
    pairs = [row.second for row in rows]
    if any(second is None for second in pairs) and any(second is not None for second in pairs):
        raise DataError(name, "some rows have a second text and some have not; give all or none")
    return LabelledText(
        [row.text for row in rows], [number[row.label] for row in rows], labels, None if pairs[0] is None else pairs
    )


def sort_labels(labels: set[str]) -> list[str]:
    """By number where all are numbers, else by name."""
    return sorted(labels, key=int) if all(label.lstrip("-").isdigit() for label in labels) else sorted(labels)


def labelled_rows(path: Path, split: str) -> list[Row]:
    if path.is_file():
        rows = list(read_table(path))
        return [rows[i] for i in held_out(len(rows), split)]
    table = split_file(path, split, TABLES)
    if table is not None:
        return list(read_table(table))
    for stem in SPLITS.get(split, (split,)):
        if (path / stem).is_dir():
            return list(read_class_folders(path / stem))
    rows = list(read_class_folders(path))
    return [rows[i] for i in held_out(len(rows), split)]


def read_class_folders(folder: Path) -> Iterator[Row]:
    """<class>/*.txt, one text a file."""
    found = False
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        for file in sorted(sub.glob("*.txt")):
            found = True
            yield Row(str(file), "\n".join(read_lines(file)), None, sub.name)
    if not found:
        raise DataError(folder, "holds neither train.csv, train.tsv or train.jsonl nor folders <class>/*.txt")


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a .csv, .tsv or .jsonl file; columns are found by their usual names."""
    if path.suffix not in TABLES:
        raise DataError(path, f"is not a table; the ending must be one of {', '.join(TABLES)}")
    columns: tuple[str, str | None, str] | None = None
    for line, row in json_rows(path) if path.suffix == ".jsonl" else csv_rows(path):
        place = f"{path}:{line}"
        if columns is None or path.suffix == ".jsonl":
            columns = find_columns(path, line, list(row))
        text, second, label = (row.get(column) if column else None for column in columns)
        if text is None or label is None or not str(text).strip():
            raise DataError(place, "has no text" if label is not None else f"has no value in the column '{columns[2]}'")
        yield Row(place, str(text), None if second is None else str(second), str(label))


def find_columns(path: Path, line: int, names: list[str]) -> tuple[str, str | None, str]:
    lower = {name.lower(): name for name in names if name is not None}
    text, second, label = (
        next((lower[c] for c in known if c in lower), None) for known in (TEXT_COLUMNS, SECOND_COLUMNS, LABEL_COLUMNS)
    )
    if text is None or label is None:
        wanted = f"text column ({', '.join(TEXT_COLUMNS)})" if text is None else f"label ({', '.join(LABEL_COLUMNS)})"
        place = f"{path}:{line if path.suffix == '.jsonl' else 1}"
        raise DataError(place, f"there is no {wanted}; the columns are {', '.join(map(str, names[:12]))}")
    return text, second, label


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a table with a header. In .tsv files quotes are ordinary characters, as GLUE has them."""
    lines = read_lines(path)
    tabs = path.suffix == ".tsv"
    csv.field_size_limit(1 << 27)
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader((line + "\n" for line in lines), **style)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{start}", f"is not valid CSV ({error})") from None
        if header is None:
            header = row
        elif row:
            if len(row) != len(header):
                raise DataError(f"{path}:{start}", f"has {len(row)} columns, but the header has {len(header)}")
            yield start, dict(zip(header, row, strict=True))


def json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}", f"is not valid JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}", 'is not an object; a line must look like {"text": …, "label": …}')
            yield number, row


# -- parallel text ---------------------------------------------------------------------------------------------------


@dataclass
class ParallelText:
    """Sentences and their translations. Item: (source, target)."""

    sources: list[str]
    targets: list[str]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, i: int) -> tuple[str, str]:
        return self.sources[i], self.targets[i]


def open_parallel_text(name: str, split: str = "train", source: str = "", target: str = "") -> ParallelText:
    """Parallel text from an embedded set ("diary_en_zh") or from a path.

    A path is a .tsv file with two columns and no header; a folder with train.tsv and test.tsv; or a folder with
    line-aligned files train.<source> and train.<target>, test.<source> and test.<target>, for example train.en, train.de.

    Raises:
        DataError: names the file, and the line where there is one.
    """
    if name in embedded_text.PARALLEL:
        return ParallelText(*map(list, zip(*embedded_text.PARALLEL[name](split), strict=True)))
    path = existing(name, embedded_text.PARALLEL, "parallel text")
    if path.is_file():
        pairs = parallel_table(path)
        return ParallelText(*map(list, zip(*(pairs[i] for i in held_out(len(pairs), split)), strict=True)))
    if source and target:
        return aligned_files(path, split, source, target)
    table = split_file(path, split, (".tsv",))
    if table is None:
        raise DataError(path, f"holds no {split}.tsv; for files like {split}.en and {split}.de name the two endings")
    return ParallelText(*map(list, zip(*parallel_table(table), strict=True)))


def parallel_table(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            raise DataError(f"{path}:{number}", "must be a sentence, a tab and its translation")
        pairs.append((cells[0].strip(), cells[1].strip()))
    if not pairs:
        raise DataError(path, "is empty; each line must be a sentence, a tab and its translation")
    return pairs


def aligned_files(folder: Path, split: str, source: str, target: str) -> ParallelText:
    first = split_file(folder, split, (f".{source}",))
    if first is None:
        raise DataError(folder / f"{split}.{source}", "is not there")
    second = first.with_suffix(f".{target}")
    sources, targets = read_lines(first), read_lines(second)
    if len(sources) != len(targets):
        raise DataError(second, f"has {len(targets)} lines, but {first.name} has {len(sources)}; they must be aligned")
    kept = [(s.strip(), t.strip()) for s, t in zip(sources, targets, strict=True) if s.strip() and t.strip()]
    if not kept:
        raise DataError(first, "is empty")
    return ParallelText(*map(list, zip(*kept, strict=True)))


# -- documents -------------------------------------------------------------------------------------------------------


class Documents:
    """Plain texts, one an item. Texts of files stay on disk: only where each begins is kept, so C4 fits."""

    def __init__(self, texts: list[str] | None = None, places: list[tuple[Path, numpy.ndarray]] | None = None) -> None:
        self.texts, self.places = texts, places or []
        self.ends = numpy.cumsum([len(starts) for _, starts in self.places], dtype=numpy.int64)

    def __len__(self) -> int:
        return len(self.texts) if self.texts is not None else int(self.ends[-1])

    def __getitem__(self, i: int) -> str:
        if self.texts is not None:
            return self.texts[i]
        file = int(numpy.searchsorted(self.ends, i, side="right"))
        path, starts = self.places[file]
        with path.open("rb") as stream:
            stream.seek(int(starts[i - (int(self.ends[file - 1]) if file else 0)]))
            line = stream.readline()
        try:
            return json.loads(line)["text"] if path.suffix == ".jsonl" else line.decode("utf-8").strip()
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
            right = "UTF-8 text" if path.suffix != ".jsonl" else 'an object with the key "text"'
            raise DataError(f"{path}: document {i}", f"is not {right}") from None


def open_documents(name: str, split: str = "train") -> Documents:
    """Documents from an embedded set ("python_docs") or a path: a .txt file with a document a line, a .jsonl file with
    the key "text" (as C4), a folder with train and test files of these kinds, or a folder of such files.

    Raises:
        DataError: if there is no such file or no document in it.
    """
    if name in embedded_text.DOCUMENTS:
        return Documents(texts=embedded_text.DOCUMENTS[name](split))
    path = existing(name, embedded_text.DOCUMENTS, "documents")
    if path.is_dir():
        own = split_file(path, split, (".txt", ".jsonl"))
        files = [own] if own else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    else:
        own, files = None, [path]
    places = []
    for file in files:
        starts = line_starts(file)
        places.append((file, starts if own else starts[held_out(len(starts), split)]))
    documents = Documents(places=places)
    if not places or not len(documents):
        raise DataError(path, f"holds no documents for the split '{split}': .txt or .jsonl files, one document a line")
    return documents


def line_starts(path: Path) -> numpy.ndarray:
    """Byte offsets of the lines that are not empty."""
    starts, position = [], 0
    with path.open("rb") as stream:
        for line in stream:
            if line.strip():
                starts.append(position)
            position += len(line)
    return numpy.array(starts, dtype=numpy.int64)


# -- tokenizers ------------------------------------------------------------------------------------------------------

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPELLINGS = {
    "pad": ("[PAD]", "<pad>"),
    "unknown": ("[UNK]", "<unk>"),
    "start": ("[CLS]", "<s>", "[BOS]"),
    "end": ("[SEP]", "</s>", "[EOS]"),
    "mask": ("[MASK]", "<mask>"),
}


@lru_cache(maxsize=1)
def library():
    """The library `tokenizers`, imported when it is first needed."""
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("tokenizers", "text", "splitting text into tokens") from None
    return tokenizers


def settle(text: str) -> str:
    """A trained tokenizer with its arbitrary parts fixed, so that every process that trains one gets the same.

    The trainers number WordPiece tokens in the order of a hash table, and unigram scores differ in their last digits with
    the order of summation.
    """
    tokenizer = json.loads(text)
    model = tokenizer["model"]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] in SPECIAL]
    if model["type"] == "WordPiece":
        model["vocab"] = {t: i for i, t in enumerate([*SPECIAL, *sorted(model["vocab"].keys() - set(SPECIAL))])}
    elif model["type"] == "Unigram":
        scores = {token: round(score, 6) for token, score in model["vocab"] if token not in SPECIAL}
        ordered = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
        model["vocab"] = [[token, 0.0] for token in SPECIAL] + [list(pair) for pair in ordered]
        model["unk_id"] = SPECIAL.index("[UNK]")
    return json.dumps(tokenizer, ensure_ascii=False)


class TextTokenizer:
    """Text to ids and back. `pad_id`, `start_id`, `end_id`, `mask_id`, `unknown_id` are the ids with a meaning.

    Sentences start with [CLS] and end with [SEP], as BERT has it; translations use the same two.
    """

    def __init__(self, backend) -> None:
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        ids = {kind: self._find(spellings) for kind, spellings in SPELLINGS.items()}
        missing = [kind for kind in ("pad", "start", "end") if ids[kind] is None]
        if missing:
            wanted = ", ".join(" or ".join(SPELLINGS[kind][:2]) for kind in missing)
            raise PaperZooError(f"the tokenizer has no token {wanted}; add it to its vocabulary")
        self.pad_id, self.start_id, self.end_id = ids["pad"], ids["start"], ids["end"]
        self.unknown_id, self.mask_id = ids["unknown"], ids["mask"]
        self.special_ids = frozenset(i for i in ids.values() if i is not None)

    def _find(self, spellings: tuple[str, ...]) -> int | None:
        return next((i for i in map(self.backend.token_to_id, spellings) if i is not None), None)

    @classmethod
    def train(
        cls, texts: Iterable[str], kind: str = "bpe", vocab_size: int = 8000, lowercase: bool = False
    ) -> TextTokenizer:
        """Learn a vocabulary.

        Args:
            kind: "bpe" (byte pairs over words marked with "▁"; Chinese characters never join Latin ones or digits), "unigram" (the same marks; as SentencePiece), or
                "wordpiece" (as BERT: words and punctuation apart, continuations begin with "##").
            vocab_size: with the five special tokens.

        Raises:
            MissingExtra: if the library `tokenizers` is not installed.
            PaperZooError: for another kind.
        """
        tokenizers = library()
        models, trainers = tokenizers.models, tokenizers.trainers
        common = {"vocab_size": vocab_size, "special_tokens": list(SPECIAL), "show_progress": False}
        if kind == "bpe":
            backend, trainer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]")), trainers.BpeTrainer(**common)
        elif kind == "unigram":
            backend = tokenizers.Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(unk_token="[UNK]", **common)
        elif kind == "wordpiece":
            backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
            texts = list(texts)
        else:
            raise PaperZooError(f"tokenizer '{kind}' is not known; it is bpe, unigram, wordpiece or a tokenizer.json")
        steps = [tokenizers.normalizers.NFKC(), *([tokenizers.normalizers.Lowercase()] if lowercase else [])]
        backend.normalizer = tokenizers.normalizers.Sequence(steps)
        if kind == "wordpiece":
            backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
            backend.decoder = tokenizers.decoders.WordPiece()
            # characters are numbered here: the trainer would take the order of a hash table, and break ties by it
            letters = sorted({c for text in texts for c in backend.normalizer.normalize_str(text) if not c.isspace()})
            common["special_tokens"] = [*SPECIAL, *letters, *("##" + c for c in letters)]
            trainer = trainers.WordPieceTrainer(**common)
        else:
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
                [
                    tokenizers.pre_tokenizers.Metaspace(),
                    tokenizers.pre_tokenizers.Punctuation(),
                    tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\u4e00-\\u9fff]+"), "isolated"),
                ]
            )
            backend.decoder = tokenizers.decoders.Metaspace()
        backend.train_from_iterator(texts, trainer)
        return cls.from_json(settle(backend.to_str()))

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """From a `tokenizer.json`, as the Hub has them.

        Raises:
            DataError: if the file is not one.
        """
        if Path(path).is_dir():
            path = Path(path) / "tokenizer.json"
        return cls.from_json("\n".join(read_lines(Path(path))), str(path))

    @classmethod
    def from_json(cls, text: str, path: str = "tokenizer") -> TextTokenizer:
        tokenizers = library()
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(path, f"is not a tokenizer.json ({error})") from None
        backend.no_padding()
        backend.no_truncation()
        return cls(backend)

    @classmethod
    def make(cls, kind: str, texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool = False):
        """By the value of a recipe's option: a kind that is trained on `texts()`, or the path of a tokenizer.json."""
        if kind.endswith(".json") or Path(kind).is_dir():
            return cls.load(kind)
        return cls.train(texts(), kind, vocab_size, lowercase)

    def to_json(self) -> str:
        return self.backend.to_str()

    def encode(self, text: str) -> list[int]:
        """Ids without start and end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens leave nothing."""
        return self.backend.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=True)

    def token(self, i: int) -> str:
        """One token as it is written in the vocabulary."""
        return self.backend.id_to_token(i)

    def pack(self, text: str, second: str | None, length: int) -> tuple[list[int], list[int]]:
        """[CLS] text [SEP] or [CLS] text [SEP] second [SEP], cut and padded to `length`: ids and token types.

        What is too long is cut from the longer of the two, one token at a time, as BERT does.
        """
        first, other = self.encode(text), [] if second is None else self.encode(second)
        return self.assemble(first, None if second is None else other, length)

    def assemble(self, first: list[int], second: list[int] | None, length: int) -> tuple[list[int], list[int]]:
        room = length - (2 if second is None else 3)
        if second is None:
            first = first[:room]
        else:
            shorter = min(len(first), len(second), room // 2)
            first, second = (
                (first[:shorter], second[: room - shorter])
                if len(first) <= len(second)
                else (first[: room - shorter], second[:shorter])
            )
        ids = [self.start_id, *first, self.end_id]
        types = [0] * len(ids)
        if second is not None:
            ids, types = [*ids, *second, self.end_id], [*types, *[1] * (len(second) + 1)]
        empty = length - len(ids)
        return ids + [self.pad_id] * empty, types + [0] * empty
