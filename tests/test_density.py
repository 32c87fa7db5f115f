"""The task of density modelling: quantising, baselines, likelihoods, requests, pictures."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from paperzoo.data.images import open_images
from paperzoo.engine.loop import one_step
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import UnknownName
from paperzoo.tasks import density
from paperzoo.tasks.density import Config, DensityRecipe, Levels

TINY = Config(
    "diagonal_bilstm_tiny",
    {"kind": "convolution"},
    image_size=8,
    image_channels=1,
    levels=2,
    steps=2,
    batch_size=8,
    samples=20,
)


@pytest.fixture(scope="module")
def recipe() -> DensityRecipe:
    torch.manual_seed(0)
    return DensityRecipe(TINY, Runtime())


def test_levels_are_the_nearest():
    data, config = open_images("digits", "test"), dataclasses.replace(TINY, image_size=32, levels=5)
    found = Levels(data, config)[3]
    assert found.shape == (1, 32, 32) and found.dtype == torch.int64
    expected = (data.pixels[3][:1].double() / 255 * 4).round()
    assert (found - expected).abs().max() <= 1 and (found == expected).double().mean() > 0.99


def test_a_binary_draw_is_the_same_each_time_and_follows_the_grey():
    data, config = open_images("digits", "train"), dataclasses.replace(TINY, image_size=32, binarise="draw")
    one, two = Levels(data, config), Levels(data.subset(range(300)), config)
    assert torch.equal(one[7], two[7])
    shares = torch.stack([two[i] for i in range(300)]).double().mean()
    assert shares == pytest.approx(float(data.pixels[:300].double().mean()) / 255, abs=0.01)


def test_files_and_memory_give_the_same_levels(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(5):
            pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    config = dataclasses.replace(TINY, image_channels=3, levels=256, binarise="round", data=str(tmp_path))
    levels = Levels(open_images(tmp_path, "train"), config)
    assert levels.ready is None and levels[0].shape == (3, 8, 8) and 0 <= levels[0].min() <= levels[0].max() <= 255


def test_half_of_the_images_are_mirrored():
    levels = Levels(open_images("digits", "train"), dataclasses.replace(TINY, flip=True), flip=True)
    kept = levels.ready[0]
    torch.manual_seed(0)
    found = [levels[0] for _ in range(40)]
    assert {torch.equal(x, kept) for x in found} == {True, False}
    assert all(torch.equal(x, kept) or torch.equal(x, kept.flip(-1)) for x in found)


def test_the_histogram_by_hand():
    train = torch.tensor([[0, 1], [0, 1], [1, 1]])
    test = torch.tensor([[0, 0]])
    assert density.independent_nll(train, test, 2) == pytest.approx(-math.log(3 / 5) - math.log(1 / 5))


def test_the_logistic_baseline_is_scikit_learns():
    rng = torch.Generator().manual_seed(0)
    x = (torch.rand(200, 4, generator=rng) < 0.5).long()
    x[:, 2] = (x[:, 0] + (torch.rand(200, generator=rng) < 0.2).long()) % 2
    train, test = x[:150], x[150:]
    penalty, nats = 0.01, 0.0
    for i in range(1, 4):  # theirs: C sum of losses + squares / 2; ours: mean of losses + penalty squares
        model = LogisticRegression(C=1 / (2 * penalty * len(train)), tol=1e-8).fit(train[:, :i], train[:, i])
        nats -= model.predict_log_proba(test[:, :i])[torch.arange(50), test[:, i]].mean()
    share = train[:, 0].double().mean()
    nats -= float((test[:, 0] * share.log() + (1 - test[:, 0]) * (1 - share).log()).mean())
    assert density.logistic_nll(train, test, penalty) == pytest.approx(nats, abs=1e-3)


def test_an_evaluation_repeats_exactly_and_adds_up(recipe):
    first, second = recipe.evaluate(), recipe.evaluate()
    assert first == second
    assert first["nll_logistic"] < first["nll_independent"] < 64 * math.log(2)
    assert first["bits_per_dim"] == pytest.approx(first["nll"] / 64 / math.log(2))
    data = Levels(recipe.open("test"), TINY)
    everything = torch.stack([data[i] for i in range(len(data))])
    assert first["nll"] == pytest.approx(-float(recipe.model.eval().log_likelihood(everything).mean()), rel=1e-5)
    assert "fid" in first and "conditional_accuracy" not in first


def test_the_likelihood_alone_can_be_measured():
    config = dataclasses.replace(TINY, samples=0, levels=17)
    metrics = DensityRecipe(config, Runtime()).evaluate()
    assert set(metrics) == {"nll", "bits_per_dim", "nll_independent"}


def test_a_step_learns(recipe, tmp_path):
    before = [p.clone() for p in recipe.model.parameters()]
    values = [one_step(recipe, tmp_path) for _ in range(2)][-1]
    assert values["bits_per_dim"] == pytest.approx(float(values["nll"]) / 64 / math.log(2), rel=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(recipe.model.parameters(), before, strict=True))


def test_the_same_seed_gives_the_same_image(recipe):
    a, b, c = recipe.predict(["image@3", "image@4", "*@3"])
    assert (a.label, a.seed, a.image.size) == ("image", 3, (8, 8))
    assert a.image.tobytes() == c.image.tobytes() != b.image.tobytes()
    with pytest.raises(UnknownName):
        recipe.predict(["7"])


def test_a_completion_keeps_what_was_given(recipe):
    given = torch.randint(2, (3, 1, 8, 8))
    found = recipe.model.generate(torch.rand(3, 1, 8, 8), given, rows=5)
    assert torch.equal(found[:, :, :5], given[:, :, :5]) and not torch.equal(found[:, :, 5:], given[:, :, 5:])


def test_the_pictures(recipe):
    sizes = [picture.size for picture in recipe.figures().values()]
    assert sizes == [(8 * 91, 8 * 46), (8 * 91, 8 * 64), (8 * 91, 8 * 46)]
