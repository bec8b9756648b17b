"""What the user sees of errors, and of names with characters that a terminal would obey."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onewan.cli import main
from onewan.cli.boundary import DEFECT_STATUS, guarded
from onewan.cli.progress import Progress
from onewan.config.schema import MemorySection
from onewan.errors import CheckpointError, ConfigError, Interrupted, OnewanError, one_line
from onewan.files import replacing
from onewan.formats.model_folder import raise_problems
from onewan.runs.events import Note, Warned
from onewan.runs.log import RunLog, TextSink, text_log

EVIL = "a\nonewan: done\x1b[2J\x9b1m\r\u202eb\u2028c\udcff.yaml"
"""Escape sequences, line breaks, reordered text and a byte that is not UTF-8."""
SHOWN = r"a\nonewan: done\x1b[2J\x9b1m\r\u202eb\u2028c\udcff.yaml"


def outcome(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit status, stderr) of a command that raises `error`."""

    def command() -> int:
        raise error

    status = guarded(command)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "there is no space left on the disk; free some"),
        (errno.EROFS, "is on a disk that is read-only; choose another place"),
        (errno.EACCES, "permission denied; choose another place"),
        (errno.EISDIR, "is a folder where a file is needed; correct the path"),
        (errno.ENOTDIR, "is not in a folder, since a part of the path is a file; correct"),
        (errno.ENAMETOOLONG, "the path is too long; choose a shorter one"),
        (errno.ELOOP, "is a symbolic link to itself"),
        (errno.EPROTO, f"{os.strerror(errno.EPROTO)}; check the file and its disk"),
    ],
)
def test_errors_of_the_system_are_one_line_with_the_file_and_a_remedy(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, err = outcome(OSError(number, os.strerror(number), "/data/x"), capsys)
    assert status == 1
    assert err.startswith(f"onewan: /data/x: {remedy}")
    assert err.count("\n") == 1


def test_an_error_of_a_library_names_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("Error while serializing: I/O error: No space left (os error 28)")
    assert outcome(error, capsys) == (
        1,
        "onewan: there is no space left on the disk; free some, or choose another disk\n",
    )
    error = ValueError("the library's own words")
    error.__cause__ = PermissionError(errno.EACCES, "Permission denied", "/data/x")
    status, err = outcome(error, capsys)
    assert status == 1 and err.startswith("onewan: /data/x: permission denied; ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "onewan: not enough memory; close other programs"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 ..."),
            "onewan: not enough memory on the device (CUDA out of memory. Tried to allocate 2.00",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "onewan: not enough memory; close other programs",
        ),
    ],
)
def test_too_little_memory_is_one_line_with_remedies(
    error: Exception, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, err = outcome(error, capsys)
    assert status == 1
    assert err.startswith(expected) and err.count("\n") == 1


def test_too_little_memory_of_the_device_names_the_plan_and_the_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, err = outcome(torch.OutOfMemoryError("out of memory"), capsys)
    assert "`onewan plan RUN.yaml`" in err
    named = set(re.findall(r"memory\.([a-z_]+)", err))
    assert {"resident_blocks", "offload_inputs", "keep_attention", "weights"} <= named
    assert named <= set(MemorySection.model_fields)


def test_a_real_allocation_that_is_too_large_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert guarded(lambda: len(torch.empty(2**55))) == 1
    assert capsys.readouterr().err.startswith("onewan: not enough memory; ")


def test_a_stop_by_the_user_has_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(KeyboardInterrupt(), capsys) == (130, "onewan: stopped\n")
    assert outcome(Interrupted(), capsys) == (130, "")  # the progress display has said it


def test_a_defect_leaves_its_traceback_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    status, err = outcome(KeyError(EVIL), capsys)
    assert status == DEFECT_STATUS
    assert err.startswith("onewan: this is a defect of onewan, not of your settings or files: ")
    assert err.count("\n") == 1 and "Traceback" not in err
    file = Path(err.split("which is in ")[1].strip())
    text = file.read_text(encoding="utf-8")
    assert text.startswith("Traceback") and "KeyError" in text
    file.unlink()


def test_a_defect_in_a_run_names_the_log_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        with text_log(tmp_path / "log.txt"):
            try:
                raise KeyError("x")
            except KeyError:
                logging.getLogger("onewan").exception("the run failed")
                raise

    assert guarded(command) == DEFECT_STATUS
    assert f"which is in {tmp_path / 'log.txt'}\n" in capsys.readouterr().err
    assert "KeyError: 'x'" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_failed_write_names_the_final_file_and_leaves_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        with replacing(tmp_path / "out.bin") as path:
            path.write_bytes(b"x")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    assert guarded(command) == 1
    assert capsys.readouterr().err.startswith(f"onewan: {tmp_path / 'out.bin'}: there is no space")
    assert list(tmp_path.iterdir()) == []


def test_several_problems_are_printed_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        raise_problems(["b: is wrong", "a: is wrong", "b: is wrong"])
    status, err = outcome(caught.value, capsys)
    assert status == 1
    assert err.splitlines() == ["onewan: 2 problems", "  a: is wrong", "  b: is wrong"]
    with pytest.raises(CheckpointError, match=r"^a: is wrong$"):
        raise_problems(["a: is wrong"])


# -------------------------------------------------------------------------------------- characters


def test_names_are_printed_without_control_characters() -> None:
    assert one_line(EVIL) == SHOWN
    kept = "caf\u00e9 \N{FOX FACE} \u72d0 \u0bb5\u200d \\n"
    assert one_line(kept) == kept


@pytest.mark.parametrize("error", [OnewanError(EVIL), ConfigError(EVIL, [EVIL]), KeyError(EVIL)])
def test_a_name_in_an_error_can_not_write_lines(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = outcome(error, capsys)
    assert "onewan: done" not in err.splitlines()
    assert err.isascii() and not any(ord(c) < 32 for c in err.replace("\n", ""))


def test_a_name_in_the_progress_can_not_write_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().line(EVIL)
    assert capsys.readouterr().out == f"{SHOWN}\n"


def test_a_name_in_a_warning_can_not_write_lines_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without this, pytest would capture the message too, and pytest-xdist can't send it.
    monkeypatch.setattr(logging.getLogger("onewan"), "propagate", False)
    received: list[object] = []

    class Sink:
        label, required = "sink", False

        def write(self, event: object) -> None:
            received.append(event)

        def close(self) -> None: ...

    with text_log(tmp_path / "log.txt"):
        log = RunLog(Sink(), TextSink())
        log.warn(EVIL)
        log.note(EVIL)
        try:
            raise ValueError(f"{EVIL}\n2026-01-01 INFO onewan: done")
        except ValueError:
            logging.getLogger("onewan").exception(EVIL)
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    records = [line for line in text.splitlines() if not line.startswith("  ")]
    assert len(records) == 3 and all(record.endswith(SHOWN) for record in records)
    assert "\x1b" not in text and "\x9b" not in text
    assert received == [Warned(text=SHOWN), Note(text=SHOWN)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_of_any_bytes_is_printed_on_every_terminal(tmp_path: Path, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onewan", "stop", tmp_path / EVIL],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 1
    (line,) = done.stderr.decode("ascii").splitlines()
    assert line.startswith(f"onewan: {tmp_path}/{SHOWN}: ")


# ------------------------------------------------------------------------------------ real outputs


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["schema"], ["init", "--variant", "t2v-a14b"]])
def test_output_to_a_full_disk_is_an_error_and_a_closed_pipe_is_silent(
    arguments: list[str],
) -> None:
    command = [sys.executable, "-m", "onewan", *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("onewan: the output: there is no space left on the disk; ")
    assert done.stderr.count("\n") == 1
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_wrong_usage_names_arguments_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["inspect", "a", "b\x1b[2J"])
    assert end.value.code == 2
    assert "\x1b" not in capsys.readouterr().err
