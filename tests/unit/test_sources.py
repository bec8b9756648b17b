"""Each kind of source becomes the clips that it names, and says what of it can't be used."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import tarfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.clips import planner

from onewan.config import dump_run, load_run
from onewan.data.buckets import clip_sources, expected_buckets
from onewan.data.captions import CaptionSettings
from onewan.data.clip import Clip, ClipSource
from onewan.data.index import index_clips
from onewan.data.probes import MediaProbes
from onewan.data.report import DatasetReport
from onewan.data.run_clips import clips_of_run
from onewan.data.sources.copies import Copies
from onewan.data.sources.names import Patterns, fits
from onewan.data.sources.shards import expand
from onewan.data.validation_split import exclude_validation_clips
from onewan.errors import ConfigError, DataError
from onewan.media import write_video


def video(path: Path, caption: str | None = "a test", seconds: float = 0.5) -> Path:
    """A small video of 16 frames per second, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.full((round(16 * seconds), 64, 96, 3), 90, np.uint8)
    write_video(path, frames, 16)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def index(path: Path, **settings: object) -> DatasetReport:
    """The clips of one source, with `settings` of it."""
    source = ClipSource(path=path, **settings)  # pyright: ignore[reportArgumentType]
    return index_clips([source], planner(), use_masks=False)


def names(report: DatasetReport) -> list[str]:
    return [clip.name for clip in report.clips]


def only(report: DatasetReport) -> Clip:
    assert not report.problems
    (clip,) = report.clips
    return clip


# --- Folders -------------------------------------------------------------------------------------


def test_a_folder_is_read_without_its_subfolders_if_that_is_wanted(tmp_path: Path) -> None:
    for name in ("a.mp4", "sub/b.mp4"):
        video(tmp_path / name)
    assert names(index(tmp_path)) == ["a.mp4", "sub/b.mp4"]
    assert names(index(tmp_path, recursive=False)) == ["a.mp4"]


def test_patterns_choose_files_and_what_they_leave_out_is_counted(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.webm", "cats/c.mp4", "cats/drafts/d.mp4"):
        video(tmp_path / name)
    chosen = index(tmp_path, patterns=Patterns(include=["*.mp4"], exclude=["drafts", "x*"]))
    assert names(chosen) == ["a.mp4", "cats/c.mp4"]
    assert [warning.text for warning in chosen.warnings if warning.path is None] == [
        f"2 of 4 files in {tmp_path} are left out by include / exclude",
        f"the pattern x* fits no file in {tmp_path}",
    ]
    # The captions of files that are left out on purpose are not stray ones.
    assert not any("caption" in warning.text for warning in chosen.warnings)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.mp4", "sub/a.mp4", True),
        ("*.mp4", "a.MP4", False),
        ("sub/*.mp4", "sub/a.mp4", True),
        ("sub/*.mp4", "other/sub/a.mp4", False),
        ("**/sub/*.mp4", "other/sub/a.mp4", True),
        ("**/*.mp4", "a.mp4", True),
        ("sub/*.mp4", "sub/deep/a.mp4", False),
        ("sub/**/*.mp4", "sub/a.mp4", True),
        ("sub/**/*.mp4", "sub/deep/er/a.mp4", True),
        ("sub/**/*.mp4", "other/a.mp4", False),
        ("sub/**", "sub/deep/a.mp4", True),
        ("sub/*", "sub/deep/a.mp4", True),  # the folder sub/deep
        ("drafts/", "x/drafts/y/a.mp4", True),
        ("./sub", "sub/a.mp4", True),
        (unicodedata.normalize("NFD", "é*"), "é.mp4", True),
    ],
)
def test_what_a_pattern_fits(pattern: str, name: str, expected: bool) -> None:
    assert fits(pattern, name) is expected


