"""Documents: YAML 1.2 or JSON text to plain data and back, key paths, values and differences.

Knows no schema: what the data means is the business of `onewan.config`.
"""

# ruamel.yaml is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

if TYPE_CHECKING:
    from ruamel.yaml.error import StreamMark


Node: TypeAlias = Any
"""A mapping, a list (in a dumped config a tuple) or a scalar."""
KeyPath: TypeAlias = tuple[str | int, ...]
"""Field names and list indices that lead to a value of a document."""


def is_mapping(node: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(node, dict)


def is_list(node: object) -> TypeGuard[list[Any]]:
    return isinstance(node, list)


def is_tuple(node: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(node, tuple)


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def has_key(node: Node, part: str | int) -> bool:
    """Whether a mapping has this field, or a list this index."""
    if is_list(node):
        return isinstance(part, int) and part < len(node)
    return is_mapping(node) and part in node


def get_path(node: Node, path: KeyPath) -> Node:
    """The value at `path` of `node`, or None."""
    for part in path:
        if not has_key(node, part):
            return None
        node = node[part]
    return node


def format_value(value: object) -> str:
    """`value` as it is written in YAML, shortened to fit into a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(str(value)) if isinstance(value, (str, Path)) else repr(_as_lists(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _as_lists(value: object) -> object:
    return [_as_lists(item) for item in value] if is_tuple(value) else value


def differences(old: Node, new: Node) -> list[tuple[str, object, object]]:
    """(dotted name, old value, new value) of each leaf that differs; a missing item is None."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        (name, before.get(name), after.get(name))
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _leaves(node: object, path: KeyPath = ()) -> Iterator[tuple[str, object]]:
    """Values by dotted name; a list of scalars is one value, an empty one none."""
    if is_mapping(node):
        for name, value in node.items():
            yield from _leaves(value, (*path, name))
    elif is_tuple(node) and any(map(is_mapping, node)):
        for index, item in enumerate(node):
            yield from _leaves(item, (*path, index))
    elif node != ():
        yield dotted(path), node


def parse_yaml(text: str) -> Any:
    """The data of one YAML 1.2 document, None if it is empty; ValueError if it is malformed."""
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


def parse_json(text: str) -> Any:
    """The data of a JSON document, None if it is empty; ValueError if it is malformed."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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


def to_yaml(data: Any) -> str:
    """YAML text that is read back as equal data by parsers of YAML 1.1 and of 1.2 alike."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.allow_unicode = True
    yaml.width = 1_000_000  # a prompt stays on one line
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()


class _Representer(SafeRepresenter):
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
