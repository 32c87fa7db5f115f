"""What all tests share: one thread a process (two processes run side by side), a cache of their own, seeds."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins with the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Caches go to a folder of the session's own, for child processes too."""
    kept = os.environ.get("PAPERZOO_CACHE")
    os.environ["PAPERZOO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if kept is None:
        del os.environ["PAPERZOO_CACHE"]
    else:
        os.environ["PAPERZOO_CACHE"] = kept
