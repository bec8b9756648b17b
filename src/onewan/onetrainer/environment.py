"""The environment in a OneTrainer checkout: whether the add-on can be loaded with its packages.

Its own interpreter is run, and imports what the add-on's files import; OneTrainer's own code isn't.
"""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onewan.onetrainer.install import overlay

_SHOWN = ("onewan", "torch", "diffusers", "transformers", "huggingface-hub", "av", "mgds")

_SECONDS = 300
"""The first import of torch from a slow disk takes a minute or more."""

_CODE = """
import contextlib, importlib, importlib.metadata, io, json, sys
names, packages = json.load(sys.stdin)
found, failures = {}, {}
for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found[package] = importlib.metadata.version(package)
with contextlib.redirect_stdout(io.StringIO()):
    for module, members in names.items():
        try:
            imported = importlib.import_module(module)
            for member in members:
                if not hasattr(imported, member):
                    importlib.import_module(f"{module}.{member}")
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            failures.setdefault(text, module)
print(json.dumps([found, failures]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a checkout's own interpreter says."""

    python: Path
    versions: Mapping[str, str] = field(default_factory=dict)
    """Installed versions of the packages that matter, by name."""
    failures: tuple[str, ...] = ()
    """Why the add-on can't be loaded there, one line for each reason; empty if it can."""


def python_in(root: Path) -> Path | None:
    """The interpreter of the environment in a checkout, if it has one."""
    for name in ("venv", ".venv"):
        for inside in ("bin/python", "Scripts/python.exe"):
            if (root / name / inside).exists():
                return root / name / inside
    return None


def environment(root: Path) -> Environment | None:
    """Run the interpreter of the checkout `root`; None if it has no environment.

    Takes the seconds that importing torch takes.
    """
    python = python_in(root)
    if python is None:
        return None
    try:
        done = subprocess.run(
            [str(python), "-c", _CODE],
            input=json.dumps([imported_names(), _SHOWN]),
            cwd=root,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
        versions, found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it ends without a message"])[-1]
        return Environment(python=python, failures=(f"it does not run: {last}",))
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return Environment(python=python, failures=(f"it does not run: {error}",))
    failures = tuple(f"{text} (importing {module})" for text, module in found.items())
    if any("No module named 'onewan'" in text for text in found):
        failures = (f"it has no onewan: {python} -m pip install onewan",)
    return Environment(python=python, versions=versions, failures=failures)


def imported_names() -> dict[str, list[str]]:
    """What the add-on's files import from packages, by module."""
    found: dict[str, set[str]] = {"onewan.onetrainer.patches": set()}
    for name, data in overlay().items():
        for node in ast.walk(ast.parse(data)) if name.endswith(".py") else ():
            match node:
                case ast.ImportFrom(module=str(module)) if not module.startswith("modules."):
                    found.setdefault(module, set()).update(alias.name for alias in node.names)
                case ast.Import():
                    plain = [a.name for a in node.names if not a.name.startswith("modules.")]
                    found.update({module: found.get(module, set()) for module in plain})
                case _:
                    pass
    return {module: sorted(members) for module, members in found.items()}
