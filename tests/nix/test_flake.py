"""The flake: Nix parses and evaluates all of it, and what it locks is what onewan asks for.

nixpkgs and pyproject.nix are stand-ins (stub/), so that nothing is downloaded: they have the
functions that the flake calls, and follow every dependency of every output. Nothing is built.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

if sys.version_info >= (3, 11):
    import tomllib
else:
    pytest.skip("needs tomllib of Python 3.11", allow_module_level=True)

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).parent / "stub"
NIX_FILES = [ROOT / "flake.nix", *sorted(ROOT.glob("nix/*.nix")), *sorted(STUB.rglob("*.nix"))]
ACCELERATORS = {
    "x86_64-linux": ("cpu", "cuda", "rocm"),
    "aarch64-linux": ("cpu", "cuda"),
    "aarch64-darwin": ("cpu",),
}
LOCK = json.loads((ROOT / "nix" / "python-packages.json").read_text(encoding="utf-8"))


class Nix:
    """Nix commands on a copy of the flake, with a store and a home folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.flake = folder / "flake"
        self.store = folder / "store"
        self.environment = {
            **os.environ,
            "HOME": str(folder / "home"),
            "NIX_CONFIG": "experimental-features = nix-command flakes\nbuild-users-group =\n",
        }
        self.flake.mkdir()
        for name in ("flake.nix", "flake.lock", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.flake)
        shutil.copytree(ROOT / "nix", self.flake / "nix")
        for name in ("src", "docs"):
            (self.flake / name).mkdir()

    def run(self, *command: str, succeeds: bool = True) -> str:
        """Standard output; standard error too where the command is to fail."""
        done = subprocess.run(
            [command[0], "--store", str(self.store), *command[1:]],
            env=self.environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert (done.returncode == 0) == succeeds, done.stderr
        return done.stdout if succeeds else done.stdout + done.stderr

    def run_on_flake(self, *command: str, output: str = "", succeeds: bool = True) -> str:
        stubs = [
            argument
            for name in ("nixpkgs", "pyproject-nix")
            for argument in ("--override-input", name, f"path:{STUB / name}")
        ]
        flake = f"path:{self.flake}{output}"
        options = ["--offline", "--no-write-lock-file", *stubs]
        return self.run("nix", *command, flake, *options, succeeds=succeeds)

    def evaluate(self, output: str, apply: str) -> Any:
        text = self.run_on_flake("eval", "--json", "--apply", apply, output=f"#{output}")
        return json.loads(text)

    def inputs_of(self, derivation: str) -> set[str]:
        """Names of all derivations that are needed to build this one, with versions."""
        paths = self.run("nix-store", "--query", "--requisites", derivation).split()
        return {Path(path).name.partition("-")[2].removesuffix(".drv") for path in paths}


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    return Nix(tmp_path)


@pytest.fixture(scope="session")
def shared_nix(tmp_path_factory: pytest.TempPathFactory) -> Nix:
    """For tests that leave the copy of the flake as it is."""
    return Nix(tmp_path_factory.mktemp("nix"))


@pytest.fixture(autouse=True)
def _needs_nix(request: pytest.FixtureRequest) -> None:
    """Skip what runs Nix where it is not installed; in CI that is a failure."""
    if {"nix", "shared_nix"} & set(request.fixturenames) and not shutil.which("nix-instantiate"):
        message = "needs Nix (on Debian: apt-get install nix-bin)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.mark.parametrize("path", NIX_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_file_parses(shared_nix: Nix, path: Path) -> None:
    assert shared_nix.run("nix-instantiate", "--parse", str(path))


def test_nix_accepts_the_kinds_of_all_outputs(shared_nix: Nix) -> None:
    shared_nix.run_on_flake("flake", "check", "--no-build")


@pytest.mark.parametrize("kind", ["packages", "devShells"])
def test_there_is_one_for_each_system_and_accelerator(shared_nix: Nix, kind: str) -> None:
    paths = shared_nix.evaluate(kind, "builtins.mapAttrs (_: builtins.mapAttrs (_: d: d.drvPath))")
    assert paths.keys() == ACCELERATORS.keys()
    for system, accelerators in ACCELERATORS.items():
        assert paths[system].keys() == {"default", *accelerators}
        assert paths[system]["default"] == paths[system]["cpu"]
        assert len(set(paths[system].values())) == len(accelerators)
        for accelerator in accelerators:
            name = Path(paths[system][accelerator]).name
            assert re.search(rf"-onewan-{accelerator}(-[\d.]+)?\.drv$", name), name


def test_apps_are_the_programs_of_the_packages(shared_nix: Nix) -> None:
    apps = shared_nix.evaluate("apps", "apps: apps")
    packages = shared_nix.evaluate(
        "packages", "builtins.mapAttrs (_: builtins.mapAttrs (_: package: package.outPath))"
    )
    for system, accelerators in ACCELERATORS.items():
        for name in ("default", *accelerators):
            assert apps[system][name]["type"] == "app"
            assert apps[system][name]["program"] == f"{packages[system][name]}/bin/onewan"


def test_checks_run_the_tests_and_the_demo_without_cuda_and_rocm(shared_nix: Nix) -> None:
    checks = shared_nix.evaluate(
        "checks", "builtins.mapAttrs (_: builtins.mapAttrs (_: check: check.drvPath))"
    )
    assert checks.keys() == ACCELERATORS.keys()
    for of_system in checks.values():
        assert of_system.keys() == {"package", "tests", "demo"}
        for path in of_system.values():
            assert not any("cuda" in name or "rocm" in name for name in shared_nix.inputs_of(path))
    command = shared_nix.evaluate("checks.x86_64-linux.tests", "check: check.buildCommand")
    assert 'python -m pytest -q -p no:cacheprovider --numprocesses "$NIX_BUILD_CORES"' in command
    for folder in re.findall(r"tests/\w+", command):
        assert list((ROOT / folder).glob("test_*.py"))


def test_there_is_a_formatter_for_each_system(shared_nix: Nix) -> None:
    names = shared_nix.evaluate("formatter", "builtins.mapAttrs (_: formatter: formatter.name)")
    assert names == dict.fromkeys(ACCELERATORS, "nixfmt-tree-1")


@pytest.mark.parametrize("kind", ["packages", "devShells"])
@pytest.mark.parametrize(
    ("output", "torch"),
    [
        ("x86_64-linux.cpu", "torch-1"),
        ("x86_64-linux.cuda", "torch-bin-1"),
        ("x86_64-linux.rocm", "torch-rocm-1"),
        ("aarch64-linux.cuda", "torch-cuda-1"),
        ("aarch64-darwin.cpu", "torch-1"),
    ],
)
def test_each_has_its_build_of_torch_and_the_locked_packages(
    shared_nix: Nix, kind: str, output: str, torch: str
) -> None:
    path = shared_nix.evaluate(f"{kind}.{output}", "package: package.drvPath")
    inputs = shared_nix.inputs_of(path)
    assert {name for name in inputs if re.fullmatch(r"torch(-[a-z]+)?-1", name)} == {torch}
    for name in ("diffusers", "peft", "transformers", "numpy", "bitsandbytes", "filelock"):
        assert f"{name}-{LOCK['packages'][name]['version']}" in inputs
    assert any(name.startswith("pytest-") for name in inputs) == (kind == "devShells")


def test_a_package_that_is_not_locked_is_noticed(nix: Nix) -> None:
    path = nix.flake / "nix" / "python-packages.json"
    lock = json.loads(path.read_text(encoding="utf-8"))
    del lock["packages"]["peft"]
    path.write_text(json.dumps(lock), encoding="utf-8")
    message = nix.run_on_flake("flake", "check", "--no-build", succeeds=False)
    assert "attribute 'peft' missing" in message


def bash(script: str, **environment: str) -> str:
    command = ["bash", "-euc", script]
    environment = {"PATH": os.environ["PATH"], **environment}
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode()


def test_a_development_shell_leaves_the_users_python_out(shared_nix: Nix) -> None:
    shell = shared_nix.evaluate(
        "devShells.x86_64-linux.cpu", "shell: { inherit (shell) env shellHook; }"
    )
    hook = shell["shellHook"].replace("git rev-parse --show-toplevel", "echo /checkout")
    outside = {"PYTHONPATH": "/of/the/user", "PYTHONHOME": "/of/the/user"}
    inside = bash(f"{hook}\nenv", **outside, **shell["env"]).splitlines()
    assert "PYTHONNOUSERSITE=1" in inside
    assert "REPO_ROOT=/checkout" in inside
    assert not [line for line in inside if "/of/the/user" in line]


def test_the_installed_program_leaves_the_users_python_out(shared_nix: Nix, tmp_path: Path) -> None:
    """The command that makes bin/onewan is run, with a wrapper of the same options as nixpkgs'."""
    build = shared_nix.evaluate("packages.x86_64-linux.cuda", "package: package.buildCommand")
    make_wrapper = """
        makeWrapper() {
            program=$1; shift 2; options=()
            while [ $# -gt 0 ]; do
                case $1 in
                    --set) options+=("$2=$3"); shift 3;;
                    --unset) options=(-u "$2" "${options[@]}"); shift 2;;
                esac
            done
            echo "$program"; env "${options[@]}" env
        }
    """
    outside = {"PYTHONPATH": "/of/the/user", "PYTHONHOME": "/of/the/user", "out": str(tmp_path)}
    program, *inside = bash(make_wrapper + build, **outside).splitlines()
    assert re.search(r"-onewan-environment/bin/onewan$", program)
    assert "PYTHONNOUSERSITE=1" in inside
    assert not [line for line in inside if "/of/the/user" in line]


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ADVICE = "run scripts/write_nix_packages.py"


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    named = chain(PYPROJECT["build-system"]["requires"], project["dependencies"], *extras)
    parsed = [Requirement(text) for text in named]
    return [one for one in parsed if one.name not in ("onewan", "torch")]


def constrained() -> dict[str, str]:
    """Name -> version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split(";")[0].strip().split("==") for line in lines if re.match(r"\w", line)]
    return {canonicalize_name(name): version for name, version in pins}


def test_all_requirements_are_locked_at_versions_that_they_allow() -> None:
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in LOCK["packages"], f"{requirement} is not locked; {ADVICE}"
        version = LOCK["packages"][name]["version"]
        assert requirement.specifier.contains(version), f"{requirement}: {version}; {ADVICE}"


def test_the_locked_versions_are_those_that_ci_tests() -> None:
    tested = constrained()
    locked = {name: package["version"] for name, package in LOCK["packages"].items()}
    both = locked.keys() & tested.keys()
    assert {"diffusers", "numpy", "peft", "transformers"} <= both
    assert {n: locked[n] for n in both} == {n: tested[n] for n in both}, ADVICE


def test_every_package_has_a_wheel_for_every_system_and_what_it_needs() -> None:
    for name, package in LOCK["packages"].items():
        assert package["wheels"].keys() in ({"any"}, ACCELERATORS.keys())
        for needed in (package["dependencies"], *package["extras"].values()):
            for other, extras in needed.items():
                assert set(extras) <= LOCK["packages"][other]["extras"].keys()
        for wheel in package["wheels"].values():
            parsed, version, *_ = parse_wheel_filename(wheel["file"])
            assert (parsed, str(version)) == (name, package["version"])
            assert len(wheel["file"].split("-")) == 5, "a build number is not in nixpkgs' addresses"
            assert re.fullmatch(r"[0-9a-f]{64}", wheel["sha256"])
    assert set(LOCK["torch"]) <= LOCK["packages"].keys()


def test_the_inputs_are_locked_by_revision_and_hash() -> None:
    lock = json.loads((ROOT / "flake.lock").read_text(encoding="utf-8"))
    assert lock["nodes"]["root"]["inputs"].keys() == {"nixpkgs", "pyproject-nix"}
    assert lock["nodes"]["pyproject-nix"]["inputs"] == {"nixpkgs": ["nixpkgs"]}
    for name in lock["nodes"]["root"]["inputs"]:
        locked = lock["nodes"][name]["locked"]
        assert re.fullmatch(r"[0-9a-f]{40}", locked["rev"])
        assert len(base64.b64decode(locked["narHash"].removeprefix("sha256-"))) == 32
