"""Images with several labels: readers, the metric by the field's protocol, the recipe."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from paperzoo.catalog.cards import find
from paperzoo.data.multi_label import open_multi_label, separated
from paperzoo.engine.loop import Settings, one_step
from paperzoo.engine.run import build
from paperzoo.errors import DataError, UnknownName
from paperzoo.tasks.multi_label import Config, MultiLabelRecipe


def recipe(**changes) -> MultiLabelRecipe:
    config = dataclasses.replace(Config(model="resnet20_cifar", batch_size=16, steps=4, learning_rate=0.01), **changes)
    return build(find("resnet"), config, Settings(device="cpu"), recipe_class=MultiLabelRecipe)


def table(tmp_path, text: str):
    Image.new("RGB", (9, 7), "red").save(tmp_path / "a.png")
    path = tmp_path / "list.csv"
    path.write_text(text)
    return path


def test_embedded_scenes_have_one_to_four_labels():
    data = open_multi_label("digit_scenes", "test")
    counts = data.targets.sum(1)
    assert counts.min() >= 1 and counts.max() <= 4 and (counts > 1).any()


def test_a_table_with_several_labels(tmp_path):
    path = table(tmp_path, "path,labels,split\na.png,cat;dog,train\na.png,,train\na.png,dog|10,test\n")
    train, test = open_multi_label(path, "train"), open_multi_label(path, "test")
    assert train.labels == test.labels == ["10", "cat", "dog"]
    assert train.targets.tolist() == [[0, 1, 1], [0, 0, 0]] and test.targets.tolist() == [[1, 0, 1]]


@pytest.mark.parametrize(
    ("text", "said"), [("path,name\na.png,x\n", "labels are needed"), ("path,labels\na.png,\n", "no row has a label")]
)
def test_wrong_tables_are_named(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        open_multi_label(table(tmp_path, text), "train")


def test_unknown_names_are_answered():
    with pytest.raises(UnknownName, match="digit_scenes"):
        open_multi_label("digit_scene", "train")


def test_labels_are_separated():
    assert separated(" cat; dog |bird,") == ["cat", "dog", "bird"]


def test_mean_average_precision_is_scikit_learns():
    """Over the classes that occur."""
    made = recipe()
    average, _ = made.scores("test")
    logits, labels = [], []
    with torch.inference_mode():
        for images, truth in made.runtime.loader(made.test_data, 256, 0):
            logits.append(made.deployed.eval()(images))
            labels.append(truth)
    scores, truth = torch.cat(logits).sigmoid().numpy(), torch.cat(labels).numpy()
    expected = [average_precision_score(truth[:, k], scores[:, k]) for k in range(truth.shape[1])]
    assert average.numpy() == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_a_sum_over_classes():
    logits, labels = torch.zeros(2, 10), torch.zeros(2, 10)
    assert float(recipe().loss(logits, labels)) == pytest.approx(10 * 0.693147, rel=1e-5)


def test_a_step_and_a_prediction():
    made = recipe()
    assert torch.isfinite(one_step(made, None)["loss"])
    result = made.predict([Image.new("RGB", (30, 40), "white")])[0]
    assert set(result.probabilities) == set(made.facts["labels"])
    assert all(result.probabilities[label] > 0.5 for label in result.labels)


def test_mixing_is_refused():
    with pytest.raises(ValueError, match="one label each"):
        Config(mixup=0.2)
