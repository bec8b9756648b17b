"""The add-on against the contract, which stands for the checkout where none is at hand."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.onetrainer_stub import write_checkout

import onewan.onetrainer
from onewan.cli import main
from onewan.onetrainer.contract import check, contract, record
from onewan.onetrainer.install import overlay
from onewan.onetrainer.patches import PATCHES
from onewan.onetrainer.patches.configs import added_fields

OVERLAY = Path(onewan.onetrainer.__file__).parent / "overlay"
SOURCES = sorted(OVERLAY.rglob("*.py"))
KNOWN = contract()["modules"]


def _ours(module: str) -> bool:
    return (OVERLAY / (module.replace(".", "/") + ".py")).is_file()


DERIVED = {
    ast.unparse(base)
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.ClassDef)
    for base in node.bases
}
"""The classes that those of the overlay are derived from."""


def _imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(OVERLAY).as_posix())
def test_all_that_the_overlay_imports_is_in_the_contract(path):
    unknown = []
    for module, name in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        if not module.startswith("modules.") or _ours(module) or f"{module}.{name}" in KNOWN:
            continue
        facts = KNOWN.get(module)
        if facts is None or (name is not None and name not in facts):
            unknown.append(f"{module}: {name}")
    assert not unknown


def _classes(module_facts: dict[str, dict]) -> dict[str, dict[str, list]]:
    """Methods with their parameters, by the class's name."""
    found: dict[str, dict[str, list]] = {}
    for facts in module_facts.values():
        for name, fact in facts.items():
            owner, dot, method = name.partition(".")
            if dot and fact["kind"] == "function":
                found.setdefault(owner, {})[method] = fact["parameters"]
    return found


@pytest.mark.parametrize("name", sorted(DERIVED))
def test_abstract_methods_of_the_classes_derived_from_are_recorded(name):
    modules = {**KNOWN, **contract()["packages"]}
    facts = [facts[name] for facts in modules.values() if name in facts]
    own = [path for path in SOURCES if f"class {name}(" in path.read_text(encoding="utf-8")]
    assert own or [fact for fact in facts if "abstract" in fact]


def test_every_setting_that_the_addon_reads_is_in_the_contract():
    """``config.NAME`` in the overlay and in onewan's modules for it."""
    added = {field["name"] for field in added_fields()["train"]} | {"transformer_2"}
    facts = KNOWN["modules.util.config.TrainConfig"]
    known = {name.partition(".")[2] for name in facts} | added
    ours = [*SOURCES, *OVERLAY.parent.glob("*.py")]
    read = {
        (path.name, node.attr)
        for path in ours
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("config", "self.config", "self._config")
    }
    assert len(read) > 60
    assert not {(file, name) for file, name in read if name not in known}


OVERRIDABLE = _classes(KNOWN)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(OVERLAY).as_posix())
def test_overridden_methods_take_what_onetrainer_gives_them(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]:
        bases = [ast.unparse(base) for base in node.bases]
        for method in [m for m in node.body if isinstance(m, ast.FunctionDef)]:
            # The first base that has it is the one through which OneTrainer calls it.
            held = [
                OVERRIDABLE[b][method.name] for b in bases if method.name in OVERRIDABLE.get(b, {})
            ]
            if not held or method.name == "__init__":
                continue
            given = [a.arg for a in (*method.args.args, *method.args.kwonlyargs)]
            wanted = [p["name"] for p in held[0]]
            assert given[: len(wanted)] == wanted, f"{node.name}.{method.name}"
            free = len(method.args.args) - len(method.args.defaults)
            assert all(place >= free for place in range(len(wanted), len(method.args.args))), (
                f"{node.name}.{method.name} wants more than it gets"
            )


