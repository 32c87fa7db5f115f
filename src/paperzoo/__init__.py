"""PaperZoo: papers that run.

    import paperzoo

    paperzoo.search("residual network")                  # papers, best first
    model = paperzoo.create("wide_resnet28_10", num_classes=10)
    result = paperzoo.run("wide_resnet")                 # train, evaluate, predict, report, on data that is always there
    recipe = paperzoo.load("runs/wide_resnet/…")         # a finished run: recipe.predict([...])
    paperzoo.paper("fixmatch").path                      # the folder to read

Importing this package imports nothing heavy; torch is loaded by the first call that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "create": "paperzoo.engine.models",
    "load": "paperzoo.engine.run",
    "run": "paperzoo.engine.run",
    "train": "paperzoo.engine.run",
    "save_pretrained": "paperzoo.engine.weights",
    "from_pretrained": "paperzoo.engine.weights",
    "push_to_hub": "paperzoo.engine.weights",
    "search": "paperzoo.catalog.search",
    "list_models": "paperzoo.catalog.search",
    "PaperZooError": "paperzoo.errors",
}

__all__ = ["paper", *_HOMES]


def paper(name: str):
    """The catalogue's entry for a slug, name, alias or model name: facts, folder, modules."""
    from paperzoo.catalog.cards import find

    return find(name)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'paperzoo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
