"""Reads a run file with overrides into a `ResolvedRun`, and writes one back as YAML.

Hides the file syntax, how overrides are applied, and what relative paths are relative to. All
problems are reported at once in one `ConfigError` with a line per field: first all invalid fields;
once every field is valid, all broken rules.
"""

# ruamel.yaml is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from onewan.config.messages import report, validated
from onewan.config.resolve import resolve
from onewan.config.rules import rule_violations
from onewan.config.schema import COMPONENTS, SCHEMA_VERSION, ResolvedRun, RunConfig
from onewan.config.schema_paths import (
    KeyPath,
    Node,
    alternatives,
    dotted,
    field_at,
    fields_at,
    format_value,
    get_path,
    holds_path,
    is_list,
    is_mapping,
    is_tuple,
    members_at,
    sections_of,
    set_path,
    value_if_null,
)
from onewan.config.section import Section
from onewan.config.unused import unused_fields
from onewan.errors import ConfigError

if TYPE_CHECKING:
    from ruamel.yaml.error import StreamMark

RESOLVED_NAME = "resolved.yaml"
"""File in a run folder with the text of `dump_run`; a folder that has it is a run folder."""


def load_run(path: Path, overrides: Sequence[str] = ()) -> ResolvedRun:
    """The resolved config of a run file, or of a run folder, with `overrides` applied.

    An override is ``path.to.field=value`` with the value in YAML. Relative paths in the file are
    relative to its folder, those in an override to the current folder. Raises `ConfigError`.
    """
    path = Path(path)
    source = str(path)
    file = path / RESOLVED_NAME if path.is_dir() else path
    data: Node = _read(file, source)
    for name in RunConfig.model_fields:
        if data.get(name) is None and (empty := value_if_null((name,))) is not None:
            data = {**data, name: empty}  # such as `sample:` whose fields are all commented out
    data = _expand_short_forms(data, (), file.parent)
    if file is not path and is_mapping(data["output"]):
        here = Path(os.path.abspath(path))  # the folder may have been moved or renamed
        data["output"] = {**data["output"], "dir": str(here.parent), "name": here.name}

    problems: dict[str, str] = {}
    for override in overrides:
        data = _overridden(data, override, problems)
    if is_mapping(data["output"]) and data["output"].get("name") is None:
        data = set_path(data, ("output", "name"), file.stem)

    config = validated(data, problems)
    if config is not None and not problems:
        for field, text in rule_violations(config):
            report(problems, field, text)
    if config is None or problems:
        raise ConfigError(source, [f"{field}: {text}" for field, text in problems.items()])
    return resolve(config, Path(os.path.abspath(file.parent)))


def dump_run(config: ResolvedRun) -> str:
    """The YAML text from which `load_run` reads an equal config."""
    data = config.model_dump(mode="json")
    for *section, name in (path for path, _ in unused_fields(config)):
        get_path(data, tuple(section)).pop(name, None)
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.allow_unicode = True
    yaml.width = 1_000_000  # a prompt stays on one line
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()


