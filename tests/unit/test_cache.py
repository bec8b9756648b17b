"""The cache on disk, shared by several processes, and the stored digests of files' content."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from onewan.data.cache import ContentDigests, EntryCache
from onewan.files import file_digest

KEY = "0" * 40


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the media files whose content has been read."""
    names = list[str]()

    def counted(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr("onewan.data.cache.file_digest", counted)
    return names


def media_file(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_digest_is_computed_once_until_the_file_changes(
    tmp_path: Path, computed: list[str]
) -> None:
    file = tmp_path / "cache" / "digests.jsonl"
    path = media_file(tmp_path / "a.mp4", "one")
    digests = ContentDigests(file)
    assert digests.of(path) == digests.of(path) == file_digest(path)
    digests.save()
    assert ContentDigests(file).of(path) == file_digest(path) and computed == ["a.mp4"]

    media_file(path, "another")
    digests = ContentDigests(file)
    assert digests.of(path) == file_digest(path)
    digests.save()
    assert ContentDigests(file).of(path) == file_digest(path) and computed == ["a.mp4"] * 2


def test_processes_keep_each_others_digests(tmp_path: Path, computed: list[str]) -> None:
    """Both have read the file before either writes it."""
    file = tmp_path / "digests.jsonl"
    paths = [media_file(tmp_path / name, name) for name in ("a", "b", "c")]
    one, other = ContentDigests(file), ContentDigests(file)
    one.of(paths[0])
    other.of(paths[1])
    one.save()
    other.save()
    one.of(paths[2])
    one.save()
    assert computed == ["a", "b", "c"]
    later = ContentDigests(file)
    assert [later.of(path) for path in paths] == [file_digest(path) for path in paths]
    assert computed == ["a", "b", "c"]


def test_a_damaged_line_loses_one_digest_and_no_other(tmp_path: Path, computed: list[str]) -> None:
    file = tmp_path / "digests.jsonl"
    paths = [media_file(tmp_path / name, name) for name in ("a", "b", "c")]
    for path in paths[:2]:
        digests = ContentDigests(file)
        digests.of(path)
        digests.save()
    # As after a process that was killed while it wrote: half a line without its end.
    file.write_bytes(file.read_bytes().rstrip(b"\n")[:-20] + b"\xff")
    digests = ContentDigests(file)
    digests.of(paths[2])  # appended after the half line
    digests.save()
    later = ContentDigests(file)
    assert [later.of(path) for path in paths] == [file_digest(path) for path in paths]
    assert computed == ["a", "b", "c", "b"]


def test_concurrent_writers_of_one_entry_leave_a_complete_one(tmp_path: Path) -> None:
    cache = EntryCache(tmp_path)

    def write(number: int) -> None:
        for _ in range(20):
            cache.save("video", KEY, {"latents": torch.full((256, 64), float(number))}, "a clip")

    cache.save("video", KEY, {"latents": torch.zeros(256, 64)}, "a clip")
    with ThreadPoolExecutor(max_workers=2) as pool:
        writers = [pool.submit(write, number) for number in (1, 2)]
        while not all(writer.done() for writer in writers):
            assert cache.problem("video", KEY) is None
        for writer in writers:
            writer.result()
    assert cache.problem("video", KEY) is None
    names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert names == [f"{KEY}.safetensors"], "no temporary file is left"
