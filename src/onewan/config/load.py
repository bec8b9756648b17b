"""Run file and overrides -> `RunConfig`: the one way in, and the one way back to text.

Hides the syntax of the file, how overrides find their place, what relative paths are relative to,
pydantic's wording, the rules that need facts about the variant, and what a null stands for. All
that is wrong is reported at once, as one `ConfigError` with a line per field. Never looks at clips
or weights, never imports torch, never writes a file.
"""

# ruamel.yaml is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import difflib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    TypeAlias,
    TypeGuard,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from onewan.config.migrate import migrate
from onewan.config.schema import RunConfig, Section
from onewan.errors import ConfigError
from onewan.variants import NEGATIVE_PROMPT, VARIANTS, Variant, VariantName

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails
    from ruamel.yaml.error import StreamMark

RESOLVED_NAME = "resolved.yaml"
"""What `dump_run` gave for a run, in the run's folder; a folder that has it is a run's folder."""

Node: TypeAlias = Any
"""What the parser yields: a mapping, a list or a single value."""
Place: TypeAlias = tuple[str | int, ...]
"""Where something is in a run file: names of fields and indices into lists."""
Problem: TypeAlias = tuple[str, str]
"""Dotted place, and what is wrong there."""

_S = TypeVar("_S", bound=Section)


def _is_mapping(node: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(node, dict)


def _is_list(node: object) -> TypeGuard[list[Any]]:
    return isinstance(node, list)


def _is_tuple(node: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(node, tuple)


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved config of a run file, or of a run folder, with `overrides` applied.

    An override is ``path.to.field=value`` with the value in YAML. Relative paths in the file are
    relative to its folder, those in an override to the current one. Raises `ConfigError`.
    """
    path = Path(path)
    source = str(path)
    file = path / RESOLVED_NAME if path.is_dir() else path
    data: Node = migrate(_read(file, source), source=source)
    for name in RunConfig.model_fields:
        if _fields((name,)) and data.get(name) is None:
            data = {**data, name: {}}  # `sample:` with every line under it commented out
    data = _absolute(data, (), file.parent)
    if file is not path and _is_mapping(data["output"]):
        here = Path(os.path.abspath(path))  # the folder may have been moved or renamed
        data["output"] = {**data["output"], "dir": str(here.parent), "name": here.name}

    problems: dict[str, str] = {}
    for override in overrides:
        data = _overridden(data, override, problems)
    if _is_mapping(data["output"]) and data["output"].get("name") is None:
        data = _put(data, ("output", "name"), file.stem)

    config = _validated(data, problems)
    if config is not None:
        guessed = problems.keys() & {"model", "model.variant"}
        variant = None if guessed else VARIANTS[config.model.variant]
        for field, text in _broken_rules(config, variant):
            _report(problems, field, text)
    if config is None or problems:
        raise ConfigError(source, [f"{field}: {text}" for field, text in problems.items()])
    return _resolved(config, Path(os.path.abspath(file.parent)))


def dump_run(config: RunConfig) -> str:
    """The YAML text from which `load_run` reads an equal config, if `config` is a resolved one."""
    data = config.model_dump(mode="json")
    if VARIANTS[config.model.variant].condition != "first_frame_clean":
        del data["train"]["first_frame_probability"]  # may not be given for another variant
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.allow_unicode = True
    yaml.width = 1_000_000  # a prompt stays on one line
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()


def changed_fields(old: RunConfig, new: RunConfig) -> list[tuple[str, object, object]]:
    """(dotted name, old value, new value) of each leaf that differs; a missing item is None."""
    before, after = dict(_leaf_values(old)), dict(_leaf_values(new))
    names = dict.fromkeys([*before, *after])
    return [
        (name, before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    ]


def leaves() -> list[str]:
    """Dotted names of all fields that hold a value; `*` is any item of a list."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = _sections(field.annotation)
            if not inner:
                yield prefix + name
            item = "*." if get_origin(field.annotation) is tuple else ""
            for member in inner:
                yield from walk(member, f"{prefix}{name}.{item}")

    return list(dict.fromkeys(walk(RunConfig, "")))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, from which editors complete and forms are made."""
    schema = RunConfig.model_json_schema()
    # Two liberties of reading that pydantic can't know of: a prompt may be a mere text, and a
    # section may be left empty.
    prompts = schema["$defs"]["SampleSection"]["properties"]["prompts"]
    prompts["items"] = {"anyOf": [prompts["items"], {"type": "string"}]}
    for name, section in schema["properties"].items():
        if "$ref" in section and name not in schema["required"]:
            section["anyOf"] = [{"$ref": section.pop("$ref")}, {"type": "null"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# -------------------------------------------------------------------------------------- reading


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
    if not _is_mapping(data):
        problem = f"must hold fields such as `model:` at its top, got {_show(data)}"
        raise ConfigError(source, [problem])
    return data


def _parse_yaml(text: str) -> Node:
    """`text` read by YAML 1.2 rules; ValueError with line and column, in one line."""
    try:
        # pure: the C parser follows YAML 1.1, to which `off` is false and 1e-4 a text.
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
    """`text` read as JSON; ValueError with line and column, in one line."""

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


def _overridden(data: Node, override: str, problems: dict[str, str]) -> Node:
    """`data` with one override applied; one that can't be is added to `problems`."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        problems[f"override {override!r}"] = (
            "is not path.to.field=value; write, for example, train.steps=2000"
        )
        return data
    place = tuple(int(part) if part.isdecimal() else part for part in parts)
    try:
        value = _absolute(_override_value(place, text), place, Path.cwd())
        return _put(data, place, value)
    except ValueError as error:
        problems[_dotted(place)] = str(error)
        return data


def _override_value(place: Place, text: str) -> Node:
    """The value of an override. A field of text takes the text as it stands, unless it is quoted.

    Read as YAML, a prompt would lose what follows a " #" and become a mapping at a ": ".
    """
    text = text.strip()
    field = _field(place)
    plain = field is not None and _alternatives(field.annotation) <= {str, Path, NoneType}
    if plain and text not in ("", "null") and not text.startswith(("'", '"')):
        return text
    try:
        return _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"can't read {text!r} as YAML ({error}); quote the value") from None


