"""Each message that docs/troubleshooting.md quotes is one that the program has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
LEAST = 8
"""Characters of a message that are compared; shorter pieces stand between values."""


def entries() -> list[tuple[str, list[str]]]:
    """The symptoms of the page, each with the messages that it quotes."""
    parts = re.split(r"^### (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found: list[tuple[str, list[str]]] = []
    for symptom, text in zip(parts[::2], parts[1::2], strict=True):
        quoted = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        found.append((symptom, [line for block in quoted for line in block.splitlines()]))
    return found


@cache
def texts_of_the_program() -> str:
    """All texts in the sources, in which `{}` stands for a value; docstrings are left out."""
    return "\n".join(
        text
        for file in sorted((ROOT / "src" / "onewan").rglob("*.py"))
        for text in texts_in(ast.parse(file.read_text(encoding="utf-8")))
    )


def texts_in(tree: ast.AST) -> list[str]:
    found: list[str] = []
    inner: set[int] = set()  # what is part of another text, or documentation
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inner.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
            constant = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            found.append("".join(map(str, constant)))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner
        ):
            found.append(node.value)
    return found


@pytest.mark.parametrize(("symptom", "messages"), entries(), ids=lambda value: str(value)[:40])
def test_the_messages_of_a_symptom_are_those_of_the_program(
    symptom: str, messages: list[str]
) -> None:
    texts = texts_of_the_program()
    assert messages, f"{symptom}: quotes no message"
    for message in messages:
        pieces = [piece for piece in message.split("...") if len(piece) >= LEAST]
        assert pieces, message
        missing = [piece for piece in pieces if piece.strip(" ():;") not in texts]
        assert not missing, message
