"""Several processes: gradients averaged with overlap, rows gathered with gradient, batch norm across ranks, FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paperzoo.errors import PaperZooError

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel: big enough to be efficient, small enough to start early


class GradientAverager:
    """Averages the gradients of one optimizer's parameters over ranks, while the backward pass still runs.

    Parameters are grouped into buckets from the last to the first, the order in which gradients arrive. A bucket's
    all-reduce starts as soon as all of its gradients are there; what is left starts at the end of the backward pass. Buckets
    start strictly in order, so all ranks issue the same collectives even if their graphs differ. Parameters without a
    gradient on this rank count as zero; those without one on any rank keep none, as on one process.
    """

    def __init__(self, parameters: list[Tensor], world: int) -> None:
        self.parameters, self.world = parameters, world
        self.buckets: list[list[Tensor]] = []
        if world == 1:
            return
        size, last = 0, None
        for p in reversed(parameters):
            if not self.buckets or size > BUCKET_BYTES or (p.dtype, p.device) != last:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size, last = size + p.numel() * p.element_size(), (p.dtype, p.device)
        self.home = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket}

    def covers(self, parameters: list[Tensor]) -> bool:
        return len(parameters) == len(self.parameters) and all(
            a is b for a, b in zip(parameters, self.parameters, strict=True)
        )

    @contextmanager
    def during_backward(self, active: bool) -> Iterator[None]:
        """Wrap the backward pass whose gradients are to be averaged; does nothing when not `active` or alone."""
        if self.world == 1 or not active:
            yield
            return
        missing = [len(bucket) for bucket in self.buckets]
        started: list[tuple[Tensor, Any]] = []

        def start() -> None:
            bucket = self.buckets[len(started)]
            parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket]
            there = parts[0].new_tensor([p.grad is not None for p in bucket])  # on how many ranks, once summed
            flat = torch.cat([*parts, there])
            started.append((flat, dist.all_reduce(flat, async_op=True)))

        def arrived(p: Tensor) -> None:
            missing[self.home[id(p)]] -= 1
            while len(started) < len(missing) and missing[len(started)] <= 0:
                start()

        hooks = [p.register_post_accumulate_grad_hook(arrived) for p in self.parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        while len(started) < len(self.buckets):
            start()
        for bucket, (flat, work) in zip(self.buckets, started, strict=True):
            work.wait()
            *parts, there = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for p, part, ranks in zip(bucket, parts, there.tolist(), strict=True):
                p.grad = part.view_as(p) / self.world if ranks else None


class GatherRows(torch.autograd.Function):
    """All ranks' rows, in rank order; in the backward pass each rank receives the sum of all ranks' gradients for its rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank, ctx.count = rank, len(rows)
        parts = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count], None, None


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class BatchNormAcrossRanks(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the global batch on devices where `torch.nn.SyncBatchNorm` does not run (the CPU).

    The same parameters, buffers and names as the layer it replaces. (B, C, …) -> (B, C, …).
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch norm wants (B, C, …), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1]
        totals = SumOverRanks.apply(torch.cat([x.sum(axes), x.new_full((1,), float(count))]))
        mean, n = totals[:-1] / totals[-1], totals[-1]
        # the second pass around the common mean keeps the variance accurate where the mean is large
        variance = SumOverRanks.apply((x - mean.view(shape)).square().sum(axes)) / n
        if self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var.dtype), momentum)
        normal = (x - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        return normal if self.weight is None else normal * self.weight.view(shape) + self.bias.view(shape)


def across_ranks(module: nn.Module, device: torch.device) -> nn.Module:
    """Batch norm layers replaced by ones that see the global batch; parameters and buffers are kept."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in list(module.named_children()):
        setattr(module, name, across_ranks(child, device))
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return module
    new = BatchNormAcrossRanks(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )
    new.weight, new.bias = module.weight, module.bias
    new.running_mean, new.running_var = module.running_mean, module.running_var
    new.num_batches_tracked = module.num_batches_tracked
    return new.train(module.training)


SHARD_PARAMETERS = 1_000_000  # children of lists and sequences above this size are gathered one at a time


def shard_recipe(recipe: Any) -> None:
    """Shard every network on a recipe with FSDP2, and point its optimizers at the sharded parameters.

    Raises:
        PaperZooError: with several optimizers and accumulation, where stray gradients could not be told apart.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.optim.swa_utils import AveragedModel

    parts = recipe.stateful()
    networks = [v for v in parts.values() if isinstance(v, nn.Module) and any(True for _ in v.parameters())]
    optimizers = [v for v in parts.values() if isinstance(v, torch.optim.Optimizer)]
    if len(optimizers) > 1 and recipe.runtime.accumulate > 1:
        raise PaperZooError("--shard with several optimizers needs --accumulate 1; raise batch_size instead")
    owner = {id(p): (net, name) for net in networks for name, p in net.named_parameters()}
    homes = [[[owner[id(p)] for p in g["params"]] for g in o.param_groups] for o in optimizers]
    mesh = init_device_mesh(recipe.runtime.device.type, (recipe.runtime.world,))
    for network in networks:
        for child in network.modules():
            if isinstance(child, nn.ModuleList | nn.Sequential):
                for block in child:
                    if sum(p.numel() for p in block.parameters()) >= SHARD_PARAMETERS:
                        fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        add_entrances(network)
        if (
            isinstance(network, AveragedModel) and network.multi_avg_fn is not None
        ):  # it mixes sharded and whole in a list
            network.avg_fn, network.multi_avg_fn = one_by_one(network.multi_avg_fn), None
    for optimizer, groups in zip(optimizers, homes, strict=True):
        for group, members in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [dict(net.named_parameters())[name] for net, name in members]


def add_entrances(network: nn.Module) -> None:
    """Make the methods that recipes call beside `forward` gather a sharded network; within `forward` they stay plain."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    inside = [0]
    network.register_forward_pre_hook(lambda *_: inside.__setitem__(0, inside[0] + 1), prepend=True)
    network.register_forward_hook(lambda *_: inside.__setitem__(0, inside[0] - 1), always_call=True)
    for name in ("embed", "stages", "forward_features", "encode", "decode"):
        plain = getattr(network, name, None)
        if not callable(plain):
            continue
        register_fsdp_forward_method(network, name)
        gathering = getattr(network, name)

        def entrance(*inputs: Any, plain: Any = plain, gathering: Any = gathering) -> Any:
            if inside[0]:
                return plain(*inputs)
            inside[0] += 1
            try:
                return gathering(*inputs)
            finally:
                inside[0] -= 1

        setattr(network, name, entrance)


def one_by_one(average_lists: Any) -> Any:
    """An averaging function of single tensors from one of lists."""

    def average(mean: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
        result = [mean.detach().clone()]
        average_lists(result, [value], count)
        return result[0]

    return average


def reshard(recipe: Any) -> None:
    """Return every FSDP2 network to its sharded state: one that had no backward pass is still whole."""
    for value in recipe.stateful().values():
        if isinstance(value, nn.Module):
            for child in value.modules():
                if hasattr(child, "reshard"):
                    child.reshard()


def whole(value: Any) -> Any:
    """Sharded tensors in a nested structure made whole. A collective: every rank calls it."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor()
    if isinstance(value, dict):
        return type(value)((k, whole(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value)(whole(v) for v in value)
    return value


def load_whole(target: Any, state: dict) -> None:
    """`target.load_state_dict(state)` where `state` is whole and the target may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def like(tensor: Any, pattern: Any) -> Any:
        if isinstance(pattern, DTensor) and isinstance(tensor, Tensor) and tensor.shape == pattern.shape:
            return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
        return tensor

    if isinstance(target, nn.Module):
        here = target.state_dict()
        state = {k: like(v, here.get(k)) for k, v in state.items()}
    elif isinstance(target, torch.optim.Optimizer):
        parameters = [p for g in target.param_groups for p in g["params"]]
        order = [i for g in state["param_groups"] for i in g["params"]]
        homes = dict(zip(order, parameters, strict=True))
        moments = {i: {k: like(v, homes.get(i)) for k, v in s.items()} for i, s in state["state"].items()}
        state = {"state": moments, "param_groups": state["param_groups"]}
    target.load_state_dict(state)
