"""Changes one value in the text of a YAML document, and leaves every other character as it is.

Comments, order, quotes and indentation are the writer's: where a value stands is asked of the
parser, and only its characters are replaced. What can't be changed in this way, such as what an
alias stands for, is written by ruamel.yaml's round trip, which keeps comments and order too. Either
way the result is read back before it is returned: it has exactly the data that were asked for.
"""

# ruamel.yaml is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from onewan import documents
from onewan.documents import KeyPath, get_path, has_key, is_list, is_mapping, is_tuple, parse_yaml

Order: TypeAlias = Callable[[KeyPath], Sequence[str]]
"""The names that the mapping at a path may have, in the order in which they are written."""
_INDENT = 2


def with_value(text: str, path: KeyPath, value: object, order: Order = lambda _: ()) -> str:
    """`text` with `value` at `path`; mappings that are missing on the way are made, and a list gets
    one item more where the path names the one behind its last.

    ValueError if `text` is malformed, or if `path` leads through a scalar.
    """
    data = parse_yaml(text)
    wanted = _with(data, path, value)
    if same_data(data, wanted):
        return text
    return _checked(lambda: _set(text, path, value, order), text, path, value, wanted)


def without_value(text: str, path: KeyPath) -> str:
    """`text` without what is at `path`. A mapping or list that loses its last item stays, empty.

    ValueError if `text` is malformed or has nothing there.
    """
    data = parse_yaml(text)
    if not path or not has_key(get_path(data, path[:-1]), path[-1]):
        raise ValueError(f"there is no {documents.dotted(path)}")
    parent = get_path(data, path[:-1])
    left: Any = (
        {name: item for name, item in parent.items() if name != path[-1]}
        if is_mapping(parent)
        else [item for index, item in enumerate(parent) if index != path[-1]]
    )
    wanted = _with(data, path[:-1], left)
    return _checked(lambda: _remove(text, path), text, path[:-1], left, wanted)


def with_items_exchanged(text: str, path: KeyPath, index: int) -> str:
    """`text` with the items `index` and `index` + 1 of the list at `path` in each other's place."""
    data = parse_yaml(text)
    items: list[Any] = list(get_path(data, path))
    items[index : index + 2] = [items[index + 1], items[index]]
    wanted = _with(data, path, items)
    return _checked(lambda: _exchange(text, path, index), text, path, items, wanted)


def inline(value: object) -> str:
    """`value` as YAML in one line, as it may stand anywhere in a document."""
    if is_mapping(value):
        return "{" + ", ".join(f"{inline(k)}: {inline(v)}" for k, v in value.items()) + "}"
    if is_list(value) or is_tuple(value):
        return "[" + ", ".join(map(inline, value)) + "]"
    text = _scalar(value)
    if isinstance(value, str) and text[:1] not in "'\"" and any(sign in text for sign in ",[]{}"):
        return json.dumps(value)
    return text


@lru_cache(maxsize=1024, typed=True)  # a form shows the same few values again and again
def _scalar(value: object) -> str:
    return documents.to_yaml({"value": value}).partition(": ")[2].rstrip("\n")


def _block(data: object) -> Iterator[str]:
    """The lines of a mapping with entries, in block style; lists without mappings are inline."""
    assert is_mapping(data)
    for name, value in data.items():
        if is_mapping(value) and value:
            yield f"{_scalar(name)}:"
            yield from (" " * _INDENT + line for line in _block(value))
        elif is_list(value) and value and all(is_mapping(item) and item for item in value):
            yield f"{_scalar(name)}:"
            for item in value:
                first, *rest = _block(item)
                yield f"  - {first}"
                yield from (f"    {line}" for line in rest)
        else:
            yield f"{_scalar(name)}: {_scalar(value) if isinstance(value, str) else inline(value)}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a path leads in a document."""

    nodes: list[tuple[Node | None, Node]]
    """The nodes on the way, from the document itself on, each with the node of its key."""
    depth: int
    """How many parts of the path there are."""

    @property
    def node(self) -> Node:
        return self.nodes[-1][1]

    @property
    def key(self) -> Node | None:
        return self.nodes[-1][0]

    @property
    def in_flow(self) -> bool:
        """Whether it stands in braces or brackets."""
        return any(_is_flow(node) for _, node in self.nodes[:-1])


def _place(text: str, path: KeyPath) -> _Place | None:
    """Where `path` leads, as far as it does; None in an empty document."""
    root = YAML(typ="safe", pure=True).compose(text)
    if root is None:
        return None
    nodes: list[tuple[Node | None, Node]] = [(None, root)]
    for part in path:
        found = _child(nodes[-1][1], part)
        if found is None:
            break
        nodes.append(found)
    return _Place(nodes, len(nodes) - 1)


