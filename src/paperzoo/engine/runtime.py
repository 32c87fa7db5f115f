"""The runtime: what a recipe needs from the machine. Updates, randomness, sampling, communication; no module wrapper.

Two rules carry everything. Randomness and sampling are pure functions of (seed, stream, step, rank), so there is nothing
to save and resuming is exact. And a batch size is the size of the *global* batch, of which each rank takes its rows, so
one process and many see the same data in the same order.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from paperzoo.engine.distributed import GatherRows, GradientAverager, across_ranks
from paperzoo.errors import PaperZooError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(PaperZooError):
    """The loss became NaN or infinite."""


class Runtime:
    """See the module's docstring.

    Args:
        seed: every random number of a run follows from it.
        device: "cpu", "cuda", "cuda:1", "mps" or "auto" (the first accelerator that there is, else the CPU).
        precision: "fp32", or autocast with "bf16" or "fp16" (fp16 scales the loss).
        accumulate: batches whose gradients are averaged before an update; one recipe step takes them all.
        shard: networks are sharded with FSDP2 instead of replicated.
        channels_last: convolutional networks keep their tensors with the channels innermost: faster, rounded otherwise.
    """

    def __init__(
        self,
        seed: int = 0,
        device: str = "cpu",
        precision: str = "fp32",
        accumulate: int = 1,
        shard: bool = False,
        channels_last: bool = True,
    ) -> None:
        if precision not in PRECISIONS:
            raise PaperZooError(f"precision '{precision}' is not known; it is one of {', '.join(PRECISIONS)}")
        if accumulate < 1:
            raise PaperZooError(f"accumulate is {accumulate}; it must be 1 or more")
        self.device = find_device(device)
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        on = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if on else (0, 1)
        self.seed, self.precision, self.accumulate, self.shard_networks = seed, precision, accumulate, shard
        self.channels_last = channels_last
        self.step = 0
        self.micro = 0  # which of the accumulated batches, 0 … accumulate - 1
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None
        self.broken: dict[str, str] = {}  # files that could not be read: path -> problem
        self.last_indices: dict[str, list[int]] = {}  # stream -> rows of the latest batch, for error messages
        self._averagers: dict[int, GradientAverager] = {}
        self._scaled: list[torch.optim.Optimizer] = []

    # -- randomness and sampling ---------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The number of the batch, counted from the start of the run."""
        return self.step * self.accumulate + self.micro

    def key(self, *parts: object) -> int:
        """A 63-bit number from the seed and `parts`, the same on every machine."""
        text = "/".join(map(str, (self.seed, *parts))).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    def rng(self, stream: str, per_rank: bool = True) -> torch.Generator:
        """A CPU generator for this step: a pure function of (seed, stream, step, and the rank if `per_rank`)."""
        return torch.Generator().manual_seed(self.key(stream, self.position, self.rank if per_rank else "all"))

    def indices(self, n: int, batch_size: int, stream: str = "data") -> Tensor:
        """This rank's rows of the step's global batch: int64 (batch_size / world,), each epoch shuffled anew.

        Epochs follow each other without a gap: a batch may end one and begin the next, so every row is used equally
        often and a set smaller than the batch is legal.
        """
        return self.indices_at(self.position, n, batch_size, stream)

    def indices_at(self, position: int, n: int, batch_size: int, stream: str = "data") -> Tensor:
        """`indices` of the batch with this number."""
        if n < 1:
            raise PaperZooError(f"the data stream '{stream}' is empty; at least one sample is needed")
        share = self.share(batch_size)
        places = torch.arange(share) + position * batch_size + self.rank * share
        rows = torch.empty(share, dtype=torch.int64)
        epochs = places // n
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = self._permutation(stream, n, epoch)[places[here] - epoch * n]
        return rows

    def _permutation(self, stream: str, n: int, epoch: int) -> Tensor:
        kept = self.__dict__.setdefault("_permutations", {})
        name = (stream, n, epoch)
        if name not in kept:
            for old in [k for k in kept if k[:2] == name[:2] and k[2] < epoch - 1]:
                del kept[old]
            kept[name] = torch.randperm(n, generator=torch.Generator().manual_seed(self.key("order", stream, epoch)))
        return kept[name]

    def share(self, batch_size: int) -> int:
        """How many of a global batch's rows are this rank's."""
        if batch_size % self.world:
            raise PaperZooError(
                f"batch_size {batch_size} is the global batch; it must be a multiple of {self.world} processes"
            )
        return batch_size // self.world

    def shard(self, rows: Tensor) -> Tensor:
        """This rank's rows of a tensor that was made, equally on every rank, for the global batch."""
        share = self.share(len(rows))
        return rows[self.rank * share : (self.rank + 1) * share]

    def begin(self, micro: int = 0) -> None:
        """Called by the loop before each batch: seeds the global generators from (seed, step, rank)."""
        self.micro = micro
        seed_globals(self.key("step", self.position, self.rank))
        if self.device.type == "cuda":
            torch.cuda.manual_seed(self.key("step", self.position, self.rank))

    def batches(
        self, dataset: Any, batch_size: int, stream: str = "data", workers: int = 0, collate: Callable | None = None
    ):
        """An endless source of batches: `.next()` is the collated batch of this step, on the device."""
        from paperzoo.engine.feeding import Batches

        return Batches(self, dataset, batch_size, stream, workers, collate)

    def loader(self, dataset: Any, batch_size: int, workers: int = 0, collate: Callable | None = None):
        """This rank's part of an evaluation set, in order: an iterable of collated batches on the device."""
        from paperzoo.engine.feeding import Loader

        return Loader(self, dataset, batch_size, workers, collate)

    # -- optimisation --------------------------------------------------------------------------------------------

    def autocast(self):
        """The context in which the loop calls `step`, `evaluate` and `predict`."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Tensor,
        clip: float | None = None,
        retain_graph: bool = False,
        average: bool = True,
    ) -> None:
        """One update of one optimizer: zero_grad, backward, average over ranks, unscale, clip to norm `clip`, step.

        Gradients reach only this optimizer's parameters, so a loss that runs through another network leaves nothing
        behind there. With accumulation the update happens on the last of the accumulated batches. `average=False` is for
        parameters that are other ones on every rank.

        Raises:
            NonFiniteLoss: if the loss is NaN or infinite; nothing was changed then.
        """
        if not bool(torch.isfinite(loss.detach()).all()):
            raise NonFiniteLoss(f"the loss is {float(loss.detach().float().mean())} at step {self.step}")
        parameters = trainable(optimizer)
        last = self.micro == self.accumulate - 1
        if self.micro == 0:
            optimizer.zero_grad(set_to_none=True)
        if self.accumulate > 1:
            loss = loss / self.accumulate
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        with torch.autocast(self.device.type, enabled=False):
            if self.shard_networks and self.world > 1:  # FSDP2 averages; its hooks need an unrestricted backward
                loss.backward(retain_graph=retain_graph)
            else:
                with self._averager(optimizer, parameters).during_backward(active=last and average):
                    loss.backward(inputs=parameters, retain_graph=retain_graph)
            if not last:
                return
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
                self._scaled.append(optimizer)

    def minimise(self, optimizer: torch.optim.Optimizer, loss_fn: Callable[[], Tensor]) -> Tensor:
        """One step of a closure optimizer (L-BFGS). Returns the loss averaged over ranks, before the step.

        The closure returns the averaged loss to the optimizer as well, so that every rank's line search takes the same
        decisions. Runs in full precision.
        """
        if self.accumulate > 1:
            raise PaperZooError("accumulate must be 1 with a closure optimizer: its line search needs the whole batch")
        parameters = trainable(optimizer)

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn()
            with self._averager(optimizer, parameters).during_backward(active=True):
                loss.backward(inputs=parameters)
            return self.mean(loss)

        with torch.autocast(self.device.type, enabled=False):
            loss = optimizer.step(closure)
        if not bool(torch.isfinite(torch.as_tensor(loss)).all()):
            raise NonFiniteLoss(f"the loss is {float(loss)} at step {self.step}")
        return torch.as_tensor(loss).detach()

    def finish(self) -> None:
        """Called by the loop when a recipe step is complete: the loss scale is adapted once a step."""
        if self._scaled:
            self.scaler.update()
            self._scaled.clear()
        self.step += 1
        self.micro = 0

    def _averager(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> GradientAverager:
        kept = self._averagers.get(id(optimizer))
        if kept is None or not kept.covers(parameters):
            kept = self._averagers[id(optimizer)] = GradientAverager(parameters, self.world)
        return kept

    # -- communication and placement -----------------------------------------------------------------------------

    def mean(self, value: Tensor | float) -> Tensor:
        """The average over ranks, without gradient; the same tensor on every rank."""
        value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32).detach()
        if self.world == 1:
            return value
        value = value.to(self.device, copy=True).contiguous()
        dist.all_reduce(value)
        return value / self.world

    def gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows (B, …) -> (world * B, …), in rank order. Gradients flow back to every rank's own rows."""
        return rows if self.world == 1 else GatherRows.apply(rows, self.rank, self.world)

    def gather_objects(self, values: list) -> list:
        """All ranks' lists joined, in rank order; whatever can be pickled, and as many of it on each rank as there are."""
        if self.world == 1:
            return values
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, values)
        return [value for part in every for value in part]

    def place(self, module: nn.Module) -> nn.Module:
        """A network made ready: on the device, channels-last where it has 2-D convolutions, batch norm over all ranks."""
        if self.world > 1:
            module = across_ranks(module, self.device)
        if self.channels_last and not self.shard_networks:  # FSDP2 takes contiguous parameters only
            channels_last(module)
        return module.to(self.device)

    def to_device(self, value: Any) -> Any:
        """Every tensor in a nested structure, moved to the device."""
        return move(value, self.device)

    def state_dict(self) -> dict:
        return {"step": self.step, "scaler": None if self.scaler is None else self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.micro = int(state["step"]), 0
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


def trainable(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def channels_last(module: nn.Module) -> nn.Module:
    """A network whose 2-D convolutions keep their kernels with the channels innermost; activations follow them.

    One whose class says `channels_last = False` is measured to be slower so, and is left as it is.
    """
    if not getattr(module, "channels_last", True):
        return module
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            part.to(memory_format=torch.channels_last)
    return module


def seed_globals(key: int) -> None:
    """Seed the global generators of torch (CPU), numpy and random."""
    torch.default_generator.manual_seed(key)  # torch.manual_seed would record a stack trace for a GPU that is not there
    numpy.random.seed(key % 2**32)
    random.seed(key)


def move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: move(v, device) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(v, device) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(move(v, device) for v in value)
    return value


def find_device(name: str) -> torch.device:
    """The torch device for a name; "auto" takes the accelerator if there is one.

    Raises:
        PaperZooError: if the name is unknown or this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PaperZooError(f"device '{name}' is not known; it is auto, cpu, cuda, cuda:<number> or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise PaperZooError(f"device '{name}' was asked for, but torch sees no CUDA GPU here; use --device cpu")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise PaperZooError(f"device '{name}': there are only {torch.cuda.device_count()} GPUs, counted from 0")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return device
