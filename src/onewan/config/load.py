"""Reads a run file with overrides into a `ResolvedRun`, and writes one back as YAML.

Hides the file syntax, how overrides are applied, and what relative paths are relative to. All
problems are reported at once in one `ConfigError` with a line per field: first all invalid fields;
once every field is valid, all broken rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from types import NoneType
from typing import Any, get_args

from onewan import documents
from onewan.config.changes import (
    changeable_name,
    fixed_reason,
    in_force,
    joined,
    without_changes_of,
)
from onewan.config.clips import is_url
from onewan.config.fields import field_at
from onewan.config.foreign_terms import TABLE
from onewan.config.messages import Problems, foreign_file, validated
from onewan.config.resolve import resolve
from onewan.config.rules import rule_violations
from onewan.config.schema import COMPONENTS, SCHEMA_VERSION, ChangeSection, ResolvedRun
from onewan.config.section import as_list, is_section, members_of, sections_of, shorthand_of
from onewan.config.unused import unused_fields
from onewan.documents import KeyPath, Node, dotted, format_value, get_path, is_list, is_mapping
from onewan.errors import ConfigError
from onewan.files import read_input

RESOLVED_NAME = "resolved.yaml"
"""File in a run folder with the text of `dump_run`; a folder that has it is a run folder."""
RESOLVED_LIMITS = documents.Limits(bytes=1024 * 1024, values=50_000)
_INDEX = re.compile("[0-9]{1,9}")
"""Of an item of a list, in an override."""
_MAX_NAME = 200
"""Characters of the name of a field, in an override."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPED = (
    "contains a line break, a tab or another control character; in double quotes a backslash "
    "starts an escape: use single quotes, or forward slashes"
)
_TOML = (
    "is a TOML file, as musubi-tuner, sd-scripts and diffusion-pipe read them, and a run file is "
    f"YAML or JSON; `onewan init` writes one, and {TABLE} lists onewan's name for each setting"
)
SAMPLE_SIZES = ("width", "height", "frames", "steps")
"""Fields of the sample section that a requested sample (`with_one_sample`) may have of its own."""
_MODEL_SOURCES = [(name,) for name in ("path", *COMPONENTS)]


def load_run(path: Path, overrides: Sequence[str] = ()) -> ResolvedRun:
    """The resolved config of a run file, or of a run folder, with `overrides` applied.

    An override is ``path.to.field=value`` with the value in YAML. Relative paths in the file are
    relative to its folder, those in an override to the current folder. Raises `ConfigError`.
    """
    path = Path(path)
    source = str(path)
    file = path / RESOLVED_NAME if os.path.isdir(path) else path
    if documents.text_problem(os.path.abspath(file.parent)):
        raise ConfigError(source, ["is in a folder whose name is not UTF-8; rename the folder"])
    problems = Problems()
    data: Node = _absolute_paths(_read(file, source), (), file.parent, problems)
    if data.get("model") is None:
        data["model"] = {}  # so that its required fields are named
    with suppress(ValueError):  # `output` is no section, which is reported below
        if file is not path:
            here = Path(os.path.abspath(path))  # the folder may have been moved or renamed
            data = _with_value(data, ("output", "dir"), str(here.parent))
            data = _with_value(data, ("output", "name"), here.name)
            if any(o.partition("=")[0].strip() == "train.epochs" for o in overrides):
                data = _without_steps(data)
        for override in overrides:
            data = _overridden(data, override, problems)
    return _resolved(data, source, file, problems, overrides)


def run_of_text(text: str, file: Path) -> ResolvedRun:
    """The resolved config of the YAML `text`, as `load_run` would read it from `file`.

    The file need not exist; only its place and its name count. Raises `ConfigError`.
    """
    source, problems = str(file), Problems()
    read = _read_text(text, source, documents.LIMITS, is_json=False)
    data: Node = _absolute_paths(read, (), file.parent, problems)
    if data.get("model") is None:
        data["model"] = {}  # as in `load_run`
    return _resolved(data, source, file, problems)


