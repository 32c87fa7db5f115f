"""What each engine makes of each model that has a reference: speed at batch 1 and 8 as ratios to the plain eager call, size, error.

    python benchmarks/deploy.py [MODEL …] [--threads 1] [--rounds 5] [--engines onnxruntime,openvino,inductor]

Random weights, inputs of the published size, int8 ranges from random inputs: speeds are those of trained networks, the costs
in accuracy are not, and are measured by `paperzoo optimize` on a trained run. A quiet machine is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from paperzoo.catalog.cards import papers
from paperzoo.engine.bench import find_pair, machine
from paperzoo.engine.optimize import Bench, Candidate, described

FOLDER = Path(__file__).parent / "deploy"
COLUMNS = ("onnxruntime fp32", "openvino fp32", "inductor fp32", "onnxruntime int8", "openvino int8")


def models() -> list[str]:
    """Those with a pair, one of each paper first."""
    first, more = [], []
    for paper in papers().values():
        file = paper.path / "parity.py"
        if file.exists() and "def pairs(" in file.read_text(encoding="utf-8"):
            names = list(paper.module("parity").pairs())
            first += names[:1]
            more += names[1:]
    return first + more


def measure(name: str, threads: list[int], rounds: int, engines: list[str]) -> dict:
    paper, _, pair = find_pair(name)
    torch.manual_seed(0)
    network = pair.ours().eval()
    inputs = tuple(pair.inputs(2))
    rows = [tuple(x[i : i + 1] for x in pair.inputs(8)) for i in range(8)]
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(network, inputs, {"pair": name}, Path(work), rows[:2], rows)
        eager, candidates = Candidate("eager", "fp32", same=1.0, difference=0.0), []
        for engine in engines:
            for precision in ("fp32", "int8") if engine != "inductor" else ("fp32",):
                started = time.perf_counter()
                candidates.append(bench.build(engine, precision, "minmax"))
                made = candidates[-1]
                print(f"  {made.name}: {made.reason or 'built'} in {time.perf_counter() - started:.0f} s", flush=True)
        usable = [c for c in candidates if not c.reason]
        bench.time(usable, eager, threads, rounds)
    return {
        "model": name,
        "paper": paper.slug,
        "area": paper.area,
        "parameters": sum(p.numel() for p in network.parameters()),
        "machine": machine("cpu", max(threads)),
        "measured": [described(c) for c in (eager, *candidates)],
    }


def page() -> str:
    rows = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.json"))]
    rows.sort(key=lambda r: (r["area"], r["model"]))
    where = rows[0]["machine"]
    text = [
        "# Deployed networks",
        "",
        "Written by `python benchmarks/deploy.py`. How many times as fast as the plain eager call (`model.eval()`, `torch.no_grad()`) in the same run:",
        "medians over rounds in which all take turns, each in a process of its own. Random weights, inputs of the published size. A dash: it could",
        "not be built, and the JSON file beside this page says why. Bold: what `--target auto` takes at batch 1.",
        "",
        f"{where['processor']}, torch {where['torch']}.",
    ]
    for precision in ("fp32", "int8"):
        columns = [c for c in COLUMNS if c.endswith(precision)]
        for batch, threads in sorted(
            {(c["batch"], c["threads"]) for r in rows for m in r["measured"][:1] for c in m["timing"]["calls"]}
        ):
            title = f"{precision}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
            text += [
                "",
                f"## {title}",
                "",
                "| area | model | eager | " + " | ".join(columns) + " |",
                "|---|---|---|" + "---|" * len(columns),
            ]
            best: list[float] = []
            for row in rows:
                found = {f"{m['engine']} {m['precision']}": m for m in row["measured"]}
                ratios = {c: ratio(found.get(c), batch, threads) for c in columns}
                known = [r for r in ratios.values() if r]
                if not milliseconds(found["eager fp32"], batch, threads):
                    continue
                best += [max(known)] if known else []
                cells = [
                    "–" if r is None else f"**{r:.2f}**" if r == max(known) else f"{r:.2f}" for r in ratios.values()
                ]
                eager = milliseconds(found["eager fp32"], batch, threads)
                text.append(f"| {row['area']} | {row['model']} | {eager:.1f} ms | " + " | ".join(cells) + " |")
            if best:
                text.append(
                    f"\nGeometric mean of the best: **{statistics.geometric_mean(best):.2f}** over {len(best)} models."
                )
    return "\n".join(text) + "\n"


def call_of(measured: dict | None, batch: int, threads: int) -> dict | None:
    calls = measured["timing"]["calls"] if measured and measured["timing"] else []
    return next((c for c in calls if (c["batch"], c["threads"]) == (batch, threads)), None)


def ratio(measured: dict | None, batch: int, threads: int) -> float | None:
    call = call_of(measured, batch, threads)
    return call["times_eager"][1] if call else None


def milliseconds(measured: dict | None, batch: int, threads: int) -> float | None:
    call = call_of(measured, batch, threads)
    return call["milliseconds"][1] if call else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--threads", default="1", help="numbers of threads, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", default="onnxruntime,openvino,inductor")
    parser.add_argument("--page", action="store_true", help="only write the page from what was measured before")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name in [] if options.page else options.models or models():
        print(name, flush=True)
        threads = [int(n) for n in options.threads.split(",")]
        try:
            result = measure(name, threads, options.rounds, options.engines.split(","))
        except Exception as error:  # the table goes on without it
            print(f"  failed: {error}", file=sys.stderr, flush=True)
            continue
        (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
