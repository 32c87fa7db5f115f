"""Run by torchrun: a face head with its classes spread over the ranks, and what rank 0 saw of it, as tensors in a file."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

CLASSES, SIZE, BATCH = 11, 6, 8


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings and labels of the global batch, and all centres."""
    rng = torch.Generator().manual_seed(5)
    labels = torch.tensor([0, 10, 3, 3, 5, 6, 9, 1])
    return torch.randn(BATCH, SIZE, generator=rng), labels, torch.randn(CLASSES, SIZE, generator=rng)


def heads() -> dict[str, torch.Tensor]:
    """Loss, gradients and the state after two updates of a head on all ranks together."""
    from paperzoo.papers.face.arcface.technique import CentresSGD, PartialFC, gather_parts

    rank, world = dist.get_rank(), dist.get_world_size()
    x, labels, centres = problem()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    head = PartialFC(CLASSES, SIZE)
    head.load_state_dict({"weight": centres})
    optimizer = CentresSGD(head, lr=0.05, momentum=0.9, weight_decay=0.01)
    found: dict[str, torch.Tensor] = {}
    for step in range(2):
        mine = x[share].clone().requires_grad_(True)
        head.zero_grad()
        loss = head(mine, labels[share])
        loss.backward()
        if step == 0:
            gradients = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(gradients, mine.grad)
            found |= {"loss": loss.detach(), "embeddings": torch.cat(gradients) / world}
            found["centres"] = gather_parts(head.weight.grad, head)
        optimizer.step()
    found["weight"] = head.state_dict()["weight"]
    found["momentum"] = optimizer.state_dict()["state"][0]["momentum_buffer"]
    again = CentresSGD(head, lr=0.05)
    again.load_state_dict(optimizer.state_dict())
    own = optimizer.state[head.weight]["momentum_buffer"]
    found["restored"] = (again.state[head.weight]["momentum_buffer"] - own).abs().max()
    torch.manual_seed(rank)
    sampled = PartialFC(CLASSES, SIZE, sample_rate=0.5)
    mine = x[share].clone().requires_grad_(True)
    sampled(mine, labels[share]).backward()
    rows = torch.tensor(len(sampled.weight.grad.coalesce().indices()[0]))
    dist.all_reduce(rows)
    found["sampled_rows"] = rows
    return found


def trained(data: str, steps: int = 2):
    """The recipe with a spread head after some steps from known centres; its losses, and its state before the last step."""
    from paperzoo.catalog.cards import find
    from paperzoo.engine.checkpoint import snapshot
    from paperzoo.engine.configure import configure
    from paperzoo.engine.loop import Settings, one_step
    from paperzoo.engine.run import build

    paper = find("arcface")
    config = configure(paper.module("recipe").PRESETS["embedded"], CHANGES | {"data": data})
    recipe = build(paper, config, Settings(device="cpu", channels_last=False))
    rng = torch.Generator().manual_seed(7)
    recipe.head.load_state_dict({"weight": torch.randn(recipe.head.num_classes, config.embedding_size, generator=rng)})
    losses = []
    for _ in range(steps):
        before = copy.deepcopy({"recipe": snapshot(recipe), "runtime": recipe.runtime.state_dict()})
        losses.append(float(one_step(recipe, Path(data))["loss"]))
    return recipe, losses, before


def training(data: str) -> dict[str, torch.Tensor]:
    """Losses on all ranks together, and whether a recipe that was restored before the last step ends in the same bits."""
    from paperzoo.engine.checkpoint import restore, snapshot
    from paperzoo.engine.loop import one_step
    from paperzoo.engine.verify import first_difference

    recipe, losses, before = trained(data)
    again, _, _ = trained(data, 1)
    restore(again, before["recipe"])
    again.runtime.load_state_dict(before["runtime"])
    one_step(again, Path(data))
    same = first_difference(snapshot(recipe), snapshot(again)) is None
    return {"losses": torch.tensor(losses), "resumed": torch.tensor(float(same))}


CHANGES = {"head": "spread", "batch_size": 8, "image_size": 16}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = heads() | training(sys.argv[2])
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
