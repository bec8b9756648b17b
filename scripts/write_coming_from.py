"""Writes the tables of docs/coming-from.md from `onewan.config.foreign_terms`.

Usage: python scripts/write_coming_from.py [--check]

With --check nothing is written, and the exit status is 1 if the page is not up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from onewan.config.foreign_terms import TABLE, TERMS, TRAINERS, Term

PAGE = Path(__file__).resolve().parents[1] / TABLE
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def tables() -> Iterator[str]:
    """The lines of one table per topic."""
    for topic, terms in TERMS.items():
        yield from ("", f"## {topic}", "")
        yield f"| {' | '.join([*TRAINERS.values(), 'onewan', 'remark'])} |"
        yield f"|{' --- |' * (len(TRAINERS) + 2)}"
        yield from map(_row, terms)
    yield ""


def _row(term: Term) -> str:
    cells = [", ".join(f"`{name}`" for name in term.names(trainer)) for trainer in TRAINERS]
    field = f"`{term.field.replace('.*', '[]')}`" if term.field else "(none)"
    return f"| {' | '.join([*cells, field, term.remark])} |"


def page(old: str) -> str:
    """The page `old` with its tables written anew."""
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *tables(), END + after])


def main() -> int:
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if "--check" in sys.argv[1:]:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
