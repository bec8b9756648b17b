"""Limits on the source that CONTRIBUTING.md names: sizes, import cycles, documented modules.

Import cycles are counted over all imports, those under ``TYPE_CHECKING`` and inside functions too:
such a cycle works, but it shows that two modules can't be understood apart from each other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import onewan

ROOT = Path(onewan.__file__).parent
OVERLAY = ROOT / "onetrainer" / "overlay"  # files for another program, in its layout
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join(["onewan", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): (
        ast.parse(path.read_text(encoding="utf-8"))
    )
    for path in FILES
    if OVERLAY not in path.parents
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Modules of the package that `tree` imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports are not used"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                name = submodule if submodule in MODULES else node.module
                if name in MODULES:
                    yield name


IMPORTS = {name: set(imported_modules(tree)) - {name} for name, tree in MODULES.items()}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one cycle in `graph`, or an empty list."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for other in sorted(graph[node]):
            if cycle := visit(other, [*path, node]):
                return cycle
        finished.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_modules_have_no_import_cycle() -> None:
    assert find_cycle(IMPORTS) == []


def test_packages_do_not_import_each_other() -> None:
    def package(module: str) -> str:
        return module.split(".")[1] if "." in module else "onewan"

    graph: dict[str, set[str]] = {package(module): set() for module in MODULES}
    for module, imports in IMPORTS.items():
        graph[package(module)] |= {package(other) for other in imports} - {package(module)}
    del graph["onewan"]  # the top package names its public classes, which load on first use
    for others in graph.values():
        others.discard("onewan")
    assert find_cycle(graph) == []


def test_each_module_has_a_docstring() -> None:
    assert [name for name, tree in MODULES.items() if not ast.get_docstring(tree)] == []


ASKING = {
    *(f"torch.{name}" for name in ("accelerator", "cuda", "mps", "xpu", "get_device_module")),
    *("torch.version.hip", "torch.backends.cuda", "torch.backends.mps"),
}


def asked_of_devices(tree: ast.Module) -> Iterator[str]:
    """Where `tree` asks PyTorch about devices, or decides by the type of one."""
    last = {name.rpartition(".")[2] for name in ASKING}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in last:
            if (name := ast.unparse(node)) in ASKING:
                yield name
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute):
            constants = (ast.Constant, ast.Set, ast.Tuple)
            if node.left.attr == "type" and isinstance(node.comparators[0], constants):
                yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg == "non_blocking":
            yield "non_blocking"


def test_only_one_module_asks_about_devices() -> None:
    # The page never imports torch: what has a type there is an event or a part of a text.
    modules = {
        n: tree
        for n, tree in MODULES.items()
        if not n.startswith(("onewan.web.", "onewan.serving."))
    }
    asking = {name: [*asked_of_devices(tree)] for name, tree in modules.items()}
    assert len(asking.pop("onewan.devices")) > 10
    assert {name: found for name, found in asking.items() if found} == {}


def test_find_cycle_finds_a_cycle_and_accepts_a_diamond() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
