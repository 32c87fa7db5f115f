"""Weights: safetensors with the configuration beside them, the Hub's file layout, authors' checkpoints recognised.

A folder written by `save_pretrained` holds `config.json` (the model's name and arguments, labels and whatever predicting
needs) and `model.safetensors`, as on the Hugging Face Hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperzoo.engine.files import write_atomically, write_text
from paperzoo.errors import PaperZooError

WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "net", "params_ema", "params", "weights", "module")


def save_weights(path: Path, model: nn.Module, state: dict[str, Tensor] | None = None) -> None:
    """A network's parameters and buffers as safetensors; tensors that share memory are stored under each of their names."""
    from safetensors.torch import save_file

    state = model.state_dict() if state is None else state
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()}
    write_atomically(path, lambda part: save_file(tensors, str(part), metadata={"format": "pt"}))


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a pickled checkpoint, taken out of the usual wrappers.

    Raises:
        PaperZooError: if the file is missing, damaged, unsafe, or holds no tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except FileNotFoundError:
            raise PaperZooError(f"{path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise PaperZooError(f"{path}: not a readable safetensors file ({error})") from None
    from paperzoo.engine.checkpoint import read_pickle_safely

    state = read_pickle_safely(path)
    if isinstance(state, dict) and state.get("format") == 1 and "recipe" in state:  # one of our own checkpoints
        state = state["recipe"].get("model", {})
    while isinstance(state, dict) and not any(isinstance(v, Tensor) for v in state.values()):
        inner = next((state[k] for k in WRAPPERS if isinstance(state.get(k), dict)), None)
        if inner is None:
            break
        state = inner
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise PaperZooError(f"{path}: holds no tensors by name; a state_dict is needed")
    if all(k.startswith("module.") for k in tensors):  # saved from a data-parallel wrapper
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Fill a model from a file or a folder; the authors' names are converted by the paper's `from_official`.

    A file of a format of the authors' own is read by the paper's `read_official(path, model)`, which gives None for others.

    Raises:
        PaperZooError: if the weights do not fit, naming the first missing, unexpected and mis-shaped keys.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    name = getattr(model, "paperzoo", {}).get("model")
    read = of_paper(name, "read_official")
    state = read(path, model) if read is not None else None
    if state is None:
        state = read_state(path)
    problem = misfit(model, state)
    if problem:
        convert = of_paper(name, "from_official")
        if convert is not None:
            try:
                converted = convert(state)
            except (KeyError, ValueError, IndexError, RuntimeError, AttributeError):
                converted = state
            if misfit(model, converted) is None:
                state, problem = converted, None
    if problem:
        raise PaperZooError(
            f"{path}: these weights do not fit {getattr(model, 'paperzoo', {}).get('model', type(model).__name__)}: {problem}"
        )
    model.load_state_dict(state)


def of_paper(name: str | None, function: str) -> Any:
    """A function in the module of the paper that has this model, if there is one."""
    from paperzoo.catalog.cards import variants

    return None if name not in variants() else getattr(variants()[name].module("model"), function, None)


def misfit(model: nn.Module, state: dict[str, Tensor]) -> str | None:
    """What keeps a state from being loaded, or None. Buffers that a model resizes on loading may have any length."""
    here = model.state_dict()
    flexible = tuple(getattr(model, "resizable_buffers", ()))
    missing = [k for k in here if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in here]
    shaped = [k for k in here if k in state and here[k].shape != state[k].shape and k not in flexible]
    parts = []
    if missing:
        parts.append(f"missing {some(missing)}")
    if unexpected:
        parts.append(f"unexpected {some(unexpected)}")
    if shaped:
        k = shaped[0]
        parts.append(f"wrong shape {some(shaped)} ({k} is {tuple(state[k].shape)}, should be {tuple(here[k].shape)})")
    if not parts and any(k not in state for k in here):
        state.update({k: v for k, v in here.items() if k not in state})  # old files have no batch counter
    return "; ".join(parts) or None


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- the Hub's layout --------------------------------------------------------------------------------------------------


def save_pretrained(model: nn.Module, folder: str | Path, **facts: Any) -> Path:
    """Write a model that came from `create` as `config.json` and `model.safetensors`.

    Raises:
        PaperZooError: if the model does not come from `create`, or the folder cannot be written.
    """
    origin = getattr(model, "paperzoo", None)
    if origin is None:
        raise PaperZooError(
            "save_pretrained needs a model made by paperzoo.create: its name and arguments are stored too"
        )
    import paperzoo

    folder = Path(folder)
    config = {"library_name": "paperzoo", "paperzoo_version": paperzoo.__version__, **origin, **facts}
    save_weights(folder / "model.safetensors", model)
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PaperZooError(f"{path}: no such file; a folder written by save_pretrained is needed") from None
    except (OSError, ValueError) as error:
        raise PaperZooError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise PaperZooError(f"{path}: has no 'model'; was it written by paperzoo?")
    return config


def from_pretrained(source: str | Path, **arguments: Any) -> nn.Module:
    """A model from a folder, or from a repository on the Hub ("owner/name"; needs a network).

    Raises:
        PaperZooError: if the folder or repository cannot be read, or the weights do not fit.
    """
    from paperzoo.engine.models import create

    folder = Path(source).expanduser()
    if not folder.is_dir():
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise PaperZooError(f"{source}: no such folder, and not a Hub repository (owner/name)")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(source), allow_patterns=["config.json", "model.safetensors"]))
        except Exception as error:
            raise PaperZooError(f"{source}: cannot be fetched from the Hub ({type(error).__name__})") from None
    config = read_config(folder)
    stored = config.get("arguments")
    return create(config["model"], weights=str(folder), **{**(stored if isinstance(stored, dict) else {}), **arguments})


def push_to_hub(
    model: nn.Module, repository: str, *, private: bool = False, token: str | None = None, **facts: Any
) -> str:
    """Save a model and upload it to the Hub as "owner/name"; returns its address."""
    import tempfile

    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **facts)
        card = f'---\nlibrary_name: paperzoo\n---\n\n`paperzoo.from_pretrained("{repository}")`\n'
        write_text(Path(folder) / "README.md", card)
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository))


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same tensors, bit for bit."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