def changed_fields(old: ResolvedRun, new: ResolvedRun) -> list[tuple[str, object, object]]:
    """(dotted name, old value, new value) of each leaf that differs; a missing item is None."""
    before, after = dict(_leaf_values(old)), dict(_leaf_values(new))
    names = dict.fromkeys([*before, *after])
    return [
        (name, before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _leaf_values(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, Section):
        for name, field in type(node).model_fields.items():
            value = getattr(node, name)
            if value != () or not sections_of(field.annotation):  # a list of no sections: no leaf
                yield from _leaf_values(value, f"{prefix}.{name}" if prefix else name)
    elif is_tuple(node) and any(isinstance(item, Section) for item in node):
        for index, item in enumerate(node):
            yield from _leaf_values(item, f"{prefix}.{index}")
    else:
        yield prefix, node


# ------------------------------------------------------------------------------------------ reading


def _read(file: Path, source: str) -> dict[str, Any]:
    """The top mapping of a YAML or JSON file."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        data = _parse_json(text) if file.suffix.lower() == ".json" else _parse_yaml(text)
    except FileNotFoundError:
        problem = "there is no such file; `onewan init` writes one to start from"
        if source != str(file):
            problem = f"is a folder without {RESOLVED_NAME}; give a run file or a run's folder"
        raise ConfigError(source, [problem]) from None
    except OSError as error:
        raise ConfigError(source, [f"can't be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise ConfigError(source, [problem]) from None
    except ValueError as error:
        raise ConfigError(source, [str(error)]) from None
    if data is None:
        raise ConfigError(source, ["is empty; `onewan init` writes one to start from"])
    if not is_mapping(data):
        problem = f"must have fields such as `model:` at the top level, got {format_value(data)}"
        raise ConfigError(source, [problem])
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        # Reported alone, since most other errors would only follow from it.
        problem = (
            f"schema_version: is {version}, but this onewan knows versions up to {SCHEMA_VERSION}; "
            "update onewan, or write a new file with `onewan init`"
        )
        raise ConfigError(source, [problem])
    return data


def _parse_yaml(text: str) -> Node:
    """Parses YAML 1.2; ValueError with line and column, in one line."""
    try:
        # pure=True, since the C parser follows YAML 1.1, where `off` is false and 1e-4 is a string.
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = cast("StreamMark | None", error.problem_mark)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = str(error.problem)
        if what.startswith("but "):
            what = f"{error.context}, {what}"
        elif "'\\t'" in what:
            what = "a tab; indent with spaces"
        elif twice := re.match(r'found duplicate key "(.*)" with value', what, re.DOTALL):
            what = f"'{twice[1]}' is given twice; keep one"
        raise ValueError(f"{where}{what}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"line {line}: {text[error.position]!r} is not allowed; remove it"
        ) from None
    except ValueError as error:  # a date such as 2026-13-01
        raise ValueError(f"holds a value that can't be read: {error}; put it in quotes") from None


def _parse_json(text: str) -> Node:
    """Parses JSON; ValueError with line and column, in one line."""

    def mapping(pairs: list[tuple[str, Node]]) -> dict[str, Node]:
        for position, (key, _) in enumerate(pairs):
            if any(key == other for other, _ in pairs[:position]):
                raise ValueError(f"'{key}' is given twice; keep one")
        return dict(pairs)

    if not text.strip():
        return None
    try:
        return json.loads(text, object_pairs_hook=mapping)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None


# ---------------------------------------------------------------------------------------- overrides


def _overridden(data: Node, override: str, problems: dict[str, str]) -> Node:
    """`data` with one override applied; if that fails, `problems` gets a line."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        problems[f"override {override!r}"] = (
            "is not path.to.field=value; write, for example, train.steps=2000"
        )
        return data
    path = tuple(int(part) if part.isdecimal() else part for part in parts)
    try:
        value = _expand_short_forms(_override_value(path, text), path, Path.cwd())
        return set_path(data, path, value)
    except ValueError as error:
        problems[dotted(path)] = str(error)
        return data


def _override_value(path: KeyPath, text: str) -> Node:
    """The parsed value of an override; a text field takes unquoted text literally.

    As YAML, a prompt would lose everything after " #" and become a mapping at ": ".
    """
    text = text.strip()
    field = field_at(path)
    plain = field is not None and alternatives(field.annotation) <= {str, Path, NoneType}
    if plain and text not in ("", "null") and not text.startswith(("'", '"')):
        return text
    try:
        return _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"can't read {text!r} as YAML ({error}); quote the value") from None


# -------------------------------------------------------------------------------------- short forms


def _expand_short_forms(node: Node, path: KeyPath, base: Path) -> Node:
    """A copy of `node`, the value at `path`, with paths made absolute from `base`, null sections
    replaced by empty ones, and texts that stand for a section replaced by it.

    Keys become strings: YAML also allows numbers, which are unknown fields like any other.
    """
    if node is None:
        return value_if_null(path)
    union = members_at(path)
    if union is not None and union.keyed.text:
        node = union.keyed.complete(node)
    if is_mapping(node) and fields_at(path):
        return {
            str(k): _expand_short_forms(value, (*path, str(k)), base) for k, value in node.items()
        }
    if is_list(node) and not (path and isinstance(path[-1], int)):
        return [_expand_short_forms(item, (*path, index), base) for index, item in enumerate(node)]
    if not isinstance(node, str):
        return node
    if holds_path(path):
        return _joined(base, node)
    if len(path) == 2 and path[0] == "model" and path[1] in ("path", *COMPONENTS):
        here = node.startswith((".", "/", "~")) or PureWindowsPath(node).drive
        # Anything else names a hub repository, unless such a file or folder exists.
        return _joined(base, node) if here or os.path.exists(base / node) else node
    return node


def _joined(base: Path, path: str | Path) -> str:
    return os.path.abspath(base / os.path.expanduser(path))


# ------------------------------------------------------------------------------------------ writing


class _Representer(SafeRepresenter):
    """Writes scalars that readers of YAML 1.1 and of 1.2 understand alike."""

    def text(self, value: str) -> Any:
        # Unquoted, YAML 1.1 reads these as booleans. Non-ASCII text is quoted, since the emitter
        # writes line separators such as U+0085 unescaped, which are read back as spaces.
        boolean = value.lower() in ("y", "n", "yes", "no", "on", "off")
        style = '"' if boolean or not (value.isascii() and value.isprintable()) else None
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def number(self, value: float) -> Any:
        text = repr(value)
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")  # YAML 1.1 reads 1e-08 as a string
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(str, _Representer.text)
_Representer.add_representer(float, _Representer.number)
