"""Run files of earlier runs, to start others from: the same settings, with the user's comments."""

from __future__ import annotations

from pathlib import Path

import pytest

from onewan.config.load import changed_fields, dump_run, load_run, run_of_text
from onewan.errors import ConfigError
from onewan.presets.earlier import run_file_of, with_absolute_paths
from onewan.presets.starter import StarterRequest, starter


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a run file."""
    text = starter(StarterRequest(variant="ti2v-5b", purpose="style", name="dog"))
    text = text.replace("path: clips", "path: clips  # all of them")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def run_of(project: Path, *overrides: str) -> Path:
    """The folder of a run that was started from the run file, elsewhere by now."""
    config = load_run(project / "run.yaml", overrides)
    folder = project / "elsewhere" / "dog"
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(dump_run(config), encoding="utf-8")
    (folder / "run.yaml").write_bytes((project / "run.yaml").read_bytes())
    return folder


def test_it_has_the_settings_that_the_run_had_and_its_comments(project: Path) -> None:
    folder = run_of(project, "train.steps=77", "video_data.sources.0.repeats=3", "train.ema={}")
    text = run_file_of(folder)
    assert f"path: {project / 'clips'}  # all of them" in text
    assert "\n      repeats: 3\n" in text and "  steps: 77" in text
    config = run_of_text(text, project / "nowhere" / "new.yaml")
    names = {name for name, _, _ in changed_fields(config, load_run(folder))}
    assert names == {"output.name"}


def test_without_a_usable_run_file_all_settings_are_given(project: Path) -> None:
    folder = run_of(project)
    for text in (None, "model: [", "a: 1\n"):
        if text is None:
            (folder / "run.yaml").unlink()
        else:
            (folder / "run.yaml").write_text(text, encoding="utf-8")
        config = run_of_text(run_file_of(folder), project / "new.yaml")
        assert {n for n, _, _ in changed_fields(config, load_run(folder))} == {"output.name"}
    with pytest.raises(ConfigError):
        run_file_of(project)


def test_a_run_file_with_absolute_paths_can_be_anywhere(project: Path) -> None:
    file = project / "run.yaml"
    text = file.read_text(encoding="utf-8")
    moved = with_absolute_paths(text, file)
    assert run_of_text(moved, Path("/x/run.yaml")) == load_run(file)
    assert "# all of them" in moved and f"dir: {project / 'runs'}" in moved
    assert with_absolute_paths(moved, file) == moved
