"""One process at a time: locks between real processes, and what is left after a kill."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from support.interrupted import locking

from onewan.errors import OnewanError
from onewan.locks import locked, remove_abandoned_locks


def test_the_second_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    run, lock = tmp_path / "runs" / "a", tmp_path / "runs" / "a" / ".lock"
    with locking(lock) as process:
        with pytest.raises(OnewanError) as refused, locked(lock, run, "wait"):
            pytest.fail("both processes hold the lock")
        expected = rf"{run}: is in use by process {process.pid} on {socket.gethostname()} since 20"
        assert str(refused.value).startswith(expected)
        assert str(refused.value).endswith("; wait") and "\n" not in str(refused.value)
        lock.with_name(".lock.json").write_text("{")  # as while it is being written
        with pytest.raises(OnewanError, match="by another process"), locked(lock, run, "wait"):
            pass
    # The process was killed and its files are still there, but they lock nothing.
    assert lock.exists()
    with locked(lock, run, "wait"):
        holder = json.loads(lock.with_name(".lock.json").read_text())
        assert holder["process"] == os.getpid()
    assert not (tmp_path / "runs" / "a").exists() or not list(run.iterdir())


def test_nothing_is_left_after_the_block_not_even_new_folders(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "run" / ".lock"
    with pytest.raises(KeyError), locked(lock, lock.parent, ""):
        assert lock.exists()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with locked(lock, lock.parent, ""):
        (lock.parent / "result").touch()
    assert [path.name for path in lock.parent.iterdir()] == ["result"]


def test_only_locks_that_nobody_holds_are_removed(tmp_path: Path) -> None:
    with locking(tmp_path / ".lock-a.safetensors"):
        pass  # the process was killed
    with locking(tmp_path / ".lock-b"):
        remove_abandoned_locks(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock-b", ".lock-b.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows can't rename the folder of an open file")
def test_a_renamed_folder_takes_its_lock_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    with locked(lock, lock.parent, ""):
        lock.parent.rename(tmp_path / "renamed")
        second = locked(lock, lock.parent, "")
        second.__enter__()
    with pytest.raises(OnewanError, match="is in use by process"), locked(lock, lock.parent, ""):
        pass
    second.__exit__(None, None, None)


def test_without_locks_in_the_file_system_the_block_runs_after_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path / ".lock", tmp_path, ""):
        (tmp_path / "result").touch()
    assert f"{tmp_path}: can't be locked" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where no file can be created")
def test_a_place_where_nothing_can_be_created_is_not_called_in_use() -> None:
    with pytest.raises(FileNotFoundError), locked(Path("/proc/.lock"), Path("/proc"), "wait"):
        pass
