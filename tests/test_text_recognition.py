"""Text recognition: alphabets, CTC, decoding step by step, edit distances, the layouts of word images, the metrics and the recipe."""

from __future__ import annotations

import io
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from paperzoo.blocks import sequence_decoding as seq
from paperzoo.blocks import text_scores
from paperzoo.data import word_images as words
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, MissingExtra, PaperZooError
from paperzoo.tasks import text_recognition as task

# -- alphabets ---------------------------------------------------------------------------------------------------------


def test_texts_become_tokens_and_texts_again():
    alphabet = seq.find_alphabet("lowercase")
    tokens, lengths = alphabet.encode(["ab1", "", "Z"])
    k = len(alphabet)
    assert tokens.tolist() == [[10, 11, 1, k], [k, k + 1, k + 1, k + 1], [35, k, k + 1, k + 1]]
    assert lengths.tolist() == [3, 0, 1] and tokens.dtype == torch.int64
    assert alphabet.decode(tokens) == ["ab1", "", "z"]


def test_capitals_count_where_the_alphabet_has_them():
    alphabet = seq.find_alphabet("cased")
    assert alphabet.decode(alphabet.encode(["aB"])[0]) == ["aB"]


def test_unknown_characters_have_a_token_and_are_not_read():
    alphabet = seq.Alphabet("abc")
    tokens, _ = alphabet.encode(["axb"])
    assert tokens.tolist() == [[0, alphabet.unknown, 1, alphabet.end]]
    assert alphabet.decode(tokens) == ["ab"] and alphabet.outside("axbxy") == ["x", "y"]


def test_symbols_of_several_characters_stand_between_separators():
    alphabet = seq.Alphabet(["\\frac", "{", "}", "1", "x"], " ")
    text = "\\frac { 1 } { x }"
    assert alphabet.decode(alphabet.encode([text])[0]) == [text]
    assert alphabet.encode([text])[1].tolist() == [7]


def test_an_alphabet_from_a_file_and_from_the_data(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_bytes("\ufeffä\r\nb\r\n".encode())
    assert seq.find_alphabet(str(path)).symbols == ["ä", "b"]
    path.write_text("\\alpha\n2\n")
    assert seq.find_alphabet(str(path)).separator == " "
    assert seq.find_alphabet("data", lambda: ["ba", "cA"]).symbols == ["A", "a", "b", "c"]


def test_wrong_alphabets_are_named(tmp_path):
    with pytest.raises(PaperZooError, match="'a' is there twice"):
        seq.Alphabet("aba")
    with pytest.raises(DataError, match="no_such_alphabet.*lowercase"):
        seq.find_alphabet("no_such_alphabet")


# -- losses and CTC ----------------------------------------------------------------------------------------------------


def test_sequence_loss_counts_characters_and_the_end_alone():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5)
    targets, lengths = torch.tensor([[0, 1, 2, 3], [2, 4, 4, 4]]), torch.tensor([2, 0])
    by_hand = -sum(logits.log_softmax(2)[b, t, targets[b, t]] for b, t in [(0, 0), (0, 1), (0, 2), (1, 0)])
    assert torch.allclose(seq.sequence_cross_entropy(logits, targets, lengths), by_hand / 2)
    assert torch.allclose(seq.sequence_cross_entropy(logits, targets, lengths, "tokens"), by_hand / 4)


def alignments(text: tuple[int, ...], frames: int, blank: int) -> list[tuple[int, ...]]:
    """Every sequence of frames that collapses to a text."""
    found = []
    for path in itertools.product(range(blank + 1), repeat=frames):
        collapsed = [s for s, _ in itertools.groupby(path) if s != blank]
        if tuple(collapsed) == text:
            found.append(path)
    return found


def test_ctc_loss_is_the_sum_over_alignments():
    torch.manual_seed(1)
    logits, text = torch.randn(1, 4, 3), (0, 0)
    log_p = logits.log_softmax(2)[0]
    total = torch.logsumexp(torch.stack([sum(log_p[t, s] for t, s in enumerate(p)) for p in alignments(text, 4, 2)]), 0)
    tokens = torch.tensor([[0, 0, 2]])  # with the end token, as an alphabet of two encodes it
    assert torch.allclose(seq.ctc_loss(logits, tokens, torch.tensor([2])), -total / 2, atol=1e-5)


