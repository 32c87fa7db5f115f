"""The task of class-conditional generation: losses, the judge, requests, pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from paperzoo.engine.loop import one_step
from paperzoo.engine.runtime import NonFiniteLoss, Runtime
from paperzoo.errors import MissingExtra, PaperZooError, UnknownName
from paperzoo.tasks import generation
from paperzoo.tasks.generation import AdversarialRecipe, Config

TINY = Config("sagan_32_slim", "sagan_32_slim_discriminator", steps=2, batch_size=4, samples=40, ema_decay=0.5)


@pytest.fixture(scope="module")
def recipe() -> AdversarialRecipe:
    torch.manual_seed(0)
    return AdversarialRecipe(TINY, Runtime())


def test_the_hinge_loss_stops_beyond_the_margin():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert generation.hinge_discriminator_loss(real, fake) == pytest.approx(0.25 + 0.5)
    assert generation.hinge_generator_loss(fake) == pytest.approx(1.5)


def test_a_step_moves_both_networks_and_the_average(recipe, tmp_path):
    nets = (recipe.model, recipe.discriminator, recipe.average)
    before = [[p.clone() for p in net.parameters()] for net in nets]
    values = [one_step(recipe, tmp_path) for _ in range(2)][-1]
    assert all(torch.isfinite(v) for v in values.values())
    for net, old in zip(nets, before, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), old, strict=True))


def test_the_generator_update_leaves_no_gradient_in_the_discriminator(recipe, tmp_path):
    recipe.discriminator.zero_grad()
    noise, labels = recipe.latents("generator")
    loss = recipe.generator_loss(recipe.discriminator(recipe.model.train()(noise, labels), labels))
    recipe.runtime.update(recipe.optimizer, loss)
    assert all(p.grad is None for p in recipe.discriminator.parameters())


def test_evaluation_has_its_anchors_in_order_and_repeats_exactly(recipe):
    first, second = recipe.evaluate(), recipe.evaluate()
    assert first == second
    assert first["fid_real"] < 0.1 * first["fid_noise"]
    assert first["fid"] > 5 * first["fid_real"]  # hardly trained
    assert first["judge_accuracy"] > 0.9
    assert first["conditional_accuracy"] < 0.5


def test_collapse_is_seen(recipe, monkeypatch):
    one, hues = torch.full((3, 32, 32), -1.0), torch.Generator().manual_seed(0)
    one[:, 4:28, 14:18] = 1.0
    monkeypatch.setattr(recipe, "sample", lambda noise, labels: one.expand(len(noise), -1, -1, -1))
    same = recipe.evaluate()
    assert same["classes_covered"] == 1 and same["diversity"] < 1e-3 and same["class_divergence"] > 2
    data, rows = recipe.some_real(359), lambda n: torch.randint(359, (n,), generator=hues)
    monkeypatch.setattr(recipe, "sample", lambda noise, labels: data[rows(len(noise))])
    real = recipe.evaluate()
    assert real["classes_covered"] == 10 and real["diversity"] > 0.7 and real["class_divergence"] < 0.5
    assert real["kid"] < 0.1 * same["kid"] and real["swd"] < 0.3 * same["swd"]


@pytest.mark.parametrize("loss", ["generator_loss", "discriminator_loss"])
def test_a_loss_that_is_no_number_stops_the_run(recipe, tmp_path, monkeypatch, loss):
    before = [p.clone() for p in recipe.model.parameters()]
    monkeypatch.setattr(recipe, loss, lambda *logits: sum(x.mean() for x in logits) * float("nan"))
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step"):
        one_step(recipe, tmp_path)
    if loss == "generator_loss":
        assert all(torch.equal(a, b) for a, b in zip(recipe.model.parameters(), before, strict=True))


def test_the_judge_does_not_depend_on_the_state_of_the_generators():
    one = generation.judge("digits").state_dict()
    state = torch.get_rng_state()
    generation.judge.cache_clear()
    torch.manual_seed(5)
    two = generation.judge("digits").state_dict()
    torch.set_rng_state(state)
    assert all(torch.equal(one[k].cpu(), two[k].cpu()) for k in one)


def test_the_same_label_and_seed_give_the_same_image(recipe):
    a, b, c, d = recipe.predict(["7@3", "2", "7@3", "7@4"])
    assert (a.label, a.seed, b.label, d.index) == ("7", 3, "2", 7)
    assert a.image.tobytes() == c.image.tobytes()
    assert a.image.size == (32, 32)
    assert a.image.tobytes() != d.image.tobytes()


def test_any_class_can_be_asked_for(recipe):
    assert all(0 <= recipe.request("*", i)[0] < 10 for i in range(20))


@pytest.mark.parametrize(("value", "error"), [("cat", UnknownName), ("7@x", PaperZooError)])
def test_wrong_requests_are_refused(recipe, value, error):
    with pytest.raises(error):
        recipe.predict([value])


def test_several_discriminator_steps_take_batches_of_their_own(tmp_path):
    config = dataclasses.replace(TINY, discriminator_steps=2, ema_decay=None)
    recipe = AdversarialRecipe(config, Runtime())
    assert len(recipe.batch()[0]) == 8
    one_step(recipe, tmp_path)
    with pytest.raises(PaperZooError, match="accumulate"):
        AdversarialRecipe(config, Runtime(accumulate=2))


def test_inception_features_name_the_extra_they_need():
    pytest.importorskip("torchmetrics")
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match="torch-fidelity"):
            generation.inception_distance()


def test_a_sheet_has_a_row_for_each_ten_images():
    assert generation.sheet(torch.zeros(20, 3, 32, 32), 10, scale=2).size == (2 * 331, 2 * 67)
