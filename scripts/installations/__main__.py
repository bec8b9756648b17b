"""Test onewan as others install it.

    .venv/bin/python scripts/installations dist | wheel | oldest | newest | onetrainer | audit

`dist` builds the wheel and the source distribution into dist/, with a bill of materials and the
licences of what is installed with them. `wheel` builds them too, and uses the wheel in an empty
environment. `oldest` does so with every package at its lower bound, and runs the tests that touch
them; `newest` does it with the newest ones that the ranges allow. `onetrainer` asks pip what it
would change of OneTrainer's pins, and runs those tests with them. `audit` looks for known
vulnerabilities in the environment that runs this script.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from environments import CONSTRAINTS, ROOT, Environment, tested_torch
from packages import build
from packaging.version import Version
from ranges import (
    check_beside_onetrainer,
    check_ranges,
    install,
    resolve,
    run_tests,
)
from supply_chain import check_vulnerabilities, write_bill, write_licences

_CONFIG = {
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


def use(environment: Environment, folder: Path) -> None:
    """What a newcomer does, without a compiler, with an empty HOME and with none. SystemExit if
    something fails or is written to HOME."""
    home = folder / "home"
    home.mkdir()
    where = "import onewan; print(onewan.__file__)"
    file = environment.run_bare(folder, home, environment.python.name, "-c", where).strip()
    if not Path(file).is_relative_to(environment.folder):
        raise SystemExit(f"onewan is {file}, and not the installed wheel")
    for program in (("doctor",), ("demo", "--dir", "demo")):
        print(environment.run_bare(folder, home, "onewan", *program))
    environment.run_bare(folder, None, "onewan", "doctor")
    page = folder / "report.html"
    environment.run_bare(folder, None, "onewan", "report", "demo/runs/run", "--out", str(page))
    if "</html>" not in page.read_text(encoding="utf-8"):
        raise SystemExit(f"onewan report wrote no whole page to {page}")
    if written := [str(path) for path in home.rglob("*")]:
        raise SystemExit(f"onewan wrote to HOME: {', '.join(written)}")


def use_resources(environment: Environment, folder: Path) -> None:
    """The commands that read files of the wheel which are no code, on the demo in `folder`."""
    (folder / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    imported = ("import-config", "config.json", "--output", "run.yaml")
    environment.run_bare(folder, None, "onewan", *imported)
    environment.run_bare(folder, None, "onewan", "train", "config.json")
    if len(loras := list(folder.glob("imported/*/weights/*.safetensors"))) != 2:
        raise SystemExit(f"train config.json wrote {len(loras)} LoRAs, and not one for each expert")
    lora = max(folder.glob("demo/runs/*/weights/*_high_noise_comfyui.safetensors"))
    environment.run_bare(folder, None, "onewan", "inspect", str(lora))
    environment.run_bare(folder, None, "onewan", "schema")


def install_tested(environment: Environment, wheel: Path, extras: str = "") -> None:
    environment.pip("-qq", tested_torch())
    what = f"onewan{extras} @ {wheel.as_uri()}"
    environment.pip("-qq", "--constraint", str(CONSTRAINTS), what)


def make_dist(folder: Path) -> None:
    wheel, source = build(folder)
    environment = Environment(folder / "venv")
    install_tested(environment, wheel, "[all]")
    name = f"{wheel.name.split('-py3')[0]}"
    bill, licences = folder / f"{name}.cdx.json", folder / f"{name}.licences.txt"
    write_licences(write_bill(environment, bill), licences)
    target = ROOT / "dist"
    target.mkdir(exist_ok=True)
    for file in (wheel, source, bill, licences):
        print(shutil.copy(file, target))


def check_wheel(folder: Path) -> None:
    wheel, _ = build(folder)
    environment = Environment(folder / "venv")
    install_tested(environment, wheel)
    use(environment, folder)
    use_resources(environment, folder)
    install_tested(environment, wheel, "[all]")
    pages = "from onewan.serving.documentation import pages; print(*pages())"
    if "start" not in environment.run_bare(folder, None, "python", "-c", pages):
        raise SystemExit("the wheel lacks the documentation, which the page shows")
    bill = write_bill(environment, folder / "bill.cdx.json")
    write_licences(bill, folder / "licences.txt")
    print(f"{wheel.name} works in an empty environment; {len(bill['components'])} packages with it")


def check_oldest(folder: Path) -> None:
    wheel, _ = build(folder)
    _check_with(check_ranges(folder), folder, wheel)


def check_newest(folder: Path) -> None:
    wheel, _ = build(folder)
    _check_with(resolve(folder, "highest", "--python", sys.executable), folder, wheel)


def _check_with(versions: dict[str, Version], folder: Path, wheel: Path) -> None:
    environment = Environment(folder / "venv")
    install(environment, versions, wheel)
    use(environment, folder)
    run_tests(environment)


def check_onetrainer(folder: Path) -> None:
    wheel, _ = build(folder)
    there = check_beside_onetrainer(folder, wheel)
    # The release stands for the development version just before it; torch is the one below.
    there["diffusers"] = "0.39.0"
    used = resolve(folder, "highest", "--python", sys.executable).keys() & there.keys()
    environment = Environment(folder / "venv", below=True)
    pins = sorted(f"{name}=={there[name]}" for name in used - {"torch", "setuptools"})
    environment.pip("-qq", "--no-deps", *pins)
    run_tests(environment)


def main() -> None:
    modes = {
        "dist": make_dist,
        "wheel": check_wheel,
        "oldest": check_oldest,
        "newest": check_newest,
        "onetrainer": check_onetrainer,
        "audit": check_vulnerabilities,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in modes:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        modes[sys.argv[1]](Path(folder).resolve())


if __name__ == "__main__":
    main()
