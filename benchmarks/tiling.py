"""What windows cost and save: peak memory, seconds and the difference to the whole picture, for pictures and volumes that grow.

    python benchmarks/tiling.py [--threads 1]

Each measurement is a process of its own. The input lies in a file that is mapped into memory, and so does the tiled result. Memory is what the process held
at most above what it held with the network loaded. U-Net's margin is at least its receptive field's radius, so that the tiled result is the whole picture's. V-Net sees
farther than a window; its parts are blended, as is usual for volumes, and the difference shows what it would have seen beyond.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from paperzoo.blocks.tiling import tiled
from paperzoo.engine.bench import machine
from paperzoo.engine.models import create

FOLDER = Path(__file__).parent / "tiling"
# model, its arguments, channels, window, margin, extents that grow
CASES = {
    "unet_padded": ({"num_classes": 2}, 3, (512, 512), 96, ((512, 512), (1024, 1024), (1536, 1536))),
    "vnet": ({}, 1, (64, 64, 64), 0, ((64, 64, 64), (128, 96, 96), (128, 128, 128))),
}


def peak() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mapped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 numbers of `shape` from a file, read as they are needed."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)


def one(name: str, way: str, size: tuple[int, ...], folder: Path, threads: int) -> dict[str, float]:
    """The network over one input, "whole" or "tiled", in this process; the result goes to a file of the folder."""
    arguments, channels, window, margin, _ = CASES[name]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = create(name, **arguments).eval()
    inputs = mapped(folder / "inputs.bin", (1, channels, *size))
    before, start = peak(), time.perf_counter()
    if way == "whole":
        with torch.inference_mode():
            result = network(inputs)
        seconds, held = time.perf_counter() - start, peak() - before
        mapped(folder / "whole.bin", tuple(result.shape)).copy_(result)
    else:
        overlap = 0.5 if not margin else 2 * margin / window[0]
        result = tiled(network, inputs, window, overlap, 1, margin=margin, memory_map=folder / "tiled.bin")
        seconds, held = time.perf_counter() - start, peak() - before
    return {"seconds": seconds, "peak_bytes": held, "shape": list(result.shape)}


def measure(name: str, size: tuple[int, ...], threads: int) -> dict:
    """Both ways, each in its own process, and how far their results are apart."""
    channels = CASES[name][1]
    row: dict = {"model": name, "size": list(size)}
    with tempfile.TemporaryDirectory() as work:
        folder, shape = Path(work), (1, channels, *size)
        mapped(folder / "inputs.bin", shape).copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        for way in ("tiled", "whole"):
            command = [sys.executable, __file__, "--one", name, way, ",".join(map(str, size)), work]
            done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                row[way] = json.loads(done.stdout)
            else:  # out of memory, most likely
                row[way] = {"reason": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
        if "shape" in row["whole"]:
            whole, parts = (mapped(folder / f"{way}.bin", tuple(row["whole"]["shape"])) for way in ("whole", "tiled"))
            row["difference"] = float((whole - parts).abs().max() / whole.abs().max())
    return row


def page(rows: list[dict], where: dict) -> str:
    text = [
        "# Windows",
        "",
        "Written by `python benchmarks/tiling.py`. The network over the whole input, and by windows (`paperzoo.blocks.tiling.tiled`, one at a time) with input and",
        "result in files. Memory is the most that the process held above what it held with the network loaded (pages of the files that happen to be in memory",
        "count, and can be dropped by the system). The difference is the largest, over the largest output: none to rounding with a margin of at least the",
        "receptive field's radius; without one (V-Net, whose field is larger than a window) it shows what a window does not see, with random weights.",
        "",
        f"{where['processor']}, {where['threads']} thread, torch {where['torch']}.",
        "",
        "| model | input | window | memory, whole | memory, windows | seconds, whole | seconds, windows | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        window, margin = CASES[row["model"]][2:4]
        cells = [row["model"], " x ".join(map(str, row["size"])), " x ".join(map(str, window))]
        cells[2] += f", margin {margin}" if margin else ""
        for key, unit in (("peak_bytes", 2**20), ("seconds", 1)):
            for way in ("whole", "tiled"):
                value = row[way].get(key)
                cells.append("–" if value is None else f"{value / unit:.0f} MiB" if unit > 1 else f"{value:.1f}")
        cells.append(f"{row['difference']:.1e}" if "difference" in row else "–")
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "WAY", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, way, size, folder = options.one
        found = one(name, way, tuple(map(int, size.split(","))), Path(folder), options.threads)
        print(json.dumps(found))
        return
    rows = []
    for name, (*_, sizes) in CASES.items():
        for size in sizes:
            rows.append(measure(name, size, options.threads))
            print(json.dumps(rows[-1]), flush=True)
    FOLDER.mkdir(exist_ok=True)
    where = machine("cpu", options.threads)
    (FOLDER / "cpu.json").write_text(
        json.dumps({"machine": where, "measured": rows}, indent=1) + "\n", encoding="utf-8"
    )
    (FOLDER / "README.md").write_text(page(rows, where), encoding="utf-8")


if __name__ == "__main__":
    main()
