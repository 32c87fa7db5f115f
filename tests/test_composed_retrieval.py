"""Composed image retrieval: the embedded scenes, readers of the real layouts, the protocol, the recipe."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from PIL import Image

from paperzoo.catalog.cards import find
from paperzoo.data import shape_grid
from paperzoo.data.composed_queries import open_composed, pad, replacement, to_ids, vocabulary, words
from paperzoo.engine.loop import Settings, one_step
from paperzoo.engine.run import build, load, train
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.papers.retrieval.tirg.recipe import PRESETS, TirgRecipe
from paperzoo.tasks.composed_retrieval import split_query

# -- the embedded scenes -----------------------------------------------------------------------------------------------


def test_splits_share_no_scene_and_every_test_scene_has_a_combination_never_learned():
    learned, tested = shape_grid.changes("train", 200), shape_grid.changes("test", 60)
    seen = {thing[:2] for one in learned for scene in (one.source, one.target) for thing in scene if thing}
    for one in tested:
        for scene in (one.source, one.target):
            assert any(thing and thing[:2] not in seen for thing in scene)
    pairs = [(learned[i], learned[i + 1]) for i in range(0, len(learned), 2)]
    assert all(a.source == b.source and a.target != b.target != b.source for a, b in pairs)


def test_sentences_say_what_changes():
    rng = random.Random(1)
    scene = shape_grid.scene_of({0: (0, 1, 0), 4: (1, 2, 2)})  # a small red circle, a large blue square
    said = {one.text: one.target for one in (shape_grid.change(scene, [(0, 1), (0, 7)], rng) for _ in range(3000))}
    assert said["make red circle large"][0] == (0, 1, 2)
    assert said["make red circle yellow"][0] == (0, 7, 0)
    assert said["remove blue square"] == shape_grid.scene_of({0: (0, 1, 0)})
    assert said["add medium yellow circle to bottom-right"][8] == (0, 7, 1)
    twins = shape_grid.scene_of({0: (0, 1, 0), 8: (0, 1, 2)})
    texts = {shape_grid.change(twins, [(0, 1)], rng).text for _ in range(200)}
    assert "remove top-left red circle" in texts and "remove red circle" not in texts


def test_scenes_are_drawn_in_their_cells():
    empty, full = shape_grid.draw([shape_grid.scene_of({}), shape_grid.scene_of({2: (1, 2, 2)})], 24)
    assert int(empty.min()) == 255
    assert full[:, 3, 20].tolist() == [42, 75, 215]  # the large blue square's middle, top right
    assert int(full[:, :, :16].min()) == 255 and int(full[:, 8:].min()) == 255
    areas = shape_grid.stamps(24).sum((-2, -1))
    assert bool((areas[:, 1:] > 1.5 * areas[:, :-1]).all())  # sizes can be told apart
    with pytest.raises(ValueError, match="multiple of 3"):
        shape_grid.draw([shape_grid.scene_of({})], 25)


def test_the_embedded_set_has_exact_targets():
    data = open_composed("composed_shapes", "test")
    assert len(data.sources) == 600 and len(data) == 100 and data.pool.image(0).shape == (3, 24, 24)
    (a, first, x), (b, second, y) = data[0]
    assert torch.equal(a, b) and first != second and not torch.equal(x, y)


# -- words -------------------------------------------------------------------------------------------------------------


def test_words_and_their_ids():
    assert words("Add red cube to top-left!") == ["add", "red", "cube", "to", "topleft"]
    known = {word: i for i, word in enumerate(vocabulary(["make it red", "make it blue"]), 1)}
    assert known == {"blue": 1, "it": 2, "make": 3, "red": 4}
    assert to_ids("make it  green", known) == [3, 2, 0] and to_ids(" ", known) == [0]
    tokens, lengths = pad([[3, 2], [1]])
    assert tokens.tolist() == [[3, 2], [1, 0]] and lengths.tolist() == [2, 1]


# -- readers -----------------------------------------------------------------------------------------------------------


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), colour).save(path)


def table(tmp_path, text):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "list.csv").write_text(text)
    return tmp_path / "list.csv"


def test_a_table_of_queries(tmp_path):
    path = table(
        tmp_path,
        "query,change,target,split\na.png,in blue,b.png,train\na.png,smaller,c.png,train\nd.png,x,a.png,test\n",
    )
    data = open_composed(path, "train")
    assert (data.sources, data.texts, data.targets) == ([0, 0], ["in blue", "smaller"], [1, 2])
    assert len(data) == 1 and len(data[0]) == 2 and {text for _, text, _ in data.drawn(0)} == {"in blue", "smaller"}
    assert open_composed(path, "test").pool.paths == [str(tmp_path / "d.png"), str(tmp_path / "a.png")]


def test_a_table_without_a_split_holds_sources_out(tmp_path):
    rows = "".join(f"{i}.png,x,t{i}.png\n{i}.png,y,u{i}.png\n" for i in range(10))
    path = table(tmp_path, "reference,text,target\n" + rows)
    learned, tested = open_composed(path, "train"), open_composed(path, "test")
    assert (
        len(learned.sources) == 16 and len(tested.sources) == 4 and not set(learned.pool.paths) & set(tested.pool.paths)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("query,target\na.png,b.png\n", "change is not there"),
        ("query,change,target\na.png,x,\n", r"list.csv:2: has no target"),
        ("query,change,target\n,x,a.png\n", r"list.csv:2: has no query"),
        ("query,change,target,split\na.png,x,b.png,tran\n", r"list.csv:2: 'tran' in the column split"),
        ("query,change,target,split\na.png,x,b.png,test\n", "no queries for the split 'train'"),
    ],
)
def test_wrong_tables_are_named(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        open_composed(table(tmp_path, text), "train")


def fashion(root, lines=None, queries="women/1.jpeg women/2.jpeg\n"):
    captions = ["black silk dress", "blue silk dress", "blue silk dress", "red hat"]
    for i in range(4):
        picture(root / "women" / f"{i}.jpeg")
    (root / "labels").mkdir()
    text = lines or "".join(f"women/{i}.jpeg\t0.9\t{caption}\n" for i, caption in enumerate(captions))
    for split in ("train", "test"):
        (root / "labels" / f"dress_{split}_detect_all.txt").write_text(text)
    (root / "test_queries.txt").write_text(queries)
    return root


def test_fashion200k(tmp_path):
    root = fashion(tmp_path)
    learned, tested = open_composed(root, "train"), open_composed(root, "test")
    assert len(learned) == 3  # the hat differs from every other in more than a word
    (source, text, target) = learned.drawn(0)[0]
    assert (source, text) == (0, "replace black with blue") and target in (1, 2)
    assert tested.texts == ["replace dress with dress"] and tested.sources == [1] and tested.targets == [2]
    assert tested.pool.targets.tolist() == [0, 1, 1, 2] and tested.pool.names(2) == ["blue silk dress"]
    assert {"replace", "with", "silk"} <= set(learned.vocabulary())
    assert replacement("black silk dress", "blue silk dress") == "replace black with blue"


def test_wrong_fashion_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"dress_train_detect_all.txt:2: expected file, score and caption"):
        open_composed(fashion(tmp_path / "one", "women/1.jpeg\t1\tred hat\nwomen/2.jpeg red\n"), "train")
    with pytest.raises(DataError, match=r"test_queries.txt:1: expected two files"):
        open_composed(fashion(tmp_path / "two", queries="women/1.jpeg women/9.jpeg\n"), "test")
    with pytest.raises(DataError, match="no two captions differ in one word"):
        open_composed(
            fashion(tmp_path / "three", "women/1.jpeg\t1\tred hat\nwomen/2.jpeg\t1\tbig blue coat\n"), "train"
        )


def test_mit_states(tmp_path):
    for folder in ("old car", "new car", "red car", "adj car", "ripe tomato", "unripe tomato"):
        picture(tmp_path / "images" / folder / "1.jpg")
    learned, tested = open_composed(tmp_path, "train"), open_composed(tmp_path, "test")
    assert len(learned) == 3 and len({text for _, text, _ in learned.drawn(0)}) == 2
    assert all(learned.pool.names(s) != learned.pool.names(t) for s, _, t in learned.drawn(0))
    assert sorted(tested.texts) == ["ripe", "unripe"] and len(tested.pool) == 2


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "css_toy_dataset_novel2_small.dup.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "images").mkdir()
    for place in (tmp_path, tmp_path / "css_toy_dataset_novel2_small.dup.npy"):
        with pytest.raises(DataError, match="may run any code"):
            open_composed(place, "train")


def test_unknown_places_are_answered(tmp_path):
    with pytest.raises(UnknownName, match="composed_shapes"):
        open_composed("composed_shape")
    with pytest.raises(DataError, match="neither Fashion200k"):
        open_composed(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        open_composed(tmp_path / "x.csv")
    with pytest.raises(UnknownName, match="no split"):
        open_composed("composed_shapes", "valid")


# -- the recipe --------------------------------------------------------------------------------------------------------


def recipe(**changes) -> TirgRecipe:
    config = dataclasses.replace(PRESETS["embedded"], steps=2, batch_size=4, warmup_steps=0, **changes)
    return build(find("tirg"), config, Settings(device="cpu"))


class Oracle(torch.nn.Module):
    """Features of pictures are their pixels, each picture being one shade; a query asks for its own plus the sentence's length."""

    def embed_image(self, images):
        shade = images.mean((1, 2, 3))
        return torch.stack([shade.cos(), shade.sin()], 1)

    def forward(self, images, tokens, lengths):
        shade = images.mean((1, 2, 3)) + 0.2 * lengths
        return torch.stack([shade.cos(), shade.sin()], 1)


