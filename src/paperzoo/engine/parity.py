"""Same weights in, same numbers out: what a paper's `parity.py` yields, and how two outputs are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Case:
    """One comparison. `ours(*inputs)` and `reference(*inputs)` must agree within `rtol`/`atol`.

    Outputs are tensors, numbers, arrays or nested tuples, lists, dicts and dataclasses of them. With `gradients=True`
    the gradients of the summed squared outputs are compared as well: with respect to every floating-point input, and,
    where both sides are modules, to every parameter name they share.
    `against` names the independent implementation with its version, or the equation or slow version that was used.
    """

    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple = ()
    against: str = ""
    gradients: bool = False
    rtol: float = 1e-4
    atol: float = 1e-5
    note: str = ""


@dataclass
class Outcome:
    """What a case showed. `largest` is the largest absolute difference over everything that was compared."""

    name: str
    against: str
    passed: bool
    largest: float
    note: str = ""
    problems: list[str] = field(default_factory=list)


def leaves(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested structure, with its path; numbers become float64 tensors."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, bool | int | float):
        yield path, torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from leaves(value[key], f"{path}.{key}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from leaves({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, path)
    elif isinstance(value, str) or value is None:
        return
    elif isinstance(value, Sequence):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, torch.as_tensor(value)


def compare(case: Case) -> Outcome:
    """Run both sides of a case and compare outputs and, where asked, gradients."""
    outcome = Outcome(case.name, case.against, passed=True, largest=0.0, note=case.note)
    ours, our_gradients = _evaluate(case.ours, case.inputs, case.gradients)
    theirs, their_gradients = _evaluate(case.reference, case.inputs, case.gradients)
    _agree(ours, theirs, case, outcome)
    if case.gradients:
        shared = our_gradients.keys() & their_gradients.keys()
        if not shared:
            outcome.problems.append(
                "gradients were asked for, but the two sides share no input or parameter that has one"
            )
        _agree({k: our_gradients[k] for k in shared}, {k: their_gradients[k] for k in shared}, case, outcome)
    outcome.passed = not outcome.problems
    return outcome


def _evaluate(function: Callable, inputs: tuple, gradients: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if not gradients:
        with torch.no_grad() if isinstance(function, nn.Module) else torch.enable_grad():
            return {k: v.detach() for k, v in leaves(function(*inputs))}, {}
    fresh = tuple(
        x.detach().clone().requires_grad_(True) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    )
    wanted = {f"input {i}": x for i, x in enumerate(fresh) if isinstance(x, Tensor) and x.requires_grad}
    if isinstance(function, nn.Module):
        wanted |= {f"parameter {n}": p for n, p in function.named_parameters() if p.requires_grad}
    outputs = dict(leaves(function(*fresh)))
    total = sum(v.double().square().sum() for v in outputs.values() if v.requires_grad)
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    pairs = zip(wanted, found, strict=True)
    return {k: v.detach() for k, v in outputs.items()}, {f"gradient of {k}": g for k, g in pairs if g is not None}


def _agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], case: Case, outcome: Outcome) -> None:
    if ours.keys() != theirs.keys():
        difference = sorted(ours.keys() ^ theirs.keys())[:4]
        outcome.problems.append(f"the outputs have different parts: {', '.join(difference)}")
        return
    if not ours:
        outcome.problems.append("nothing to compare: the outputs hold no tensor and no number")
    for path, a in ours.items():
        b = theirs[path]
        if a.shape != b.shape:
            outcome.problems.append(f"{path}: shape {tuple(a.shape)} against {tuple(b.shape)}")
            continue
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        a, b = a.to("cpu", wide), b.to("cpu", wide)
        if not a.numel():
            continue
        if not torch.equal(torch.isnan(a.abs()), torch.isnan(b.abs())):
            outcome.problems.append(f"{path}: NaN on one side only")
            continue
        distance = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0)
        outcome.largest = max(outcome.largest, float(distance.max()))
        if bool((distance > case.atol + case.rtol * b.abs().nan_to_num(0.0, posinf=0.0)).any()):
            outcome.problems.append(f"{path}: differs by up to {float(distance.max()):.3g}")


@dataclass
class Pair:
    """Ours and a reference for `paperzoo bench`: what makes each, and the inputs for a batch size.

    `loss` makes a scalar of a network's output for the training step; `mode` is called with the network before training
    (for example `torch.nn.Module.train`).
    """

    ours: Callable[[], nn.Module]
    reference: Callable[[], nn.Module]
    inputs: Callable[[int], tuple]
    against: str
    loss: Callable[[Any], Tensor] = lambda output: sum(
        v.float().square().mean() for _, v in leaves(output) if v.is_floating_point()
    )
    train_batch: int = 8
