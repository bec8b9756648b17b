"""What Windows and macOS do otherwise than Linux, simulated: names, paths, open files, missing
functions of the system."""

from __future__ import annotations

import ast
import errno
import ntpath
import os
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest

import onewan
from onewan import files
from onewan.cli import boundary
from onewan.cli.boundary import fixable_line
from onewan.config.load import run_of_settings
from onewan.data.sources import place
from onewan.data.sources.folder import read_folder
from onewan.data.sources.place import LocalPlace, clip_name, inner_path
from onewan.errors import ConfigError
from onewan.files import remove, replacing, sync, windows_reserves
from onewan.runs.layout import RunLayout
from onewan.train.exporting import WeightExporter

SOURCE = Path(onewan.__file__).parent
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    *("os.fork", "os.forkpty", "os.getuid", "os.geteuid", "os.getgid", "os.getpgid", "os.killpg"),
    *("os.setsid", "os.mkfifo", "os.mknod", "os.chown", "os.nice", "os.statvfs", "os.sysconf"),
    *("os.sched_getaffinity", "os.posix_fadvise", "os.symlink", "os.kill", "os.uname", "os.wait"),
    *("os.O_DIRECTORY", "os.O_NOFOLLOW", "os.O_NONBLOCK", "os.O_CLOEXEC"),
    *("signal.SIGHUP", "signal.SIGUSR1", "signal.SIGUSR2", "signal.SIGKILL", "signal.SIGALRM"),
    *("signal.alarm", "signal.setitimer", "signal.pause", "signal.pthread_sigmask"),
}
"""What Windows has not, or, as `os.kill` and `os.symlink`, has with another meaning or not for
everyone."""
GUARDED = {
    ("files.py", "fcntl"),  # under `sys.platform == "darwin"`
    # Process groups, which Windows has not: under `not IS_WINDOWS`.
    *(("runs/processes.py", name) for name in ("os.getpgid", "os.killpg", "signal.SIGKILL")),
}


TREES = {
    path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in SOURCE.rglob("*.py")
}


def used_names(tree: ast.Module) -> set[str]:
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def test_nothing_that_only_posix_has_is_used() -> None:
    uses = {
        (path, name)
        for path, tree in TREES.items()
        for name in used_names(tree) & (POSIX_MODULES | POSIX_NAMES)
    }
    assert uses == GUARDED