def test_ctc_greedy_joins_repetitions_and_drops_blanks():
    best = torch.tensor([[2, 0, 0, 2, 0, 1], [2, 2, 2, 2, 2, 2], [1, 1, 1, 0, 2, 0]])
    tokens, probability = seq.ctc_greedy(F.one_hot(best, 3) * 9.0)
    assert tokens.tolist() == [[0, 0, 1, 2, 2, 2], [2] * 6, [1, 0, 0, 2, 2, 2]]
    assert bool((probability[0, :3] > 0.99).all()) and probability[0, 3:].tolist() == [1, 1, 1]


def test_ctc_beam_search_finds_the_most_probable_text():
    torch.manual_seed(2)
    for frames in (1, 4):
        logits = torch.randn(3, frames, 3) * 1.5
        tokens, scores = seq.ctc_beam_search(logits, beam_size=16)  # more than there are texts: exact
        texts = [t for n in range(frames + 1) for t in itertools.product(range(2), repeat=n)]
        for b in range(3):
            log_p = logits[b].log_softmax(1)
            sums = {}
            for text in texts:
                paths = alignments(text, frames, 2)
                if paths:
                    each = torch.stack([sum(log_p[t, s] for t, s in enumerate(p)) for p in paths])
                    sums[text] = float(each.logsumexp(0))
            ranked = sorted(sums, key=sums.get, reverse=True)
            for rank, text in enumerate(ranked[:6]):
                assert tuple(s for s in tokens[b, rank].tolist() if s != 2) == text
                assert math.isclose(float(scores[b, rank]), sums[text], abs_tol=1e-4)


def test_a_narrow_ctc_beam_beats_greedy_where_alignments_add_up():
    # every frame favours the blank, yet "a" has more alignments than nothing
    p = torch.tensor([[[0.4, 0.6], [0.4, 0.6]]])
    assert seq.ctc_greedy(p.log())[0].tolist() == [[1, 1]]
    assert seq.ctc_beam_search(p.log(), 2)[0][0, 0].tolist() == [0, 1]


# -- one symbol after the other ----------------------------------------------------------------------------------------

K = 3  # characters; end is 3, padding 4, start 6


def table_advance(table: torch.Tensor):
    """A language of pairs: the logits of what follows depend on the last token alone; a counter shows that states follow beams."""

    def advance(tokens, state):
        return table[tokens] + 0.3 * state["seen"].float() @ torch.ones(7, 4), {
            "seen": state["seen"] + F.one_hot(tokens, 7)
        }

    return advance


def every_text(table: torch.Tensor, steps: int) -> dict[tuple[int, ...], float]:
    """All texts of at most `steps` tokens, with their log-probabilities."""
    found = {}

    def extend(text, state, total):
        last = text[-1] if text else 6
        logits = table[last] + 0.3 * state @ torch.ones(7, 4)
        log_p, after = logits.log_softmax(0), state + F.one_hot(torch.tensor(last), 7).float()
        found[(*text, 3)] = total + float(log_p[3])
        for symbol in range(3):
            longer = (*text, symbol)
            if len(longer) < steps:
                extend(longer, after, total + float(log_p[symbol]))
            else:
                found[longer] = total + float(log_p[symbol])

    extend((), torch.zeros(7), 0.0)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_finds_the_best_texts(seed):
    torch.manual_seed(seed)
    table, steps = torch.randn(7, 4), 3
    state = {"seen": torch.zeros(2, 7, dtype=torch.int64)}
    tokens, each, total = seq.beam_search_steps(table_advance(table), state, torch.full((2,), 6), steps, 3, 4, 40)
    ranked = sorted(every_text(table, steps).items(), key=lambda entry: -entry[1])
    for b in range(2):
        for rank, (text, score) in enumerate(ranked[:5]):
            assert tuple(s for s in tokens[b, rank].tolist() if s != 4) == text
            assert math.isclose(float(total[b, rank]), score, abs_tol=1e-4)
            assert math.isclose(float(each[b, rank].log().sum()), score, abs_tol=1e-3)


