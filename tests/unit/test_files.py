"""Files are complete or absent, and one process never deletes what another one is writing."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.interrupted import leave_interrupted, replace_and_die, writing

from onewan import files
from onewan.files import (
    ABANDONED_AFTER_SECONDS,
    check_input,
    creating,
    link_or_copy,
    read_input,
    remove,
    remove_abandoned,
    replace,
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


@pytest.mark.parametrize(
    "system", ["hard links", "no hard links", "no renaming without replacement either"]
)
def test_a_new_file_is_complete_and_never_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if system != "hard links":
        monkeypatch.setattr(os, "link", link)
    if system == "no renaming without replacement either":
        monkeypatch.setattr(files, "_renamed", lambda *_: False)
    path = tmp_path / "new.txt"
    with creating(path) as temporary:
        temporary.write_text("complete", encoding="utf-8")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "complete"
    for other in (path, tmp_path / "meanwhile.txt"):
        with pytest.raises(FileExistsError), creating(other) as temporary:
            temporary.write_text("lost", encoding="utf-8")
            if not other.exists():
                other.write_text("by another", encoding="utf-8")
    with pytest.raises(KeyError), creating(tmp_path / "broken.txt") as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise KeyError
    assert {entry.name: entry.read_text(encoding="utf-8") for entry in tmp_path.iterdir()} == {
        "new.txt": "complete",
        "meanwhile.txt": "by another",
    }


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
    shape = rf"\.tmp-{files.machine()}-{os.getpid()}-[0-9a-f]{{8}}-a-b\.json"
    assert re.fullmatch(shape, first.name) and re.fullmatch(shape, second.name)
    assert first != second
    with temporary_beside(first) as nested:  # a file that is written into a staging place
        assert re.fullmatch(shape, nested.name) and nested != first


def test_a_leftover_with_the_same_temporary_name_never_becomes_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 2 * count)
    with temporary_beside(tmp_path / "out") as temporary:
        name = temporary.name
    (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / name / "deep" / "stale").touch()
    with temporary_beside(tmp_path / "out") as temporary:
        assert temporary.name == name and not temporary.exists()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")  # writing would follow it
    with replacing(tmp_path / "out") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_writing_a_file_deletes_what_interrupted_writers_left_of_it(tmp_path: Path) -> None:
    leave_interrupted(tmp_path / "a.json")
    with replacing(tmp_path / "a.json") as temporary:
        assert not list(tmp_path.iterdir())
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems can't exchange two folders")
def test_a_replaced_folder_is_complete_after_every_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"

    def checked(rename: Callable[..., None]) -> Callable[..., None]:
        def rename_and_look(*paths: Path) -> None:
            rename(*paths)
            assert (model / "config.json").exists()

        return rename_and_look

    for name in ("rename", "replace"):
        monkeypatch.setattr(files.os, name, checked(getattr(os, name)))
    for content in ("old", "new"):
        with temporary_beside(model) as staging:
            staging.mkdir()
            (staging / "config.json").write_text(content)
            replace(staging, model)
    assert (model / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(("after_renames", "content"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_kill_while_a_folder_is_replaced_loses_neither_the_old_nor_the_new_one(
    tmp_path: Path, after_renames: int, content: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("old")
    replace_and_die(model, after_renames=after_renames)
    assert model.exists() == (after_renames != 1)
    notices = remove_abandoned(tmp_path, "model")
    assert (model / "config.json").read_text() == content
    assert list(tmp_path.iterdir()) == [model]
    moved_back = [f"{model}: moved back; replacing it was interrupted"]
    assert notices == (moved_back if after_renames == 1 else [])


def test_a_folder_is_replaced_without_an_exchange_and_moved_back_if_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_renamed", lambda _first, _second, _flag: False)
    model = tmp_path / "model"
    for content in ("old", "new"):
        with temporary_beside(model) as staging:
            staging.mkdir()
            (staging / "config.json").write_text(content)
            replace(staging, model)
    with pytest.raises(FileNotFoundError), temporary_beside(model) as staging:
        replace(staging, model)  # nothing was written there
    assert (model / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [model]


def test_large_leftovers_are_mentioned_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave_interrupted(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    other = of_another_machine(left[0])
    for path in (other, *left[1:]):
        path.write_bytes(b"0" * 20_000_000)
    monkeypatch.setattr(files, "LARGE_BYTES", 40_000_001)
    remove_abandoned(tmp_path, "c")
    left[2].write_bytes(b"0" * 20_000_000)
    assert remove_abandoned(tmp_path) == []
    left[1].write_bytes(b"0" * 20_000_000)
    left[2].write_bytes(b"0" * 20_000_000)
    monkeypatch.setattr(files, "LARGE_BYTES", 10_000_000)
    kept, deleted = remove_abandoned(tmp_path)
    assert kept.startswith(f"{other}: 0.02 GB, is left from another machine")
    assert deleted == "deleted 2 temporary files of interrupted processes (0.04 GB)"
    assert list(tmp_path.iterdir()) == [other]


def test_remove_deletes_files_and_folders_with_their_content(tmp_path: Path) -> None:
    folder = tmp_path / "000500"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").touch()
    remove(folder)
    (tmp_path / "file").touch()
    remove(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_file_or_folder_is_linked_or_copied_over_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def refused(*_: object) -> None:
            raise OSError(errno.ENOTSUP, "Operation not supported")

        monkeypatch.setattr(os, "link", refused)
    for name in ("new", "old"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text(name)
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "old" / "left").touch()
    for ending in ("", ".txt"):
        new, old = tmp_path / f"new{ending}", tmp_path / f"old{ending}"
        link_or_copy(new, old)
        inner = "" if ending else "deep/file"
        assert (old / inner).read_text() == "new"
        assert (old / inner).samefile(new / inner) == links
        link_or_copy(new, old)  # the same once more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.txt", "old", "old.txt"]
    assert not (tmp_path / "old" / "left").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files in folders")
def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    fifo, name = tmp_path / "fifo", tmp_path / "socket"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(name))
        for path, expected in (
            (fifo, "is a FIFO, not a file"),
            (name, "is a socket, not a file"),
            (Path("/dev/zero"), "is a device, not a file"),
            (tmp_path, "is a folder, not a file"),
        ):
            with pytest.raises(OSError, match=expected) as caught:
                read_input(path, 10)
            assert caught.value.filename == str(path)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 2048)
    assert check_input(file) == file
    assert read_input(file, 2048) == b"x" * 2048
    with pytest.raises(OSError, match="is larger than 1 KiB"):
        read_input(file, 1024)
