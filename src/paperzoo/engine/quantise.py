"""Eight-bit networks: post-training quantisation with calibration, for ONNX Runtime and OpenVINO.

Weights are quantised per channel and activations per tensor, with ranges from data that the network has been shown. Token
models have their weights quantised beforehand and activations as they come (dynamic quantisation) under ONNX Runtime.
Layers that cost most, found by quantising one alone and comparing the network's outputs, stay in fp32 step by step
until the task's metric and its answers are kept.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
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
PASSED_ON = ("Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat")  # in int8 so that layers hand on int8
ROUNDINGS = ("QuantizeLinear", "DequantizeLinear")
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
                op_types_to_quantize=[*QUANTISED, *PASSED_ON],
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
    """The quantised nodes' names, those first that spoil the network's outputs most when they alone are quantised.

    Where the quantiser has put other nodes in their places (dynamic quantisation), those first whose own outputs are spoilt most.
    """
    import onnx

    plain, made = (onnx.load(str(path)) for path in (source, quantised))
    inputs = {node.name: list(node.input) for node in made.graph.node}
    kinds = {*QUANTISED, *PASSED_ON}
    alone = {n.name: inputs[n.name] for n in plain.graph.node if n.op_type in kinds and n.name in inputs}
    alone = {n.name: alone[n.name] for n in plain.graph.node if n.name in alone and alone[n.name] != list(n.input)}
    if not alone:
        return by_own_outputs(plain, made, rows)
    known = {x.name for x in plain.graph.initializer} | {x for n in plain.graph.node for x in n.output}
    outputs = [x.name for x in plain.graph.output]
    nodes = {n.name: n for n in plain.graph.node if n.name in alone}
    expected = answers(plain, outputs, rows)
    # The roundings (Q and DQ) and the int8 weights of all nodes, which nothing reads yet. What a node gives may have another
    # name in the int8 network: that of an output goes to the rounding behind it.
    first_names = {n.name: list(n.output) for n in plain.graph.node}
    renamed = {b: a for n in made.graph.node for a, b in zip(first_names.get(n.name, []), n.output, strict=False)}
    roundings = [n for n in made.graph.node if n.op_type in ROUNDINGS and not known & set(n.output)]
    for node in roundings:
        node.input[:] = [renamed.get(x, x) for x in node.input]
    plain.graph.initializer.extend(x for x in made.graph.initializer if x.name not in known)
    plain.graph.node.extend(roundings)
    made_by = {x: node for node in roundings for x in node.output}
    rounded = {made_by[n.input[0]].input[0]: n.output[0] for n in roundings if n.input[0] in made_by}  # x -> DQ(Q(x))
    readers: dict[str, list[Any]] = {}
    for node in plain.graph.node:
        for x in node.input if node.op_type not in ROUNDINGS else ():
            readers.setdefault(x, []).append(node)
    noise = {}
    for name, its_inputs in alone.items():
        node = nodes[name]
        changed = [(node, list(node.input))]
        for x in node.output:  # what it gives is rounded as well, for whoever reads it
            changed += [(reader, list(reader.input)) for reader in readers.get(x, []) if x in rounded]
        for reader, before in changed[1:]:
            reader.input[:] = [rounded.get(x, x) if x in node.output else x for x in before]
        node.input[:] = its_inputs
        noise[name] = spoilt(expected, answers(sorted_nodes(plain), outputs, rows))
        for reader, before in changed:
            reader.input[:] = before
    return sorted(noise, key=noise.get, reverse=True)


def sorted_nodes(model: Any) -> Any:
    """A copy in which every node stands after those whose outputs it reads, and those stay away that no output needs."""
    import onnx

    made_by = {output: node for node in model.graph.node for output in node.output}
    ordered, seen, open_nodes = [], set(), [(made_by[x.name], False) for x in model.graph.output if x.name in made_by]
    while open_nodes:
        node, ready = open_nodes.pop()
        if ready:
            ordered.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            open_nodes.append((node, True))
            open_nodes += [(made_by[x], False) for x in node.input if x in made_by]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(ordered)
    return copy


def answers(model: Any, names: Sequence[str], rows: Rows) -> list[list[np.ndarray]]:
    """The named tensors of an ONNX model for each row, computed node by node, without fusion."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    return [session.run(list(names), {n: x.numpy() for n, x in zip(inputs, row, strict=True)}) for row in rows]


def spoilt(expected: list[list[np.ndarray]], found: list[list[np.ndarray]]) -> float:
    """Noise to signal, summed over the tensors."""
    total = 0.0
    for pairs in zip(*(zip(a, b, strict=True) for a, b in zip(expected, found, strict=True)), strict=True):
        finite = [[np.nan_to_num(x.astype(np.float64), posinf=0.0, neginf=0.0) for x in pair] for pair in pairs]
        noise, signal = sum(np.square(a - b).sum() for a, b in finite), sum(np.square(a).sum() for a, _ in finite)
        total += float(noise) / max(float(signal), 1e-30)
    return total


def by_own_outputs(plain: Any, made: Any, rows: Rows) -> list[str]:
    """The quantised nodes' names, those first whose own outputs differ most; they inherit what earlier ones have spoilt."""
    import onnx

    there = {name for node in made.graph.node for name in node.output}
    wanted = {n.output[0]: n.name for n in plain.graph.node if n.op_type in QUANTISED and n.output[0] in there}
    for graph in (plain.graph, made.graph):
        known = {value.name for value in graph.output}
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known)
    noise = {}
    both = [answers(model, list(wanted), rows) for model in (plain, made)]
    for i, name in enumerate(wanted.values()):
        noise[name] = spoilt(*([[row[i]] for row in of_model] for of_model in both))
    return sorted(noise, key=noise.get, reverse=True)


# -- OpenVINO ------------------------------------------------------------------------------------------------------------


def quantise_openvino(source: Path, target: Path, rows: Rows, transformer: bool, keep: Sequence[str] = ()) -> None:
    """An OpenVINO model as an int8 one, by NNCF's post-training quantisation.

    Args:
        keep: names of the ONNX nodes it was made from that stay in fp32.

    Raises:
        PaperZooError: where NNCF is missing or gives up.
    """
    nncf, openvino = need_nncf()
    try:
        with silence():
            model = openvino.Core().read_model(str(source))
            data = nncf.Dataset(rows, lambda row: tuple(x.numpy() for x in row))
            options = kind(nncf, transformer) | {"subset_size": len(rows)}
            if keep:  # a node becomes one operation of its name, or several whose names begin with it
                patterns = [re.escape(name) + "(/.*)?$" for name in keep]
                options["ignored_scope"] = nncf.IgnoredScope(patterns=patterns, validate=False)
            openvino.save_model(nncf.quantize(model, data, **options), str(target), compress_to_fp16=False)
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
