"""Measure every model that has a reference, and write the table. A quiet machine is needed: `make bench`.

python benchmarks/run.py [device] [threads]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from paperzoo.catalog.cards import papers
from paperzoo.catalog.measured import PATH as MEASURED
from paperzoo.catalog.measured import summary
from paperzoo.engine.bench import MEASURES, bench, lines

FOLDER = Path(__file__).parent
WAYS = {"like_for_like": "like for like", "as_users_get_it": "as users get it"}


def main(device: str = "cpu", threads: int | None = None, rounds: int = 5) -> None:
    results = FOLDER / "results" / device.split(":")[0]
    results.mkdir(parents=True, exist_ok=True)
    for paper in papers().values():
        file = paper.path / "parity.py"
        if not file.exists() or "def pairs(" not in file.read_text(encoding="utf-8"):
            continue
        for name in paper.module("parity").pairs():
            print(
                "\n".join(
                    lines(bench(name, rounds=rounds, threads=threads, device=device, out=results / f"{name}.json"))
                ),
                flush=True,
            )
    write_summary()


def write_summary() -> None:
    """The page beside this file, and the few figures that the catalogue shows."""
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")
    devices = {folder.name: summary(read_results(folder)) for folder in result_folders()}
    MEASURED.write_text(json.dumps(devices, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def result_folders() -> list[Path]:
    return sorted(p for p in (FOLDER / "results").iterdir() if p.is_dir())


def read_results(folder: Path) -> list[dict]:
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]


def page() -> str:
    text = [
        "# Benchmarks",
        "",
        "Written by `make bench`. A ratio is the reference's time over ours, so above 1 ours is faster: the median over rounds in which the two",
        "take turns, with the quartiles. *Like for like*: one process, the same settings, so that only the code differs. *As users get it*: each in a process of",
        "its own, the reference called plainly (`model.eval()`, `torch.no_grad()`), ours as the engine runs it (allocator thresholds, channels-last,",
        "folded batch norm, `inference_mode`). The JSON files beside this page have the times, the peak memory, machine and versions.",
    ]
    for folder in result_folders():
        rows = read_results(folder)
        machine = rows[0]["machine"]
        where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
        text += ["", f"## {folder.name}: {where}, torch {machine['torch']}"]
        for way, title in WAYS.items():
            text += [
                "",
                f"### {title}",
                "",
                "| model | against | " + " | ".join(MEASURES) + " |",
                "|---|---|" + "---|" * len(MEASURES),
            ]
            for row in rows:
                cells = [cell(row[way][m]["ratio"]) for m in MEASURES]
                text.append(f"| {row['model']} | {row['against']} | " + " | ".join(cells) + " |")
            means = [statistics.geometric_mean([row[way][m]["ratio"]["median"] for row in rows]) for m in MEASURES]
            everything = statistics.geometric_mean(means)
            text.append(
                "| **geometric mean** | "
                + f"all: **{everything:.2f}** | "
                + " | ".join(f"**{m:.2f}**" for m in means)
                + " |"
            )
    return "\n".join(text) + "\n"


def cell(ratio: dict) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
