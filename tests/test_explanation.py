"""Explanations: layers by name, where maps point, deletion and insertion by RISE's protocol, sanity checks, embedded scenes, the recipe."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.explaining import find_layer, layer_of, maps_and_gradient, rescale, select
from paperzoo.data.chalk_scenes import chalk_scenes, grid_scenes
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import UnknownName
from paperzoo.papers.interpretability.deep_inside_saliency.technique import object_mask
from paperzoo.papers.interpretability.generic_attention_explainability.technique import (
    TransformerRelevance,
    image_map,
)
from paperzoo.papers.interpretability.grad_cam.recipe import PRESETS, GradCAMRecipe
from paperzoo.papers.interpretability.grad_cam.technique import GradCAM
from paperzoo.tasks.explanation import classifier, heat_maps
from paperzoo.tasks.explanation_metrics import (
    average_drop,
    blurred,
    box_around,
    boxes_inside,
    cascade,
    centre_prior,
    confidence_change,
    deletion,
    energy_inside,
    increase,
    insertion,
    localisation_overlap,
    pointing_game,
    random_maps,
    rank_correlation,
    sanity_check,
)
from paperzoo.tasks.explanation_pictures import overlay


class Small(nn.Module):
    """Two convolutions with a norm between them, pooled to logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.last = nn.Conv2d(6, 8, 3, 2, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.stem(x)).relu().mean((2, 3)) * 5)


@pytest.fixture
def net() -> Small:
    return Small().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 12, 9, generator=torch.Generator().manual_seed(1))


# -- layers and targets --------------------------------------------------------------------------------------------------


def test_a_wrong_layer_is_answered_with_those_that_are_near(net):
    assert layer_of(net, "stem.0") is net.stem[0]
    with pytest.raises(UnknownName, match="did you mean.*stem.1"):
        layer_of(net, "stem.11")
    with pytest.raises(UnknownName, match="last"):
        GradCAM(net, "lasst")
    with pytest.raises(ValueError, match="not a part"):
        layer_of(net, nn.ReLU())


def test_the_last_layer_with_places_is_found(net, images):
    assert find_layer(net, images) == "last"


def test_targets_that_do_not_fit_are_refused():
    logits = torch.randn(3, 4)
    assert select(logits, [3, 0, 1]).shape == (3,)
    for target in (4, -1, [0, 1], 1.5):
        with pytest.raises(ValueError, match="target"):
            select(logits, target)


def test_a_layer_that_the_score_does_not_hang_on_is_refused(net, images):
    with pytest.raises(ValueError, match="does not depend"):
        maps_and_gradient(net, net.last, images, lambda logits: logits.detach().sum(1))


# -- where maps point ----------------------------------------------------------------------------------------------------


def test_boxes_become_masks_by_the_centres_of_pixels():
    boxes = [
        torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.9, 0.5, 1.0, 1.0]]),
        torch.zeros(0, 4),
        torch.tensor([[0.5, 0.5, 0.5, 0.9]]),
    ]
    inside = boxes_inside(boxes, 4, 10)
    assert inside.sum((1, 2)).tolist() == [2 * 5 + 2, 0, 0]
    assert inside[0, 0].tolist() == [True] * 5 + [False] * 5 and inside[0, 3].tolist() == [False] * 9 + [True]


def test_pointing_energy_and_overlap_against_hand_computed():
    inside = torch.zeros(2, 4, 4, dtype=torch.bool)
    inside[:, :2, :2] = True
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 1.0, 0.6
    maps[1, 2, 2] = 1.0
    assert pointing_game(maps, inside).tolist() == [True, False]
    assert pointing_game(maps, inside, tolerance=1).tolist() == [True, True]
    assert energy_inside(maps, inside).tolist() == pytest.approx([1 / 1.6, 0])
    assert energy_inside(torch.ones(2, 4, 4), inside).tolist() == [0.25, 0.25]
    assert localisation_overlap(maps, inside, 0.5).tolist() == pytest.approx([1 / 5, 0])
    assert localisation_overlap(maps, inside, 0.7).tolist() == pytest.approx([1 / 4, 0])


def test_the_box_is_around_the_largest_part():
    found = torch.zeros(10, 20)
    found[1, 1], found[4:6, 10:15] = 1.0, 0.5
    assert box_around(found, 0.15) == (0.5, 0.4, 0.75, 0.6)
    assert box_around(found, 0.6) == (0.05, 0.1, 0.1, 0.2)
    assert box_around(torch.zeros(4, 4), 0.15) == (0.0, 0.0, 0.0, 0.0)


# -- deletion and insertion ------------------------------------------------------------------------------------------------


