"""A stand-in for a checkout: sources with the names and signatures of the contract, and no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onewan.onetrainer.contract import contract, source_name


def write_checkout(root: Path, *, only: str | None = None, rename: str | None = None) -> None:
    """Write the sources; `only` that of one module, in which `rename` has another name."""
    for module, facts in contract()["modules"].items():
        if only in (None, module):
            path = root / (module.replace(".", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_source(facts, rename), encoding="utf-8")


def _source(facts: dict[str, dict[str, Any]], rename: str | None) -> str:
    members: dict[str, list[str]] = {}
    top: list[str] = []
    for name, fact in facts.items():
        plain = source_name(name)
        if name == rename:
            plain += "_renamed"
        owner, dot, member = plain.partition(".")
        if dot:
            members.setdefault(owner, []).append(_line(member, fact, "    "))
        elif fact["kind"] == "class":
            members.setdefault(owner, [])
        else:
            top.append(_line(plain, fact, ""))
    for owner, lines in members.items():
        top.append(f"class {owner}:\n" + ("\n".join(lines) or "    pass"))
    return "\n".join(top) + "\n"


def _line(name: str, fact: dict[str, Any], indent: str) -> str:
    if fact["kind"] != "function":
        return f"{indent}{name} = None"
    words, starred = [], False
    for parameter in fact["parameters"]:
        if parameter["kind"] == "rest":
            words.append(f"*{parameter['name']}")
            starred = True
        elif parameter["kind"] == "more":
            words.append(f"**{parameter['name']}")
        else:
            if parameter["kind"] == "named" and not starred:
                words.append("*")
                starred = True
            words.append(parameter["name"] + ("=None" if parameter["default"] else ""))
    return f"{indent}def {name}({', '.join(words)}): pass"
