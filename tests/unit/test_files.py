"""Files are complete or absent, and one process never deletes what another one is writing."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from support.interrupted import leave_interrupted, writing

from onewan import files
from onewan.files import (
    ABANDONED_AFTER_SECONDS,
    remove,
    remove_abandoned,
    replacing,
    temporary_beside,
)


def of_another_machine(path: Path) -> Path:
    """`path`, a temporary file of this machine, under the name that another would give it."""
    other = re.sub(r"^\.tmp-[0-9a-f]{8}-", ".tmp-00000000-", path.name)
    assert other != path.name
    return path.rename(path.with_name(other))


def set_age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_complete_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent and temporary.suffix == ".json"
            assert not temporary.exists()
            temporary.write_text(text)
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_in_one_process_have_different_temporary_names(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # its block ended last
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_temporary_file_of_a_live_process_is_kept_until_the_process_ends(
    tmp_path: Path, kind: str
) -> None:
    with writing(tmp_path / "000500", kind=kind) as (_, [temporary]):
        set_age(temporary, 30 * ABANDONED_AFTER_SECONDS)
        remove_abandoned(tmp_path)
        assert temporary.exists()
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_temporary_file_of_this_process_is_kept_only_while_it_is_written(
    tmp_path: Path,
) -> None:
    with temporary_beside(tmp_path / "000500") as temporary:
        temporary.mkdir()
        remove_abandoned(tmp_path)
        assert temporary.is_dir()
    assert not temporary.exists()
    temporary.mkdir()  # as after an earlier process with the same id
    remove_abandoned(tmp_path)
    assert not temporary.exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_temporary_file_of_another_machine_is_removed_after_a_day_without_a_change(
    tmp_path: Path, kind: str
) -> None:
    (left,) = leave_interrupted(tmp_path / "000500", kind=kind)
    left = of_another_machine(left)
    entries = [left / "inside", left] if kind == "folder" else [left]
    for entry in entries:
        set_age(entry, ABANDONED_AFTER_SECONDS - 60)
    remove_abandoned(tmp_path)
    assert left.exists()
    for entry in reversed(entries):
        set_age(entry, ABANDONED_AFTER_SECONDS + 60)
        remove_abandoned(tmp_path)
        # The age of a folder is that of the newest file in it.
        assert left.exists() == (entry != entries[0])


def test_with_a_name_only_temporary_files_of_that_file_are_removed(tmp_path: Path) -> None:
    first, second = leave_interrupted(tmp_path / "a.json", tmp_path / "b.json")
    remove_abandoned(tmp_path, "a.json")
    assert not first.exists() and second.exists()


def test_files_that_are_not_temporary_are_kept(tmp_path: Path) -> None:
    kept = [tmp_path / "a.json", tmp_path / ".hidden"]
    for path in kept:
        path.write_text("kept")
        set_age(path, 2 * ABANDONED_AFTER_SECONDS)
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_temporary_name_contains_machine_process_random_part_and_target(tmp_path: Path) -> None:
    with temporary_beside(tmp_path / "a-b.json") as first:
        pass
    with temporary_beside(tmp_path / "a-b.json") as second:
        pass
    shape = rf"\.tmp-{files._machine()}-{os.getpid()}-[0-9a-f]{{8}}-a-b\.json"
    assert re.fullmatch(shape, first.name) and re.fullmatch(shape, second.name)
    assert first != second


def test_remove_deletes_files_and_folders_with_their_content(tmp_path: Path) -> None:
    folder = tmp_path / "000500"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").touch()
    remove(folder)
    (tmp_path / "file").touch()
    remove(tmp_path / "file")
    assert not list(tmp_path.iterdir())
