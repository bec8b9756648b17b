"""Which placeholders of embeddings prompts can tell apart."""

from __future__ import annotations

from collections.abc import Sequence


def placeholder_error(placeholder: str, others: Sequence[str]) -> str | None:
    """An error message if `placeholder` overlaps with one of `others`, else None."""
    if placeholder in others:
        return f"is a duplicate, got {placeholder!r}; change it"
    for other in others:
        if other in placeholder or placeholder in other:
            return (
                "must not contain another placeholder or be a part of one, got "
                f"{placeholder!r} beside {other!r}; change one, such as to <fox>"
            )
    return None
