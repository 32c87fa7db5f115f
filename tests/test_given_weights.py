"""Predicting with weights from elsewhere, without a run."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import paperzoo
from paperzoo.catalog.cards import papers
from paperzoo.cli import app
from paperzoo.engine.given import enlarging, load_given
from paperzoo.engine.weights import save_weights
from paperzoo.errors import PaperZooError, UnknownName


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with a picture and weights for two small networks."""
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    Image.fromarray(array).save("photo.png")
    torch.manual_seed(0)
    save_weights(tmp_path / "edsr.safetensors", paperzoo.create("edsr_slim", scale=3))
    save_weights(tmp_path / "digits.safetensors", paperzoo.create("wide_resnet10_2", num_classes=10))
    return tmp_path


def answer(*words):
    return CliRunner().invoke(app, ["predict", *words, "--device", "cpu"])


def test_a_picture_is_enlarged_by_given_weights(place):
    done = answer("edsr", "photo.png", "--scale", "3", "--model", "edsr_slim", "--weights", "edsr.safetensors", "--draw", "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    (written,) = (place / "out").glob("*.png")
    assert Image.open(written).size == (84, 60)


def test_the_answer_is_the_networks(place):
    recipe = load_given("edsr", "edsr.safetensors", "cpu", scale=3, model="edsr_slim")
    network = paperzoo.create("edsr_slim", scale=3, weights="edsr.safetensors").eval()
    picture = torch.from_numpy(np.array(Image.open("photo.png"))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = network(picture).clamp(0, 1).mul(255).round()[0]
    assert (recipe.predict(["photo.png"])[0].pixels.float() - expected).abs().max() <= 1


def test_labels_come_from_the_data_that_is_named(place):
    recipe = load_given("wide_resnet", "digits.safetensors", "cpu", "embedded", model="wide_resnet10_2", data="digits")
    assert recipe.predict(["photo.png"])[0].label in {str(i) for i in range(10)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scale", "2"), "--scale says what given weights are for"),
        (("--weights", "nowhere.pth"), "nowhere.pth"),
        (("--weights", "digits.safetensors"), "do not fit edsr"),
        (("--weights", "edsr.safetensors", "--preset", "publisht"), "did you mean published"),
        (("--weights", "edsr.safetensors", "--scale", "5"), "scale is 5"),
    ],
)
def test_what_does_not_fit_is_named_in_a_line(place, words, said):
    done = answer("edsr", "photo.png", *words)
    assert done.exit_code != 0
    assert said in (done.output + str(done.exception))


def test_the_variant_for_a_scale_is_taken():
    config = papers()["swinir"].module("recipe").PRESETS["published"]
    assert enlarging(config, 4, "swinir") == {"factor": 4, "model": "swinir_classical_x4"}
    with pytest.raises(UnknownName, match="swinir_classical_x7"):
        enlarging(config, 7, "swinir")


def test_a_scale_needs_a_network_that_enlarges():
    config = papers()["wide_resnet"].module("recipe").PRESETS["embedded"]
    assert dataclasses.is_dataclass(config)
    with pytest.raises(PaperZooError, match="wide_resnet does not"):
        enlarging(config, 2, "wide_resnet")
