"""A run file that is being written: its text, changed field by field or as a whole, and what is
wrong with it.

The text is the only state. A field is changed in place, with its comments and order kept; what a
text stands for (a source's path alone, a union's name) is spelled out where a field within is set.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from onewan.config.fields import field_at
from onewan.config.inputs import Input, plain, section_at
from onewan.config.load import run_of_text
from onewan.config.schema import ResolvedRun
from onewan.config.section import Members, members_of, sections_of, shorthand_of
from onewan.document_edits import (
    inline,
    same_data,
    with_items_exchanged,
    with_value,
    without_value,
)
from onewan.documents import (
    LIMITS,
    KeyPath,
    dotted,
    get_path,
    has_key,
    is_list,
    is_mapping,
    key_path,
    parse_yaml,
)
from onewan.errors import ConfigError


class RunText:
    """The text of a run file."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.malformed: str | None = None
        """What is wrong with the text as YAML, with line and column; None: nothing."""
        self._data: Any = None
        """The document as it is written."""
        self._spelled: Any = {}
        self._set_aside: dict[tuple[KeyPath, str], Any] = {}
        """Values of kinds and sections that were left, for when they are chosen again."""
        self._complete: Any = {}
        """All settings of the run, as they were when nothing was wrong."""
        self.replace(text)

    def replace(self, text: str) -> None:
        """Take another text. While it is malformed, values are those of the last one that was
        not."""
        self.text = text
        if len(text.encode("utf-8", "replace")) > LIMITS.bytes:
            self.malformed = f"longer than the {LIMITS.bytes // 1024} kB that a run file may have"
            return
        try:
            data = parse_yaml(text)
        except ValueError as error:
            self.malformed = str(error)
            return
        if not (data is None or is_mapping(data)):
            self.malformed = "line 1: there must be fields such as `model:` at the top level"
            return
        self.malformed, self._data = None, data
        self._spelled = _spelled_out(data, ())

    def value(self, path: KeyPath) -> Any:
        """The value that is given at `path`; None if none is."""
        return get_path(self._spelled, path)

    def is_given(self, path: KeyPath) -> bool:
        """Whether the document has something at `path`."""
        return has_key(self.value(path[:-1]), path[-1])

    def kind(self, path: KeyPath, union: Members) -> str:
        """The kind that is chosen of the union at `path`."""
        value = self.value(path)
        kind = value.get(union.keyed.key) if is_mapping(value) else value
        return str(union.keyed.default if kind is None else kind)

    def shown(self, field: Input) -> Any:
        """What the input of a field shows: of a switch and of a section that may be left out
        whether it is on, of a union its kind, of `choices` a list of them, of a list of sections
        how many there are, otherwise a text."""
        value = self.value(field.path)
        if field.kind == "list":
            return len(value) if is_list(value) else 0
        if field.kind == "section":
            return value is not None
        if field.union is not None:
            is_none = field.nullable and value is None
            return "" if is_none else self.kind(field.path, field.union)
        if field.kind == "switch":
            return bool(field.default if value is None else value)
        if field.kind == "choices":
            return [str(v) for v in (value if is_list(value) else plain(field.default) or ())]
        if value is None and field.default is not None and self.is_given(field.path):
            return "null"
        return field.shown(value)

    def options(self, field: Input) -> dict[str, str]:
        """What can be chosen in the input of a field, each with its label; what the text has there
        and can't be chosen is one too."""
        names = field.choices if field.union is None else field.union.sections
        options = {name: name for name in names}
        shown = self.shown(field)
        if field.union is not None and field.nullable:
            options = {"": "As for the whole run", **options}
        elif field.kind == "choice":
            if field.nullable and field.default is not None:
                options["null"] = "null"
            if not field.required:
                default = self.default(field)
                options = {"": f"Default: {default}" if default else "Default", **options}
        present = shown if is_list(shown) else [shown]
        unknown = {v: f"{v} (unknown)" if v else "Not given" for v in present if v not in options}
        return options | unknown

    def default(self, field: Input) -> str:
        """What a field has that is not given, as it is entered: it may depend on other fields, and
        then it is that of the text as it was when nothing was wrong with it."""
        holds_fields = field.kind in ("section", "union", "list")
        if field.default_text or holds_fields or self.is_given(field.path):
            return field.default_text
        return field.shown(plain(get_path(self._complete, field.path)))

    def set(self, path: KeyPath, value: object) -> None:
        """Set the value at `path`. ValueError while the text is malformed."""
        if self.is_given(path) and same_data(self.value(path), value) and not self.malformed:
            return
        self._spell_out(path)
        self.replace(with_value(self.text, path, value, self._order))

    def remove(self, path: KeyPath) -> None:
        """Remove what is at `path`, and sections around it that become empty; nothing happens if
        nothing is there."""
        if not self.is_given(path):
            return
        self._spell_out(path)
        while len(path) > 1 and self._becomes_empty(path):
            path = path[:-1]
        self.replace(without_value(self.text, path))

    def override(self, assignments: Iterable[str]) -> None:
        """Set what overrides of the command line set, such as "memory.vram=24GB"."""
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            self.set(key_path(name), parse_yaml(f"value: {value}")["value"])

    def enter(self, field: Input, entered: Any) -> None:
        """Set a field to what was entered in its input, as `shown` has it; nothing entered, and
        the default, are not written."""
        if field.union is not None:
            self.choose(field.path, field.union, entered or None)
            return
        if field.kind == "section":
            self.switch(field.path, bool(entered))
            return
        is_text = isinstance(entered, str)
        text = entered if is_text else "" if entered in (None, []) else inline(entered)
        # Without what no YAML text may have: NUL and halves of characters, which come by pasting.
        text = text.replace("\0", "").encode(errors="ignore").decode()
        value = field.value(text)
        null = value is None and text.strip() in ("null", "~") and field.default is not None
        if not null and (value is None or text == field.default_text):
            self.remove(field.path)
        else:
            self.set(field.path, value)

    def choose(self, path: KeyPath, union: Members, kind: str | None) -> None:
        """Choose a kind of the union at `path`; None is none at all. Fields that the new kind has
        too are kept, and all others come back with their kind."""
        key, old = union.keyed.key, self.value(path)
        fields: dict[str, Any] = old if is_mapping(old) else {}
        if fields:
            self._set_aside[path, self.kind(path, union)] = fields
        if kind is None:
            self.remove(path)
            return
        known = union.sections[kind].model_fields
        kept = {**self._set_aside.get((path, kind), {}), **fields, key: kind}
        wanted = {name: value for name, value in kept.items() if name in known}
        if isinstance(get_path(self._data, path), str) and len(wanted) == 1:
            self.set(path, kind)  # a name alone, as it was written
            return
        for name in fields.keys() - known.keys():
            self.remove((*path, name))
        if kind == union.keyed.default and key not in fields and old is not None:
            del wanted[key]
        for name, value in wanted.items():
            self.set((*path, name), value)

    def switch(self, path: KeyPath, on: bool) -> None:
        """Give a section that may be left out, or leave it out; its values come back with it."""
        if on:
            self.set(path, self._set_aside.get((path, ""), {}))
        else:
            self._set_aside[path, ""] = self.value(path)
            self.remove(path)

    def add_item(self, path: KeyPath) -> None:
        """Add an empty item to the list of sections at `path`."""
        self._spell_out((*path, 0))
        self.set((*path, len(self.value(path) or ())), {})

    def remove_item(self, path: KeyPath, index: int) -> None:
        """Remove an item, and the list with its last one."""
        self._spell_out((*path, index))
        items = self.value(path)
        self.replace(without_value(self.text, path if len(items) == 1 else (*path, index)))

    def exchange(self, path: KeyPath, index: int) -> None:
        """Let the items `index` and `index` + 1 change places."""
        self.replace(with_items_exchanged(self.text, path, index))

    def checked(self, file: Path) -> Checked:
        """What the text says as the run file `file`, or what is wrong with it."""
        if self.malformed is not None:
            return Checked(None, {}, [self.malformed])
        try:
            config = run_of_text(self.text, file)
        except ConfigError as error:
            return Checked(None, *problems_by_field(error))
        self._complete = config.model_dump(mode="json")
        return Checked(config, {}, [])

    def _becomes_empty(self, path: KeyPath) -> bool:
        """Whether the section around `path` has nothing else, and means the same if left out."""
        around = path[:-1]
        parent, field = self.value(around), field_at(around)
        if isinstance(around[-1], int) or not is_mapping(parent) or len(parent) > 1:
            return False
        return field is None or NoneType not in get_args(field.annotation)

    def _spell_out(self, path: KeyPath) -> None:
        """Write out what a text or `true` around `path` stands for."""
        for count in range(1, len(path)):
            at = path[:count]
            written, meant = get_path(self._data, at), get_path(self._spelled, at)
            if not (written is None or is_mapping(written) or is_list(written)):
                self.replace(with_value(self.text, at, meant))

    def _order(self, path: KeyPath) -> list[str]:
        """The names of the fields of the section at `path`, in the schema's order."""
        section = section_at(path, self.kind)
        return [] if section is None else list(section.model_fields)


