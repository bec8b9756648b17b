"""Documents: bytes to text, YAML 1.2 or JSON text to plain data and back, key paths, differences.

Knows no schema: what the data means is the business of `onewan.config`.
"""

# ruamel.yaml is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import codecs
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

if TYPE_CHECKING:
    from ruamel.yaml.error import StreamMark


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a document may be. Parsing takes about 60 microseconds per value and up to 4 per
    byte, so that a limit is also one of time."""

    bytes: int
    values: int
    """Keys, list items and scalars, those that aliases stand for included."""


LIMITS = Limits(bytes=256 * 1024, values=5_000)
"""Of a document that a person writes."""

_MAX_DEPTH = 40
_MAX_DIGITS = 64
_SHOWN = 60
_TOO_MUCH = ", which no setting takes; shorten it"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# Control characters, signs that no caption has, superscripts within words, and three letters with
# accents in a row, as text in Cyrillic, Greek and East Asian encodings has them.
_NOT_WESTERN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\xa4\xa6\xa8\xac\xad\xaf\xb8\u02c6\u02dc\u0192\u201a]"
    "|[\xb2\xb3\xb9](?=[^\\W\\d_])|[\xc0-\xff]{3}"
)
_MOST_ACCENTS = 0.4
"""Share of characters beyond ASCII in a text of Western European languages."""
_SURROGATES = re.compile("[\ud800-\udfff]")

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


def key_path(name: str) -> KeyPath:
    """The path whose dotted name is `name`."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


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
    if isinstance(value, (str, Path)):
        return shortened(repr(str(value)[:_SHOWN]) if len(str(value)) > 1000 else repr(str(value)))
    return shortened(repr(_as_lists(value)))


