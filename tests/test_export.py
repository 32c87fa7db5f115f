"""Exports: any batch, any size where the network takes it, and the reason by operator where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from paperzoo.engine import export as exporting
from paperzoo.engine.explain import explain
from paperzoo.engine.export import Exported, compare_outputs, export, export_network, largest_gap, onnx_runner
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.engine.sizes import at, candidates, closed, enlarged, try_sizes, values
from paperzoo.errors import PaperZooError


class Does(nn.Module):
    """A linear layer and then whatever a test wants."""

    def __init__(self, what) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor):
        return self.what(self.linear(x))


class Convolutions(nn.Module):
    """Two maps, halved and scaled up again: any picture of an even height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).relu()) + x[:, :2]


class Plain(Recipe):
    """A recipe around a network."""

    def __init__(self, network: nn.Module, *inputs: Tensor) -> None:
        super().__init__(None, Runtime(0, "cpu"))
        self.model, self.inputs = network, inputs

    def example(self) -> tuple[Tensor, ...]:
        return self.inputs


def pictures(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def one_line(network: nn.Module, tmp_path, *inputs: Tensor, format: str = "onnx") -> str:
    """The message of an export that fails."""
    path = tmp_path / ("model.onnx" if format == "onnx" else "model.pt2")
    with pytest.raises(PaperZooError) as caught:
        export(Plain(network, *(inputs or (torch.randn(2, 4),))), path, format)
    assert "\n" not in str(caught.value) and not path.exists()
    return str(caught.value)


# -- sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "file"), [("onnx", "model.onnx"), ("torch", "model.pt2")])
def test_a_convolutional_network_is_exported_for_any_size(tmp_path, format, file):
    torch.manual_seed(0)
    network = Convolutions()
    made = export(Plain(network, pictures(32, 48)), tmp_path / file, format)
    assert made.agrees and made.scale > 0.1 and made.fixed == ""
    assert made.checked[:3] == ("2 x 3 x 32 x 48", "1 x 3 x 32 x 48", "3 x 3 x 32 x 48")
    assert len(made.checked) == 5 and len({shape.split(" x ", 2)[2] for shape in made.checked}) == 3
    assert made.sizes == "batches 1, 2, 3 and 2 further sizes"
    runner = onnx_runner(tmp_path / file) if format == "onnx" else torch.export.load(str(tmp_path / file)).module()
    gap, _ = compare_outputs(network, runner, (pictures(62, 22),), file)
    assert gap < 1e-4


def test_fixed_sizes_as_asked_for(tmp_path):
    made = export(Plain(Convolutions(), pictures(32, 32)), tmp_path / "model.onnx", any_size=False)
    assert made.agrees and made.fixed == "as asked for" and len(made.checked) == 3
    with pytest.raises(PaperZooError, match="ONNX Runtime stopped"):
        onnx_runner(tmp_path / "model.onnx")(pictures(64, 64))


def test_a_recipe_may_say_that_sizes_are_fixed(tmp_path):
    class One(Plain):
        any_size = False

    recipe = One(Convolutions(), pictures(32, 32))
    assert export(recipe, tmp_path / "model.onnx").fixed == "the recipe says so"
    assert export(recipe, tmp_path / "model.onnx", any_size=True).fixed == ""


def test_a_network_of_one_size_says_where_that_comes_from(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 16 * 16, 2))
    made = export(Plain(network, pictures(16, 16)), tmp_path / "model.onnx")
    assert made.agrees and len(made.checked) == 3
    assert made.fixed.startswith("16 x 16: ") and "cannot be multiplied" in made.fixed
    assert made.sizes.startswith("batches 1, 2, 3; size fixed: 16 x 16: ")