def _child(node: Node, part: str | int) -> tuple[Node | None, Node] | None:
    if isinstance(node, MappingNode):
        return next(((key, value) for key, value in node.value if key.value == part), None)
    if isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
        return None, node.value[part]
    return None


def _set(text: str, path: KeyPath, value: object, order: Order) -> str:
    place = _place(text, path)
    if place is None:
        end = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{end}{_lines(_nested(path, value), 0)}\n"
    if place.depth == len(path):
        return _replaced(text, place, value)
    at, part = path[: place.depth], path[place.depth]
    inner = _nested(path[place.depth + 1 :], value)
    node = place.node
    if isinstance(node, MappingNode) and node.value:
        names = order(at)
        return _with_entry(text, place, {part: inner}, names, apart=not at)
    if isinstance(node, SequenceNode) and node.value and not node.flow_style:
        end = _past_comments(text, _end(text, node), node.start_mark.column + 1)
        lines = _lines(inner, node.start_mark.column + _INDENT)
        mark = " " * node.start_mark.column + "- "
        return f"{text[:end]}\n{mark}{lines.lstrip()}{text[end:]}"
    if isinstance(node, SequenceNode) and node.value:
        end = _end(text, node.value[-1])
        return f"{text[:end]}, {inline(inner)}{text[end:]}"
    if isinstance(node, MappingNode) and place.depth and not place.in_flow:
        return _filled(text, place, {part: inner})
    empty = node.start_mark.index == node.end_mark.index
    if empty and place.key is not None and isinstance(part, str) and not place.in_flow:
        column = place.key.start_mark.column
        end = _past_comments(text, place.key.end_mark.index, column + 1)
        return f"{text[:end]}\n{_lines({part: inner}, column + _INDENT)}{text[end:]}"
    return _replaced(text, place, _nested(path[place.depth :], value))


def _filled(text: str, place: _Place, data: dict[Any, Any]) -> str:
    """`text` with entries, in block style, in a mapping that has none."""
    node, key = place.node, place.key
    start, end = node.start_mark.index, node.end_mark.index
    if key is None:
        return text[:start] + _lines(data, node.start_mark.column).lstrip() + text[end:]
    line = _line_end(text, end)
    lines = _lines(data, key.start_mark.column + _INDENT)
    return f"{text[:start].rstrip()}{text[end:line]}\n{lines}{text[line:]}"


def _nested(path: KeyPath, value: object) -> Any:
    for part in reversed(path):
        value = [value] if isinstance(part, int) else {part: value}
    return value


def _lines(data: object, column: int) -> str:
    """`data` in block style, indented by `column`."""
    lines = list(_block(data)) if is_mapping(data) and data else [_plain(data)]
    return "\n".join(" " * column + line for line in lines)


def _plain(value: object) -> str:
    return _scalar(value) if isinstance(value, str) else inline(value)


def _replaced(text: str, place: _Place, value: object) -> str:
    node, key = place.node, place.key
    start = node.start_mark.index
    end = _end(text, node if key is None else (key, node))
    new = inline(value) if place.in_flow else _plain(value)
    if key is not None and (end <= start or "\n" in text[key.end_mark.index : start]):
        start = text.index(":", key.end_mark.index) + 1
        return f"{text[:start]} {new}{text[max(start, end) :]}"
    return text[:start] + new + text[end:]


def _with_entry(
    text: str, place: _Place, entry: dict[Any, Any], names: Sequence[str], *, apart: bool
) -> str:
    """`text` with an entry in a mapping that has some: behind those that come before it in `names`,
    with an empty line between if it is `apart` and others are."""
    node, (name,) = place.node, entry
    known = {other: number for number, other in enumerate(names)}
    before = [
        item for item in node.value if known.get(item[0].value, -1) <= known.get(name, len(known))
    ]
    if _is_flow(node):
        end = _end(text, node.value[-1])
        return f"{text[:end]}, {inline(entry)[1:-1]}{text[end:]}"
    column = node.value[0][0].start_mark.column
    gap = "\n" if apart and "\n\n" in text else ""
    if not before:
        start = node.value[0][0].start_mark.index
        return f"{text[:start]}{_lines(entry, column).lstrip()}\n{gap}{' ' * column}{text[start:]}"
    is_last = before[-1] is node.value[-1]
    end = _end(text, before[-1])
    # Comments that are indented as the entries belong to the next entry, if there is one.
    end = _past_comments(text, end, max(1, column) if is_last else column + 1)
    return f"{text[:end]}\n{gap}{_lines(entry, column)}{text[end:]}"


