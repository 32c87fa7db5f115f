"""Optimising: engines in the network's place, int8 within a bound, folders that are whole or refused."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from torch import nn

import paperzoo
from paperzoo.cli import app
from paperzoo.engine import deploy, optimize, quantisation_aware, quantise
from paperzoo.engine.deploy import OnnxRuntime, Signature, install, open_recipe, uninstall
from paperzoo.engine.optimize import Bench, Candidate, drop
from paperzoo.engine.parts import Team, watched
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.run import load, train
from paperzoo.engine.runtime import Runtime
from paperzoo.engine.stopwatch import Timing, compare
from paperzoo.errors import PaperZooError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of Wide ResNet."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = {"steps": 60, "batch_size": 32}
    train("wide_resnet10_2", changes=changes, folder=folder, report=False)
    return folder


@pytest.fixture(scope="module")
def optimised(finished, tmp_path_factory):
    """The run for ONNX Runtime, in fp32."""
    return optimize.optimize(finished, tmp_path_factory.mktemp("out") / "fp32", target="onnxruntime", rounds=3)


@pytest.fixture(scope="module")
def eight_bits(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "int8"
    return optimize.optimize(finished, out, target="onnxruntime", precision="int8", max_drop=0.02, rounds=3)


def bench_of(network: nn.Module, inputs: tuple, folder, **more) -> Bench:
    return Bench(network, inputs, {}, folder, **more)


# -- folders -------------------------------------------------------------------------------------------------------------


def test_a_deployed_folder_predicts_as_the_run(finished, optimised, tmp_path):
    plain, fast = load(finished, device="cpu"), open_recipe(optimised.folder)
    inputs = plain.samples(tmp_path)
    for a, b in zip(plain.predict(inputs), fast.predict(inputs), strict=True):
        assert a.label == b.label
    assert fast.deployed.forward.calls > 0 and fast.deployed.forward.passed_on == 0


def test_a_deployed_folder_evaluates_as_the_run(finished, optimised):
    stored = json.loads((finished / "config.json").read_text())["metrics"]["accuracy"]
    assert open_recipe(optimised.folder).evaluate("test")["accuracy"] == pytest.approx(stored, abs=1e-3)


def test_what_was_measured_is_written_down(optimised):
    data = json.loads((optimised.folder / "deploy.json").read_text())
    eager, best = data["measured"]
    assert [r["batch"] for r in eager["timing"]["calls"]] == [1, 8] and eager["engine"] == "eager"
    assert best["difference"] < 1e-4 and best["same"] == 1.0 and best["bytes"] > 1000
    assert all(r["times_eager"][1] > 0 for r in best["timing"]["calls"])
    assert data["labels"] == [str(i) for i in range(10)]


def test_a_damaged_file_is_refused(optimised, tmp_path):
    folder = shutil.copytree(optimised.folder, tmp_path / "copy")
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"\0\1\2\3")
    with pytest.raises(PaperZooError, match="model.onnx: is damaged"):
        open_recipe(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not the description"), ('{"format": 99, "files": {}}', "of format 99"), ("[]", "not the description")],
)
def test_another_description_is_refused(optimised, tmp_path, content, words):
    folder = shutil.copytree(optimised.folder, tmp_path / "copy")
    (folder / "deploy.json").write_text(content)
    with pytest.raises(PaperZooError, match=words):
        open_recipe(folder)


def test_a_missing_file_is_named(optimised, tmp_path):
    folder = shutil.copytree(optimised.folder, tmp_path / "copy")
    (folder / "model.onnx").unlink()
    with pytest.raises(PaperZooError, match="model.onnx: is missing"):
        open_recipe(folder)


def test_a_folder_with_other_files_is_left_alone(finished, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PaperZooError, match="holds other files"):
        optimize.optimize(finished, tmp_path, target="onnxruntime")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_beside_the_folder(optimised):
    assert [p.name for p in optimised.folder.parent.iterdir()] == ["fp32"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"target": "onxruntime"}, "target 'onxruntime' is not known; there are auto"),
        ({"precision": "int4"}, "precision 'int4' is not known"),
        ({"ranges": "best"}, "ranges 'best' is not known"),
        ({"max_drop": -0.1}, "max_drop is -0.1"),
        ({"min_same": 1.5}, "min_same is 1.5"),
        ({"tune_steps": 5}, "tune_steps is 5; .* before precision int8"),
        ({"target": "inductor", "precision": "int8"}, "int8 is for ONNX Runtime and OpenVINO"),
    ],
)
def test_wrong_wishes_are_one_line(finished, tmp_path, wrong, words):
    with pytest.raises(PaperZooError, match=words):
        optimize.optimize(finished, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table(finished, tmp_path, capsys):
    app(
        ["optimize", str(finished), "--target", "onnxruntime", "--rounds", "3", "--out", str(tmp_path / "out")],
        standalone_mode=False,
    )
    text = capsys.readouterr().out
    assert "eager fp32" in text and "* onnxruntime fp32" in text and f"wrote    {tmp_path / 'out'}" in text


# -- int8 ----------------------------------------------------------------------------------------------------------------


def test_int8_keeps_answers_and_is_smaller(optimised, eight_bits):
    assert eight_bits.best.same >= 0.97
    assert eight_bits.best.bytes < 0.4 * optimised.best.bytes
    assert drop(eight_bits.best.metrics, eight_bits.eager.metrics, eight_bits.monitor) <= 0.02


def test_int8_weights_are_per_channel(eight_bits):
    import onnx

    graph = onnx.load(str(eight_bits.folder / eight_bits.best.artefact)).graph
    scales = [t for t in graph.initializer if t.name.endswith("_scale") and t.dims and t.dims[0] > 1]
    assert len(scales) >= 10  # one scale a channel, for the weights of ten convolutions


class OneBadLayer(nn.Module):
    """Three convolutions; the second has one channel that dwarfs what the others give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        with torch.no_grad():
            self.second.weight[0] *= 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu())
        return self.third(torch.cat([y[:, :1] * 1e-3, y[:, 1:]], 1).relu())


