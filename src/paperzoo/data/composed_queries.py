"""A picture, what is to be changed about it, and the picture that is meant: queries for composed image retrieval.

    open_composed("composed_shapes", "train")     generated scenes of shapes on a grid, always there: `data/shape_grid.py`
    open_composed("list.csv", "test")             columns query, change, target (pictures and a sentence), and split
    open_composed("path/to/Fashion200k", "test")  labels/*.txt, women/…, test_queries.txt, as published
    open_composed("path/to/mit_states", "train")  images/<adjective> <noun>/*.jpg, as published

A set has a pool of pictures (`pool`, a `RetrievalImages`), which is what is searched, and queries: the numbers of a source and a target
in the pool, and a sentence. Every picture of the target's group (`pool.targets`) counts as found: where pictures have no
captions each is a group of its own.

An item, for training, is a list of (source image, sentence, target image), images uint8 (3, H, W): one query, or two of one
source, which are each other's hardest distractors. Random choices are drawn from torch's global generator.
"""

from __future__ import annotations

import functools
import string
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data import shape_grid
from paperzoo.data.images import HELD_OUT, SUFFIXES, read_rows
from paperzoo.data.retrieval import RetrievalImages
from paperzoo.data.text import read_lines
from paperzoo.errors import DataError, UnknownName

EMBEDDED = "composed_shapes"
SHAPES_SIZE = 24  # pixels
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation", "query")}
PUNCTUATION = str.maketrans("", "", string.punctuation)

MIT_TEST_NOUNS = """armor bracelet bush camera candy castle ceramic cheese clock clothes coffee fan fig fish foam forest fruit
furniture garden gate glass horse island laptop lead lightning mirror orange paint persimmon plastic plate potato road
rubber sand shell sky smoke steel stream table tea tomato vacuum wax wheel window wool""".split()


# -- words -------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower case, without punctuation ("top-left" is one word), split at spaces."""
    return text.lower().translate(PUNCTUATION).split()


def vocabulary(texts: Iterable[str]) -> list[str]:
    """The words of sentences, sorted; their ids are their places, counted from 1."""
    return sorted({word for text in texts for word in words(text)})


def to_ids(text: str, known: dict[str, int]) -> list[int]:
    """A sentence's ids, 0 for an unknown word; an empty sentence is one unknown word."""
    return [known.get(word, 0) for word in words(text)] or [0]


