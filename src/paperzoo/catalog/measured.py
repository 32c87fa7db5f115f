"""What `make bench` left for the catalogue, and what follows for a reader: is a work ready, buildable, or one to watch?"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from paperzoo.catalog.cards import Paper
from paperzoo.catalog.status import LETTERS, read_status

PATH = Path(__file__).parent / "measured.json"
READINESS = {
    "ready": ("ready for production", "可用于生产"),
    "buildable": ("buildable", "可构建"),
    "to watch": ("to watch", "值得关注"),
}
SLOWEST = 0.8  # of the reference's speed, like for like: below it a model is not called ready


@functools.cache
def read_measured() -> dict[str, dict[str, Any]]:
    """device -> model -> figures; empty before the first benchmark."""
    try:
        return json.loads(PATH.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def measured(paper: Paper) -> dict[str, dict[str, Any]]:
    """The benchmark's rows of a paper's models: "model · device" -> figures."""
    return {
        f"{name} · {device}": row
        for device, models in read_measured().items()
        for name, row in models.items()
        if row["paper"] == paper.slug
    }


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The benchmark's result files of one device as the few figures the catalogue shows, a row a model."""
    rows = {}
    for result in results:
        users, same = result["as_users_get_it"], result["like_for_like"]
        rows[result["model"]] = {
            "paper": result["paper"],
            "against": result["against"],
            "machine": result["machine"].get("gpu") or result["machine"]["processor"],
            "threads": result["machine"]["threads"],
            "torch": result["machine"]["torch"],
            "measures": {
                name: {
                    "ms": round(row["ours"]["median_ms"], 2),
                    "peak_mb": row["ours"].get("peak_mb"),
                    "ratio": round(row["ratio"]["median"], 3),
                    "like_for_like": round(same[name]["ratio"]["median"], 3),
                }
                for name, row in users.items()
                if row.get("ratio")
            },
        }
    return rows


def readiness(paper: Paper, status: dict[str, Any] | None = None) -> tuple[str, str]:
    """("ready" | "buildable" | "to watch", why), from what `verify` and `bench` measured.

    ready       every step up to deploys passed or does not apply, "matches" and "learns" passed, a run on the paper's data did not miss its
                number, and a model of it was measured beside its reference and is not much slower
    buildable   there is code and no step failed; what is missing is named
    to watch    no code yet, or a step failed
    """
    if not paper.has_code:
        return "to watch", "a work to read" if paper.card["kind"] == "reading" else "no code yet"
    steps = (status or read_status()).get(paper.slug)
    if not steps:
        return "to watch", "not verified yet"
    states = {name: steps.get(name, {}).get("state", "not run") for name in LETTERS}
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        return "to watch", f"{failed[0]} failed"
    missing = [name for name in ("builds", "matches", "learns", "deploys") if states[name] not in ("passed", "n/a")]
    if missing or (states["matches"], states["learns"]) != ("passed", "passed"):
        return "buildable", f"{', '.join(missing) or 'matches and learns'} not passed"
    if states["reproduces"] == "not reproduced":
        return "buildable", "verified, but its published number was not reached"
    rows = measured(paper)
    if not rows:
        return "buildable", "verified; its speed was not measured beside a reference"
    slowest = min(m["like_for_like"] for row in rows.values() for m in row["measures"].values())
    if slowest < SLOWEST:
        return "buildable", f"verified, but at {slowest:.2f} of the reference's speed in one measurement"
    return "ready", f"verified, and at {slowest:.2f} of the reference's speed or better"