def _put(node: Node, place: Place, value: Node) -> Node:
    """A copy of `node` with `value` at `place`; mappings and lists missing on the way are made.

    A copy, since YAML's aliases let one mapping lie in several places. ValueError where `place`
    leads through something that has no such part.
    """
    if not place:
        return value
    part, rest = place[0], place[1:]
    if isinstance(part, int):
        items: Node = [] if node is None else node
        if not _is_list(items):
            raise ValueError(f"has no item {part}, since here is {_show(node)}; name a field")
        if part > len(items):
            raise ValueError(f"the list has {len(items)} items; the next one is {len(items)}")
        item = items[part] if part < len(items) else None
        return [*items[:part], _put(item, rest, value), *items[part + 1 :]]
    fields: Node = {} if node is None else node
    if not _is_mapping(fields):
        raise ValueError(f"has no field '{part}', since here is {_show(node)}; set that instead")
    return {**fields, part: _put(fields.get(part), rest, value)}


def _absolute(node: Node, place: Place, base: Path) -> Node:
    """A copy of `node`, which lies at `place`, with its paths made absolute from `base`.

    Keys become text: YAML has numbers there too, and they are as unknown as any other wrong name.
    """
    if _is_mapping(node) and _fields(place):
        return {str(k): _absolute(value, (*place, str(k)), base) for k, value in node.items()}
    if _is_list(node) and not (place and isinstance(place[-1], int)):
        return [_absolute(item, (*place, index), base) for index, item in enumerate(node)]
    if not isinstance(node, str):
        return node
    field = _field(place)
    if field is not None and Path in _alternatives(field.annotation):
        return _joined(base, node)
    if place == ("model", "path"):
        here = node.startswith((".", "/", "~")) or PureWindowsPath(node).drive
        # Anything else is the name of a hub repository, unless something lies there.
        return _joined(base, node) if here or os.path.exists(base / node) else node
    return node


