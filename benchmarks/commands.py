"""How long the catalogue's commands take as whole processes, start included, with warm caches: writes results/commands.json.

python benchmarks/commands.py [runs]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import paperzoo
from paperzoo.catalog.cards import papers

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    **{
        f"paperzoo {' '.join(words)}": [str(Path(sys.executable).parent / "paperzoo"), *words]
        for words in (
            ["search", "CTR"],
            ["search", "小样本"],
            ["search", "real-time segmentation"],
            ["search", "objekt detecton"],
            ["search", "segmentation", "--area", "medical"],
            ["list"],
            ["show", "resnet"],
            ["board", "Cityscapes"],
        )
    },
}


def main(runs: int = 15) -> None:
    # as on a user's machine: compiled modules are kept, output is buffered
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    figures = {}
    for name, command in COMMANDS.items():
        subprocess.run(command, capture_output=True, check=True, env=environment)  # caches
        seconds = []
        for _ in range(runs):
            started = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True, env=environment)
            seconds.append(time.perf_counter() - started)
        milliseconds = sorted(1000 * s for s in seconds)
        figures[name] = {"median_ms": round(statistics.median(milliseconds)), "slowest_ms": round(milliseconds[-1])}
        print(f"{name:<44}{figures[name]['median_ms']:>6} ms, slowest of {runs}: {figures[name]['slowest_ms']} ms")
    result = {
        "works": len(papers()),
        "runs": runs,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "paperzoo": paperzoo.__version__,
        "commands": figures,
    }
    path = Path(__file__).parent / "results" / "commands.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