def test_the_most_sensitive_layer_is_found(tmp_path):
    torch.manual_seed(0)
    network = OneBadLayer().eval()
    rows = [(torch.randn(1, 8, 8, 8),) for _ in range(16)]
    bench = bench_of(network, (torch.randn(2, 8, 8, 8),), tmp_path)
    quantise.quantise_onnx(bench.onnx(), tmp_path / "int8.onnx", rows, "minmax")
    order = quantise.sensitivity(tmp_path / "model.onnx", tmp_path / "int8.onnx", rows)
    errors = {}
    for kept in order:
        quantise.quantise_onnx(bench.onnx(), tmp_path / "kept.onnx", rows, "minmax", keep=[kept])
        found = OnnxRuntime(tmp_path / "kept.onnx")(rows[0][0])[0]
        with torch.inference_mode():
            errors[kept] = float((found - network(rows[0][0])).square().mean())
    assert len(order) == 4  # three convolutions and the concatenation
    assert errors[order[0]] <= errors[order[-1]]


def test_layers_are_kept_by_their_onnx_names_in_openvino(tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    rows = [(torch.randn(1, 8, 8, 8),) for _ in range(8)]
    bench = bench_of(OneBadLayer().eval(), (torch.randn(2, 8, 8, 8),), tmp_path, calibration=rows)
    bench.build("openvino", "fp32")

    def rounded(keep) -> int:
        path = tmp_path / bench.quantise("openvino", "minmax", keep)
        return sum(op.get_type_name() == "FakeQuantize" for op in openvino.Core().read_model(str(path)).get_ops())

    order = bench.sensitivity("minmax")
    assert 0 == rounded(order) < rounded(order[:2]) < rounded([])


def test_int8_that_changes_too_many_answers_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "kept_counts", lambda total: [0, 1])
    monkeypatch.setattr(Bench, "compare", lambda bench, candidate: setattr(candidate, "same", 0.5))
    with pytest.raises(PaperZooError, match=r"leaves 50.0% of the answers as they were, fewer than 99.0%"):
        optimize.optimize(finished, tmp_path / "out", target="onnxruntime", precision="int8", max_drop=1.0, rounds=3)


def test_layers_go_back_until_the_metric_is_kept(finished, tmp_path, monkeypatch):
    """With a quantiser that spoils the network unless three layers are kept, three or more are."""
    honest, attempts = quantise.quantise_onnx, []

    def spoiled(source, target, rows, ranges, dynamic=False, keep=()):
        attempts.append(len(keep))
        if len(keep) >= 3:
            shutil.copyfile(source, target)
        else:
            honest(source, target, [(torch.full_like(rows[0][0], 1e-6),)], "minmax", dynamic, keep)

    monkeypatch.setattr(quantise, "quantise_onnx", spoiled)
    result = optimize.optimize(finished, tmp_path / "out", target="onnxruntime", precision="int8", rounds=3)
    assert attempts[0] == 0 and result.best.kept == attempts[-1] >= 3


