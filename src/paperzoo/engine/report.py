"""A run's report: one HTML file that needs nothing else. Curves, metrics, pictures, and what to try next."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from paperzoo.catalog.cards import Paper
from paperzoo.engine.configure import read_toml
from paperzoo.engine.files import write_text
from paperzoo.engine.logs import RunLog
from paperzoo.engine.pictures import curve, tile
from paperzoo.engine.weights import parameter_count

if TYPE_CHECKING:
    from paperzoo.engine.run import Run

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #767676; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; } figcaption { color: var(--soft); font-size: .85rem; }
.curves figure { max-width: 46%; } img { max-width: 100%; background: white; border-radius: 4px; } code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .7rem; border-radius: 4px; }
.big { font-size: 2rem; font-weight: 600; } .muted { color: var(--soft); }
"""


def write(paper: Paper, run: Run, log: RunLog) -> Path:
    """Write `report.html` into the run's folder."""
    recipe, card = run.recipe, paper.card
    monitored = recipe.monitor[0]
    parts = [
        f"<h1>{text(card['name'])}</h1>",
        f"<p class='muted'>{text(card['title'])} · {text(card.get('venue') or '')} {card['year']} · "
        f"<a href='{text(paper.link)}'>{text(paper.link)}</a></p>",
        f"<p>{text(card['summary'])}<br><span lang='zh'>{text(card['summary_zh'])}</span></p>",
    ]
    if monitored in run.metrics:
        parts.append(f"<p><span class='big'>{shown(run.metrics[monitored])}</span> {text(words(monitored))}</p>")
    parts += [
        "<h2>Measured</h2>",
        metrics_table(paper, run),
        "<h2>Learning</h2>",
        "<div class='curves'>",
        *curves(log),
        "</div>",
    ]
    if run.figures:
        parts += ["<h2>Results</h2>", *(figure(picture, title) for title, picture in run.figures.items())]
    if run.predictions:
        parts += ["<h2>Predictions</h2>", predictions(run)]
    if run.export is not None:
        parts.append(
            f"<h2>Export</h2><p><code>{text(run.export.path.name)}</code>: ONNX Runtime gives the network's outputs, largest difference "
            f"{run.export.difference:.2g} at outputs up to {run.export.scale:.3g}, at {text(run.export.sizes)}.</p>"
        )
    if recipe.runtime.broken:
        rows = "".join(f"<li><code>{text(p)}</code>: {text(why)}</li>" for p, why in recipe.runtime.broken.items())
        parts.append(f"<h2>Skipped files</h2><ul>{rows}</ul>")
    parts += [
        "<h2>Try next</h2>",
        f"<pre>{text(next_steps(paper, run))}</pre>",
        "<h2>Settings</h2>",
        settings_table(run),
    ]
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{text(card['name'])} · PaperZoo</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    path = run.folder / "report.html"
    write_text(path, page)
    return path


def text(value: Any) -> str:
    return html.escape(str(value))


def words(name: str) -> str:
    return name.replace("_", " ")


def shown(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"


def picture_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    if getattr(picture, "is_animated", False):
        picture.save(buffer, "GIF", save_all=True)
        return "data:image/gif;base64," + base64.b64encode(buffer.getvalue()).decode()
    picture.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(picture: Image.Image, title: str) -> str:
    return (
        f"<figure><img alt='{text(title)}' src='{picture_uri(picture)}'><figcaption>{text(title)}</figcaption></figure>"
    )


def curves(log: RunLog) -> list[str]:
    """A picture for every logged quantity but the clock; what was evaluated only once is in the table."""
    pictures = []
    for name in log.columns:
        points = [(s, v) for s, v in log.series(name) if v == v and abs(v) != float("inf")]
        if name not in ("step", "seconds") and len(points) > 1:
            values = [v for _, v in points]
            logarithmic = min(values) > 0 and max(values) / min(values) > 100
            pictures.append(figure(curve({name: points}, words(name), logarithmic), words(name)))
    return pictures or ["<p class='muted'>One step, no curve.</p>"]


def metrics_table(paper: Paper, run: Run) -> str:
    rows = [f"<tr><td>{text(words(k))}<td class='number'>{shown(v)}" for k, v in run.metrics.items()]
    expect = paper.card.get("expect")
    if expect and expect["metric"] in run.metrics:
        bound = f"at least {expect['at_least']}" if "at_least" in expect else f"at most {expect['at_most']}"
        rows.append(f"<tr><td>expected of the embedded preset<td>{text(words(expect['metric']))} {bound}")
        rows.append(f"<tr><td>baseline: {text(expect['baseline_name'])}<td class='number'>{shown(expect['baseline'])}")
    rows.append(f"<tr><td>training time<td class='number'>{run.seconds:.1f} s")
    if getattr(run.recipe, "model", None) is not None:
        count = parameter_count(run.recipe.deployed)
        rows.append(f"<tr><td>parameters<td class='number'>{count:,}")
    for row in paper.card.get("headline", []):
        rows.append(
            f"<tr><td class='muted'>the paper on {text(row['dataset'])} ({text(row.get('setting', ''))})<td class='muted'>{text(row['metric'])} {text(row['value'])}"
        )
    return f"<table>{''.join(rows)}</table>"


def predictions(run: Run) -> str:
    drawn = [(v, r, run.recipe.draw(v, r)) for v, r in run.predictions[:16]]
    images = [picture for *_, picture in drawn if picture is not None]
    if images:
        return figure(tile(images, 8 if images[0].width < 150 else 3), "held-out inputs and what was predicted")
    rows = "".join(f"<tr><td>{text(str(v)[:200])}<td>{text(str(r)[:300])}" for v, r, _ in drawn)
    return f"<table><tr><th>input<th>prediction{rows}</table>"


def next_steps(paper: Paper, run: Run) -> str:
    lines = [f"paperzoo show {paper.slug}    # the paper, its models, the files to read"]
    if run.predictions and isinstance(run.predictions[0][0], str | Path):
        lines.append(f"paperzoo predict {run.folder} your_file")
    if hasattr(run.recipe.config, "data"):
        lines.append(f"paperzoo train {paper.slug} --data path/to/your/data")
    if "published" in paper.module("recipe").PRESETS:
        lines.append(f"paperzoo train {paper.slug} --preset published    # the paper's own settings")
    return "\n".join(lines)


def settings_table(run: Run) -> str:
    stored = read_toml(run.folder / "config.toml")
    machine = f"{platform.machine()}, {run.recipe.runtime.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    values = {**stored.get("config", {}), **{k: v for k, v in stored.get("settings", {}).items()}}
    rows = "".join(f"<tr><td>{text(k)}<td><code>{text(json.dumps(v, default=str))}</code>" for k, v in values.items())
    return f"<p class='muted'>{text(machine)}; preset {text(stored.get('preset'))}</p><table>{rows}</table>"
