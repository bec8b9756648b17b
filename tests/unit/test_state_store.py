"""Training states on disk: complete or absent, rotated, and never those of another process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.interrupted import leave_interrupted, writing

from onewan.checkpoint.store import MANIFEST, DamagedStateError, StateStore
from onewan.errors import CheckpointError
from onewan.runs.layout import RunLayout


def read(folder: Path) -> str:
    return (folder / "weights").read_text()


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
    found = StateStore(layout, keep=1).newest(read)
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

    with pytest.raises(CheckpointError, match=r"000500: the state can't be saved \(disk full\)"):
        StateStore(layout, keep=1).save(500, fail)
    assert free == [True] and not list(layout.states_dir.iterdir())


def test_rotation_keeps_the_newest_states_the_best_and_every_nth(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    store = StateStore(layout, keep=2, keep_every=4)
    for step in range(1, 9):
        store.save(step, write)
        assert store.rotate(step, best=3) == []
    assert list(layout.saved_steps()) == [3, 4, 7, 8]
    assert sorted(p.name for p in layout.states_dir.iterdir()) == [
        layout.state(step).name for step in (3, 4, 7, 8)
    ]


def test_files_in_folders_of_a_state_are_verified_too(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)

    def write_shards(folder: Path) -> None:
        write(folder)
        (folder / "high.shards").mkdir()
        (folder / "high.shards" / "one").write_text("12345")

    StateStore(layout, keep=2).save(1, write)
    StateStore(layout, keep=2).save(2, write_shards)
    assert json.loads((layout.state(2) / MANIFEST).read_text())["high.shards/one"]["bytes"] == 5
    found = StateStore(layout, keep=2).newest(read)
    assert found is not None and found.step == 2
    (layout.state(2) / "high.shards" / "one").write_text("12346")
    found = StateStore(layout, keep=2).newest(read)
    assert found is not None and found.step == 1
    assert "one: does not match its digest" in found.damaged[0]


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

    with pytest.raises(CheckpointError, match=r"000001: the state can't be saved \(disk full\)"):
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
    found = store.newest(read)
    assert found is not None and (found.step, found.content) == (1, "1")
    assert [line.partition(": ")[0] for line in found.damaged] == [
        str(layout.state(3) / "weights"),
        str(layout.state(2) / MANIFEST),
    ]
    (layout.state(1) / "weights").unlink()
    with pytest.raises(CheckpointError, match="no training state is intact") as caught:
        store.newest(read)
    assert all(str(layout.state(step)) in str(caught.value) for step in (1, 2, 3))


def test_a_state_that_the_reader_refuses_is_damaged_and_other_errors_are_the_readers(
    tmp_path: Path,
) -> None:
    layout = RunLayout(tmp_path)
    store = StateStore(layout, keep=3)
    for step in (1, 2):
        store.save(step, write)

    def refuse(folder: Path) -> str:
        if folder == layout.state(2):
            raise DamagedStateError(f"{folder / 'weights'}: step: is 7")
        return "read"

    found = store.newest(refuse)
    assert found is not None and (found.step, found.content) == (1, "read")
    assert found.damaged == (f"{layout.state(2) / 'weights'}: step: is 7",)

    def misfit(folder: Path) -> str:
        raise CheckpointError(f"{folder}: other settings")

    with pytest.raises(CheckpointError, match="000002: other settings"):
        store.newest(misfit)


ENTRY = '{"name": {"bytes": 1, "blake2b": ""}}'


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ("{}", "lists no files"),
        ("[]", "lists no files"),
        ("", "is not valid JSON"),
        ("[" * 5000, "is not valid JSON"),
        ('{"weights": 5}', "'weights' has no size or no digest"),
        ('{"weights": {"bytes": "1", "blake2b": ""}}', "has no size"),
        ('{"weights": {"bytes": true, "blake2b": ""}}', "has no size"),
        (ENTRY.replace('"name"', '"../weights"'), "'../weights' is not the name of a file"),
        (ENTRY.replace('"name"', '"/etc/hostname"'), "is not the name of a file"),
        (ENTRY.replace('"name"', '"C:weights"'), "is not the name of a file"),
        (ENTRY.replace('"name"', '""'), "is not the name of a file"),
        (ENTRY.replace('"name"', '"a/../../weights"'), "is not the name of a file"),
        (ENTRY.replace('"name"', '"a//b"'), "is not the name of a file"),
        (ENTRY.replace('"name"', '"a\\u0000b"'), "is not the name of a file"),
        (ENTRY.replace('"name"', '"folder"'), "folder: can't be read (is a folder"),
        (ENTRY.replace('"name"', '"pipe"'), "pipe: can't be read (is a"),
        (ENTRY.replace('"name"', '"absent"'), "absent: can't be read"),
        (ENTRY.replace('"name"', '"other"'), "does not list weights"),
    ],
)
def test_a_manifest_of_another_form_is_damage(tmp_path: Path, manifest: str, problem: str) -> None:
    layout = RunLayout(tmp_path)
    store = StateStore(layout, keep=2)
    store.save(1, write)
    store.save(2, write)
    folder = layout.state(2)
    (folder / "folder").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    else:
        (folder / "pipe").mkdir()
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")
    required = ["weights"] if "other" in manifest else []
    found = store.newest(read, required)
    assert found is not None and found.step == 1
    (line,) = found.damaged
    assert problem in line and str(folder) in line


def test_rotation_counts_intact_states_and_never_deletes_the_one_just_saved(
    tmp_path: Path,
) -> None:
    layout = RunLayout(tmp_path)
    for step in (2, 4, 6, 8):
        StateStore(layout, keep=9).save(step, write)
    for step in (4, 8):
        (layout.state(step) / "weights").write_text("")
    # A process that continues from step 6: the state of step 8 is damaged.
    store = StateStore(layout, keep=1)
    found = store.newest(read)
    assert found is not None and found.step == 6
    store.save(7, write)
    assert store.rotate(7) == []
    assert layout.saved_steps() == [7, 8]

    layout = RunLayout(tmp_path / "other")
    for step in (2, 4, 6):
        StateStore(layout, keep=9).save(step, write)
    (layout.state(6) / MANIFEST).write_text("{}")
    store = StateStore(layout, keep=2)
    store.save(7, write)
    store.rotate(7)
    assert layout.saved_steps() == [4, 6, 7]  # that of step 6 does not count
    (layout.state(4) / "weights").write_text("2")  # damaged after it was verified
    store.save(8, write)
    store.rotate(8)
    assert layout.saved_steps() == [7, 8]


def test_a_state_that_can_not_be_deleted_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(tmp_path)
    store = StateStore(layout, keep=1)
    for step in (1, 2):
        store.save(step, write)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # root, as whom tests may run, can delete everything.
    monkeypatch.setattr("onewan.checkpoint.store.remove", refuse)
    (problem,) = store.rotate(2)
    assert str(layout.state(1)) in problem and "Permission denied" in problem
