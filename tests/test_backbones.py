"""Classifiers as backbones: feature maps by stage, at any size, without what they do not need."""

from __future__ import annotations

import pytest
import torch

import paperzoo
from paperzoo.blocks.backbones import at_strides, create_backbone, load_body
from paperzoo.catalog.cards import variants
from paperzoo.engine.parity import leaves
from paperzoo.errors import PaperZooError, UnknownName

CLASSIFIERS = sorted(name for name, paper in variants().items() if paper.area == "classification")
# one network a family: the smallest that it publishes
FAMILIES = sorted({paper.slug: name for name, paper in reversed(variants().items()) if name in CLASSIFIERS}.values())


def meta(name: str, **arguments):
    with torch.device("meta"):
        return paperzoo.create(name, **arguments)


def with_stages() -> list[str]:
    return [name for name in FAMILIES if hasattr(meta(name), "stages")]


def picture(model: torch.nn.Module, channels: int = 3, more: int = 0) -> torch.Tensor:
    """A batch of the size that a network is bound to, else of 64 pixels (and `more` in width)."""
    size = getattr(model, "image_size", None)
    if size:
        return torch.randn(2, channels, *((size, size) if isinstance(size, int) else size))
    side = getattr(model, "smallest", 64)
    return torch.randn(2, channels, side, side + more)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_without_classes_a_classifier_gives_features(name):
    model = meta(name, num_classes=0).eval()
    size = getattr(model, "image_size", None) or 224
    size = (size, size) if isinstance(size, int) else tuple(size)
    images = torch.empty(1, 3, *size, device="meta")
    assert model(images).shape == (1, model.num_features)


@pytest.mark.parametrize("name", with_stages())
def test_maps_have_the_stated_channels_and_strides(name):
    backbone = create_backbone(name, in_channels=2).eval()
    images = picture(backbone.body, 2, more=32)
    with torch.inference_mode():
        maps = backbone(images)
    assert [m.shape[1] for m in maps] == backbone.out_channels
    for m, stride in zip(maps, backbone.strides, strict=True):
        for side, whole in zip(m.shape[2:], images.shape[2:], strict=True):
            assert whole // stride - 5 <= side <= -(-whole // stride)  # less where convolutions are not padded


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_digits", "mobilenetv1_025", "swinv2_digits", "cvt_digits", "vgg11_slim"]
)
def test_maps_are_those_of_the_whole_classifier(name):
    torch.manual_seed(0)
    whole = paperzoo.create(name).eval()
    backbone = paperzoo.create(name, features_only=True, out_indices=(0, 1)).eval()
    backbone.load_body(whole.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, found = whole.stages(images)[:2], backbone(images)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["resnet18", "convnext_digits", "efficientnet_digits", "vgg11_slim"])
def test_what_no_map_depends_on_is_dropped(name):
    backbone = create_backbone(name, out_indices=(0, 1))
    total = sum(m.square().sum() for m in backbone(torch.randn(2, 3, 64, 64)))
    gradients = torch.autograd.grad(total, list(backbone.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


def test_a_backbone_keeps_its_batch_norm_and_learns():
    backbone = create_backbone("resnet18").train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 64, 64))
    assert any("running_mean" in k and not torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_stored_backbone_comes_back(tmp_path):
    model = paperzoo.create("resnet18", features_only=True, out_indices=[1, -1]).eval()
    paperzoo.save_pretrained(model, tmp_path / "stored")
    again = paperzoo.from_pretrained(tmp_path / "stored").eval()
    images = torch.randn(1, 3, 64, 64)
    assert again.strides == [8, 32]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(model(images)), leaves(again(images)), strict=True))


def test_strides_are_chosen_by_number():
    assert at_strides("convnext_tiny", (8, 32)).out_channels == [192, 768]


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"name": "stn_fcn"}, "no feature maps by stage"),
        ({"name": "resnet18", "out_indices": (7,)}, "0 … 3"),
        ({"name": "resnet18", "out_indices": (2, 1)}, "they rise"),
        ({"name": "retinanet_tiny_fpn"}, "in_channels"),
    ],
)
def test_what_is_no_backbone_says_so(arguments, problem):
    name = arguments.pop("name")
    with pytest.raises(PaperZooError, match=problem):
        paperzoo.create(name, features_only=True, **arguments)


def test_an_unknown_backbone_names_the_nearest():
    with pytest.raises(UnknownName, match="convnext_tiny"):
        create_backbone("convnext_tyny")


def test_an_unknown_stride_names_those_there_are():
    with pytest.raises(ValueError, match="4, 8, 16, 32, none of stride 64"):
        at_strides("resnet18", (8, 64))


def test_weights_of_another_body_are_refused():
    with pytest.raises(ValueError, match="same body"):
        load_body(
            create_backbone("resnet18").body,
            paperzoo.create("resnet34").state_dict() | {"conv1.weight": torch.zeros(1)},
        )


# -- networks that stand on one ----------------------------------------------------------------------------------------

DETECTORS = [
    "fast_rcnn_small",
    "faster_rcnn_small",
    "faster_rcnn_resnet50_fpn",
    "retinanet_tiny_fpn",
    "ssd64_slim",
    "yolox_slim",
]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_stands_on_any_classifier(name):
    model = paperzoo.create(name, num_classes=3, backbone="mobilenetv1_025")
    images = torch.randn(2, 3, 64, 64)
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 40, 44]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    total = sum(model.train()(images, targets).values())
    total.backward()
    body = [p for n, p in model.named_parameters() if ".conv_stem." in n]
    assert body and all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in body)
    with torch.inference_mode():
        found = model.eval().postprocess(model(images), torch.tensor([[64, 64], [64, 48]]), (64, 64))
    assert len(found) == 2 and found[0].keys() == {"boxes", "scores", "labels"}


def test_a_detector_on_an_unfit_backbone_says_what_it_needs():
    with pytest.raises(PaperZooError, match="resnet20_cifar has maps of strides 1, 2, 4, none of stride 8"):
        paperzoo.create("retinanet_tiny_fpn", backbone="resnet20_cifar")


def test_an_option_reaches_the_model():
    from paperzoo.engine.configure import configure, dump, restore

    preset = paperzoo.paper("retinanet").module("recipe").PRESETS["embedded"]
    config = configure(preset, {"model.backbone": "convnext_tiny", "steps": "3"})
    assert config.model_arguments == {"backbone": "convnext_tiny"} and config.steps == 3
    assert preset.model_arguments == {}
    assert restore(type(config), dump(config)) == config


def test_a_run_on_another_backbone_comes_back(tmp_path):
    changes = {"model.backbone": "mobilenetv1_025", "steps": 2, "scenes": 8, "batch_size": 2}
    paperzoo.train("retinanet", changes=changes, folder=tmp_path / "run")
    recipe = paperzoo.load(tmp_path / "run", device="cpu")
    assert recipe.model.paperzoo["arguments"]["backbone"] == "mobilenetv1_025"
    assert len(recipe.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])) == 1


def test_an_argument_that_the_model_does_not_take_is_named(tmp_path):
    with pytest.raises(PaperZooError, match="backbon"):
        paperzoo.train("ssd", changes={"model.backbon": "resnet18", "steps": 1}, folder=tmp_path / "run")