def test_a_size_that_the_graph_takes_for_a_constant_is_fixed(tmp_path):
    """The network takes any length, but its way through Python does not show in a graph."""

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sum(x[:, i] for i in range(x.shape[1])) + x.mean(1)

    made = export(Plain(Counts(), torch.randn(2, 8, 3)), tmp_path / "model.onnx")
    assert made.agrees and len(made.checked) == 3
    assert made.fixed.startswith("a size is the constant ") and made.fixed.endswith(" in Counts")


def test_a_table_of_positions_bounds_the_length(tmp_path):
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Parameter(torch.randn(32, 4))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            if ids.shape[1] > len(self.places):
                raise ValueError(f"{ids.shape[1]} tokens are more than {len(self.places)}")
            return (self.words(ids) + self.places[: ids.shape[1]]) * mask[..., None]

    ids = torch.randint(9, (2, 32), generator=torch.Generator().manual_seed(0))
    made = export(Plain(Table(), ids, torch.ones(2, 32)), tmp_path / "model.onnx")
    assert made.agrees and made.fixed == "" and made.checked[3:] == ("2 x 16, 2 x 16", "1 x 24, 1 x 24")


def test_sizes_that_agree_are_changed_together():
    ids, image = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 3, 16, 16)
    groups = candidates((ids, ids, torch.zeros(2, 12), image, torch.zeros(2, 7), torch.zeros(2, 2, dtype=torch.int64)))
    assert [sorted(places for length in group for places in length) for group in groups] == [
        [(3, 2), (3, 3)],
        [(0, 1), (1, 1), (2, 1)],
    ]


def test_height_and_width_are_changed_apart():
    found = try_sizes(Convolutions(), (pictures(32, 32),))
    assert found.axes == ((2, 3),) and [x.shape[2] == x.shape[3] for (x,) in found.others] == [False, False]
    assert min(enlarged((pictures(32, 32),), found)[0].shape[2:]) >= 160


def test_values_are_multiples_of_what_networks_halve_by():
    assert {v % 16 for v in values(96, 0)[:6]} == {0} and {v % 32 for v in values(96, 0)[6:12]} == {0}
    assert values(7, 0)[:2] == [8, 9]


def test_other_sizes_repeat_the_example():
    x = torch.arange(6).view(1, 6)
    assert at((x,), {(0, 1): 8})[0].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert at((x,), {(0, 1): 4})[0].tolist() == [[0, 1, 2, 3]]


def test_wrong_outputs_at_other_sizes_close_them(tmp_path, monkeypatch):
    """An export that agrees at the example's size alone is written anew for that size alone."""
    honest = exporting.onnx_runner

    def wrong(path, threads=None):
        run = honest(path, threads)
        return lambda x: [y + (1.0 if x.shape[2] != 32 else 0.0) for y in run(x)]

    monkeypatch.setattr(exporting, "onnx_runner", wrong)
    made = export(Plain(Convolutions(), pictures(32, 32)), tmp_path / "model.onnx")
    assert made.agrees and made.fixed == "the export's outputs differ by 1 at other sizes"


# -- comparing -----------------------------------------------------------------------------------------------------------


def test_no_number_is_a_difference():
    nan, one = torch.tensor([math.nan]), torch.tensor([1.0])
    assert largest_gap(one, nan) == largest_gap(one, one * math.inf) == math.inf
    assert largest_gap(nan, nan) == largest_gap(-one * math.inf, -one * math.inf) == 0.0
    assert largest_gap(one, one + 0.5) == 0.5 and largest_gap(one[:0], one[:0]) == 0.0
    assert not Exported("x", "onnx", math.inf, 1.0).agrees


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(PaperZooError, match="at inputs 2 x 4 the export's outputs have other shapes"):
        compare_outputs(nn.Linear(4, 2), lambda x: [x], (torch.randn(2, 4),), "model.onnx")


