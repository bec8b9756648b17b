"""What the add-on depends on in OneTrainer and in two of its packages, and whether it is there.

`contract.json` lists every function, class and attribute of OneTrainer, mgds and diffusers that the
add-on patches, overrides, calls or reads, as they were at the commit that it was made for;
``scripts/take_onetrainer_contract.py`` records it. Both read source files and import nothing, so a
checkout can be checked without its environment, and without torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from onewan.onetrainer.source_facts import Fact, Sources, file_of

PACKAGES = ("mgds", "diffusers")
"""Those of OneTrainer's packages that the add-on's own files use, or replace parts of."""

MODEL_TYPES = "modules.util.enum.ModelType"

_OF_PYTHON = ("_member_names_", "_member_map_", "_value2member_map_")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A name that a checkout does not have, or has in another form."""

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
    unseen: tuple[str, ...] = ()
    """Packages that were not looked at, since the checkout has no environment with them."""


@lru_cache(maxsize=1)
def contract() -> dict[str, Any]:
    """``commit``, ``date`` and, under ``modules`` and ``packages``, the facts of each name by
    module."""
    text = files("onewan.onetrainer").joinpath("contract.json").read_text(encoding="utf-8")
    return json.loads(text)


def check(root: Path) -> CheckResult:
    """Look up every name of the contract in the checkout at `root`, and in the packages of the
    environment inside it."""
    known = contract()
    modules: dict[str, dict[str, Fact]] = dict(known["modules"])
    sources = Sources(root)
    found = list(_native(sources))
    found += [p for name, facts in modules.items() for p in _missing(sources, name, facts)]
    unseen: list[str] = []
    for package in PACKAGES:
        folder = package_folder(root, package)
        facts = {m: f for m, f in known["packages"].items() if m.partition(".")[0] == package}
        if folder is None:
            unseen.append(package)
            continue
        inside = Sources(folder.parent)
        found += [p for name, wanted in facts.items() for p in _missing(inside, name, wanted)]
        modules |= facts
    names = sum(map(len, modules.values()))
    return CheckResult(tuple(found), names, len(modules), tuple(unseen))


def package_folder(root: Path, package: str) -> Path | None:
    """The folder of a package in the environment inside a checkout, None if there is none."""
    for name in ("venv", ".venv"):
        places = (
            *root.glob(f"{name}/lib*/python*/site-packages"),
            root / name / "Lib" / "site-packages",
            # Where pip puts what OneTrainer's requirements take from a repository.
            *(root / name / "src" / package / inside for inside in ("src", "")),
        )
        for place in places:
            if (place / package).is_dir():
                return place / package
    return None


def record(
    root: Path, names: Mapping[str, Iterable[str]], derived: Collection[str]
) -> dict[str, dict[str, Fact]]:
    """The facts of `names`, by module, in the sources at `root`, and of their classes; KeyError
    for a missing name. Names of enum tables that Python itself makes are left out. Abstract methods
    are recorded of the classes that the add-on's own are `derived` from."""
    recorded: dict[str, dict[str, Fact]] = {}
    sources = Sources(root)
    for module in sorted(names):
        have = sources.module(module).facts
        wanted = [n for n in names[module] if n.rpartition(".")[2] not in _OF_PYTHON]
        owners = {n.partition(".")[0] for n in wanted}
        recorded[module] = {}
        for name in sorted({*wanted, *owners}):
            unused = {"ancestors"} if name in derived else {"ancestors", "abstract"}
            fact = have[source_name(name)]
            recorded[module][name] = {k: v for k, v in fact.items() if k not in unused}
    return recorded


def native_members(names: Iterable[str]) -> list[str]:
    """Those `names` of members of `ModelType` that mean Wan 2.2, such as WAN22_T2V."""
    return [name for name in names if name.upper().replace("_", "").startswith("WAN22")]


