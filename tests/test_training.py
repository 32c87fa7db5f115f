"""The ingredients of the default recipes: mixed images, layer-wise learning rates, schedules, augmentation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import paperzoo
from paperzoo.engine.loop import Settings
from paperzoo.engine.run import build
from paperzoo.tasks.classification import ClassificationRecipe, Config
from paperzoo.tasks.training import layer_numbers, learning_rate_factor, make_optimizer, mix


def small(**changes) -> Config:
    return dataclasses.replace(Config(model="wide_resnet10_2", steps=4, batch_size=8, warmup_steps=0), **changes)


def test_a_mixed_batch_keeps_the_sum_of_labels():
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed, shares = mix(images, labels, 3, mixup, cutmix)
        assert mixed.shape == images.shape and shares.shape == (6, 3)
        assert torch.allclose(shares.sum(1), torch.ones(6))


def test_mixup_is_a_weighted_mean_of_images_and_labels():
    """The share of the own label tells the weight; the other image is the neighbour in the batch."""
    torch.manual_seed(0)
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    mixed, shares = mix(images, labels, 2, 1.0, 0.0)
    weight = shares[0, 0]
    assert torch.allclose(mixed[0], weight * images[0] + (1 - weight) * images[1])


def test_cutmix_shares_are_the_areas():
    torch.manual_seed(1)
    images = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    mixed, shares = mix(images, torch.tensor([0, 1]), 2, 0.0, 1.0)
    assert torch.allclose(mixed[0].mean(), shares[0, 1], atol=1e-6)


def test_both_kinds_are_drawn():
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    torch.manual_seed(0)
    copied = [bool(torch.isin(mix(images, labels, 2, 1.0, 1.0)[0], images).all()) for _ in range(20)]
    assert True in copied and False in copied  # CutMix copies pixels, mixup does not


def test_layers_are_numbered_from_the_input():
    model = nn.ModuleDict(
        {"stem": nn.Linear(2, 2), "blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)}
    )
    numbers, count = layer_numbers(model)
    assert count == 4
    assert [numbers[f"{n}.weight"] for n in ("stem", "blocks.0", "blocks.1", "head")] == [0, 1, 2, 3]


def test_layer_decay_slows_the_layers_near_the_input():
    model = paperzoo.create("resnet18", num_classes=3)
    config = small(optimizer="adamw", layer_decay=0.5, learning_rate=1.0, decay_all=False)
    optimizer = make_optimizer(config, model)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(model.fc.weight)] == 1.0
    assert rates[id(model.layer4[1].conv1.weight)] == 0.5
    assert rates[id(model.layer4[0].conv1.weight)] == 0.25
    assert len(rates) == len(list(model.parameters()))
    assert {g["weight_decay"] for g in optimizer.param_groups for p in g["params"] if p.ndim <= 1} == {0.0}


def test_without_layer_decay_there_is_one_rate():
    optimizer = make_optimizer(small(), nn.Linear(2, 2))
    assert [g["lr"] for g in optimizer.param_groups] == [0.1]


def test_warm_up_then_cosine():
    config = small(steps=12, warmup_steps=2, schedule="cosine")
    factors = [learning_rate_factor(config, s) for s in range(13)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5) and factors[12] == pytest.approx(0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
        {"augment": "randaugment", "erase": 0.25},
        {"optimizer": "rmsprop", "learning_rate": 0.01, "ema_decay": 0.9},
        {"optimizer": "adamw", "layer_decay": 0.8, "learning_rate": 0.001},
    ],
)
def test_the_recipe_learns_with_each_ingredient(changes):
    from paperzoo.catalog.cards import find
    from paperzoo.engine.loop import one_step

    recipe = build(find("wide_resnet"), small(**changes), Settings(device="cpu"))
    assert isinstance(recipe, ClassificationRecipe)
    before = [p.detach().clone() for p in recipe.model.parameters()]
    values = one_step(recipe, None)
    assert torch.isfinite(torch.as_tensor(values["loss"]))
    assert any(not torch.equal(a, b) for a, b in zip(before, recipe.model.parameters(), strict=True))