def pixel_by_pixel(net: nn.Module, before: Tensor, after: Tensor, target: int, found: Tensor, each: int) -> tuple:
    """RISE's own procedure for one image (github.com/eclique/RISE, evaluation.py): the scores and the area."""
    order = found.flatten().argsort(descending=True, stable=True).tolist()
    mixed, scores = before.clone(), []
    for step in range(-(-len(order) // each) + 1):
        scores.append(float(net(mixed[None]).softmax(1)[0, target]))
        for place in order[step * each : (step + 1) * each]:
            mixed.flatten(1)[:, place] = after.flatten(1)[:, place]
    area = (sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)
    return scores, area


@pytest.mark.parametrize("steps", [6, 10, 108, 500])
@torch.no_grad()
def test_curves_are_those_of_one_pixel_after_the_other(net, images, steps):
    classes = torch.tensor([0, 1, 2, 3, 0])
    maps = torch.rand(5, 12, 9, generator=torch.Generator().manual_seed(2))
    each = -(-108 // steps)
    for kind, before, after in (
        (deletion, images, torch.zeros_like(images)),
        (insertion, blurred(images), images),
    ):
        curve = kind(net, images, classes, maps, steps, batch_size=7)
        for i in range(5):
            scores, area = pixel_by_pixel(net, before[i], after[i], int(classes[i]), maps[i], each)
            assert curve.scores[i].tolist() == pytest.approx(scores, abs=1e-6)
            assert float(curve.area[i]) == pytest.approx(area, abs=1e-6)


def test_a_baseline_of_ones_own(net, images):
    classes, maps = torch.zeros(5, dtype=torch.long), torch.rand(5, 12, 9)
    grey = deletion(net, images, classes, maps, 4, baseline=torch.full((3, 1, 1), 0.3))
    with torch.no_grad():
        last = net(torch.full_like(images, 0.3)).softmax(1)[:, 0]
    assert torch.allclose(grey.scores[:, -1], last, atol=1e-6)


def test_the_evidence_first_beats_the_evidence_last():
    """A network that reads one pixel: deleting it first leaves nothing, inserting it first gives all."""

    class OnePixel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0, 2, 3] * 20, torch.full_like(x[:, 0, 0, 0], 10.0)], 1)

    x, classes = torch.ones(1, 3, 6, 6), torch.zeros(1, dtype=torch.long)
    good = torch.zeros(1, 6, 6)
    good[0, 2, 3] = 1.0
    zero = torch.zeros(())
    assert float(deletion(OnePixel(), x, classes, good, 36).area) < 0.02
    assert float(deletion(OnePixel(), x, classes, -good, 36).area) > 0.95
    assert float(insertion(OnePixel(), x, classes, good, 36, baseline=zero).area) > 0.95
    assert float(insertion(OnePixel(), x, classes, -good, 36, baseline=zero).area) < 0.05


def test_confidence_change_against_a_loop(net, images):
    classes, maps = torch.tensor([0, 1, 2, 3, 0]), torch.rand(5, 12, 9)
    full, kept = confidence_change(net, images, classes, maps, batch_size=2)
    with torch.no_grad():
        for i in range(5):
            assert float(full[i]) == pytest.approx(float(net(images[i : i + 1]).softmax(1)[0, classes[i]]), abs=1e-6)
            masked = images[i : i + 1] * maps[i]
            assert float(kept[i]) == pytest.approx(float(net(masked).softmax(1)[0, classes[i]]), abs=1e-6)
    assert average_drop(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])) == pytest.approx(0.25)
    assert increase(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])) == pytest.approx(0.5)


# -- sanity ----------------------------------------------------------------------------------------------------------------


