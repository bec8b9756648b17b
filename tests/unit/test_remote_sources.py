"""Files of other machines are copied once and whole, and no message contains credentials."""

from __future__ import annotations

import http.server
import importlib
import re
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from support.clips import planner

from onewan.data.clip import ClipSource
from onewan.data.index import index_clips
from onewan.data.report import DatasetReport
from onewan.data.sources import remote
from onewan.data.sources.copies import Copies
from onewan.errors import DataError
from onewan.media import write_video

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small video."""
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (16, 64, 96, 3)).astype(np.uint8)
    write_video(path, frames, 16)
    return path.read_bytes()


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def index(url: str, folder: Path, **settings: Any) -> DatasetReport:
    copies = Copies(folder, verify=settings.pop("verify", False))
    return index_clips(
        [ClipSource(path=url, **settings)], planner(), use_masks=False, copies=copies
    )


def names(report: DatasetReport) -> list[str]:
    return [clip.name for clip in report.clips]


# --- What is elsewhere becomes clips -------------------------------------------------------------


def test_a_remote_folder_is_read_as_a_local_one_is(
    memory: Any, content: bytes, tmp_path: Path
) -> None:
    for name in ("a.mp4", "sub/b.mp4", ".hidden.mp4"):
        memory.pipe(f"/bucket/clips/{name}", content)
    memory.pipe("/bucket/clips/a.txt", b"one")
    memory.pipe("/bucket/clips/sub/b.txt", b"two")
    report = index("memory://bucket/clips", tmp_path)
    assert [(clip.name, clip.captions) for clip in report.clips] == [
        ("a.mp4", ("one",)),
        ("sub/b.mp4", ("two",)),
    ]
    assert all(clip.path.read_bytes() == content for clip in report.clips)
    assert all(clip.path.is_relative_to(tmp_path / "remote") for clip in report.clips)
    assert names(index("memory://bucket/clips", tmp_path, recursive=False)) == ["a.mp4"]


def test_names_that_lead_out_of_a_remote_folder_are_left_out(
    memory: Any, content: bytes, tmp_path: Path
) -> None:
    for name in ("a.mp4", "C:/b.mp4"):
        memory.pipe(f"/bucket/{name}", content)
        memory.pipe(f"/bucket/{name[:-4]}.txt", b"x")
    report = index("memory://bucket", tmp_path)
    assert names(report) == ["a.mp4"]
    texts = [warning.text for warning in report.warnings if warning.path is None]
    assert texts == ["2 files in memory://bucket are left out by their names: C:/b.mp4, C:/b.txt"]


def test_a_folder_of_an_http_server_has_the_names_of_its_files(
    server: Server, content: bytes, tmp_path: Path
) -> None:
    page = "".join(f'<a href="{quote(name)}">x</a>' for name in ("é 1.mp4", "é 1.txt"))
    server.files |= {
        "/clips": page.encode(),
        f"/clips/{quote('é 1.mp4')}": content,
        f"/clips/{quote('é 1.txt')}": b"one",
    }
    report = index(f"{server.url}/clips/", tmp_path)
    assert [(clip.name, clip.captions) for clip in report.clips] == [("é 1.mp4", ("one",))]


def test_a_file_is_copied_once_and_again_when_it_changes(
    memory: Any, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/b/a.mp4", content)
    memory.pipe("/b/a.txt", b"one")
    index("memory://b", tmp_path)
    opened = list[str]()
    open_file = type(memory)._open

    def counted(fs: Any, path: str, *arguments: Any, **settings: Any) -> Any:
        opened.append(path)
        return open_file(fs, path, *arguments, **settings)

    monkeypatch.setattr(
        type(memory),
        "_open",
        lambda s, path, *a, **k: opened.append(path) or open_file(s, path, *a, **k),
    )
    assert names(index("memory://b", tmp_path)) == ["a.mp4"]
    assert opened == []
    memory.rm("/b/a.txt")
    memory.pipe("/b/a.txt", b"two")  # of the same size
    opened.clear()
    assert index("memory://b", tmp_path).clips[0].captions == ("two",)
    assert opened == ["/b/a.txt"]
    # A copy that was cut short by someone else is not believed.
    copy = index("memory://b", tmp_path).clips[0].path
    copy.write_bytes(content[:100])
    assert index("memory://b", tmp_path).clips[0].path.read_bytes() == content


def test_a_remote_table_names_files_beside_it_and_none_elsewhere(
    memory: Any, content: bytes, tmp_path: Path
) -> None:
    memory.pipe("/b/x/clips/a.mp4", content)
    memory.pipe("/b/secret.mp4", content)
    rows = ["path,caption", "clips/a.mp4,one", "../secret.mp4,x", "/b/secret.mp4,x", "no.mp4,x"]
    memory.pipe("/b/x/t.csv", "\n".join(rows).encode())
    report = index("memory://b/x/t.csv", tmp_path)
    assert [(clip.name, clip.captions) for clip in report.clips] == [("clips/a.mp4", ("one",))]
    assert [(p.path.name, p.reason) for p in report.problems] == [
        ("t.csv", "line 3: path leads out of its folder, got '../secret.mp4'"),
        ("t.csv", "line 4: path leads out of its folder, got '/b/secret.mp4'"),
        ("no.mp4", "there is no such file or folder"),
    ]


def test_remote_shards_are_unpacked_and_the_archives_are_not_kept(
    memory: Any, content: bytes, tmp_path: Path
) -> None:
    import io
    import tarfile

    for number in (0, 1):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for name, member in (("1.mp4", content), ("1.txt", b"one")):
                about = tarfile.TarInfo(name)
                about.size = len(member)
                tar.addfile(about, io.BytesIO(member))
        memory.pipe(f"/b/s-{number}.tar", data.getvalue())
    for url in ("memory://b/s-{0..1}.tar", "memory://b/*.tar"):
        assert names(index(url, tmp_path)) == ["s-0/1.mp4", "s-1/1.mp4"]
    folder = index("memory://b", tmp_path, kind="webdataset")
    assert names(folder) == ["s-0/1.mp4", "s-1/1.mp4"]
    with pytest.raises(DataError, match="memory://c: no tar archives are listed there"):
        index("memory://c", tmp_path, kind="webdataset")
    assert [*(tmp_path / "remote").rglob("*.tar")] == []


def test_a_place_that_is_not_there_is_one_line(memory: Any, tmp_path: Path) -> None:
    del memory
    with pytest.raises(
        DataError, match=r"memory://nowhere/t\.csv: there is no such file or folder"
    ):
        index("memory://nowhere/t.csv", tmp_path)
    with pytest.raises(DataError, match="memory://nowhere: no files are listed there"):
        index("memory://nowhere", tmp_path)


# --- Protocols and credentials -------------------------------------------------------------------


def test_a_missing_package_and_an_unknown_protocol_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # `fsspec.registry` itself is a mapping, which hides the module of this name.
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(
        registry.known_implementations,
        "s3",
        {"class": "no_such_module.S3", "err": "Install s3fs to access S3"},
    )
    registry._registry.pop("s3", None)
    problem = remote.protocol_problem("s3://bucket/clips")
    assert problem == "needs a package that is not installed; pip install s3fs"
    assert remote.protocol_problem("what://x") == "has a protocol that is not known (what)"
    assert remote.protocol_problem("memory://x") is None


def test_credentials_are_never_printed(memory: Any, tmp_path: Path) -> None:
    del memory
    url = "https://user:SECRET@host/t.csv?sig=SECRET#SECRET"
    assert remote.shown_url(url) == "https://host/t.csv"
    with pytest.raises(DataError, match=r"https://host/t\.csv: has a user name") as caught:
        index(url, tmp_path)
    assert "SECRET" not in str(caught.value)
    error = OSError("GET https://user:SECRET@host/t.csv?sig=SECRET failed")
    assert "SECRET" not in remote._reason(error)


# --- A server that breaks off --------------------------------------------------------------------


@dataclass
class Server:
    """What a small HTTP server gives, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    break_after: list[int] = field(default_factory=list[int])
    """Bytes of a body after which the connection breaks, one for each of the next answers."""
    ranges: bool = True
    """Whether it gives parts of files, and says so."""
    ignores_ranges: bool = False
    """Whether it gives the whole file for a part, though it says that it gives parts."""
    versions: list[bytes] = field(default_factory=list[bytes])
    """What a file contains instead after each of the next bodies."""
    sent: int = 0
    """Bytes of bodies."""
    statuses: list[int] = field(default_factory=list[int])
    """Answers to give instead, one for each of the next requests of a body."""
    refuse_after_break: list[int] = field(default_factory=list[int])
    """The same, once `break_after` is used up."""
    head_statuses: list[int] = field(default_factory=list[int])
    """The same for the next requests without a body."""
    url: str = ""

    def tag(self, path: str) -> str:
        return f'"{hash(self.files[path])}"'

    def part(self, wanted: str, data: bytes) -> tuple[int, bytes] | None:
        """Where the part of `data` that a Range header asks for begins, and the part; None if the
        whole is given."""
        given = re.match(r"bytes=(\d+)-(\d*)", wanted)
        if given is None or self.ignores_ranges or not self.ranges:
            return None
        start = int(given[1])
        return start, data[start : int(given[2]) + 1 if given[2] else len(data)]

    def sent_of(self, part: bytes) -> bytes:
        """What is sent of a body before the connection breaks."""
        if not self.break_after:
            return part
        part = part[: self.break_after.pop(0)]
        if not self.break_after:
            self.statuses += self.refuse_after_break
        return part


def handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            del format, args

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            statuses = server.statuses if body else server.head_statuses
            if statuses or path not in server.files:
                self.send_error(statuses.pop(0) if statuses else 404)
                return
            data = server.files[path]
            found = server.part(self.headers.get("Range", ""), data)
            start, part = found or (0, data)
            self.send_response(200 if found is None else 206)
            if server.ranges:
                self.send_header("Accept-Ranges", "bytes")
            if found:
                self.send_header(
                    "Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}"
                )
            self.send_header("ETag", server.tag(path))
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if not body:
                return
            part = server.sent_of(part)
            server.sent += len(part)
            self.wfile.write(part)
            if server.versions:
                server.files[path] = server.versions.pop(0)

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    found = Server()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler(found)) as running:
        running.daemon_threads = True
        found.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield found
        running.shutdown()
        thread.join()


def test_a_download_goes_on_where_it_broke_off(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 1000)
    data = np.random.default_rng(1).bytes(10_000)
    server.files["/t/big.mp4"] = data
    files = remote.RemoteFiles(tmp_path)
    (path,) = files.place(f"{server.url}/t/big.mp4").register_all([f"{server.url}/t/big.mp4"])
    server.break_after += [1000, 1000, 400]
    server.sent = 0
    assert files.fetch([path]) == {}
    assert path.read_bytes() == data
    # What came before the break was kept: only the piece that broke off came twice.
    assert server.sent == 10_000 + 400
    assert [*tmp_path.rglob(".part-*")] == []


