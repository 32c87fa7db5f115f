"""Small pictures for reports: curves, a confusion matrix, tiles. Everything returns a PIL image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image


def to_picture(figure: Any) -> Image.Image:
    """A matplotlib figure as an image; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def new_figure(width: float = 5.0, height: float = 3.2) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, without touching the global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def curve(points: Mapping[str, Sequence[tuple[float, float]]], title: str, logarithmic: bool = False) -> Image.Image:
    """Lines by name, each a sequence of (step, value)."""
    figure, axes = new_figure()
    for name, line in points.items():
        xs, ys = zip(*line, strict=True)
        axes.plot(xs, ys, label=name, linewidth=1.4, marker="o" if len(xs) < 3 else None)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(title)
    if len(points) > 1:
        axes.legend(fontsize=8)
    return to_picture(figure)


def record(board: Any) -> Image.Image:
    """A leaderboard (`catalog.board.Board`) over the years: every result as a point, the record as a line with its holders."""
    figure, axes = new_figure(9.0, 5.0)
    rows, held = board.rows, board.records
    last = max(row.year for row in rows)
    axes.scatter([row.year for row in rows], [row.value for row in rows], s=22, color="#8a93a3", label="results")
    line = [*((row.year, row.value) for row in held), (last, held[-1].value)]
    axes.step(*zip(*line, strict=True), where="post", color="#c2410c", label="record")
    for row in held:
        axes.annotate(row.name, (row.year, row.value), textcoords="offset points", xytext=(4, 6), fontsize=8)
    axes.set(title=f"{board.dataset.name}: {board.metric.name}", ylabel=f"{board.metric.name} {board.unit}".strip())
    axes.set_xlim(min(row.year for row in rows) - 0.6, last + 1.4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False)
    return to_picture(figure)


def confusion_matrix(counts: Any, labels: Sequence[str]) -> Image.Image:
    """Rows are the truth, columns the prediction; counts are written in up to 20 classes."""
    size = min(9.0, 2.2 + 0.35 * len(labels))
    figure, axes = new_figure(size, size)
    axes.grid(False)
    shares = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("is")
    if len(labels) <= 40:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
    if len(labels) <= 20:
        for i, row in enumerate(counts.tolist()):
            for j, value in enumerate(row):
                if value:
                    colour = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, int(value), ha="center", va="center", fontsize=7, color=colour)
    return to_picture(figure)


def tile(pictures: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures of any sizes side by side in rows of `columns`, on white."""
    width = max(p.width for p in pictures)
    height = max(p.height for p in pictures)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture.convert("RGB"), ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet
