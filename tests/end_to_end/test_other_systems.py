"""A run on a system without what only POSIX has, which Windows is; simulated in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.runs import RunFile, layout_of

from onewan.config.load import dump_run

pytestmark = pytest.mark.long

TESTS = Path(__file__).parents[1]


def test_a_run_is_trained_stopped_and_resumed_without_posix(
    run_file: RunFile, tmp_path: Path
) -> None:
    """With a name that is in no Windows code page, and with a console in one."""
    folder = tmp_path / "une forêt 日本"
    folder.mkdir()
    settings = [f"output.dir={(folder / 'runs').as_posix()}", "wan_config.max_frames=5"]
    config = run_file(
        "t2v-a14b", *settings, "train={steps: 3, save_every: 2}", "output.keep_last=1"
    )
    path = folder / "run.yaml"
    path.write_text(dump_run(config), encoding="utf-8")
    source = TESTS.parent / "src"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(source)}

    def onewan(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, TESTS / "support" / "without_posix.py", *arguments],
            capture_output=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
        return done.stdout.decode("utf-8", "replace")

    layout = layout_of(config)
    assert "done: 3 steps" in onewan("train", str(path))
    onewan("train", str(layout.root), "--resume", "train.steps=4")
    exported = layout.exported()
    assert [*exported] == [4] and all(load_file(file) for file in exported[4])
    assert layout.saved_steps()[-1] == 4