def test_one_beam_is_greedy():
    torch.manual_seed(3)
    table = torch.randn(7, 4)
    state = {"seen": torch.zeros(1, 7, dtype=torch.int64)}
    logits = seq.greedy_steps(table_advance(table), state, torch.tensor([6]), 5)
    tokens, each, total = seq.read_greedy(logits, 3, 4)
    found = seq.beam_search_steps(table_advance(table), state, torch.tensor([6]), 5, 3, 4, 1)
    assert found[0][0, 0].tolist() == tokens[0, : found[0].shape[2]].tolist()
    assert torch.allclose(found[2][0], total, atol=1e-5)


def test_greedy_reading_stops_at_the_end():
    logits = F.one_hot(torch.tensor([[1, 3, 2, 2], [0, 1, 2, 0]]), 5) * 4.0
    tokens, each, total = seq.read_greedy(logits, end=3, pad=4)
    assert tokens.tolist() == [[1, 3, 4, 4], [0, 1, 2, 0]] and each[0, 2:].tolist() == [1.0, 1.0]
    assert torch.allclose(total, each.log().sum(1))


def test_greedy_steps_can_stop_early():
    table = torch.full((7, 4), -9.0)
    table[:, 3] = 0
    calls = []

    def advance(tokens, state):
        calls.append(1)
        return table[tokens], state

    assert seq.greedy_steps(advance, {}, torch.tensor([6, 6]), 8, end=3).shape == (2, 1, 4)
    assert seq.greedy_steps(advance, {}, torch.tensor([6, 6]), 8).shape == (2, 8, 4) and len(calls) == 9


# -- edit distance -----------------------------------------------------------------------------------------------------


def slow_distance(a: str, b: str) -> int:
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        change = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
        table[i][j] = min(change, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


def test_edit_distances_of_many_pairs_at_once():
    rng = random.Random(0)
    pick = lambda: "".join(rng.choice("abc😀é") for _ in range(rng.randrange(9)))  # noqa: E731
    pairs = [(pick(), pick()) for _ in range(200)] + [("", ""), ("kitten", "sitting"), ("", "abc"), ("abc", "")]
    found = text_scores.edit_distances(*zip(*pairs, strict=True))
    assert found.tolist() == [slow_distance(a, b) for a, b in pairs]
    assert text_scores.edit_distances([], []).tolist() == []


def test_the_nearest_word_of_a_lexicon():
    assert text_scores.nearest_word("h0tel", ["motel", "hotel", "house"]) == "hotel"
    assert text_scores.nearest_word("xx", ["ab", "cd"]) == "ab"  # the first of several
    assert text_scores.nearest_word("as it is", []) == "as it is"


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_word_metrics_by_hand():
    scores = text_scores.WordScores("alphanumeric")
    scores.update(["Hotel", "cafe", "12", "x"], ["hotel!", "coffee", "12", "&"])
    metrics = scores.compute()
    assert metrics["word_accuracy"] == pytest.approx(2 / 3)  # "&" has nothing to compare
    assert metrics["exact_accuracy"] == pytest.approx(1 / 4)
    assert metrics["one_minus_ned"] == pytest.approx(1 - (3 / 6) / 3)
    assert metrics["character_error_rate"] == pytest.approx(3 / 13)


def test_edit_distance_metrics_agree_with_torchmetrics():
    from torchmetrics.text import CharErrorRate

    found, truth = ["kitten", "abc", ""], ["sitting", "abd", "xy"]
    scores, peer = text_scores.WordScores("exact"), CharErrorRate()
    scores.update(found, truth)
    peer.update(found, truth)
    assert scores.compute()["character_error_rate"] == pytest.approx(float(peer.compute()))


def test_answers_are_replaced_by_the_nearest_word_of_a_lexicon():
    scores = text_scores.WordScores()
    scores.update(["h0tel", "bar"], ["HOTEL", "baz"], [["motels", "Hotel"], ["bar", "baz"]])
    assert scores.compute(lexicon=True)["word_accuracy_lexicon"] == 0.5


def test_formulas_are_compared_symbol_by_symbol():
    scores = text_scores.WordScores("exact", seq.Alphabet(["\\frac", "{", "}", "1", "2"], " "))
    scores.update(["\\frac { 1 }"], ["\\frac  { 2 }"])
    assert scores.compute()["character_error_rate"] == pytest.approx(1 / 4)


def test_scores_of_nothing_are_numbers():
    assert all(math.isfinite(v) for v in text_scores.WordScores().compute().values())


# -- readers -----------------------------------------------------------------------------------------------------------


def png(width: int = 20, height: int = 10, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_lmdb(path, records: dict[str, bytes]) -> None:
    lmdb = pytest.importorskip("lmdb")
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key.encode(), value)


def standard_records() -> dict[str, bytes]:
    records = {"num-samples": b"3"}
    for i, text in enumerate(("Hotel", "café", "no"), 1):
        records |= {f"image-{i:09d}": png(20 + i), f"label-{i:09d}": text.encode()}
    return records


def test_lmdb_in_the_usual_layout(tmp_path):
    write_lmdb(tmp_path / "IIIT5K", standard_records() | {"lexicon-000000001": b"hotel, motel"})
    data = words.open_words(tmp_path / "IIIT5K", "test")
    assert [data.text(i) for i in range(len(data))] == ["Hotel", "café", "no"]
    assert data[1]["image"].shape == (3, 10, 22) and data[1]["image"].dtype == torch.uint8
    assert data.lexicon(0) == ["hotel", "motel"] and data.lexicon(1) == []
    assert data.path(2).endswith("IIIT5K:image-000000003")


def test_lmdb_goes_to_worker_processes(tmp_path):
    import pickle

    write_lmdb(tmp_path / "a", standard_records())
    data = words.LmdbWords(tmp_path / "a")
    data.image(0)
    again = pickle.loads(pickle.dumps(data))
    assert again.text(0) == data.text(0) == "Hotel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num-samples": b"many"}, "num-samples is b'many'"),
        ({"num-samples": b"0"}, "holds no samples"),
        ({"image-000000002": b"no image"}, "image-000000002: not a readable image"),
        ({"num-samples": b"4"}, "image-000000004: no such key"),
        ({"label-000000003": b"\xff"}, "label-000000003: not UTF-8"),
    ],
)
def test_broken_lmdb_records_are_named(tmp_path, change, message):
    write_lmdb(tmp_path / "a", standard_records() | change)
    with pytest.raises(DataError, match=message):
        data = words.LmdbWords(tmp_path / "a")
        [data[i] for i in range(len(data))]


