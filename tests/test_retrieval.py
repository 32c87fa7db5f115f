"""Image retrieval: search, readers of the real layouts, metrics against hand-computed and other values, the recipe."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.blocks import search
from paperzoo.blocks.search import Index, count_bits, hamming_distances, nearest, pack_bits, unpack_bits
from paperzoo.catalog.cards import find
from paperzoo.data.retrieval import hashing_protocol, open_retrieval
from paperzoo.engine.loop import Settings, one_step
from paperzoo.engine.run import build, load, train
from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName
from paperzoo.tasks import retrieval_metrics as measure
from paperzoo.tasks.retrieval import Config, RetrievalRecipe

GENERATOR = torch.Generator().manual_seed(5)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


# -- search ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 12, 64, 65, 130])
def test_packed_codes_have_the_distances_of_their_signs(bits):
    a, b = randn(7, bits), randn(30, bits)
    literal = ((a[:, None] > 0) != (b[None] > 0)).sum(-1)
    assert torch.equal(hamming_distances(pack_bits(a), pack_bits(b)).long(), literal)
    assert torch.equal(unpack_bits(pack_bits(a), bits), torch.where(a > 0, 1.0, -1.0))


def test_bits_are_counted_without_numpys_function_too(monkeypatch):
    words = torch.tensor([0, 1, -1, 2**62, -(2**63), 0x5555555555555555])
    assert count_bits(words).tolist() == [0, 1, 64, 1, 1, 32]
    a, b = pack_bits(randn(5, 100)), pack_bits(randn(9, 100))
    expected = hamming_distances(a, b)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert count_bits(words).tolist() == [0, 1, 64, 1, 1, 32]
    assert torch.equal(hamming_distances(a, b), expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.int16])
@pytest.mark.parametrize("k", [1, 5, 40, 99])
def test_equal_distances_come_in_the_order_of_rows(kind, k):
    found = torch.randint(0, 6, (9, 60), generator=GENERATOR).to(kind)
    values, columns = nearest(found, k)
    for row, value, column in zip(found.tolist(), values.tolist(), columns.tolist(), strict=True):
        expected = sorted(range(60), key=lambda j: (row[j], j))[:k]
        assert column == expected and value == [row[j] for j in expected]


def test_not_a_number_is_never_near():
    values, columns = nearest(torch.tensor([[float("nan"), 2.0, 1.0, 3.0, 4.0]]), 1)
    assert columns.tolist() == [[2]] and values.tolist() == [[1.0]]


@pytest.mark.parametrize("metric", search.METRICS)
def test_search_finds_what_sorting_all_distances_finds(metric, monkeypatch):
    monkeypatch.setattr(search, "ENTRIES", 200)  # chunks of a few queries
    gallery, queries = randn(50, 6), randn(11, 6)
    unit = lambda x: x / x.norm(dim=1, keepdim=True)  # noqa: E731
    literal = {
        "inner": -(queries @ gallery.T),
        "cosine": 1 - unit(queries) @ unit(gallery).T,
        "l2": (queries[:, None] - gallery[None]).norm(dim=-1),
        "hamming": ((queries[:, None] > 0) != (gallery[None] > 0)).sum(-1).float(),
    }[metric]
    distances, rows = Index(gallery, metric).search(queries, 8)
    values, order = literal.sort(dim=1, stable=True)
    assert torch.equal(rows, order[:, :8])
    torch.testing.assert_close(distances.float(), values[:, :8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", search.METRICS)
@pytest.mark.parametrize("k", [1, 10, 200])
def test_faiss_gives_the_same_answers(metric, k):
    pytest.importorskip("faiss")
    gallery, queries = randn(120, 16), randn(20, 16)  # Hamming distances have many ties
    ours, theirs = Index(gallery, metric).search(queries, k), Index(gallery, metric, "faiss").search(queries, k)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[0].float(), theirs[0].float(), rtol=1e-5, atol=1e-5)


def test_an_empty_gallery_finds_nothing():
    distances, rows = Index(torch.zeros(0, 8), "hamming").search(randn(3, 8), 5)
    assert distances.shape == rows.shape == (3, 0)


def test_wrong_searches_are_named(monkeypatch):
    with pytest.raises(PaperZooError, match="metric 'hammin' is not known"):
        Index(randn(3, 4), "hammin")
    with pytest.raises(PaperZooError, match="backend 'annoy' is not known"):
        Index(randn(3, 4), "l2", "annoy")
    with pytest.raises(PaperZooError, match="queries have 5 columns, the gallery has 4"):
        Index(randn(3, 4)).search(randn(1, 5), 1)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"paperzoo\[retrieval\]"):
        Index(randn(3, 4), "l2", "faiss")


# -- metrics -----------------------------------------------------------------------------------------------------------


def released_map(codes, queries, labels, query_labels, depth):
    """HashNet's mean_average_precision written out; ties are broken by the row."""
    found = []
    for q, y in zip(queries, query_labels, strict=True):
        order = sorted(range(len(codes)), key=lambda i: (-float(codes[i] @ q), i))[:depth]
        matches = [bool(((labels[i] > 0) & (y > 0)).any()) for i in order]
        hits, total = 0, 0.0
        for rank, match in enumerate(matches, 1):
            hits += match
            total += match * hits / rank
        if hits:
            found.append(total / hits)
    return sum(found) / len(found)


