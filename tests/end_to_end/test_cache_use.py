"""`onewan cache --stats` and `--prune`: what is counted, what is deleted, and what is asked."""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import RunFile

from onewan.cli import main
from onewan.data.encode import no_progress
from onewan.data.file_memory import FileMemory, FileState
from onewan.data.sources import remote
from onewan.train.run import sample_requests
from onewan.train.setup import WanModelSetup


@pytest.fixture
def own(workshop: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the clips, which the test may change."""
    shutil.copytree(workshop / "clips", tmp_path / "clips")
    return tmp_path


def filled(run_file: RunFile, own: Path, name: str, *overrides: str) -> Path:
    """A run file whose cache is filled, in a folder that all of them share."""
    places = (f"[{{path: {(own / 'clips').as_posix()}}}]", (own / "cache").as_posix())
    config = run_file(
        "t2v-a14b",
        f"video_data.sources={places[0]}",
        f"video_data.cache_dir={places[1]}",
        *overrides,
        name=name,
    )
    WanModelSetup(config).dataset(sample_requests(config), no_progress)
    # As the command reads it: without the overrides of `run_file`.
    path = own / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").replace("max_frames: 9", _frames(overrides))
    clips = Path(lines.split("path: ")[2].split("}")[0]).as_posix()
    lines = lines.replace(clips, (own / "clips").as_posix())
    cache = lines.split("cache_dir: ")[1].split("\n")[0]
    path.write_text(lines.replace(cache, places[1]), encoding="utf-8")
    return path


def _frames(overrides: tuple[str, ...]) -> str:
    (frames,) = [o.split("=")[1] for o in overrides if "max_frames" in o] or ["9"]
    return f"max_frames: {frames}"


def kinds(cache: Path) -> dict[str, int]:
    return {
        kind: len(list((cache / kind).rglob("*.safetensors")))
        for kind in ("video", "text", "preview")
    }


def test_what_no_run_file_needs_is_deleted_after_asking(
    run_file: RunFile,
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = filled(run_file, own, "long")
    needed = kinds(own / "cache")
    short = filled(run_file, own, "short", "wan_config.max_frames=5")
    both = kinds(own / "cache")
    more = both["video"] - needed["video"]
    assert more == 4 and both["text"] == needed["text"]

    assert main(["cache", str(long), "--stats"]) == 0
    shown = capsys.readouterr().out
    assert f"clips: {both['video']} (" in shown and f"), {needed['video']} used" in shown
    assert main(["cache", str(long), str(short), "--prune"]) == 0
    assert "everything in it is needed" in capsys.readouterr().out
    assert kinds(own / "cache") == both

    # In a script, only with --yes.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["cache", str(long), "--prune"]) == 1
    assert "add --yes in a script" in capsys.readouterr().err
    terminal = io.StringIO("n\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["cache", str(long), "--prune"]) == 0
    told = capsys.readouterr().err
    assert f"clips: {more} of {both['video']} are not needed (" in told
    assert "Name all run files that share it. [y/N]" in told and "nothing was deleted" in told
    assert kinds(own / "cache") == both

    gone = own / "gone.mp4"
    gone.write_bytes(b"1")
    for name in ("digests.jsonl", "probes.jsonl"):
        memory = FileMemory(own / "cache" / name)
        memory.set(gone, FileState.of(gone), "x")
        memory.save()
    gone.unlink()
    assert main(["cache", "--prune", "--yes", str(long)]) == 0
    # With the contact sheet of the other run.
    assert f"deleted {sum(both.values()) - sum(needed.values()) + 1} of " in capsys.readouterr().out
    assert [page.name for page in (own / "cache").glob("*.jpg")] == ["contact_sheet_long.jpg"]
    assert kinds(own / "cache") == needed
    for name in ("digests.jsonl", "probes.jsonl"):
        lines = (own / "cache" / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) == 5 and not [line for line in lines if "gone.mp4" in line]
    again = run_file("t2v-a14b", f"video_data.cache_dir={own / 'cache'}", name="long2")
    assert WanModelSetup(again).dataset([], no_progress).encoded == 0


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    fs = pytest.importorskip("fsspec").filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def from_elsewhere(run_file: RunFile, own: Path, name: str, source: str) -> Path:
    """A run file with one source, whose cache is the one that all of them share."""
    run_file("t2v-a14b", name=name)
    path = own / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [f"  sources: [{{path: '{source}'}}]" if "sources:" in line else line for line in lines]
    cache = f"  cache_dir: {(own / 'cache').as_posix()}"
    lines = [cache if "cache_dir:" in line else line for line in lines]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert main(["cache", str(path)]) == 0
    return path


def test_copies_of_remote_files_and_unpacked_archives_are_kept_as_long_as_a_run_needs_them(
    run_file: RunFile, own: Path, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("blue_circle.webm", "red_square.mp4")):
        for place in ("first", "second"):
            data = (own / "clips" / name).read_bytes()
            memory.pipe(f"/{place}/sub/{number}{Path(name).suffix}", data)
            memory.pipe(f"/{place}/sub/{number}.txt", b"a shape")
    with tarfile.open(own / "a.tar", "w") as tar:
        for file in sorted((own / "clips").iterdir())[:4]:
            tar.add(file, file.name)
    cache = own / "cache"
    runs = {
        "first": from_elsewhere(run_file, own, "first", "memory://first"),
        "second": from_elsewhere(run_file, own, "second", "memory://second"),
        "shards": from_elsewhere(run_file, own, "shards", (own / "a.tar").as_posix()),
    }
    (copy,) = cache.glob("remote/*first-*/sub/1.mp4")
    # A copy of the first run that was interrupted, and one that nobody needs any more.
    parts = [copy.with_name(".part-1.mp4"), copy.with_name(".part-9.mp4")]
    for part in parts:
        part.write_bytes(b"1")
        part.with_name(f"{part.name}.about.json").write_bytes(b"{}")
    capsys.readouterr()
    assert main(["cache", str(runs["first"]), "--stats"]) == 0
    shown = capsys.readouterr().out
    assert "  copies of remote files: 12 (" in shown and "), 6 used (" in shown
    assert "  unpacked archives: 1 (" in shown and "), 0 used (0 B)" in shown
    assert "  pages of contact sheets: 3 (" in shown and "), 1 used (" in shown

    assert main(["cache", *map(str, runs.values()), "--prune", "--yes"]) == 0
    assert "deleted 2 of " in capsys.readouterr().out
    assert parts[0].exists() and not parts[1].exists()
    assert main(["cache", str(runs["first"]), "--prune", "--yes"]) == 0
    told = capsys.readouterr().err
    assert "copies of remote files: 4 of 10 are not needed (" in told
    assert "unpacked archives: 1 of 1 are not needed (" in told
    assert "pages of contact sheets: 2 of 3 are not needed (" in told
    assert [page.name for page in cache.glob("*.jpg")] == ["contact_sheet_first.jpg"]
    assert not list((cache / "shards").iterdir())
    (folder,) = (path for path in (cache / "remote").iterdir() if path.is_dir())
    assert copy.is_relative_to(folder)
    records = (cache / "remote" / "files.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(records) == 4 and not [line for line in records if "second" in line]
    # Nothing that the run needs is gone: it fetches and encodes nothing again.
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("1.mp4")}
    assert main(["cache", str(runs["first"])]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in cache.rglob("1.mp4")}
    assert "encoding" not in capsys.readouterr().out
    # What was deleted is made again when it is needed.
    assert main(["cache", str(runs["shards"])]) == 0
    assert list((cache / "shards").iterdir())


def test_a_file_that_can_not_be_fetched_now_deletes_nothing(
    run_file: RunFile,
    own: Path,
    memory: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory.pipe("/a/1.mp4", next((own / "clips").glob("*.mp4")).read_bytes())
    memory.pipe("/a/1.txt", b"a shape")
    path = from_elsewhere(run_file, own, "run", "memory://a")
    before = kinds(own / "cache")
    next((own / "cache").glob("remote/*/1.mp4")).unlink()

    def refuse(*_: object, **__: object) -> None:
        raise OSError("the connection was lost")

    monkeypatch.setattr(remote, "_WAITS", (0.0,))
    monkeypatch.setattr(type(memory), "_open", refuse)
    assert main(["cache", str(path), "--prune", "--yes"]) == 1
    told = capsys.readouterr().err
    assert "can't be fetched; try again later" in told
    assert "1.mp4: can't be read (the connection was lost), after 2 tries" in told
    assert kinds(own / "cache") == before


def test_a_source_that_can_not_be_read_deletes_nothing(
    run_file: RunFile, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(run_file, own, "run")
    before = kinds(own / "cache")
    (own / "clips").rename(own / "unmounted")
    assert main(["cache", str(path), "--prune", "--yes"]) == 1
    assert "clips" in capsys.readouterr().err
    assert kinds(own / "cache") == before
    with pytest.raises(SystemExit, match="2"):
        main(["cache", str(path), "--stats", "--prune"])