def _remove(text: str, path: KeyPath) -> str:
    place, parent = _place(text, path), _place(text, path[:-1])
    assert place is not None and parent is not None
    items = [(_start(item), _end(text, item)) for item in parent.node.value]
    start, end = items[index := _index(parent.node, path[-1])]
    if len(items) == 1:
        empty = {} if isinstance(parent.node, MappingNode) else []
        if parent.key is None and parent.depth == 0:
            return text[:start] + text[_line_end(text, end) + 1 :]
        return _replaced(text, parent, empty)
    if _is_flow(parent.node):
        if index + 1 < len(items):
            return text[:start] + text[items[index + 1][0] :]
        return text[: items[index - 1][1]] + text[end:]
    first = text.rfind("\n", 0, start) + 1
    is_entry = isinstance(parent.node, MappingNode)
    if is_entry and text[first:start].strip():  # behind the dash of a list's item
        return text[:start] + text[items[index + 1][0] :]
    return text[:first] + text[_line_end(text, end) + 1 :]


def _index(node: Node, part: str | int) -> int:
    if isinstance(part, int):
        return part
    return next(index for index, (key, _) in enumerate(node.value) if key.value == part)


def _exchange(text: str, path: KeyPath, index: int) -> str:
    place = _place(text, path)
    assert place is not None
    one, other = place.node.value[index : index + 2]
    (a, b), (c, d) = ((n.start_mark.index, _end(text, n)) for n in (one, other))
    if not _is_flow(place.node):
        b, d = _line_end(text, b), _line_end(text, d)
    return text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]


def _is_flow(node: Node) -> bool:
    """Whether it is written in braces or brackets."""
    return bool(getattr(node, "flow_style", False))


def _start(item: Node | tuple[Node, Node]) -> int:
    start: int = (item[0] if isinstance(item, tuple) else item).start_mark.index
    return start


def _end(text: str, item: Node | tuple[Node, Node]) -> int:
    """Where the characters of a node, or of a key and its value, end. Of a block and of an empty
    value the parser says where the next thing begins, which may be behind comments."""
    node = item[1] if isinstance(item, tuple) else item
    if isinstance(node, (MappingNode, SequenceNode)) and not node.flow_style and node.value:
        return _end(text, node.value[-1])
    end: int = node.end_mark.index
    if isinstance(item, tuple) and node.start_mark.index == end:
        return text.index(":", item[0].end_mark.index) + 1
    if isinstance(node, ScalarNode) and node.style in ("|", ">"):
        return len(text[:end].rstrip())
    return end


def _line_end(text: str, index: int) -> int:
    found = text.find("\n", index)
    return len(text) if found < 0 else found


def _past_comments(text: str, index: int, column: int) -> int:
    """The end of the line of `index`, or of the last of the comments right below it that are
    indented by `column` at least."""
    end = _line_end(text, index)
    while end < len(text):
        line = text[end + 1 : _line_end(text, end + 1)]
        if not line.lstrip().startswith("#") or len(line) - len(line.lstrip()) < column:
            break
        end += 1 + len(line)
    return end


def _with(data: Any, path: KeyPath, value: object) -> Any:
    """A copy of `data` with `value` at `path`."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    if isinstance(part, int):
        items: Any = [] if data is None else data
        if not is_list(items) or part > len(items):
            raise ValueError(f"there is no item {part}")
        item = items[part] if part < len(items) else None
        return [*items[:part], _with(item, rest, value), *items[part + 1 :]]
    fields: Any = {} if data is None else data
    if not is_mapping(fields):
        raise ValueError(f"there is no field {part} in {documents.format_value(data)}")
    return {**fields, part: _with(fields.get(part), rest, value)}


def same_data(one: object, other: object) -> bool:
    """Whether two documents have the same data, of the same types: 1 is neither 1.0 nor true."""
    return json.dumps(one, default=str) == json.dumps(other, default=str)


def _checked(
    edited: Callable[[], str], text: str, path: KeyPath, value: object, wanted: object
) -> str:
    """What `edited` returns if that reads as `wanted`; else the same change by a round trip."""
    new = _read_back(edited, wanted)
    if new is None:
        new = _read_back(lambda: _by_round_trip(text, path, value), wanted)
    return documents.to_yaml(wanted) if new is None else new


def _read_back(edited: Callable[[], str], wanted: object) -> str | None:
    """What `edited` returns, if that reads as `wanted`."""
    try:
        new = edited()
        return new if _equal(parse_yaml(new) or {}, wanted or {}) else None
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
        return None  # of a document that is written in a way that is not provided for


def _equal(found: object, wanted: object) -> bool:
    """Whether `found` is what a document with `wanted` reads as: order is not compared."""
    return json.dumps(found, sort_keys=True, default=str) == json.dumps(
        wanted, sort_keys=True, default=str
    )


def _by_round_trip(text: str, path: KeyPath, value: object) -> str:
    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 1_000_000
    node = document = yaml.load(text)
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    written = io.StringIO()
    yaml.dump(document, written)
    return written.getvalue()