def test_what_is_no_lmdb_is_named(tmp_path):
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(b"something else")
    with pytest.raises(DataError, match="not a readable LMDB"):
        words.open_words(tmp_path)


def test_without_lmdb_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MissingExtra, match=r"lmdb.*paperzoo\[ocr\]"):
        words.LmdbWords(tmp_path)


def test_training_folders_of_several_lmdbs(tmp_path):
    for name in ("training/MJ", "training/ST", "evaluation/SVT"):
        write_lmdb(tmp_path / name, standard_records())
    assert len(words.open_words(tmp_path, "train")) == 6 and len(words.open_words(tmp_path, "test")) == 3


def test_icdar_list_with_mark_quotes_and_commas(tmp_path):
    for i in range(1, 5):
        (tmp_path / f"word_{i}.png").write_bytes(png())
    lines = ['word_1.png, "Tiredness"', 'word_2.png, "Tel: 1,000"', 'word_3.png, "say \\"hi\\""', "word_4.png, plain"]
    (tmp_path / "gt.txt").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    data = words.open_words(tmp_path, "test")
    assert [data.text(i) for i in range(4)] == ["Tiredness", "Tel: 1,000", 'say "hi"', "plain"]
    assert data[0]["image"].shape == (3, 10, 20)


def test_wrong_lines_of_an_icdar_list_are_named(tmp_path):
    (tmp_path / "gt.txt").write_text('word_1.png, "a"\nnonsense\n')
    with pytest.raises(DataError, match=r"gt\.txt:2: .*nonsense"):
        words.open_words(tmp_path / "gt.txt")