def _joined(base: Path, path: str | Path) -> str:
    return os.path.abspath(base / os.path.expanduser(path))


# -------------------------------------------------------------------- walking through a schema


def _alternatives(annotation: Any) -> set[Any]:
    """The members of a union, or the one type that it is."""
    if get_origin(annotation) in (Union, UnionType):
        return {a for member in get_args(annotation) for a in _alternatives(member)}
    return {annotation}


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold: itself, the members of a union, the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _fields(place: Place) -> dict[str, FieldInfo]:
    """The fields known at `place`, of all members where it is a union; none if it is a value."""
    here: list[type[Section]] = [RunConfig]
    for part in place:
        if isinstance(part, str):  # an index leads from a list to the same sections
            found = [section.model_fields[part] for section in here if part in section.model_fields]
            here = [section for field in found for section in _sections(field.annotation)]
    return {name: field for section in here for name, field in section.model_fields.items()}


def _field(place: Place) -> FieldInfo | None:
    return _fields(place[:-1]).get(place[-1]) if place and isinstance(place[-1], str) else None


def _leaf_values(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, Section):
        for name in type(node).model_fields:
            yield from _leaf_values(getattr(node, name), f"{prefix}.{name}" if prefix else name)
    elif _is_tuple(node) and any(isinstance(item, Section) for item in node):
        for index, item in enumerate(node):
            yield from _leaf_values(item, f"{prefix}.{index}")
    else:
        yield prefix, node


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


# --------------------------------------------------------------- problems that pydantic can see

_RULES: Mapping[str, str] = {
    "missing": "is required",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "model_type": "must be a section with fields",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must be a list of at least {min_length}",
    "too_long": "must be a list of at most {max_length}",
    "string_pattern_mismatch": "must have the form {pattern}",
    "value_error": "{error}",
}
_STAND_INS: Mapping[str, str] = {"model.variant": "t2v-a14b"}


def _validated(data: Node, problems: dict[str, str], rounds: int = 8) -> RunConfig | None:
    """The config, with what pydantic finds added to `problems`.

    What is wrong is reported, then taken out, and the rest is tried again, so that there is a
    config on which the other rules can be checked: one slip does not hide the next. None if even
    that leads nowhere.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        found = _worded(error.errors(include_url=False), data)
    for place, text in found.items():
        _report(problems, _dotted(place), text)
    for place in found:
        data = _mended(data, place)
    return _validated(data, problems, rounds - 1) if rounds > 1 else None


def _report(problems: dict[str, str], field: str, text: str) -> None:
    """Adds a problem, unless it speaks of a field that is wrong already and so follows from it."""

    def related(one: str, other: str) -> bool:
        return one == other or one.startswith(other + ".") or other.startswith(one + ".")

    named = [field, *re.findall(r"[a-z_]+(?:\.\w+)+", text)]
    if not any(related(name, reported) for name in named for reported in problems):
        problems[field] = text


def _mended(data: Node, place: Place) -> Node:
    """A copy of `data` in which nothing is wrong at `place` any more, whatever it then says."""
    last, field = place[-1], _field(place)
    if isinstance(last, int) and not _fields(place):
        return _mended(data, place[:-1])  # a list of values goes as a whole
    if isinstance(last, int) or (field is not None and field.is_required()):
        stand_in: Node = {} if _fields(place) else _STAND_INS.get(_dotted(place), "stand-in")
        return _put(data, place, stand_in)
    around: Node = data
    for part in place[:-1]:
        around = around[part]
    return _put(data, place[:-1], {k: value for k, value in around.items() if k != last})


def _worded(errors: Sequence[ErrorDetails], data: Node) -> dict[Place, str]:
    """pydantic's errors in plain words, those of one union in one sentence."""
    grouped: dict[Place, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_place(error, data), []).append(error)
    worded: dict[Place, str] = {}
    for place, group in grouped.items():
        if any(other[: len(place)] == place for other in grouped if other != place):
            continue  # a union's other members, where one of its members got further
        if not place:  # a validator of the whole file, whose message starts with the field
            field, _, text = group[0]["msg"].removeprefix("Value error, ").partition(": ")
            worded[tuple(field.split("."))] = text
        elif group[0]["type"] == "extra_forbidden":
            worded[place] = _unknown(place)
        else:
            worded[place] = _wrong_value(place, group)
    return worded


