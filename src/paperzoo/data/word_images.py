"""Cut-out words with what they say: embedded renderings, and the layouts in which word images are shared.

    open_words("rendered_digits", "train")       three digits in real fonts over photographs, always there
    open_words("rendered_words", "train")        English words and strings, the same way
    open_words("path/to/lmdb", "train")          data.mdb with num-samples, image-000000001, label-000000001, …
    open_words("words.csv", "test")              columns path and text (or label), optionally split and lexicon; .tsv alike
    open_words("gt.txt", "test")                 ICDAR's lists: word_1.png, "text"; with a byte order mark, quotes and commas
    open_words("path/to/mjsynth", "train")       MJSynth's annotation_train.txt, annotation_val.txt, annotation_test.txt
    open_words("mjsynth+synthtext", "train")     several of these, one after the other
A folder may hold any of these, or the folders train/ and val/ (or test/, validation/, evaluation/) that do; folders of LMDBs
are taken together. A plain name is looked for under $PAPERZOO_DATA or ~/.cache/paperzoo/data.

An item is a dict: image uint8 (3, H, W), text str. `path(i)` names a sample, `text(i)` says what it says without decoding the
image, `lexicon(i)` are the words that it is one of, where the data says so.
"""

from __future__ import annotations

import csv
import io
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.images import SUFFIXES, data_folder, pil_to_tensor, read_image
from paperzoo.errors import DataError, MissingExtra, PaperZooError

SPLITS = {"train": ("train", "training"), "test": ("test", "evaluation", "val", "valid", "validation")}
RENDERED = ("rendered_digits", "rendered_words")
LISTS = ("gt.txt", "labels.txt", "labels.csv", "words.csv", "labels.tsv")


class WordImages(Dataset):
    """What the readers share."""

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} does not say how many samples it has")

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not read images")

    def text(self, index: int) -> str:
        raise NotImplementedError(f"{type(self).__name__} does not read texts")

    def path(self, index: int) -> str:
        raise NotImplementedError(f"{type(self).__name__} does not say where its samples are")

    def lexicon(self, index: int) -> list[str]:
        return []

    def __getitem__(self, index: int) -> dict:
        return {"image": self.image(index), "text": self.text(index)}


# -- rendered ----------------------------------------------------------------------------------------------------------


class RenderedWords(WordImages):
    """`paperzoo.data.rendered_text`: words over photographs, kept in memory. Train and test share no string and no face."""

    def __init__(self, name: str, split: str, count: int, height: int, width: int | None = None) -> None:
        self.split, self.numbers = split, rendered_numbers(name, split, count)
        self.images, self.texts = rendered(name, split, count, height, width)

    def __len__(self) -> int:
        return len(self.texts)

    def image(self, index: int) -> Tensor:
        return self.images[index]

    def text(self, index: int) -> str:
        return self.texts[index]

    def path(self, index: int) -> str:
        return f"{self.split} word {self.numbers[index]}"


def rendered_style(name: str):
    from paperzoo.data.rendered_text import Style

    if name == "rendered_digits":
        return Style(case="lower", strings=1.0, longest=3, contrast=0.5, blur=0.03, noise=0.02)
    return Style(case="lower", strings=0.1, longest=6)


@lru_cache(maxsize=8)
def rendered_numbers(name: str, split: str, count: int) -> tuple[int, ...]:
    """Which of the endless stream of words are taken; for "rendered_digits" those of three digits."""
    if name != "rendered_digits":
        return tuple(range(count))
    from paperzoo.data.rendered_text import _generator, random_text

    style, found, index = rendered_style(name), [], 0
    while len(found) < count:
        text = random_text(_generator("word", 0, split, index), split, style)
        if text.isdigit() and len(text) == 3:
            found.append(index)
        index += 1
    return tuple(found)


