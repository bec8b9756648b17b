"""The OneTrainer API that the add-on depends on, and whether a checkout has it.

`contract.json` lists every function, class and attribute that the overlay patches, overrides, calls
or reads, as they were at the commit that the add-on was made for;
``scripts/take_onetrainer_contract.py`` records it from a checkout. Both read source files and
import nothing, so a checkout can be checked without its environment, and without torch.
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

_OF_PYTHON = ("_member_names_", "_member_map_", "_value2member_map_")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A name that a checkout does not have, or has with another signature."""

    file: str
    name: str
    """As the add-on calls it, such as ``TrainConfig.model_names``."""
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.name}: {self.text}"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check."""

    problems: tuple[Mismatch, ...]
    names: int
    """How many names were looked for."""
    files: int


@lru_cache(maxsize=1)
def contract() -> dict[str, Any]:
    """``commit``, ``date`` and, under ``modules``, the facts of each name."""
    text = files("onewan.onetrainer").joinpath("contract.json").read_text(encoding="utf-8")
    return json.loads(text)


def check(root: Path) -> CheckResult:
    """Look up every name of the contract in the checkout at `root`."""
    known: dict[str, dict[str, Any]] = contract()["modules"]
    found = [problem for name, facts in known.items() for problem in _missing(root, name, facts)]
    return CheckResult(tuple(found), sum(map(len, known.values())), len(known))


def record(root: Path, names: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Any]]:
    """The facts of `names`, by module, in the checkout at `root`, and of their classes; KeyError
    for a missing name. Names of enum tables that Python itself makes are left out."""
    recorded: dict[str, dict[str, Any]] = {}
    for module in sorted(names):
        have = _facts(root / _file(module))
        wanted = [n for n in names[module] if n.rpartition(".")[2] not in _OF_PYTHON]
        owners = {n.partition(".")[0] for n in wanted}
        recorded[module] = {n: have[source_name(n)] for n in sorted({*wanted, *owners})}
    return recorded


def native_members(names: Iterable[str]) -> list[str]:
    """Those `names` of members of `ModelType` that mean Wan 2.2, such as WAN22_T2V."""
    return [name for name in names if name.upper().replace("_", "").startswith("WAN22")]


def _missing(root: Path, module: str, facts: Mapping[str, Any]) -> Iterator[Mismatch]:
    file = _file(module)
    path = root / file
    try:
        have = _facts(path)
    except OSError:
        for name in facts:
            yield Mismatch(file, name, "the file is not there")
        return
    except SyntaxError as error:
        yield Mismatch(file, module, f"is not valid Python (line {error.lineno})")
        return
    for name, fact in facts.items():
        plain = source_name(name)
        if plain not in have:
            # Renaming is the most frequent cause, so the nearest name is a useful hint.
            near = difflib.get_close_matches(plain, have, n=1, cutoff=0.75)
            hint = f"; there is {near[0]}" if near else ""
            yield Mismatch(file, name, f"is not there{hint}")
        elif text := _differs(fact, have[plain]):
            yield Mismatch(file, name, text)


def _differs(fact: Mapping[str, Any], have: Mapping[str, Any]) -> str | None:
    """Why the add-on can't use the name as it is there; None if it can."""
    if fact["kind"] != have["kind"]:
        return f"is a {have['kind']} and was a {fact['kind']}"
    if fact["kind"] != "function":
        return None
    old, new = fact["parameters"], have["parameters"]
    names = [p["name"] for p in new]
    if gone := [p["name"] for p in old if p["name"] not in names]:
        return f"no longer takes {', '.join(gone)}; it takes {', '.join(names)}"
    # New parameters with a default do not break the add-on's calls or overrides.
    known = {p["name"] for p in old}
    needed = [p["name"] for p in new if p["kind"] == "plain" and not p["default"]]
    if more := [name for name in needed if name not in known]:
        return f"also requires {', '.join(more)}"
    order = [p["name"] for p in old if p["kind"] == "plain"]
    if order != [n for n in names if n in order]:
        return f"takes its arguments in another order: {', '.join(names)}"
    return None


def _file(module: str) -> str:
    return module.replace(".", "/") + ".py"


def source_name(name: str) -> str:
    """``View._View__make`` as the source has it, ``View.__make``."""
    owner, dot, member = name.partition(".")
    return f"{owner}{dot}{member.removeprefix(f'_{owner}')}" if f"_{owner}__" in member else name


def _facts(path: Path) -> dict[str, dict[str, Any]]:
    """All names that the source file `path` defines, and those within its classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return dict(_of_body(tree.body, ""))


def _of_body(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield prefix + node.name, {"kind": "function", "parameters": _parameters(node)}
                if prefix and node.name == "__init__":
                    yield from _set_on_self(node, prefix)
            case ast.ClassDef():
                bases = [ast.unparse(base) for base in node.bases]
                yield prefix + node.name, {"kind": "class", "bases": bases}
                yield from _of_body(node.body, f"{prefix}{node.name}.")
            case ast.Assign(targets=targets):
                for target in targets:
                    if isinstance(target, ast.Name):
                        yield prefix + target.id, {"kind": "value"}
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name, {"kind": "value"}
            # Such as names that depend on the platform, or on an optional package.
            case ast.If() | ast.Try():
                yield from _of_body(node.body, prefix)
            case _:
                pass


def _set_on_self(node: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    assignments = [inner for inner in ast.walk(node) if isinstance(inner, ast.Assign)]
    for target in (target for assignment in assignments for target in assignment.targets):
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            yield prefix + target.attr, {"kind": "value"}


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[dict[str, Any]]:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    first_default = len(plain) - len(arguments.defaults)
    found = [(a.arg, "plain", place >= first_default) for place, a in enumerate(plain)]
    if arguments.vararg:
        found.append((arguments.vararg.arg, "rest", True))
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [(a.arg, "named", default is not None) for a, default in named]
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, "more", True))
    return [dict(zip(("name", "kind", "default"), fact, strict=True)) for fact in found]