_NAMED_LAST = ("missing", "extra_forbidden")
"""Kinds of error whose location ends in a name that need not be in the data."""


def _place(error: ErrorDetails, data: Node) -> Place:
    """Where in `data` an error lies: its location without the names of a union's members."""
    place: list[str | int] = []
    for part in error["loc"]:
        if _has(data, part):
            place.append(part)
            data = data[part]
    last = error["loc"][-1] if error["loc"] else None
    # A value missing from a pair, such as a resolution, is the fault of the pair.
    if error["type"] in _NAMED_LAST and isinstance(last, str) and place[-1:] != [last]:
        place.append(last)
    return tuple(place)


def _has(node: Node, part: str | int) -> bool:
    if _is_list(node):
        return isinstance(part, int) and part < len(node)
    return _is_mapping(node) and part in node


def _unknown(place: Place) -> str:
    *section, name = place
    known = list(_fields(tuple(section)))
    if near := difflib.get_close_matches(str(name), known, n=1):
        return f"unknown field; did you mean '{near[0]}'?"
    elsewhere = [leaf for leaf in leaves() if leaf.rpartition(".")[2] == name]
    if elsewhere:
        return f"unknown field; did you mean {' or '.join(elsewhere)}?"
    return f"unknown field; known here: {', '.join(known)}"


def _wrong_value(place: Place, group: Sequence[ErrorDetails]) -> str:
    """Rule, value and remedy for what `group` says of the value at `place`."""
    kinds = [error["type"] for error in group]
    value, field = group[0]["input"], _field(place)
    if kinds == ["missing"] and field is not None and field.is_required():
        choices = [repr(choice) for choice in _literals(field.annotation)]
        about = " ".join((field.description or "a value").split()).split(". ")[0].rstrip(".")
        return f"is required, got nothing; add it: {' or '.join(choices) or about}"
    rules = [_RULES.get(e["type"], e["msg"]).format(**e.get("ctx", {})) for e in group]
    if kinds == ["missing"]:
        rules = ["has too few values"]
    if place == ("output", "name") and kinds == ["string_pattern_mismatch"]:
        rules = ['must be a plain name for a folder, without / \\ : * ? " < > | or a dot in front']
    more = [f"or {rule.removeprefix('must be ')}" for rule in dict.fromkeys(rules[1:])]
    said = "" if kinds == ["value_error"] else f", got {_show(value)}"
    return f"{', '.join([rules[0], *more])}{said}; {_remedy(field, kinds, value)}"


def _remedy(field: FieldInfo | None, kinds: Sequence[str], value: object) -> str:
    """What to do about a wrong value."""
    if "literal_error" in kinds and field is not None:
        choices = [c for c in _literals(field.annotation) if isinstance(c, str)]
        if near := difflib.get_close_matches(str(value), choices, n=1):
            return f"did you mean '{near[0]}'?"
    if kinds == ["string_type"] and not isinstance(value, (dict, list, NoneType)):
        return "put it in quotes"
    if field is None or field.is_required():
        return "change it"
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, Section):
        return "change it, or leave it out"
    return f"change it, or leave it out for {_show(default)}"