def test_a_download_begins_again_if_the_file_has_changed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 1000)
    url = f"{server.url}/big.mp4"
    server.files["/big.mp4"] = b"1" * 5000
    server.break_after += [1000, *[0] * 4]
    files = remote.RemoteFiles(tmp_path)
    (path,) = files.place(url).register_all([url])
    (reason,) = files.fetch([path]).values()
    assert reason.endswith("after 4 tries") and not path.exists()
    server.files["/big.mp4"] = b"2" * 5000
    server.break_after.clear()
    files = remote.RemoteFiles(tmp_path)
    (path,) = files.place(url).register_all([url])
    assert files.fetch([path]) == {}
    assert path.read_bytes() == b"2" * 5000


@pytest.mark.parametrize("breaks_off", [True, False])
def test_a_file_that_changes_during_the_download_is_never_mixed_with_its_successor(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, breaks_off: bool
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 1000)
    url = f"{server.url}/big.mp4"
    server.files["/big.mp4"] = b"1" * 5000
    files = remote.RemoteFiles(tmp_path)
    (path,) = files.place(url).register_all([url])
    # After the first piece, or in the middle of the second one.
    server.versions += [b"1" * 5000, b"2" * 5000] if breaks_off else [b"2" * 5000]
    server.break_after += [1000, 500] if breaks_off else []
    assert files.fetch([path]) == {}
    assert path.read_bytes() == b"2" * 5000
    # Its new tag is the one that is remembered.
    again = remote.RemoteFiles(tmp_path)
    assert again.place(url).register_all([url]) == [path]
    server.sent = 0
    assert again.fetch([path]) == {} and server.sent == 0