def test_recall_leaves_the_querys_own_picture_out(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.png", (40 * i,) * 3)
    rows = ["0.png,one,1.png,test", "1.png,one,2.png,test", "2.png,one,4.png,test", "3.png,one,4.png,train"]
    (tmp_path / "list.csv").write_text("query,change,target,split\n" + "\n".join(rows))
    made = recipe(data=str(tmp_path / "list.csv"))
    made.facts |= {"mean": [0.0] * 3, "deviation": [40 / 255 / 0.2] * 3}  # a shade further is 0.2 further
    made.model = Oracle()
    metrics = made.evaluate()
    # the pool is 0, 1, 2, 4: the third query means 4 and lands at 3, as near to 2, its own picture, as to 4
    assert metrics["recall_at_1"] == 1.0
    made.model.forward = lambda images, tokens, lengths: made.model.embed_image(images)
    ignored = made.evaluate()  # the own picture would be first; then its neighbours
    assert ignored["recall_at_1"] < 1.0 and ignored["recall_at_5"] == 1.0


@pytest.mark.parametrize("loss", ["softmax", "soft_triplet"])
def test_a_step_learns_and_keeps_an_items_queries_together(tmp_path, loss):
    made = recipe(loss=loss)
    batch = made.batch()
    assert torch.equal(batch["images"][0], batch["images"][1]) and not torch.equal(
        batch["images"][1], batch["images"][2]
    )
    before = made.model.a.detach().clone()
    assert float(one_step(made, tmp_path)["loss"].detach()) > 0
    assert not torch.equal(made.model.a.detach()[:2], before[:2])


def test_pretrained_layers_learn_slower():
    made = recipe(backbone_rate=0.1)
    rates = {id(p): group["lr"] for group in made.optimizer.param_groups for p in group["params"]}
    body, head = made.model.img_model.conv1.weight, made.model.img_model.fc[0].weight
    assert len(rates) == len(list(made.model.parameters()))
    assert rates[id(body)] == pytest.approx(0.1 * rates[id(head)]) and rates[id(made.model.a)] == rates[id(head)]


def test_a_finished_run_answers_after_loading(tmp_path):
    train(
        "tirg",
        changes={"steps": 1, "batch_size": 4},
        settings=Settings(device="cpu"),
        folder=tmp_path / "run",
        report=False,
    )
    loaded = load(tmp_path / "run", device="cpu")
    image = open_composed("composed_shapes", "test").pool.image(0)
    picture(tmp_path / "pictures" / "a.png")
    answers = loaded.predict([(image, "make red circle large"), {"image": image, "text": "remove red circle"}])
    assert len(answers) == 2 and answers[0].distances == sorted(answers[0].distances) and len(answers[0].items) == 10
    other = load(tmp_path / "run", device="cpu", gallery=str(tmp_path / "pictures"))
    path = tmp_path / "pictures" / "a.png"
    assert other.predict([f"{path} :: in blue"])[0].items == []  # the only picture is the query's own
    assert other.predict([(image, "in blue")])[0].items == [str(path)]


def test_questions_that_are_none_are_refused():
    assert split_query("a b.png :: make it: red") == ("a b.png", "make it: red")
    with pytest.raises(PaperZooError, match="a query is"):
        split_query("a.png")