def test_csv_with_splits_and_lexicons(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = ["path,text,split,lexicon", 'a.png,"1,5 km",train,', "a.png,bar,test,bar baz", 'a.png,"say ""x""",test,']
    (tmp_path / "words.csv").write_bytes(("\ufeff" + "\n".join(rows)).encode())
    train, test = (words.open_words(tmp_path / "words.csv", split) for split in ("train", "test"))
    assert train.texts == ["1,5 km"] and test.texts == ["bar", 'say "x"'] and test.lexicon(0) == ["bar", "baz"]


def test_tsv_takes_quotes_as_they_are(tmp_path):
    (tmp_path / "w.tsv").write_text('image\tlabel\na.png\t5"\n')
    assert words.open_words(tmp_path / "w.tsv").texts == ['5"']


def test_wrong_rows_of_a_table_are_named(tmp_path):
    path = tmp_path / "w.csv"
    path.write_text("path,text\na.png,ok\nb.png,1,000\n")
    with pytest.raises(DataError, match=r"w\.csv:3: .*quote a text with commas"):
        words.open_words(path)
    path.write_text("name,words\n")
    with pytest.raises(DataError, match="columns path and text"):
        words.open_words(path)


def test_mjsynth_annotations(tmp_path):
    (tmp_path / "2425" / "1").mkdir(parents=True)
    (tmp_path / "2425" / "1" / "115_Lube_45484.jpg").write_bytes(png())
    (tmp_path / "annotation_train.txt").write_text("./2425/1/115_Lube_45484.jpg 45484\n")
    (tmp_path / "annotation_test.txt").write_text("./2425/1/115_Lube_45484.jpg 45484\n./x.jpg 1\n")
    data = words.open_words(tmp_path, "train")
    assert data.texts == ["Lube"] and data[0]["image"].shape == (3, 10, 20)
    with pytest.raises(DataError, match=r"annotation_test\.txt:2: .*115_Lube_45484"):
        words.open_words(tmp_path, "test")


def test_missing_places_and_images_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.*rendered_digits"):
        words.open_words("nowhere")
    with pytest.raises(DataError, match="looked for data.mdb"):
        words.open_words(tmp_path)
    (tmp_path / "gt.txt").write_text("gone.png, x\n")
    with pytest.raises(DataError, match="gone.png"):
        words.open_words(tmp_path)[0]


class Listed(words.WordImages):
    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def image(self, index):
        return torch.full((3, 10, 20), index, dtype=torch.uint8)

    def text(self, index):
        return self.texts[index]

    def path(self, index):
        return f"sample {index}"


def test_sets_follow_each_other_or_are_drawn_from_equally():
    one, two = Listed(["a", "b", "c"]), Listed(["x"])
    joined = words.Several([one, two])
    assert [joined.text(i) for i in range(len(joined))] == ["a", "b", "c", "x"]
    equal = words.Several([one, two], equal=True)
    assert [equal.text(i) for i in range(len(equal))] == ["a", "x", "b", "x", "c", "x"]


def test_rendered_words_are_held_out():
    train, test = (words.open_words("rendered_digits", split, 40, 32, 64) for split in ("train", "test"))
    assert train[0]["image"].shape == (3, 32, 64) and all(t.isdigit() for t in train.texts)
    assert not set(train.texts) & set(test.texts)


# -- what can be learned from --------------------------------------------------------------------------------------------


def test_texts_that_cannot_be_learned_from_are_left_out_and_counted(caplog):
    data, alphabet = Listed(["ok", "", "too long", "né", "x"]), seq.find_alphabet("lowercase")
    with caplog.at_level("WARNING", logger="paperzoo"):
        kept = task.learnable(data, alphabet, 4, "skip", "there")
    assert [kept.text(i) for i in range(len(kept))] == ["ok", "x"]
    assert "3 of 5" in caplog.text and "1 empty" in caplog.text and "é" in caplog.text
    assert len(task.learnable(data, alphabet, 4, "drop", "there")) == 3
    assert len(task.learnable(data, alphabet, 4, "unknown", "there")) == 3


def test_refused_characters_name_the_sample():
    with pytest.raises(DataError, match=r"sample 1: .*'né' has 'é'"):
        task.learnable(Listed(["a", "né"]), seq.find_alphabet("lowercase"), 9, "refuse", "there")
    with pytest.raises(DataError, match="none of its 1 texts"):
        task.learnable(Listed(["é"]), seq.find_alphabet("lowercase"), 9, "skip", "there")


# -- pictures ------------------------------------------------------------------------------------------------------------

FACTS = {"alphabet": list("0123456789"), "separator": "", "mean": [0.5] * 3, "deviation": [0.5] * 3}


@pytest.mark.parametrize(
    ("policy", "shapes", "canvas"),
    [("stretch", [(8, 40), (8, 40)], 40), ("pad", [(8, 16), (8, 40)], 40), ("batch", [(8, 16), (8, 40)], 40)],
)
def test_pictures_are_stretched_or_padded(policy, shapes, canvas):
    config = task.Config(height=8, width=40, resize=policy)
    images = [torch.full((3, 4, 8), 255, dtype=torch.uint8), torch.zeros(3, 10, 90, dtype=torch.uint8)]
    fitted = [task.resized(image, config) for image in images]
    assert [tuple(x.shape[1:]) for x in fitted] == shapes
    batch, sizes = task.Collate(config, FACTS).images(fitted)
    assert batch.shape == (2, 3, 8, canvas) and sizes.tolist() == [list(s) for s in shapes]
    width = shapes[0][1]
    assert bool((batch[0, :, :, :width] == 1).all()) and bool((batch[0, :, :, width:] == 0).all())


def test_batches_are_as_wide_as_their_widest():
    config = task.Config(height=8, width=400, resize="batch", multiple=8)
    batch, _ = task.Collate(config, FACTS).images([torch.zeros(3, 8, 17, dtype=torch.uint8)])
    assert batch.shape == (1, 3, 8, 24)


@pytest.mark.parametrize("kind", ["colour", "distort"])
def test_augmented_pictures_keep_their_size(kind):
    image = torch.randint(0, 256, (3, 12, 40), dtype=torch.uint8)
    assert task.augmentation(kind)(image).shape == image.shape


def test_control_points_are_placed_in_the_picture():
    points = task.place(torch.tensor([[0.5, 0.5], [0.25, 1.0]]), canvas=100, width=50, shape=torch.Size([3, 60, 200]))
    assert points == [(200.0, 30.0), (100.0, 60.0)]


# -- the recipe with a CTC network, which no paper is needed for -------------------------------------------------------


class TinyCTC(nn.Module):
    """Three convolutions: what the contract asks of a network that aligns."""

    uses_sizes = True

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, (2, 2), 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 16)))
        self.fc = nn.Linear(8, num_classes + 1)

    def forward(self, images, sizes, targets=None):
        logits = self.fc(self.body(images)[:, :, 0].transpose(1, 2))
        return logits if targets is None else {"ctc": seq.ctc_loss(logits, targets["tokens"], targets["lengths"])}

    def decode(self, outputs):
        tokens, each = seq.ctc_greedy(outputs)
        return tokens, each, each.log().sum(1)


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(task.TextRecognitionRecipe, "build", lambda self: TinyCTC(len(self.alphabet)))
    config = task.Config(data="rendered_digits", words=24, alphabet="digits", width=64, batch_size=8, steps=4)
    return task.TextRecognitionRecipe(config, Runtime())


