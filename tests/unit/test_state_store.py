"""Training states on disk: complete or absent, rotated, and never those of another process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.interrupted import leave_interrupted, writing

from onewan.checkpoint.store import MANIFEST, StateStore
from onewan.errors import CheckpointError
from onewan.runs.layout import RunLayout


def write(folder: Path) -> None:
    assert not list(folder.iterdir())  # a staging folder starts empty
    (folder / "weights").write_text("1")


def test_an_incomplete_state_is_kept_for_a_live_process_and_removed_if_abandoned(
    tmp_path: Path,
) -> None:
    layout = RunLayout(tmp_path)
    (abandoned,) = leave_interrupted(layout.state(500), kind="folder")
    with writing(layout.state(500), kind="folder") as (_, [half]):
        StateStore(layout, keep=1).save(500, write)
        assert half.exists() and not abandoned.exists()
    found = StateStore(layout, keep=1).newest()
    assert found is not None and found.step == 500 and found.damaged == ()
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(["weights", MANIFEST])


def test_a_killed_save_keeps_no_space_from_the_next_one(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    leave_interrupted(layout.state(400), layout.state(500), kind="folder")
    free: list[bool] = []

    def fail(folder: Path) -> None:
        free.append([p for p in layout.states_dir.iterdir() if p != folder] == [])
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        StateStore(layout, keep=1).save(500, fail)
    assert free == [True] and not list(layout.states_dir.iterdir())


def test_rotation_keeps_the_newest_states_the_best_and_every_nth(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    store = StateStore(layout, keep=2, keep_every=4)
    for step in range(1, 9):
        store.save(step, write, best=3)
    assert list(layout.saved_steps()) == [3, 4, 7, 8]
    assert sorted(p.name for p in layout.states_dir.iterdir()) == [
        layout.state(step).name for step in (3, 4, 7, 8)
    ]


def test_saving_a_step_again_replaces_its_state(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    store = StateStore(layout, keep=2)
    store.save(1, write)
    store.save(1, lambda folder: (folder / "other").touch())
    assert sorted(p.name for p in layout.state(1).iterdir()) == sorted(["other", MANIFEST])


def test_a_failed_save_keeps_the_old_state(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    store = StateStore(layout, keep=2)
    store.save(1, write)

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.save(1, fail)
    assert [p.name for p in layout.states_dir.iterdir()] == [layout.state(1).name]
    assert (layout.state(1) / "weights").read_text() == "1"


def test_damaged_states_are_skipped_and_reported(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    store = StateStore(layout, keep=3)
    for step in (1, 2, 3):
        store.save(step, write)
    (layout.state(3) / "weights").write_text("2")
    (layout.state(2) / MANIFEST).unlink()
    found = store.newest()
    assert found is not None and found.step == 1
    assert [line.partition(":")[0] for line in found.damaged] == [
        str(layout.state(3)),
        str(layout.state(2)),
    ]
    (layout.state(1) / "weights").unlink()
    with pytest.raises(CheckpointError) as caught:
        store.newest()
    assert all(str(layout.state(step)) in str(caught.value) for step in (1, 2, 3))
