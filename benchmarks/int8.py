"""What int8 costs: papers trained on their embedded data, then quantised; how many answers stay the same, and the metric.

python benchmarks/int8.py [PAPER … | --page]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from paperzoo.engine.bench import machine
from paperzoo.engine.optimize import described, optimize
from paperzoo.engine.run import train
from paperzoo.errors import PaperZooError

FOLDER = Path(__file__).parent / "int8"
NAMES = (
    "wide_resnet resnet mobilenet_v1 efficientnet convnext swin_v2 csra retinanet ssd yolox faster_rcnn fcn simple_baseline_pose "
    "pixel_aggregation_network hashnet fnet dcn_v2 fno"
).split()


def measure(name: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run = train(name, folder=Path(folder) / "run", report=False)
        try:
            result = optimize(run.folder, precision="int8", rounds=3)
        except PaperZooError as error:  # no engine keeps enough
            return {"paper": name, "refused": str(error).replace(str(run.folder), "the run")}
    rows = [described(c) for c in (result.eager, *result.candidates)]
    return {
        "paper": name,
        "monitor": result.monitor,
        "best": result.best.name,
        "machine": machine("cpu", None),
        "measured": rows,
    }


def page() -> str:
    text = [
        "# What int8 costs",
        "",
        "Written by `python benchmarks/int8.py`: each paper's embedded preset, quantised with 128 training inputs; layers go back to fp32 until at most 1% of the metric is lost and 99% of the answers stay.",
        "*Same* is the share of the answers on held-out inputs (classes, labels, pixels, objects) that are those of the fp32 network; a dash",
        "where a task answers with numbers. *Kept* counts layers that stay in fp32. Networks of this size gain less speed than published ones.",
        "",
        "| paper | metric | fp32 | engine | int8 | same | kept | size | batch 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(FOLDER.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if "refused" in row:
            text.append(f"| {row['paper']} | | | | {row['refused']} | | | | |")
            continue
        name, (eager, *rest) = row["monitor"][0], row["measured"]
        for made in rest:
            if made["reason"] and made["engine"] == "inductor":
                continue
            if made["reason"]:
                text.append(
                    f"| {row['paper']} | {name} | {eager['metrics'][name]:.4f} | {made['engine']} | {made['reason'][:90]} | | | | |"
                )
                continue
            same = "–" if made["same"] is None else f"{made['same']:.2%}"
            ratio = made["timing"]["calls"][0]["times_eager"][1]
            text.append(
                f"| {row['paper']} | {name} | {eager['metrics'][name]:.4f} | {made['engine']} | {made['metrics'][name]:.4f} | {same} | "
                f"{made['kept']} | {made['bytes'] / eager['bytes']:.2f} | {ratio:.2f} |"
            )
    return "\n".join(text) + "\n"


def main() -> None:
    if sys.argv[1:] == ["--page"]:
        (FOLDER / "README.md").write_text(page(), encoding="utf-8")
        return
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        try:
            result = measure(name)
        except PaperZooError as error:  # the table goes on without it
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        rows = [(c["engine"], c["same"], c["metrics"], c["reason"]) for c in result.get("measured", [])]
        print(name, result.get("best") or result["refused"], rows, flush=True)
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
