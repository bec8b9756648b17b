"""Fixtures: a tiny model of each variant and a few drawn clips, made once, and run files on them.

A folder of tests that uses them imports them in its ``conftest.py``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from onewan.config.schema import ResolvedRun
from onewan.demo.clips import write_clips
from onewan.variants import VARIANTS
from support.runs import RunFile, write_run_file
from support.tiny_models import TinyModels


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clips`, `named clips`, and a tiny model of each variant under its name."""
    folder = tmp_path_factory.mktemp("workshop")
    write_clips(folder / "clips")
    with (folder / "clips" / "blue_circle.txt").open("a", encoding="utf-8") as captions:
        captions.write("a blue ball jumps on a bright field\n")  # one of two is drawn for each step
    shutil.copytree(folder / "clips", folder / "named clips")
    for caption in (folder / "named clips").glob("*.txt"):
        caption.write_text("a <shape> on a dark background", encoding="utf-8")
    models = TinyModels(folder, width=32, layers=2)
    for variant in VARIANTS:
        models(variant)
    return folder


@pytest.fixture
def run_file(workshop: Path, tmp_path: Path) -> RunFile:
    """Builds a resolved run, `run_file("t2v-a14b", "train.steps=3", ...)`, in the test's folder."""

    def build(variant: str, *overrides: str, name: str = "run") -> ResolvedRun:
        return write_run_file(workshop, tmp_path, variant, *overrides, name=name)

    return build
