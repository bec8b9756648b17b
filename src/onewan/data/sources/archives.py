"""Which archives a source of tar shards stands for, on this machine and on others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onewan.data.report import ClipProblem
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.copies import Copies
from onewan.data.sources.place import BY_NAME, LocalPlace, Place
from onewan.data.sources.remote import RemotePlace
from onewan.data.sources.shards import Shard, expand, read_shards, unpack, unpacked
from onewan.errors import DataError
from onewan.runs.layout import displayed


def archives_of(path: Path) -> list[Path]:
    """The archives that a local path stands for: a file, a folder of them, a range in braces, or a
    pattern. ValueError for a range that is none."""
    if path.is_dir():
        return sorted(path.glob("*.tar"), key=BY_NAME)
    found = list[Path]()
    for name in expand(path.name):
        # A file may have the signs of patterns in its name.
        given = path.with_name(name)
        is_pattern = not given.exists() and any(sign in name for sign in "*?[")
        found += sorted(path.parent.glob(name), key=BY_NAME) if is_pattern else [given]
    return found


def read_archives(
    place: Place, copies: Copies, video_formats: Sequence[str], *, use_masks: bool
) -> SourceContents:
    """The clips of all archives at `place`, whose members are copied unless they are here."""
    shards, problems = list[tuple[Shard, str]](), list[ClipProblem]()
    opened, left_out = list[Path](), 0
    for archive, label, identity in _archives(place):
        try:
            shard = unpacked(archive, copies.shards, identity)
            if shard is None and not copies.make:
                left_out += 1
                continue
            if shard is None:
                shard = _unpack(place, archive, copies.shards, identity)
            copies.used_shards.add(shard.folder)
            shards.append((shard, label))
            opened.append(archive)
        except (ValueError, FileNotFoundError) as error:
            reason = "there is no such file" if isinstance(error, OSError) else str(error)
            problems.append(ClipProblem(path=archive, reason=reason))
    contents = read_shards(shards, video_formats, use_masks=use_masks)
    contents.problems = problems + contents.problems
    if not contents.items and not contents.problems:
        reason = "has no video or image to train on"
        contents.problems = [ClipProblem(path=archive, reason=reason) for archive in opened]
    if left_out:
        contents.note(f"{left_out} archives of {place.label} are not unpacked yet")
    return contents


def _archives(place: Place) -> list[tuple[Path, str, str | None]]:
    """(path, name in messages, identity) of each archive; the path is that of a copy, which need
    not be there, if the archive is elsewhere."""
    if isinstance(place, LocalPlace):
        found = archives_of(place.path)
        return [(path, str(displayed(path)), None) for path in found]
    assert isinstance(place, RemotePlace)
    named = place.path if ".tar" in place.path.rpartition("/")[2] else f"{place.path}/*.tar"
    given = [path for name in expand(named) for path in place.matching(name)]
    if not given:
        raise DataError(f"{place.label}: no tar archives are listed there; check the address")
    paths = place.register_all(given)
    above = place.label.rpartition("/")[0]
    return [(path, f"{above}/{path.name}", place.identity(path)) for path in paths]


def _unpack(place: Place, archive: Path, into: Path, identity: str | None) -> Shard:
    for reason in place.fetch([archive]).values():
        raise ValueError(reason)
    shard = unpack(archive, into, identity)
    if isinstance(place, RemotePlace):
        archive.unlink()  # its members are here, and it would only be read again
    return shard
