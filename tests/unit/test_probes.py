"""Probes of media files are remembered as long as the files are the same."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from onewan.data import probes as probes_module
from onewan.data.probes import MediaProbes
from onewan.errors import DataError
from onewan.media import MediaInfo, probe, write_video


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that have been opened."""
    names = list[str]()

    def counted(path: Path) -> MediaInfo:
        names.append(path.name)
        return probe(path)

    monkeypatch.setattr(probes_module, "probe", counted)
    return names


def video(path: Path, frames: int = 5) -> Path:
    write_video(path, np.zeros((frames, 48, 64, 3), np.uint8), fps=16)
    return path


def test_a_file_is_probed_once_until_it_changes(tmp_path: Path, probed: list[str]) -> None:
    file = tmp_path / "cache" / "probes.jsonl"
    paths = [video(tmp_path / f"{name}.mp4") for name in "abc"]
    probes = MediaProbes(file)
    probes.prepare(paths)
    assert sorted(probed) == ["a.mp4", "b.mp4", "c.mp4"]
    assert [probes.of(path) for path in paths] == [probe(path) for path in paths]
    probes.save()
    later = MediaProbes(file)
    later.prepare(paths)
    assert [later.of(path) for path in paths] == [probe(path) for path in paths]
    assert len(probed) == 3

    video(paths[1], frames=9)
    later = MediaProbes(file)
    assert later.of(paths[1]).last == pytest.approx(8 / 16)
    assert probed[3:] == ["b.mp4"]
    # Also within one process.
    video(paths[1], frames=13)
    assert later.of(paths[1]).last == pytest.approx(12 / 16)


def test_verifying_probes_again_and_remembers_what_it_finds(
    tmp_path: Path, probed: list[str]
) -> None:
    file, path = tmp_path / "probes.jsonl", video(tmp_path / "a.mp4")
    probes = MediaProbes(file)
    probes.of(path)
    probes.save()
    before = file.read_bytes()
    verifying = MediaProbes(file, verify=True)
    assert verifying.of(path) == verifying.of(path) == probe(path)
    verifying.save()
    assert probed == ["a.mp4"] * 2
    assert file.read_bytes() == before  # nothing new
    stat = path.stat()
    lines = file.read_text(encoding="utf-8").replace('"width": 64', '"width": 66')
    file.write_text(lines, encoding="utf-8")
    assert MediaProbes(file).of(path).width == 66  # size and time decide
    verifying = MediaProbes(file, verify=True)
    assert verifying.of(path).width == 64
    verifying.save()
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert MediaProbes(file).of(path).width == 64


@pytest.mark.parametrize("change", ["version", "field", "damage"])
def test_what_another_version_has_found_is_found_out_again(
    tmp_path: Path, probed: list[str], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, path = tmp_path / "probes.jsonl", video(tmp_path / "a.mp4")
    probes = MediaProbes(file)
    probes.of(path)
    probes.save()
    if change == "version":
        monkeypatch.setattr(probes_module, "PROBE_VERSION", "0, PyAV 1.0")
    elif change == "field":
        *head, value = json.loads(file.read_text(encoding="utf-8"))
        del value["codec"]
        file.write_text(json.dumps([*head, value]) + "\n", encoding="utf-8")
    else:
        file.write_bytes(file.read_bytes()[:-20])
    probes = MediaProbes(file)
    assert probes.of(path) == probe(path) and len(probed) == 2
    probes.save()
    assert MediaProbes(file).of(path) == probe(path) and len(probed) == 2


def test_files_that_cannot_be_used_are_reported_each_time_and_not_remembered(
    tmp_path: Path, probed: list[str]
) -> None:
    file, path = tmp_path / "probes.jsonl", tmp_path / "a.mp4"
    path.write_bytes(b"no video")
    probes = MediaProbes(file)
    probes.prepare([path, tmp_path / "absent.mp4"])
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.mp4: is not a video"):
            probes.of(path)
    assert probed.count("a.mp4") == 1
    with pytest.raises(DataError, match=r"absent\.mp4: is not a file"):
        probes.of(tmp_path / "absent.mp4")
    probes.save()
    assert not file.exists()
    video(path)
    assert MediaProbes(file).of(path).width == 64


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are any bytes")
def test_names_that_are_not_unicode_are_remembered(tmp_path: Path, probed: list[str]) -> None:
    path, file = tmp_path / os.fsdecode(b"caf\xe9.mp4"), tmp_path / "probes.jsonl"
    video(tmp_path / "a.mp4").rename(path)
    probes = MediaProbes(file)
    probes.of(path)
    probes.save()
    assert MediaProbes(file).of(path) == probe(path) and len(probed) == 1


def test_new_files_are_probed_several_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [video(tmp_path / f"{number}.mp4") for number in range(2)]
    both = threading.Barrier(2)

    def waiting(path: Path) -> MediaInfo:
        both.wait(timeout=30)  # until the other one is being probed too
        return probe(path)

    monkeypatch.setattr(probes_module, "probe", waiting)
    probes = MediaProbes()
    probes.prepare(files)
    assert [probes.of(file).path for file in files] == files
