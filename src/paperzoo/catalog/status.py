"""What `paperzoo verify --all` left for the catalogue: the state of every step of every paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "status.json"
LETTERS = {"builds": "B", "matches": "M", "learns": "L", "deploys": "D", "reproduces": "R"}


def read_status() -> dict[str, Any]:
    """slug -> step -> {state, text, figures, …}; empty before the first verification."""
    try:
        return json.loads(PATH.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def badge(steps: dict[str, Any]) -> str:
    """Five letters, one for each step that was passed; a dot where it does not apply, a dash where it is to come."""
    states = {name: steps.get(name, {}).get("state") for name in LETTERS}
    return "".join({"passed": letter, "n/a": "·"}.get(states[name], "-") for name, letter in LETTERS.items())
