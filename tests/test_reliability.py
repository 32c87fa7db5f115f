"""A kill, a full disk, a read-only folder, NaN, a hostile pickle: nothing is lost, and the message says what happened."""

from __future__ import annotations

import errno
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from paperzoo.engine import checkpoint as checkpoints
from paperzoo.engine.configure import configure
from paperzoo.engine.files import write_atomically
from paperzoo.engine.loop import Settings, fit
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.run import build, resume, train
from paperzoo.engine.runtime import NonFiniteLoss, Runtime
from paperzoo.engine.weights import load_weights, read_state
from paperzoo.errors import PaperZooError

SMALL = ["wide_resnet10_2", "--steps", "40", "--batch-size", "8", "--drop-rate", "0.2", "--ema-decay", "0.9"]
CHANGES = {"steps": 40, "batch_size": 8, "drop_rate": 0.2, "ema_decay": 0.9}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read_state(folder / "model.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_kill_and_resume_ends_with_the_same_bits(tmp_path):
    """kill -9 at a random moment, twice, then resume: the weights of a run that was never killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "paperzoo", "train", *SMALL, "--checkpoint-every", "3", "--device", "cpu"]
    subprocess.run(
        [*start, "--out", str(tmp_path / "whole"), "--json"], check=True, capture_output=True, env=environment
    )
    command, killed, moments = [*start, "--out", str(tmp_path / "killed"), "--json"], 0, random.Random()
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while not (tmp_path / "killed" / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.5)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = [sys.executable, "-m", "paperzoo", "resume", str(tmp_path / "killed"), "--json"]
    assert killed >= 1
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "killed"))


@pytest.mark.parametrize("step", [1, 7, 13])
def test_resume_is_exact_at_any_step(tmp_path, step):
    from paperzoo.catalog.cards import find
    from paperzoo.engine.verify import first_difference

    paper = find("wide_resnet")
    config = configure(paper.module("recipe").PRESETS["embedded"], CHANGES | {"steps": 14, "model": "wide_resnet10_2"})
    settings = Settings(device="cpu", accumulate=2)
    whole = build(paper, config, settings)
    fit(whole, tmp_path, settings)
    part = build(paper, config, settings)
    fit(part, tmp_path, settings, last_step=step)
    state = checkpoints.read_checkpoint(tmp_path / "checkpoint.pt")
    again = build(paper, config, settings)
    checkpoints.restore(again, state["recipe"])
    again.runtime.load_state_dict(state["runtime"])
    fit(again, tmp_path, settings)
    assert first_difference(checkpoints.snapshot(whole), checkpoints.snapshot(again)) is None


def test_terminate_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "paperzoo", "train", "wide_resnet10_2", "--steps", "4000", "--batch-size", "8"]
    command += ["--device", "cpu", "--checkpoint-every", "4000", "--log-every", "1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while (
        not (tmp_path / "run" / "metrics.csv").exists() or "loss" not in (tmp_path / "run" / "metrics.csv").read_text()
    ):
        time.sleep(0.05)
    process.terminate()
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "paperzoo resume" in message
    assert checkpoints.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["runtime"]["step"] > 0


def test_full_disk_leaves_the_previous_file(tmp_path, monkeypatch):
    target = tmp_path / "checkpoint.pt"
    torch.save({"a": 1}, target)
    before = target.read_bytes()

    def fill(part: Path) -> None:
        part.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PaperZooError, match="No space left on device.*previous one is intact"):
        write_atomically(target, fill)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_really_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A process that may write no file above 64 kB: the kernel refuses in the middle of the write, as a full disk does."""
    script = f"""
import resource, signal, torch
from pathlib import Path
from paperzoo.engine.files import write_atomically
path = Path({str(tmp_path / "checkpoint.pt")!r})
write_atomically(path, lambda part: torch.save({{"step": 1}}, part))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_atomically(path, lambda part: torch.save({{"step": 2, "x": torch.zeros(10**6)}}, part))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("PaperZooError"), done.stdout + done.stderr
    assert "intact" in done.stdout
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PaperZooError, match="file.*cannot be created"):
        train("wide_resnet10_2", folder=tmp_path / "file" / "run", changes={"steps": 1})


def test_interrupted_write_leaves_the_previous_file(tmp_path):
    """A process killed in the middle of writing."""
    target = tmp_path / "checkpoint.pt"
    script = f"""
import os, torch
from pathlib import Path
from paperzoo.engine.files import write_atomically
path = Path({str(target)!r})
write_atomically(path, lambda part: torch.save(1, part))
def die(part):
    part.write_bytes(b"x" * 1000)
    os.kill(os.getpid(), 9)
write_atomically(path, die)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert torch.load(target, weights_only=True) == 1


class Exploding(Recipe):
    """Becomes NaN at step 3."""

    def __init__(self, config, runtime, facts=None):
        super().__init__(config, runtime, facts)
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.batches = runtime.batches(torch.utils.data.TensorDataset(torch.ones(8, 2)), 4)

    def batch(self):
        return self.batches.next()

    def step(self, batch):
        loss = self.model(batch[0]).square().mean()
        return {"loss": loss * float("nan") if self.runtime.step == 3 else loss}


def test_nan_stops_with_the_step_and_the_batch(tmp_path):
    from types import SimpleNamespace

    recipe = Exploding(SimpleNamespace(steps=10, clip=None), Runtime())
    with pytest.raises(NonFiniteLoss, match=r"nan at step 3, rows of 'data': \[\d"):
        fit(recipe, tmp_path, Settings(device="cpu", checkpoint_every=1))
    assert all(bool(p.isfinite().all()) for p in recipe.model.parameters())
    assert checkpoints.read_checkpoint(tmp_path / "checkpoint.pt")["runtime"]["step"] == 3
    kept = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert kept["step"] == 3 and kept["batch"][0].shape == (4, 2)


class RunsCode:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return (os.mkdir, (str(self.flag),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, writer):
    evil, flag = tmp_path / "evil.pt", tmp_path / "was_here"
    if writer == "torch":
        torch.save({"state_dict": RunsCode(flag)}, evil)
    else:
        evil.write_bytes(pickle.dumps(RunsCode(flag), protocol=2))
    with pytest.raises(PaperZooError, match="evil.pt"):
        load_weights(nn.Linear(2, 2), evil)
    assert not flag.exists()


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    train(
        "wide_resnet10_2",
        folder=tmp_path / "run",
        changes={"steps": 2, "batch_size": 8},
        settings=Settings(device="cpu"),
    )
    before = tensors(tmp_path / "run")
    resume(tmp_path / "run")
    assert equal(before, tensors(tmp_path / "run"))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    train(
        "wide_resnet10_2",
        folder=tmp_path / "run",
        changes={"steps": 2, "batch_size": 8},
        settings=Settings(device="cpu"),
    )
    text = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(text.replace("wide_resnet10_2", "wide_resnet16_2"))
    with pytest.raises(PaperZooError, match="checkpoint.pt: 'model' does not fit"):
        resume(tmp_path / "run")


def test_a_cut_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": 1, "x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(PaperZooError, match="checkpoint.pt: not a readable checkpoint"):
        checkpoints.read_checkpoint(path)
