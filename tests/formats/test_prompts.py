"""Prompts are cleaned as diffusers' pipeline cleans them."""

from __future__ import annotations

import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given
from hypothesis import strategies as st

from onewan.model.prompts import clean_prompt

SPACES = "".join(map(chr, (*range(0x09, 0x0E), *range(0x1C, 0x21), 0x85, 0xA0, 0x2003, 0x3000)))
PARTS = st.sampled_from(
    ["&amp;", "&amp;lt;", "&#28;", "&nbsp;", "schÃ¶n", "â€œ", "\u200b", *SPACES, "a fox", "红色"]
)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a fox\n\tin  the snow ", "a fox in the snow"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("schÃ¶ne â€œWelleâ€\x9d", 'schöne "Welle"'),
        ("", ""),
    ],
)
def test_a_prompt_is_repaired_unescaped_and_on_one_line(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned == prompt_clean(prompt)


@given(st.lists(PARTS | st.text(max_size=4), max_size=8).map("".join))
def test_any_prompt_is_cleaned_as_by_diffusers(prompt: str) -> None:
    assert clean_prompt(prompt) == prompt_clean(prompt)
