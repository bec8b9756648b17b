"""New runs of the page, without a screen: drafts made from what there is, checked, and queued."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from onewan.config.load import dump_run, load_run, run_of_text
from onewan.errors import OnewanError
from onewan.runs.queue import Queue
from onewan.serving.commands import Commands
from onewan.serving.new_runs import NewRun, NewRuns
from onewan.serving.plans import plan_facts, plan_of
from onewan.serving.roots import Roots


@pytest.fixture
def new_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NewRuns:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    return NewRuns(Roots(runs, [tmp_path]), Queue(runs), Commands(tmp_path))


def from_preset(new_runs: NewRuns, name: str = "dog", clips: str = "", models: str = "") -> NewRun:
    draft = new_runs.from_preset(
        variant="t2v-a14b", purpose="character", name=name, clips=clips, models=models
    )
    return new_runs.open(draft, "")


def earlier_run(new_runs: NewRuns) -> Path:
    """The folder of a run that was started from a preset."""
    new = from_preset(new_runs, "fox", clips="clips")
    folder = new_runs.roots.runs / "fox"
    folder.mkdir()
    (folder / "run.yaml").write_text(new.run.text, encoding="utf-8")
    config = run_of_text(new.run.text, Path.cwd() / "run.yaml")
    (folder / "resolved.yaml").write_text(dump_run(config), encoding="utf-8")
    return folder


def test_a_preset_becomes_a_draft_of_a_run_of_the_page(new_runs: NewRuns) -> None:
    new = from_preset(new_runs, clips="my clips")
    assert new.run.value(("output",)) == {"name": "dog", "dir": str(new_runs.roots.runs)}
    assert new.run.value(("video_data", "sources", 0, "path")) == "my clips"
    assert new.checked().problems() == [] and new.other_name() == ""
    (new_runs.roots.runs / "dog").mkdir()
    assert new.checked().problems()[0][1].endswith("There is a run called dog already")
    assert new.other_name() == "dog-2"
    assert from_preset(new_runs).run.value(("output", "name")) == "dog-2"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"name": "do\0g"}, "Name of the run: contains the character NUL"),
        ({"clips": "cl\0ips"}, "Folder of clips: contains the character NUL"),
        ({"models": "/elsewhere"}, "is outside the folders"),
    ],
)
def test_what_no_run_can_have_is_told(new_runs: NewRuns, given: dict[str, str], told: str) -> None:
    with pytest.raises(OnewanError, match=told):
        from_preset(new_runs, **given)
    assert new_runs.drafts.all() == []


def test_a_run_names_no_file_outside_the_folders_of_the_page(new_runs: NewRuns) -> None:
    new = from_preset(new_runs, clips="/elsewhere/clips")
    new.run.set(("output", "dir"), "elsewhere")
    found = new.checked()
    assert found.config is None
    assert found.by_field.keys() == {("video_data", "sources", 0, "path"), ("output", "dir")}


def test_a_new_run_is_queued_from_a_file_of_its_own(new_runs: NewRuns) -> None:
    new = from_preset(new_runs)
    config = new.checked().config
    assert config is not None
    command = new.command(config)
    assert load_run(command.run) == config
    assert new.enqueue(command, first=False) == "dog: was added to the queue"
    (entry,) = new_runs.queue.entries()
    assert entry.run == "dog" and not entry.first and new_runs.drafts.all() == []
    with pytest.raises(OnewanError, match="was started or deleted"):
        new_runs.open("0" * 16, "")


def test_an_earlier_run_is_continued_with_what_was_changed(new_runs: NewRuns) -> None:
    folder = earlier_run(new_runs)
    again = new_runs.open(new_runs.from_run("fox"), "")
    assert again.run.value(("output", "name")) == "fox-2"
    new = new_runs.open(new_runs.continuing("fox"), "fox")
    assert new.run.value(("output", "name")) == "fox" and new.other_name() == ""
    new.run.override(["train.steps=7", "video_data.sources.0.repeats=3"])
    config = new.checked().config
    assert config is not None
    command = new.command(config)
    assert (command.run, command.options) == (folder, ("--resume",))
    assert load_run(command.run, command.overrides) == config
    assert new.enqueue(command, first=True).startswith("fox: starts as soon as")


@pytest.mark.long
def test_a_rehearsal_says_why_a_run_would_fail(new_runs: NewRuns) -> None:
    new = from_preset(new_runs)
    config = new.checked().config
    assert config is not None
    problems = asyncio.run(new.rehearse(new.command(config)))
    assert any("clips" in problem for problem in problems)


def test_a_plan_says_what_a_run_needs(new_runs: NewRuns) -> None:
    new = from_preset(new_runs)
    new.run.override(["memory.vram=24GB", "memory.ram=64GB"])
    config = new.checked().config
    assert config is not None
    facts = dict(plan_facts(asyncio.run(plan_of(config, new_runs.commands))))
    assert facts["Device"].endswith("24.0 GB") and facts["Clips"] == "none yet"
    assert facts["Steps"] == "3,000 (high 1,500, low 1,500)"
