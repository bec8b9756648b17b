"""Facts about the names that Python source files define, without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

Fact: TypeAlias = dict[str, Any]
"""``kind`` (class, function or value), and what a user of the name relies on: the ``bases`` and
``abstract`` methods of a class, the ``parameters`` and ``called`` (as a property, ...) of a
function, ``constant`` of a value that is one, ``saved`` for a field of a config class."""

_CALLED = ("staticmethod", "classmethod", "property", "cached_property", "contextmanager")


class Sources:
    """The source files below a folder, each parsed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module] = {}

    def module(self, name: str) -> Module:
        """FileNotFoundError if the folder has no such module, SyntaxError if it can't be parsed."""
        if name not in self._modules:
            self._modules[name] = Module(self, self.root / file_of(self.root, name))
        return self._modules[name]


class Module:
    """One source file."""

    def __init__(self, sources: Sources, path: Path) -> None:
        self._sources = sources
        self._tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))

    @cached_property
    def facts(self) -> dict[str, Fact]:
        """All names that the file defines, and those within its classes (``Class.name``)."""
        facts = dict(_of_body(self._tree.body, ""))
        for name, fact in facts.items():
            if fact["kind"] == "class":
                members = self.members(name)
                fact["abstract"] = sorted(member for member, open_ in members.items() if open_)
                fact["ancestors"] = sorted(self.ancestors(name))
        return facts

    def members(self, name: str) -> dict[str, bool]:
        """All methods and values of a class, its bases' too, and whether each is abstract."""
        found: dict[str, bool] = {}
        node = self._classes.get(name)
        if node is None:
            return found
        for base in reversed(node.bases):
            module, base_name = self._defined(ast.unparse(base))
            found |= {} if module is None else module.members(base_name)
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                found[inner.name] = any("abstract" in text for text in _decorators(inner))
            elif isinstance(inner, ast.Assign):
                found |= {t.id: False for t in inner.targets if isinstance(t, ast.Name)}
        return found

    def ancestors(self, name: str) -> set[str]:
        """The names of all base classes, direct or not."""
        found: set[str] = set()
        for base in self._classes[name].bases if name in self._classes else ():
            found.add(ast.unparse(base))
            module, base_name = self._defined(ast.unparse(base))
            found |= set() if module is None else module.ancestors(base_name)
        return found

    def _defined(self, name: str) -> tuple[Module | None, str]:
        """The module that defines the class which is called `name` here; None if it is unknown."""
        if name in self._classes:
            return self, name
        source, original = self._imported.get(name, ("", ""))
        try:
            return (self._sources.module(source) if source else None), original
        except (OSError, SyntaxError):
            return None, original

    @cached_property
    def _classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self._tree.body if isinstance(node, ast.ClassDef)}

    @cached_property
    def _imported(self) -> dict[str, tuple[str, str]]:
        return {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(self._tree)
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
            for alias in node.names
        }


def file_of(root: Path, module: str) -> str:
    """The path of a module below `root`, with forward slashes."""
    stem = module.replace(".", "/")
    return f"{stem}/__init__.py" if (root / stem / "__init__.py").is_file() else f"{stem}.py"


def _of_body(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, Fact]]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield prefix + node.name, _function(node)
                if prefix and node.name == "__init__":
                    yield from _set_on_self(node, prefix)
            case ast.ClassDef():
                bases = [ast.unparse(base) for base in node.bases]
                yield prefix + node.name, {"kind": "class", "bases": bases}
                saved = _saved_fields(node)
                for name, fact in _of_body(node.body, f"{prefix}{node.name}."):
                    mark = fact["kind"] == "value" and name.rpartition(".")[2] in saved
                    yield name, {**fact, "saved": True} if mark else fact
            case ast.Assign(targets=targets, value=value):
                constant = {"constant": value.value} if isinstance(value, ast.Constant) else {}
                for target in targets:
                    if isinstance(target, ast.Name):
                        yield prefix + target.id, {"kind": "value", **constant}
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name, {"kind": "value"}
            # Such as names that depend on the platform, or on an optional package.
            case ast.If():
                yield from _of_body([*node.orelse, *node.body], prefix)
            case ast.Try():
                handlers = [inner for handler in node.handlers for inner in handler.body]
                yield from _of_body([*handlers, *node.orelse, *node.body], prefix)
            case _:
                pass


def _set_on_self(node: ast.AST, prefix: str) -> Iterator[tuple[str, Fact]]:
    for inner in ast.walk(node):
        targets = inner.targets if isinstance(inner, ast.Assign) else []
        targets = [inner.target] if isinstance(inner, ast.AnnAssign) else targets
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                yield prefix + target.attr, {"kind": "value"}


def _saved_fields(node: ast.ClassDef) -> set[str]:
    """The fields of a config class: OneTrainer appends a tuple (name, default, type, nullable) for
    each to a list."""
    found: set[str] = set()
    for inner in ast.walk(node):
        match inner:
            case ast.Call(
                func=ast.Attribute(attr="append"),
                args=[ast.Tuple(elts=[ast.Constant(value=str(name)), _, _, _])],
            ):
                found.add(name)
            case _:
                pass
    return found


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list]


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Fact:
    called = [text for text in _decorators(node) if text in _CALLED]
    called += ["async"] if isinstance(node, ast.AsyncFunctionDef) else []
    fact = {"kind": "function", "parameters": _parameters(node)}
    return {**fact, "called": called} if called else fact


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[Fact]:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    first_default = len(plain) - len(arguments.defaults)
    first_plain = len(arguments.posonlyargs)
    found = [
        (a.arg, "plain" if place >= first_plain else "positional", place >= first_default)
        for place, a in enumerate(plain)
    ]
    if arguments.vararg:
        found.append((arguments.vararg.arg, "rest", True))
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [(a.arg, "named", default is not None) for a, default in named]
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, "more", True))
    return [dict(zip(("name", "kind", "default"), fact, strict=True)) for fact in found]
