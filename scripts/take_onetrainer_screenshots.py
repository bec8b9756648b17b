"""Take the pictures of docs/onetrainer.md: make pictures ONETRAINER=PATH.

Works on a copy of the checkout, by its own interpreter (or ONETRAINER_PYTHON), without a display.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from onewan.onetrainer.environment import python_in
from onewan.onetrainer.install import install

HERE = Path(__file__).parents[1]
WINDOWS = HERE / "tests" / "support" / "onetrainer_windows.py"
PRESET = "resources/wan_presets/#wan 2.2 T2V A14B LoRA.json"
SHOWN = ("model", "training", "sample")
"""Of the tabs and windows that are taken, those that the page shows."""
COLORS = 64
HUB = "/home/you/.cache/huggingface"
"""Shown in the window; whose machine it is does not matter."""


def main() -> int:
    if len(sys.argv) != 3 or not sys.argv[1]:
        print("give the checkout: make pictures ONETRAINER=PATH", file=sys.stderr)
        return 2
    checkout, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    python = os.environ.get("ONETRAINER_PYTHON") or python_in(checkout) or sys.executable
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy, shots = Path(folder) / "OneTrainer", Path(folder) / "shots"
        subprocess.run(["git", "clone", "-q", str(checkout), str(copy)], check=True)
        install(copy)
        session = {"__version": 11, **json.loads((copy / PRESET).read_text(encoding="utf-8"))}
        last = copy / "training_presets" / "#.json"
        last.write_text(json.dumps(session), encoding="utf-8")
        command = [str(python), str(WINDOWS), "qt", str(shots), "again"]
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": HUB}
        subprocess.run(command, cwd=copy, env={**os.environ, **quiet}, check=True)
        for shot in sorted(shots.glob("*.png")):
            name = shot.stem.removeprefix("qt_").lower()
            if name in SHOWN:
                picture = Image.open(shot).convert("RGB").quantize(COLORS)
                picture.save(out / f"onetrainer_{name}.png")
                print(out / f"onetrainer_{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
