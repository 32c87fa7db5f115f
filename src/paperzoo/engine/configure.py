"""Configurations: presets changed field by field, checked, written to and read from a run's config.toml."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from paperzoo.errors import PaperZooError, UnknownName

MODEL_ARGUMENTS = "model_arguments"
"""The field of a config that holds what its model's function is given besides: a dict of plain values."""


def configure(config: Any, changes: dict[str, Any], what: str = "option") -> Any:
    """A frozen dataclass with some fields changed and everything validated.

    Args:
        changes: field -> value; "student.steps" reaches into a nested config, "model.backbone" is an argument of the
            model's function. Text is read as JSON where that fits the field.

    Raises:
        UnknownName: for a field that does not exist; PaperZooError: for a value that does not fit.
    """
    values = dataclasses.asdict(config)
    for name, value in changes.items():
        name = name.replace("-", "_")
        argument = model_argument(values, name)
        if argument:
            values[MODEL_ARGUMENTS][argument] = plain_value(value)
            continue
        try:
            values_at(values, name)
        except (KeyError, TypeError):
            raise UnknownName(what, name, field_names(config)) from None
        set_at(values, name, plain_value(value))
    return validated(type(config), values, what, changes)


def model_argument(values: dict[str, Any], name: str) -> str | None:
    """ "model.backbone" of a config with a model by name is the model's argument "backbone"; None for other names."""
    head, _, argument = name.partition(".")
    is_model = head == "model" and isinstance(values.get("model"), str) and MODEL_ARGUMENTS in values
    return argument if is_model and argument and "." not in argument else None


def plain_value(text: Any) -> Any:
    """Text from a command line as the value it spells: a number, true, none, a list; else the text itself."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def validated(kind: type, values: dict[str, Any], what: str = "option", given: dict[str, Any] | None = None) -> Any:
    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        # text that spells a number or none on a command line may be meant as text: --weights 7, --augment none
        raw = {k.replace("-", "_"): v for k, v in (given or {}).items() if isinstance(v, str)}
        texts = {".".join(map(str, e["loc"])) for e in error.errors()} & raw.keys()
        if texts:
            literal = json.loads(json.dumps(values, default=str))
            for t in texts:
                set_at(literal, t, raw[t])
            with contextlib.suppress(ValidationError):
                return adapter.validate_python(literal)
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function"))
        message = first["msg"][0].lower() + first["msg"][1:]
        raise PaperZooError(f"{what} '{name}' is {first['input']!r}: {message}") from None


def values_at(values: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def set_at(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        values = values[part]
    values[last] = value


def field_names(config: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        names += field_names(value, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return names


def to_toml(value: Any, prefix: str = "") -> tuple[Any, list[str]]:
    """Values as TOML can hold them, and the names of those that are None, which it cannot."""
    if isinstance(value, dict):
        result, empty = {}, []
        for key, item in value.items():
            if item is None:
                empty.append(prefix + key)
            else:
                result[key], more = to_toml(item, f"{prefix}{key}.")
                empty += more
        return result, empty
    if isinstance(value, list | tuple):
        return [to_toml(item)[0] for item in value], []
    return (str(value) if isinstance(value, Path) else value), []


def dump(config: Any) -> dict[str, Any]:
    """A config as TOML data; None values are listed under "none"."""
    values, empty = to_toml(dataclasses.asdict(config))
    return values | ({"none": empty} if empty else {})


def restore(kind: type, values: dict[str, Any]) -> Any:
    """The inverse of `dump`."""
    values = json.loads(json.dumps(values))
    for name in values.pop("none", []):
        set_at(values, name, None)
    return validated(kind, values, "config.toml: field")


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PaperZooError(f"{path}: no such file; the folder of a run is needed (runs/<name>/<time>)") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PaperZooError(f"{path}: not readable TOML ({error})") from None
