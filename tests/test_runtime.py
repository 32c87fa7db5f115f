"""The runtime: updates, randomness, sampling, accumulation; and the loop around it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from paperzoo.engine.loop import Settings, fit
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import NonFiniteLoss, Runtime
from paperzoo.errors import DataError, PaperZooError


class Numbers(Dataset):
    """Sample i is (i, a random number drawn from the global generator)."""

    def __init__(self, n: int, broken: set[int] = frozenset()) -> None:
        self.n, self.broken = n, broken

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[int, float]:
        if i in self.broken:
            raise DataError(f"file{i}.png", "not a readable image")
        return i, torch.rand(()).item()


def test_an_epoch_uses_every_row_once():
    runtime, seen = Runtime(), []
    for runtime.step in range(5):
        seen += runtime.indices(10, 4).tolist()
    assert sorted(seen) == sorted([*range(10)] * 2)
    assert seen[:10] != seen[10:]


def test_streams_are_independent_and_repeatable():
    a, b = Runtime(seed=3), Runtime(seed=3)
    assert torch.equal(a.indices(100, 10, "x"), b.indices(100, 10, "x"))
    assert not torch.equal(a.indices(100, 10, "x"), a.indices(100, 10, "y"))
    assert not torch.equal(a.indices(100, 10), Runtime(seed=4).indices(100, 10))


def test_rng_is_a_function_of_the_step():
    runtime = Runtime()
    first = torch.rand(3, generator=runtime.rng("noise"))
    assert torch.equal(first, torch.rand(3, generator=runtime.rng("noise")))
    runtime.step = 1
    assert not torch.equal(first, torch.rand(3, generator=runtime.rng("noise")))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_anywhere_with_the_same_augmentation(workers):
    def collect(start: int) -> list:
        runtime = Runtime(seed=1)
        batches, found = runtime.batches(Numbers(20), 4, workers=workers), []
        for runtime.step in range(start, 6):
            found.append(torch.stack([x.double() for x in batches.next()]))
        return found

    whole, part = collect(0), collect(3)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], part, strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_workers_do_not_change_the_samples():
    found = []
    for workers in (0, 2):
        runtime = Runtime(seed=1)
        found.append(torch.stack([x.double() for x in runtime.batches(Numbers(20), 4, workers=workers).next()]))
    assert torch.equal(*found)


def test_feeding_leaves_the_global_generator_alone():
    runtime = Runtime()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    runtime.batches(Numbers(20), 4).next()
    assert torch.equal(torch.rand(3), expected)


def test_one_broken_file_is_skipped_named_and_counted(caplog):
    runtime = Runtime()
    batches = runtime.batches(Numbers(150, broken={7}), 50)
    for runtime.step in range(3):
        rows = batches.next()[0]
        assert len(rows) == 50 and 7 not in rows.tolist()
    assert runtime.broken == {"file7.png": "not a readable image"}
    assert "file7.png" in caplog.text


def test_more_than_one_percent_broken_stops():
    runtime = Runtime()
    batches = runtime.batches(Numbers(150, broken={1, 2, 3}), 150)
    with pytest.raises(DataError, match="3 of 150 files are broken, more than 1%"):
        batches.next()


def test_evaluation_skips_broken_files():
    runtime = Runtime()
    rows = torch.cat([batch[0] for batch in runtime.loader(Numbers(150, broken={7}), 40)])
    assert rows.tolist() == [i for i in range(150) if i != 7]


def test_update_reaches_only_its_own_parameters():
    runtime = Runtime()
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(generator.parameters(), 0.1)
    runtime.update(optimizer, critic(generator(torch.ones(3, 2))).mean())
    assert critic.weight.grad is None and generator.weight.grad is not None


def test_update_clips():
    runtime, layer = Runtime(), nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    runtime.update(torch.optim.SGD(layer.parameters(), 1.0), 1000 * layer(torch.ones(1, 2)).sum(), clip=0.5)
    assert float((layer.weight - before).norm()) == pytest.approx(0.5, rel=1e-4)


def test_update_refuses_nan_before_anything_changes():
    runtime, layer = Runtime(), nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match="step 0"):
        runtime.update(torch.optim.SGD(layer.parameters(), 1.0), layer(torch.full((1, 2), float("nan"))).sum())
    assert torch.equal(layer.weight, before)


class Line(Recipe):
    """Least squares on fixed rows."""

    def __init__(self, config, runtime, facts=None):
        super().__init__(config, runtime, facts)
        self.model = nn.Linear(3, 1)
        nn.init.ones_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 3, generator=generator)
        self.data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True) * 2)
        self.feed = runtime.batches(self.data, config.batch_size)
        self.values = iter(config.values) if hasattr(config, "values") else None

    def batch(self):
        return self.feed.next()

    def step(self, batch):
        return {"loss": (self.model(batch[0]) - batch[1]).square().mean()}

    def evaluate(self, split="test"):
        return {"accuracy": next(self.values) if self.values else 0.0}


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    results = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        recipe = Line(SimpleNamespace(steps=5, batch_size=batch_size), Runtime(accumulate=accumulate))
        fit(recipe, tmp_path, Settings(device="cpu", accumulate=accumulate))
        assert recipe.runtime.step == 5
        results.append(recipe.model.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_learns(tmp_path):
    recipe = Line(SimpleNamespace(steps=30, batch_size=16), Runtime(precision="bf16"))
    log, _ = fit(recipe, tmp_path, Settings(device="cpu", precision="bf16", log_every=1))
    losses = [v for _, v in log.series("loss")]
    assert losses[-1] < 0.2 * losses[0]
    assert recipe.model.weight.dtype == torch.float32


def test_early_stopping(tmp_path):
    config = SimpleNamespace(steps=100, batch_size=8, values=[0.5, 0.7, 0.6, 0.65, 0.9])
    _, progress = fit(Line(config, Runtime()), tmp_path, Settings(device="cpu", evaluate_every=10, patience=2))
    assert progress.stopped.startswith("no better accuracy than 0.7")


def test_minimise_runs_lbfgs():
    runtime, recipe = Runtime(), Line(SimpleNamespace(steps=1, batch_size=8), Runtime())
    optimizer = torch.optim.LBFGS(recipe.model.parameters(), line_search_fn="strong_wolfe", max_iter=30)
    x, y = recipe.data.tensors
    first = runtime.minimise(optimizer, lambda: (recipe.model(x) - y).square().mean())
    assert float(first) > 0.1
    assert float((recipe.model(x) - y).square().mean()) < 1e-8


def test_stateful_finds_nested_parts_once():
    outer = Recipe(SimpleNamespace(), Runtime())
    inner = Line(SimpleNamespace(steps=1, batch_size=8), outer.runtime)
    outer.inner, outer.model, outer.more = inner, inner.model, {"head": nn.Linear(1, 1)}
    assert set(outer.stateful()) == {"inner.model", "inner.optimizer", "more.head"}


def test_a_batch_that_does_not_divide_is_refused():
    runtime = Runtime()
    runtime.world = 2
    with pytest.raises(PaperZooError, match="batch_size 5 is the global batch"):
        runtime.indices(10, 5)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(PaperZooError, match="device"):
        Runtime(device=name)


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    from paperzoo.engine.logs import RunLog, read_metrics

    log = RunLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,")  # cut short by a kill
    again = RunLog(tmp_path, resumed_at=3)
    again.write(4, {"loss": 40.0, "test/accuracy": 0.5})
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]


@pytest.mark.parametrize("logger", ["tensorboard", "mlflow", "wandb"])
def test_loggers_take_the_numbers(tmp_path, logger, monkeypatch):
    """Through the real clients, offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI",
        f"sqlite:///{tmp_path}/mlflow.db" if logger != "mlflow" else (tmp_path / "mlruns").as_uri(),
    )
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    recipe = Line(SimpleNamespace(steps=4, batch_size=8), Runtime())
    (tmp_path / "run").mkdir()
    fit(recipe, tmp_path / "run", Settings(device="cpu", loggers=("csv", logger)))
    assert (tmp_path / "run" / "metrics.csv").exists()
    written = [
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and {"tensorboard": "tfevents", "mlflow": "metrics", "wandb": "wandb"}[logger] in str(p)
    ]
    assert written
