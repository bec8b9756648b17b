"""Sources on other machines, through fsspec: each file is copied once below the cache.

A copy is used again as long as the other side gives the same size and the same tag (ETag, hash or
time). Copies appear complete or not at all; an interrupted one goes on where it stopped, if the
file is still the same. Credentials are those of the file system's own package, and are never
printed: of addresses, messages have neither user names nor what follows a question mark.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from onewan.data.file_memory import forget_vanished
from onewan.data.report import ClipWarning
from onewan.data.sources.place import BY_NAME, Listing, first_few, inner_path
from onewan.errors import DataError, one_line
from onewan.files import append_lines, sync
from onewan.locks import Claim

Progress = Callable[[str, int, int], None]
"""Called with an activity, the number of finished items, and that of all."""


def no_progress(activity: str, done: int, total: int) -> None:
    """A `Progress` that does nothing."""
    del activity, done, total


_RECORDS = "files.jsonl"
_LOCKS = "locks"
_PART, _ABOUT = ".part-", ".about.json"
"""What the names of a copy that is not complete begin with, and of the file that says of what."""
_PIECE = 8 << 20
_WAITS = (1.0, 4.0, 10.0)
"""Seconds before each further try."""
_THREADS = 8
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of this machine, which no further try mends."""
_GONE, _REFUSED = (404, 410), (401, 403)
"""Statuses of HTTP answers."""
# fmt: off
_TAGS = (
    "ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "LastModified", "mtime", "updated",
    "created",
)
# fmt: on
"""What file systems call something that changes with a file's content; the first one counts."""


def shown_url(url: str) -> str:
    """`url` without user, password, query and fragment."""
    return re.sub(r"://[^/@\s]*@", "://", re.sub(r"[?#].*", "", url, flags=re.DOTALL))


