"""Makes a caption of a server's answer: removes the thinking, and reports what is no caption.

A caption is one line, since the lines of a caption file are alternatives (`onewan.data.captions`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from onewan.documents import shortened

_THINKING = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_END_OF_THINKING = re.compile(
    r"\A.*(?:</(?:think|thinking|thought|reasoning)>|\[/THINK\])", re.DOTALL | re.IGNORECASE
)
"""The opening tag may be in the request, by a chat template, so that the answer lacks it."""
_REFUSAL = re.compile(
    r"(?:(?:i'm|i am) )?(?:very |so |really )?sorry\b|i apologi[sz]e\b|as an ai\b|"
    r"(?:unfortunately,? )?i (?:cannot|can't|can not|won't|will not|must decline)\b|"
    r"(?:unfortunately,? )?(?:i'm|i am) (?:unable|not able|not comfortable)\b",
    re.IGNORECASE,
)
"""How an answer begins that is no caption; captions are not in the first person."""
_QUOTES = {'"': '"', "\u201c": "\u201d", "'": "'", "`": "`"}


class NoCaptionError(Exception):
    """An answer that is no caption. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Caption:
    """The text of an answer."""

    text: str
    """One line, not empty."""
    had_thinking: bool
    """Whether thinking was taken off."""


class BrokenAnswerError(Exception):
    """An answer that is no chat completion at all."""


def caption_of(completion: Any) -> Caption:
    """The caption in a chat completion, which is the JSON document of a server's answer.

    Raises BrokenAnswerError, or NoCaptionError if it is empty, a refusal, or cut off.
    """
    try:
        choice = completion["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BrokenAnswerError("the answer is no chat completion") from None
    if refusal or reason == "content_filter":
        said = f": {_shown(refusal)}" if isinstance(refusal, str) else ""
        raise NoCaptionError(f"the model refuses{said}; write this caption, or ask another model")
    answer = _text(content)
    text = _END_OF_THINKING.sub("", _THINKING.sub("", answer))
    line = " ".join(text.split())
    # Without characters that are not seen, which a tokenizer would see.
    caption = _without_quotes("".join(letter for letter in line if letter.isprintable()))
    if reason == "length":
        what = "the answer is cut off" if caption else "the model did not come to an answer"
        raise NoCaptionError(f"{what} at the limit of its length; raise --max-tokens")
    if not caption:
        raise NoCaptionError("the answer is empty; run the command again, or ask another model")
    if _REFUSAL.match(caption.replace("\u2019", "'")):
        raise NoCaptionError(
            f"the model refuses: {_shown(caption)}; write this caption, or ask another model"
        )
    return Caption(caption, had_thinking=text != answer)


def _text(content: Any) -> str:
    """The text of a message: a text, parts of one, or nothing (next to thinking or calls)."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    if content is None or isinstance(content, str):
        return content or ""
    raise BrokenAnswerError("the answer is no chat completion")


def _without_quotes(text: str) -> str:
    """`text` without a pair of quotation marks around all of it."""
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        return text[1:-1].strip()
    return text


def _shown(text: str) -> str:
    return f"'{shortened(' '.join(text.split()), 100)}'"
