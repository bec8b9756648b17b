"""Loads the Wan 2.2 add-on, which `onewan onetrainer install` put here.

OneTrainer imports every file in the folders of its registries at each start, and an exception there
stops it for all models. So those files only call `join`, which prints one line if something fails.
"""

import importlib
import sys

_disabled = False


def join(gate: str) -> None:
    """Import the module in the folder `wan` beside the module `gate`; it registers its classes."""
    global _disabled
    if _disabled:
        return
    folder, _, name = gate.rpartition(".")
    try:
        importlib.import_module("onewan.onetrainer.patches").extend()
        importlib.import_module(f"{folder}.wan.{name}")
    except Exception as error:  # noqa: BLE001  (the other models must still train)
        _disabled = True
        hint = ""
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("onewan"):
            hint = f" (install it: {sys.executable} -m pip install onewan)"
        print(f"Wan 2.2 is not available: {type(error).__name__}: {error}{hint}", file=sys.stderr)