def test_the_cascade_goes_from_the_output_to_the_input_and_leaves_the_model(net, images):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    names, changed = [], []
    for name, copy in cascade(net, images):
        names.append(name)
        state = copy.state_dict()
        changed.append({k for k in before if not torch.equal(before[k], state[k])})
    assert names == ["head", "last", "stem.1", "stem.0"]
    assert changed[0] == {"head.weight", "head.bias"} and "stem.0.weight" in changed[-1]
    assert all("running" not in k for k in changed[-1])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_cascade_is_the_same_each_time_and_leaves_the_generator(net, images):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    *_, (_, one) = cascade(net, images, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    *_, (_, two) = cascade(net, images, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_an_explainer_that_ignores_the_weights_is_found_out(net, images):
    classes = torch.zeros(5, dtype=torch.long)
    edges = lambda model, x, c: rescale(x.abs().sum(1))  # noqa: E731
    blind = sanity_check(edges, net, images, classes, stages=2)
    assert list(blind) == ["last", "stem.0"] and all(v == pytest.approx(1) for v in blind.values())
    cam = sanity_check(lambda model, x, c: GradCAM(model, "last")(x, c), net, images, classes, stages=4)
    assert list(cam)[-1] == "stem.0" and cam["stem.0"] < 0.8


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    a = torch.rand(3, 5, 6).round(decimals=1)  # with ties
    b = torch.rand(3, 5, 6).round(decimals=1)
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(a, torch.ones(3, 5, 6)).tolist() == [0, 0, 0]


# -- data, pictures, the recipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instances", [1, 3])
def test_chalk_scenes_show_one_class_and_boxes_around_its_ink(instances):
    scenes = chalk_scenes(70, 32, "train", instances)
    assert torch.equal(scenes[3]["image"], chalk_scenes(5, 32, "train", instances)[3]["image"])
    assert not torch.equal(scenes[3]["image"], chalk_scenes(5, 32, "test", instances)[3]["image"])
    counts = {len(s["boxes"]) for s in scenes}
    assert counts == set(range(1, instances + 1))
    for scene in scenes[:10]:
        assert scene["image"].dtype == torch.uint8 and len(scene["labels"].unique()) == 1
        assert not (scene["masks"].sum(0) > 1).any() and (scene["image"][:, scene["masks"].any(0)] == 230).all()
        for box, mask in zip(scene["boxes"].int().tolist(), scene["masks"], strict=True):
            x1, y1, x2, y2 = box
            assert mask[y1:y2, x1:x2].sum() == mask.sum() and mask[y1].any() and mask[:, x2 - 1].any()


def test_grid_scenes_show_different_classes_in_cells():
    for scene in grid_scenes(70, 48, "train", digits=3):
        assert len(scene["labels"].unique()) == 3 and len(scene["boxes"].unique(dim=0)) == 3
        assert (scene["boxes"] % 8 == 0).all() and float(scene["boxes"].max()) <= 48
        x1, y1, x2, y2 = scene["boxes"][0].int().tolist()
        assert scene["image"][:, y1:y2, x1:x2].max() > 200


def test_scenes_out_of_range_are_refused():
    for call in (
        lambda: chalk_scenes(1, 32, instances=5),
        lambda: grid_scenes(1, 50),
        lambda: grid_scenes(1, digits=11),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()


def test_baselines_say_nothing_about_the_image(images):
    classes = torch.zeros(5, dtype=torch.long)
    cone = centre_prior(nn.Identity(), images, classes)
    assert cone.shape == (5, 12, 9) and cone[0].argmax() in (5 * 9 + 4, 6 * 9 + 4) and 0 <= float(cone.min())
    assert torch.equal(random_maps(nn.Identity(), images, classes), random_maps(nn.Identity(), images * 2, classes))


def test_any_network_by_name_and_maps_in_batches(images):
    model = classifier("resnet20_cifar", num_classes=4)
    explain = lambda m, x, c: GradCAM(m, "layer3")(x, c)  # noqa: E731
    maps = heat_maps(explain, model, F.interpolate(images, (32, 32)), batch_size=2)
    assert maps.shape == (5, 32, 32) and maps.dtype == torch.float32 and 0 <= maps.min() and maps.max() <= 1
    assert overlay(torch.rand(3, 32, 32), maps[0]).size == (32, 32)


def test_windows_and_shrinking_sequences_are_refused_by_name():
    with pytest.raises(ValueError, match="whole sequences"):
        TransformerRelevance(classifier("cvt_digits", num_classes=3))(torch.randn(2, 3, 32, 32), 1)
    with pytest.raises(ValueError, match="no attention was seen"):
        TransformerRelevance(Small().eval())(torch.randn(2, 3, 32, 32), 1)
    with pytest.raises(ValueError, match="do not fill a grid"):
        image_map(torch.rand(1, 12, 12), (32, 32))


def test_a_graph_cut_takes_the_whole_object_from_some_of_its_pixels():
    image = torch.full((3, 24, 24), 40, dtype=torch.uint8)
    image[:, 6:15, 8:20] = 220
    saliency = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) * 0.1
    saliency[8:11, 9:14] = 1.0
    expected = torch.zeros(24, 24, dtype=torch.bool)
    expected[6:15, 8:20] = True
    assert torch.equal(object_mask(image, saliency), expected)


def test_the_recipe_explains_a_folder_without_boxes(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 30), (60 * i, 100, 200 if label == "a" else 10)).save(
                    tmp_path / split / label / f"{i}.png"
                )
    config = dataclasses.replace(
        PRESETS["embedded"], data=str(tmp_path), perturbed=2, perturbation_steps=3, batch_size=4
    )
    recipe = GradCAMRecipe(config, Runtime(device="cpu"))
    metrics = recipe.evaluate("test")
    assert {"deletion", "insertion", "average_drop", "sanity_correlation", "accuracy"} <= set(metrics)
    assert "pointing_game" not in metrics
    result = recipe.predict([tmp_path / "test" / "a" / "0.png"])[0]
    assert result.map.shape == (32, 32) and recipe.draw(tmp_path / "test" / "a" / "0.png", result).size == (96, 110)


def test_a_wrong_layer_in_the_configuration_is_refused():
    config = dataclasses.replace(PRESETS["embedded"], layer="layer33", train_scenes=8, test_scenes=8)
    with pytest.raises(UnknownName, match="layer3"):
        _ = GradCAMRecipe(config, Runtime(device="cpu")).layer