def _literals(annotation: Any) -> list[object]:
    """The values that a field's literal types allow, in lists and unions too."""
    return [
        value
        for part in get_args(annotation)
        for value in ([part] if not get_args(part) else _literals(part))
    ]


def _show(value: object) -> str:
    """`value` as a run file has it, cut to a length that fits a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if _is_tuple(value):
        value = list(value)
    text = repr(str(value)) if isinstance(value, (str, Path)) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --------------------------------------------------------------- rules that pydantic can't see


def _broken_rules(config: RunConfig, variant: Variant | None) -> Iterator[Problem]:
    """Every rule that spans sections or needs facts; those that need facts only with `variant`."""
    for name, value in _leaf_values(config):
        values = value if _is_tuple(value) else (value,)
        if any(isinstance(v, float) and not math.isfinite(v) for v in values):
            yield name, f"must be a finite number, got {_show(value)}; change it"
    yield from _list_rules(config)
    video, train, sample = config.video_data, config.train, config.sample
    if any(
        low > high for low, high in zip(video.min_resolution, video.max_resolution, strict=True)
    ):
        yield (
            "video_data.min_resolution",
            f"must not be above video_data.max_resolution {_show(video.max_resolution)}, got "
            f"{_show(video.min_resolution)}; lower it, or raise the other",
        )
    if train.warmup_steps >= train.steps:
        yield (
            "train.warmup_steps",
            f"must be less than train.steps ({train.steps}), got {train.warmup_steps}; lower it",
        )
    if sample.frames is not None and sample.frames % 4 != 1:
        below = (sample.frames - 1) // 4 * 4 + 1
        yield (
            "sample.frames",
            f"must be 4n+1, got {sample.frames}; the nearest are {below} and {below + 4}",
        )
    for index, prompt in enumerate(sample.prompts):
        if prompt.image is not None and not os.path.isfile(prompt.image):
            yield f"sample.prompts.{index}.image", f"there is no file {prompt.image}; correct it"
    if variant is not None:
        yield from _expert_rules(config, variant)
        yield from _condition_rules(config, variant)
        yield from _size_rules(config, variant)


def _list_rules(config: RunConfig) -> Iterator[Problem]:
    layers = config.wan_config.transformer_layers_to_train
    lists: dict[str, tuple[object, ...]] = {
        "wan_config.transformer_layers_to_train": layers or (),
        "method.modules": config.method.modules,
        "output.formats": config.output.formats,
    }
    for name, values in lists.items():
        twice = sorted({str(v) for v in values if values.count(v) > 1})
        if twice:
            yield name, f"has {', '.join(twice)} twice, got {_show(values)}; give each once"
    if layers == ():
        yield (
            "wan_config.transformer_layers_to_train",
            "must name at least one block, got []; leave it out to train all",
        )


def _expert_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    choice, share, guidance = config.model.experts, config.train.high_share, config.sample.guidance
    experts = len(variant.experts)
    if experts == 1 and choice != "both":
        yield (
            "model.experts",
            f"{variant.name} has one expert, got {choice!r}; leave it out",
        )
    if not isinstance(share, str) and (experts == 1 or choice != "both"):
        alone = "has one expert" if experts == 1 else f"trains only its {choice} expert"
        yield (
            "train.high_share",
            f"divides the steps between two experts, but {variant.name} {alone}, got {share}; "
            "leave it out",
        )
    if guidance is not None and len(guidance) != experts:
        form = "[high, low]" if experts == 2 else "[scale]"
        yield (
            "sample.guidance",
            f"must have one number for each expert of {variant.name}, {form}, got "
            f"{_show(guidance)}; give {experts}, or leave it out for the official "
            f"{_show([e.guidance_scale for e in variant.experts])}",
        )


def _condition_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    """What the variant's condition allows: images beside prompts, clean first frames."""
    for index, prompt in enumerate(config.sample.prompts):
        field = f"sample.prompts.{index}.image"
        if variant.condition == "first_frame_channels" and prompt.image is None:
            yield field, f"{variant.name} starts from an image, got nothing; give a picture's file"
        if variant.condition == "text" and prompt.image is not None:
            yield (
                field,
                f"{variant.name} takes no image, got {_show(prompt.image)}; leave it out, or use "
                "i2v-a14b or ti2v-5b",
            )
    given = "first_frame_probability" in config.train.model_fields_set
    if given and variant.condition != "first_frame_clean":
        yield (
            "train.first_frame_probability",
            f"is for ti2v-5b alone and does nothing for {variant.name}, got "
            f"{config.train.first_frame_probability:g}; leave it out",
        )


