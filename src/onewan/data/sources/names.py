"""Names of files: which of them belong together, and which of them patterns mean."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath


def pairing_key(stem: Path) -> str:
    """By what a clip finds its caption and its masks: its path without extension.

    In one Unicode normalization: macOS writes "é" of a name as two characters, most other systems
    and programs as one, and a copied data set often has both.
    """
    return unicodedata.normalize("NFC", str(stem))


def with_keys_of_clips(
    files: Mapping[str, list[Path]], clip_keys: Collection[str]
) -> dict[str, list[Path]]:
    """`files` of clips by pairing key, where a key that is no clip's becomes that of the one clip
    from which it differs in capital letters only, if that has no file of its own: on Windows and
    macOS every program finds ``Fox.TXT`` as the caption of ``fox.MP4``."""
    folded: dict[str, list[str]] = {}
    for key in clip_keys:
        folded.setdefault(key.casefold(), []).append(key)
    found: dict[str, list[Path]] = {}
    for key, paths in files.items():
        clips = [] if key in clip_keys else folded.get(key.casefold(), [])
        is_meant = len(clips) == 1 and clips[0] not in files
        found.setdefault(clips[0] if is_meant else key, []).extend(paths)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """Which files of a folder are used, by glob patterns such as ``*.mp4`` or ``drafts/*``.

    A pattern without a slash is that of a name at any depth, one with a slash that of a path below
    the folder, in which ``**`` stands for any number of folders. It may also be that of a folder.
    Capital letters count on every system.
    """

    include: Sequence[str] = ()
    """Only files that one of them fits are used; empty: all."""
    exclude: Sequence[str] = ()
    """Files that one of them fits are not used."""

    def allow(self, name: str) -> bool:
        """Whether the file of this name, relative to the folder, is used."""
        if self.include and not any(fits(pattern, name) for pattern in self.include):
            return False
        return not any(fits(pattern, name) for pattern in self.exclude)

    def unused(self, names: Sequence[str]) -> list[str]:
        """The patterns that fit none of `names`."""
        return [
            pattern
            for pattern in (*self.include, *self.exclude)
            if not any(fits(pattern, name) for name in names)
        ]


def fits(pattern: str, name: str) -> bool:
    """Whether `pattern` fits the file `name` or a folder that it is in."""
    pattern = unicodedata.normalize("NFC", pattern).replace("\\", "/").removeprefix("./")
    wanted = pattern.rstrip("/").split("/")
    if len(wanted) == 1:
        wanted = ["**", *wanted]
    parts = PurePosixPath(unicodedata.normalize("NFC", name)).parts
    return any(_fits_parts(wanted, parts[:end]) for end in range(1, len(parts) + 1))


def _fits_parts(patterns: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a pattern fit those of a path; ``**`` stands for any number of them."""
    if not patterns:
        return not parts
    first, rest = patterns[0], patterns[1:]
    if first == "**":
        return any(_fits_parts(rest, parts[skipped:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], first) and _fits_parts(rest, parts[1:])