def run_of_settings(
    settings: dict[str, Any], source: str, overrides: Sequence[str] = ()
) -> ResolvedRun:
    """The resolved config of `settings` that are in no file, as a run file would have them.

    Relative paths are relative to the current folder, and the run is called "run". `source` is what
    a `ConfigError` names.
    """
    problems = Problems()
    data: Node = _absolute_paths(settings, (), Path.cwd(), problems)
    with suppress(ValueError):  # as in `load_run`
        for override in overrides:
            data = _overridden(data, override, problems)
    return _resolved(data, source, Path("run.yaml"), problems, overrides)


def _resolved(
    data: Node, source: str, file: Path, problems: Problems, overrides: Sequence[str] = ()
) -> ResolvedRun:
    """The config of the `data` of `file`, without changes of the fields that `overrides` give;
    `ConfigError` with all `problems`, and those of `data`."""
    with suppress(ValueError):  # as above
        if get_path(data, ("output", "name")) is None:
            data = _with_value(data, ("output", "name"), file.stem)
    config = validated(data, problems)
    if config is not None and not problems:
        for field, text in rule_violations(config):
            problems.report(field, text)
    if config is None or problems:
        raise ConfigError(source, problems.lines())
    changes = without_changes_of(joined(config.changes, ()), overridden_names(overrides))
    plain = config.model_copy(update={"changes": ()})
    resolved = resolve(plain, Path(os.path.abspath(file.parent)))
    for index, change in enumerate(changes):
        try:
            resolved = with_change(resolved, change.step, change.settings)
        except ConfigError as error:  # noqa: PERF203  (a few)
            prefix = f"changes.{index}.settings."
            raise ConfigError(source, [f"{prefix}{line}" for line in error.problems]) from None
    return resolved


def overridden_names(overrides: Sequence[str]) -> list[str]:
    """The dotted names of the fields that the overrides give."""
    return [override.partition("=")[0].strip() for override in overrides]


def with_change(config: ResolvedRun, step: int, settings: Mapping[str, Any]) -> ResolvedRun:
    """`config` with the values `settings`, by dotted name, in force once `step` steps are done.

    `ConfigError` if a field can't change while a run trains, or if a rule of the run file refuses
    the values.
    """
    problems = Problems()
    for name in settings:
        if reason := fixed_reason(config, name):
            problems.add(name, reason)
    data = file_data(in_force(config, step))
    if not problems:
        for name, value in settings.items():
            data = _with_value(data, tuple(name.split(".")), value)
    changed = _resolved(data, str(config.output.dir / config.output.name), Path(), problems)
    values = changed.model_dump(mode="json")
    complete = {name: get_path(values, tuple(name.split("."))) for name in settings}
    change = ChangeSection(step=step, settings=complete)
    return config.model_copy(update={"changes": (*config.changes, change)})


