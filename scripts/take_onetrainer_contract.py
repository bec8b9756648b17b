"""Record the names and signatures of OneTrainer that the add-on depends on, from a checkout.

    python scripts/take_onetrainer_contract.py PATH [MODULE:NAME ...]

The names are those of src/onewan/onetrainer/contract.json, those of the patches, and those that
are given, such as modules.util.config.TrainConfig:TrainConfig.lora_rank. Run it if the add-on uses
more of OneTrainer, or is made for a newer commit; then look at the difference of contract.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from onewan.onetrainer.contract import contract, record
from onewan.onetrainer.patches import PATCHES

OUT = Path(__file__).parents[1] / "src" / "onewan" / "onetrainer" / "contract.json"


def _names(more: list[str]) -> dict[str, set[str]]:
    names = {module: set(facts) for module, facts in contract()["modules"].items()}
    for patch in PATCHES:
        for module, used in patch.names().items():
            names.setdefault(module, set()).update(used)
    for name in more:
        module, _, member = name.partition(":")
        names.setdefault(module, set()).add(member)
    return names


def main() -> int:
    root = Path(sys.argv[1])

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    recorded = {
        "repository": "https://github.com/Nerogar/OneTrainer",
        "commit": git("rev-parse", "HEAD"),
        "date": git("show", "-s", "--format=%cs", "HEAD"),
        "modules": record(root, _names(sys.argv[2:])),
    }
    OUT.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(f"{OUT}: {sum(map(len, recorded['modules'].values()))} names of {recorded['commit'][:8]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
