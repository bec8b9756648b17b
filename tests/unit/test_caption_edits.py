"""Editing captions where they are written: files, tables, conflicts, taking back, replacing."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from onewan.config.load import run_of_settings
from onewan.config.schema import ResolvedRun
from onewan.data.caption_edits import CaptionEdits, Replacement
from onewan.data.caption_places import (
    CaptionConflictError,
    CaptionStore,
    Cell,
    Elsewhere,
    Place,
    TextFile,
    Written,
    origins,
)
from onewan.errors import DataError


def run_of(source: Path) -> ResolvedRun:
    """A run on the clips of one source."""
    settings = {
        "model": {"variant": "t2v-a14b", "path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"},
        "video_data": {"sources": [str(source)], "cache_dir": str(source.parent / "cache")},
    }
    return run_of_settings(settings, "a test")


def places(source: Path) -> dict[str, Place | Elsewhere]:
    """The places of the captions of a source, by the names of its items."""
    return {name: origin.place for (_, name), origin in origins(run_of(source)).items()}


def place(source: Path, name: str) -> Place:
    found = places(source)[name]
    assert not isinstance(found, Elsewhere), found.why
    return found


def clips(folder: Path, *names: str) -> Path:
    """A folder with files that are clips by their names."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def edit(store: CaptionStore, where: Place, text: str) -> Written:
    return store.write(where, text, store.read(where).digest)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"a dog", "a cät <b>\x07\u2028 end".encode()),
        (b"a dog\r\nruns\r\n", "a cät <b>\x07\u2028 end\r\n".encode()),
        (b"\xef\xbb\xbfa dog\n", b"\xef\xbb\xbf" + "a cät <b>\x07\u2028 end\n".encode()),
        ("a dog".encode("utf-16"), "a cät <b>\x07\u2028 end".encode("utf-16")),
        (b"un caf\xe9", "a cät <b>\x07\u2028 end".encode()),
    ],
    ids=["plain", "windows line breaks", "mark", "utf-16", "windows-1252 becomes utf-8"],
)
def test_a_file_keeps_its_encoding_and_line_breaks(
    tmp_path: Path, before: bytes, after: bytes
) -> None:
    folder = clips(tmp_path / "clips", "a.mp4")
    (folder / "a.txt").write_bytes(before)
    written = edit(CaptionStore(), place(folder, "a.mp4"), "a cät <b>\x07\u2028 end")
    assert written.text == "a cät <b>\x07\u2028 end"
    assert (folder / "a.txt").read_bytes() == after


def test_a_caption_that_is_written_as_it_was_changes_nothing(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips", "a.mp4")
    (folder / "a.txt").write_bytes(b"one\r\ntwo\nthree\r")
    before = (folder / "a.txt").stat()
    store, where = CaptionStore(), place(folder, "a.mp4")
    edit(store, where, store.read(where).text or "")
    assert (folder / "a.txt").stat() == before


@pytest.mark.skipif(os.name == "nt", reason="permissions and links are those of POSIX systems")
def test_a_file_keeps_its_permissions_and_a_link_stays_one(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips", "a.mp4")
    original = tmp_path / "original.txt"
    original.write_text("a dog", encoding="utf-8")
    original.chmod(0o664)
    (folder / "a.txt").symlink_to(original)
    edit(CaptionStore(), place(folder, "a.mp4"), "a cat")
    assert (folder / "a.txt").is_symlink()
    assert original.read_text(encoding="utf-8") == "a cat"
    assert stat.S_IMODE(original.stat().st_mode) == 0o664


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips")
    media = folder / os.fsdecode(b"caf\xe9.mp4")
    try:
        media.write_bytes(b"")
    except OSError:
        pytest.skip("the file system of this machine takes no such names")
    [(source, where)] = origins(run_of(folder)).values()
    assert source == folder
    assert isinstance(where, TextFile)
    store = CaptionStore()
    assert store.read(where) == Written(None, "")
    edit(store, where, "a coffee")
    assert media.with_suffix(".txt").read_bytes() == b"a coffee"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("half \ud800", "a part of a character"), ("a\0b", "NUL"), ("x" * (1 << 21), "longer than")],
)
def test_what_can_not_be_a_caption_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    folder = clips(tmp_path / "clips", "a.mp4")
    (folder / "a.txt").write_bytes(b"a dog")
    with pytest.raises(DataError, match=reason):
        edit(CaptionStore(), place(folder, "a.mp4"), text)
    assert (folder / "a.txt").read_bytes() == b"a dog"


CSV = (
    "caption,path,weight\r\n"
    '"a ""big"" dog, running",a.mp4,1.50\r\n'
    "\r\n"
    "un caf\u00e9,b.mp4,2\r\n"
    '"[""one"", ""two""]", c.mp4 ,"3"'
)
JSONL = (
    '{"path": "a.mp4", "meta": {"caption": "x"}, "weight": 1.50, '
    '"caption" : "a \\"caption\\": y"}\n'
    "\n"
    '{"caption":["one","two"],"path":"b.mp4","weight":1e0}'
)