@pytest.mark.parametrize("depth", [5, 20, 60])
def test_map_is_the_released_codes(depth):
    codes, queries = randn(60, 10).sign(), randn(12, 10).sign()
    labels, query_labels = (torch.rand(n, 7, generator=GENERATOR) < 0.15 for n in (60, 12))
    _, order = nearest(Index(codes, "hamming").distances(queries), 60)
    relevant = measure.shared_labels(query_labels.float(), labels.float()).gather(1, order) > 0
    assert measure.mean([measure.average_precision(relevant[:, :depth])]) == pytest.approx(
        released_map(codes, queries, labels, query_labels, depth), rel=1e-12
    )


def test_map_by_hand():
    relevant = torch.tensor([[True, False, True, False], [False, False, False, True], [False] * 4])
    values = measure.average_precision(relevant)
    assert values[:2].tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 4]) and bool(values[2].isnan())
    assert measure.mean([values]) == pytest.approx((5 / 6 + 1 / 4) / 2)  # the third does not count
    assert measure.average_precision(relevant[:, :2])[0] == pytest.approx(1.0)  # one relevant among the two found
    assert measure.mean([]) == 0.0


def test_average_precision_and_ndcg_as_torchmetrics_and_sklearn():
    from sklearn.metrics import average_precision_score, ndcg_score
    from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate, retrieval_precision

    scores = torch.rand(6, 40, generator=GENERATOR)
    shared = torch.randint(0, 3, (6, 40), generator=GENERATOR)
    ranked = shared.gather(1, scores.argsort(dim=1, descending=True))
    average, gain = measure.average_precision(ranked > 0), measure.ndcg_at(ranked, 10)
    for i in range(6):
        truth = shared[i] > 0
        assert float(average[i]) == pytest.approx(average_precision_score(truth.numpy(), scores[i].numpy()), rel=1e-9)
        assert float(average[i]) == pytest.approx(float(retrieval_average_precision(scores[i], truth)), rel=1e-5)
        assert float(gain[i]) == pytest.approx(
            ndcg_score([(2.0 ** shared[i].numpy() - 1)], [scores[i].numpy()], k=10), rel=1e-9
        )
        for k in (1, 5, 10):
            hit, precision = measure.hit_at(ranked > 0, k)[i], measure.precision_at(ranked > 0, k)[i]
            assert float(hit) == float(retrieval_hit_rate(scores[i], truth, k))
            assert float(precision) == pytest.approx(float(retrieval_precision(scores[i], truth, k)))


def test_precision_within_a_radius_is_zero_where_nothing_lies():
    distances = torch.tensor([[0, 2, 3, 1], [3, 4, 5, 6]])
    relevant = torch.tensor([[True, False, True, True], [True] * 4])
    assert measure.precision_within(distances, relevant, 2).tolist() == pytest.approx([2 / 3, 0.0])


def test_recall_and_the_curve_by_hand():
    relevant = torch.tensor([[True, False, True, False]])
    assert measure.recall_at(relevant, 1).tolist() == [0.5] and measure.recall_at(relevant, 3).tolist() == [1.0]
    points = measure.precision_recall(relevant)
    assert points[0] == pytest.approx((0.5, 1.0)) and points[-1] == pytest.approx((1.0, 0.5))


def test_unknown_classes_are_shared_with_nothing():
    assert measure.shared_labels(torch.tensor([-1, 2]), torch.tensor([-1, 2, 2])).tolist() == [[0, 0, 0], [0, 1, 1]]
    several = measure.shared_labels(torch.tensor([[1.0, 1, 0]]), torch.tensor([[1.0, 1, 1], [0, 0, 1]]))
    assert several.tolist() == [[2, 0]]


# -- data --------------------------------------------------------------------------------------------------------------


