"""Export: ONNX or a `torch.export` program, with any batch and, where the network takes them, any sizes.

An export is checked against the network before it is believed: at batches of one, two and three, and at two further sizes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paperzoo.engine.explain import explain
from paperzoo.engine.files import write_atomically
from paperzoo.engine.inference import make_ready
from paperzoo.engine.program import broken_rule, numbers_as_tensors, to_program
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.sizes import Inputs, Sizes, closed, enlarged, refusal, shapes, try_sizes
from paperzoo.errors import PaperZooError

BATCHES = (2, 1, 3)
FORMATS = ("onnx", "torch")


@dataclass(frozen=True)
class Exported:
    """A written export. `difference` is the largest absolute one to the network, over all inputs that it was checked with."""

    path: Path
    format: str
    difference: float
    scale: float  # the largest absolute output, to read the difference by
    checked: tuple[str, ...] = ()  # the shapes of the inputs it was checked with
    fixed: str = ""  # why sizes are fixed to the example's; "" where none is

    @property
    def agrees(self) -> bool:
        return self.difference <= 1e-4 + 1e-3 * self.scale

    @property
    def sizes(self) -> str:
        """What was checked, in words."""
        other = f" and {len(self.checked) - len(BATCHES)} further sizes" if len(self.checked) > len(BATCHES) else ""
        return f"batches 1, 2, 3{other}" + (f"; size fixed: {self.fixed}" if self.fixed else "")


def export(recipe: Recipe, path: Path, format: str = "onnx", any_size: bool | None = None) -> Exported:
    """Write the deployed network and compare the export's outputs with it.

    Args:
        format: "onnx" (opset of torch's exporter), or "torch" (a `.pt2` program). The batch may differ in both.
        any_size: whether sizes that the network takes otherwise may differ in the export, too; None as the recipe says.

    Raises:
        PaperZooError: if the format is unknown or the network cannot be exported; it names the operator and the line.
    """
    if format not in FORMATS:
        raise PaperZooError(f"export format '{format}' is not known; it is onnx or torch")
    if format == "torch" and path.suffix != ".pt2":
        raise PaperZooError(f"{path}: a torch.export program's file ends in .pt2")
    network = recipe.deployed.eval().to("cpu")
    inputs = tuple(recipe.example())
    try:
        if any_size is None and not recipe.any_size:
            sizes = closed(inputs, "the recipe says so")
        else:
            sizes = try_sizes(network, inputs) if any_size is not False else closed(inputs, "as asked for")
        return export_network(network, inputs, path, format, sizes)
    finally:
        network.to(recipe.runtime.device)


def export_network(network: nn.Module, inputs: Inputs, path: Path, format: str, sizes: Sizes) -> Exported:
    """`export` of a network on the CPU, with `sizes` as far as torch's exporters can; else fixed, with the reason."""
    ready = folded(network, inputs)
    if sizes.any:
        made = export_any_size(network, ready, inputs, path, format, sizes)
        if isinstance(made, Exported):
            return made
        sizes = closed(inputs, made)
    for written in (ready, network):  # where rounding decides which objects there are, folding may change them
        write(written, trace(written, inputs, format, sizes), path, format)
        made = check(network, inputs, path, format, sizes)
        if made.agrees:
            break
    return made


def export_any_size(
    network: nn.Module, ready: nn.Module, inputs: Inputs, path: Path, format: str, sizes: Sizes
) -> Exported | str:
    """An export for other sizes, too, that was checked; or why there is none."""
    large = enlarged(inputs, sizes)
    try:
        program = trace(ready, sizes.others[0] if refusal(network, large) else large, format, sizes)
        problem = broken_rule(program, [inputs, *sizes.others])
        if problem:
            return problem
        write(ready, program, path, format)
        made = check(network, inputs, path, format, sizes)
    except PaperZooError as error:
        return str(error) if error.__cause__ is None else explain(error)
    return made if made.agrees else f"the export's outputs differ by {made.difference:.2g} at other sizes"


def folded(network: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy of the network on the CPU with batch norm folded: fewer nodes to trace, and to run."""
    with torch.inference_mode(False), torch.no_grad():
        return make_ready(copy.deepcopy(network), inputs)


def trace(network: nn.Module, inputs: Inputs, format: str, sizes: Sizes) -> torch.export.ExportedProgram:
    """The network as a program.

    Raises:
        PaperZooError: naming the operator or the line at which it cannot be traced.
    """
    try:
        with quiet():
            return to_program(network, inputs, sizes.axes)
    except Exception as error:
        raise PaperZooError(cannot(network, format, error, traced=False)) from error


def write(network: nn.Module, program: torch.export.ExportedProgram, path: Path, format: str) -> None:
    """The file, atomically.

    Raises:
        PaperZooError: naming the operator and the line that cannot be exported.
    """
    try:
        with quiet():
            if format == "onnx":
                onnx = torch.onnx.export(numbers_as_tensors(program), dynamo=True, optimize=True, verbose=False)
                write_atomically(path, lambda part: onnx.save(str(part)))
            else:
                write_atomically(path, lambda part: save_program(program, part))
    except PaperZooError:
        raise
    except Exception as error:
        raise PaperZooError(cannot(network, format, error, traced=True)) from error


def cannot(network: nn.Module, format: str, error: BaseException, traced: bool) -> str:
    """The line for an export that failed. `traced`: torch.export had a program, and only ONNX is out of reach."""
    name = {"onnx": "ONNX", "torch": "a torch.export program"}.get(format, format)
    other = "; use --format torch" if format == "onnx" and traced else ""
    return f"{type(network).__name__} cannot be exported to {name}: {explain(error)}{other}"


def check(network: nn.Module, inputs: Inputs, path: Path, format: str, sizes: Sizes) -> Exported:
    """The written file against the network: batches of two, one and three, and the other sizes with batches of two and one.

    Raises:
        PaperZooError: if the outputs have other shapes, or the file is refused.
    """
    with quiet():
        runner = onnx_runner(path) if format == "onnx" else torch.export.load(str(path)).module()
    batches = [tuple(resize_batch(x, count) for x in inputs) for count in BATCHES]
    batches += [tuple(resize_batch(x, n) for x in other) for n, other in zip(BATCHES, sizes.others, strict=False)]
    difference, scale = 0.0, 0.0
    for batch in batches:
        gap, largest = compare_outputs(network, runner, batch, str(path))
        difference, scale = max(difference, gap), max(scale, largest)
    return Exported(path, format, difference, scale, tuple(map(shapes, batches)), sizes.fixed)


@torch.inference_mode()
def compare_outputs(network: nn.Module, runner: Callable[..., Any], inputs: Inputs, name: str) -> tuple[float, float]:
    """The largest difference of a program's outputs to the network's, infinite where one is no number, and the largest output.

    Raises:
        PaperZooError: where the program stops or its outputs have other shapes.
    """
    expected = tensors(network(*inputs))
    try:
        found = tensors(runner(*inputs))
    except PaperZooError:
        raise
    except Exception as error:
        raise PaperZooError(f"{name}: the export stops at inputs {shapes(inputs)}: {explain(error)}") from error
    if [x.shape for x in expected] != [x.shape for x in found]:
        raise PaperZooError(
            f"{name}: at inputs {shapes(inputs)} the export's outputs have other shapes than the network's"
        )
    if hasattr(network, "aligned"):  # outputs are a set, whose order rounding may change
        found = network.aligned(expected, found)
    difference, scale = 0.0, 0.0
    for a, b in zip(expected, found, strict=True):
        difference, scale = max(difference, largest_gap(a, b)), max(scale, largest_output(a))
    return difference, scale


def largest_gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where one side alone is infinite or no number."""
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = float(torch.where(same, 0.0, (a - b).abs()).max())
    return gap if math.isfinite(gap) else math.inf


def largest_output(a: Tensor) -> float:
    """The largest absolute value that is finite."""
    return float(a.double().abs().nan_to_num(0.0, posinf=0.0).max()) if a.numel() else 0.0


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a nested output, in the order in which exporters list them."""
    return [v.detach() for v in tree_leaves(outputs) if isinstance(v, Tensor)]


def save_program(program: Any, part: Path) -> None:
    with part.open("wb") as file:
        torch.export.save(program, file)


def resize_batch(x: Any, count: int) -> Any:
    """An example input with another batch size, by repeating its rows."""
    if not isinstance(x, Tensor) or not x.ndim:
        return x
    return x[torch.arange(count) % len(x)].contiguous()


def onnx_session(
    path: Path,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    sizes: dict[str, int] | None = None,
) -> Any:
    """ONNX Runtime's session of a file. `sizes` gives open sizes by their names a constant, so that more can be planned.

    Raises:
        PaperZooError: if ONNX Runtime does not accept the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it raises says the same
    options.intra_op_num_threads = threads or torch.get_num_threads()
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:
        raise PaperZooError(f"{path}: ONNX Runtime does not accept it: {explain(error)}") from error


def onnx_runner(path: Path, threads: int | None = None) -> Callable[..., list[Tensor]]:
    """A function of tensors that runs an ONNX file in ONNX Runtime on the CPU.

    Raises:
        PaperZooError: if ONNX Runtime does not accept the file, or stops.
    """
    session = onnx_session(path, threads)
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        return run_session(session, names, [x for x in inputs if isinstance(x, Tensor)], path)

    return run


def run_session(session: Any, names: Sequence[str], inputs: Sequence[Tensor], path: Path) -> list[Tensor]:
    """A session's outputs for its inputs in their order.

    Raises:
        PaperZooError: where ONNX Runtime stops.
    """
    feed = {name: x.detach().cpu().contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
    try:
        return [torch.from_numpy(y) for y in session.run(None, feed)]
    except Exception as error:
        raise PaperZooError(f"{path}: ONNX Runtime stopped: {explain(error)}") from error


@contextlib.contextmanager
def quiet():
    """Without the exporters' chatter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
