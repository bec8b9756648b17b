"""Test onewan as others install it: `wheel`, or with the oldest supported packages (`oldest`).

    .venv/bin/python scripts/check_installations.py wheel | oldest

Both make an environment of their own in a temporary folder. It sees the packages of the one that
runs this script, so that torch is not downloaded again, but not its editable onewan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / "oldest-requirements.txt"

# What touches the packages of which OLDEST has other versions.
OLDEST_TESTS = (
    *("tests/unit/test_media.py", "tests/unit/test_embedding.py", "tests/unit/test_model_load.py"),
    *("tests/unit/test_conditioning.py", "tests/golden"),
)


class Environment:
    """A virtual environment on top of the one that runs this script."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = folder / scripts / f"python{'.exe' if os.name == 'nt' else ''}"
        self.scripts = folder / scripts
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        self.packages = Path(paths["purelib"])
        self.packages.mkdir(parents=True, exist_ok=True)
        # Paths in a .pth file are searched last, and .pth files in them, such as that of an
        # editable onewan, are not read.
        below = f"{sysconfig.get_path('purelib')}\n"
        (self.packages / "below.pth").write_text(below, encoding="utf-8")

    def install(self, *what: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        run([*pip, "install", "-qq", "--no-deps", "--no-warn-conflicts", *what], ROOT)


def run(command: list[str], folder: Path) -> str:
    """The output of a command; SystemExit with it if the command fails."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    print(f"$ {' '.join(command)}", flush=True)
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{command[0]} ended with {done.returncode}")
    return done.stdout


def check_wheel(folder: Path) -> None:
    """Build the wheel, compare it with the repository, and use the commands that need its data."""
    run([sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", str(folder), "."], ROOT)
    (wheel,) = folder.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = run(["git", "ls-files", "-z", "--", "src/onewan"], ROOT).split("\0")
    names = {name.removeprefix("src/") for name in tracked if name}
    if missing := sorted(names - held):
        raise SystemExit(f"{wheel.name}: {len(missing)} files are missing: {', '.join(missing)}")
    environment = Environment(folder / "venv")
    environment.install("--no-index", str(wheel))
    python, onewan = str(environment.python), str(environment.scripts / "onewan")
    where = run([python, "-c", "import onewan; print(onewan.__file__)"], folder).strip()
    if not Path(where).is_relative_to(folder):
        raise SystemExit(f"onewan is {where}, and not the installed wheel")
    run([onewan, "demo", "--dir", "demo"], folder)
    config = {
        "model_type": "WAN_2_2",
        "training_method": "LORA",
        "base_model_name": "demo/model",
        "output_model_format": "COMFY_LORA",
        "workspace_dir": "imported",
        "concepts": [{"path": "demo/clips"}],
        "samples": [],
        "train_device": "cpu",
        "train_dtype": "FLOAT_32",
        "resolution": "96",
        "frames": "5",
        "epochs": 1,
        "wan_expert_block": 1,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run([onewan, "import-config", "config.json", "--output", "run.yaml"], folder)
    run([onewan, "train", "config.json"], folder)
    if len(loras := list(folder.glob("imported/*/weights/*.safetensors"))) != 2:
        raise SystemExit(f"train config.json wrote {len(loras)} LoRAs, and not one for each expert")
    lora = max(folder.glob("demo/runs/*/weights/*_high_noise_comfyui.safetensors"))
    run([onewan, "inspect", str(lora)], folder)
    run([onewan, "schema"], folder)
    print(f"{wheel.name} has all {len(names)} files; demo, import-config, train and inspect work")


def check_oldest(folder: Path) -> None:
    """Run the tests that touch the packages in OLDEST with the versions there."""
    environment = Environment(folder / "venv")
    environment.install("-r", str(OLDEST))
    # The sources, as in the environment below, whose .pth file for them isn't read.
    (environment.packages / "sources.pth").write_text(f"{ROOT / 'src'}\n", encoding="utf-8")
    command = [str(environment.python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    output = run([*command, "--numprocesses", "auto", *OLDEST_TESTS], ROOT)
    print(output.strip().splitlines()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        {"wheel": check_wheel, "oldest": check_oldest}[sys.argv[1]](Path(folder).resolve())


if __name__ == "__main__":
    main()
