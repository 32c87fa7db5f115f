"""Networks as `torch.export` programs whose batch may differ, and sizes of their inputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paperzoo.engine.explain import at_stack
from paperzoo.engine.sizes import shapes
from paperzoo.errors import PaperZooError

READABLE = 40  # characters of a rule about sizes

# operators of a tensor and a number, as torch.export writes them
ARITHMETIC = {
    f"aten::{name}.{overload}"
    for name in ("add", "sub", "rsub", "mul", "div", "remainder", "fmod", "eq", "ne", "lt", "le", "gt", "ge")
    for overload in ("Tensor", "Scalar")
}


def to_program(
    network: nn.Module, inputs: tuple, axes: Sequence[Sequence[int]] | None = None
) -> torch.export.ExportedProgram:
    """The network as a program whose first dimension of every input is the batch and may differ; `axes` of each input, too."""
    batch, axes = torch.export.Dim("batch", min=1), axes or [()] * len(inputs)
    dynamic = tuple(
        {0: batch} | dict.fromkeys(more, torch.export.Dim.DYNAMIC) if isinstance(x, Tensor) and x.ndim else None
        for x, more in zip(inputs, axes, strict=True)
    )
    kinds = [p.kind for p in inspect.signature(network.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # they are one argument then
        dynamic = (dynamic,)
    with torch.no_grad(), plain_sizes(network) if any(axes) else contextlib.nullcontext():
        return torch.export.export(network, inputs, dynamic_shapes=dynamic, strict=False)


@contextlib.contextmanager
def plain_sizes(network: nn.Module) -> Iterator[None]:
    """Tracing stops in the module where a size becomes a constant, or a quotient of sizes.

    From a quotient on it takes minutes, and ends in a graph for one size.
    """
    environments: list[Any] = []

    def begin(module: nn.Module, inputs: Any) -> None:
        sizes = [size for x in tree_leaves(inputs) if isinstance(x, Tensor) for size in x.shape]
        environments[:] = [size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)][:1]

    def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
        name = type(module).__name__
        constants = [v for e in environments for v in e.replacements.values() if v.is_Integer]
        if constants:
            raise PaperZooError(f"a size is the constant {constants[0]} in {name}")
        for tensor in (x for x in tree_leaves(outputs) if isinstance(x, Tensor)):
            for size in tensor.shape:
                if isinstance(size, torch.SymInt) and any(divided_by_size(part) for part in parts(size.node.expr)):
                    raise PaperZooError(f"a size becomes a quotient of sizes in {name}")

    hooks = [module.register_forward_hook(look) for module in network.modules()]
    hooks.append(network.register_forward_pre_hook(begin))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parts(expression: Any) -> Iterator[Any]:
    """An expression and all that it is made of."""
    import sympy

    return sympy.preorder_traversal(expression)


def divided_by_size(expression: Any) -> bool:
    return type(expression).__name__ == "FloorDiv" and bool(expression.args[1].free_symbols)


def broken_rule(program: torch.export.ExportedProgram, examples: Sequence[tuple[Tensor, ...]]) -> str:
    """Why a program is not valid for all of these inputs; "" where nothing says so.

    While it was traced, Python compared sizes. What was equal became a rule, and where that does not hold the program is
    another network than the one that was traced. Comparisons of "less" are no such rules: most are about memory.
    """
    import sympy

    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    rules, names = guards(inputs), {}
    for node, x in zip(inputs, examples[0], strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                name = {2: "height", 3: "width"}.get(axis, "length") if x.ndim == 4 else "length"
                names.setdefault(size.node.expr, "batch" if axis == 0 else name)
    for example in examples:
        values = {
            size.node.expr: sympy.Integer(x.shape[axis])
            for node, x in zip(inputs, example, strict=True)
            for axis, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt)
        }
        for rule in rules:
            held = rule.expr.xreplace(values)
            if isinstance(rule.expr, sympy.Eq) and not held.free_symbols and not bool(held):
                place = rule.sloc.framework_loc
                line = at_stack(f'File "{place.filename}", line {place.lineno}') if hasattr(place, "filename") else ""
                named = rule.expr.xreplace({symbol: sympy.Symbol(name) for symbol, name in names.items()})
                left, right = map(str, named.args)
                if len(left) + len(right) > READABLE:
                    return f"its graph holds only for some sizes, and not for {shapes(example)}{line}"
                return f"its graph holds only where {left} is {right}{line}"
    return ""


def guards(inputs: Sequence[torch.fx.Node]) -> list[Any]:
    """What was found to be so about sizes while the program of these inputs was traced."""
    for node in inputs:
        environment = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if environment is not None:
            return list(environment.guards)
    return []


def numbers_as_tensors(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program, in place, in which sizes that tensors are added to, multiplied by and so on are tensors themselves.

    The ONNX exporter's functions for a tensor and a number take constants alone.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        first, second = (*node.args, None, None)[:2]
        if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(second, torch.fx.Node):
            continue
        packet, value = node.target.overloadpacket, second.meta.get("val")
        if node.target.name() in ARITHMETIC and isinstance(value, torch.SymInt | torch.SymFloat):
            with graph.inserting_before(node):
                number = 1.0 if isinstance(value, torch.SymFloat) else 1
                options = {"dtype": torch.result_type(first.meta["val"], number)}
                tensor = graph.call_function(torch.ops.aten.scalar_tensor.default, (second,), options)
            node.target, node.args = packet.Tensor, (first, tensor, *node.args[2:])
    return program
