"""The cache on disk: one safetensors file per encoded clip, part of a condition, mask or caption
and per preview of a clip, named by its inputs.

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
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, uint8

from onewan.data.file_memory import FileMemory, FileState
from onewan.errors import DataError
from onewan.files import file_digest, remove_abandoned, replacing
from onewan.formats.write import safetensors_parts
from onewan.locks import remove_abandoned_locks

EntryKind = Literal["video", "condition", "text", "mask", "preview"]

_CLAIMS = "claims"


class EntryCache:
    """A folder of entries, which several processes can share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Entries whose digest this process has compared; once is enough.
        self._verified = set[Path]()

    def path(self, kind: EntryKind, key: str) -> Path:
        # 256 subfolders per kind, since file systems and file browsers are slow with 100,000 files
        # in one folder.
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def claim_path(self, kind: EntryKind, key: str) -> Path:
        """The file by which a process claims the making of an entry (`onewan.locks.Claim`)."""
        # Those of all entries in one folder: only a few are there at a time.
        return self.folder / _CLAIMS / f".lock-{kind}-{key}"

    def remove_abandoned(self) -> list[str]:
        """Delete temporary files and claims that interrupted processes left in the cache; returns
        notices (`onewan.files.remove_abandoned`)."""
        remove_abandoned_locks(self.folder / _CLAIMS)
        kinds = [self.folder / kind for kind in get_args(EntryKind)]
        return remove_abandoned(folder for kind in kinds for folder in kind.glob("*"))

    def has(self, kind: EntryKind, key: str) -> bool:
        return self.path(kind, key).is_file()

    def save(
        self, kind: EntryKind, key: str, tensors: Mapping[str, Tensor], description: str
    ) -> None:
        """Store an entry; an existing one is replaced. Equal contents give equal files.

        `description` (the name of the clip, the caption) is for people who look into the file.
        """
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        about = description.encode(errors="backslashreplace").decode()
        metadata = {"format": "pt", "about": about, "digest": _tensors_digest(tensors)}
        with replacing(self.path(kind, key)) as temporary, temporary.open("wb") as file:
            file.writelines(safetensors_parts(tensors, metadata))

    def load(self, kind: EntryKind, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, in host memory.

        When a process reads an entry for the first time, the digest in its header is compared, so
        that no damage gets into training unnoticed. A damaged entry is deleted, for the next
        start to encode it again. Raises DataError for it, and for one that can't be read.
        """
        path = self.path(kind, key)
        try:
            if path in self._verified:
                return load_file(path)
            tensors, stored = _read(path)
        except OSError as error:
            raise DataError(
                f"{path}: this cache entry can't be read ({error.strerror}); start again, which "
                "encodes it if it is missing"
            ) from error
        except SafetensorError as error:
            raise self._deleted(path, str(error)) from error
        if _tensors_digest(tensors) != stored:
            raise self._deleted(path, "its content does not match the digest in its header")
        self._verified.add(path)
        return tensors

    def _deleted(self, path: Path, reason: str) -> DataError:
        """Deletes a damaged entry; returns the error about it."""
        try:
            path.unlink(missing_ok=True)
            remedy = "it has been deleted; start again, which encodes it again"
        except OSError:  # a cache that only another user may change
            remedy = "delete it and start again, which encodes it again"
        return DataError(f"{path}: this cache entry is damaged ({reason}); {remedy}")

    def problem(self, kind: EntryKind, key: str) -> str | None:
        """What is wrong with an entry, or None; reads all of it and compares the digest."""
        path = self.path(kind, key)
        try:
            tensors, stored = _read(path)
        except (OSError, SafetensorError) as error:
            return f"{path}: unreadable ({error})"
        if _tensors_digest(tensors) != stored:
            return f"{path}: its content does not match the digest in its header"
        # An overflow in the encoder: training would stop at the first step that draws the clip.
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            return f"{path}: contains values that are not finite"
        return None

    def sizes(self, kind: EntryKind) -> Iterator[tuple[str, int]]:
        """(key, bytes) of each entry of a kind."""
        for folder in sorted((self.folder / kind).glob("*")):
            for path in sorted(folder.glob("[!.]*.safetensors")):  # not the unfinished ones
                with suppress(FileNotFoundError):  # deleted by another process meanwhile
                    yield path.stem, path.stat().st_size

    def discard(self, kind: EntryKind, key: str) -> None:
        self.path(kind, key).unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of an entry and the digest in its header."""
    # Read at once, since another process may replace the file at any time. safetensors' own
    # functions open it twice, for the header and for the tensors, which may be of two files then.
    data = path.read_bytes()
    tensors = load(data)
    # The header is JSON behind 8 bytes with its length; safetensors has just parsed it.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, (header.get("__metadata__") or {}).get("digest")


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # As bytes, since NumPy has no bfloat16.
        digest.update(tensor.flatten().view(uint8).numpy().data)
    return digest.hexdigest()


class ContentDigests:
    """Digests of media files' content, remembered by path, size and modification time."""

    def __init__(self, file: Path, *, verify: bool = False) -> None:
        """With `verify`, every file is read again, whatever its size and time are."""
        self._memory = FileMemory(file)
        self.changed = list[Path]()
        """Files whose content has changed though their size and time have not."""
        self._verify = verify

    def of(self, path: Path) -> str:
        """The digest of a file's content, see `onewan.files.file_digest`."""
        state = FileState.of(path)
        known = self._memory.get(path, state)
        if known is not None and not self._verify:
            return str(known)
        digest = file_digest(path)
        if known is not None and digest != known:
            self.changed.append(path)
        self._memory.set(path, state, digest)
        return digest

    def save(self) -> None:
        """Remember the digests that were computed for the next start."""
        self._memory.save()