def test_too_much_loss_is_no_candidate(finished, tmp_path, monkeypatch):
    honest = quantise.quantise_onnx
    monkeypatch.setattr(
        quantise,
        "quantise_onnx",
        lambda s, t, rows, *a, **k: honest(s, t, [(torch.full_like(rows[0][0], 1e-6),)], "minmax"),
    )
    with pytest.raises(PaperZooError, match="loses .* of accuracy, more than 1.0%"):
        optimize.optimize(finished, tmp_path / "out", target="onnxruntime", precision="int8", rounds=3)


def test_inputs_are_captured_from_evaluation(finished):
    recipe = load(finished, device="cpu")
    rows = quantise.captured(recipe, "test", 20)
    assert len(rows) == 20 and rows[0][0].shape == recipe.example()[0][:1].shape
    assert "forward" not in vars(recipe.deployed)


def test_rows_are_joined_where_their_shapes_agree():
    rows = [(torch.zeros(1, n),) for n in (3, 3, 3, 5, 3)]
    assert [b[0].shape for b in quantise.joined(rows, 2)] == [(2, 3), (1, 3), (1, 5), (1, 3)]


@pytest.mark.parametrize(
    ("found", "mode", "lost"), [(0.9, "max", 0.1), (1.1, "max", -0.1), (1.1, "min", 0.1), (math.nan, "max", math.nan)]
)
def test_what_is_lost_of_a_metric(found, mode, lost):
    assert drop({"m": found}, {"m": 1.0}, ("m", mode)) == pytest.approx(lost, nan_ok=True)


# -- quantisation-aware training -------------------------------------------------------------------------------------------


def test_weights_are_rounded_per_channel_and_gradients_pass():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    rounded = quantisation_aware.rounded_weight(weight, bits=4)
    for row, whole in zip(rounded.detach(), weight.detach(), strict=True):
        step = float(whole.abs().max()) / 7
        torch.testing.assert_close(row / step, (whole / step).round(), atol=1e-4, rtol=0)
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_activations_are_rounded_in_their_running_range():
    span = quantisation_aware.ActivationRange(bits=8)
    span(torch.tensor([-1.0, 3.0]), learning=True)
    assert (float(span.low), float(span.high)) == (-1.0, 3.0)
    span(torch.tensor([1.0, 4.0]), learning=True)  # zero belongs to the range
    assert (float(span.low), float(span.high)) == pytest.approx((-0.9, 3.1))
    x = torch.linspace(-0.9, 3.1, 100)
    assert (span(x, learning=False) - x).abs().max() <= 4.0 / 255 / 2 + 1e-6
    assert float(span.high) == pytest.approx(3.1)


def test_learning_with_few_bits_repairs_what_rounding_breaks(finished):
    """At three bits the trained network is lost; thirty steps bring much of it back. The names of its weights stay."""
    recipe = load(finished, device="cpu")
    names = list(recipe.model.state_dict())
    aware = quantisation_aware.QuantisationAware(recipe, bits=3)
    for group in recipe.optimizer.param_groups:
        group["initial_lr"] = group["lr"] = 0.02
    images, labels = recipe.batch()
    recipe.model.train()
    before = float(recipe.loss(recipe.model(images), labels).detach())
    for _ in range(30):
        recipe.runtime.begin(0)
        recipe.runtime.update(recipe.optimizer, aware.step(aware.batch())["loss"])
        recipe.runtime.finish()
    assert float(recipe.loss(recipe.model(images), labels).detach()) < 0.8 * before
    aware.turn(on=False)
    assert list(recipe.model.state_dict()) == names
    assert not any("_conv_forward" in vars(m) or "forward" in vars(m) for m in recipe.model.modules())


def test_tuning_before_int8(finished, tmp_path):
    result = optimize.optimize(
        finished, tmp_path / "out", target="onnxruntime", precision="int8", max_drop=0.05, rounds=3, tune_steps=5
    )
    tuned, before = (load(f, device="cpu").deployed.state_dict() for f in (result.folder, finished))
    assert any(not torch.equal(a, b) for a, b in zip(tuned.values(), before.values(), strict=True))
    assert open_recipe(result.folder).evaluate("test")["accuracy"] == pytest.approx(result.best.metrics["accuracy"])


# -- engines in the network's place -----------------------------------------------------------------------------------------


def linear_with(runner) -> tuple[nn.Module, deploy.Installed]:
    network = nn.Linear(3, 2)
    return network, install(network, runner, Signature.of(network, (torch.zeros(2, 3),), [[0]]))


