"""Write nix/python-packages.json: the wheels, with hashes, of which the Nix environments are made.

    python scripts/write_nix_packages.py

Run it after a change of the dependencies in pyproject.toml or of constraints.txt. It needs `uv`
(`pip install uv`), which resolves the dependencies for the systems and the Python version of
flake.nix at the versions in constraints.txt. PyTorch is not among the packages: it comes from
nixpkgs, in a build for each accelerator. Its own Python dependencies are.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from packaging import tags
from packaging.utils import parse_wheel_filename

if sys.version_info >= (3, 11):
    import tomllib
else:
    raise SystemExit("write_nix_packages.py needs Python 3.11 or newer, for tomllib")

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "nix" / "python-packages.json"
PYTHON = (3, 13)
# Newest platforms whose wheels run with the C library and macOS that nixpkgs supports.
GLIBC_MINOR = 39
MACOS = (14, 0)
MARKERS = {
    "x86_64-linux": "sys_platform == 'linux' and platform_machine == 'x86_64'",
    "aarch64-linux": "sys_platform == 'linux' and platform_machine == 'aarch64'",
    "aarch64-darwin": "sys_platform == 'darwin' and platform_machine == 'arm64'",
}
# What PyTorch's metadata asks for on every system.
OF_TORCH = ("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions")
# What an editable installation needs besides the build system: libcst is for pyproject.nix.
FOR_EDITABLE = ("editables", "libcst")


def requirements() -> list[str]:
    """What onewan, its extras and its build need, without references to onewan itself."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    named = chain(pyproject["build-system"]["requires"], project["dependencies"], *extras)
    return [*(r for r in named if not r.startswith("onewan[")), *OF_TORCH, *FOR_EDITABLE]


def constraints() -> list[str]:
    """The versions in constraints.txt, without markers and without PyTorch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split(";")[0].strip() for line in lines if re.match(r"\w", line)]
    return [pin for pin in pins if not pin.startswith("torch==")]


def resolve() -> list[dict[str, Any]]:
    """The packages of uv's lock file for the three systems."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise SystemExit("uv is not installed: pip install uv")
    version = ".".join(map(str, PYTHON))
    following = f"{PYTHON[0]}.{PYTHON[1] + 1}"
    only = (
        f"python_full_version >= '{version}' and python_full_version < '{following}' "
        "and platform_python_implementation == 'CPython'"
    )
    environments = [f"{only} and {marker}" for marker in MARKERS.values()]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(
            f"""
            [project]
            name = "onewan-environment"
            version = "0"
            requires-python = ">=3.11"
            dependencies = {json.dumps(requirements())}
            [tool.uv]
            package = false
            environments = {json.dumps(environments)}
            constraint-dependencies = {json.dumps(constraints())}
            override-dependencies = ["torch ; sys_platform == 'never'"]
            """,
            encoding="utf-8",
        )
        command = [uv, "lock", "--quiet", "--python", sys.executable]
        if subprocess.run(command, cwd=folder, check=False).returncode:
            raise SystemExit("uv could not resolve the dependencies; its messages are above")
        lock = tomllib.loads((Path(folder) / "uv.lock").read_text(encoding="utf-8"))
    return [package for package in lock["package"] if "registry" in package["source"]]


def tags_of(system: str) -> list[tags.Tag]:
    """Tags of the wheels that run there, the best first."""
    machine = system.split("-")[0]
    if system.endswith("darwin"):
        platforms = list(tags.mac_platforms(MACOS, "arm64"))
    else:
        newest_first = range(GLIBC_MINOR, 4, -1)
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in newest_first]
        platforms.insert(GLIBC_MINOR - 16, f"manylinux2014_{machine}")
    digits = "".join(map(str, PYTHON))
    return [
        *tags.cpython_tags(PYTHON, [f"cp{digits}"], platforms),
        *tags.compatible_tags(PYTHON, f"cp{digits}", platforms),
    ]


def wheels_of(package: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The best wheel for each system, or one under "any" where all systems have the same.

    Each has its `file` name and `sha256`, in hexadecimal digits.
    """
    files = {wheel["url"].rpartition("/")[2]: wheel["hash"] for wheel in package["wheels"]}
    chosen = dict[str, str]()
    for system in MARKERS:
        rank = {tag: number for number, tag in enumerate(tags_of(system))}
        ranked = [
            (min(rank[tag] for tag in wheel_tags if tag in rank), name)
            for name in files
            for wheel_tags in [parse_wheel_filename(name)[3]]
            if any(tag in rank for tag in wheel_tags)
        ]
        if not ranked:
            raise SystemExit(f"{package['name']} {package['version']} has no wheel for {system}")
        chosen[system] = min(ranked)[1]
    if len(set(chosen.values())) == 1:
        chosen = {"any": chosen["x86_64-linux"]}
    return {
        system: {"file": name, "sha256": files[name].removeprefix("sha256:")}
        for system, name in chosen.items()
    }


def with_extras(needed: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Name -> extras of what a package needs, from entries of uv's lock file."""
    wanted = dict[str, set[str]]()
    for one in needed:
        if "marker" in one:
            raise SystemExit(
                f"{one['name']} is needed on some systems only ({one['marker']}), which "
                "nix/python-packages.json can't say yet"
            )
        wanted.setdefault(one["name"], set()).update(one.get("extra", ()))
    return {name: sorted(extras) for name, extras in sorted(wanted.items())}


def main() -> None:
    entries = dict[str, dict[str, Any]]()
    for package in resolve():
        entries[package["name"]] = {
            "version": package["version"],
            "dependencies": with_extras(package.get("dependencies", [])),
            "extras": {
                extra: with_extras(needed)
                for extra, needed in package.get("optional-dependencies", {}).items()
            },
            "wheels": wheels_of(package),
        }
    lock = {
        "python": ".".join(map(str, PYTHON)),
        "torch": sorted(OF_TORCH),
        "packages": dict(sorted(entries.items())),
    }
    text = json.dumps(lock, indent=2, ensure_ascii=True) + "\n"
    OUTPUT.write_text(text, encoding="utf-8", newline="\n")
    print(f"{OUTPUT.relative_to(ROOT)}: {len(entries)} packages")


if __name__ == "__main__":
    main()
