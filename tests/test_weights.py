"""Weights: saved, loaded, recognised, refused; the Hub's layout, offline."""

from __future__ import annotations

import json

import pytest
import torch

import paperzoo
from paperzoo.engine.weights import load_weights, same
from paperzoo.errors import PaperZooError, UnknownName


def test_save_and_from_pretrained_give_the_same_network(tmp_path):
    model = paperzoo.create("wide_resnet10_2", num_classes=7)
    paperzoo.save_pretrained(model, tmp_path / "mine", labels=["a"])
    again = paperzoo.from_pretrained(tmp_path / "mine")
    assert same(model, again)
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["labels"] == ["a"]


def test_create_takes_a_file_and_a_folder(tmp_path):
    model = paperzoo.create("wide_resnet10_2")
    paperzoo.save_pretrained(model, tmp_path)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        assert same(model, paperzoo.create("wide_resnet10_2", weights=str(weights)))


def test_the_authors_checkpoint_is_recognised(tmp_path):
    model = paperzoo.create("wide_resnet10_2")
    official = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("layer", "group")
        if name.startswith("group"):
            group, block, *rest = name.split(".")
            rest = ".".join(rest).replace("bn1.", "bn0.").replace("bn2.", "bn1.")
            rest = {"conv1.weight": "conv0", "conv2.weight": "conv1", "shortcut.weight": "convdim"}.get(rest, rest)
            name = f"group{int(group[5:]) - 1}.block{block}.{rest}"
        official["conv0" if name == "conv1.weight" else name] = tensor
    torch.save({"params": official}, tmp_path / "official.pt7")
    assert same(model, paperzoo.create("wide_resnet10_2", weights=str(tmp_path / "official.pt7")))


def test_torchvisions_names_load_unchanged(tmp_path):
    import torchvision

    reference = torchvision.models.resnet18(weights=None)
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    model = paperzoo.create("resnet18", weights=str(tmp_path / "resnet18.pth"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), reference.eval()(x))


def test_a_checkpoint_of_a_data_parallel_wrapper_loads(tmp_path):
    model = paperzoo.create("wide_resnet10_2")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    assert same(model, paperzoo.create("wide_resnet10_2", weights=str(tmp_path / "w.pth")))


def test_wrong_weights_name_the_first_keys(tmp_path):
    model = paperzoo.create("wide_resnet10_2")
    state = model.state_dict()
    state["strange"] = state.pop("bn.weight")
    state["fc.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(PaperZooError) as error:
        load_weights(model, tmp_path / "w.pth")
    message = str(error.value)
    for part in (
        "w.pth",
        "wide_resnet10_2",
        "missing bn.weight",
        "unexpected strange",
        "fc.weight is (3, 3), should be (10, 128)",
    ):
        assert part in message
    assert "\n" not in message


def test_unknown_models_and_arguments_are_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean .*wide_resnet28_10"):
        paperzoo.create("wide_resnet28_1O")
    with pytest.raises(PaperZooError, match="num_clases"):
        paperzoo.create("wide_resnet10_2", num_clases=3)


def test_from_pretrained_of_a_missing_place_is_one_line(tmp_path):
    with pytest.raises(PaperZooError, match="no such folder"):
        paperzoo.from_pretrained(tmp_path / "nowhere")
    tmp_path.joinpath("config.json").write_text("{")
    with pytest.raises(PaperZooError, match="config.json: not readable JSON"):
        paperzoo.from_pretrained(tmp_path)


def test_push_to_hub_uploads_the_hubs_layout(monkeypatch):
    """With the client's network calls replaced: what would be uploaded is what from_pretrained reads."""
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repository, private, exist_ok):
            seen["created"] = repository

        def upload_folder(self, folder_path, repo_id):
            from pathlib import Path

            seen["files"] = sorted(p.name for p in Path(folder_path).iterdir())
            seen["model"] = paperzoo.from_pretrained(folder_path)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = paperzoo.create("wide_resnet10_2")
    assert paperzoo.push_to_hub(model, "me/wrn").endswith("me/wrn")
    assert seen["created"] == "me/wrn" and seen["files"] == ["README.md", "config.json", "model.safetensors"]
    assert same(model, seen["model"])


def test_inference_ready_networks_give_the_same_outputs():
    from paperzoo.engine.inference import make_ready

    for name in ("wide_resnet10_2", "resnet18"):
        model = paperzoo.create(name)
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            model.train()(x)  # running statistics that are not the identity
            before = model.eval()(x)
            after = make_ready(model, (x,))(x)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        assert any(isinstance(m, torch.nn.Identity) for m in model.modules())


def test_darknets_weight_files_load(tmp_path):
    from paperzoo.papers.detection.yolov3.parity import written

    torch.manual_seed(0)
    first = paperzoo.create("yolov3_slim", num_classes=3)
    (tmp_path / "some.weights").write_bytes(written(first))
    second = paperzoo.create("yolov3_slim", num_classes=3, weights=str(tmp_path / "some.weights"))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
