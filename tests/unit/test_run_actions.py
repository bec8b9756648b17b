"""What can be done with runs and with their places in the queue, and what is asked before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import MadeRun, write_run
from support.interrupted import locking
from support.trainers import begin, run_file, sleeping_jobs

from onewan.runs.actions import (
    Action,
    Steering,
    actions_of_entry,
    actions_of_run,
    forced_stop,
)
from onewan.runs.jobs import Jobs


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def jobs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    with sleeping_jobs(runs, monkeypatch) as jobs:
        yield jobs


def of_run(jobs: Jobs, name: str) -> list[Action]:
    now = jobs.turn()
    run = now.run(name)
    assert run is not None
    return actions_of_run(jobs, run, now)


def labels(actions: list[Action]) -> list[str]:
    return [action.label for action in actions]


def of_queue(jobs: Jobs) -> dict[str, list[str]]:
    queue = jobs.turn().queue
    return {each.entry.run: labels(actions_of_entry(jobs, each, queue)) for each in queue}


def test_the_queue_offers_only_what_changes_something(jobs: Jobs, tmp_path: Path) -> None:
    jobs.queue.pause("cpu", True)
    for name, device in [("a", "cpu"), ("b", "cpu"), ("c", "cpu"), ("d", "cuda:1")]:
        jobs.queue.add(run_file(tmp_path, name, device))
    assert of_queue(jobs) == {
        "a": ["Start next", "Down", "Remove"],
        "b": ["Start next", "Up", "Down", "Remove"],
        "c": ["Start next", "Up", "Remove"],
        "d": ["Stop"],
    }
    jobs.force_stop("d")
    assert of_queue(jobs)["d"] == ["Return to queue", "Remove"]
    queue = jobs.now.queue
    (up,) = (action for action in actions_of_entry(jobs, queue[2], queue) if action.label == "Up")
    assert up.do() is None
    assert [entry.run for entry in jobs.queue.entries()] == ["a", "c", "b", "d"]


def test_a_run_that_is_trained_is_stopped_and_one_that_ended_goes_on(
    jobs: Jobs, runs: Path
) -> None:
    layout = write_run(runs / "fox", MadeRun(steps=4, on_device=False, end=""))
    write_run(runs / "old", MadeRun(steps=4, on_device=False, end="finished"))
    layout.state(2).mkdir()
    with locking(layout.lock):
        begin(layout)
        assert labels(of_run(jobs, "fox")) == ["Stop", "Force stop"]
        jobs.pause("cpu", True)
        assert labels(of_run(jobs, "fox")) == ["Stop", "Return to queue", "Force stop"]
        assert of_run(jobs, "fox")[-1] == forced_stop(jobs, "fox")
        question = forced_stop(jobs, "fox").question
        assert question is not None and "the state of step 2 is kept" in question()
    go_on, delete = of_run(jobs, "fox")
    assert labels([go_on, delete]) == ["Continue", "Delete"]
    assert delete.title == "Delete fox?" and delete.question is not None
    assert str(layout.root) in delete.question()
    assert labels(of_run(jobs, "old")) == ["Delete"]
    jobs.go_on("fox")
    assert of_run(jobs, "fox") == []
    assert jobs.now.queued("old") is None and jobs.now.run("no") is None


def test_a_run_is_steered_while_it_is_trained_and_continued_when_it_has_ended(
    jobs: Jobs, runs: Path, tmp_path: Path
) -> None:
    layout = write_run(runs / "fox", MadeRun(steps=4, on_device=False, end="finished"))
    assert Steering.of(jobs.turn(), "fox") == Steering(can_continue=True)
    layout.state(2).mkdir()
    assert Steering.of(jobs.turn(), "fox") == Steering(can_continue=True, can_export=True)
    jobs.pause("auto", True)
    jobs.go_on("fox")
    note = "In the queue: this queue is paused."
    assert Steering.of(jobs.turn(), "fox") == Steering(can_export=True, note=note)
    with locking(layout.lock):
        begin(layout)
        assert Steering.of(jobs.turn(), "fox") == Steering(is_active=True, can_export=True)
    assert Steering.of(jobs.now, "no") == Steering()
    jobs.queue.add(run_file(tmp_path, "new", "cuda:1"))
    jobs.turn()
    jobs.force_stop("new")
    assert "ended before the run began" in Steering.of(jobs.turn(), "new").note
