"""A stand-in for a checkout: sources with the names and signatures of the contract, and no code."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from onewan.onetrainer.contract import contract, source_name

_HEAD = "from abc import abstractmethod\nfrom contextlib import contextmanager\n"


def write_checkout(root: Path, *, only: str | None = None, rename: Collection[str] = ()) -> None:
    """Write the sources; `only` those of one module, in which the names `rename` are others."""
    _write(root, contract()["modules"], only, rename)


def write_packages(folder: Path) -> None:
    """Write mgds and diffusers, as they are in an environment's folder of packages."""
    _write(folder, contract()["packages"], None, ())


def _write(root: Path, modules: dict[str, Any], only: str | None, rename: Collection[str]) -> None:
    for module, facts in modules.items():
        if only in (None, module):
            path = root / (module.replace(".", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            homes = {name: m for m, f in modules.items() for name in f if m != module}
            path.write_text(_source(facts, rename, homes), encoding="utf-8")


def _source(
    facts: dict[str, dict[str, Any]], rename: Collection[str], homes: dict[str, str]
) -> str:
    """`homes` has the module of each name that another file defines."""
    members: dict[str, list[str]] = {}
    top: list[str] = []
    for name, fact in facts.items():
        plain = source_name(name)
        if name in rename:
            plain += "_renamed"
        owner, dot, member = plain.partition(".")
        if dot:
            open_ = member in facts.get(owner, {}).get("abstract", ())
            members.setdefault(owner, []).append(_member(member, fact, "    ", open_))
        elif fact["kind"] == "class":
            own = members.setdefault(owner, [])
            own += [
                f"    @abstractmethod\n    def {member}(self): pass"
                for member in fact.get("abstract", ())
                if f"{owner}.{member}" not in facts
            ]
        else:
            top.append(_member(plain, fact, "", False))
    bases = {owner: facts.get(owner, {}).get("bases", []) for owner in members}
    plain_bases = {o: [b.rpartition(".")[2] for b in found] for o, found in bases.items()}
    used = dict.fromkeys(base for found in plain_bases.values() for base in found)
    top += [
        f"from {homes[base]} import {base}" if base in homes else f"class {base}: pass"
        for base in used
        if base not in members
    ]
    for owner, lines in members.items():
        top.append(f"class {owner}({', '.join(plain_bases[owner])}):")
        top.append("\n".join(lines) or "    pass")
    return _HEAD + "\n".join(top) + "\n"


def _member(name: str, fact: dict[str, Any], indent: str, is_abstract: bool) -> str:
    if fact["kind"] != "function":
        line = f"{indent}{name} = {fact.get('constant')!r}"
        if fact.get("saved"):
            line += f"\n{indent}def _field_{name}(data): data.append(({name!r}, None, str, True))"
        return line
    words, kinds = [], [p["kind"] for p in fact["parameters"]]
    for place, parameter in enumerate(fact["parameters"]):
        if parameter["kind"] == "rest":
            words.append(f"*{parameter['name']}")
        elif parameter["kind"] == "more":
            words.append(f"**{parameter['name']}")
        else:
            if parameter["kind"] == "named" and not {"rest", "named"} & set(kinds[:place]):
                words.append("*")
            words.append(parameter["name"] + ("=None" if parameter["default"] else ""))
            if parameter["kind"] == "positional" and kinds[place + 1 :][:1] != ["positional"]:
                words.append("/")
    decorators = [f"@{called}" for called in fact.get("called", ()) if called != "async"]
    decorators += ["@abstractmethod"] if is_abstract else []
    head = "".join(f"{indent}{decorator}\n" for decorator in decorators)
    return f"{head}{indent}def {name}({', '.join(words)}): pass"