# -- why not -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda x: torch.linalg.svd(x[:, None])[1], "the operator aten::_linalg_svd (tests/test_export.py line {}) has no ONNX"),
        (lambda x: torch.linalg.eigvalsh(x[:, None] * x[..., None]), "aten::_linalg_eigh (tests/test_export.py line {}) has no"),
        (lambda x: x.kthvalue(2)[0], "the operator aten::kthvalue (tests/test_export.py line {}) has no ONNX counterpart"),
        (lambda x: torch.histc(x, 4), "the operator aten::histc (tests/test_export.py line {}) cannot be written as ONNX: aten_h"),
        (lambda x: {"a": x, "b": "text"}, "it gives more than tensors"),
    ],
)  # fmt: skip
def test_operators_without_an_onnx_counterpart_are_named(tmp_path, what, words):
    said = one_line(Does(what), tmp_path)
    assert said.startswith("Does cannot be exported to ONNX: ") and said.endswith("; use --format torch")
    assert words.format(Does.forward.__code__.co_firstlineno + 1) in said


def test_what_has_no_onnx_counterpart_is_exported_as_a_program(tmp_path):
    made = export(Plain(Does(lambda x: x.kthvalue(2)[0]), torch.randn(2, 4)), tmp_path / "model.pt2", "torch")
    assert made.agrees and made.scale > 0


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_way_that_depends_on_values_is_named(tmp_path, format):
    def turned(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    said = one_line(Does(turned), tmp_path, format=format)
    line = turned.__code__.co_firstlineno + 1
    assert (
        f"its way depends on the values of a tensor (aten::_local_scalar_dense) (tests/test_export.py line {line})"
        in said
    )
    assert "--format torch" not in said


def test_an_operator_whose_outputs_depend_on_values_is_named(tmp_path):
    def loss(x: Tensor) -> Tensor:
        numbers = torch.tensor([2]), torch.tensor([1])
        return nn.functional.ctc_loss(x[:, None].log_softmax(-1), torch.ones(1, 1, dtype=torch.int64), *numbers)

    said = one_line(Does(loss), tmp_path)
    assert "the operator aten::_ctc_loss (tests/test_export.py line" in said and "depends on the values" in said


def test_a_batch_that_is_a_constant_is_named(tmp_path):
    said = one_line(Does(lambda x: torch.stack([x[i] for i in range(x.shape[0])])), tmp_path)
    assert "the batch is the constant 2 in it" in said


def test_what_python_refuses_while_tracing_is_said_with_its_line(tmp_path):
    def through_numpy(x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy())

    said = one_line(Does(through_numpy), tmp_path)
    assert f".numpy() is not supported for tensor subclasses. (tests/test_export.py line {through_numpy.__code__.co_firstlineno + 1})" in said  # fmt: skip


def test_errors_without_a_graph_are_their_first_line():
    inner = ValueError("\nthe cause\nand more")
    outer = RuntimeError("outer")
    outer.__cause__ = inner
    assert explain(outer) == "the cause"


def test_sizes_in_arithmetic_are_exported(tmp_path):
    """A length that tensors are multiplied by, compared with, or taken modulo."""

    class Phases(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[1])
            beyond = (places * 3 > x.shape[1])[:, None]
            return x.cumsum(1) * (1 / x.shape[1]) + (places * 3 % x.shape[1])[:, None] - x.shape[1] * beyond

    network, x = Phases(), torch.randn(2, 8, 3)
    made = export_network(network, (x,), tmp_path / "model.onnx", "onnx", try_sizes(network, (x,)))
    assert made.agrees and made.fixed == "" and len(made.checked) == 5


def test_only_the_batch_differs_in_closed_sizes():
    assert closed((torch.zeros(2, 3), torch.zeros(2))).axes == ((), ()) and not closed((torch.zeros(2, 3),)).any


def test_weights_that_are_computed_at_each_call_are_not_folded():
    from paperzoo.engine.inference import make_ready

    torch.manual_seed(0)
    convolution = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    network = nn.Sequential(convolution, nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(make_ready(network, (x,))(x), expected)
    assert isinstance(network[1], nn.BatchNorm2d)
