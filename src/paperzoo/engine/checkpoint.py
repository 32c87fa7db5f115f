"""Checkpoints: everything a run needs to go on, in one file, replaced in one step.

The file holds whole tensors whatever the run's layout, so a run may be resumed with another number of processes, or
sharded where it was not.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paperzoo.engine.distributed import load_whole, reshard, whole
from paperzoo.engine.files import write_atomically
from paperzoo.engine.recipe import Recipe
from paperzoo.errors import PaperZooError

FORMAT = 1


def snapshot(recipe: Recipe) -> dict[str, Any]:
    """The state of everything on a recipe that has one. A collective when sharded."""
    if recipe.runtime.shard_networks:
        reshard(recipe)
    return {name: whole(part.state_dict()) for name, part in recipe.stateful().items()}


def restore(recipe: Recipe, states: dict[str, Any], path: object = "checkpoint") -> None:
    """Put a snapshot back.

    Raises:
        PaperZooError: if the recipe has other parts than the snapshot, or a part does not fit.
    """
    parts = recipe.stateful()
    if parts.keys() != states.keys():
        difference = sorted(parts.keys() ^ states.keys())
        raise PaperZooError(
            f"{path}: was written by another recipe or configuration; the parts {difference[:4]} differ"
        )
    for name, part in parts.items():
        try:
            load_whole(part, copy.deepcopy(states[name]))  # optimizers keep what they are given
        except (RuntimeError, ValueError, KeyError) as error:
            raise PaperZooError(f"{path}: '{name}' does not fit this recipe: {str(error).splitlines()[0]}") from error


def save_checkpoint(path: Path, recipe: Recipe, loop: dict[str, Any]) -> None:
    """Write the checkpoint (rank 0; the others take part in gathering and wait).

    Raises:
        PaperZooError: if it cannot be written; the previous file is intact.
    """
    runtime = recipe.runtime
    state = {"format": FORMAT, "runtime": runtime.state_dict(), "recipe": snapshot(recipe), "loop": loop}
    failure = None
    if runtime.rank == 0:
        try:
            write_atomically(path, lambda part: torch.save(state, part))
        except PaperZooError as error:
            failure = error
    if runtime.world > 1:
        dist.barrier()
    if failure is not None:
        raise failure


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU, without ever running code from the file.

    Raises:
        PaperZooError: if it is missing, damaged, or no checkpoint of ours.
    """
    state = read_pickle_safely(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise PaperZooError(f"{path}: not a checkpoint of this version; resume needs the checkpoint.pt of a run")
    return state


def read_pickle_safely(path: Path) -> Any:
    """A file written by `torch.save`, tensors and plain values only.

    Raises:
        PaperZooError: if it is missing, damaged, or holds anything that would run code when loaded.
    """
    import pickle

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PaperZooError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported" in text or "not an allowed global" in text.lower() or "GLOBAL" in text:
            raise PaperZooError(
                f"{path}: refused: the pickle asks to run code; only tensors and plain values are loaded"
            ) from None
        raise PaperZooError(f"{path}: not a readable checkpoint (damaged or another format)") from None
    except Exception as error:  # a damaged archive fails in many ways
        raise PaperZooError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); is the file complete?"
        ) from None
