"""Tar shards in the webdataset layout: the members of one name, up to its first dot, are one clip.

https://github.com/webdataset/webdataset: ``000123.mp4`` with ``000123.txt``, or ``000123.json``
with a caption in it, in archives such as ``shards-000017.tar``. Members are copied below the cache
once for each archive, since a video is read at many places and again at each start.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from onewan.data.sources.contents import SourceContents
from onewan.data.sources.folder import read_folder
from onewan.data.sources.item import SourceItem
from onewan.data.sources.place import BY_NAME, Listing, first_few, inner_path
from onewan.data.sources.table import CAPTIONS, captions_of
from onewan.documents import decode_text
from onewan.errors import one_line
from onewan.files import read_input, temporary_beside
from onewan.files import replace as move
from onewan.media import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension

_MEDIA = IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES | VIDEO_SUFFIXES
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000
_CONTENTS = ".contents.json"
"""File in the folder of a shard: what of its members is not used, and why."""
_PIECE = 1 << 20
_MAX_BYTES = 16 << 20


def expand(pattern: str) -> list[str]:
    """The names that ``shards-{000..010}.tar`` stands for; a name without braces is its own.

    ValueError if they are too many.
    """
    names = [pattern]
    while match := _RANGE.search(names[0]):
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if not 0 <= last - first < _MOST_SHARDS // len(names):
            raise ValueError(f"{match[0]} is no range of at most {_MOST_SHARDS:,} files")
        names = [
            _RANGE.sub(f"{number:0{width}}", name, count=1)
            for name in names
            for number in range(first, last + 1)
        ]
    return names


@dataclass(slots=True)
class Shard:
    """One archive, unpacked."""

    folder: Path
    unused: dict[str, str] = field(default_factory=dict[str, str])
    """Members that are not used, with the reason."""


def unpacked(archive: Path, into: Path, identity: str | None) -> Shard | None:
    """The copies of the members of `archive` in `into`; None if they have not been made."""
    folder = _folder_of(archive, into, identity)
    try:
        text = (folder / _CONTENTS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Shard(folder, json.loads(text))


def unpack(archive: Path, into: Path, identity: str | None) -> Shard:
    """Copy the members of `archive` to a folder of its own in `into`.

    `identity` stands for the archive's content; None: its size and modification time do. Every
    member stays below the folder, whatever its name says. ValueError, with the reason, if the
    archive can't be read.
    """
    shard = Shard(_folder_of(archive, into, identity))
    with temporary_beside(shard.folder) as temporary:
        temporary.mkdir()
        try:
            # Not compressed, since a few bytes of that can stand for terabytes.
            with tarfile.open(archive, "r:") as tar:
                for member in tar:
                    if reason := _copy(tar, member, temporary):
                        shard.unused[one_line(member.name)] = reason
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"can't be read as tar ({error})") from error
        text = json.dumps(shard.unused, indent=0)
        (temporary / _CONTENTS).write_text(text, encoding="utf-8")
        move(temporary, shard.folder)
    return shard


def _folder_of(archive: Path, into: Path, identity: str | None) -> Path:
    if identity is None:
        stat = archive.stat()
        identity = f"{archive} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.blake2b(identity.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return into / f"{archive.stem}-{digest}"


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> str | None:
    """Write a member below `folder`; the reason if it is not used, and None for folders too."""
    if member.isdir():
        return None
    try:
        name = inner_path(member.name)
    except ValueError as error:
        return str(error)
    # A link could lead anywhere, and of a sparse member a few bytes can stand for terabytes.
    if not member.isfile() or member.issparse():
        return "is a link, a device or another special file"
    if name.name.startswith("."):
        return None
    if extension(Path(name)) not in {"txt", "json"} | _MEDIA:
        return "is neither a video, an image, a caption nor a mask"
    target = folder.joinpath(*name.parts)
    content = tar.extractfile(member)
    assert content is not None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("xb")
    except (FileExistsError, NotADirectoryError):
        return "has the name of another member"
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            return f"can't be written under its name ({error.strerror})"
        raise
    with file:
        while piece := content.read(_PIECE):
            file.write(piece)
    return None


def read_shards(
    shards: Sequence[tuple[Shard, str]], video_formats: Sequence[str], *, use_masks: bool
) -> SourceContents:
    """The clips of unpacked shards; each is given with its name for messages."""
    contents = SourceContents()
    for shard, label in shards:
        paths = [path for path in shard.folder.rglob("*") if path.is_file()]
        paths.sort(key=BY_NAME)
        inside = read_folder(
            Listing(shard.folder, [path for path in paths if path.name != _CONTENTS]),
            label,
            video_formats,
            use_masks=use_masks,
        )
        archive = PurePosixPath(label.replace("\\", "/")).name
        inside.items = [
            replace(
                _with_other_text(item),
                name=f"{PurePosixPath(archive).stem}/{item.name}",
                origin=f"{archive}, {item.name}",
            )
            for item in inside.items
        ]
        contents.add(inside)
        if shard.unused:
            members = [f"{name} ({why})" for name, why in shard.unused.items()]
            contents.note(f"{label}: not used of it: {first_few(members)}")
    return contents


def _with_other_text(item: SourceItem) -> SourceItem:
    """`item` with the caption of another member of its name up to the first dot, or with the one in
    a json file, if it has none."""
    if item.texts:
        return item
    key = item.path.with_name(item.path.name.partition(".")[0])
    for stem in dict.fromkeys((item.path.with_suffix(""), key)):
        text, data = (stem.with_name(f"{stem.name}.{kind}") for kind in ("txt", "json"))
        if text.is_file():
            return replace(item, texts=(text,))
        if captions := _captions_in(data):
            return replace(item, captions=captions)
    return item  # without a caption, which is reported


def _captions_in(file: Path) -> tuple[str, ...]:
    """The captions in the metadata of a member; none if it has none."""
    try:
        data = json.loads(decode_text(read_input(file, _MAX_BYTES)))
    except (OSError, ValueError, RecursionError):
        return ()
    values = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    for column in CAPTIONS:
        with suppress(ValueError):  # a value of another kind
            if column in values:
                return captions_of(values[column])
    return ()