def test_a_cell_of_a_csv_is_changed_and_every_other_byte_stays(tmp_path: Path) -> None:
    clips(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    table = tmp_path / "clips.csv"
    table.write_bytes(CSV.encode())
    store = CaptionStore()
    assert store.read(place(table, "c.mp4")).text == "one\ntwo"
    edit(store, place(table, "a.mp4"), 'a "small", dog')
    edit(store, place(table, "b.mp4"), "tea; with; semicolons")
    edit(store, place(table, "c.mp4"), "one\nthree, four")
    assert table.read_bytes().decode() == CSV.replace(
        '"a ""big"" dog, running"', '"a ""small"", dog"'
    ).replace("un caf\u00e9", "tea; with; semicolons").replace(
        '"[""one"", ""two""]"', '"[""one"", ""three, four""]"'
    )
    assert store.read(place(table, "c.mp4")).text == "one\nthree, four"


def test_a_value_of_a_jsonl_is_changed_and_every_other_byte_stays(tmp_path: Path) -> None:
    clips(tmp_path, "a.mp4", "b.mp4")
    table = tmp_path / "clips.jsonl"
    table.write_bytes(JSONL.encode())
    store = CaptionStore()
    edit(store, place(table, "a.mp4"), "[in brackets] \u00e9")
    edit(store, place(table, "b.mp4"), "one")
    assert table.read_bytes().decode() == JSONL.replace(
        '"a \\"caption\\": y"', '["[in brackets] \u00e9"]'
    ).replace('["one","two"]', '"one"')
    assert store.read(place(table, "a.mp4")).text == "[in brackets] \u00e9"


def test_a_row_is_found_again_where_others_were_added(tmp_path: Path) -> None:
    clips(tmp_path, "a.mp4", "b.mp4")
    table = tmp_path / "clips.csv"
    table.write_text("path,caption\na.mp4,a dog\n", encoding="utf-8")
    store, where = CaptionStore(), place(table, "a.mp4")
    seen = store.read(where)
    table.write_text("path,caption\nb.mp4,a cat\na.mp4,a dog\n", encoding="utf-8")
    store.write(where, "a big dog", seen.digest)
    assert table.read_text(encoding="utf-8") == "path,caption\nb.mp4,a cat\na.mp4,a big dog\n"
    table.write_text("path,caption\nb.mp4,a cat\n", encoding="utf-8")
    with pytest.raises(DataError, match="load the data again"):
        store.read(where)


def test_what_is_not_changed_here_says_where_it_is(tmp_path: Path) -> None:
    clips(tmp_path, "a.mp4", "b.mp4")
    table = tmp_path / "samples.jsonl"
    text = "<__dj__video>both<|__dj__eoc|><__dj__video>of them"
    table.write_text(json.dumps({"videos": ["a.mp4", "b.mp4"], "text": text}), encoding="utf-8")
    found = places(table)
    assert [found[name] for name in ("a.mp4", "b.mp4")] == [
        Elsewhere(
            "the caption is not one file or cell of its own (samples.jsonl, line 1); change it "
            "there"
        )
    ] * 2
    twice = tmp_path / "twice.csv"
    twice.write_text("path,caption\na.mp4,a dog\na.mp4,a cat\n", encoding="utf-8")
    assert isinstance(places(twice)["a.mp4"], Elsewhere)


def test_parquet_is_changed_by_the_program_that_wrote_it(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs onewan[tables]")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"path": ["a.mp4"], "caption": ["a dog"]}
    clips(tmp_path, "a.mp4")
    parquet.write_table(pyarrow.table(columns), tmp_path / "clips.parquet")
    assert places(tmp_path / "clips.parquet")["a.mp4"] == Elsewhere(
        "the caption is in clips.parquet, row 1; change it with the program that wrote that"
    )


@pytest.mark.parametrize("kind", ["file", "table"])
def test_the_second_of_two_who_change_a_caption_is_told(tmp_path: Path, kind: str) -> None:
    folder = clips(tmp_path / "clips", "a.mp4", "b.mp4")
    (folder / "a.txt").write_text("a dog", encoding="utf-8")
    table = folder / "clips.csv"
    table.write_text("path,caption\na.mp4,a dog\nb.mp4,a cat\n", encoding="utf-8")
    where = place(folder if kind == "file" else table, "a.mp4")
    store = CaptionStore()
    first = second = store.read(where)
    store.write(where, "a big dog", first.digest)
    with pytest.raises(CaptionConflictError) as error:
        store.write(where, "a small dog", second.digest)
    assert error.value.current == store.read(where)
    assert error.value.current.text == "a big dog"
    # Whoever has seen the other text may replace it.
    assert store.write(where, "a small dog", error.value.current.digest).text == "a small dog"


def test_another_row_is_no_conflict(tmp_path: Path) -> None:
    clips(tmp_path, "a.mp4", "b.mp4")
    table = tmp_path / "clips.csv"
    table.write_text("path,caption\na.mp4,a dog\nb.mp4,a cat\n", encoding="utf-8")
    store = CaptionStore()
    first, second = place(table, "a.mp4"), place(table, "b.mp4")
    seen = store.read_all([first, second])
    store.write(first, "a big dog", seen[first].digest)
    store.write(second, "a big cat", seen[second].digest)
    assert table.read_text(encoding="utf-8") == "path,caption\na.mp4,a big dog\nb.mp4,a big cat\n"


def test_of_many_threads_one_changes_a_caption(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips", "a.mp4")
    (folder / "a.txt").write_text("a dog", encoding="utf-8")
    store, where = CaptionStore(), place(folder, "a.mp4")
    digest, start = store.read(where).digest, threading.Barrier(8)
    results = list[str]()

    def write(number: int) -> None:
        start.wait()
        try:
            store.write(where, f"dog {number}", digest)
            results.append("written")
        except CaptionConflictError:
            results.append("told")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["told"] * 7 + ["written"]


def test_undo_and_redo(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips", "a.mp4", "b.mp4")
    (folder / "a.txt").write_text("a dog", encoding="utf-8")
    store = CaptionStore()
    edits, a, b = CaptionEdits(store), place(folder, "a.mp4"), place(folder, "b.mp4")
    assert (edits.can_undo, edits.can_redo) == (0, 0)
    edits.edit(a, "a big dog", store.read(a))
    edits.edit(b, "a new caption", store.read(b))
    edits.edit(a, "a big dog", store.read(a))  # which changes nothing
    assert (edits.can_undo, edits.can_redo) == (1, 0)
    edits.undo()
    assert not (folder / "b.txt").exists()
    edits.undo()
    assert store.read(a).text == "a dog"
    assert not edits.undo().changed
    edits.redo()
    edits.redo()
    assert (store.read(a).text, store.read(b).text) == ("a big dog", "a new caption")
    edits.undo()
    edits.edit(a, "another", store.read(a))
    assert edits.can_redo == 0  # as in any editor: a new edit ends what could be made again


def test_undo_leaves_alone_what_was_changed_since(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips", "a.mp4", "b.mp4")
    for name in "ab":
        (folder / f"{name}.txt").write_text("a dog", encoding="utf-8")
    store = CaptionStore()
    edits, a, b = CaptionEdits(store), place(folder, "a.mp4"), place(folder, "b.mp4")
    edits.apply(Replacement(find="dog", replace="cat").changes(store.read_all([a, b])))
    (folder / "b.txt").write_text("by another program", encoding="utf-8")
    outcome = edits.undo()
    assert [change.place for change in outcome.changed] == [a]
    assert isinstance(outcome.failed[b], CaptionConflictError)
    assert (store.read(a).text, store.read(b).text) == ("a dog", "by another program")
    edits.redo()
    assert (store.read(a).text, store.read(b).text) == ("a cat", "by another program")


def test_replacing_in_all_captions(tmp_path: Path) -> None:
    folder = clips(tmp_path / "clips", "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    for name, text in {"a": "A dog. dogs", "b": "hotdog", "c": "a cat"}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    store = CaptionStore()
    wanted = [place(folder, f"{name}.mp4") for name in "abcd"]
    seen = store.read_all(wanted)

    def after(**options: bool) -> list[str | None]:
        changes = Replacement(find="Dog", replace=r"\1 fox", **options).changes(seen)
        return [change.after for change in changes]

    assert after() == [r"A \1 fox. \1 foxs", r"hot\1 fox"]
    assert after(whole_words=True) == [r"A \1 fox. dogs"]
    assert after(match_case=True) == []
    assert Replacement(find="", replace="x").changes(seen) == []
    edits = CaptionEdits(store)
    outcome = edits.apply(Replacement(find="dog", replace="fox").changes(seen))
    assert (len(outcome.changed), edits.can_undo) == (2, 2)
    assert [store.read(where).text for where in wanted] == ["A fox. foxs", "hotfox", "a cat", None]
    edits.undo()
    assert [store.read(where).text for where in wanted] == ["A dog. dogs", "hotdog", "a cat", None]


def test_replacing_in_a_table_writes_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.mp4" for number in range(300)]
    clips(tmp_path, *names)
    table = tmp_path / "clips.csv"
    rows = "".join(f"{name},a dog\n" for name in names)
    table.write_text(f"path,caption\n{rows}", encoding="utf-8")
    store, found = CaptionStore(), list[Place]()
    for where in places(table).values():
        assert isinstance(where, Cell)
        found.append(where)
    written = list[Path]()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append(Path(b)), replace(a, b)))
    edits = CaptionEdits(store)
    edits.apply(Replacement(find="dog", replace="big, big dog").changes(store.read_all(found)))
    assert written == [table]
    rows = "".join(f'{name},"a big, big dog"\n' for name in names)
    assert table.read_text(encoding="utf-8") == f"path,caption\n{rows}"
