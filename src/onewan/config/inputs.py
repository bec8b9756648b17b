"""What a form needs to know of each field: how a value is entered, its bounds, unit and default.

Made from the schema alone, so that a new field has its place in a form without being named there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin

from onewan.config.fields import ESSENTIAL, UNITS, field_at
from onewan.config.schema import COMPONENTS, RunConfig
from onewan.config.section import Members, Section, Several, members_of, sections_of
from onewan.document_edits import inline
from onewan.documents import KeyPath, is_list, parse_yaml

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Kind: TypeAlias = Literal[
    "switch",
    "choice",
    "choices",
    "number",
    "text",
    "long_text",
    "path",
    "lines",
    "paths",
    "inline",
    "section",
    "union",
    "list",
]
"""How a value is entered.

`switch`: true or false. `choice`: one of a few names, `choices` any of them. `number`: a number, or
a word where the field takes some. `lines`, `paths`: one in each line. `inline`: YAML in one line,
for pairs, ranges and sizes. `section`: its fields. `union`: its kind, and the fields of that kind.
`list`: sections, one behind the other.
"""

_LONG = ("prompt", "negative_prompt")
_WORDS = {
    "lr": "learning rate",
    "dir": "folder",
    "init_from": "start from files",
    "every": "steps between",
    "d0": "d0",
}
_ABBREVIATIONS = ("VAE", "EMA", "FPS", "VRAM", "RAM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One field of a form."""

    path: KeyPath
    """Of the value in the document."""
    kind: Kind
    label: str
    help: str
    unit: str = ""
    bounds: str = ""
    """Of numbers, in words, such as "1 or more"."""
    choices: tuple[str, ...] = ()
    default: object = None
    """Of the schema; None also for a field that must be given."""
    required: bool = False
    nullable: bool = False
    """Whether null is a value."""
    essential: bool = False
    """For containers: whether an essential field is within."""
    one_is_text: bool = False
    """Whether a list of one may be given as a text alone."""
    section: type[Section] | None = None
    """Of a section, or of the items of a list."""
    union: Members | None = None

    @property
    def name(self) -> str:
        """The name of the field in the run file."""
        return str(self.path[-1])

    def inner(self, kind: str = "") -> list[Input]:
        """The fields of the section, or for a union of the member called `kind`."""
        section = self.section if self.kind == "section" else None
        if self.union is not None:
            section = self.union.sections.get(kind or self.union.keyed.default)
        return [] if section is None else inputs(section, self.path)

    def help_of(self, kind: str) -> str:
        """What a kind of the union is; empty for one that there is not."""
        if self.union is None or kind not in self.union.sections:
            return ""
        key = self.union.sections[kind].model_fields[self.union.keyed.key]
        return " ".join((key.description or "").split())

    def items(self, index: int) -> list[Input]:
        """The fields of an item of the list."""
        return [] if self.section is None else inputs(self.section, (*self.path, index))

    def shown(self, value: object) -> str:
        """`value`, which the document has, as it is entered; "" for one that is not given."""
        if self.kind in ("lines", "paths") and is_list(value):
            return "\n".join(map(str, value))
        if value is None:
            return ""
        if isinstance(value, str):
            same = self.kind in ("text", "long_text", "path", "lines", "paths", "choice")
            return value if same or _entered(value) == value else inline(value)
        return inline(value)

    def value(self, text: str) -> object:
        """The value for a text that was entered, None for none: it may be wrong for the field,
        which is said where the document is checked."""
        text = text if self.kind == "long_text" else text.strip()
        if not text.strip():
            return None
        if self.kind in ("text", "long_text", "path"):
            return text
        if self.kind == "choice":
            return {"null": None, "true": True, "false": False}.get(text, text)
        if self.kind in ("lines", "paths"):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return lines[0] if len(lines) == 1 and self.one_is_text else lines
        return _entered(text)

    @property
    def default_text(self) -> str:
        """The default, as it is entered; "" if it has none."""
        if self.kind in ("section", "union", "list"):
            return ""
        return self.shown(plain(self.default))


def _entered(text: str) -> object:
    """What a text means as YAML; where it is none, the text itself."""
    try:
        return parse_yaml(f"value: {text}")["value"]
    except ValueError:
        return text


def plain(value: object) -> Any:
    """A default of the schema as a document has it."""
    return json.loads(json.dumps(value, default=str)) if value is not None else None


def run_inputs() -> list[Input]:
    """The sections of the run file, each as one input."""
    return inputs(RunConfig, ())


def inputs(section: type[Section], at: KeyPath) -> list[Input]:
    """The fields of a section that is at the path `at`, but for the key of a union."""
    keys = _union_key(at)
    return [
        _input(section, name, field, (*at, name))
        for name, field in section.model_fields.items()
        if name != keys and (*at, name) != ("schema_version",)
    ]


