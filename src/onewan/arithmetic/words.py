"""Words in captions, such as trigger words: whether a text has one, and another in its place."""

from __future__ import annotations

import re


def contains_word(text: str, word: str) -> bool:
    """Whether `word` is in `text` as a word, in capital or small letters."""
    return bool(_pattern(word).search(text))


def with_word(text: str, word: str, other: str) -> str:
    """`text` with `other` wherever it has `word` as a word, in capital or small letters."""
    # By a function, since `other` could look like a reference to a group.
    return _pattern(word).sub(lambda _: other, text)


def _pattern(word: str) -> re.Pattern[str]:
    # A word may begin or end with another character, such as "<fox>".
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return re.compile(f"{before}{re.escape(word)}{after}", re.IGNORECASE)
