"""Record the names and signatures of OneTrainer that the add-on depends on, from a checkout.

    PYTHON_OF_ONETRAINER scripts/take_onetrainer_contract.py PATH [MODULE:NAME ...]

The names are those of src/onewan/onetrainer/contract.json, those of the patches, and those that
are given, such as modules.util.config.TrainConfig:TrainConfig.lora_rank or
mgds.PipelineModule:PipelineModule.init. Those of packages are read from the environment that runs
it. Run it if the add-on uses more of OneTrainer, or is made for a newer commit; then look at the
difference of contract.json.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onewan.onetrainer.contract import PACKAGES, contract, record
from onewan.onetrainer.install import overlay
from onewan.onetrainer.patches import PATCHES

OUT = Path(__file__).parents[1] / "src" / "onewan" / "onetrainer" / "contract.json"


def _names(more: list[str]) -> dict[str, set[str]]:
    known = {**contract()["modules"], **contract()["packages"]}
    names = {module: set(facts) for module, facts in known.items()}
    for patch in PATCHES:
        for module, used in patch.names().items():
            names.setdefault(module, set()).update(used)
    for name in more:
        module, _, member = name.partition(":")
        names.setdefault(module, set()).add(member)
    return names


def _derived() -> set[str]:
    """The names of the classes that those of the overlay are derived from."""
    trees = [ast.parse(data) for name, data in overlay().items() if name.endswith(".py")]
    classes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    return {ast.unparse(base) for node in classes for base in node.bases}


def _packages(names: dict[str, set[str]]) -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{package}: is not installed here; run OneTrainer's own interpreter")
        inside = {m: used for m, used in names.items() if m.partition(".")[0] == package}
        recorded |= record(
            Path(next(iter(spec.submodule_search_locations))).parent, inside, _derived()
        )
    return recorded


def main() -> int:
    root = Path(sys.argv[1])

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    names = _names(sys.argv[2:])
    own = {module: used for module, used in names.items() if module.startswith("modules.")}
    recorded = {
        "repository": "https://github.com/Nerogar/OneTrainer",
        "commit": git("rev-parse", "HEAD"),
        "date": git("show", "-s", "--format=%cs", "HEAD"),
        "modules": record(root, own, _derived()),
        "packages": _packages(names),
    }
    OUT.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    count = sum(len(facts) for part in ("modules", "packages") for facts in recorded[part].values())
    print(f"{OUT}: {count} names of {recorded['commit'][:8]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