def pattern(path: KeyPath) -> str:
    """The dotted name of a path, in which `*` is any item of a list."""
    return ".".join("*" if isinstance(part, int) else part for part in path)


def section_at(path: KeyPath, kind_of: Any) -> type[Section] | None:
    """The section at `path`, None if there is none; `kind_of` says which kind the union at a path
    has."""
    section: type[Section] | None = RunConfig
    at: KeyPath = ()
    for part in path:
        at = (*at, part)
        if isinstance(part, int):
            continue
        if section is None or (field := section.model_fields.get(part)) is None:
            return None
        union = members_of(field)
        found = sections_of(field.annotation)
        if union is not None:
            section = union.sections.get(kind_of(at, union) or union.keyed.default)
        else:
            section = found[0] if found else None
    return section


def _union_key(at: KeyPath) -> str | None:
    """The key of the union at `at`, which its own input shows."""
    if not at or isinstance(at[-1], int):
        return None
    union = members_of(field_at(at))
    return None if union is None else union.keyed.key


def _input(section: type[Section], name: str, field: FieldInfo, path: KeyPath) -> Input:
    dotted = pattern(path)
    sections, union = sections_of(field.annotation), members_of(field)
    kind = _kind(field, dotted)
    return Input(
        path=path,
        kind=kind,
        label=_label(name),
        help=" ".join((field.description or "").split()),
        unit=UNITS.get(dotted, ""),
        bounds=_bounds(section, name) if kind == "number" else "",
        choices=tuple(str(value) for value in _literals(field.annotation)),
        default=None if field.is_required() else field.get_default(call_default_factory=True),
        required=field.is_required(),
        nullable=NoneType in get_args(field.annotation),
        essential=any(e == dotted or e.startswith(f"{dotted}.") for e in ESSENTIAL),
        one_is_text=Several in field.metadata,
        section=sections[0] if sections and union is None else None,
        union=union,
    )


def _kind(field: FieldInfo, dotted: str) -> Kind:
    annotation = field.annotation
    if sections_of(annotation):
        if get_origin(annotation) is tuple:
            return "list"
        return "union" if members_of(field) else "section"
    types = [_bare(part) for part in _parts(annotation) if part is not NoneType]
    literal = [get_origin(part) is Literal for part in types]
    if types == [bool]:
        return "choice" if NoneType in get_args(annotation) else "switch"
    if all(literal):
        return "choice"
    if any(part in (int, float) for part in types) and not any(map(_is_many, types)):
        return "number"
    if len(types) == 1 and _is_many(types[0]):
        return _kind_of_list(types[0])
    if Path in types or dotted in {f"model.{name}" for name in ("path", *COMPONENTS)}:
        return "path"
    if types == [str]:
        return "long_text" if dotted.rpartition(".")[2] in _LONG else "text"
    return "inline"


def _kind_of_list(annotation: Any) -> Kind:
    items = get_args(annotation)
    if len(items) != 2 or items[1] is not Ellipsis:
        return "inline"
    item = _bare(items[0])
    if get_origin(item) is Literal:
        return "choices"
    return "paths" if item is Path else "lines" if item is str else "inline"


def _bare(annotation: Any) -> Any:
    """A type without what is annotated to it."""
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    return annotation


def _parts(annotation: Any) -> list[Any]:
    """The types of a union, or the only one."""
    bare = _bare(annotation)
    if get_origin(bare) in (None, tuple, dict, Literal):
        return [bare]
    return [part for inner in get_args(bare) for part in _parts(inner)]


def _is_many(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, dict)


def _literals(annotation: Any) -> Iterator[object]:
    for part in _parts(annotation):
        if get_origin(part) is Literal:
            yield from get_args(part)
        elif get_origin(part) is tuple:
            yield from (
                v for item in get_args(part) if item is not Ellipsis for v in _literals(item)
            )
        elif part is bool:
            yield from ("true", "false")


@cache
def _properties(section: type[Section]) -> dict[str, Any]:
    found: dict[str, Any] = section.model_json_schema()["properties"]
    return found


def _bounds(section: type[Section], name: str) -> str:
    part = _properties(section)[name]
    for schema in (part, *part.get("anyOf", ())):
        low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
        high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
        if low is not None and high is not None:
            return f"{low:g} to {high:g}"
        words: Sequence[tuple[str, float | None]] = (
            ("{:g} or more", low),
            ("more than {:g}", above),
            ("up to {:g}", high),
            ("less than {:g}", below),
        )
        if given := [text.format(bound) for text, bound in words if bound is not None]:
            return ", ".join(given)
    return ""


def _label(name: str) -> str:
    words = _WORDS.get(name, name.replace("_", " "))
    label = words[0].upper() + words[1:]
    for short in _ABBREVIATIONS:
        label = " ".join(short if word.upper() == short else word for word in label.split(" "))
    return label
