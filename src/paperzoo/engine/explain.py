"""Why a network cannot be exported: the operator and the line of the paper's code, from what torch's exporters raise."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

import paperzoo

HOME = Path(paperzoo.__file__).parent
LIBRARIES = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib", "stdlib"))


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, the cause last."""
    while error is not None:
        yield error
        error = error.__cause__


def first_line(error: BaseException) -> str:
    """What the innermost cause of an error says first."""
    *_, cause = chain(error)
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)[:200]


def explain(error: BaseException) -> str:
    """One line: the operator and the line of code that cannot be exported, and why."""
    for cause in reversed(list(chain(error))):
        named = by_type(cause)
        if named:
            return named
    node = failing_node(error)
    if node is None:
        return f"{first_line(error)}{at_line(error)}"
    if node.op == "output":
        return "it gives more than tensors"
    operator, place = f"the operator {name_of(node.target)}", at_stack(node.meta.get("stack_trace"))
    if "No ONNX function found" in "".join(map(str, chain(error))):
        return f"{operator}{place} has no ONNX counterpart"
    return f"{operator}{place} cannot be written as ONNX: {first_line(error)}"


def by_type(error: BaseException) -> str:
    """The errors of `torch.export` that say by their type what is wrong; "" for another."""
    kind = type(error).__name__
    if kind == "GuardOnDataDependentSymNode":
        return f"its way depends on the values of a tensor (aten::_local_scalar_dense){at_line(error)}; use torch.where or the like"
    if kind in ("DataDependentOutputException", "DynamicOutputShapeException", "UnsupportedOperatorException"):
        why = "cannot be traced" if kind.startswith("Unsupported") else "gives what depends on the values of a tensor"
        return f"the operator {name_of(error.func)}{at_line(error)} {why}"
    constant = re.search(r"(\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error))
    constant = constant or re.search(r"(\S+) .*was inferred to be a constant \((\d+)\)", str(error))
    if constant:
        what = "the batch" if constant[1] == "batch" else "a size"
        return f"{what} is the constant {constant[2]} in it{at_stack(constant_line(error, constant[2]))}"
    return ""


def name_of(operator: object) -> str:
    """ "aten::unique2" of an operator or one of its overloads."""
    schema = getattr(operator, "_schema", None)
    return schema.name if schema is not None else str(operator)


def failing_node(error: BaseException) -> torch.fx.Node | None:
    """The node of the graph at which an exporter stopped, the innermost one: it is named in the exporter's frames."""
    found = None
    for cause in chain(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node) and "onnx" in frame.f_code.co_filename:
                found = node
    return found


def constant_line(error: BaseException, value: str) -> str | None:
    """Where a size became a constant, as a line of a stack; None where torch did not note it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        environment = getattr(frame.f_locals.get("fake_mode"), "shape_env", None)
        for guard in getattr(environment, "guards", None) or ():
            place = guard.sloc.framework_loc
            if re.fullmatch(rf"Eq\(\w+, {value}\)", str(guard.expr)) and isinstance(place, traceback.FrameSummary):
                return f'File "{place.filename}", line {place.lineno}'
    return None


# -- lines of code -----------------------------------------------------------------------------------------------------


def ours(file: str) -> bool:
    """Whether a file is a paper's, a block's or a user's, and not a library's or the engine's."""
    path = str(Path(file).resolve())
    return not (file.startswith("<") or path.startswith((*LIBRARIES, str(HOME / "engine"))))


def short(file: str, line: int) -> str:
    """ "segmentation/fcn/model.py line 33", "blocks/boxes.py line 12"; of other files the last two parts."""
    path = Path(file)
    if path.is_relative_to(HOME):
        parts = path.relative_to(HOME).parts
        return f"{'/'.join(parts[1:] if parts[0] == 'papers' else parts)} line {line}"
    return f"{'/'.join(path.parts[-2:])} line {line}"


def at_line(error: BaseException) -> str:
    """ " (paper/file.py line N)": the innermost line of a paper's or a user's own code that an error went through."""
    for cause in reversed(list(chain(error))):
        frames = [(f.f_code.co_filename, n) for f, n in traceback.walk_tb(cause.__traceback__)]
        mine = [place for place in frames if ours(place[0])]
        if mine:
            return f" ({short(*mine[-1])})"
    return ""


def at_stack(stack: str | None) -> str:
    """The same of a stack that is text."""
    places = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', stack or "")]
    mine = [place for place in places if ours(place[0])]
    return f" ({short(*mine[-1])})" if mine else ""
