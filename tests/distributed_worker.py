"""Run by torchrun: trains recipes on several ranks and writes what rank 0 saw as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from paperzoo.catalog.cards import find
from paperzoo.engine.checkpoint import read_checkpoint, restore, snapshot
from paperzoo.engine.configure import configure
from paperzoo.engine.loop import Settings, fit
from paperzoo.engine.run import build
from paperzoo.engine.verify import first_difference


def networks(recipe) -> torch.Tensor:
    """All parameters and buffers of a recipe's networks, whole, as one vector."""
    parts = snapshot(recipe)
    modules = [name for name, part in recipe.stateful().items() if isinstance(part, torch.nn.Module)]
    values = torch.cat([t.detach().double().flatten() for m in modules for t in parts[m].values()] or [torch.zeros(1)])
    return values.nan_to_num(0.0, 0.0, 0.0)


def curve(
    slug: str, changes: dict, steps: int, shard: bool = False, folder: Path | None = None, half: int | None = None
):
    """Train `steps` steps; the recipe and its logged losses."""
    paper = find(slug)
    config = configure(paper.module("recipe").PRESETS["embedded"], changes)
    # one memory layout for all: another one rounds otherwise, and a few steps make much of that
    settings = Settings(device="cpu", log_every=1, shard=shard, channels_last=False)
    recipe = build(paper, config, settings)
    folder = folder or Path(tempfile.mkdtemp())
    progress = None
    if half is not None:
        _, progress = fit(recipe, folder, settings, last_step=half)
        again = build(paper, config, settings)
        state = read_checkpoint(folder / "checkpoint.pt")
        restore(again, state["recipe"])
        again.runtime.load_state_dict(state["runtime"])
        recipe = again
    log, _ = fit(recipe, folder, settings, last_step=steps)
    return recipe, [row for row in log.rows]


def shared_folder() -> Path:
    chosen = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(chosen, 0)
    return Path(chosen[0])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tasks = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for task in tasks:
        slug, changes, steps = task["slug"], task["changes"], task["steps"]
        recipe, rows = curve(slug, changes, steps, folder=shared_folder())
        mine = networks(recipe)
        others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(others, mine)
        again, _ = curve(slug, changes, steps, folder=shared_folder(), half=steps // 2)
        result = {
            "rows": rows,
            "ranks_identical": all(torch.equal(others[0], o) for o in others),
            "resume_differs_in": first_difference(snapshot(recipe), snapshot(again)),
            "weights": float(mine.norm()),
        }
        if task["shard"]:
            sharded, _ = curve(slug, changes, steps, shard=True, folder=shared_folder())
            result["shard_difference"] = float((networks(sharded) - mine).abs().max())
        results[slug] = result
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