def test_calls_that_the_engine_does_not_know_go_to_the_network():
    network, installed = linear_with(lambda x: [torch.full((len(x), 2), 7.0)])
    x = torch.randn(4, 3)
    with torch.inference_mode():
        assert (network(x) == 7).all() and (network(x[:1]) == 7).all()  # any batch
        assert network(x.unsqueeze(0)).shape == (1, 4, 2)  # another number of dimensions
    assert network(x).requires_grad  # gradients are wanted
    network.train()
    with torch.no_grad():
        assert not (network(x) == 7).any()
    assert (installed.calls, installed.passed_on) == (2, 3)


def test_uninstalling_gives_the_network_back():
    network, _ = linear_with(lambda x: [torch.zeros(len(x), 2)])
    uninstall(network)
    assert (network(torch.ones(1, 3)) != 0).any()


@pytest.mark.parametrize("outputs", [("tuple",), {"a": 1}, "tensor"])
def test_outputs_keep_their_structure(outputs):
    class Two(nn.Module):
        def forward(self, x):
            return {"tuple": (x, x + 1), "tensor": x}.get(
                outputs if isinstance(outputs, str) else outputs[0] if isinstance(outputs, tuple) else "",
                {"a": x, "b": [x]},
            )

    network = Two()
    signature = Signature.of(network, (torch.zeros(1, 2),), [[0]])
    from torch.utils._pytree import tree_leaves, tree_structure

    expected = network(torch.ones(1, 2))
    again = Signature(signature.inputs, signature.outputs).restore(tree_leaves(expected))
    assert tree_structure(again) == tree_structure(expected)


def test_programs_are_kept_for_the_last_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "SPECIALISED", 4)
    bench = bench_of(nn.Conv2d(1, 2, 3), (torch.randn(2, 1, 8, 8),), tmp_path, dynamic=True)
    engine = OnnxRuntime(bench.onnx())
    for size in (8, 9, 10, 11, 12, 8):
        x = torch.randn(1, 1, size, size)
        with torch.inference_mode():
            torch.testing.assert_close(engine(x)[0], bench.network(x), atol=1e-5, rtol=1e-4)
    assert len(engine.programs) == 4


def test_openvino_gives_the_networks_outputs(tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    network = paperzoo.create("wide_resnet10_2").eval()
    bench = bench_of(network, (torch.randn(2, 3, 16, 16),), tmp_path)
    candidate = bench.build("openvino", "fp32")
    assert candidate.reason == "" and candidate.difference < 1e-4


def test_openvino_in_eight_bits(tmp_path):
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)
    ).eval()
    bench = bench_of(
        network,
        (torch.randn(2, 3, 8, 8),),
        tmp_path,
        calibration=[(torch.randn(1, 3, 8, 8),) for _ in range(8)],
    )
    candidate = bench.build("openvino", "int8")
    assert candidate.reason == "" and 1e-6 < candidate.difference < 0.1


def test_a_missing_engine_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    candidate = bench_of(nn.Linear(2, 2), (torch.zeros(2, 2),), tmp_path).build("openvino", "fp32")
    assert "pip install 'paperzoo[openvino]'" in candidate.reason


def test_an_engine_that_crashes_is_no_candidate(tmp_path, monkeypatch):
    def spoil(self, precision, ranges):
        (self.work / "model.xml").write_text("not a model")
        return "model.xml"

    monkeypatch.setattr(Bench, "build_openvino", spoil)
    candidate = bench_of(nn.Linear(2, 2), (torch.zeros(2, 2),), tmp_path).build("openvino", "fp32")
    assert candidate.reason == "openvino fails or crashes on this network"


def test_wrong_outputs_are_no_candidate(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "runner", lambda *a: lambda x: [torch.full((len(x), 2), 5.0)])
    candidate = bench_of(nn.Linear(2, 2), (torch.zeros(2, 2),), tmp_path).build("onnxruntime", "fp32")
    assert candidate.reason.startswith("the outputs differ by")