def test_a_caption_in_the_other_unicode_normalization_belongs_to_its_clip(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    video(tmp_path / f"{decomposed}.mp4", caption=None)
    (tmp_path / f"{composed}.txt").write_text("summer", encoding="utf-8")
    found = only(index(tmp_path))
    assert (found.captions, found.name) == (("summer",), f"{decomposed}.mp4")


# --- Tables --------------------------------------------------------------------------------------

Rows = list[dict[str, object]]


def written(path: Path, rows: Rows) -> Path:
    """A table of `rows` in the format of the extension."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows, arrow.schema(_fields(arrow, rows))), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def _fields(arrow: Any, rows: Rows) -> Any:
    """The type of each column, since a column of the first row need not be in it."""
    types = {str: arrow.string(), int: arrow.int64(), float: arrow.float64()}
    return [(name, types[type(v)]) for row in rows for name, v in row.items() if type(v) in types]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_names_files_parts_of_them_and_their_captions(tmp_path: Path, kind: str) -> None:
    video(tmp_path / "clips" / "a.mp4", caption=None, seconds=3)
    video(tmp_path / "b.mp4", caption=None)
    rows: Rows = [
        {"path": "clips/a.mp4", "caption": "two, and more", "start": 1.0, "end": 1.5, "weight": 2.0}
        | {"repeats": 3, "split": "train"},
        {"path": "clips/a.mp4", "caption": "one", "start": 0.25, "end": 9.5, "weight": 1.0}
        | {"repeats": 1, "split": "train"},
        {"path": "b.mp4", "caption": "held out", "start": 0.0, "end": 9.0, "weight": 1.0}
        | {"repeats": 1, "split": "val"},
    ]
    report = index(written(tmp_path / f"clips.{kind}", rows))
    assert report.problems == ()
    first, second = report.clips
    assert (first.name, second.name) == ("clips/a.mp4@0.25-9.5", "clips/a.mp4@1-1.5")
    assert (first.captions, second.captions) == (("one",), ("two, and more",))
    # Half a second has eight frames, of which a clip takes five, in the middle of them.
    assert (second.frames, second.repeats, second.loss_weight) == (5, 3, 2.0)
    assert second.start >= 1.0 and second.times()[-1] < 1.5
    (held_out,) = report.validation_clips
    assert (held_out.name, held_out.captions) == ("b.mp4@0-9", ("held out",))


def test_times_of_a_part_are_those_of_its_frames(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption=None, seconds=4)
    rows: Rows = [{"path": "a.mp4", "caption": "", "start": 1.26, "end": 2.32}]
    clip = only(index(written(tmp_path / "t.csv", rows)))
    # From the first frame at or after 1.26 s (1.3125), 17 frames up to the last one before 2.32.
    assert clip.frames == 17
    assert clip.times()[0] == pytest.approx(1.3125)
    assert clip.times()[-1] == pytest.approx(2.3125)
    assert clip.captions == ("",)


def test_every_wrong_row_is_named_with_its_line_and_all_that_is_wrong(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption=None)
    lines = [
        "path,caption,start,end,weight,repeats,split,height,note",
        "a.mp4,fine,,,,,,480,x",
        "a.mp4,x,-1,oops,0,1.5,tests,480,x",
        ",x,,,,,,480,x",
        "notes.txt,x,,,,,,480,x",
        "a.mp4,one, two,,,,,,480,x",
        'a.mp4,"two',
        'lines",2,1,,,,480,x',
        "missing.mp4,x,,,,,,480,x",
        "a.mp4,x,7,8,,,,480,x",
    ]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    report = index(table)
    assert only_names(report) == ["a.mp4"]
    assert [str(problem).removeprefix(f"{tmp_path}{os.sep}") for problem in report.problems] == [
        "t.csv: line 6: has 10 values, and the header 9 columns; put a value that contains the "
        'separator into "quotes"',
        "t.csv: line 3: start must be seconds from the first frame on, 0 or more, got '-1'; end "
        "must be a number, got 'oops'; repeats must be a whole number from 1 on, got '1.5'; weight "
        "must be above 0; leave out the row to leave out the clip, got '0'; split must be train or "
        "validation, got 'tests'",
        "t.csv: line 4: names no file; give the column path a value",
        "t.csv: line 5: path is neither a video nor an image that is read, by its name, got "
        "'notes.txt'",
        "t.csv: line 7: end must be after start (2 s), got 1",
        "a.mp4: has no frame from 7 s to 8 s, since it is 0.50 s long; correct the times (t.csv, "
        "line 10)",
        "missing.mp4: is not a file; check the path (t.csv, line 9)",
    ]
    texts = [warning.text for warning in report.warnings if warning.path is None]
    assert texts == ["t.csv: these columns are not used: height, note"]


def only_names(report: DatasetReport) -> list[str]:
    return [clip.name for clip in (*report.clips, *report.validation_clips)]


def test_lines_of_jsonl_that_are_no_objects_are_named(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption=None)
    lines = [
        '{"path": "a.mp4", "caption": "with \u2028 in it"}',
        "",
        "[1, 2]",
        '{"path": "a.mp4", "caption": "x", "weight": NaN}',
        '{"path": ',
        '{"path": ["a.mp4"], "caption": "x"}',
        "[" * 100_000,
        '{"path": "a.mp4", "captions": ["one", 2]}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    report = index(tmp_path / "t.jsonl")
    assert report.clips[0].captions == ("with in it",)
    places = [re.match(r"line \d+: [a-z]+", problem.reason) for problem in report.problems]
    assert [place and place[0] for place in places] == [
        "line 3: is",
        "line 4: is",
        "line 5: is",
        "line 7: is",
        "line 6: path",
        "line 8: captions",
    ]


def test_a_table_may_have_no_captions_or_several(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption="from the text file")
    video(tmp_path / "b.mp4", caption=None)
    rows: Rows = [{"path": "a.mp4"}, {"path": "b.mp4", "captions": ["one\nmore", "two"]}]
    report = index(written(tmp_path / "t.jsonl", rows), captions=CaptionSettings(whole=True))
    assert [clip.captions for clip in report.clips] == [
        ("from the text file",),
        ("one more", "two"),
    ]
    without = index(written(tmp_path / "u.jsonl", [{"path": "b.mp4"}]))
    (problem,) = without.problems
    assert problem.reason.startswith("has no caption; write one into b.txt")


def test_what_is_not_used_of_a_table_is_said(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption=None)
    Image.new("RGB", (96, 64)).save(tmp_path / "m.png")
    row: dict[str, object] = {"path": "a.mp4", "caption": "x", "mask": "m.png"}
    table = written(tmp_path / "t.csv", [row, row])
    report = index(table)
    assert [warning.text for warning in report.warnings if warning.path is None] == [
        "t.csv: 1 row names what another row names too",
        "2 masks are not used (video_data.masks is false): t.csv",
    ]
    used = index_clips([ClipSource(path=table)], planner(), use_masks=True)
    assert [clip.mask and clip.mask.path for clip in used.clips] == [tmp_path / "m.png"] * 2


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.mp4", "c/a.mp4"):
        video(tmp_path / name, caption=None)
    rows: Rows = [{"path": n, "caption": n} for n in ("c/a.mp4", "b.mp4", "a.mp4")]
    assert names(index(written(tmp_path / "t.csv", rows))) == ["a.mp4", "b.mp4", "c/a.mp4"]


def test_a_semicolon_separates_where_the_comma_does_not(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption=None)
    (tmp_path / "t.csv").write_text("\ufeffpath;caption\r\na.mp4;one, two\r\n", encoding="utf-8")
    assert only(index(tmp_path / "t.csv")).captions == ("one, two",)


def test_numbers_have_a_decimal_comma_where_a_semicolon_separates(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption=None, seconds=2)
    table = tmp_path / "t.csv"
    text = "path;caption;start;end;weight\na.mp4;1,5;0,5;1,5;0,25\n"
    table.write_text(text, encoding="utf-8")
    clip = only(index(table))
    assert (clip.captions, clip.part, clip.loss_weight) == (("1,5",), (0.5, 1.5), 0.25)
    table.write_text('path,caption,start\na.mp4,x,"0,5"\n', encoding="utf-8")
    (problem,) = index(table).problems
    assert problem.reason == "line 2: start must be a number, got '0,5'"


def test_a_column_that_some_rows_use_is_used(tmp_path: Path) -> None:
    rows: Rows = [
        {"path": "a.mp4", "captions": ["a"]},
        {"video": "b.mp4", "caption": "b", "text": "not used"},
    ]
    for name in ("a.mp4", "b.mp4"):
        video(tmp_path / name, caption=None)
    report = index(written(tmp_path / "t.jsonl", rows))
    assert [clip.captions for clip in report.clips] == [("a",), ("b",)]
    notes = [warning.text for warning in report.warnings if warning.path is None]
    assert notes == ["t.jsonl: this column is not used: text"]


def test_a_source_without_clips_is_a_problem(tmp_path: Path) -> None:
    empty, archives, table, concepts = (
        tmp_path / name for name in ("empty", "archives", "t.csv", "concepts.json")
    )
    empty.mkdir()
    archives.mkdir()
    (archives / "shard-000.tar").write_bytes(b"")
    table.write_text("path,caption\n", encoding="utf-8")
    concepts.write_text('[{"path": "empty"}]', encoding="utf-8")
    nothing = "has no video or image to train on"
    for path, reason in (
        (empty, nothing),
        (archives, f"{nothing}; kind: webdataset reads its tar archives"),
        (table, "has no rows"),
        (concepts, f"concept 0: {empty} {nothing}"),
    ):
        (problem,) = index(path).problems
        assert (problem.path, problem.reason) == (path, reason)


def test_parquet_without_its_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    (problem,) = index(tmp_path / "t.parquet").problems
    assert problem.reason == 'reading parquet needs pyarrow; pip install "onewan[tables]"'


def test_samples_of_data_juicer_divide_their_text_among_their_files(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        video(tmp_path / name, caption=None)
    rows: Rows = [
        {"videos": ["c.mp4"], "text": "<__dj__video> a cat <|__dj__eoc|>", "__dj__stats__": {}},
        {"videos": ["a.mp4", "b.mp4"]}
        | {"text": "<__dj__video> one <|__dj__eoc|> two <__dj__video> <|__dj__eoc|>"},
        {"videos": ["a.mp4", "b.mp4"], "text": "<__dj__video> only one"},
    ]
    report = index(written(tmp_path / "t.jsonl", rows))
    assert [(clip.name, clip.captions[0]) for clip in report.clips] == [
        ("a.mp4", "one"),
        ("a.mp4", "only one"),
        ("b.mp4", "two"),
        ("c.mp4", "a cat"),
    ]
    (problem,) = report.problems
    assert problem.reason.startswith("line 3: its text has no token for b.mp4")


# --- What other programs write -------------------------------------------------------------------


def test_a_hugging_face_folder_has_its_captions_in_tables_beside_the_files(tmp_path: Path) -> None:
    for name in ("train/a.mp4", "train/sub/b.mp4", "validation/c.mp4"):
        video(tmp_path / name, caption=None)
    written(
        tmp_path / "train" / "metadata.jsonl",
        [{"file_name": "sub/b.mp4", "text": "b"}, {"file_name": "a.mp4", "text": "a"}],
    )
    written(tmp_path / "validation" / "metadata.csv", [{"file_name": "c.mp4", "text": "c"}])
    report = index(tmp_path)
    assert [(clip.name, clip.captions) for clip in report.clips] == [
        ("train/a.mp4", ("a",)),
        ("train/sub/b.mp4", ("b",)),
    ]
    assert [clip.name for clip in report.validation_clips] == ["validation/c.mp4"]
    assert report.problems == ()
    assert [warning for warning in report.warnings if warning.path is None] == []
    video(tmp_path / "train" / "d.mp4", caption=None)
    (warning,) = [warning for warning in index(tmp_path).warnings if warning.path is None]
    note = f"1 of 4 files in {tmp_path} are clips of none of its tables: d.mp4"
    assert warning.text == note


def test_a_folder_with_text_files_stays_one_whatever_tables_are_in_it(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption="own")
    written(tmp_path / "metadata.csv", [{"file_name": "a.mp4", "text": "of the table"}])
    report = index(tmp_path)
    assert only(report).captions == ("own",)
    note = (
        f"metadata.csv in {tmp_path} is not used, since its clips have captions in NAME.txt; "
        "kind: hugging_face takes those of the table"
    )
    assert note in [warning.text for warning in report.warnings]
    assert note not in [warning.text for warning in index(tmp_path, kind="folder").warnings]
    assert only(index(tmp_path, kind="hugging_face")).captions == ("of the table",)
    (tmp_path / "metadata.csv").unlink()
    (problem,) = index(tmp_path, kind="hugging_face").problems
    assert problem.reason.startswith("`kind: hugging_face` needs one of metadata.csv")


def curated(folder: Path, name: str, **meta: object) -> None:
    """The metadata of a clip as NeMo Curator writes them."""
    file = folder / "metas" / "v0" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"span_uuid": name, **meta}), encoding="utf-8")


def test_the_output_of_nemo_curator_is_read_with_a_clip_for_each_window(tmp_path: Path) -> None:
    for name in ("a", "b"):
        video(tmp_path / "clips" / f"{name}.mp4", caption=None, seconds=4)
    window: dict[str, object] = {"start_frame": 0, "end_frame": 64, "qwen_caption": "plain"}
    curated(tmp_path, "a", windows=[{**window, "qwen_lm_enhanced_caption": "better"}])
    later = {"start_frame": 32, "end_frame": 64, "qwen_caption": "later"}
    curated(tmp_path, "b", framerate=16.0, windows=[{**window, "end_frame": 32}, later])
    curated(tmp_path, "filtered", windows=[])
    curated(tmp_path, "c", windows=[])
    video(tmp_path / "clips" / "c.mp4", caption=None)
    report = index(tmp_path)
    assert [(clip.name, clip.captions[0]) for clip in report.clips] == [
        ("clips/a.mp4", "better"),
        ("clips/b.mp4@0", "plain"),
        ("clips/b.mp4@2", "later"),
    ]
    _, first, second = report.clips
    assert first.times()[-1] < 2 <= second.times()[0]
    (problem,) = report.problems
    assert (problem.path.name, problem.reason[:18]) == ("c.json", "has no caption; ru")
    assert [w.text for w in report.warnings if w.path is None] == [
        f"1 of 4 clips in {tmp_path} are left out, since they were filtered: they are not in clips"
    ]


def test_onetrainers_concepts_are_folders_with_settings(tmp_path: Path) -> None:
    for name in ("own/a.mp4", "own/sub/b.mp4", "base/c.mp4", "named/a dog.mp4", "held/d.mp4"):
        video(tmp_path / name, caption=None if "named" in name else "x")
    video(tmp_path / "one" / "e.mp4", caption=None)
    (tmp_path / "prompts.txt").write_text("first\nsecond", encoding="utf-8")
    concepts: list[dict[str, object]] = [
        {"path": "own", "include_subdirectories": True, "balancing": 2.4, "loss_weight": 0.5}
        | {"image": {"enable_random_flip": True, "enable_crop_jitter": True}},
        {"path": "base", "type": "PRIOR_PREDICTION"},
        {"path": "named", "text": {"prompt_source": "filename"}},
        {"path": "held", "type": "VALIDATION"},
        {"path": "one", "text": {"prompt_source": "concept", "prompt_path": "prompts.txt"}},
        {"path": "nowhere", "type": "OTHER", "loss_weight": 0, "balancing": True},
        {"path": "nowhere", "enabled": False},
    ]
    file = tmp_path / "training_concepts" / "concepts.json"
    file.parent.mkdir()
    (file.parent / "prompts.txt").write_text("first\nsecond", encoding="utf-8")
    file.write_text(json.dumps(concepts), encoding="utf-8")
    report = index(file)
    found = [(c.name, c.captions, c.repeats, c.loss_weight, c.is_prior) for c in report.clips]
    assert found == [
        ("a.mp4", ("x",), 2, 0.5, False),
        ("sub/b.mp4", ("x",), 2, 0.5, False),
        ("c.mp4", ("x",), 1, 1.0, True),
        ("a dog.mp4", ("a dog",), 1, 1.0, False),
        ("e.mp4", ("first", "second"), 1, 1.0, False),
    ]
    assert [clip.name for clip in report.validation_clips] == ["d.mp4"]
    assert [problem.reason.partition(", got")[0] for problem in report.problems] == [
        f"concept 5: path 'nowhere' is not a folder, from {file.parent} or above",
        "concept 5: type must be one of STANDARD, VALIDATION, PRIOR_PREDICTION",
        "concept 5: loss_weight must be a number above 0",
        "concept 5: balancing must be a number above 0",
    ]
    assert [warning.text for warning in report.warnings if warning.path is None] == [
        "concept 0 of concepts.json repeats each clip 2.4 times; whole numbers are possible, so 2 "
        "is used",
        "concept 0 of concepts.json: enable_random_flip is on, which onewan does not do",
    ]
    shared = {"prompt_source": "concept", "prompt_path": "all.txt"}
    # As older versions of OneTrainer and others have it; paths are those from its folder on.
    older: list[dict[str, object]] = [
        {"path": "own", "repeats": 3, "text": shared},
        {"path": "held", "validation_concept": True},
        {"path": "own", "text": {"tag_dropout_enable": True, "caps_randomize_enable": True}},
        {"path": "one", "text": {**shared, "prompt_path": "none.txt"}},
    ]
    (tmp_path / "all.txt").write_text("of all", encoding="utf-8")
    file.write_text(json.dumps(older), encoding="utf-8")
    report = index(file)
    assert [(c.name, c.captions, c.repeats) for c in report.clips] == [
        ("a.mp4", ("of all",), 3),
        ("a.mp4", ("x",), 1),
    ]
    assert [clip.name for clip in report.validation_clips] == ["d.mp4"]
    assert [problem.reason for problem in report.problems] == [
        "concept 3: prompt_path 'none.txt' is not a file"
    ]
    assert [warning.text for warning in report.warnings if warning.path is None] == [
        "concept 2 of concepts.json: tag_dropout_enable, caps_randomize_enable are on, which "
        "onewan does not do"
    ]
    file.write_text('{"concepts": []}', encoding="utf-8")
    assert "is no list of OneTrainer's concepts" in index(file).problems[0].reason


# --- Archives ------------------------------------------------------------------------------------


def archived(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar file with these members; a `TarInfo` is a member without content."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read_shards(path: Path | str, folder: Path, **settings: Any) -> DatasetReport:
    source = ClipSource(path=path, **settings)
    return index_clips([source], planner(), use_masks=False, copies=Copies(folder))


def test_members_of_one_name_in_tar_shards_are_a_clip(tmp_path: Path) -> None:
    content = video(tmp_path / "v.mp4", caption=None).read_bytes()
    for number in (8, 9, 10):
        members = {
            "x/1.mp4": content,
            "x/1.txt": b"from text",
            "2.mp4": content,
            "2.json": b'{"caption": "from json", "fps": 16}',
            "3.rgb.mp4": content,
            "3.txt": b"by the key",
            "4.cls": b"7",
        }
        archived(tmp_path / f"s-{number:03}.tar", members)
    report = read_shards(tmp_path / "s-{009..011}.tar", tmp_path / "cache")
    found = [(clip.name, clip.captions[0]) for clip in report.clips if "s-009" in clip.name]
    assert found == [
        ("s-009/2.mp4", "from json"),
        ("s-009/3.rgb.mp4", "by the key"),
        ("s-009/x/1.mp4", "from text"),
    ]
    assert {clip.name.split("/")[0] for clip in report.clips} == {"s-009", "s-010"}
    (problem,) = report.problems
    assert (problem.path.name, problem.reason) == ("s-011.tar", "there is no such file")
    notes = [warning.text for warning in report.warnings if "not used of it" in warning.text]
    assert notes[0].endswith(
        "not used of it: 4.cls (is neither a video, an image, a caption nor a mask)"
    )
    # All clips are files below the cache, and a pattern or the folder finds the shards too.
    assert all(clip.path.is_relative_to(tmp_path / "cache" / "shards") for clip in report.clips)
    assert len(read_shards(tmp_path / "s-*.tar", tmp_path / "cache").clips) == 9
    assert len(read_shards(tmp_path, tmp_path / "cache", kind="webdataset").clips) == 9


def test_an_archive_without_clips_is_a_problem(tmp_path: Path) -> None:
    archive = archived(tmp_path / "s-0.tar", {"a.cls": b"3"})
    (problem,) = read_shards(archive, tmp_path / "cache").problems
    assert (problem.path, problem.reason) == (archive, "has no video or image to train on")


def test_an_archive_is_unpacked_once_and_again_when_it_changes(tmp_path: Path) -> None:
    content = video(tmp_path / "v.mp4", caption=None).read_bytes()
    shard = archived(tmp_path / "s.tar", {"a.mp4": content, "a.txt": b"one"})
    clip = only(read_shards(shard, tmp_path / "cache"))
    clip.path.with_suffix(".txt").write_text("changed in the copy")
    assert only(read_shards(shard, tmp_path / "cache")).captions == ("changed in the copy",)
    archived(shard, {"a.mp4": content, "a.txt": b"other"})
    os.utime(shard, (1, 1))
    assert only(read_shards(shard, tmp_path / "cache")).captions == ("other",)


def test_no_member_is_written_outside_of_its_folder(tmp_path: Path) -> None:
    content = video(tmp_path / "v.mp4", caption=None).read_bytes()
    link = tarfile.TarInfo("link.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.mp4")
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.mp4"
    pipe = tarfile.TarInfo("pipe.mp4")
    pipe.type = tarfile.FIFOTYPE
    folder = tarfile.TarInfo("a.mp4x")
    folder.type, folder.linkname = tarfile.SYMTYPE, str(tmp_path)
    members: dict[str, bytes | tarfile.TarInfo] = {
        "../up.mp4": content,
        "x/../../up.mp4": content,
        f"{tmp_path}/absolute.mp4": content,
        "..\\back.mp4": content,
        "C:\\drive.mp4": content,
        "line\nbreak.mp4": content,
        "link.mp4": link,
        "hard.mp4": hard,
        "pipe.mp4": pipe,
        "a.mp4x": folder,
        "a.mp4x/inside.mp4": content,
        "a.mp4": content,
        "a.txt": b"fine",
        "a.txt/below.mp4": content,
        "n" * 300 + ".mp4": content,
        ".hidden.mp4": content,
    }
    before = {*tmp_path.rglob("*")}
    shard = archived(tmp_path / "s.tar", members)
    report = read_shards(shard, tmp_path / "cache")
    assert "s/a.mp4" in names(report)
    new = {*tmp_path.rglob("*")} - before - {shard}
    assert all(path.is_relative_to(tmp_path / "cache") for path in new)
    files = {path.name for path in new if path.is_file()}
    assert files == {"a.mp4", "a.txt", "inside.mp4", ".contents.json"}
    (note,) = [w.text for w in report.warnings if "not used of it" in w.text]
    for part in ("../up.mp4 (leads out of its folder)", "and 9 others"):
        assert part in note


@pytest.mark.parametrize("damage", ["cut", "compressed", "not tar"])
def test_an_archive_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    content = video(tmp_path / "v.mp4", caption=None).read_bytes()
    shard = archived(tmp_path / "s.tar", {"a.mp4": content, "a.txt": b"x"})
    data = shard.read_bytes()
    damaged = {"cut": data[:900], "compressed": gzip.compress(data), "not tar": b"x" * 4096}
    shard.write_bytes(damaged[damage])
    report = read_shards(shard, tmp_path / "cache")
    assert [problem.path for problem in report.problems] == [shard]
    assert report.problems[0].reason.startswith("can't be read as tar (")
    assert [*(tmp_path / "cache").rglob("*.mp4")] == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("{0..1}-{00..01}.tar", ["0-00.tar", "0-01.tar", "1-00.tar", "1-01.tar"]),
    ],
)
def test_braces_stand_for_a_range(pattern: str, expected: list[str]) -> None:
    assert expand(pattern) == expected


@pytest.mark.parametrize("pattern", ["{3..2}.tar", "{0..999999999}.tar", "{0..999}{0..999}.tar"])
def test_a_range_that_is_none_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no range of at most 100,000 files; correct"):
        read_shards(tmp_path / pattern, tmp_path / "cache")


# --- Settings of a source ------------------------------------------------------------------------


def test_a_source_has_its_own_rate_length_and_sizes(tmp_path: Path) -> None:
    video(tmp_path / "plain" / "a.mp4", seconds=4)
    video(tmp_path / "own" / "a.mp4", seconds=4)
    Image.new("L", (96, 64)).save(tmp_path / "own" / "a.mask.png")
    run = tmp_path / "run.yaml"
    run.write_text(
        "model: {path: org/model, variant: t2v-a14b}\n"
        "wan_config: {max_frames: 17}\n"
        "video_data:\n"
        "  resolution: 96x64\n"
        "  min_resolution: [1, 1]\n"
        "  sources:\n"
        "    - plain\n"
        "    - {path: own, target_fps: 8, max_frames: 9, resolution: 64, masks: true,\n"
        "       frame_sample_strategy: head}\n",
        encoding="utf-8",
    )
    config = load_run(run)
    report = clips_of_run(config, MediaProbes())
    assert report.problems == ()
    plain, own = report.clips
    assert (plain.fps, plain.frames, plain.size, plain.mask) == (16, 17, (96, 64), None)
    assert (own.fps, own.frames, own.size, own.start) == (8, 9, (80, 48), 0)
    assert own.mask is not None
    # The plan counts on the same buckets.
    assert expected_buckets(config).clips == {(17, (96, 64)): 1, (9, (80, 48)): 1}
    again = load_run(written_text(tmp_path / "again.yaml", dump_run(config)))
    assert again.video_data == config.video_data


def written_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{path: a, resolution: 100x64}", "video_data.sources.0.resolution: "),
        (
            "{path: a, min_resolution: [2000, 10]}",
            "video_data.sources.0.min_resolution: must not be above video_data.max_resolution",
        ),
        (
            "{path: a.csv, recursive: false}",
            "video_data.sources.0.recursive: has no effect, since only folders have it",
        ),
        (
            "{path: a, frame_sample_strategy: head, clips_per_video: 2}",
            "video_data.sources.0.clips_per_video: has no effect, since the strategy is head",
        ),
        ("{path: a, target_fps: 0}", "video_data.sources.0.target_fps: must be more than 0"),
    ],
)
def test_settings_of_a_source_are_checked(tmp_path: Path, source: str, problem: str) -> None:
    text = f"model: {{path: a/b, variant: t2v-a14b}}\nvideo_data: {{sources: [{source}]}}\n"
    with pytest.raises(ConfigError) as caught:
        load_run(written_text(tmp_path / "run.yaml", text))
    assert [line for line in caught.value.problems if line.startswith(problem)]


def test_a_strategy_of_a_source_has_its_own_number_of_clips(tmp_path: Path) -> None:
    text = (
        "model: {path: a/b, variant: t2v-a14b}\n"
        "wan_config: {frame_sample_strategy: random}\n"
        "video_data: {sources: [{path: a, frame_sample_strategy: uniform}, b]}\n"
    )
    config = load_run(written_text(tmp_path / "run.yaml", text))
    first, second = clip_sources(config.video_data.sources, config)
    assert first.planning == {"frame_strategy": "uniform", "clips_per_video": 1}
    assert second.planning == {}


def test_an_address_of_a_source_stays_as_it_is(tmp_path: Path) -> None:
    text = (
        "model: {path: a/b, variant: t2v-a14b}\n"
        "video_data: {sources: ['s3://bucket/clips', {path: 'https://host/t.csv'}, clips]}\n"
    )
    config = load_run(written_text(tmp_path / "run.yaml", text))
    paths = [source.path for source in config.video_data.sources]
    assert paths == ["s3://bucket/clips", "https://host/t.csv", tmp_path / "clips"]
    assert [
        s.path
        for s in load_run(
            written_text(tmp_path / "again.yaml", dump_run(config))
        ).video_data.sources
    ] == paths


# --- Encodings -----------------------------------------------------------------------------------


def test_captions_and_tables_in_windows_1252_are_read_and_named(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        text = video(tmp_path / "folder" / name).with_suffix(".txt")
        text.write_bytes("un café".encode("cp1252"))
    report = index(tmp_path / "folder")
    assert [clip.captions for clip in report.clips] == [("un café",)] * 2
    assert (
        "  a.txt, b.txt: is in Windows-1252, not UTF-8, and was read as that; `onewan doctor "
        "--fix` converts it" in report.lines()
    )
    table = tmp_path / "t.csv"
    table.write_bytes("path;caption\r\nfolder/a.mp4;für die Straße\r\n".encode("cp1252"))
    report = index(table)
    assert only(report).captions == ("für die Straße",)
    assert "  t.csv: is in Windows-1252, not UTF-8, and was read as that" in report.lines()


def test_a_concept_of_the_base_model_needs_an_adapter(tmp_path: Path) -> None:
    video(tmp_path / "base" / "a.mp4")
    concepts = json.dumps([{"path": "base", "type": "PRIOR_PREDICTION"}])
    written_text(tmp_path / "concepts.json", concepts)
    text = (
        "model: {path: a/b, variant: t2v-a14b}\n"
        "video_data: {sources: concepts.json, min_resolution: [1, 1]}\n"
    )
    run = written_text(tmp_path / "run.yaml", text)
    (clip,) = clips_of_run(load_run(run), MediaProbes()).clips
    assert clip.is_prior
    with pytest.raises(DataError, match="PRIOR_PREDICTION, which needs an adapter method, and"):
        clips_of_run(load_run(run, ["method={kind: fine_tune}"]), MediaProbes())


def test_a_table_says_what_is_validated_on(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", caption=None, seconds=4)
    video(tmp_path / "b.mp4", caption=None)
    rows: Rows = [
        {"path": "a.mp4", "caption": "x", "start": 0, "end": 2, "split": "train"},
        {"path": "a.mp4", "caption": "x", "start": 2, "end": 4, "split": "validation"},
        {"path": "a.mp4", "caption": "x", "start": 1, "end": 3, "split": "train"},
        {"path": "b.mp4", "caption": "x", "start": 0, "end": 2, "split": "train"},
    ]
    report = index(written(tmp_path / "t.csv", rows))
    digests = {clip.path: clip.path.name for clip in (*report.clips, *report.validation_clips)}
    remaining, in_both = exclude_validation_clips(report.clips, report.validation_clips, digests)
    # Another part of the same film is trained on, unless it overlaps.
    assert [clip.name for clip in remaining] == ["a.mp4@0-2", "b.mp4@0-2"]
    assert [problem.path.name for problem in in_both] == ["a.mp4"]
    validated = index_clips(
        [ClipSource(path=tmp_path / "t.csv")], planner(), use_masks=False, for_validation=True
    )
    assert names(validated) == ["a.mp4@2-4"]
    assert any("3 clips of" in warning.text for warning in validated.warnings)
