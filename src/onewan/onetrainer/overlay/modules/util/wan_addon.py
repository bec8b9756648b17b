"""Loads the Wan 2.2 add-on, which `onewan onetrainer install` put here.

OneTrainer imports every file in the folders of its registries at each start, and an exception there
stops it for all models. So those files only call `join`, which prints one line if something fails.
"""

import importlib
import sys

_disabled = False


def join(gate: str, target: str) -> None:
    """Import `target`, which registers itself, and copy its names into the module `gate`."""
    global _disabled
    if _disabled:
        return
    try:
        importlib.import_module("onewan.onetrainer.bootstrap").extend()
        found = importlib.import_module(target)
    except Exception as error:  # noqa: BLE001  (the other models must still train)
        _disabled = True
        hint = ""
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("onewan"):
            hint = f" (install it: {sys.executable} -m pip install onewan)"
        print(f"Wan 2.2 is not available: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return
    names = {k: v for k, v in vars(found).items() if not k.startswith("_")}
    vars(sys.modules[gate]).update(names)
