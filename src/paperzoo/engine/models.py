"""Models by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from paperzoo.catalog.cards import variants
from paperzoo.errors import PaperZooError, UnknownName


def create(
    name: str,
    *,
    weights: str | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **arguments: Any,
) -> nn.Module:
    """A model by the name of its variant, as a plain `torch.nn.Module`.

    Args:
        name: for example "wide_resnet28_10"; `paperzoo list --models` prints all.
        weights: None for random weights; else a `.safetensors` file, an authors' checkpoint (recognised by its keys and
            converted), or a folder written by `save_pretrained`.
        features_only: of a classifier, its feature maps by stage instead: a `blocks.backbones.Backbone`, whose call returns
            the list of maps and which has `out_channels` and `strides`. `weights` are then the classifier's.
        out_indices: with `features_only`, which stages, counted from 0; None for all.
        arguments: what the model's function takes, for example `num_classes=10`.

    Raises:
        UnknownName: if there is no such model; names the nearest.
        PaperZooError: for an argument that the model does not take, or weights that do not fit.
    """
    if name not in variants():
        raise UnknownName("model", name, variants())
    function = getattr(variants()[name].module("model"), name)
    if features_only:
        return features(name, out_indices, weights, arguments)
    if out_indices is not None:
        raise PaperZooError("out_indices chooses feature maps: it goes with features_only=True")
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


def features(name: str, out_indices: Sequence[int] | None, weights: str | None, arguments: dict[str, Any]) -> nn.Module:
    """`create` with `features_only`."""
    from paperzoo.blocks.backbones import create_backbone

    own = weights is not None and stored_features(weights)
    try:
        model = create_backbone(name, out_indices=out_indices, weights=None if own else weights, **arguments)
    except ValueError as error:
        raise PaperZooError(f"{name}: {error}") from error
    model.paperzoo = {
        "model": name,
        "arguments": {**arguments, "features_only": True, "out_indices": list(model.taken)},
    }
    if own:
        from paperzoo.engine.weights import load_weights

        load_weights(model, weights)
    return model


def stored_features(weights: str) -> bool:
    """Whether a file or folder holds a backbone's own weights, not those of the whole classifier."""
    from paperzoo.engine.weights import read_state

    path = Path(weights).expanduser()
    return all(key.startswith("body.") for key in read_state(path / "model.safetensors" if path.is_dir() else path))


def check_arguments(name: str, function: Any, arguments: dict[str, Any]) -> None:
    """Refuse an argument that the function does not take, naming those that it does."""
    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return  # the function hands its arguments on, and the class behind it refuses what it does not know
    for argument in arguments:
        if argument not in known:
            raise UnknownName(f"argument of {name}", argument, known)
