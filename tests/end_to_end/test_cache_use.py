"""`onewan cache --stats` and `--prune`: what is counted, what is deleted, and what is asked."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
from support.runs import RunFile

from onewan.cli import main
from onewan.data.encode import no_progress
from onewan.data.file_memory import FileMemory, FileState
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
    assert "every entry is needed" in capsys.readouterr().out
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
    assert f"deleted {sum(both.values()) - sum(needed.values())} of " in capsys.readouterr().out
    assert kinds(own / "cache") == needed
    for name in ("digests.jsonl", "probes.jsonl"):
        lines = (own / "cache" / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) == 5 and not [line for line in lines if "gone.mp4" in line]
    again = run_file("t2v-a14b", f"video_data.cache_dir={own / 'cache'}", name="long2")
    assert WanModelSetup(again).dataset([], no_progress).encoded == 0


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
