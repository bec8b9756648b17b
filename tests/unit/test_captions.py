"""From a text file to the captions of a clip: lines, prefix, trigger word, orders of tags."""

from __future__ import annotations

import codecs
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from support.clips import planner

from onewan.data.captions import CaptionSettings, read_caption_file
from onewan.data.clip import ClipSource
from onewan.data.index import index_clips
from onewan.data.report import DatasetReport
from onewan.errors import DataError

TAGS = "fox, snow, night, running, side view"


def captions_of(settings: CaptionSettings, *lines: str, seed: int = 1) -> tuple[str, ...]:
    return settings.captions(lines, seed)


def clip_with(folder: Path, name: str, caption: bytes, *, suffix: str = ".txt") -> Path:
    path = folder / f"{name}.png"
    Image.new("RGB", (96, 64)).save(path)
    path.with_suffix(suffix).write_bytes(caption)
    return path


def index(folder: Path, **settings: object) -> DatasetReport:
    source = ClipSource(path=folder, captions=CaptionSettings(**settings))  # pyright: ignore[reportArgumentType]
    return index_clips([source], planner(), use_masks=False)


# --- The text file -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", ()),
        (b"\n \r\n\t\n", ()),
        (b"one\r\ntwo\rthree\n\n four ", ("one", "two", "three", "four")),
        ("one\u2028sentence\vand\x1con".encode(), ("one\u2028sentence\vand\x1con",)),
        (
            codecs.BOM_UTF16_LE + "caf\u00e9\r\n\u65e5\u672c".encode("utf-16-le"),
            ("caf\u00e9", "\u65e5\u672c"),
        ),
    ],
)
def test_only_line_breaks_of_text_files_split_a_caption(
    tmp_path: Path, content: bytes, lines: tuple[str, ...]
) -> None:
    path = clip_with(tmp_path, "a", content)
    assert read_caption_file(path, [path.with_suffix(".txt")]).lines == lines


def test_two_caption_files_of_one_name_are_refused(tmp_path: Path) -> None:
    path = clip_with(tmp_path, "a", b"one")
    files = [tmp_path / "a.TXT", tmp_path / "a.txt"]
    with pytest.raises(
        DataError, match=r"a\.png: has 2 caption files \(a\.TXT, a\.txt\); keep one"
    ):
        read_caption_file(path, files)


def test_the_extension_of_a_caption_file_may_be_in_capitals(tmp_path: Path) -> None:
    clip_with(tmp_path, "a", b"a caption", suffix=".TXT")
    report = index(tmp_path)
    assert [clip.captions for clip in report.clips] == [("a caption",)]
    assert not report.problems and not report.warnings


# --- Lines ---------------------------------------------------------------------------------------


def test_a_note_says_how_captions_of_several_lines_are_taken(tmp_path: Path) -> None:
    clip_with(tmp_path, "a", b"A fox runs.\n\nIt snows.")
    clip_with(tmp_path, "b", b"A fox sits.")
    by_lines, whole = index(tmp_path), index(tmp_path, whole=True)
    assert [clip.captions for clip in by_lines.clips] == [
        ("A fox runs.", "It snows."),
        ("A fox sits.",),
    ]
    assert [clip.captions for clip in whole.clips] == [("A fox runs. It snows.",), ("A fox sits.",)]
    assert [warning.text for warning in (*by_lines.warnings, *whole.warnings)] == [
        f"1 of 2 clips in {tmp_path} has a caption of several lines, taken as alternatives; where "
        "they are one text, join the lines, or set video_data.captions: whole",
        f"1 of 2 clips in {tmp_path} has a caption of several lines, taken as one text each "
        "(video_data.captions: whole)",
    ]


# --- Prefix and trigger word ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "word", "caption", "expected"),
    [
        ("", "ohwx", "a dog runs", "ohwx, a dog runs"),
        ("", "ohwx", "", "ohwx"),
        ("", "ohwx", "Ohwx runs", "Ohwx runs"),
        ("", "ohwx", "an ohwxian dog", "ohwx, an ohwxian dog"),
        ("", "<fox>", "a<fox>!", "a<fox>!"),
        ("A film of", "", "a dog", "A film of a dog"),
        ("A film of", "", "", "A film of"),
        ("A film of", "ohwx dog", "running", "A film of ohwx dog, running"),
        ("A film of ohwx:", "ohwx", "running", "A film of ohwx: running"),
    ],
)
def test_prefix_and_trigger_word(prefix: str, word: str, caption: str, expected: str) -> None:
    settings = CaptionSettings(prefix=prefix, trigger_word=word)
    assert captions_of(settings, *([caption] if caption else [])) == (expected,)


@pytest.mark.parametrize(
    ("word", "class_word", "caption", "expected"),
    [
        ("ohwx", "a dog", "ohwx runs, and OHWX jumps", "a dog runs, and a dog jumps"),
        ("ohwx", "a dog", "two ohwxs", None),
        ("<fox>", r"fox \1", "the <fox>es", r"the fox \1es"),
        ("ohwx", "", "ohwx runs", None),
        ("", "a dog", "", None),
    ],
)
def test_a_class_word_replaces_the_trigger_word(
    word: str, class_word: str, caption: str, expected: str | None
) -> None:
    settings = CaptionSettings(trigger_word=word, class_word=class_word if word else "")
    assert settings.class_caption(caption) == expected


# --- Orders of tags ------------------------------------------------------------------------------


def test_orders_of_tags_keep_the_first_ones_and_begin_with_that_of_the_file() -> None:
    settings = CaptionSettings(trigger_word="ohwx", tag_orders=50, kept_tags=2)
    captions = captions_of(settings, TAGS)
    assert len(captions) == 50
    assert captions[0] == f"ohwx, {TAGS}"
    assert all(caption.startswith("ohwx, fox, snow, ") for caption in captions)
    assert {tuple(sorted(caption.split(", "))) for caption in captions} == {
        tuple(sorted(["ohwx", *TAGS.split(", ")]))
    }
    assert len(set(captions)) == 6  # all orders of three tags


def test_orders_of_tags_depend_on_seed_and_caption_alone() -> None:
    settings = CaptionSettings(tag_orders=4)
    first = captions_of(settings, TAGS)
    assert captions_of(settings, TAGS) == first
    assert captions_of(settings, TAGS, seed=2) != first
    assert captions_of(settings, "another, caption", TAGS)[4:] == first


def test_each_line_gives_as_many_captions_as_the_others() -> None:
    """So that a draw among all captions of a clip takes each line equally often."""
    captions = captions_of(CaptionSettings(tag_orders=8), "one caption", TAGS)
    assert Counter("fox" in caption for caption in captions) == {True: 8, False: 8}
