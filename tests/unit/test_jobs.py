"""Many runs watched at little cost, and the queue that starts what waits when a device is free."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_runs import MadeRun, write_run
from support.interrupted import leave_interrupted, locking
from support.trainers import begin, eventually, run_file, sleeping_jobs

from onewan.errors import OnewanError
from onewan.runs import statuses
from onewan.runs.deletion import delete_run
from onewan.runs.jobs import Jobs, Snapshot, device_name
from onewan.runs.layout import RunLayout
from onewan.runs.statuses import Statuses

ENDED = MadeRun(steps=4, on_device=False)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def jobs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    with sleeping_jobs(runs, monkeypatch) as jobs:
        yield jobs


def reasons(snapshot: Snapshot) -> dict[str, str]:
    return {each.entry.run: each.reason or each.entry.state for each in snapshot.queue}


# ---------------------------------------------------------------------------------- watching runs


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of runs that are read, as they are."""
    names: list[str] = []
    original: Callable[..., object] = statuses.read_status

    def recorded(folder: Path) -> object:
        names.append(folder.name)
        return original(folder)

    monkeypatch.setattr(statuses, "read_status", recorded)
    return names


def test_only_runs_that_have_changed_are_read_again(runs: Path, read: list[str]) -> None:
    for name in ("a", "b", "c"):
        write_run(runs / name, ENDED)
    (runs / "notes").mkdir()
    (runs / "file.yaml").touch()
    watched = Statuses(runs)
    watched.refresh()
    assert sorted(read) == ["a", "b", "c"] and watched.complete
    read.clear()
    watched.refresh()
    assert read == []
    begin(RunLayout(runs / "b"))
    watched.refresh()
    assert read == ["b"]
    RunLayout(runs / "c").state(4).mkdir()
    watched.refresh()
    assert read == ["b", "c"]
    assert {run.name: run.status and run.status.saved_step for run in watched.runs}["c"] == 4
    (runs / "a").rename(runs / "renamed")
    watched.refresh()
    assert sorted(run.name for run in watched.runs) == ["b", "c", "renamed"]


def test_a_killed_trainer_is_seen_although_no_file_changes(runs: Path) -> None:
    layout = RunLayout(runs / "a")
    watched = Statuses(runs)
    with locking(layout.lock) as process:
        begin(layout)
        watched.refresh()
        (run,) = watched.runs
        assert run.is_trained and run.status is not None and run.status.state == "running"
        process.kill()
        eventually(lambda: (watched.refresh(), watched.runs[0].is_trained)[1] is False)
    (run,) = watched.runs
    assert run.status is not None and run.status.state == "killed"


def test_hundreds_of_runs_are_read_in_parts_the_newest_first(runs: Path) -> None:
    for number in range(5):
        write_run(runs / f"{number}", ENDED)
        os.utime(runs / f"{number}" / "events.jsonl", (number, number))
    watched = Statuses(runs)
    watched.refresh(seconds=0)
    assert [run.name for run in watched.runs] == ["4", "3", "2", "1", "0"]
    assert not watched.complete and not any(run.status for run in watched.runs)
    watched.refresh()
    assert watched.complete and all(run.status for run in watched.runs)


def test_500_runs_that_do_not_change_cost_a_fraction_of_a_second(runs: Path) -> None:
    write_run(runs / "0", ENDED)
    for number in range(1, 500):
        layout = RunLayout(runs / f"{number}")
        layout.create()
        os.link(runs / "0" / "events.jsonl", layout.events)
    watched = Statuses(runs)
    watched.refresh(seconds=60)
    assert watched.complete and len(watched.runs) == 500
    begun = time.process_time()
    watched.refresh()
    assert time.process_time() - begun < 0.5


def test_a_run_that_can_not_be_read_is_told(runs: Path) -> None:
    layout = write_run(runs / "a", ENDED)
    layout.events.unlink()
    layout.events.mkdir()
    watched = Statuses(runs)
    watched.refresh()
    assert watched.runs[0].status is None and "can't be read" in watched.runs[0].problem


def test_the_last_sample_is_the_first_video_of_the_newest_step(runs: Path) -> None:
    layout = write_run(runs / "a", ENDED)
    for step, name in [(2, "0.mp4"), (10, "1.mp4"), (10, "0.mp4"), (10, ".tmp-x.mp4")]:
        layout.samples(step).mkdir(exist_ok=True)
        (layout.samples(step) / name).touch()
    layout.samples(20).mkdir()
    watched = Statuses(runs)
    watched.refresh()
    assert watched.runs[0].sample == layout.samples(10) / "0.mp4"


# --------------------------------------------------------------------------------- starting runs


def test_entries_of_one_device_are_started_one_after_the_other(jobs: Jobs, tmp_path: Path) -> None:
    for name, device in [("a", "cpu"), ("b", "cuda:1"), ("c", "cpu"), ("d", "cpu")]:
        jobs.queue.add(run_file(tmp_path, name, device))
    assert reasons(jobs.turn()) == {
        "a": "started",
        "b": "started",
        "c": "waits for a, which uses the device cpu",
        "d": "waits for a, which uses the device cpu",
    }
    assert reasons(jobs.turn())["c"] == "waits for a, which uses the device cpu"
    jobs.force_stop("a")
    assert reasons(jobs.turn()) == {
        "a": "failed",
        "b": "started",
        "c": "started",
        "d": "waits for c, which uses the device cpu",
    }