def _size_rules(config: RunConfig, variant: Variant) -> Iterator[Problem]:
    wan, video, sample = config.wan_config, config.video_data, config.sample
    facts = {
        "spatial_compression_ratio": (wan.spatial_compression_ratio, variant.spatial_compression),
        "temporal_compression_ratio": (
            wan.temporal_compression_ratio,
            variant.temporal_compression,
        ),
    }
    for name, (value, fact) in facts.items():
        if name in wan.model_fields_set and value != fact:
            yield f"wan_config.{name}", f"is {fact} for {variant.name}, got {value}; leave it out"

    multiple = variant.size_multiple
    for name, side in (("width", sample.width), ("height", sample.height)):
        if side is not None and side % multiple:
            yield (
                f"sample.{name}",
                f"must be a multiple of {multiple} for {variant.name}, got {side}; the nearest is "
                f"{_nearest(side, multiple)}",
            )
    sizes = video.resolution if isinstance(video.resolution, tuple) else ()
    for index, size in enumerate(sizes):
        field = "video_data.resolution" + (f".{index}" if len(sizes) > 1 else "")
        text = (
            _wrong_area(size, multiple)
            if isinstance(size, int)
            else _wrong_size(size, multiple, video.max_resolution)
        )
        if text:
            yield field, text


def _wrong_area(area: int, multiple: int) -> str | None:
    least = 2 * multiple
    if area >= least**2:
        return None
    return (
        f"is an area in pixels, and {area} is less than {least}x{least}; "
        "for 480p write 399360 or '832x480'"
    )


def _wrong_size(size: str, multiple: int, largest: tuple[int, int]) -> str | None:
    width, height = map(int, size.split("x"))
    if width % multiple or height % multiple:
        nearest = f"{_nearest(width, multiple)}x{_nearest(height, multiple)}"
        return f"sides must be multiples of {multiple}, got {size!r}; the nearest is '{nearest}'"
    if max(width, height) > max(largest) or min(width, height) > min(largest):
        return (
            f"must fit into video_data.max_resolution {_show(largest)}, got {size!r}; "
            "raise that, or choose a smaller size"
        )
    return None


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


# --------------------------------------------------------------------- filling in, writing out


def _resolved(config: RunConfig, folder: Path) -> RunConfig:
    """`config` with every null that stands for the variant's own value replaced by it."""
    variant = VARIANTS[config.model.variant]
    width, height = variant.sample_size
    video, train, output = config.video_data, config.train, config.output
    # The defaults of these two are relative; what the file or an override says is absolute already.
    video = video.model_copy(update={"cache_dir": Path(_joined(folder, video.cache_dir))})
    output = output.model_copy(update={"dir": Path(_joined(folder, output.dir))})
    ratios = {
        "spatial_compression_ratio": variant.spatial_compression,
        "temporal_compression_ratio": variant.temporal_compression,
    }
    timesteps = _filled(train.timesteps, shift=variant.flow_shift)
    return config.model_copy(
        update={
            "wan_config": config.wan_config.model_copy(update=ratios),
            "video_data": _filled(
                video, target_fps=float(variant.fps), resolution=(variant.training_area,)
            ),
            "method": _filled(config.method, alpha=float(config.method.rank)),
            "train": train.model_copy(update={"timesteps": timesteps}),
            "sample": _filled(
                config.sample,
                width=width,
                height=height,
                frames=variant.frames,
                fps=float(variant.fps),
                steps=variant.sampling_steps,
                shift=variant.flow_shift,
                guidance=tuple(expert.guidance_scale for expert in variant.experts),
                negative_prompt=NEGATIVE_PROMPT,
            ),
            "output": output,
        }
    )


