"""Run by torchrun: a face head with its classes spread over the ranks, and what rank 0 saw of it, as tensors in a file."""

from __future__ import annotations

import sys
import tempfile
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


def training() -> dict[str, torch.Tensor]:
    """Losses of a few steps of the recipe, and whether a run that was stopped and resumed ends in the same bits."""
    import distributed_worker
    from paperzoo.engine.checkpoint import snapshot
    from paperzoo.engine.verify import first_difference

    chosen = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(chosen, 0)
    first, rows = distributed_worker.curve("arcface", CHANGES, 4, folder=Path(chosen[0]) / "one")
    second, _ = distributed_worker.curve("arcface", CHANGES, 4, folder=Path(chosen[0]) / "two", half=2)
    same = first_difference(snapshot(first), snapshot(second)) is None
    return {"losses": torch.tensor([row["loss"] for row in rows]), "resumed": torch.tensor(float(same))}


CHANGES = {"head": "spread", "batch_size": 8, "image_size": 16}


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    CHANGES["data"] = sys.argv[2]
    found = heads() | training()
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
