"""Eight-bit networks: post-training quantisation with calibration, for ONNX Runtime and OpenVINO.

Weights are quantised per channel and activations per tensor, with ranges from data that the network has been shown. Token
models have their weights quantised beforehand and activations as they come (dynamic quantisation) under ONNX Runtime.
Layers that suffer most, found by comparing what every layer gives with and without quantisation, stay in fp32 step by step
until the task's metric is kept.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperzoo.engine.export import quiet
from paperzoo.engine.recipe import Recipe
from paperzoo.errors import PaperZooError

RANGES = ("minmax", "entropy", "percentile")
QUANTISED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
KEPT_SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7)  # of the layers that are left in fp32, the most sensitive first

Rows = list[tuple[Tensor, ...]]  # inputs of the network, a batch of one each


# -- data ----------------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """As many inputs were seen as were wanted."""


def captured(recipe: Recipe, split: str, count: int) -> Rows:
    """The first `count` inputs that the network is given while the recipe evaluates a split; fewer where there are fewer.

    Calls with keyword arguments or with something else than tensors are passed over.
    """
    network, rows = recipe.deployed, []
    eager = network.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and args and all(isinstance(x, Tensor) and x.ndim for x in args):
            for i in range(len(args[0])):
                rows.append(tuple(x[i : i + 1].detach().clone() for x in args))
                if len(rows) >= count:
                    raise Enough
        return eager(*args, **kwargs)

    network.forward = record
    try:
        recipe.evaluate(split)
    except Enough:
        pass
    finally:
        vars(network).pop("forward", None)
    return rows


def joined(rows: Rows, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Rows as batches; a batch ends where the shapes change."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and end - start < size and all(map(same_shape, rows[start], rows[end])):
            end += 1
        yield tuple(torch.cat(parts) for parts in zip(*rows[start:end], strict=True))
        start = end


def same_shape(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape


def of_tokens(inputs: Sequence[Tensor]) -> bool:
    """Whether a network reads ids, and so cannot be calibrated by its input's range."""
    return not any(x.is_floating_point() for x in inputs)


# -- ONNX Runtime --------------------------------------------------------------------------------------------------------


def quantise_onnx(
    source: Path,
    target: Path,
    rows: Rows,
    ranges: str = "percentile",
    dynamic: bool = False,
    keep: Sequence[str] = (),
) -> None:
    """An fp32 ONNX file as an int8 one.

    Args:
        rows: what the ranges are measured on; not used by dynamic quantisation.
        ranges: "minmax", "entropy" or "percentile" (99.99% of the values).
        dynamic: ranges of activations are measured anew at each call.
        keep: names of nodes that stay in fp32.

    Raises:
        PaperZooError: where the quantiser gives up.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static

    if ranges not in RANGES:
        raise PaperZooError(f"ranges '{ranges}' is not known; there are {', '.join(RANGES)}")
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    try:
        with quiet(), without_shapes(source) as plain:
            if dynamic:
                quantize_dynamic(
                    str(plain), str(target), weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=list(keep)
                )
                return
            quantize_static(
                str(plain),
                str(target),
                Reader(source, rows),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED) + ["Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(keep),
                calibrate_method=methods[ranges],
                extra_options={"CalibPercentile": 99.99, "WeightSymmetric": True},
            )
    except PaperZooError:
        raise
    except Exception as error:
        raise PaperZooError(
            f"ONNX Runtime cannot quantise this network: {str(error).strip().splitlines()[0][:200]}"
        ) from error


@contextlib.contextmanager
def without_shapes(source: Path) -> Iterator[Path]:
    """A copy beside an ONNX file without the shapes between its nodes, which the quantiser finds again, and would not find changed."""
    import onnx

    model = onnx.load(str(source))
    del model.graph.value_info[:]
    copy = source.with_suffix(".shapeless.onnx")
    onnx.save(model, str(copy))
    try:
        yield copy
    finally:
        copy.unlink()


class Reader:
    """Calibration inputs in the form in which ONNX Runtime's quantiser asks for them."""

    def __init__(self, source: Path, rows: Rows) -> None:
        import onnx

        graph = onnx.load(str(source), load_external_data=False).graph
        constants = {t.name for t in graph.initializer}
        self.names = [value.name for value in graph.input if value.name not in constants]
        self.rows = rows
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.left, None)
        return None if row is None else {n: x.numpy() for n, x in zip(self.names, row, strict=True)}

    def rewind(self) -> None:
        self.left = iter(self.rows)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.rows[start_index:end_index])

    def __len__(self) -> int:
        return len(self.rows)


