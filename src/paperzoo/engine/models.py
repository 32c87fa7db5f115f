"""Models by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from paperzoo.catalog.cards import variants
from paperzoo.errors import PaperZooError, UnknownName


def create(name: str, *, weights: str | None = None, **arguments: Any) -> nn.Module:
    """A model by the name of its variant, as a plain `torch.nn.Module`.

    Args:
        name: for example "wide_resnet28_10"; `paperzoo list --models` prints all.
        weights: None for random weights; else a `.safetensors` file, an authors' checkpoint (recognised by its keys and
            converted), or a folder written by `save_pretrained`.
        arguments: what the model's function takes, for example `num_classes=10`.

    Raises:
        UnknownName: if there is no such model; names the nearest.
        PaperZooError: for an argument that the model does not take, or weights that do not fit.
    """
    if name not in variants():
        raise UnknownName("model", name, variants())
    function = getattr(variants()[name].module("model"), name)
    check_arguments(name, function, arguments)
    try:
        model = function(**arguments)
    except (ValueError, TypeError) as error:
        raise PaperZooError(f"{name}: {error}") from error
    model.paperzoo = {"model": name, "arguments": arguments}
    if weights is not None:
        from paperzoo.engine.weights import load_weights

        load_weights(model, weights)
    return model


def check_arguments(name: str, function: Any, arguments: dict[str, Any]) -> None:
    """Refuse an argument that the function does not take, naming those that it does."""
    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return  # the function hands its arguments on, and the class behind it refuses what it does not know
    for argument in arguments:
        if argument not in known:
            raise UnknownName(f"argument of {name}", argument, known)
