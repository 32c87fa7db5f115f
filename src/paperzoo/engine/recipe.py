"""The recipe: one paper's way to learn and to be used. The unit is the step, whatever a step is to the paper."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from paperzoo.errors import PaperZooError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from paperzoo.engine.runtime import Runtime


class Recipe:
    """What every paper's recipe shares. A subclass builds networks, optimizers and data in `__init__`.

    Conventions that the engine relies on:

    - `self.model` is the network that is saved, exported and benchmarked; `self.average`, if there is one, is its
      running average (`torch.optim.swa_utils.AveragedModel`) and is what is deployed;
    - everything reachable from `self` that has a `state_dict` is checkpointed, nested recipes included; state that
      changes while training lives nowhere else;
    - `self.facts` is a dict of plain JSON values learned from the data that predicting needs (labels, vocabulary,
      normalisation). It is saved beside the weights and handed back on loading, so that no data set is opened then.
    """

    monitor: ClassVar[tuple[str, str]] = ("accuracy", "max")
    """The metric of `evaluate` that early stopping and "best" watch, and whether more ("max") or less ("min") is better."""

    reads_images: ClassVar[bool] = False
    """Whether `predict` takes pictures (paths, PIL images, arrays): folders, videos and cameras are then read for it."""

    any_size: ClassVar[bool] = True
    """Whether an export may take other sizes of its inputs (height and width, a sequence's length) where the network does."""

    engine_parts: ClassVar[tuple[str, ...]] = ("forward",)
    """The deployed network's methods that predicting calls, named with dots; an engine answers each. () where predicting calls none."""

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        self.config = config
        self.runtime = runtime
        self.facts: dict = facts if facts is not None else {}

    model: nn.Module

    def batch(self) -> Any:
        """The data of `runtime.step`, a pure function of it; None where there is no data."""
        return None

    def step(self, batch: Any) -> dict:
        """Learn from one batch.

        Returns {"loss": loss, …}: the engine then updates `self.optimizer` (clipping at `config.clip`), advances
        `self.scheduler` and `self.average` where they exist. Or calls `runtime.update` itself and returns what is to be
        logged, detached, without a loss that requires a gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what a step is")

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Metrics over the whole split, by the protocol that the card names."""
        return {}

    def predict(self, inputs: list) -> list:
        """From what a user has (paths, arrays, strings, rows) to the task's typed results, one for each input."""
        raise PaperZooError(f"{type(self).__name__} has nothing to predict")

    def samples(self, folder: Path) -> list:
        """A few held-out inputs that `predict` takes, as a user would have them; files are written to `folder`."""
        return []

    def example(self) -> tuple:
        """Example inputs of the deployed network, batch of two first, for export, benchmarks and tests."""
        raise PaperZooError(f"{type(self).__name__} has no network to call")

    def same_answers(self, expected: Any, found: Any) -> Tensor | None:
        """Which answers in two outputs of the deployed network are the same, a bool each: classes, labels, bits.

        For telling what a faster, less exact program of the network costs. None where answers are numbers without a decision.
        """
        return None

    def browser(self) -> dict | None:
        """How a web page runs the trained network, as plain JSON values; None where it cannot.

        {"input": …, "output": …, "samples": […], "learned_from": {"en", "zh"}, "limits": {"en", "zh"}}. The kinds of
        input and output that a page knows are listed in `web/src/try/types.ts`.
        """
        return None

    def browser_network(self) -> tuple[nn.Module, tuple]:
        """The network that the page runs, from what the page has to what it shows; and an example of its inputs, a batch of one."""
        return self.deployed, tuple(x[:1] for x in self.example())

    def figures(self) -> dict[str, Image.Image]:
        """Pictures for the report, by title."""
        return {}

    def draw(self, value: Any, result: Any) -> Image.Image | None:
        """One input with its result as a picture; None where there is nothing to see."""
        return None

    @property
    def deployed(self) -> nn.Module:
        """The network a user takes away: the running average where there is one."""
        average = getattr(self, "average", None)
        return self.model if average is None else average.module

    def stateful(self) -> dict[str, Any]:
        """Everything that a checkpoint holds: path -> object with a `state_dict`, each object once."""
        return dict(_walk(self, "", set()))


def running_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """The exponential running average of a network, buffers included, for `self.average`; None without a decay."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _walk(owner: Recipe, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    for name, value in vars(owner).items():
        if name not in ("runtime", "config", "facts"):
            yield from _parts(value, prefix + name, seen)


def _parts(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen:
        return
    if isinstance(value, Recipe):
        seen.add(id(value))
        yield from _walk(value, path + ".", seen)
    elif hasattr(value, "state_dict") and not isinstance(value, type):
        if isinstance(value, nn.Module) and next(chain(value.parameters(), value.buffers()), None) is None:
            return  # a transform or a loss: nothing to keep
        seen.add(id(value))
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _parts(item, f"{path}.{key}", seen)
    elif isinstance(value, list | tuple) and len(value) <= 64:
        for i, item in enumerate(value):
            yield from _parts(item, f"{path}.{i}", seen)