class Checked:
    """What a run file says, or what is wrong with it."""

    def __init__(
        self, config: ResolvedRun | None, by_field: dict[KeyPath, str], others: list[str]
    ) -> None:
        self.config = config
        """None if something is wrong."""
        self.by_field = by_field
        """Messages by the path of the field that they are about."""
        self.others = others
        """Messages about no field that there is."""

    def problem(self, field: Input) -> str | None:
        """The message about a field; of a union also one about its kind."""
        of_kind = () if field.union is None else (field.union.keyed.key,)
        return self.by_field.get(field.path) or self.by_field.get((*field.path, *of_kind))

    def problems(self) -> list[tuple[KeyPath | None, str]]:
        """All messages as lines, each with the path of the field that it is about."""
        named = [(path, f"{dotted(path)}: {text}") for path, text in self.by_field.items()]
        return [*named, *((None, line) for line in self.others)]


def problems_by_field(error: ConfigError) -> tuple[dict[KeyPath, str], list[str]]:
    """The problems of a run file by field, and those that are about none."""
    fields: dict[KeyPath, str] = {}
    others: list[str] = []
    for line in error.problems:
        name, _, text = line.partition(": ")
        path = key_path(name)
        if text and field_at(path) is not None:
            fields[path] = text[0].upper() + text[1:]
        else:
            others.append(line)
    return fields, others


def _spelled_out(node: Any, path: KeyPath) -> Any:
    """A copy of the value at `path` in which everything that stands for a section is one."""
    field = field_at(path) if path else None
    if path and (field is None or not sections_of(field.annotation)):
        return node
    is_item = bool(path) and isinstance(path[-1], int)
    if isinstance(node, str) and (section := shorthand_of(field)) is not None:
        node = section.spelled_out(node) if is_item else [section.spelled_out(node)]
    elif (union := members_of(field)) is not None and isinstance(node, str):
        node = union.keyed.complete(node)
    elif node in (True, "auto"):
        node = {}
    if is_mapping(node):
        return {str(name): _spelled_out(value, (*path, str(name))) for name, value in node.items()}
    if is_list(node):
        return [_spelled_out(item, (*path, index)) for index, item in enumerate(node)]
    return node
