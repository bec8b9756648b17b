"""The cache on disk, shared by several processes, and the stored digests of files' content."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from onewan.data import cache as cache_module
from onewan.data.cache import ContentDigests, EntryCache
from onewan.data.encode import too_long_warnings
from onewan.data.keys import entry_key
from onewan.errors import DataError
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


def test_a_file_replaced_with_the_same_size_and_time_is_found_by_verifying(tmp_path: Path) -> None:
    file = tmp_path / "digests.jsonl"
    paths = [media_file(tmp_path / name, name) for name in ("a", "b")]
    digests = ContentDigests(file)
    before = [digests.of(path) for path in paths]
    digests.save()
    stat = paths[0].stat()
    media_file(paths[0], "X")
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [ContentDigests(file).of(path) for path in paths] == before  # size and time decide
    verifying = ContentDigests(file, verify=True)
    assert [verifying.of(path) for path in paths] == [file_digest(path) for path in paths] != before
    assert verifying.changed == [paths[0]]
    verifying.save()
    later = ContentDigests(file)
    assert [later.of(path) for path in paths] == [file_digest(path) for path in paths]


def test_names_that_are_not_unicode_have_digests_and_entries(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    path, file = tmp_path / name, tmp_path / "digests.jsonl"
    if sys.platform != "linux":
        pytest.skip("needs a file system whose names are any bytes")
    digests = ContentDigests(file)
    digest = digests.of(media_file(path, "content"))
    digests.save()
    assert ContentDigests(file).of(path) == digest
    assert entry_key(clips=[name]) == entry_key(clips=[name]) != entry_key(clips=["caf?"])
    cache = EntryCache(tmp_path)
    cache.save("video", KEY, {"latents": torch.ones(2)}, name)
    assert torch.equal(cache.load("video", KEY)["latents"], torch.ones(2))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("position", [-1, -500, 12, 3], ids=["end", "middle", "header", "length"])
def test_a_flipped_byte_of_an_entry_is_an_error_and_the_entry_is_deleted(
    tmp_path: Path, position: int
) -> None:
    cache = EntryCache(tmp_path)
    cache.save("video", KEY, {"latents": torch.rand(4, 64)}, "a clip")
    path = cache.path("video", KEY)
    flip(path, position)
    with pytest.raises(
        DataError, match=r"this cache entry is damaged \(.*it has been deleted"
    ) as e:
        cache.load("video", KEY)
    assert str(e.value).startswith(f"{path}: ")
    assert not cache.has("video", KEY)
    with pytest.raises(
        DataError, match=r"can't be read \(No such file or directory\); start again"
    ):
        cache.load("video", KEY)


def test_the_digest_of_an_entry_is_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"latents": torch.rand(4, 64), "condition": torch.rand(3).bfloat16()}
    EntryCache(tmp_path).save("video", KEY, tensors, "a clip")
    cache, compared = EntryCache(tmp_path), list[int]()
    original = cache_module._tensors_digest

    def counted(found: Mapping[str, torch.Tensor]) -> str:
        compared.append(len(found))
        return original(found)

    monkeypatch.setattr(cache_module, "_tensors_digest", counted)
    for _ in range(3):
        found = cache.load("video", KEY)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert compared == [2]


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


def test_a_caption_that_the_text_encoder_cuts_is_counted() -> None:
    assert too_long_warnings([512, 3]) == ()
    (warning,) = too_long_warnings([513, 512, 700])
    assert warning.text.startswith("2 captions have more than the 512 tokens")
    assert "up to 700" in warning.text
