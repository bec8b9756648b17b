"""One value of a YAML document changed: every other character stays, whatever the style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onewan.document_edits import inline, with_items_exchanged, with_value, without_value
from onewan.documents import KeyPath, get_path, parse_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

DOCUMENT = """\
# A run.
model:
  variant: t2v-a14b  # or another
  # dtype: float32

video_data:
  sources:
    # What to train on.
    - path: clips
      repeats: 2  # twice
    # More.
    - 'more clips'
  resolution: 512

per_expert:
  high: {lr: 3e-5, rank: 8}
memory:
  # vram: 24GB
sample:
  prompts: [a, "b, c"]
"""


def changed_lines(before: str, after: str) -> tuple[list[str], list[str]]:
    """(lines that are gone, lines that are new), where the others keep their order."""
    old, new = before.splitlines(), after.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(old))
    old, new = old[start:], new[start:]
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    return old, new


@pytest.mark.parametrize(
    ("path", "value", "gone", "added"),
    [
        (
            ("model", "variant"),
            "ti2v-5b",
            ["  variant: t2v-a14b  # or another"],
            ["  variant: ti2v-5b  # or another"],
        ),
        (
            ("video_data", "sources", 0, "repeats"),
            3,
            ["      repeats: 2  # twice"],
            ["      repeats: 3  # twice"],
        ),
        (
            ("per_expert", "high", "lr"),
            1e-5,
            ["  high: {lr: 3e-5, rank: 8}"],
            ["  high: {lr: 1.0e-05, rank: 8}"],
        ),
        (
            ("per_expert", "high", "steps"),
            10,
            ["  high: {lr: 3e-5, rank: 8}"],
            ["  high: {lr: 3e-5, rank: 8, steps: 10}"],
        ),
        (("model", "device"), "cuda:1", [], ["  device: cuda:1"]),
        (("video_data", "masks"), True, [], ["  masks: true"]),
        (("memory", "weights"), "fp8", [], ["  weights: fp8"]),
        (
            ("video_data", "sources", 2),
            {"path": "x", "repeats": 2},
            [],
            ["    - path: x", "      repeats: 2"],
        ),
        (("video_data", "sources", 0, "kind"), "folder", [], ["      kind: folder"]),
        (
            ("sample", "prompts", 2),
            "d: e",
            ['  prompts: [a, "b, c"]'],
            ["""  prompts: [a, "b, c", 'd: e']"""],
        ),
        (
            ("sample", "prompts", 0),
            "x, y",
            ['  prompts: [a, "b, c"]'],
            ['  prompts: ["x, y", "b, c"]'],
        ),
        (("output", "name"), "dog", [], ["", "output:", "  name: dog"]),
        (("per_expert", "low", "lr"), 0.5, [], ["  low:", "    lr: 0.5"]),
    ],
)
def test_a_value_is_set_and_nothing_else_changes(
    path: KeyPath, value: object, gone: list[str], added: list[str]
) -> None:
    after = with_value(DOCUMENT, path, value)
    assert changed_lines(DOCUMENT, after) == (gone, added)
    assert get_path(parse_yaml(after), path) == value
    assert with_value(after, path, value) is after


@pytest.mark.parametrize(
    ("path", "gone", "added"),
    [
        (("model", "variant"), ["  variant: t2v-a14b  # or another"], []),
        (("video_data", "resolution"), ["  resolution: 512"], []),
        (("video_data", "sources", 0, "repeats"), ["      repeats: 2  # twice"], []),
        (("video_data", "sources", 1), ["    - 'more clips'"], []),
        (("per_expert", "high", "rank"), ["  high: {lr: 3e-5, rank: 8}"], ["  high: {lr: 3e-5}"]),
        (("per_expert", "high", "lr"), ["  high: {lr: 3e-5, rank: 8}"], ["  high: {rank: 8}"]),
        (("sample", "prompts", 0), ['  prompts: [a, "b, c"]'], ['  prompts: ["b, c"]']),
    ],
)
def test_a_value_is_removed_and_nothing_else_changes(
    path: KeyPath, gone: list[str], added: list[str]
) -> None:
    document = DOCUMENT.replace("  # dtype: float32\n", "  dtype: float32\n")
    after = without_value(document, path)
    assert changed_lines(document, after) == (gone, added)


def test_what_loses_its_last_entry_stays_empty() -> None:
    assert without_value("a:\n  b: 1  # one\nc: 2\n", ("a", "b")) == "a: {}  # one\nc: 2\n"
    assert without_value("a: [1]\n", ("a", 0)) == "a: []\n"
    assert without_value("# note\na: 1\n", ("a",)) == "# note\n"
    assert with_value("# note\n", ("a", "b"), 1) == "# note\na:\n  b: 1\n"


def test_what_is_empty_is_filled_in_block_style() -> None:
    assert with_value("- {}  # one\n", (0, "a"), 1) == "- a: 1  # one\n"
    assert with_value("a:\n  b: {}  # one\nc: 2\n", ("a", "b", "d"), 1) == (
        "a:\n  b:  # one\n    d: 1\nc: 2\n"
    )
    assert with_value("a: [{}]\n", ("a", 0, "b"), 1) == "a: [{b: 1}]\n"


def test_the_first_field_of_an_item_leaves_its_dash() -> None:
    assert without_value("- a: 1\n  b: 2\n", (0, "a")) == "- b: 2\n"


def test_entries_come_in_the_order_that_is_given() -> None:
    order = {(): ("model", "method", "train"), ("train",): ("steps", "seed", "ema")}
    text = "model:\n  variant: x\n\ntrain:\n  steps: 1\n  # The average.\n  ema: {}\n"
    with_method = with_value(text, ("method", "rank"), 4, lambda path: order.get(path, ()))
    assert "variant: x\n\nmethod:\n  rank: 4\n\ntrain:" in with_method
    with_seed = with_value(text, ("train", "seed"), 4, lambda path: order.get(path, ()))
    assert "steps: 1\n  seed: 4\n  # The average.\n  ema: {}" in with_seed
    first = with_value("train: {}\n", ("model",), 1, lambda path: order.get(path, ()))
    assert first == "model: 1\ntrain: {}\n"


def test_items_change_places_with_their_fields() -> None:
    after = with_items_exchanged(DOCUMENT, ("video_data", "sources"), 0)
    assert parse_yaml(after)["video_data"]["sources"] == [
        "more clips",
        {"path": "clips", "repeats": 2},
    ]
    assert "    - path: clips\n      repeats: 2  # twice\n  resolution" in after
    assert with_items_exchanged(after, ("video_data", "sources"), 0) == DOCUMENT
    assert with_items_exchanged("[a, b]", (), 0) == "[b, a]"


def test_aliases_and_texts_of_several_lines() -> None:
    text = "a: &x 1  # one\nb: *x\nc: |\n  long\n  text\n\nd: 2\n"
    after = with_value(text, ("b",), 5)
    assert parse_yaml(after) == {"a": 1, "b": 5, "c": "long\ntext\n", "d": 2}
    assert "# one" in after
    assert with_value(text, ("c",), "short") == "a: &x 1  # one\nb: *x\nc: short\n\nd: 2\n"
    assert without_value(text, ("c",)) == "a: &x 1  # one\nb: *x\n\nd: 2\n"
    assert parse_yaml(with_value(text, ("e",), "one\ntwo")) == parse_yaml(text) | {"e": "one\ntwo"}


def test_what_is_malformed_or_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1, column"):
        with_value("a: [", ("a",), 1)
    with pytest.raises(ValueError, match="no field b"):
        with_value("a: 1\n", ("a", "b"), 1)
    with pytest.raises(ValueError, match=r"no a\.b"):
        without_value("a: {}\n", ("a", "b"))
    with pytest.raises(ValueError, match="no item 2"):
        with_value("a: [1]\n", ("a", 2), 1)


def test_values_stay_of_their_types() -> None:
    assert with_value("a: 1\n", ("a",), True) == "a: true\n"
    assert with_value("a: '1'\n", ("a",), 1) == "a: 1\n"
    assert with_value("a: 1\n", ("a",), "1") == "a: '1'\n"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def _usable(value: Any) -> bool:
    try:
        return bool(parse_yaml("a: 1\nvalue: " + inline(value))["value"] == value)
    except ValueError:  # control characters, which no document has
        return False


@given(values.filter(_usable), st.sampled_from(["block", "flow", "comment", "empty", "list"]))
@settings(max_examples=150, deadline=None)
def test_any_value_is_read_back_as_it_was_set(value: object, style: str) -> None:
    text, path = {
        "block": ("a:\n  b: 1\nc: 2\n", ("a", "b")),
        "flow": ("a: {b: 1, d: 3}\nc: 2\n", ("a", "b")),
        "comment": ("a:\n  # b: 1\nc: 2", ("a", "b")),
        "empty": ("", ("a", "b")),
        "list": ("a:\n- b: 1\n- c: 2\n", ("a", 1, "b")),
    }[style]
    after = parse_yaml(with_value(text, path, value))
    assert get_path(after, path) == value
    if style != "empty" and style != "list":
        assert after["c"] == 2


@pytest.mark.parametrize("name", ["t2v-a14b/lora_24gb.yaml", "ti2v-5b/embedding_12gb.yaml"])
def test_a_run_file_is_the_same_after_a_change_and_back(name: str) -> None:
    text = (CONFIGS / name).read_text(encoding="utf-8")
    seed = with_value(text, ("train", "seed"), 7)
    assert seed != text and without_value(seed, ("train", "seed")) == text
    steps = parse_yaml(text)["train"]["steps"]
    other = with_value(text, ("train", "steps"), 17)
    assert with_value(other, ("train", "steps"), steps) == text