def picture(path, colour="red", size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_queries_of_the_digits_are_not_in_the_database():
    train, database, query = (open_retrieval("digits", role) for role in ("train", "database", "query"))
    assert (len(train), len(database), len(query)) == (1438, 1438, 359)
    known = {image.numpy().tobytes() for image in database.pixels}
    assert sum(image.numpy().tobytes() in known for image in query.pixels) == 0
    assert query.names(0) == [query.labels[int(query.targets[0])]]


def test_the_hashing_protocol_splits_by_class():
    targets = torch.arange(10).repeat(60)
    rows = {role: hashing_protocol(targets, role, queries=5, train=20) for role in ("query", "train", "database")}
    assert [len(rows[role]) for role in ("query", "train", "database")] == [50, 200, 550]
    assert not set(rows["query"].tolist()) & set(rows["database"].tolist())
    assert set(rows["train"].tolist()) <= set(rows["database"].tolist())
    assert targets[rows["query"]].bincount().tolist() == [5] * 10


def lists(root, lines: dict[str, str]):
    for name in ("a.jpg", "b.jpg"):
        picture(root / "val2014" / name)
    for name, text in lines.items():
        (root / name).write_text(text)
    return root


def test_hashnets_lists(tmp_path):
    theirs = "/home/them/dataset/coco/val2014/"
    root = lists(
        tmp_path, {"train.txt": f"{theirs}a.jpg 0 1 1\n\n{theirs}b.jpg 1 0 0\n", "test.txt": "val2014/b.jpg 0 0 1\n"}
    )
    train, query, database = (open_retrieval(root, role) for role in ("train", "query", "database"))
    assert train.targets.tolist() == [[0, 1, 1], [1, 0, 0]] and train.labels == ["0", "1", "2"]
    assert train[0][0].shape == (3, 7, 9) and query[0][0].shape == (3, 7, 9)
    assert train.names(0) == ["1", "2"] and database.paths == train.paths
    assert train.paths[0] == str(root / "val2014" / "a.jpg")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("val2014/a.jpg 0 1\nval2014/b.jpg 0 1 1\n", r"train.txt:2: has 3 labels, the lines before have 2"),
        ("val2014/a.jpg 0 1\nval2014/b.jpg 0 2\n", r"train.txt:2: expected a path and a 0 or 1"),
        ("val2014/a.jpg\n", r"train.txt:1: expected a path and a 0 or 1"),
        ("val2014/a.jpg 0 01\n", r"train.txt:1: expected a path and a 0 or 1"),
        ("\n", r"train.txt: is empty"),
    ],
)
def test_wrong_lists_are_named(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        open_retrieval(lists(tmp_path, {"train.txt": text}), "train")


def test_a_folder_of_query_and_gallery(tmp_path):
    for place in ("train/cat/1.png", "train/dog/2.png", "gallery/owl/3.png", "query/owl/4.png", "query/fox/5.png"):
        picture(tmp_path / place)
    train, gallery, query = (open_retrieval(tmp_path, role) for role in ("train", "database", "query"))
    assert train.labels == ["cat", "dog"] and gallery.labels == query.labels == ["fox", "owl"]
    assert query.targets.tolist() == [0, 1] and gallery.targets.tolist() == [1]


def test_a_folder_of_classes(tmp_path):
    for i in range(10):
        picture(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png")
    train, database, query = (open_retrieval(tmp_path, role) for role in ("train", "database", "query"))
    assert len(train) + len(query) == 10 and train.paths == database.paths and not set(train.paths) & set(query.paths)


def test_pictures_without_classes_can_only_be_searched(tmp_path):
    picture(tmp_path / "1.png")
    gallery = open_retrieval(tmp_path, "database")
    assert gallery.targets.tolist() == [-1] and gallery.names(0) == [] and gallery[0][1] == -1
    with pytest.raises(DataError, match="can be searched"):
        open_retrieval(tmp_path, "train")


def table(tmp_path, text):
    picture(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(text)
    return tmp_path / "list.csv"


def test_a_table_with_roles(tmp_path):
    path = table(tmp_path, "path,labels,split\na.png,cat;dog,train\na.png,dog,gallery\na.png,owl,test\n")
    train, database, query = (open_retrieval(path, role) for role in ("train", "database", "query"))
    assert train.labels == ["cat", "dog", "owl"] and train.targets.tolist() == [[1, 1, 0]]
    assert database.targets.tolist() == [[0, 1, 0]] and query.targets.tolist() == [[0, 0, 1]]


def test_a_table_with_one_label_and_no_database(tmp_path):
    path = table(tmp_path, "path,label,split\na.png,7,train\na.png,12,train\na.png,7,query\n")
    assert open_retrieval(path, "database").targets.tolist() == [0, 1] and open_retrieval(path, "query").labels == [
        "7",
        "12",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,label\na.png,x\n", "a column path is needed"),
        ("path,label\n,x\n", r"list.csv:2: has no path"),
        ("path,label,split\na.png,x,training\n", r"list.csv:2: 'training' in the column split"),
        ("path,label,split\na.png,x,train\n", "no rows for the role 'query'"),
        ("path,label\n", "no rows below the header"),
    ],
)
def test_wrong_tables_are_named(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        open_retrieval(table(tmp_path, text), "query")


def test_a_table_without_labels_is_a_gallery(tmp_path):
    path = table(tmp_path, "path,split\na.png,database\n")
    assert open_retrieval(path, "database").targets.tolist() == [-1]
    with pytest.raises(DataError, match="no labels in the rows"):
        open_retrieval(path, "train")


def test_unknown_names_are_answered(tmp_path):
    with pytest.raises(UnknownName, match="digits"):
        open_retrieval("digit")
    with pytest.raises(UnknownName, match="no role of images"):
        open_retrieval("digits", "trian")
    with pytest.raises(DataError, match="no such file"):
        open_retrieval(tmp_path / "nothing.csv")


# -- the recipe --------------------------------------------------------------------------------------------------------

SMALL = Config(
    model="resnet20_cifar", embedding_size=12, image_size=16, augment="none", steps=2, batch_size=8, neighbours=3
)


def recipe(**changes) -> RetrievalRecipe:
    config = dataclasses.replace(SMALL, **changes)
    return build(find("resnet"), config, Settings(device="cpu"), recipe_class=RetrievalRecipe)


def few(recipe: RetrievalRecipe, count: int = 40) -> RetrievalRecipe:
    """Its queries and its gallery made smaller."""
    opened = recipe.open
    recipe.open = lambda split: (lambda data: data.subset(range(count)) if split != "train" else data)(opened(split))
    return recipe


def test_the_gallery_is_embedded_anew_when_the_network_has_changed(tmp_path):
    made = few(recipe())
    first = made.gallery()
    assert made.gallery() is first
    one_step(made, tmp_path)
    second = made.gallery()
    assert second is not first and not torch.equal(first.index.codes, second.index.codes)


@pytest.mark.parametrize("metric", ["cosine", "hamming"])
def test_predictions_are_nearest_first_and_as_faiss_has_them(metric):
    pytest.importorskip("faiss")
    images = open_retrieval("digits", "query").pixels[:3]
    answers = [few(recipe(metric=metric, search=kind)).predict(list(images)) for kind in ("exact", "faiss")]
    for one, other in zip(*answers, strict=True):
        assert one.indices == other.indices and one.distances == sorted(one.distances) and len(one.items) == 3
        assert one.labels[0][0] in "0123456789"


def test_a_finished_run_searches_after_loading_and_a_gallery_of_ones_own(tmp_path):
    from paperzoo.engine.configure import configure  # noqa: F401

    pictures = tmp_path / "pictures"
    for i, colour in enumerate(["red", "green", "blue"]):
        picture(pictures / f"{i}.png", colour)
    train(
        "hashnet",
        changes={"steps": 2, "pretrain_steps": 1},
        settings=Settings(device="cpu"),
        folder=tmp_path / "run",
        report=False,
    )
    loaded = load(tmp_path / "run", device="cpu", gallery=str(pictures))
    answer = loaded.predict([str(pictures / "1.png")])[0]
    assert sorted(answer.items) == sorted(str(p) for p in pictures.iterdir()) and answer.distances[0] == 0.0
    with pytest.raises(DataError, match="nothing can be scored"):
        loaded.evaluate()


def test_several_labels_an_image_are_learned_and_scored(tmp_path):
    rows = ["path,labels,split"]
    for i, labels in enumerate(["a", "b", "a;b", "b;c", "c", "a;c", "b"]):
        picture(tmp_path / f"{i}.png", (i * 30, 255 - i * 30, 99))
        rows.append(f"{i}.png,{labels},{'test' if i > 4 else 'train'}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    made = recipe(data=str(tmp_path / "list.csv"), metric="hamming")
    assert float(one_step(made, tmp_path)["loss"].detach()) > 0
    metrics = made.evaluate()
    assert {"mAP", "precision_radius_2", "ndcg_at_100", "recall_at_1", "precision_at_100"} <= metrics.keys()
    assert all(0 <= value <= 1 for value in metrics.values())


def test_broken_files_leave_the_others_in_their_places(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", (0, 60 * i, 0))
    (tmp_path / "1.png").write_bytes(b"no picture")
    made = recipe(gallery=str(tmp_path))
    found = made.gallery()
    assert found.rows.tolist() == [0, 2, 3] and len(found.index) == 3
    answer = made.predict([str(tmp_path / "3.png")])[0]
    assert answer.items[0].endswith("3.png") and answer.distances[0] == pytest.approx(0, abs=1e-6)


def test_pictures_show_right_and_wrong(tmp_path):
    made = few(recipe())
    (tmp_path / "samples").mkdir()
    paths = made.samples(tmp_path / "samples")
    drawn = made.draw(paths[0], made.predict(paths[:1])[0])
    colours = set(drawn.getdata())
    assert colours & {(0x3C, 0xB4, 0x4B), (0xE6, 0x19, 0x4B)} and drawn.height < drawn.width