def _filled(section: _S, **values: object) -> _S:
    """A copy of `section` with `values` where it has None."""
    missing = {name: v for name, v in values.items() if getattr(section, name) is None}
    return section.model_copy(update=missing)


class _Representer(SafeRepresenter):
    """Writes what readers of YAML 1.1 take for the same as readers of 1.2 do."""

    def text(self, value: str) -> Any:
        # Bare, 1.1 takes these for booleans; and the emitter would write line separators such as
        # U+0085 unescaped, which are read back as spaces.
        boolean = value.lower() in ("y", "n", "yes", "no", "on", "off")
        style = '"' if boolean or not (value.isascii() and value.isprintable()) else None
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def number(self, value: float) -> Any:
        text = repr(value)
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")  # 1e-08 is a text to 1.1
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(str, _Representer.text)
_Representer.add_representer(float, _Representer.number)


_STARTER = """\
# yaml-language-server: $schema=onewan.schema.json
# (completion and checks in your editor, after: onewan schema > onewan.schema.json)
#
# A LoRA for {title}. Whatever is left out keeps its default.
# See whether it fits with `onewan plan`, then start with `onewan train`.
schema_version: 1

model:
  path: {repository}  # on the hub; or a folder in the diffusers layout
  variant: {name}
{experts}
wan_config:
  max_frames: {frames}  # 4n+1; {frames} at {fps} fps are {seconds:.1f} s; fewer need less memory

video_data:
  sources:
    - path: clips  # holds fox.mp4 (or fox.png) and its caption fox.txt, and so on{first_frame}
  supported_formats: [mp4, avi, mov, webm, mkv]
  max_duration: 6.0  # seconds; enough for max_frames
  # Sides are multiples of {multiple}. Left out: each clip's own shape at the area of 480p.
  # resolution: ["832x480"]

method:
  kind: lora
  rank: 32  # more holds more, and costs memory and disk

optimizer:
  lr: 1e-4

train:
  steps: 2000{steps}
  save_every: 500

sample:
  width: 832  # the official {size} takes longer
  height: 480
{samples}

output:
  dir: runs  # the run's folder is runs/NAME, after the name of this file
"""

_SAMPLES = """\
  every: 500
  prompts:
    - prompt: a red fox runs through fresh snow, the camera follows
{image}"""


def starter(variant: VariantName) -> str:
    """A short commented run file with values worth starting with, for `onewan init`."""
    facts = VARIANTS[variant]
    two = len(facts.experts) == 2
    samples = _SAMPLES.format(image="      # image: first_frame.png  # starts the video from it")
    if facts.condition == "text":
        samples = _SAMPLES.format(image="").rstrip()
    elif facts.condition == "first_frame_channels":
        # Commented out, since a file that names a picture nobody has would not load.
        live = _SAMPLES.format(image="      image: first_frame.png")
        samples = "\n".join(
            ["  # Sample videos start from a picture; put one beside this file, then uncomment."]
            + [f"  #{line[1:]}" for line in live.splitlines()]
        )
    i2v = facts.condition == "first_frame_channels"
    first_frame = "\n      # a clip's own first frame is the picture it starts from" if i2v else ""
    return _STARTER.format(
        title=facts.title,
        repository=facts.repository,
        name=facts.name,
        experts="  experts: both  # or high (layout and motion), or low (detail)\n" if two else "",
        frames=facts.frames,
        fps=facts.fps,
        seconds=facts.frames / facts.fps,
        first_frame=first_frame,
        multiple=facts.size_multiple,
        steps="  # of both experts together, half each" if two else "",
        size="x".join(map(str, facts.sample_size)),
        samples=samples,
    )