def pad(rows: Sequence[list[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids of sentences as int64 (B, T), padded with 0, and their lengths int64 (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), length or int(lengths.max()), dtype=torch.int64)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return tokens, lengths


# -- sets --------------------------------------------------------------------------------------------------------------


class ComposedQueries(Dataset):
    """Queries over a pool of pictures; see the module's docstring.

    sources, targets: numbers in the pool. texts: the sentences. `several`: a training item is two queries of one source, where
    it has two.
    """

    def __init__(
        self,
        pool: RetrievalImages,
        sources: Sequence[int],
        texts: Sequence[str],
        targets: Sequence[int],
        several: bool = False,
    ) -> None:
        self.pool, self.several = pool, several
        self.sources, self.texts, self.targets = list(sources), list(texts), list(targets)
        self.of_source: dict[int, list[int]] = {}
        for number, source in enumerate(self.sources):
            self.of_source.setdefault(source, []).append(number)
        self.items = list(self.of_source) if several else list(range(len(self.sources)))

    def __len__(self) -> int:
        return len(self.items)

    @property
    def queries_an_item(self) -> int:
        """How many `drawn` gives."""
        return 2 if self.several else 1

    def drawn(self, item: int) -> list[tuple[int, str, int]]:
        """The queries of a training item: (source, sentence, target)."""
        if not self.several:
            numbers = [self.items[item]]
        else:
            mine = self.of_source[self.items[item]]
            numbers = [mine[i] for i in torch.randperm(len(mine))[:2].tolist()]
            numbers = numbers * 2 if len(numbers) == 1 else numbers
        return [(self.sources[n], self.texts[n], self.targets[n]) for n in numbers]

    def __getitem__(self, item: int) -> list[tuple[Tensor, str, Tensor]]:
        return [(self.pool.image(s), text, self.pool.image(t)) for s, text, t in self.drawn(item)]

    def vocabulary(self) -> list[str]:
        return vocabulary(self.texts)


def open_composed(data: str | Path, split: str = "train") -> ComposedQueries:
    """The queries of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Raises:
        DataError: if the place is missing or is not laid out as one of these; names the file and the line.
        UnknownName: if `data` is neither a set's name nor a path.
    """
    if split not in SPLITS:
        raise UnknownName("split", split, SPLITS)
    name = str(data)
    if name == EMBEDDED:
        return composed_shapes(split)
    path = Path(name).expanduser()
    if path.is_file():
        return refuse_pickle(path) if path.suffix == ".npy" else open_table(path, split)
    if path.is_dir():
        css = sorted(path.glob("css_*.npy"))
        if css:
            return refuse_pickle(css[0])
        if (path / "labels").is_dir():
            return Fashion200k(path, split)
        if (path / "images").is_dir():
            return MitStates(path, split)
        raise DataError(
            path, "neither Fashion200k (labels/, test_queries.txt) nor MIT-States (images/<adjective> <noun>/)"
        )
    if path.suffix or len(path.parts) > 1:
        raise DataError(path, "no such file or folder; give a CSV with the columns query, change, target")
    raise UnknownName("data set or path", name, [EMBEDDED])


def refuse_pickle(path: Path) -> ComposedQueries:
    raise DataError(
        path,
        "is a pickled Python object, which may run any code when read; write its queries to a CSV of query, change, target",
    )


@functools.cache
def composed_shapes(split: str) -> ComposedQueries:
    """2,000 scenes with two changes each to learn from. To test, 100 scenes with six changes each: whoever ignores the sentence has
    six pictures that are equally near. All of them hold a combination of colour and shape that was never learned.
    """
    scenes, each = (2000, 2) if split == "train" else (100, 6)
    made = shape_grid.changes(split, scenes, each, most=3, colours=6)
    numbers: dict[shape_grid.Scene, int] = {}
    for one in made:
        numbers.setdefault(one.source, len(numbers))
        numbers.setdefault(one.target, len(numbers))
    pool = alone(pixels=shape_grid.draw(list(numbers), SHAPES_SIZE))
    sources, targets = [numbers[one.source] for one in made], [numbers[one.target] for one in made]
    return ComposedQueries(pool, sources, [one.text for one in made], targets, several=True)


def alone(paths: Sequence[str] | None = None, pixels: Tensor | None = None) -> RetrievalImages:
    """A pool in which every picture is a group of its own."""
    count = len(paths) if pixels is None else len(pixels)
    return RetrievalImages([str(i) for i in range(count)], torch.arange(count), paths, pixels)


def grouped(paths: Sequence[str], captions: Sequence[str]) -> RetrievalImages:
    """A pool in which pictures of equal captions are a group."""
    numbers = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
    return RetrievalImages(list(numbers), torch.tensor([numbers[c] for c in captions], dtype=torch.int64), paths)


def open_table(path: Path, split: str) -> ComposedQueries:
    """A CSV or Parquet table: query (or reference, source), change (or text, modification), target, split.

    Without a column split the queries of every fifth source picture are for testing. The pool is every picture of the split.
    """
    header, table = read_rows(path)
    columns = {(name or "").strip().lower(): name for name in header}
    kinds = {
        "query": ("query", "reference", "source"),
        "change": ("change", "text", "modification"),
        "target": ("target",),
    }
    found = {kind: next((columns[n] for n in names if n in columns), None) for kind, names in kinds.items()}
    missing = [kind for kind, column in found.items() if column is None]
    if missing:
        raise DataError(
            path, f"the columns query, change and target are needed, {missing[0]} is not there; the header is {header}"
        )
    rows: list[tuple[str, str, str, str]] = []
    for number, row in enumerate(table, 2):
        query, text, target = ((row[found[kind]] or "").strip() for kind in kinds)
        part = (row[columns["split"]] or "").strip().lower() if "split" in columns else ""
        if not query or not target:
            raise DataError(f"{path}:{number}", f"has no {'target' if query else 'query'}")
        if "split" in columns and not any(part in names for names in SPLITS.values()):
            raise DataError(f"{path}:{number}", f"'{part}' in the column split is neither train nor test")
        rows.append((query, text, target, part))
    if "split" in columns:
        kept = [row for row in rows if row[3] in SPLITS[split]]
    else:
        order = sorted({query for query, *_ in rows}, key=lambda name: (zlib.crc32(name.encode()), name))
        mine = {name for i, name in enumerate(order) if (i % HELD_OUT == 0) == (split == "test")}
        kept = [row for row in rows if row[0] in mine]
    if not kept:
        raise DataError(path, f"no queries for the split '{split}'")
    numbers: dict[str, int] = {}
    for query, _, target, _ in kept:
        numbers.setdefault(query, len(numbers))
        numbers.setdefault(target, len(numbers))
    pool = alone([str(path.parent / name) for name in numbers])
    columns_of = zip(*[(numbers[query], text, numbers[target]) for query, text, target, _ in kept], strict=True)
    return ComposedQueries(pool, *columns_of, several=True)


# -- Fashion200k -------------------------------------------------------------------------------------------------------


class Fashion200k(ComposedQueries):
    """Clothes with captions. Two pictures are a query where their captions differ in one word: "replace black with blue".

    labels/*<split>*.txt have a line "file <tab> score <tab> caption" a picture; test_queries.txt a line "source target". A training
    item is a picture, and its target is drawn among the pictures whose captions share all words but one. Unlike the
    released code, which cuts a word's letters out of the caption wherever they stand, whole words are left out here.
    """

    def __init__(self, root: Path, split: str) -> None:
        files = sorted(p for p in (root / "labels").glob("*.txt") if split in p.name)
        if not files:
            raise DataError(root / "labels", f"has no label files of the split '{split}' (…_{split}_….txt)")
        self.files: list[str] = []
        self.captions: list[str] = []
        for file in files:
            for number, line in enumerate(read_lines(file), 1):
                parts = line.split("\t")
                if len(parts) != 3:
                    raise DataError(f"{file}:{number}", "expected file, score and caption, separated by tabs")
                self.files.append(parts[0])
                self.captions.append(parts[2].strip())
        queries = self.test_queries(root) if split == "test" else ([], [], [])
        super().__init__(grouped([str(root / file) for file in self.files], self.captions), *queries)
        if split == "train":
            self.index()

    def test_queries(self, root: Path) -> tuple[list[int], list[str], list[int]]:
        numbers = {file: i for i, file in enumerate(self.files)}
        sources, texts, targets = [], [], []
        path = root / "test_queries.txt"
        for number, line in enumerate(read_lines(path), 1):
            pair = line.split()
            if len(pair) != 2 or any(file not in numbers for file in pair):
                raise DataError(f"{path}:{number}", "expected two files that the test labels list: source target")
            sources.append(numbers[pair[0]])
            targets.append(numbers[pair[1]])
            texts.append(replacement(*(self.captions[numbers[file]] for file in pair)))
        return sources, texts, targets

    def index(self) -> None:
        """Which captions become equal when a word is left out, and which pictures have such a partner."""
        self.with_caption: dict[str, list[int]] = {}
        for i, caption in enumerate(self.captions):
            self.with_caption.setdefault(caption, []).append(i)
        children: dict[str, list[str]] = {}
        self.parents: dict[str, list[str]] = {}
        for caption in self.with_caption:
            split = caption.split()
            for parent in dict.fromkeys(" ".join(split[:i] + split[i + 1 :]) for i in range(len(split))):
                children.setdefault(parent, []).append(caption)
        self.children = {parent: found for parent, found in children.items() if len(found) > 1}
        for parent, found in self.children.items():
            for caption in found:
                self.parents.setdefault(caption, []).append(parent)
        self.items = [i for i, caption in enumerate(self.captions) if caption in self.parents]
        if not self.items:
            raise DataError(self.pool.path(0), "no two captions differ in one word: there is nothing to learn from")

    def drawn(self, item: int) -> list[tuple[int, str, int]]:
        source = self.items[item]
        caption = self.captions[source]
        siblings = [c for c in self.children[pick(self.parents[caption])] if c != caption]
        target = pick(self.with_caption[pick(siblings)])
        return [(source, replacement(caption, self.captions[target]), target)]

    def vocabulary(self) -> list[str]:
        return vocabulary([*self.captions, "replace with"])


def pick(values: Sequence) -> object:
    return values[int(torch.randint(len(values), ()))]


def replacement(source: str, target: str) -> str:
    """The sentence of two captions: the first word of each that the other has not (else their last)."""
    before, after = source.split(), target.split()
    old = next((word for word in before if word not in after), before[-1] if before else "")
    new = next((word for word in after if word not in before), after[-1] if after else "")
    return f"replace {old} with {new}"


# -- MIT-States --------------------------------------------------------------------------------------------------------


class MitStates(ComposedQueries):
    """Things in states, images/<adjective> <noun>/*.jpg: the same thing in another state, and the sentence is the adjective.

    49 nouns are for testing. A training item is two other states of a picture's thing.
    """

    queries_an_item = 2

    def __init__(self, root: Path, split: str) -> None:
        paths: list[str] = []
        names: list[tuple[str, str]] = []
        for folder in sorted(p for p in (root / "images").iterdir() if p.is_dir() and len(p.name.split()) == 2):
            adjective, noun = folder.name.split()
            if adjective == "adj" or (noun in MIT_TEST_NOUNS) != (split == "test"):
                continue
            found = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
            paths += found
            names += [(adjective, noun)] * len(found)
        if not paths:
            raise DataError(root / "images", f"no folders '<adjective> <noun>' with pictures for the split '{split}'")
        self.states: dict[str, list[str]] = {}
        self.members: dict[tuple[str, str], list[int]] = {}
        for i, name in enumerate(names):
            self.members.setdefault(name, []).append(i)
        for adjective, noun in self.members:
            self.states.setdefault(noun, []).append(adjective)
        self.names = names
        queries = ([], [], []) if split == "train" else self.test_queries()
        super().__init__(grouped(paths, [" ".join(name) for name in names]), *queries)
        if split == "train":
            self.items = [i for i, (_, noun) in enumerate(names) if len(self.states[noun]) > 2]
            if not self.items:
                raise DataError(root / "images", "no thing has three states: there is nothing to learn from")

    def test_queries(self) -> tuple[list[int], list[str], list[int]]:
        rows = [
            (i, other, self.members[other, noun][0])
            for i, (adjective, noun) in enumerate(self.names)
            for other in self.states[noun]
            if other != adjective
        ]
        return tuple(map(list, zip(*rows, strict=True))) if rows else ([], [], [])

    def drawn(self, item: int) -> list[tuple[int, str, int]]:
        source = self.items[item]
        adjective, noun = self.names[source]
        others = [a for a in self.states[noun] if a != adjective]
        chosen = [others[i] for i in torch.randperm(len(others))[:2].tolist()]
        return [(source, other, pick(self.members[other, noun])) for other in chosen]

    def vocabulary(self) -> list[str]:
        return vocabulary([" ".join(name) for name in self.names])