def test_a_download_that_is_refused_in_its_middle_goes_on_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 1000)
    data = np.random.default_rng(2).bytes(5000)
    server.files["/big.mp4"], url = data, f"{server.url}/big.mp4"
    files = remote.RemoteFiles(tmp_path)
    (path,) = files.place(url).register_all([url])
    server.break_after += [1000, 1000, 0]
    # Busy at the next two tries.
    server.refuse_after_break += [503, 429]
    server.sent = 0
    assert files.fetch([path]) == {}
    assert path.read_bytes() == data and server.sent == 5000


def test_a_server_that_gives_whole_files_for_parts_is_read_from_the_beginning(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 1000)
    server.files["/a.mp4"], url = b"12345" * 1000, f"{server.url}/a.mp4"
    files = remote.RemoteFiles(tmp_path)
    (path,) = files.place(url).register_all([url])
    server.break_after += [1000, 1000, 0, 0, 0, 0]
    assert files.fetch([path]).keys() == {path}
    (part,) = tmp_path.rglob(".part-a.mp4")
    assert part.stat().st_size == 2000
    server.break_after.clear()
    server.ignores_ranges = True
    monkeypatch.setattr(remote, "_PIECE", 1 << 20)
    files = remote.RemoteFiles(tmp_path)
    (path,) = files.place(url).register_all([url])
    assert files.fetch([path]) == {}
    assert path.read_bytes() == b"12345" * 1000


def test_a_server_without_ranges_is_read_from_the_beginning(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.files["/a.mp4"] = b"1" * 5000
    server.break_after += [1000]
    files, url = remote.RemoteFiles(tmp_path), f"{server.url}/a.mp4"
    (path,) = files.place(url).register_all([url])
    assert files.fetch([path]) == {}
    assert path.read_bytes() == b"1" * 5000


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, "there is no such file or folder"),
        (403, "access is refused; check the credentials that its package reads"),
        (500, "can't be read (500, message="),
    ],
)
def test_a_server_that_does_not_answer_well_is_not_a_missing_file(
    server: Server, tmp_path: Path, status: int, reason: str
) -> None:
    server.files["/a.mp4"] = b"1" * 50
    server.head_statuses += [status] * 20
    server.statuses += [status] * 20
    place = remote.RemoteFiles(tmp_path).place(f"{server.url}/a.mp4")
    with pytest.raises(DataError) as caught:
        place.register_all([f"{server.url}/a.mp4"])
    assert caught.value.message.startswith(f"{server.url}/a.mp4: {reason}")


def test_a_server_that_is_not_there_is_not_a_missing_file(server: Server, tmp_path: Path) -> None:
    del server
    with pytest.raises(DataError, match=r"can't be read \(Cannot connect to host 127\.0\.0\.1:9"):
        remote.RemoteFiles(tmp_path).place("http://127.0.0.1:9/t.csv").files()


def test_a_file_whose_server_is_busy_is_asked_for_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))
    files = remote.RemoteFiles(tmp_path)
    server.files |= {"/a.mp4": b"1" * 50, "/t.csv": b"path,caption\na.mp4,x\n"}
    place = files.place(f"{server.url}/t.csv")
    (table,) = place.files()
    path = place.named("a.mp4", table)
    server.head_statuses += [503, 503]
    server.statuses += [503, 503]
    assert files.fetch([path]) == {}
    assert path.read_bytes() == b"1" * 50


def test_an_error_that_passes_is_tried_again_and_one_that_stays_is_named(
    server: Server, tmp_path: Path
) -> None:
    server.files |= {"/a.mp4": b"1" * 50, "/t.csv": b"path,caption\na.mp4,x\n"}
    url = f"{server.url}/t.csv?sig=SECRET"
    server.statuses += [500, 503]
    report = index(url, tmp_path)
    assert [problem.path.name for problem in report.problems] == ["a.mp4"]  # no video
    server.files["/t.csv"] = b"path,caption\nb.mp4,x\n"
    report = index(url, tmp_path)
    (problem,) = report.problems
    assert problem.reason == "there is no such file or folder"
    server.statuses += [500] * 20
    server.files["/t.csv"] = b"path,caption\nc.mp4,x\n"
    with pytest.raises(DataError, match=r"t\.csv: can't be read .*after 4 tries") as caught:
        index(url, tmp_path)
    assert "SECRET" not in str(caught.value)
