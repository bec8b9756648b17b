"""The workflow for a public host: it fits the host's schema, and calls what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def workflow() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(WORKFLOW)


def commands() -> list[str]:
    jobs = workflow()["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_the_workflow_fits_the_schema_of_the_host() -> None:
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, WORKFLOW]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_each_target_that_ci_makes_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    locally = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    made = {line.split()[1] for line in (*commands(), *locally) if line.startswith("make ")}
    assert {"setup", "test", "long", "wheel", "lint", "docs"} <= made <= targets


def test_the_public_host_checks_all_that_the_local_ci_does() -> None:
    """But for what needs material beside the repository, which `make test` skips there."""
    locally = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    wanted = {line.split()[1] for line in locally if line.startswith("make ")}
    assert wanted <= {command.split()[1] for command in commands() if command.startswith("make ")}


def test_the_matrix_has_every_supported_system_and_python() -> None:
    matrix = workflow()["jobs"]["tests"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["system"]} == {"ubuntu", "windows", "macos"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    oldest, newest = re.findall(r"Needs Python 3\.(\d+) to 3\.(\d+)", makefile)[0]
    assert matrix["python"] == [f"3.{minor}" for minor in range(int(oldest), int(newest) + 1)]