def test_a_ctc_network_fits_the_contract(recipe, tmp_path):
    before = [p.clone() for p in recipe.model.parameters()]
    result = recipe.step(recipe.batch())
    recipe.runtime.update(recipe.optimizer, result["loss"])
    assert "ctc_loss" in result and any(
        not torch.equal(a, b) for a, b in zip(before, recipe.model.parameters(), strict=True)
    )
    metrics = recipe.evaluate("test")
    assert set(metrics) == {"word_accuracy", "exact_accuracy", "one_minus_ned", "character_error_rate"}
    found = recipe.predict(recipe.samples(tmp_path))
    assert len(found) == 8 and all(isinstance(f, task.Text) and 0 <= f.confidence <= 1 for f in found)
    assert all("".join(c for c, _ in f.characters) == f.text for f in found)
    assert recipe.draw(np.zeros((10, 20, 3), np.uint8), found[0]).height > 40
    assert len(recipe.example()) == 2 and recipe.figures()


def test_adadelta_is_the_default_optimizer(recipe):
    assert isinstance(recipe.optimizer, torch.optim.Adadelta) and recipe.optimizer.param_groups[0]["rho"] == 0.9


def test_lexicons_of_an_evaluation(recipe, tmp_path):
    recipe.config = replace(recipe.config, lexicon="full")
    assert 0 <= recipe.evaluate("test")["word_accuracy_lexicon"] <= 1
    path = tmp_path / "lexicon.txt"
    path.write_text(recipe.test_data.words.text(0) + "\n")
    recipe.config = replace(recipe.config, lexicon=str(path))
    assert recipe.evaluate("test")["word_accuracy_lexicon"] > 0
    recipe.config = replace(recipe.config, lexicon="own")
    with pytest.raises(DataError, match="no lexicon of its own"):
        recipe.evaluate("test")