def _native(sources: Sources) -> Iterator[Mismatch]:
    try:
        have = sources.module(MODEL_TYPES).facts
    except (OSError, SyntaxError):
        return  # reported below
    members = [n.removeprefix("ModelType.") for n in have if n.startswith("ModelType.")]
    for name in native_members(members):
        text = "OneTrainer has Wan 2.2 itself; remove the add-on with `onewan onetrainer uninstall`"
        yield Mismatch(file_of(sources.root, MODEL_TYPES), f"ModelType.{name}", text)


def _missing(sources: Sources, module: str, facts: Mapping[str, Fact]) -> Iterator[Mismatch]:
    file = file_of(sources.root, module)
    try:
        have = sources.module(module).facts
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


def _differs(fact: Fact, have: Fact) -> str | None:
    """Why the add-on can't use the name as it is there; None if it can."""
    if fact["kind"] != have["kind"]:
        return f"is a {have['kind']} and was a {fact['kind']}"
    return {"class": _class_differs, "function": _function_differs, "value": _value_differs}[
        fact["kind"]
    ](fact, have)


def _class_differs(fact: Fact, have: Fact) -> str | None:
    kept = {base.rpartition(".")[2] for base in have["ancestors"]}
    if lost := [base for base in fact["bases"] if base.rpartition(".")[2] not in kept]:
        return f"is no longer derived from {', '.join(lost)}"
    known = fact.get("abstract", have["abstract"])
    if more := [name for name in have["abstract"] if name not in known]:
        return f"also has the abstract method {', '.join(more)}, which the add-on does not have"
    return None


def _value_differs(fact: Fact, have: Fact) -> str | None:
    if "constant" in fact and fact["constant"] != have.get("constant"):
        return f"is {have.get('constant')!r} and was {fact['constant']!r}"
    if fact.get("saved") and not have.get("saved"):
        return "is no longer a field of the config"
    return None


def _function_differs(fact: Fact, have: Fact) -> str | None:
    if fact.get("called") != have.get("called"):
        now, then = (" ".join(f.get("called", ["plain function"])) for f in (have, fact))
        return f"is a {now} and was a {then}"
    old = {p["name"]: p for p in fact["parameters"] if p["kind"] not in ("rest", "more")}
    new = {p["name"]: p for p in have["parameters"] if p["kind"] not in ("rest", "more")}
    if gone := [name for name in old if name not in new]:
        return f"no longer takes {', '.join(gone)}; it takes {', '.join(new)}"
    # New parameters with a default do not break the add-on's calls or overrides.
    if more := [n for n, p in new.items() if not p["default"] and (n not in old)]:
        return f"also requires {', '.join(more)}"
    if more := [n for n, p in new.items() if not p["default"] and old.get(n, p)["default"]]:
        return f"requires {', '.join(more)}, which could be left out"
    if moved := [n for n, p in old.items() if p["kind"] == "plain" != new[n]["kind"]]:
        return f"takes {', '.join(moved)} by {_KINDS[new[moved[0]]['kind']]} only"
    order = [n for n, p in old.items() if p["kind"] != "named"]
    if order != [n for n in new if n in order]:
        return f"takes its arguments in another order: {', '.join(new)}"
    # One that is put between the others changes what a call without names means.
    if order != [n for n, p in new.items() if p["kind"] != "named"][: len(order)]:
        return f"takes its arguments at other places: {', '.join(new)}"
    open_ = {p["kind"] for p in have["parameters"]}
    for kind, text in (("rest", "any number of arguments"), ("more", "any arguments by name")):
        if kind in {p["kind"] for p in fact["parameters"]} and kind not in open_:
            return f"no longer takes {text}"
    return None


_KINDS = {"named": "name", "positional": "position"}


def source_name(name: str) -> str:
    """``View._View__make`` as the source has it, ``View.__make``."""
    owner, dot, member = name.partition(".")
    return f"{owner}{dot}{member.removeprefix(f'_{owner}')}" if f"_{owner}__" in member else name
