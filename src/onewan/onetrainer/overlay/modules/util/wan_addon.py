"""The gate through which Wan 2.2 comes into OneTrainer; laid in by `onewan onetrainer install`.

OneTrainer imports every file in its registries' folders at each start. What raises there stops it
for all models; so the files there only call `join`, which says in one line what is wrong.
"""

import importlib
import sys

_closed = False


def join(gate: str, target: str) -> None:
    """Import `target`, which registers itself, and show its names in the module `gate`."""
    global _closed
    if _closed:
        return
    try:
        importlib.import_module("onewan.onetrainer.bootstrap").extend()
        found = importlib.import_module(target)
    except Exception as error:  # noqa: BLE001  (whatever it is, the other models must go on)
        _closed = True
        hint = ""
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("onewan"):
            hint = f" (install it: {sys.executable} -m pip install onewan)"
        print(f"Wan 2.2 is not available: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return
    names = {k: v for k, v in vars(found).items() if not k.startswith("_")}
    vars(sys.modules[gate]).update(names)
