"""Networks whose parts are called one by one: a cascade, two encoders, an encoder and the steps of a search.

A recipe names the methods in `engine_parts`; each has a program of its own, and is exported, compared, timed and installed
like a network. Their arguments may be nested, as a search's state is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from paperzoo.engine.deploy import Installed, install, owner_of, uninstall
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.stopwatch import Timing

WHOLE = ("forward",)
ROWS_A_CALL = 4  # of a part's call are kept: calls differ more than rows


class Part(nn.Module):
    """A method of a network as a network that takes its tensors in a row.

    Args:
        network: the network, in eval mode.
        name: of the method, with dots for one of a module inside it: "embed_image", "decoder.advance", "rnet.forward".
        structure: of the method's arguments, as `torch.utils._pytree` writes it.
    """

    def __init__(self, network: nn.Module, name: str, structure: str) -> None:
        super().__init__()
        self.network, self.name, self.structure = network, name, structure
        self.spec = treespec_loads(structure)

    def forward(self, *tensors: Tensor) -> Any:
        owner, method = owner_of(self.network, self.name)
        return getattr(owner, method)(*tree_unflatten(list(tensors), self.spec))


@dataclass
class Seen:
    """What a part was called with: the structure of its arguments that was the most frequent, rows of their tensors, an
    example of two rows, and how many calls there were.
    """

    structure: str
    rows: list[tuple[Tensor, ...]]
    example: tuple[Tensor, ...]
    calls: int


@dataclass
class Calls:
    """A method that notes what it is called with."""

    method: Callable
    count: int = 0
    rows: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    examples: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    often: Counter = field(default_factory=Counter)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten(args)
        if not kwargs and leaves and all(isinstance(x, Tensor) and x.ndim and len(x) == len(leaves[0]) for x in leaves):
            structure = treespec_dumps(spec)
            self.often[structure] += 1
            kept = [x.detach()[:ROWS_A_CALL].clone() for x in leaves]
            self.rows.setdefault(structure, []).extend(
                tuple(x[i : i + 1] for x in kept) for i in range(min(ROWS_A_CALL, len(leaves[0])))
            )
            two = torch.arange(2) % len(leaves[0]) if len(leaves[0]) else torch.zeros(0, dtype=torch.int64)
            self.examples.setdefault(structure, []).append(tuple(x[two] for x in kept))
        self.count += 1
        return self.method(*args, **kwargs)


def watched(recipe: Recipe, split: str, most: int) -> dict[str, Seen]:
    """The recipe evaluates a split, and its parts note what they are called with, up to `most` rows each.

    Parts that were not called, or never with tensors alone that all have the batch first, are left out.
    """
    network = recipe.deployed.eval()
    places = {name: owner_of(network, name) for name in recipe.engine_parts if has(network, name)}
    calls = {name: Calls(getattr(*place)) for name, place in places.items()}
    for name, (owner, method) in places.items():
        setattr(owner, method, calls[name])
    try:
        recipe.evaluate(split)
    finally:
        for owner, method in places.values():
            vars(owner).pop(method, None)
    found = {}
    for name, noted in calls.items():
        if noted.often:
            structure = noted.often.most_common(1)[0][0]
            rows, examples = noted.rows[structure], [e for e in noted.examples[structure] if len(e[0])]
            thinned = rows[:: max(1, -(-len(rows) // most))]
            if examples:
                found[name] = Seen(structure, thinned, examples[len(examples) // 2], noted.count)
    return found


def has(network: nn.Module, name: str) -> bool:
    """Whether a network has this part: some variants lack one."""
    try:
        owner, method = owner_of(network, name)
    except AttributeError:
        return False
    return hasattr(owner, method)


class Team:
    """The parts of a network, each on a bench of its own, as one: see `Bench` in `engine/optimize.py`.

    Times are those of all parts, each as often as evaluating calls it, for one call of the part that is called least.
    """

    def __init__(self, network: nn.Module, benches: dict[str, Any], calls: dict[str, int]) -> None:
        self.network, self.benches = network, benches
        fewest = min(calls.values())
        self.weights = {name: round(count / fewest) for name, count in calls.items()}
        self.built: dict[str, dict[str, Any]] = {}  # by candidate, then by part
        self.answered: float | None = None

    def build(self, engine: str, precision: str, ranges: str = "percentile") -> Any:
        """A candidate of one engine for all parts, or the reason of the first that it cannot take."""
        made = {}
        for name, bench in self.benches.items():
            made[name] = bench.build(engine, precision, ranges)
            if made[name].reason:
                return replace(made[name], reason=f"{name}: {made[name].reason}")
        whole = replace(
            next(iter(made.values())),
            artefact="parts",
            difference=max(c.difference for c in made.values()),
            bytes=sum(c.bytes for c in made.values()),
        )
        self.built[whole.name] = made
        return whole

    def runner(self, candidate: Any) -> dict[str, Any]:
        return {name: self.benches[name].runner(part) for name, part in self.built[candidate.name].items()}

    def install(self, runners: dict[str, Any]) -> list[Installed]:
        return [install(self.network, runner, self.benches[n].signature, n) for n, runner in runners.items()]

    def uninstall(self) -> None:
        for name in self.benches:
            uninstall(self.network, name)

    def time(self, candidates: Sequence[Any], eager: Any, threads: Sequence[int], rounds: int) -> None:
        """As a bench's, part by part, then together."""
        plain = {name: replace(eager) for name in self.benches}
        for name, bench in self.benches.items():
            bench.time([self.built[c.name][name] for c in candidates], plain[name], threads, rounds)
        eager.timing = self.together({name: c.timing for name, c in plain.items()}, {})
        for candidate in candidates:
            parts = {name: c.timing for name, c in self.built[candidate.name].items()}
            candidate.timing = self.together(parts, eager.timing.calls)

    def together(self, timings: dict[str, Timing], plain: dict[tuple[int, int], tuple]) -> Timing:
        """The weighted sum. `plain` is what the plain network takes; {} makes it the measure itself."""
        whole = Timing(peak_bytes=max(t.peak_bytes for t in timings.values()))
        for key in next(iter(timings.values())).calls:
            times = [[self.weights[name] * t.calls[key][i] for name, t in timings.items()] for i in range(3)]
            whole.calls[key] = tuple(map(sum, times))
            ratio = plain[key][1] / whole.calls[key][1] if plain else 1.0
            whole.ratios[key] = (ratio,) * 3
        return whole

    def write(self, candidate: Any, folder: Path) -> dict[str, Any]:
        """The programs in folders of their own, and their description."""
        described = {}
        for i, (name, part) in enumerate(self.built[candidate.name].items()):
            inside = folder / f"part{i}"
            inside.mkdir()
            described[name] = self.benches[name].write(part, inside)
            described[name]["artefact"] = f"{inside.name}/{part.artefact}"
        return {"artefact": "", "parts": described}