@lru_cache(maxsize=4)
def rendered(
    name: str, split: str, count: int, height: int, width: int | None
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    from paperzoo.data.rendered_text import word_image

    pairs = [
        word_image(i, split, height, width, style=rendered_style(name)) for i in rendered_numbers(name, split, count)
    ]
    return tuple(image for image, _ in pairs), tuple(text for _, text in pairs)


# -- LMDB --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def environment(path: str, process: int) -> Any:
    """A data base, opened once in each process, as LMDB demands it.

    Raises:
        MissingExtra: without the package lmdb.
        DataError: if it cannot be opened.
    """
    try:
        import lmdb
    except ImportError:
        raise MissingExtra("lmdb", "ocr", "reading LMDB") from None
    try:
        # nobody writes while we read: no lock files beside the data, which may be on a read-only disk
        return lmdb.open(
            path, readonly=True, lock=False, readahead=False, meminit=False, max_readers=64, subdir=Path(path).is_dir(), create=False
        )  # fmt: skip
    except lmdb.Error as error:
        raise DataError(path, f"not a readable LMDB ({error})") from None


class LmdbWords(WordImages):
    """The layout of nearly every shared set: keys num-samples, image-000000001, label-000000001, perhaps lexicon-000000001.

    Lexicons are words between commas.

    Raises:
        MissingExtra: without the package lmdb.
        DataError: if it is no such data base; for a record, naming its key, when it is asked for.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        raw = self.get("num-samples")
        try:
            self.count = int(raw)
        except (TypeError, ValueError):
            raise DataError(self.root, f"num-samples is {raw!r}, not a number; word images are stored as num-samples, image-000000001, label-000000001") from None  # fmt: skip
        if self.count < 1:
            raise DataError(self.root, "holds no samples (num-samples is 0)")

    def get(self, key: str) -> bytes | None:
        with environment(str(self.root.resolve()), os.getpid()).begin(write=False) as transaction:
            return transaction.get(key.encode())

    def __len__(self) -> int:
        return self.count

    def record(self, kind: str, index: int) -> bytes:
        value = self.get(f"{kind}-{index + 1:09d}")
        if value is None:
            raise DataError(f"{self.root}:{kind}-{index + 1:09d}", "no such key, though num-samples counts it")
        return value

    def image(self, index: int) -> Tensor:
        raw = self.record("image", index)
        try:
            with Image.open(io.BytesIO(raw)) as image:
                image.load()
                return pil_to_tensor(image)
        except Exception as error:  # decoders raise whatever they like on broken bytes
            raise DataError(self.path(index), f"not a readable image ({type(error).__name__}: {str(error)[:100]})") from None  # fmt: skip

    def text(self, index: int) -> str:
        raw = self.record("label", index)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root}:label-{index + 1:09d}", f"not UTF-8 ({error.reason})") from None

    def path(self, index: int) -> str:
        return f"{self.root}:image-{index + 1:09d}"

    def lexicon(self, index: int) -> list[str]:
        raw = self.get(f"lexicon-{index + 1:09d}")
        return [w.strip() for w in raw.decode("utf-8", "replace").split(",") if w.strip()] if raw else []


# -- lists -------------------------------------------------------------------------------------------------------------


class ListedWords(WordImages):
    """Image files with texts; every entry remembers where it was listed.

    Raises:
        DataError: if the list is empty; for an image, naming it, when it is asked for.
    """

    def __init__(self, source: Path, files: Sequence[str], texts: Sequence[str], lexicons: Sequence[str] = ()) -> None:
        if not files:
            raise DataError(source, "lists no images for this split")
        self.source, self.files, self.texts, self.lexicons = source, list(files), list(texts), list(lexicons)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        return read_image(self.source.parent / self.files[index])

    def text(self, index: int) -> str:
        return self.texts[index]

    def path(self, index: int) -> str:
        return str(self.source.parent / self.files[index])

    def lexicon(self, index: int) -> list[str]:
        return re.split(r"[\s,;]+", self.lexicons[index].strip()) if self.lexicons and self.lexicons[index] else []


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(path, f"not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from None


def read_table(path: Path, split: str) -> ListedWords:
    """A CSV or TSV with a header: path (or image, file, filename) and text (or label, words, transcription), perhaps split, lexicon."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # quotes mean nothing in a TSV: "5 inches" is often 5"
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter, quoting=quoting)
    header = {(name or "").strip().lower(): name for name in reader.fieldnames or []}
    where = next((header[n] for n in ("path", "image", "file", "filename") if n in header), None)
    what = next((header[n] for n in ("text", "label", "words", "transcription") if n in header), None)
    if where is None or what is None:
        raise DataError(path, f"the columns path and text are needed; the header is {reader.fieldnames}")
    rows = []
    for row in reader:
        name, text = (row[where] or "").strip(), row[what]
        if not name or text is None or row.get(None):
            raise DataError(f"{path}:{reader.line_num}", "a row needs a path and a text, and no more fields than the header; quote a text with commas")  # fmt: skip
        part = (row.get(header.get("split", "")) or "").strip().lower()
        rows.append((name, text, row.get(header.get("lexicon", "")) or "", part))
    if any(part for *_, part in rows):
        rows = [row for row in rows if (row[3] in SPLITS["train"]) == (split == "train")]
    return ListedWords(path, [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


def read_icdar(path: Path) -> ListedWords:
    """`word_1.png, "text"` a line: a byte order mark, quotes, escaped quotes and commas inside the text are understood.

    Lists without commas, as `image.png text` or with a tab, are read as well.
    """
    files, texts = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        match = re.match(r"\s*(?P<name>[^,\t]*?\.\w{2,5})(?P<gap>\s*,\s?|\t|\s+)(?P<text>.*)$", line)
        if match is None or f".{match['name'].rpartition('.')[2].lower()}" not in SUFFIXES:
            raise DataError(f"{path}:{number}", f'a line is an image file, a comma, and a text in quotes, not "{line[:60]}"')  # fmt: skip
        text = match["text"].strip() if "," in match["gap"] else match["text"]
        if len(text) >= 2 and text[0] == text[-1] == '"':
            text = re.sub(r'\\(["\\])', r"\1", text[1:-1]).replace('""', '"')
        files.append(match["name"])
        texts.append(text)
    return ListedWords(path, files, texts)


def read_mjsynth(path: Path) -> ListedWords:
    """MJSynth's `./2425/1/115_Lube_45484.jpg 45484` a line: the text stands in the file's name."""
    files, texts = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name = line.split()[0]
        parts = name.rpartition("/")[2].split("_")
        if len(parts) != 3:
            raise DataError(f"{path}:{number}", f'a name is number_text_word.jpg, as 115_Lube_45484.jpg, not "{name[:60]}"')  # fmt: skip
        files.append(name)
        texts.append(parts[1])
    return ListedWords(path, files, texts)


# -- several sets ------------------------------------------------------------------------------------------------------


class Several(WordImages):
    """Sets one after the other; or, with `equal`, each as often as the others, however many samples it has."""

    def __init__(self, sets: Sequence[WordImages], equal: bool = False) -> None:
        self.sets, self.equal = list(sets), equal
        self.ends = list(accumulate(map(len, self.sets)))

    def __len__(self) -> int:
        return len(self.sets) * max(map(len, self.sets)) if self.equal else self.ends[-1]

    def find(self, index: int) -> tuple[WordImages, int]:
        if self.equal:
            chosen = self.sets[index % len(self.sets)]
            return chosen, (index // len(self.sets)) % len(chosen)
        k = bisect_right(self.ends, index)
        return self.sets[k], index - (self.ends[k - 1] if k else 0)

    def image(self, index: int) -> Tensor:
        chosen, i = self.find(index)
        return chosen.image(i)

    def text(self, index: int) -> str:
        chosen, i = self.find(index)
        return chosen.text(i)

    def path(self, index: int) -> str:
        chosen, i = self.find(index)
        return chosen.path(i)

    def lexicon(self, index: int) -> list[str]:
        chosen, i = self.find(index)
        return chosen.lexicon(i)


class Chosen(WordImages):
    """Some samples of a set."""

    def __init__(self, words: WordImages, rows: Tensor) -> None:
        self.words, self.rows = words, rows.to(torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Tensor:
        return self.words.image(int(self.rows[index]))

    def text(self, index: int) -> str:
        return self.words.text(int(self.rows[index]))

    def path(self, index: int) -> str:
        return self.words.path(int(self.rows[index]))

    def lexicon(self, index: int) -> list[str]:
        return self.words.lexicon(int(self.rows[index]))


# -- finding the files -------------------------------------------------------------------------------------------------


def open_words(
    data: str | Path, split: str = "train", count: int = 1024, height: int = 32, width: int | None = None, equal: bool = False
) -> WordImages:  # fmt: skip
    """The words of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Args:
        count, height, width: of the rendered sets: how many words and of what size; width None keeps their shape.
        equal: of several sets joined by "+", whether each is drawn from equally often.

    Raises:
        DataError: if a place is missing or its layout is not known.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    names = [name.strip() for name in str(data).split("+") if name.strip()] or [""]
    sets = [open_one(name, split, count, height, width) for name in names]
    return sets[0] if len(sets) == 1 else Several(sets, equal)


def open_one(name: str, split: str, count: int, height: int, width: int | None) -> WordImages:
    if name in RENDERED:
        return RenderedWords(name, split, count, height, width)
    path = Path(name).expanduser()
    if not path.exists() and len(path.parts) == 1:
        path = data_folder() / path
    if path.is_file():
        return open_file(path, split)
    if path.is_dir():
        return open_folder(path, split)
    raise DataError(path, f"no such file or folder; give {', '.join(RENDERED)}, an LMDB, a CSV or TSV, an ICDAR gt.txt, or MJSynth's folder")  # fmt: skip


def open_file(path: Path, split: str) -> WordImages:
    if path.suffix.lower() in (".csv", ".tsv"):
        return read_table(path, split)
    if path.suffix.lower() == ".mdb":
        return LmdbWords(path.parent if path.name == "data.mdb" else path)
    if path.name.startswith("annotation"):
        return read_mjsynth(path)
    if path.suffix.lower() == ".txt":
        return read_icdar(path)
    raise DataError(path, "not known as a list of words; .csv, .tsv, .txt (ICDAR's or MJSynth's) or data.mdb is needed")


def open_folder(root: Path, split: str) -> WordImages:
    if (root / "data.mdb").is_file():
        return LmdbWords(root)
    for name in SPLITS[split]:
        if (root / f"annotation_{name}.txt").is_file():
            return read_mjsynth(root / f"annotation_{name}.txt")
    inner = {p.name.lower(): p for p in root.iterdir() if p.is_dir()}
    for name in SPLITS[split]:
        if name in inner:
            return open_folder(inner[name], split)
    for name in LISTS:
        if (root / name).is_file():
            return open_file(root / name, split)
    found = sorted(p.parent for p in root.rglob("data.mdb"))
    if found:
        return LmdbWords(found[0]) if len(found) == 1 else Several([LmdbWords(p) for p in found])
    raise DataError(root, f"no words for the split '{split}'; looked for data.mdb, annotation_{SPLITS[split][0]}.txt, {SPLITS[split][0]}/ and {', '.join(LISTS)}")  # fmt: skip