def sensitivity(source: Path, quantised: Path, rows: Rows) -> list[str]:
    """The quantised nodes' names, those first whose outputs quantisation spoils most (signal to noise, over `rows`)."""
    import onnx
    import onnxruntime

    graphs = [onnx.load(str(path)) for path in (source, quantised)]
    wanted = {node.output[0]: node.name for node in graphs[0].graph.node if node.op_type in QUANTISED}
    there = {name for node in graphs[1].graph.node for name in node.output}
    wanted = {output: node for output, node in wanted.items() if output in there}
    energy = {output: [0.0, 0.0] for output in wanted}
    sessions = []
    for graph in graphs:
        known = {value.name for value in graph.graph.output}
        graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # without fusion, which would swallow what is to be compared
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        sessions.append(onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"]))
    names = [value.name for value in sessions[0].get_inputs()]
    for row in rows:
        feed = {n: x.numpy() for n, x in zip(names, row, strict=True)}
        for output, a, b in zip(wanted, *(s.run(list(wanted), feed) for s in sessions), strict=True):
            energy[output][0] += float(np.square(a, dtype=np.float64).sum())
            energy[output][1] += float(np.square(a.astype(np.float64) - b).sum())
    noise = {wanted[output]: n / max(s, 1e-30) for output, (s, n) in energy.items()}
    return sorted(noise, key=noise.get, reverse=True)


# -- OpenVINO ------------------------------------------------------------------------------------------------------------


def quantise_openvino(
    source: Path,
    target: Path,
    rows: Rows,
    transformer: bool,
    metric: Callable[[Any], float] | None = None,
    max_drop: float = 0.0,
) -> None:
    """An OpenVINO model as an int8 one, by NNCF's post-training quantisation.

    With a `metric` of the compiled model, layers go back to fp32 until it has lost at most `max_drop`, relatively.

    Raises:
        PaperZooError: where NNCF is missing or gives up.
    """
    nncf, openvino = need_nncf()
    try:
        with silence():
            model = openvino.Core().read_model(str(source))
            data = nncf.Dataset(rows, lambda row: tuple(x.numpy() for x in row))
            options = kind(nncf, transformer) | {"subset_size": len(rows)}
            if metric is None:
                made = nncf.quantize(model, data, **options)
            else:
                made = nncf.quantize_with_accuracy_control(
                    model,
                    data,
                    data,
                    validation_fn=lambda compiled, _: (metric(compiled), None),
                    max_drop=max_drop,
                    drop_type=nncf.DropType.RELATIVE,
                    **options,
                )
            openvino.save_model(made, str(target), compress_to_fp16=False)
    except Exception as error:
        raise PaperZooError(f"NNCF cannot quantise this network: {str(error).strip().splitlines()[0][:200]}") from error


def kind(nncf: Any, transformer: bool) -> dict[str, Any]:
    if transformer:
        return {"model_type": nncf.ModelType.TRANSFORMER, "preset": nncf.QuantizationPreset.MIXED}
    return {"preset": nncf.QuantizationPreset.MIXED}


def need_nncf() -> tuple[Any, Any]:
    os.environ.setdefault("NNCF_CI", "1")  # without it NNCF reports its use over the network
    try:
        with silence():
            import nncf
            import openvino
    except ImportError as error:
        raise PaperZooError(f"{error.name} is not installed; it comes with: pip install 'paperzoo[openvino]'") from None
    return nncf, openvino


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without what NNCF prints."""
    with quiet():
        log = logging.getLogger("nncf")
        before = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(before)


def kept_counts(total: int) -> list[int]:
    """How many of the most sensitive layers stay in fp32, attempt by attempt."""
    return sorted({min(total, math.ceil(share * total)) for share in KEPT_SHARES})
