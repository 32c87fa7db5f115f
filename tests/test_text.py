"""Readers and tokenizers of text, the embedded sets, and what translation searches and learns with."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from paperzoo.data import embedded_text
from paperzoo.data.text import TextTokenizer, open_documents, open_labelled_text, open_parallel_text
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.translation import beam_search, greedy_search, token_batches

# -- labelled text -------------------------------------------------------------------------------------------------------


def test_csv_with_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('label,text\ngood,"a, ""b""\nc"\nbad,d\n', encoding="utf-8")
    data = open_labelled_text(str(tmp_path), "train")
    assert data.labels == ["bad", "good"]
    assert [data[i] for i in range(2)] == [('a, "b"\nc', 1), ("d", 0)]


def test_tsv_keeps_quotes_and_reads_pairs(tmp_path):
    (tmp_path / "dev.tsv").write_text('question1\tquestion2\tis_duplicate\n"a\tb"\t1\n', encoding="utf-8")
    (tmp_path / "train.tsv").write_text("question1\tquestion2\tis_duplicate\nx\ty\t0\nx\tx\t1\n", encoding="utf-8")
    assert open_labelled_text(str(tmp_path), "test")[0] == (('"a', 'b"'), 1)


def test_jsonl_and_a_split_by_rows(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(20)))
    train, test = open_labelled_text(str(path), "train"), open_labelled_text(str(path), "test")
    assert (len(train), test.texts, test.targets) == (18, ["t9", "t19"], [1, 1])


def test_folders_of_classes(tmp_path):
    for split, label in itertools.product(("train", "test"), ("neg", "pos")):
        (tmp_path / split / label).mkdir(parents=True)
        (tmp_path / split / label / "1.txt").write_text(f"{label} of {split}")
    assert open_labelled_text(str(tmp_path), "test")[1] == ("pos of test", 1)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("text,label\na,1\nb\n", 3, "1 columns"),
        ("text,label\n ,1\n", 2, "has no text"),
        ("words,label\na,1\n", 1, "no text column"),
        ("text,kind\na,1\n", 1, "no label"),
        (b"text,label\na,1\n\xff,2\n", 3, "UTF-8"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, content, line, problem):
    path = tmp_path / "train.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        open_labelled_text(str(path), "train")
    assert problem in str(caught.value)
    assert f"{path}:{line}" in str(caught.value)


def test_an_unknown_label_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,x\n")
    (tmp_path / "test.csv").write_text("text,label\na,y\n")
    with pytest.raises(DataError, match=r"test.csv:2: the label 'y'"):
        open_labelled_text(str(tmp_path), "test")


def test_a_missing_path_names_the_embedded_sets():
    with pytest.raises(DataError, match="python_docs"):
        open_labelled_text("/nowhere/at/all", "train")


# -- parallel text and documents -----------------------------------------------------------------------------------------


def test_aligned_files_keep_unusual_line_ends_inside(tmp_path):
    (tmp_path / "train.en").write_text("a\u2028b\nc\n", encoding="utf-8", newline="")
    (tmp_path / "train.de").write_text("x\r\ny\r\n", encoding="utf-8", newline="")
    data = open_parallel_text(str(tmp_path), "train", "en", "de")
    assert list(zip(data.sources, data.targets, strict=True)) == [("a\u2028b", "x"), ("c", "y")]


def test_files_that_are_not_aligned(tmp_path):
    (tmp_path / "train.en").write_text("a\nb\n")
    (tmp_path / "train.de").write_text("x\n")
    with pytest.raises(DataError, match="train.de: has 1 lines, but train.en has 2"):
        open_parallel_text(str(tmp_path), "train", "en", "de")


def test_a_parallel_table_names_its_line(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a\tb\nc\n")
    with pytest.raises(DataError, match=r"pairs.tsv:2"):
        open_parallel_text(str(tmp_path / "pairs.tsv"))


def test_documents_are_read_from_disk_by_place(tmp_path):
    (tmp_path / "a.txt").write_text("eins\n\nzwölf\ndrei\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "vier"}) + "\n", encoding="utf-8")
    data = open_documents(str(tmp_path), "train")
    assert [data[i] for i in range(len(data))] == ["eins", "zwölf", "drei", "vier"]


# -- embedded sets -------------------------------------------------------------------------------------------------------


def test_docstrings_are_split_without_overlap():
    train, test = (embedded_text.python_docs_labelled(split) for split in ("train", "test"))
    assert len(train) > 2000 and len(test) > 400
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert {label for _, label in test} == set(embedded_text.FAMILIES)


@pytest.mark.parametrize(
    ("number", "english", "chinese"),
    [
        (2, "two", "二"),
        (10, "ten", "十"),
        (14, "fourteen", "十四"),
        (20, "twenty", "二十"),
        (42, "forty-two", "四十二"),
        (300, "three hundred", "三百"),
        (305, "three hundred and five", "三百零五"),
        (310, "three hundred and ten", "三百一十"),
        (999, "nine hundred and ninety-nine", "九百九十九"),
    ],
)
def test_numbers_in_words(number, english, chinese):
    assert embedded_text.english_number(number) == english
    assert embedded_text.chinese_number(number) == chinese


def test_clock_times_change_the_hour():
    assert embedded_text.clock(12, 3) == ("at a quarter to one", "十二点三刻")


def test_diary_is_seeded_and_its_splits_are_different():
    train, test = embedded_text.diary_en_zh("train"), embedded_text.diary_en_zh("test")
    assert (len(train), len(test)) == (12_000, 400)
    assert not {s for s, _ in train} & {s for s, _ in test}
    embedded_text.diary_en_zh.cache_clear()
    assert embedded_text.diary_en_zh("test") == test


# -- tokenizers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    return [text for text, _ in embedded_text.python_docs_labelled("test")][:300]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_training_twice_gives_the_same_tokenizer(texts, kind):
    first = TextTokenizer.train(texts, kind, 600, lowercase=True)
    assert first.to_json() == TextTokenizer.train(texts, kind, 600, lowercase=True).to_json()
    assert first.vocab_size <= 600 and first.pad_id == 0 and first.token(first.mask_id) == "[MASK]"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_decoding_gives_the_text_back(kind):
    data = open_parallel_text("diary_en_zh", "test")
    tokenizer = TextTokenizer.train(data.sources + data.targets, kind, 500)
    for text in data.sources[:20] + data.targets[:20]:
        assert tokenizer.decode([tokenizer.start_id, *tokenizer.encode(text), tokenizer.end_id]) == text


def test_a_tokenizer_is_loaded_from_its_file(texts, tmp_path):
    tokenizer = TextTokenizer.train(texts, "wordpiece", 400)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert TextTokenizer.load(tmp_path).encode(texts[0]) == tokenizer.encode(texts[0])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer.json"):
        TextTokenizer.load(tmp_path / "tokenizer.json")


def test_an_unknown_kind_is_refused(texts):
    with pytest.raises(PaperZooError, match="'letters'"):
        TextTokenizer.train(texts, "letters")


def test_packing_cuts_the_longer_text_and_marks_the_second():
    tokenizer = TextTokenizer.train(["a b c d e f g"], "wordpiece", 40)
    ids, types = tokenizer.assemble([10, 11, 12, 13, 14, 15], [20, 21], 9)
    assert ids == [2, 10, 11, 12, 13, 3, 20, 21, 3]
    assert types == [0] * 6 + [1] * 3
    ids, types = tokenizer.assemble([10, 11], None, 6)
    assert ids == [2, 10, 11, 3, 0, 0] and types == [0] * 6


# -- search and batches of translation -------------------------------------------------------------------------------------


class Bigrams:
    """A translation model whose next token depends on the row and the last token alone."""

    def __init__(self, rows: int, vocab: int) -> None:
        self.table = torch.randn(rows, vocab, vocab, generator=torch.Generator().manual_seed(3)) * 2

    def start(self, source):
        return {"table": self.table[: len(source)]}

    def advance(self, tokens, state):
        return state["table"][torch.arange(len(tokens)), tokens], state


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_what_exhaustive_search_finds(alpha):
    vocab, longest, end = 5, 4, 2
    model, source = Bigrams(3, vocab), torch.zeros(3, 1, dtype=torch.int64)
    found = beam_search(model, source, 1, end, torch.full((3,), longest), 4**longest, alpha, forbidden=(1,))
    log_p = model.table.log_softmax(-1)
    for row in range(3):
        best = (-math.inf, [])
        for length in range(longest + 1):
            for words in itertools.product([0, 3, 4], repeat=length):
                path = [1, *words, end]
                score = sum(float(log_p[row, a, b]) for a, b in itertools.pairwise(path)) / ((6 + length) / 6) ** alpha
                best = max(best, (score, list(words)))
        assert found[row][0][0] == best[1]
        assert found[row][0][1] == pytest.approx(best[0], abs=1e-5)


def test_search_keeps_each_rows_limit():
    model, source = Bigrams(2, 5), torch.zeros(2, 1, dtype=torch.int64)
    model.table[..., 2] = -30.0  # nothing wants to end
    limits = torch.tensor([2, 5])
    assert [len(row) for row in greedy_search(model, source, 1, 2, limits)] == [2, 5]
    assert all(
        len(ids) <= limit
        for row, limit in zip(beam_search(model, source, 1, 2, limits), limits, strict=True)
        for ids, _ in row
    )


def test_token_batches_hold_every_row_once_within_the_budget():
    lengths = torch.randint(1, 40, (500,), generator=torch.Generator().manual_seed(0)).numpy()
    batches = token_batches(lengths, 200)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 200 for batch in batches)
