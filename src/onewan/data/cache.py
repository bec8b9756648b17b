"""The cache on disk: one safetensors file per encoded clip, mask or caption, named by its inputs.

The key of an entry is a hash of everything that its values depend on (content of the file, span,
frame rate, size, encoder, version of the encoding code) and of nothing else, such as the file's
name. So an entry is either right or absent: moving a clip costs nothing, changing a caption encodes
that caption again, changing the size encodes the videos again. Files appear complete or not at all
(see `onewan.files`), so an interrupted run continues where it stopped, and several processes, also
on several machines with a shared folder, can fill one cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast, get_args

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, uint8

from onewan.errors import DataError
from onewan.files import append_lines, file_digest, remove_abandoned, replacing

EntryKind = Literal["video", "text", "mask"]


def entry_key(**inputs: object) -> str:
    """The key of an entry: a hash of its inputs, which must be JSON values."""
    # Changing these options changes every key.
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class EntryCache:
    """A folder of entries, which several processes can share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: EntryKind, key: str) -> Path:
        # 256 subfolders per kind, since file systems and file browsers are slow with 100,000 files
        # in one folder.
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def remove_abandoned(self) -> list[str]:
        """Delete temporary files that interrupted processes left in the cache; returns notices
        (`onewan.files.remove_abandoned`)."""
        kinds = [self.folder / kind for kind in get_args(EntryKind)]
        return remove_abandoned(folder for kind in kinds for folder in kind.glob("*"))

    def has(self, kind: EntryKind, key: str) -> bool:
        return self.path(kind, key).is_file()

    def save(
        self, kind: EntryKind, key: str, tensors: Mapping[str, Tensor], description: str
    ) -> None:
        """Store an entry; an existing one is replaced.

        `description` (the name of the clip, the caption) is for people who look into the file.
        """
        # safetensors accepts only contiguous tensors.
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        metadata = {"format": "pt", "about": description, "digest": _tensors_digest(tensors)}
        with replacing(self.path(kind, key)) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def load(self, kind: EntryKind, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, in host memory. Raises DataError if it can't be read."""
        path = self.path(kind, key)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: this cache entry is unreadable ({error}); delete it"
            ) from error

    def problem(self, kind: EntryKind, key: str) -> str | None:
        """What is wrong with an entry, or None; reads all of it and compares the digest."""
        path = self.path(kind, key)
        try:
            # Read at once, since another process may replace the file at any time. `safe_open`
            # opens it twice, for the header and for the tensors, which may be of two files then.
            data = path.read_bytes()
            tensors = load(data)
        except (OSError, SafetensorError) as error:
            return f"{path}: unreadable ({error})"
        if _tensors_digest(tensors) != _metadata(data).get("digest"):
            return f"{path}: its content does not match the digest in its header"
        # An overflow in the encoder: training would stop at the first step that draws the clip.
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            return f"{path}: contains values that are not finite"
        return None

    def discard(self, kind: EntryKind, key: str) -> None:
        self.path(kind, key).unlink(missing_ok=True)


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its header is JSON behind 8 bytes with its length."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # As bytes, since NumPy has no bfloat16.
        digest.update(tensor.flatten().view(uint8).numpy().data)
    return digest.hexdigest()


class ContentDigests:
    """Digests of media files' content, remembered by path, size and modification time.

    Otherwise each start would read the whole data set. The file has one JSON array per line: path,
    size, modification time in ns, digest; of several lines for a path, the last is valid. Processes
    only append, so none overwrites what another one has found. A damaged line, such as the last one
    after a crash, only means that one digest is computed again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, tuple[int, int, str]] = {}
        self._new_lines: list[str] = []
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        for path, size, modified, digest in filter(None, map(_digest_record, lines)):
            self._known[path] = (size, modified, digest)

    def of(self, path: Path) -> str:
        """The digest of a file's content, see `onewan.files.file_digest`."""
        stat = path.stat()
        size, modified, digest = self._known.get(str(path), (-1, -1, ""))
        if (size, modified) != (stat.st_size, stat.st_mtime_ns):
            digest = file_digest(path)
            self._known[str(path)] = (stat.st_size, stat.st_mtime_ns, digest)
            self._new_lines.append(json.dumps([str(path), stat.st_size, stat.st_mtime_ns, digest]))
        return digest

    def save(self) -> None:
        """Append the digests that were computed since the file was read."""
        if not self._new_lines:
            return
        append_lines(self._file, self._new_lines)
        self._new_lines.clear()


def _digest_record(line: str) -> tuple[str, int, int, str] | None:
    """One line of the file of `ContentDigests`; None if it is empty or damaged."""
    try:
        path, size, modified, digest = cast("tuple[str, int, int, str]", json.loads(line))
        return str(path), int(size), int(modified), str(digest)
    except (ValueError, TypeError):
        return None