def shortened(text: str, length: int = _SHOWN) -> str:
    """`text`, cut to fit into a message."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _as_lists(value: object) -> object:
    return [_as_lists(item) for item in value] if is_tuple(value) else value


def differences(old: Node, new: Node) -> list[tuple[str, object, object]]:
    """(dotted name, old value, new value) of each leaf that differs; a missing item is None."""
    before, after = dict(leaf_values(old)), dict(leaf_values(new))
    return [
        (name, before.get(name), after.get(name))
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def leaf_values(node: object, path: KeyPath = ()) -> Iterator[tuple[str, object]]:
    """Values by dotted name; a list of scalars is one value, an empty one none."""
    if is_mapping(node):
        for name, value in node.items():
            yield from leaf_values(value, (*path, name))
    elif (is_tuple(node) or is_list(node)) and any(map(is_mapping, node)):
        for index, item in enumerate(node):
            yield from leaf_values(item, (*path, index))
    elif node not in ((), []):
        yield dotted(path), node


def decode_text(data: bytes) -> str:
    """The text of a file that a person wrote: UTF-8, or what its byte order mark says.

    Editors and PowerShell on Windows begin files with such a mark, of UTF-8 or UTF-16. ValueError,
    with the place, for any other encoding. Line breaks stay as they are.
    """
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start})"
        if is_utf_16:
            what = f"is not UTF-16 text (byte {error.start}), which its byte order mark says"
        else:
            # Only named, not read: nearly any bytes are valid in it, so it would be a guess.
            character = data[error.start : error.start + 1].decode("cp1252", errors="ignore")
            if character:
                what = f"is not UTF-8 text (byte {error.start}, in Windows-1252 '{character}')"
        raise ValueError(f"{what}; save it as UTF-8") from None
    if "\0" in text:
        # ASCII text in UTF-16 is valid UTF-8, with a NUL in each character.
        line = text.count("\n", 0, text.index("\0")) + 1
        what = f"contains the character NUL (line {line}), as UTF-16 without a byte order mark does"
        raise ValueError(f"{what}; save it as UTF-8")
    return text


def decode_text_or_cp1252(data: bytes) -> tuple[str, bool]:
    """The text of a file as `decode_text` reads it, or in Windows-1252 where it is clearly that;
    and whether it is.

    Nearly any bytes are text in Windows-1252, so it is believed only where no character can be read
    as UTF-8 and the others are what Western European languages have: letters one or two at a time,
    and typographic signs. ValueError, as `decode_text` has it, for everything else.
    """
    try:
        return decode_text(data), False
    except ValueError:
        if any(character > "\x7f" for character in data.decode("utf-8", errors="ignore")):
            raise
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            text = ""
        beyond = sum(character > "\x7f" for character in text)
        if not text or _NOT_WESTERN.search(text) or beyond > max(2, _MOST_ACCENTS * len(text)):
            raise
    return text, True


def parse_yaml(text: str, limits: Limits = LIMITS) -> Any:
    """The data of one YAML 1.2 document, None if it is empty; ValueError if it is malformed or
    exceeds `limits`.

    Of YAML 1.2 all but tags: without them a value is text, a number, true or false, null, a list or
    a mapping, and nothing that is written in a document makes it another type.
    """
    # pure=True, since the C parser follows YAML 1.1, where `off` is false and 1e-4 is a string.
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = partial(_Composer, limits=limits)
    yaml.Constructor = _Constructor
    yaml.Resolver = _Resolver
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        raise ValueError(_yaml_problem(error)) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"line {line}: {text[error.position]!r} is not allowed; remove it"
        ) from None
    except (ValueError, OverflowError):
        # Of a number that is no character, ruamel.yaml does not say the place.
        escapes = re.finditer(r"\\U([0-9A-Fa-f]{8})", text)
        start = next((m.start() for m in escapes if int(m[1], 16) > sys.maxunicode), 0)
        line = text.count("\n", 0, start) + 1
        problem = f"{text[start : start + 10]} is no character; remove it"
        raise ValueError(f"line {line}: {problem}") from None


def _yaml_problem(error: MarkedYAMLError) -> str:
    what = str(error.problem)
    if what.startswith("but "):
        what = f"{error.context}, {what}"
    elif "'\\t'" in what:
        what = "a tab; indent with spaces"
    elif twice := re.match(r'found duplicate key "(.*)" with value', what, re.DOTALL):
        what = f"'{shortened(twice[1])}' is given twice; keep one"
    elif what.startswith(("found unknown escape", "expected escape sequence")):
        what = (
            "in double quotes a backslash starts an escape such as \\n, and this one is unknown; "
            "use single quotes, or forward slashes in a path"
        )
    return f"{_where(error.problem_mark)}{shortened(what, 300)}"


def _where(mark: StreamMark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


class _Resolver(VersionedResolver):
    @property
    def processing_version(self) -> tuple[int, int]:
        return (1, 2)  # whatever the next document announces, which has been read ahead


class _Composer(Composer):
    """Refuses tags and what would take too long or too much memory: deep nesting, and aliases that
    stand for more values than `limits` allows."""

    def __init__(self, loader: Any = None, *, limits: Limits) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False
        self._limits = limits
        self._depth = self._count = 0
        self._sizes: dict[str, int] = {}
        """Number of values that each anchor stands for; 0 as long as its node is not complete."""

    def compose_document(self) -> Any:
        event = self.parser.peek_event()
        if event.version not in (None, (1, 2)):
            raise ComposerError(None, None, "is not YAML 1.2; remove %YAML", event.start_mark)
        return super().compose_document()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        size = self._sizes.get(event.anchor, 1) if isinstance(event, AliasEvent) else 1
        self._count += size
        problem = None
        if size == 0:
            problem = f"*{shortened(event.anchor)} stands for something that contains it; remove it"
        elif self._count > self._limits.values:
            problem = f"more than {self._limits.values:,} values{_TOO_MUCH}"
        elif self._depth > _MAX_DEPTH:
            problem = f"nested more than {_MAX_DEPTH} levels deep{_TOO_MUCH}"
        elif not isinstance(event, AliasEvent) and event.tag not in (None, "!"):
            problem = f"the tag {shortened(event.tag)} is not supported; remove it"
        if problem is not None:
            raise ComposerError(None, None, problem, event.start_mark)
        if isinstance(event, AliasEvent):
            return super().compose_node(parent, index)
        before = self._count
        if event.anchor is not None:
            self._sizes[event.anchor] = 0
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._count - before + 1
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag in _NUMBERS and len(node.value) > _MAX_DIGITS:
            problem = f"a number of {len(node.value)} characters; shorten it, or put it in quotes"
        else:
            problem = text_problem(node.value)
        if problem is not None:
            raise ComposerError(None, None, problem, node.start_mark)
        # Types of YAML 1.1 that ruamel.yaml still knows.
        if node.tag in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"):
            node.tag = "tag:yaml.org,2002:str"
        return node


class _Constructor(SafeConstructor):
    def integer(self, node: Any) -> int:
        try:
            value = super().construct_yaml_int(node)
        except (ValueError, IndexError):
            value = None
        if value is None:
            problem = f"{node.value!r} is no number; put it in quotes if it is text"
            raise ConstructorError(None, None, problem, node.start_mark)
        if problem := number_problem(value):
            raise ConstructorError(None, None, problem, node.start_mark)
        return value

    def number(self, node: Any) -> float:
        try:
            return super().construct_yaml_float(node)
        except ValueError:
            problem = f"{node.value!r} is no number; put it in quotes if it is text"
            raise ConstructorError(None, None, problem, node.start_mark) from None


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.integer)
_Constructor.add_constructor("tag:yaml.org,2002:float", _Constructor.number)


def parse_json(text: str, limits: Limits = LIMITS) -> Any:
    """The data of a JSON document, None if it is empty; ValueError if it is malformed or exceeds
    `limits`."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in pairs:
            if key in data:
                raise ValueError(f"'{shortened(key)}' is given twice; keep one")
            data[key] = value
        return data

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"has a number of {len(digits)} digits; shorten it")
        return int(digits)

    if not text.strip():
        return None
    try:
        data = json.loads(text, object_pairs_hook=mapping, parse_int=integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep{_TOO_MUCH}") from None
    _check(data, limits)
    return data


def _check(data: Any, limits: Limits) -> None:
    """ValueError if data from JSON exceeds `limits` or has something that YAML's would not have."""
    level, count = [data], 0
    for _ in range(_MAX_DEPTH + 1):
        inner: list[Any] = []
        for node in level:
            if is_mapping(node):
                inner += [*node, *node.values()]
            elif is_list(node):
                inner += node
            elif isinstance(node, str) and (problem := text_problem(node)):
                raise ValueError(f"has {format_value(node)}: {problem}")
            elif isinstance(node, int) and (problem := number_problem(node)):
                raise ValueError(problem)
        count += len(level)
        if count > limits.values:
            raise ValueError(f"has more than {limits.values:,} values{_TOO_MUCH}")
        if not inner:
            return
        level = inner
    raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep{_TOO_MUCH}")


def text_problem(text: str) -> str | None:
    """What is wrong with a text that no file system, library and UTF-8 file takes; or None."""
    if "\0" in text:
        return "contains the character NUL; remove it"
    if _SURROGATES.search(text):
        return "contains half of a character (a lone surrogate, or a name that is not UTF-8)"
    return None


def number_problem(value: int) -> str | None:
    """What is wrong with a whole number that does not fit into 64 bits; or None."""
    return None if -(2**63) <= value < 2**64 else f"{value} does not fit into 64 bits; change it"


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
