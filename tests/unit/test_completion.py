"""`onewan completion`: the script of bash is run by bash, those of other shells are complete."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from onewan.cli import main
from onewan.cli.arguments import SHELLS
from onewan.cli.completion import settings

pytest.importorskip("shtab", reason="the package shtab, a dependency, is not installed yet")

ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
compopt() { :; }
_onewan
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "onewan.bash"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    command = ["bash", "-c", ASK, "bash", str(script), "onewan", *words]
    out = subprocess.run(
        command, cwd=script.parent, capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stderr == ""
    return out.stdout.split()


def test_bash_completes_commands_options_values_runs_and_settings(bash: Path) -> None:
    (bash.parent / "runs" / "fox").mkdir(parents=True)
    assert completed(bash, "tr") == ["train"]
    assert {"init", "runs", "completion"} <= set(completed(bash, ""))
    assert "--dry-run" in completed(bash, "train", "--")
    assert completed(bash, "init", "--variant", "ti") == ["ti2v-5b"]
    assert completed(bash, "stop", "f") == ["fox"]
    assert completed(bash, "train", "run.yaml", "train.ste") == ["train.steps="]
    assert completed(bash, "set", "fox", "optimizer.") == ["optimizer.lr="]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_with_every_command(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("sample-now", "--dry-run", "ti2v-5b", "comfyui-node"))


def test_settings_are_those_of_the_run_file() -> None:
    found = settings()
    assert {"train.steps", "optimizer.lr", "video_data.resolution", "method.rank"} <= set(found)
    assert all("." in name and name.replace(".", "").replace("_", "").isalnum() for name in found)
