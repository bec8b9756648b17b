"""Replaces the generated tables of a document, which are between comments that name them."""

from __future__ import annotations

from pathlib import Path


def replace_between(document: Path, name: str, text: str) -> None:
    """Put `text` between the comments ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    ValueError if the document does not have each of them once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = document.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{document}: needs one line {begin} and one line {end}")
    head, _, rest = content.partition(begin)
    _, _, tail = rest.partition(end)
    document.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
