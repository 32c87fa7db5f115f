"""Export: ONNX with a dynamic batch, or a `torch.export` program; checked against the network before it is believed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paperzoo.engine.files import write_atomically
from paperzoo.engine.recipe import Recipe
from paperzoo.errors import PaperZooError


@dataclass(frozen=True)
class Exported:
    """A written export. `difference` is the largest absolute one to the network, over batches of 1, 2 and 3."""

    path: Path
    format: str
    difference: float
    scale: float  # the largest absolute output, to read the difference by

    @property
    def agrees(self) -> bool:
        return self.difference <= 1e-4 + 1e-3 * self.scale


def export(recipe: Recipe, path: Path, format: str = "onnx") -> Exported:
    """Write the deployed network and compare the export's outputs with it.

    Args:
        format: "onnx" (opset of torch's exporter, batch dimension dynamic), or "torch" (a `.pt2` program).

    Raises:
        PaperZooError: if the format is unknown or the network cannot be exported.
    """
    if format not in ("onnx", "torch"):
        raise PaperZooError(f"export format '{format}' is not known; it is onnx or torch")
    if format == "torch" and path.suffix != ".pt2":
        raise PaperZooError(f"{path}: a torch.export program's file ends in .pt2")
    network = recipe.deployed.eval().to("cpu")
    inputs = tuple(recipe.example())
    try:
        with quiet():
            program = to_program(network, inputs)
            if format == "onnx":
                onnx = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False)
                write_atomically(path, lambda part: onnx.save(str(part)))
            else:
                write_atomically(path, lambda part: save_program(program, part))
    except PaperZooError:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PaperZooError(f"{type(network).__name__} cannot be exported to {format}: {first[:200]}") from error
    finally:
        network.to(recipe.runtime.device)
    difference, scale = 0.0, 0.0
    with quiet():
        runner = onnx_runner(path) if format == "onnx" else torch.export.load(str(path)).module()
    network.to("cpu")
    for count in (2, 1, 3):
        batch = tuple(resize_batch(x, count) for x in inputs)
        with torch.inference_mode():
            expected = tensors(network(*batch))
        found = tensors(runner(*batch))
        if [v.shape for v in expected] != [v.shape for v in found]:
            raise PaperZooError(
                f"{path}: at batch size {count} the export's outputs have other shapes than the network's"
            )
        if hasattr(network, "aligned"):  # outputs are a set, whose order rounding may change
            found = network.aligned(expected, found)
        for a, b in zip(expected, found, strict=True):
            difference = max(difference, float((a.double() - b.double()).abs().max()) if a.numel() else 0.0)
            scale = max(scale, float(a.abs().max()) if a.numel() else 0.0)
    network.to(recipe.runtime.device)
    return Exported(path, format, difference, scale)


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a nested output, in the order in which exporters list them."""
    return [v.detach() for v in tree_leaves(outputs) if isinstance(v, Tensor)]


def to_program(network: nn.Module, inputs: tuple) -> torch.export.ExportedProgram:
    """The network as a program whose first dimension of every input is the dynamic batch."""
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} if isinstance(x, Tensor) and x.ndim else None for x in inputs)
    with torch.no_grad():
        return torch.export.export(network, inputs, dynamic_shapes=shapes, strict=False)


def save_program(program: Any, part: Path) -> None:
    with part.open("wb") as file:
        torch.export.save(program, file)


def resize_batch(x: Any, count: int) -> Any:
    """An example input with another batch size, by repeating its rows."""
    if not isinstance(x, Tensor) or not x.ndim:
        return x
    return x[torch.arange(count) % len(x)].contiguous()


def onnx_runner(path: Path, threads: int | None = None):
    """A function of tensors that runs an ONNX file in ONNX Runtime on the CPU.

    Raises:
        PaperZooError: if ONNX Runtime does not accept the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise PaperZooError(f"{path}: ONNX Runtime does not accept it: {str(error).splitlines()[0][:200]}") from error
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        feed = {n: x.detach().cpu().numpy() for n, x in zip(names, tensors, strict=False)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


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
