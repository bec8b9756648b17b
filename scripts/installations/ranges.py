"""The ranges of pyproject.toml: their lower bounds, and what OneTrainer pins."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from environments import CONSTRAINTS, ROOT, Environment, run, tested_torch, uv
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # of pytest

ONETRAINER_PINS = Path(__file__).with_name("onetrainer_pins.txt")

# Systems and Pythons for which both ends of the ranges are resolved. The oldest macOS is the one
# for which the newest wheels of PyAV are made.
_SYSTEMS = ("linux", "windows", "aarch64-apple-darwin")
_OLDEST_MACOS = "14.0"
_OLDEST_PYTHON = "3.10"

# What touches packages of which the lower bounds and OneTrainer's pins have other versions.
TESTS = (
    *("tests/unit/test_media.py", "tests/unit/test_embedding.py", "tests/unit/test_model_load.py"),
    *("tests/unit/test_conditioning.py", "tests/golden"),
)


def bounds() -> dict[str, Version]:
    """The lower bound of each package of the dependencies and of the extra `all`, by its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"]]
    for extra, requirements in extras.items():
        if extra not in ("dev", "docs"):
            named += requirements
    parsed = [Requirement(text) for text in named]
    found = dict[str, Version]()
    for requirement in parsed:
        lowest = [s.version for s in requirement.specifier if s.operator == ">="]
        if requirement.name != "onewan":
            found[canonicalize_name(requirement.name)] = Version(lowest[0])
    return found


def resolve(folder: Path, resolution: str, *options: str) -> dict[str, Version]:
    """The packages that uv chooses of those with wheels, without torch and what torch needs, for
    `resolution` `highest` or `lowest-direct`. SystemExit if there is no choice."""
    without_torch = folder / "without_torch.txt"
    without_torch.write_text('torch ; sys_platform == "never"\n', encoding="utf-8")
    command = uv("pip", "compile", "--quiet", "pyproject.toml", "--extra", "all")
    command += ["--resolution", resolution, "--only-binary", ":all:", "--no-header"]
    command += ["--no-annotate", "--override", str(without_torch), *options]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": _OLDEST_MACOS}
    out = run(command, ROOT, variables=environment)
    return {name: Version(version) for name, version in _pins_in(out).items()}


def check_ranges(folder: Path) -> dict[str, Version]:
    """Resolve both ends for every system; the versions of the lower end for this Python.
    SystemExit if a bound is a version that has no wheel, so that nobody ever had it."""
    for system in _SYSTEMS:
        for resolution in ("lowest-direct", "highest"):
            where = ("--python-platform", system, "--python-version", _OLDEST_PYTHON)
            resolve(folder, resolution, *where)
    oldest = resolve(folder, "lowest-direct", "--python-version", _OLDEST_PYTHON)
    here = resolve(folder, "lowest-direct", "--python", sys.executable)
    wrong = [
        f"{name}: the bound is {bound}, and the lowest with a wheel is {oldest[name]}"
        for name, bound in bounds().items()
        if name != "torch" and bound not in (oldest[name], here[name])
        # OneTrainer has a development version of diffusers, which no index has.
        if not bound.is_devrelease
    ]
    if wrong:
        raise SystemExit("pyproject.toml:\n" + "\n".join(wrong))
    return here


def install(environment: Environment, versions: dict[str, Version], wheel: Path) -> None:
    """These versions of everything, and onewan. With the variable TORCH_INDEX, the address of an
    index of PyTorch's CPU builds, torch at its lower bound; without it the one that CI tests."""
    index = os.environ.get("TORCH_INDEX", "")
    if index:
        environment.pip("-qq", f"torch=={bounds()['torch']}.*", "--index-url", index)
    else:
        print(f"torch is {tested_torch()}: its oldest version takes TORCH_INDEX=ADDRESS")
        environment.pip("-qq", tested_torch())
    pins = environment.folder / "versions.txt"
    lines = [f"{name}=={version}" for name, version in versions.items()]
    pins.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = uv("pip", "install", "--quiet", "--python", str(environment.python), "--no-deps")
    run([*command, "--only-binary", ":all:", "-r", str(pins)], ROOT)
    environment.pip("-qq", "--no-deps", str(wheel))


def run_tests(environment: Environment) -> None:
    """Run `TESTS` on the sources, with the packages of this environment."""
    environment.pip("-qq", "--constraint", str(CONSTRAINTS), "pytest", "pytest-xdist")
    (environment.packages / "sources.pth").write_text(f"{ROOT / 'src'}\n", encoding="utf-8")
    command = [str(environment.python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    output = run([*command, "--numprocesses", "auto", *TESTS], ROOT)
    print(output.strip().splitlines()[-1])


def onetrainer_pins() -> dict[str, str]:
    """OneTrainer's pins, version by name."""
    return _pins_in(ONETRAINER_PINS.read_text(encoding="utf-8"))


def _pins_in(requirements: str) -> dict[str, str]:
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", requirements, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def onetrainer_environment(folder: Path) -> dict[str, str]:
    """All packages of an environment of OneTrainer, version by name: its pins, and what they need
    besides, as uv resolves it. The builds of torch for CUDA are on another index; they are in the
    answer, without what they need."""
    pins = onetrainer_pins()
    elsewhere = {name for name, version in pins.items() if "+" in version}
    # The release has the requirements of the development version just before it.
    found = {n: v for n, v in pins.items() if n not in elsewhere} | {"diffusers": "0.39.0"}
    wanted, overrides = folder / "pins.txt", folder / "elsewhere.txt"
    wanted.write_text("".join(f"{n}=={v}\n" for n, v in found.items()), encoding="utf-8")
    never = (f'{name} ; sys_platform == "never"\n' for name in elsewhere)
    overrides.write_text("".join(never), encoding="utf-8")
    command = uv("pip", "compile", "--quiet", str(wanted), "--override", str(overrides))
    command += ["--no-header", "--no-annotate", "--python", sys.executable]
    return _pins_in(run(command, ROOT)) | pins


def check_beside_onetrainer(folder: Path, wheel: Path) -> dict[str, str]:
    """Ask pip what it would do to an environment of OneTrainer, whose packages are returned.
    SystemExit if it would change one of them."""
    environment = Environment(folder / "onetrainer")
    there = onetrainer_environment(folder)
    for name, version in there.items():
        # For pip, this is an installed package.
        info = environment.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text, encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
        (info / "RECORD").write_text("", encoding="utf-8")
    report = folder / "report.json"
    dry = ("-qq", "--dry-run", "--report", str(report), f"onewan[all] @ {wheel.as_uri()}")
    environment.pip(*dry)
    install = json.loads(report.read_text(encoding="utf-8"))["install"]
    new = {canonicalize_name(i["metadata"]["name"]): i["metadata"]["version"] for i in install}
    if changed := [f"{n}: {there[n]} -> {new[n]}" for n in sorted(new.keys() & there.keys())]:
        raise SystemExit("pip would change OneTrainer's environment:\n" + "\n".join(changed))
    added = ", ".join(f"{name} {version}" for name, version in sorted(new.items()))
    print(f"none of OneTrainer's {len(there)} packages changes; pip would add {added}")
    return there
