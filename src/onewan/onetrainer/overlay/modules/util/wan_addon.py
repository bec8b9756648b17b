"""Loads the Wan 2.2 add-on, which `onewan onetrainer install` put here.

OneTrainer imports every file in the folders of its registries at each start, and an exception there
stops it for all models. So those files only call `join`. The first call loads the whole add-on or
nothing of it: if something fails, OneTrainer is as without it, and one line says why.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

_MODULES = (
    "modules.modelSampler.wan.WanSampler",
    "modules.modelLoader.wan.WanModelLoader",
    "modules.modelSaver.wan.WanModelSaver",
    "modules.modelSetup.wan.WanModelSetup",
    "modules.dataLoader.wan.WanBaseDataLoader",
)
"""Those that register the classes of Wan."""

_joined = False


def join() -> None:
    """Add Wan 2.2 to this OneTrainer; calls after the first do nothing."""
    global _joined
    if _joined:
        return
    _joined = True
    try:
        with importlib.import_module("onewan.onetrainer.patches").extended():
            for module in _MODULES:
                _require_complete(importlib.import_module(module))
    except Exception as error:  # noqa: BLE001  (the other models must still train)
        hint = ""
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("onewan"):
            hint = f" (install it: {sys.executable} -m pip install onewan)"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"Wan 2.2 is not available: {reason}{hint}", file=sys.stderr)


def names_of(gate: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that looks names up in the module of that name in the folder `wan`
    beside it. Only when they are used: that module may be the one which is importing the gate."""
    folder, _, module = gate.rpartition(".")

    def found(name: str) -> Any:
        if name.startswith("__"):  # Python itself asks for these, of every module
            raise AttributeError(name)
        try:
            return getattr(importlib.import_module(f"{folder}.wan.{module}"), name)
        except AttributeError:
            raise AttributeError(f"module {gate!r} has no attribute {name!r}") from None

    return found


def _require_complete(module):
    """TypeError if a class does not define an abstract method of this OneTrainer."""
    for name, found in vars(module).items():
        own = inspect.isclass(found) and found.__module__ == module.__name__
        if own and not name.startswith("_") and inspect.isabstract(found):
            missing = ", ".join(sorted(found.__abstractmethods__))
            raise TypeError(f"{name} has no {missing}, which this OneTrainer needs; update onewan")