def test_a_run_of_a_terminal_keeps_its_device_from_the_queue(
    jobs: Jobs, runs: Path, tmp_path: Path
) -> None:
    layout = write_run(runs / "mira", ENDED)
    settings = layout.resolved.read_text("utf-8")
    layout.resolved.write_text(settings.replace("model:\n", "model:\n  device: cuda:1\n"), "utf-8")
    for name, device in [("a", "cuda:1"), ("b", "cuda:0"), ("c", "auto")]:
        jobs.queue.add(run_file(tmp_path, name, device))
    # Its lock is held before its first event: it is still reading its clips.
    with locking(layout.lock):
        found = reasons(jobs.turn())
    assert found == {
        "a": "waits for mira, which uses the device cuda:1",
        "b": "started",
        "c": "waits for mira, which uses the device cuda:1",  # "auto" may be any of them
    }


def test_a_paused_queue_starts_only_what_is_asked_for(jobs: Jobs, tmp_path: Path) -> None:
    a, b = (jobs.queue.add(run_file(tmp_path, name)) for name in ("a", "b"))
    jobs.pause("cpu", True)
    assert reasons(jobs.turn()) == dict.fromkeys("ab", "this queue is paused")
    assert jobs.now.paused == ("cpu",)
    jobs.queue.start_first(b.id)
    assert reasons(jobs.turn()) == {
        "b": "started",
        "a": "this queue is paused",
    }
    jobs.force_stop("b")
    jobs.turn()
    jobs.pause("cpu", False)
    assert reasons(jobs.turn())["a"] == "started"
    assert jobs.queue.entry(a.id).process is not None


def test_a_run_that_is_given_back_waits_until_its_trainer_has_stopped(
    jobs: Jobs, runs: Path, tmp_path: Path
) -> None:
    jobs.queue.add(run_file(tmp_path, "a"))
    jobs.queue.add(run_file(tmp_path, "b"))
    jobs.turn()
    layout = write_run(runs / "a", MadeRun(steps=4, on_device=False, end=""))
    begin(layout, end=True)
    with locking(layout.lock):
        assert "then it waits in the queue" in jobs.give_back("a")
        assert (layout.control_dir / "stop").exists()
    jobs.force_stop("a")
    assert reasons(jobs.turn()) == {
        "b": "started",
        "a": "waits for b, which uses the device cpu",
    }
    (entry,) = (e for e in jobs.queue.entries() if e.run == "a")
    assert entry.arguments == ("--resume=auto", str(layout.root))


def test_a_trainer_that_has_not_begun_is_stopped_by_ending_it(jobs: Jobs, tmp_path: Path) -> None:
    entry = jobs.queue.add(run_file(tmp_path, "a"))
    jobs.turn()
    assert "before it had begun" in jobs.stop("a")
    jobs.turn()
    assert jobs.queue.entry(entry.id).state == "failed"
    with pytest.raises(OnewanError, match="a: is not being trained"):
        jobs.stop("a")


def test_a_damaged_queue_is_told_and_runs_are_still_shown(jobs: Jobs, runs: Path) -> None:
    write_run(runs / "a", ENDED)
    (runs / ".queue").mkdir()
    (runs / ".queue" / "queue.json").write_text("{", "utf-8")
    found = jobs.turn()
    (runs / ".queue" / "queue.json").unlink()
    assert "queue.json: is no queue" in found.problem and [run.name for run in found.runs] == ["a"]


@pytest.mark.parametrize(
    ("setting", "accelerators", "name"),
    [
        ("auto", 0, "auto"),
        ("auto", 2, "cuda:0"),
        ("cuda", 0, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
        ("xpu", 0, "xpu:0"),
    ],
)
def test_each_device_has_one_name(
    monkeypatch: pytest.MonkeyPatch, setting: str, accelerators: int, name: str
) -> None:
    monkeypatch.delenv("ONEWAN_DEVICE", raising=False)
    assert device_name(setting, accelerators) == name
    monkeypatch.setenv("ONEWAN_DEVICE", "cpu")
    assert device_name(setting, accelerators) == ("cpu" if setting == "auto" else name)


# --------------------------------------------------------------------------------- deleting runs


def test_a_deleted_run_is_gone_with_its_place_in_the_queue(jobs: Jobs, runs: Path) -> None:
    for name in ("a", "b"):
        write_run(runs / name, ENDED)
    jobs.pause("auto", True)
    jobs.go_on("a")
    jobs.delete("a")
    assert sorted(path.name for path in runs.iterdir()) == [".queue", "b"]
    assert jobs.queue.entries() == ()


def test_an_interrupted_deletion_is_completed(runs: Path) -> None:
    write_run(runs / "a", ENDED)
    leave_interrupted(runs / "b", kind="folder")
    assert len(list(runs.iterdir())) == 2
    Jobs(runs)
    assert [path.name for path in runs.iterdir()] == ["a"]


def test_a_run_that_is_trained_is_not_deleted(jobs: Jobs, runs: Path, tmp_path: Path) -> None:
    layout = write_run(runs / "a", ENDED)
    with locking(layout.lock), pytest.raises(OnewanError, match="a: is trained by process"):
        jobs.delete("a")
    jobs.queue.add(run_file(tmp_path, "a"))
    jobs.turn()
    with pytest.raises(OnewanError, match="a: is being trained"):
        jobs.delete("a")
    assert layout.events.exists()


def test_nothing_outside_of_the_folder_of_runs_is_deleted(runs: Path, tmp_path: Path) -> None:
    outside = write_run(tmp_path / "outside", ENDED)
    (runs / "link").symlink_to(outside.root, target_is_directory=True)
    (runs / "plain").mkdir()
    for name in ("../outside", str(outside.root), "", ".", "..", "plain", "nothing"):
        with pytest.raises(OnewanError, match="there is no such run"):
            delete_run(runs, name)
    with pytest.raises(OnewanError, match="is a link to"):
        delete_run(runs, "link")
    assert outside.events.exists() and (runs / "plain").is_dir()
