"""Where a run's numbers go: metrics.csv always, TensorBoard, MLflow and Weights & Biases through their own clients."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from paperzoo.engine.files import write_text
from paperzoo.errors import MissingExtra


class RunLog:
    """The numbers of a run, by step. Only rank 0 writes. When a run is resumed, rows after the checkpoint are dropped."""

    def __init__(self, folder: Path, loggers: tuple[str, ...] = ("csv",), rank: int = 0, resumed_at: int = 0) -> None:
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, float]] = []
        self.active = rank == 0
        self.columns: list[str] = ["step"]
        self.sinks: list[Any] = []
        if not self.active:
            return
        if resumed_at and self.path.exists():
            self.rows = [row for row in read_metrics(self.path) if row["step"] <= resumed_at]
            self.columns = list(dict.fromkeys(["step", *(k for row in self.rows for k in row)]))
        self._rewrite()
        for name in loggers:
            if name != "csv":
                self.sinks.append(SINKS[name](folder))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        for sink in self.sinks:
            sink.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row; values of the same step are merged."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(values)
            fresh = True
        else:
            self.rows.append({"step": step, **values})
            fresh = False
        if not self.active:
            return
        new = [k for k in values if k not in self.columns]
        self.columns += new
        if new or fresh:
            self._rewrite()
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(shown(self.rows[-1]))
        for sink in self.sinks:
            sink.write(step, values)

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(map(shown, self.rows))
        write_text(self.path, text.getvalue())

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one column, where it has a value."""
        return [(row["step"], row[name]) for row in self.rows if name in row]


def shown(row: dict[str, float]) -> dict[str, str]:
    return {k: f"{v:.9g}" for k, v in row.items()}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; a last line that a kill cut short is left out."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({k: float(v) for k, v in row.items() if k and v})
            except (TypeError, ValueError):
                continue
    return [row for row in rows if "step" in row]


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboard", "tensorboard", "logging to TensorBoard") from None
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class MLflow:
    def __init__(self, folder: Path) -> None:
        try:
            import mlflow
        except ImportError:
            raise MissingExtra("mlflow-skinny", "mlflow", "logging to MLflow") from None
        self.client = mlflow
        mlflow.set_experiment("paperzoo")
        mlflow.start_run(run_name="/".join(folder.parts[-2:]))

    def write(self, step: int, values: dict[str, float]) -> None:
        self.client.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self.client.end_run()


class WeightsAndBiases:
    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("wandb", "wandb", "logging to Weights & Biases") from None
        self.run = wandb.init(project="paperzoo", name="/".join(folder.parts[-2:]), dir=str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


SINKS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}
