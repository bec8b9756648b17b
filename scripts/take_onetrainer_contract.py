"""Take what the OneTrainer add-on relies on from a checkout: names and signatures, as data.

    python scripts/take_onetrainer_contract.py PATH

Run it when the add-on comes to use more of OneTrainer, or is made for a newer commit; then look at
the difference of src/onewan/onetrainer/contract.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from onewan.onetrainer.contract import take

OUT = Path(__file__).parents[1] / "src" / "onewan" / "onetrainer" / "contract.json"


def main() -> int:
    root = Path(sys.argv[1])

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    taken = {
        "repository": "https://github.com/Nerogar/OneTrainer",
        "commit": git("rev-parse", "HEAD"),
        "date": git("show", "-s", "--format=%cs", "HEAD"),
        "modules": take(root),
    }
    OUT.write_text(json.dumps(taken, indent=1) + "\n", encoding="utf-8")
    print(f"{OUT}: {sum(map(len, taken['modules'].values()))} names of {taken['commit'][:8]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
