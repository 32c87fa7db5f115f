"""Several processes: two CPU ranks (gloo) against one, resumed, and sharded; two "nodes" on one machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "distributed_worker.py"
sys.path.insert(0, str(WORKER.parent))

# what is trained, smaller than the embedded presets; sharded where a network is called through its forward alone
TASKS = [
    {"slug": "wide_resnet", "changes": {"model": "wide_resnet10_2", "batch_size": 16}, "steps": 6, "shard": True},
    {"slug": "fixmatch", "changes": {"batch_size": 8}, "steps": 4, "shard": True},
    {"slug": "simclr", "changes": {"batch_size": 16, "learning_rate": 0.02}, "steps": 4, "shard": True},
    {"slug": "sagan", "changes": {"batch_size": 8}, "steps": 3, "shard": True},
    {"slug": "gpinn", "changes": {"steps": 6, "lbfgs_steps": 2}, "steps": 6, "shard": False},
    {"slug": "dqn", "changes": {"learn_start": 64}, "steps": 120, "shard": True},
]
SLUGS = [task["slug"] for task in TASKS]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """What two ranks saw, for every task, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "tasks.json").write_text(json.dumps(TASKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(WORKER), str(folder / "tasks.json"), str(folder / "results.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1500, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("slug", SLUGS)
def test_ranks_end_identical(two, slug):
    assert two[slug]["ranks_identical"]


@pytest.mark.parametrize("slug", SLUGS)
def test_resume_on_two_ranks_is_bit_equal(two, slug):
    assert two[slug]["resume_differs_in"] is None


@pytest.mark.parametrize("slug", SLUGS)
def test_two_ranks_learn_as_one(two, slug):
    """The logged curve agrees with one process at the same global batch."""
    import torch

    import distributed_worker

    task = next(t for t in TASKS if t["slug"] == slug)
    _, rows = distributed_worker.curve(slug, task["changes"], task["steps"])
    theirs = two[slug]["rows"]
    assert len(rows) == len(theirs) == task["steps"]
    for a, b in zip(rows, theirs, strict=True):
        shared = sorted((a.keys() & b.keys()) - {"seconds", "step"})
        assert shared
        one, other = torch.tensor([a[k] for k in shared]), torch.tensor([b[k] for k in shared])
        torch.testing.assert_close(
            one, other, rtol=2e-3, atol=2e-4, msg=lambda m, s=a["step"], k=tuple(shared): f"step {s}, {k}: {m}"
        )


@pytest.mark.parametrize("slug", [t["slug"] for t in TASKS if t["shard"]])
def test_sharded_agrees_with_replicated(two, slug):
    assert two[slug]["shard_difference"] <= 1e-6


def test_two_nodes_on_localhost(tmp_path):
    """The documented multi-node launch, with both nodes on this machine, through the command line."""
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two", "-m", "paperzoo"]
    command += [
        "train",
        "wide_resnet10_2",
        "--steps",
        "4",
        "--batch-size",
        "16",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    nodes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "processes = 2" in (tmp_path / "run" / "config.toml").read_text()
