"""Imports that answering never needs, put off: a model process is up in a third of the time.

Two packages take most of the time of a start, and serving uses neither: torch's compiler, which torchvision and every
optimizer import for decorators that mean "do not compile this" (nothing is compiled here), and torchmetrics, which brings
matplotlib and more. While a model is opened, stand-ins take their places; what is used after all is imported then.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PUT_OFF = "torchmetrics"


class Later:
    """A name of a module that is imported when it is used: called, read from, or inherited from."""

    def __init__(self, module: str, name: str) -> None:
        self.__dict__.update(_module=module, _name=name)

    def real(self) -> Any:
        finders[:] = []  # from now on imports are what they are
        for name in [n for n in sys.modules if n.partition(".")[0] == PUT_OFF and is_stand_in(sys.modules[n])]:
            del sys.modules[name]
        return getattr(import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real(), name)

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (self.real(),)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.real())


class StandIn(ModuleType):
    """A module whose names are all `Later`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Later(self.__name__, name)


def is_stand_in(module: ModuleType) -> bool:
    return isinstance(module, StandIn)


finders: list[MetaPathFinder] = []


class Finder(MetaPathFinder, Loader):
    """Gives a stand-in for `PUT_OFF` and all that is in it, as long as nothing of it was used."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PUT_OFF or self not in finders:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def without_metrics() -> None:
    """From now on torchmetrics is imported when something of it is used."""
    if PUT_OFF not in sys.modules:
        finders.append(Finder())
        sys.meta_path.insert(0, finders[-1])


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """While this lasts, `torch._dynamo` is a module that compiles nothing; afterwards it is imported when it is needed."""
    import torch

    if "torch._dynamo" in sys.modules:
        yield
        return
    compiler, parts = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    compiler.__path__ = []
    compiler.disable = as_it_is
    compiler.utils = parts
    parts.is_compile_supported = lambda device: False
    modules = {"torch._dynamo": compiler, "torch._dynamo.utils": parts}
    sys.modules.update(modules)
    torch._dynamo = compiler
    try:
        yield
    finally:
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        if vars(torch).get("_dynamo") is compiler:
            del torch._dynamo


def as_it_is(function: Callable | None = None, *args: Any, **kwargs: Any) -> Any:
    """What "do not compile this" comes to where nothing is compiled."""
    return function if function is not None else lambda f: f