def test_calls_of_factories_and_helpers_fit_the_signatures():
    """Every call by keyword of a function that the contract knows names its parameters."""
    functions = {
        name: fact["parameters"]
        for facts in KNOWN.values()
        for name, fact in facts.items()
        if fact["kind"] == "function" and "." not in name
    }
    checked = 0
    for path in SOURCES:
        imported = {n for m, n in _imports(ast.parse(path.read_text("utf-8"))) if m in KNOWN}
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            known = functions.get(node.func.id)
            if known is None or node.func.id not in imported:
                continue
            checked += 1
            names = {p["name"] for p in known}
            assert {k.arg for k in node.keywords if k.arg} <= names, ast.unparse(node)
            assert len(node.args) + len(node.keywords) <= len(known), ast.unparse(node)
    assert checked >= 9


@pytest.mark.parametrize("patch", PATCHES)
def test_every_name_that_a_patch_uses_is_in_the_contract(patch):
    made_by_python = ("_member_names_", "_member_map_", "_value2member_map_")
    for module, names in patch.names().items():
        assert {n for n in names if not n.endswith(made_by_python)} <= KNOWN[module].keys()


def test_a_real_checkout_has_everything_in_the_contract(real_checkout):
    assert not check(real_checkout).problems


def test_the_contract_is_what_its_commit_has(real_checkout, tmp_path):
    """Whatever commit is checked out: the recorded one is read from the history."""
    command = ["git", "-C", str(real_checkout), "archive", contract()["commit"], "modules"]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"the checkout's history does not have {contract()['commit']}")
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    assert record(tmp_path, KNOWN, DERIVED) == KNOWN


def test_a_checkout_with_the_same_names_passes(tmp_path):
    write_checkout(tmp_path)
    assert check(tmp_path).problems == ()


def test_every_missing_name_is_reported(tmp_path):
    """All of a module are renamed at once, and all are reported."""
    write_checkout(tmp_path)
    for module, facts in KNOWN.items():
        path = tmp_path / (module.replace(".", "/") + ".py")
        before = path.read_text("utf-8")
        names = [n for n, fact in facts.items() if "." in n or fact["kind"] != "class"]
        write_checkout(tmp_path, only=module, rename=names)
        assert [p.name for p in check(tmp_path).problems] == names
        path.write_text(before, "utf-8")


def test_changed_signatures_are_reported(tmp_path):
    write_checkout(tmp_path)
    path = tmp_path / "modules/util/checkpointing_util.py"
    for new, said in (
        ("def enable_checkpointing(model, config, part, compile): pass", "no longer takes lists"),
        (
            "def enable_checkpointing(model, config, part, compile, lists, more, "
            "supports_offloading=True): pass",
            "also requires more",
        ),
        (
            "def enable_checkpointing(config, model, part, compile, lists, "
            "supports_offloading=True): pass",
            "another order",
        ),
        ("enable_checkpointing = 3", "is a value and was a function"),
    ):
        path.write_text(new, "utf-8")
        (problem,) = check(tmp_path).problems
        assert said in str(problem) and "enable_checkpointing" in str(problem)
    path.write_text(
        "def enable_checkpointing(model, config, part, compile, lists, supports_offloading=True, "
        "new=1): pass",
        "utf-8",
    )
    assert not check(tmp_path).problems
    path.write_text("def (", "utf-8")
    assert "not valid Python" in str(check(tmp_path).problems[0])


def test_a_check_needs_no_torch(tmp_path):
    write_checkout(tmp_path)
    code = (
        "import sys; from onewan.cli import main; "
        f"code = main(['onetrainer', 'check', {str(tmp_path)!r}]); "
        "assert code == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_suggests_the_new_name_of_a_renamed_function(tmp_path, capsys):
    write_checkout(tmp_path)
    write_checkout(
        tmp_path, only="modules.util.config.TrainConfig", rename=["TrainConfig.model_names"]
    )
    assert main(["onetrainer", "check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "TrainConfig.model_names: is not there; there is TrainConfig.model_names_renamed" in said
    assert contract()["commit"][:8] in said


def test_presets_are_json_with_known_keys():
    for name, data in overlay().items():
        if name.startswith("resources/wan_presets/"):
            preset = json.loads(data)
            assert preset["model_type"] == "WAN_2_2", name
            assert name.rpartition("/")[2].startswith("#")
