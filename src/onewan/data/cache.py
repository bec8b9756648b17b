"""What has been encoded stays encoded: one safetensors file per entry, under a key of its causes.

A key is a hash of everything that an entry's numbers depend on (content of the file, span, frame
rate, size, encoder, version of the encoding code) and of nothing else, such as the file's name. So
an entry is either right or not found: moving a clip costs nothing, changing a caption re-encodes
that caption, changing the size re-encodes the videos. Files appear whole (see `onewan.files`), so a
run that is cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from onewan.errors import DataError
from onewan.files import file_digest, replacing

Kind = Literal["video", "text", "mask"]


def key_of(**causes: object) -> str:
    """A key for an entry: a hash of its causes, which must be plain values."""
    text = json.dumps(causes, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class EntryCache:
    """A folder of entries. Several runs, and several processes, can share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: Kind, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: Kind, key: str) -> bool:
        return self.path(kind, key).is_file()

    def save(self, kind: Kind, key: str, tensors: Mapping[str, Tensor], about: str) -> None:
        """Store an entry. `about` is for people who look into the file: the clip or the caption."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        metadata = {"format": "pt", "about": about, "digest": _digest(tensors)}
        with replacing(self.path(kind, key)) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def load(self, kind: Kind, key: str) -> dict[str, Tensor]:
        path = self.path(kind, key)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: this cache entry is unreadable ({error}); delete it"
            ) from error

    def problem(self, kind: Kind, key: str) -> str | None:
        """What is wrong with an entry, read in full and held against its digest; or None."""
        path = self.path(kind, key)
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                expected = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError) as error:
            return f"{path}: unreadable ({error})"
        if _digest(tensors) != expected:
            return f"{path}: its content does not match the digest in its header"
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            return f"{path}: holds numbers that are not finite"
        return None

    def discard(self, kind: Kind, key: str) -> None:
        self.path(kind, key).unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(uint8).numpy().data)
    return digest.hexdigest()


class ContentDigests:
    """Digests of media files' content, remembered by path, size and time of change.

    Without the memory every start would read the whole data set. The memory is a convenience: if
    its file is missing or damaged, the digests are computed again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[object]] = {}
        self._changed = False
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> str:
        stat = path.stat()
        name, stamp = str(path), [stat.st_size, stat.st_mtime_ns]
        remembered = self._known.get(name)
        if isinstance(remembered, list) and remembered[:2] == stamp and len(remembered) == 3:
            return str(remembered[2])
        digest = file_digest(path)
        self._known[name] = [*stamp, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        if self._changed:
            with replacing(self._file) as temporary:
                temporary.write_text(json.dumps(self._known, indent=0), encoding="utf-8")
            self._changed = False