def test_text_is_opened_with_an_encoding_and_no_process_is_forked() -> None:
    problems = list[str]()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {keyword.arg for keyword in node.keywords}
                if node.func.attr == "write_text" and "encoding" not in named:
                    problems.append(f"{path}:{node.lineno}")
                if node.func.attr == "read_text" and not node.args and "encoding" not in named:
                    problems.append(f"{path}:{node.lineno}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                problems += [f"{path}: {n}" for n in names if str(n).startswith("multiprocessing")]
    assert problems == []


# ------------------------------------------------------------------------------------- open files


def held(number: int) -> PermissionError:
    """What Windows raises while another program has a file open."""
    error = PermissionError(errno.EACCES, "The process cannot access the file")
    error.winerror = number  # pyright: ignore[reportAttributeAccessIssue]
    return error


class HeldFile:
    """An operation of the system that fails `times` times, as on a file that is open elsewhere."""

    def __init__(self, plain: Any, times: int, number: int = 32) -> None:
        self._plain, self.left, self._number = plain, times, number

    def __call__(self, *given: Any) -> Any:
        if self.left:
            self.left -= 1
            raise held(self._number)
        return self._plain(*given)


def test_a_file_that_is_open_for_a_moment_is_replaced_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    operation = HeldFile(os.replace, times=3)
    monkeypatch.setattr(os, "replace", operation)
    with replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new" and operation.left == 0
    operation.left = 2
    folder = tmp_path / "state"
    folder.mkdir()
    remove(folder)
    assert not folder.exists() and operation.left == 0


def test_a_file_that_stays_open_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(files, "_HELD_SECONDS", 0.05)
    monkeypatch.setattr(os, "replace", HeldFile(os.replace, times=1000))
    with pytest.raises(PermissionError) as caught, replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "old" and [*tmp_path.iterdir()] == [path]
    line = fixable_line(caught.value)
    assert line == f"{path}: is used by another program; close that"


def test_an_old_export_that_is_open_elsewhere_is_deleted_at_a_later_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(tmp_path / "fox")
    layout.weights_dir.mkdir(parents=True)
    for step in (1, 2, 3):
        (layout.weights_dir / f"fox_{step:06}.safetensors").touch()
    warnings = list[str]()
    log: Any = SimpleNamespace(warn_once=lambda text, **_: warnings.append(text))
    exporter = WeightExporter(layout, log)
    monkeypatch.setattr(files, "_HELD_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", HeldFile(Path.unlink, times=2, number=32))
        exporter._delete_old(1)
    assert [*layout.exported()] == [1, 2, 3]
    assert [w.split(": ")[0] for w in warnings] == [
        str(layout.weights_dir / f"fox_{step:06}.safetensors") for step in (1, 2)
    ]
    exporter._delete_old(1)
    assert [*layout.exported()] == [3] and len(warnings) == 2


def test_other_errors_of_renaming_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = HeldFile(os.replace, times=5, number=19)  # the disk is write-protected
    monkeypatch.setattr(os, "replace", operation)
    with pytest.raises(PermissionError), replacing(tmp_path / "a") as temporary:
        temporary.touch()
    assert operation.left == 4


def test_a_folder_that_the_disk_does_not_sync_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")


def test_macos_empties_the_memory_of_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()
    macos = SimpleNamespace(F_FULLFSYNC=51, fcntl=lambda _handle, code: calls.append(code))
    monkeypatch.setitem(sys.modules, "fcntl", macos)
    monkeypatch.setattr(files.sys, "platform", "darwin")
    sync(tmp_path)
    assert calls == [51]


# -------------------------------------------------------------------------------- names and paths


@pytest.mark.parametrize(
    "name",
    ["CON", "nul", "aux.txt", "Com1.tar.gz", "LPT\u00b2", "prn .mp4", "CONIN$", "fox.", "fox "],
)
def test_names_that_windows_keeps_for_itself(name: str) -> None:
    assert windows_reserves(name)
    if "$" not in name and "\u00b2" not in name:  # Python's table, which lacks some
        assert PureWindowsPath(name).is_reserved() or name[-1] in ". "
    with pytest.raises(ConfigError, match=r"output\.name: is no name of a folder on Win"):
        run_of_settings({"model": {"variant": "ti2v-5b"}, "output": {"name": name}}, "run file")


@pytest.mark.parametrize("name", ["console", "com", "COM10", "my.aux", "nullify.mp4", "v1.0", "é"])
def test_names_that_only_look_like_them(name: str) -> None:
    assert not windows_reserves(name) and not PureWindowsPath(name).is_reserved()


def test_a_table_written_on_windows_names_files_below_its_folder(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "fox.mp4").touch()
    found = LocalPlace(tmp_path).named("clips\\fox.mp4", tmp_path / "clips.csv")
    assert found == tmp_path / "clips" / "fox.mp4"


@pytest.mark.parametrize(
    "name", ["C:\\clips\\fox.mp4", "\\\\server\\share\\fox.mp4", "..\\fox.mp4"]
)
def test_a_name_from_elsewhere_leads_nowhere_on_windows_either(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of its folder"):
        inner_path(name)


def test_a_name_from_elsewhere_is_no_device_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clips/aux.mp4", "nul.txt", "a/fox.txt.", "fox:stream.mp4"):
        assert inner_path(name).as_posix() == name
    monkeypatch.setattr(place, "IS_WINDOWS", True)
    for name in ("clips/aux.mp4", "nul.txt", "a/fox.txt.", "fox:stream.mp4"):
        with pytest.raises(ValueError, match="is no name that a file can have here"):
            inner_path(name)


def test_a_clip_on_another_drive_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="mount"):  # as Windows' own function does it
        ntpath.relpath("D:\\clips\\fox.mp4", "C:\\tables")
    assert clip_name(tmp_path / "clips" / "fox.mp4", tmp_path / "tables") == "../clips/fox.mp4"

    def other_drive(*_: Any) -> str:
        return ntpath.relpath("D:\\clips\\fox.mp4", "C:\\tables")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert clip_name(tmp_path / "clips" / "fox.mp4", tmp_path / "tables") == "fox.mp4"


def test_captions_are_found_in_capital_letters_as_windows_finds_them(tmp_path: Path) -> None:
    for name in ("fox.MP4", "Fox.TXT", "FOX.mask.png", "A.mp4", "a.MP4", "A.txt", "a.txt", "B.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "b.mp4").touch()
    (tmp_path / "B.TXT").touch()
    contents = read_folder(LocalPlace(tmp_path).listing(), "clips", ["mp4"], use_masks=True)
    captions = {item.name: [path.name for path in item.texts] for item in contents.items}
    assert captions == {
        "A.mp4": ["A.txt"],
        "B.mp4": ["B.TXT"],
        "a.MP4": ["a.txt"],
        "b.mp4": [],  # it is that of B, which has the same letters
        "fox.MP4": ["Fox.TXT"],
    }
    masks = {item.name: [path.name for path in item.masks] for item in contents.items}
    assert masks["fox.MP4"] == ["FOX.mask.png"] and contents.warnings == []
    (tmp_path / "FOX.txt").touch()
    contents = read_folder(LocalPlace(tmp_path).listing(), "clips", ["mp4"])
    (fox,) = (item for item in contents.items if item.name == "fox.MP4")
    assert sorted(path.name for path in fox.texts) == [
        "FOX.txt",
        "Fox.TXT",
    ]  # of which one has to go


def test_a_path_that_is_too_long_for_windows_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = "C:\\" + "folder\\" * 40
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", path)
    assert "there is no such file" in str(fixable_line(error))
    monkeypatch.setattr(boundary, "IS_WINDOWS", True)
    assert "the path has 260 characters or more" in str(fixable_line(error))
    error.filename = "C:\\a"
    assert "there is no such file" in str(fixable_line(error))
