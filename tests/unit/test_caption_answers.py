"""What is asked of a captioning model, and what is made of its answer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from robustness.chat_server import completion

from onewan.captioning.answers import BrokenAnswerError, NoCaptionError, caption_of
from onewan.captioning.prompts import TEMPLATES, Template, material

DOCS = Path(__file__).parents[2] / "docs" / "captioning.md"


@pytest.mark.parametrize(
    ("answer", "text", "had_thinking"),
    [
        ("a fox", "a fox", False),
        ("  A fox.\n\nIt runs\tover snow. ", "A fox. It runs over snow.", False),
        ('"A fox runs."', "A fox runs.", False),
        ('"Stop" says a fox, "now"', '"Stop" says a fox, "now"', False),
        ("<think>a dog?\nno</think>\n\na fox", "a fox", True),
        ("<thinking>a dog</thinking>a fox", "a fox", True),
        ("[THINK]a dog[/THINK]a fox", "a fox", True),
        ("so it is no dog</think>a fox", "a fox", True),
        ("a\x00 fox\u200b \ud800runs", "a fox runs", False),
        ("I see \u2018sorry\u2019 on a sign", "I see \u2018sorry\u2019 on a sign", False),
        ([{"type": "text", "text": "a fox"}, {"type": "other"}], "a fox", False),
    ],
)
def test_a_caption_is_one_line_without_thinking_and_quotation_marks(
    answer: object, text: str, had_thinking: bool
) -> None:
    caption = caption_of(completion(answer))
    assert (caption.text, caption.had_thinking) == (text, had_thinking)


@pytest.mark.parametrize(
    ("answer", "choice", "reason"),
    [
        ("", {}, "the answer is empty"),
        (None, {}, "the answer is empty"),
        ("<think>a dog?", {}, "the answer is empty"),
        ("<think>a dog?", {"finish_reason": "length"}, "did not come to an answer"),
        ("A fox runs over", {"finish_reason": "length"}, "cut off at the limit .* --max-tokens"),
        ("I'm sorry, but I can't help with that.", {}, "refuses: 'I'm sorry, but"),
        ("I\u2019m unable to describe people.", {}, "the model refuses"),
        ("Unfortunately, I cannot see images.", {}, "the model refuses"),
        ("a f", {"finish_reason": "content_filter"}, "the model refuses"),
    ],
)
def test_what_is_no_caption_is_said(answer: object, choice: dict[str, str], reason: str) -> None:
    with pytest.raises(NoCaptionError, match=reason):
        caption_of(completion(answer, **choice))


def test_the_interfaces_own_word_for_a_refusal_is_one() -> None:
    document = completion(None)
    document["choices"][0]["message"]["refusal"] = "not this"
    with pytest.raises(NoCaptionError, match="refuses: 'not this'"):
        caption_of(document)


@pytest.mark.parametrize(
    "document", [[], {}, {"choices": []}, {"choices": [{}]}, {"choices": 3}, completion(7), "text"]
)
def test_other_documents_are_broken_answers(document: object) -> None:
    with pytest.raises(BrokenAnswerError, match="no chat completion"):
        caption_of(document)


def test_a_request_says_what_is_shown_and_the_trigger_word_only_if_there_is_one() -> None:
    for template in TEMPLATES.values():
        without, with_word = template.request("8 frames", ""), template.request("8 frames", "ohwx")
        assert "You see 8 frames." in without and "{" not in with_word + without
        assert "ohwx" in with_word and with_word.startswith(without)
    own = Template(text="Say {trigger_word}: {material}")
    assert own.needs_trigger_word and own.request("an image", "ohwx") == "Say ohwx: an image"


def test_what_is_shown_is_named() -> None:
    assert material(8, 5.06) == "8 frames of a video of 5.1 seconds, in their order"
    assert material(1, 5.06) == "the middle frame of a video of 5.1 seconds"
    assert material(1, 0) == "an image"


def test_the_documentation_has_each_template_as_it_is() -> None:
    documented = " ".join(re.sub(r"^> ?", "", DOCS.read_text("utf-8"), flags=re.MULTILINE).split())
    for name, template in TEMPLATES.items():
        assert f"`{name}`" in documented
        assert template.text in documented and template.trigger in documented, name