def protocol_problem(url: str) -> str | None:
    """Why the file system of `url` can't be used, without connecting to it; None if it can."""
    from fsspec import get_filesystem_class

    if "@" in urlsplit(url).netloc and urlsplit(url).scheme != "hf":
        return "has a user name or a password in it; give them as its package reads them"
    try:
        get_filesystem_class(urlsplit(url).scheme)
    except ImportError as error:
        package = re.search(r"install (\S+)", str(error), re.IGNORECASE)
        what = f"pip install {package[1]}" if package else one_line(str(error))
        if urlsplit(url).scheme in ("http", "https"):
            what = 'pip install "onewan[remote]"'
        return f"needs a package that is not installed; {what}"
    except ValueError:
        return f"has a protocol that is not known ({urlsplit(url).scheme})"
    return None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on another machine."""

    fs: Any
    """Its file system, of fsspec."""
    path: str
    """As its file system has it."""
    size: int | None = None
    tag: str | None = None
    """None until the file has been asked for."""


class _Failure(NamedTuple):
    """Why a file could not be copied."""

    text: str
    is_passing: bool
    """Whether it may work the next time."""


@dataclass(slots=True)
class RemoteFiles:
    """Copies of remote files, below a folder that several processes can share."""

    folder: Path
    progress: Progress = no_progress
    verify: bool = False
    """Ask for the tag of every file, also of those that a table names."""
    make: bool = True
    """Whether files are fetched that are not here."""
    used: set[Path] = field(default_factory=set[Path])
    """Copies that were asked for."""
    failed: dict[Path, str] = field(default_factory=dict[Path, str])
    """What is wrong with copies that could not be made now, and perhaps can be another time."""
    _known: dict[Path, RemoteFile] = field(default_factory=dict[Path, RemoteFile])
    _records: dict[str, tuple[int, str]] | None = None

    def place(self, url: str) -> RemotePlace:
        """The file or folder at `url`. DataError if it can't be reached at all."""
        if problem := protocol_problem(url):
            raise DataError(f"{shown_url(url)}: {problem}")
        import fsspec

        with _faults_of(shown_url(url)):
            fs, path = fsspec.core.url_to_fs(url)
        return RemotePlace(self, url, fs, str(path).rstrip("/"))

    def register(self, path: Path, file: RemoteFile) -> None:
        """`path` is to be the copy of `file`."""
        self._known[path] = file

    def original(self, path: Path) -> RemoteFile | None:
        """What `path` is a copy of; None if it is none."""
        return self._known.get(path)

    def fetch(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Copy those of `paths` that are remote and not here as they are there; what is wrong with
        those that can't be copied."""
        wanted = [path for path in dict.fromkeys(paths) if path in self._known]
        missing = [path for path in wanted if not self._is_current(path)]
        self.used.update(wanted)
        if not self.make:
            return dict.fromkeys(missing, "has not been fetched yet")
        failed = dict[Path, str]()

        def copy(path: Path) -> tuple[Path, _Failure | None]:
            return path, self._copy(path)

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="onewan-fetch") as pool:
            for done, (path, failure) in enumerate(pool.map(copy, missing), start=1):
                if failure:
                    failed[path] = failure.text
                    if failure.is_passing:
                        self.failed[path] = failure.text
                self.progress("fetching files", done, len(missing))
        return failed

    def _is_current(self, path: Path) -> bool:
        file, record = self._known[path], self._recorded(path)
        if record is None or not path.is_file() or path.stat().st_size != record[0]:
            return False
        if file.tag is None:  # a file of a table, which has not been asked for
            return not self.verify
        return record == (file.size if file.size is not None else record[0], file.tag)

    def stored(self) -> Iterator[tuple[Path, Path]]:
        """All files that are kept here, each with the copy that it is, or that it is to become."""
        for place in self._places():
            for path in sorted(path for path in place.rglob("*") if path.is_file()):
                name = path.name
                if name.startswith(_PART):
                    name = name.removeprefix(_PART).removesuffix(_ABOUT)
                yield path, path.with_name(name)

    def tidy(self) -> None:
        """Remove what only copies that were deleted needed."""
        for place in self._places():
            for folder in sorted((p for p in place.rglob("*") if p.is_dir()), reverse=True):
                _remove_if_empty(folder)
            _remove_if_empty(place)
        forget_vanished(self.folder / _RECORDS, self.folder)
        for lock in (self.folder / _LOCKS).glob("*.lock"):
            Claim(lock).release()
        for folder in (self.folder / _LOCKS, self.folder):
            _remove_if_empty(folder)

    def _places(self) -> list[Path]:
        """The folders of copies, one for each folder elsewhere."""
        if not self.folder.is_dir():
            return []
        return [p for p in sorted(self.folder.iterdir()) if p.is_dir() and p.name != _LOCKS]

    def _copy(self, path: Path) -> _Failure | None:
        """Make one copy; why not if that fails."""
        failure = self._tried(path)
        for wait in _WAITS:
            if failure is None or not failure.is_passing:
                return failure
            time.sleep(wait)
            # It may be another file by now.
            file = self._known[path]
            file.fs.invalidate_cache(file.path)
            self._known[path] = replace(file, size=None, tag=None)
            failure = self._tried(path)
        if failure is None or not failure.is_passing:
            return failure
        return failure._replace(text=f"{failure.text}, after {len(_WAITS) + 1} tries")

    def _tried(self, path: Path) -> _Failure | None:
        name = hashlib.blake2b(str(path).encode(errors="surrogatepass"), digest_size=8).hexdigest()
        locks = self.folder / _LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(locks / f"{name}.lock"):
                self._download(path)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _LOCAL:
                raise
            return _Failure(_reason(error), not _is_final(_origin_of(error)))
        return None

    def _download(self, path: Path) -> None:
        file = _asked(self._known[path])
        self._known[path] = file
        self._records = None  # another process may have copied it while this one waited
        if self._is_current(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{_PART}{path.name}")
        about = path.with_name(f"{_PART}{path.name}{_ABOUT}")
        state = json.dumps([file.size, file.tag])
        # Without a size or a tag nothing says that the rest belongs to the same file.
        same = about.is_file() and about.read_text(encoding="utf-8") == state and file.tag
        if not same:
            part.unlink(missing_ok=True)
            about.write_text(state, encoding="utf-8")
        with part.open("ab") as local:
            is_resumed = local.tell() > 0
            _append(file, local)
            size = local.tell()
        # What took several requests may be of two versions.
        if (is_resumed or size > _PIECE) and _has_changed(file):
            part.unlink()
            raise ValueError("changed while it was fetched")
        if file.size is not None and size != file.size:
            part.unlink()
            raise ValueError(f"ended after {size} of {file.size} bytes")
        sync(part)
        os.replace(part, path)
        about.unlink(missing_ok=True)
        record = [path.relative_to(self.folder).as_posix(), size, file.tag]
        append_lines(self.folder / _RECORDS, [json.dumps(record)])
        self._read_records()[record[0]] = (size, file.tag or "")

    def _recorded(self, path: Path) -> tuple[int, str] | None:
        return self._read_records().get(path.relative_to(self.folder).as_posix())

    def _read_records(self) -> dict[str, tuple[int, str]]:
        if self._records is None:
            records = dict[str, tuple[int, str]]()
            try:
                text = (self.folder / _RECORDS).read_text(encoding="utf-8", errors="replace")
            except OSError:
                text = ""
            for line in filter(None, text.split("\n")):
                # Of a process that was killed while it wrote, a line is damaged.
                with suppress(ValueError, TypeError):
                    name, size, tag = cast("list[Any]", json.loads(line))
                    records[str(name)] = (int(size), str(tag))
            self._records = records
        return self._records


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """A `Place` on another machine."""

    remote: RemoteFiles
    url: str
    fs: Any
    path: str

    @property
    def label(self) -> str:
        return shown_url(self.url)

    def listing(self, *, recursive: bool = True) -> Listing:
        with _faults_of(self.label):
            found: dict[str, dict[str, Any]] = self.fs.find(
                self.path, maxdepth=None if recursive else 1, detail=True
            )
        listing = Listing(self._copies_of(self.url.rstrip("/")))
        unsafe = list[str]()
        for path, info in found.items():
            relative = path.removeprefix(self.path).lstrip("/")
            if urlsplit(self.url).scheme in ("http", "https"):
                relative = unquote(relative)  # the links of a page are written for addresses
            try:
                inner = inner_path(relative)
            except ValueError:
                unsafe.append(relative)
                continue
            if info.get("type", "file") != "file" or any(p.startswith(".") for p in inner.parts):
                continue
            copy = listing.folder.joinpath(*inner.parts)
            self.remote.register(copy, RemoteFile(self.fs, path, info.get("size"), _tag(info)))
            listing.paths.append(copy)
        if unsafe:
            text = f"{len(unsafe)} files in {self.label} are left out by their names: "
            listing.warnings.append(ClipWarning(path=None, text=text + first_few(unsafe)))
        if not listing.paths:
            raise DataError(f"{self.label}: no files are listed there; check the address")
        listing.paths.sort(key=BY_NAME)
        return listing

    def files(self) -> list[Path]:
        """Copies of the file, or of those that its pattern stands for."""
        paths = self.register_all([self.path])
        for reason in self.remote.fetch(paths).values():
            raise DataError(f"{self.label}: {reason}")
        return paths

    def matching(self, pattern: str) -> list[str]:
        """The paths that a pattern with ``*`` stands for; itself if it has none."""
        if "*" not in pattern:
            return [pattern]
        with _faults_of(self.label):
            return sorted(cast("list[str]", self.fs.glob(pattern)))

    def register_all(self, paths: Iterable[str]) -> list[Path]:
        """Where the copies of these files of the same folder are; always asked for their tags."""
        folder = self._copies_of(self.url.rpartition("/")[0])
        found = list[Path]()
        for path in paths:
            name = inner_path(re.sub(r"[?#].*", "", path.rpartition("/")[2]))
            with _faults_of(self.label):
                file = _asked(RemoteFile(self.fs, path))
            self.remote.register(folder.joinpath(*name.parts), file)
            found.append(folder.joinpath(*name.parts))
        return found

    def identity(self, copy: Path) -> str:
        """What changes with the content of a file that is known."""
        file = self.remote.original(copy)
        assert file is not None
        return f"{file.path} {file.size} {file.tag}"

    def named(self, reference: str, beside: Path) -> Path:
        inner = inner_path(reference)
        copy = beside.parent.joinpath(*inner.parts)
        if self.remote.original(copy) is None:
            table = self.remote.original(beside)
            above = re.sub(r"[?#].*", "", table.path if table else self.path).rpartition("/")[0]
            self.remote.register(copy, RemoteFile(self.fs, f"{above}/{inner.as_posix()}"))
        return copy

    def fetch(self, paths: Iterable[Path]) -> Mapping[Path, str]:
        return self.remote.fetch(paths)

    def _copies_of(self, url: str) -> Path:
        """The folder with the copies of the files at `url`, which is a folder."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", shown_url(url)).strip("-.")[-60:]
        digest = hashlib.blake2b(url.encode(errors="surrogatepass"), digest_size=6).hexdigest()
        return self.remote.folder / f"{plain}-{digest}"


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


@contextmanager
def _faults_of(label: str) -> Iterator[None]:
    """Every error of a file system becomes a `DataError` about `label`, without credentials."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (each file system has classes of its own)
        raise DataError(f"{label}: {_reason(error)}") from None


def _asked(file: RemoteFile) -> RemoteFile:
    """`file` with its size and tag, which are asked for unless they are known."""
    if file.tag is not None:
        return file
    info: dict[str, Any] = file.fs.info(file.path)
    if info.get("type", "file") != "file":
        raise IsADirectoryError(0, "is a folder, not a file")
    return RemoteFile(file.fs, file.path, info.get("size"), _tag(info))


def _tag(info: Mapping[str, Any]) -> str:
    return next((str(info[name]) for name in _TAGS if info.get(name)), "")


def _has_changed(file: RemoteFile) -> bool:
    file.fs.invalidate_cache(file.path)
    now = _asked(replace(file, tag=None))
    return (now.size, now.tag) != (file.size, file.tag)


def _append(file: RemoteFile, local: Any) -> None:
    """Read the rest of `file` behind what `local` has."""
    if local.tell():
        try:
            _read_on(file, local)
        except (ValueError, NotImplementedError):
            # A server that gives whole files only, and says so when it is asked for a part.
            local.seek(0)
            local.truncate()
        else:
            return
    _read_on(file, local)


def _read_on(file: RemoteFile, local: Any) -> None:
    with file.fs.open(file.path, "rb", cache_type="none", block_size=_PIECE) as remote:
        if local.tell():
            remote.seek(local.tell())
        while piece := remote.read(_PIECE):
            local.write(piece)
            local.flush()  # so that what has come is kept if this process is killed


def _reason(error: Exception) -> str:
    """What went wrong, for people, without credentials."""
    error = _origin_of(error)
    if isinstance(error, FileNotFoundError) or _status(error) in _GONE:
        return "there is no such file or folder"
    if isinstance(error, PermissionError) or _status(error) in _REFUSED:
        return "access is refused; check the credentials that its package reads"
    text = str(error) or type(error).__name__
    text = re.sub(r"://[^/@\s]*@", "://", re.sub(r"\?[^\s'\")]*", "", text))
    return f"can't be read ({one_line(text)[:300]})"


def _origin_of(error: Exception) -> Exception:
    """The error of the connection behind one of fsspec, whose HTTP files do not exist whatever goes
    wrong when they are asked for."""
    cause = error.__cause__
    is_of_connection = type(cause).__module__.partition(".")[0] in ("aiohttp", "asyncio")
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and is_of_connection:
        return cause
    return error


def _is_final(error: Exception) -> bool:
    """Whether another try would end alike."""
    known = (FileNotFoundError, PermissionError, IsADirectoryError)
    return isinstance(error, known) or _status(error) in (*_GONE, *_REFUSED)


def _status(error: Exception) -> int | None:
    """The status of an HTTP answer."""
    return getattr(error, "status", None)