def test_what_cannot_be_exported_says_so(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    candidate = bench_of(Branch(), (torch.ones(2, 2),), tmp_path).build("onnxruntime", "fp32")
    assert candidate.reason.startswith("Branch cannot be exported")


def test_lengths_that_differ_are_open(tmp_path):
    """Sentences of other lengths than the example's go through the engine."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids):
            return self.table(ids).mean(1)

    rows = [(torch.randint(9, (1, n)),) for n in (5, 7, 7)]
    bench = bench_of(Mean(), (torch.randint(9, (2, 6)),), tmp_path, checked=rows)
    candidate = bench.build("onnxruntime", "fp32")
    assert candidate.reason == "" and bench.signature.inputs == [([None, None], "int64")] and len(bench.checked) == 3


def test_sizes_that_cannot_be_open_are_fixed(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x * torch.arange(6)

    bench = bench_of(Fixed(), (torch.ones(2, 6),), tmp_path, checked=[(torch.zeros(1, 8),)])
    assert bench.signature.inputs[0][0] == [None, None]
    candidate = bench.build("onnxruntime", "fp32")
    assert candidate.reason == "" and bench.signature.inputs[0][0] == [None, 6]


def test_timings_are_against_the_plain_network(tmp_path):
    inputs = (torch.randn(2, 3, 16, 16),)
    torch.save(inputs, tmp_path / "example.pt")
    eager = {"engine": "eager", "model": "wide_resnet10_2", "arguments": {}}
    found = compare({"eager": eager, "again": eager}, tmp_path / "example.pt", (1,), [1], 3)
    assert found["eager"].ratio(1, 1) == 1.0 and 0.2 < found["again"].ratio(1, 1) < 5
    assert found["again"].peak_bytes > 2**26
    row = found["again"].described()["calls"][0]
    assert row["items_a_second"] == pytest.approx(1e3 / row["milliseconds"][1])


def test_candidates_are_described_without_nan():
    data = optimize.described(Candidate("openvino", "int8", reason="no", timing=Timing()))
    assert data["difference"] is None and json.loads(json.dumps(data, allow_nan=False))["reason"] == "no"


# -- answers -------------------------------------------------------------------------------------------------------------


def test_detections_are_compared_as_sets(tmp_path):
    from dataclasses import replace

    from paperzoo.engine.runtime import Runtime
    from paperzoo.papers.detection.retinanet.recipe import PRESETS, RECIPE

    config = replace(
        PRESETS["embedded"], model="retinanet_tiny_fpn", scenes=4, scene_size=32, image_sizes=(32,), show_above=0.2
    )
    recipe = RECIPE(config, Runtime(0, "cpu"))
    found = [
        {
            "boxes": torch.tensor([[0.0, 0, 9, 9], [10, 10, 20, 20]]),
            "labels": torch.tensor([1, 2]),
            "scores": torch.tensor([0.9, 0.8]),
        }
    ]
    moved = [{k: v.flip(0) for k, v in found[0].items()}]
    other = [found[0] | {"labels": torch.tensor([1, 3])}]
    outputs = iter([found, moved, found, other])
    recipe.deployed.postprocess = lambda *a: next(outputs)
    assert recipe.same_answers(torch.zeros(1), torch.zeros(1)).all()
    assert recipe.same_answers(torch.zeros(1), torch.zeros(1)).float().mean() == 0.5


# -- networks whose parts are called one by one ------------------------------------------------------------------------------


class Steps(nn.Module):
    """Encodes a sequence, and then takes tokens one after the other; the first step has no memory yet."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.words, self.cell = nn.Module(), nn.Embedding(9, 4), nn.Linear(8, 4)
        self.inner.again = nn.Linear(4, 4)

    def start(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"source": self.words(ids)}

    def advance(self, tokens: torch.Tensor, state: dict) -> tuple[torch.Tensor, dict]:
        memory = torch.cat([state[k] for k in ("memory",) if k in state] + [self.words(tokens)[:, None]], 1)
        seen = torch.cat([state["source"].mean(1), memory.mean(1)], 1)
        return self.inner.again(self.cell(seen)), state | {"memory": memory}


class Searches(Recipe):
    """Six steps over sentences of five lengths."""

    engine_parts = ("start", "advance", "inner.again.forward", "inner.lacking", "other.forward")

    def __init__(self) -> None:
        super().__init__(None, Runtime(0, "cpu"))
        torch.manual_seed(0)
        self.model = Steps().eval()

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        total = 0.0
        for length in (4, 5, 6, 7, 9):
            state, tokens = self.model.start(torch.arange(3 * length).view(3, length) % 9), torch.arange(3)
            for _ in range(6):
                found, state = self.model.advance(tokens, state)
                total += float(found.double().square().sum())
                tokens = found.argmax(1)
        return {"total": total}


def test_parts_note_what_they_are_called_with():
    recipe = Searches()
    seen = watched(recipe, "test", 12)
    assert list(seen) == ["start", "advance", "inner.again.forward"]  # what is lacking is left out
    assert {name: one.calls for name, one in seen.items()} == {"start": 5, "advance": 30, "inner.again.forward": 30}
    assert len(seen["advance"].rows) <= 12 and [x.shape[0] for x in seen["advance"].example] == [2, 2, 2]
    assert len({row[2].shape[1] for row in seen["advance"].rows}) > 1  # memories of several lengths
    assert not {"start", "advance"} & vars(recipe.model).keys() and "forward" not in vars(recipe.model.inner.again)


def test_every_part_has_a_program(tmp_path):
    recipe = Searches()
    recipe.engine_parts = ("start", "advance")
    before = recipe.evaluate()["total"]
    team = optimize.team_of(recipe, {}, tmp_path, dynamic=False)
    candidate = team.build("onnxruntime", "fp32")
    assert candidate.reason == "" and candidate.difference < 1e-5 and candidate.bytes > 100
    installed = team.install(team.runner(candidate))
    try:
        assert recipe.evaluate()["total"] == pytest.approx(before, rel=1e-5)
        assert [(one.calls, one.passed_on) for one in installed] == [(5, 0), (25, 5)]  # a first step is another call
    finally:
        team.uninstall()
    assert not {"start", "advance"} & vars(recipe.model).keys() and team.weights == {"start": 1, "advance": 6}


def test_the_times_of_parts_are_weighted_sums():
    key = (1, 1)
    parts = {"start": Timing({key: (1.0, 2.0, 3.0)}, {}, 5), "advance": Timing({key: (0.1, 0.2, 0.3)}, {}, 7)}
    whole = Team(nn.Module(), {}, {"start": 5, "advance": 50}).together(parts, {key: (0.0, 8.0, 0.0)})
    assert whole.calls[key] == pytest.approx((2.0, 4.0, 6.0)) and whole.ratio(1, 1) == pytest.approx(2.0)
    assert whole.peak_bytes == 7


def test_a_recipe_that_does_not_call_its_network_says_so(tmp_path):
    recipe = Searches()
    recipe.engine_parts = ()
    with pytest.raises(PaperZooError, match="Searches predicts without calling its network"):
        optimize.team_of(recipe, {}, tmp_path, dynamic=False)


def test_parts_are_not_for_eight_bits(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("paperzoo.tasks.classification.ClassificationRecipe.engine_parts", ("embed", "forward"))
    with pytest.raises(PaperZooError, match="calls its network in parts; int8 is for networks that are called as one"):
        optimize.optimize(finished, tmp_path / "out", precision="int8")


def test_a_deployed_folder_of_parts_predicts_as_the_run(tmp_path, monkeypatch):
    """Beam search with programs for encoding and for a step; timing is left out, as it is of the parts' own benches."""
    timing = Timing({(b, t): (1.0, 1.0, 1.0) for b in optimize.BATCHES for t in optimize.thread_counts()})
    monkeypatch.setattr(optimize, "compare", lambda tasks, *a: dict.fromkeys(tasks, timing))
    monkeypatch.setattr(Bench, "survive", lambda *a: None)
    run = tmp_path / "run"
    train("transformer", changes={"steps": 3}, folder=run, report=False)
    monkeypatch.setattr("paperzoo.tasks.translation.TranslationRecipe.evaluate", translated)
    result = optimize.optimize(run, tmp_path / "out", target="onnxruntime", rounds=3)
    plain, fast = load(run, device="cpu"), open_recipe(result.folder)
    sentences = plain.samples(tmp_path)[:3]
    assert [a.text for a in plain.predict(sentences)] == [b.text for b in fast.predict(sentences)]
    calls = {name: vars(fast.deployed)[name].calls for name in ("start", "advance")}
    assert calls["start"] == 1 and calls["advance"] >= 1
    assert list(json.loads((result.folder / "deploy.json").read_text())["parts"]) == ["start", "advance"]
    (result.folder / "part1" / "model.onnx").write_bytes(b"no")
    with pytest.raises(PaperZooError, match="part1/model.onnx: is damaged"):
        open_recipe(result.folder)


def translated(recipe, split: str = "test") -> dict[str, float]:
    """Twelve sentences instead of all, in batches of several lengths: what is measured does not matter here."""
    by_length = sorted((recipe.train_text.sources[i] for i in range(12)), key=len)
    for first in range(0, 12, 4):
        recipe.predict(by_length[first : first + 4])
    return {"bleu": 1.0}