def settings_given(config: ResolvedRun, step: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What `with_change` takes to give the run the `overrides`, such as "optimizer.lr=5e-5", once
    `step` steps are done; relative paths are relative to the current folder. Fields that have the
    value already are left out. `ConfigError` as of `with_change`."""
    present, problems, names = in_force(config, step), Problems(), dict[str, None]()
    data: Node = file_data(present)
    for override in overrides:
        data = _overridden(data, override, problems)
        name = override.partition("=")[0].strip()
        field = changeable_name(name) or name
        if (reason := fixed_reason(config, field)) and "=" in override:
            problems.add(name, reason)
        names[field] = None
    changed = _resolved(data, str(config.output.dir / config.output.name), Path(), problems)
    old, new = present.model_dump(mode="json"), changed.model_dump(mode="json")
    paths = {name: tuple(name.split(".")) for name in names}
    return {
        name: get_path(new, path)
        for name, path in paths.items()
        if get_path(new, path) != get_path(old, path)
    }


def with_one_sample(config: ResolvedRun, wanted: Mapping[str, Any]) -> ResolvedRun:
    """The settings `config`, which have no changes, with one sample video alone: `wanted` has the
    fields of an item of `sample.prompts`, and may have `width`, `height`, `frames` and `steps`.

    `ConfigError`, which names the fields as in `wanted`, for what the run can't sample.
    """
    source = str(config.output.dir / config.output.name)
    if not config.sample.prompts:
        why = "the run began without sample.prompts, so that nothing for sample videos is loaded"
        raise ConfigError(source, [f"prompt: can't be sampled, since {why}"])
    problems, data = Problems(), file_data(config)
    own = {name: value for name, value in wanted.items() if name not in SAMPLE_SIZES}
    data = _with_value(data, ("sample", "prompts"), [own])
    for name in SAMPLE_SIZES:
        if wanted.get(name) is not None:
            inner = ("distilled", name) if name == "steps" and config.sample.distilled else (name,)
            data = _with_value(data, ("sample", *inner), wanted[name])
    try:
        return _resolved(data, source, Path(), problems)
    except ConfigError as error:
        inner = re.compile(r"^sample\.(?:prompts\.0\.|distilled\.)?")
        raise ConfigError(source, [inner.sub("", line) for line in error.problems]) from None


def dump_run(config: ResolvedRun) -> str:
    """The YAML text from which `load_run` reads an equal config."""
    return documents.to_yaml(file_data(config))


def file_data(config: ResolvedRun) -> dict[str, Any]:
    """What a run file that gives all settings has."""
    data = config.model_dump(mode="json")
    for *section, name in (path for path, _ in unused_fields(config)):
        get_path(data, tuple(section)).pop(name, None)
    return data


def changed_fields(old: ResolvedRun, new: ResolvedRun) -> list[tuple[str, object, object]]:
    """(dotted name, old value, new value) of each leaf that differs; a missing item is None."""
    return documents.differences(old.model_dump(), new.model_dump())


def _read(file: Path, source: str) -> dict[str, Any]:
    """The top mapping of a YAML or JSON file."""
    # A resolved file gives all fields, and therefore has more values than what it was made from.
    limits = RESOLVED_LIMITS if file.name == RESOLVED_NAME else documents.LIMITS
    if file.suffix.lower() == ".toml" and file.is_file():
        raise ConfigError(source, [_TOML])
    try:
        text = documents.decode_text(read_input(file, limits.bytes))
    except (OSError, ValueError) as error:
        problem = str(error)
        if isinstance(error, FileNotFoundError):
            problem = "there is no such file; `onewan init FILE` writes one to start from"
            if source != str(file):
                problem = f"is a folder without {RESOLVED_NAME}; give a run file or a run's folder"
        elif isinstance(error, OSError):
            problem = f"can't be read: {error.strerror}"
        raise ConfigError(source, [problem]) from None
    return _read_text(text, source, limits, is_json=file.suffix.lower() == ".json")


def _read_text(
    text: str, source: str, limits: documents.Limits, *, is_json: bool
) -> dict[str, Any]:
    """The top mapping of a text in YAML or JSON."""
    try:
        parse = documents.parse_json if is_json else documents.parse_yaml
        data = parse(text, limits)
    except ValueError as error:
        raise ConfigError(source, [str(error)]) from None
    if data is None:
        raise ConfigError(source, ["is empty; `onewan init FILE` writes one to start from"])
    if not is_mapping(data):
        problem = f"must have fields such as `model:` at the top level, got {format_value(data)}"
        raise ConfigError(source, [problem])
    if problems := foreign_file(data):
        raise ConfigError(source, problems)
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        # Reported alone, since most other errors would only follow from it.
        problem = (
            f"schema_version: is {version}, but this onewan knows versions up to {SCHEMA_VERSION}; "
            "update onewan, or write a new file with `onewan init FILE`"
        )
        raise ConfigError(source, [problem])
    return data


def _without_steps(data: Node) -> Node:
    """The data of a resolved file without the steps that its epochs were turned into."""
    for path in (("train",), ("per_expert", "high"), ("per_expert", "low")):
        fields = get_path(data, path)
        if is_mapping(fields):
            data = _with_value(data, path, {k: v for k, v in fields.items() if k != "steps"})
    return data


def _overridden(data: Node, override: str, problems: Problems) -> Node:
    """`data` with one override applied; if that fails, `problems` gets a line."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        what = "is not path.to.field=value; write, for example, train.steps=2000"
        problems.add(f"override {format_value(override)}", what)
        return data
    if len(name) > _MAX_NAME:
        problems.add(f"override {format_value(override)}", "names no field; correct the name")
        return data
    path = tuple(int(part) if _INDEX.fullmatch(part) else part for part in parts)
    try:
        value = _absolute_paths(_override_value(path, text), path, Path.cwd(), problems)
        return _with_value(data, path, value)
    except ValueError as error:
        problems.add(dotted(path), str(error))
        return data


def _override_value(path: KeyPath, text: str) -> Node:
    """The parsed value of an override; a text field takes unquoted text literally.

    As YAML, a prompt would lose everything after " #" and become a mapping at ": ".
    """
    text = text.strip()
    field = field_at(path)
    kind = field.annotation if field is not None else None
    literal = field is not None and set(get_args(kind) or (kind,)) <= {str, Path, NoneType}
    if literal and text not in ("", "null") and not text.startswith(("'", '"')):
        if problem := documents.text_problem(text):
            raise ValueError(f"{problem}, got {format_value(text)}")
        return text
    try:
        return documents.parse_yaml(text)
    except ValueError as error:
        shown = format_value(text)
        raise ValueError(f"can't read {shown} as YAML ({error}); quote the value") from None


def _with_value(node: Node, path: KeyPath, value: Node, at: KeyPath = ()) -> Node:
    """A copy of `node`, which lies at `at`, with `value` at `path` within it; mappings and lists
    that are missing on the way are made.

    A copy, since YAML's aliases let one mapping lie in several places. ValueError where `path`
    leads through something that has no such part.
    """
    if not path:
        return value
    part, rest, inner = path[0], path[1:], (*at, path[0])
    field = field_at(at)
    if node is None and field is not None and is_section(field):
        node = {}
    if isinstance(part, int):
        items: Node = [] if node is None else node
        if not is_list(items):
            raise ValueError(f"has no item {part}, got {format_value(node)}; name a field")
        if part > len(items):
            raise ValueError(f"the list has {len(items)} items; the next one is {len(items)}")
        item = items[part] if part < len(items) else None
        return [*items[:part], _with_value(item, rest, value, inner), *items[part + 1 :]]
    fields: Node = {} if node is None else node
    if union := members_of(field):
        fields = union.keyed.complete(fields)  # a name that stands for a section
    if not is_mapping(fields):
        raise ValueError(f"has no field '{part}', got {format_value(node)}; set that instead")
    return {**fields, part: _with_value(fields.get(part), rest, value, inner)}


def _absolute_paths(node: Node, path: KeyPath, base: Path, problems: Problems) -> Node:
    """A copy of `node`, the value at `path`, with all paths in it made absolute from `base`, and
    texts that stand for sections replaced by those sections.

    Keys become strings: YAML also allows numbers, which are unknown fields like any other.
    """
    field = field_at(path)
    kind = field.annotation if field is not None else None
    if isinstance(node, str) and (section := shorthand_of(field)):
        is_item = isinstance(path[-1], int)
        node = section.spelled_out(node) if is_item else as_list(node)
    if is_mapping(node) and len(path) == 3 and path[0] == "changes":  # values by dotted name
        return {
            str(name): _absolute_paths(value, tuple(str(name).split(".")), base, problems)
            for name, value in node.items()
        }
    if is_mapping(node) and (not path or sections_of(kind)):
        return {
            str(key): _absolute_paths(value, (*path, str(key)), base, problems)
            for key, value in node.items()
        }
    if is_list(node) and not (path and isinstance(path[-1], int)):
        return [
            _absolute_paths(item, (*path, index), base, problems) for index, item in enumerate(node)
        ]
    if not isinstance(node, str):
        return node
    is_source = path[:1] == ("model",) and path[1:] in _MODEL_SOURCES
    if not (is_source or Path in (kind, *get_args(kind))):
        return node
    if _CONTROL.search(node):
        problems.add(dotted(path), f"{_ESCAPED}, got {format_value(node)}")
        return node
    if is_url(node) and str in get_args(kind):
        return node
    # What does not look like a path names a hub repository, unless there is such a file or folder.
    is_local = node.startswith((".", "/", "~")) or PureWindowsPath(node).drive
    if is_source and not is_local and not os.path.exists(base / node):
        return node
    return os.path.abspath(base / os.path.expanduser(node))
