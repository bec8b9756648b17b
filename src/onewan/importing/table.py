"""Rows that turn OneTrainer's keys into run-file fields, and the account of every key.

A section of the import is a tuple of `Row`s. Nothing here knows a particular key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal, TypeAlias

from onewan.errors import OnewanError
from onewan.onetrainer.settings import SettingError
from onewan.variants import Variant

Outcome = Literal["carried", "defaulted", "not applicable", "unknown"]


class _Omit(Enum):
    OMIT = 0


OMIT: Final = _Omit.OMIT
"""Returned by a converter to leave the run file's own default."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The outcome of one key of the OneTrainer config."""

    key: str
    """Dotted, such as ``transformer.learning_rate`` or ``concepts.0.path``."""
    value: Any
    outcome: Outcome
    note: str = ""
    """The field of the run file, or the reason why there is none."""


@dataclass(frozen=True, slots=True)
class Condition:
    """When a row applies."""

    holds: Callable[[Context], bool]
    reason: str
    """Why the key has no effect where the condition does not hold."""


Converter: TypeAlias = "Callable[[Any, Context], Any]"
"""(value, context) -> the value of the row's field, or `OMIT`. ValueError if it is not usable."""


@dataclass(frozen=True, slots=True)
class Row:
    """One key of OneTrainer and the run-file field that it becomes."""

    key: str
    field: str
    default: Any
    """OneTrainer's default."""
    convert: Converter | None = None
    """None: the key is read by the converter of another row."""
    when: Condition | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What converters may read, and where they report. `context["epochs"]` is a key's value."""

    given: Mapping[str, Any]
    """The config as it is in the file, or one item of a list in it."""
    rows: Mapping[str, Row]
    """All rows of this config or item, by key, for defaults."""
    variant: Variant
    root: Path
    """The folder that relative paths are relative to."""
    prefix: str = ""
    """Of keys in reports, such as ``concepts.0.``."""
    clips: int = 0
    """Of all training concepts, with their repeats; in an item, of that concept. 0 if unknown."""
    entries: dict[str, Entry] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """The first problem of each key."""

    def __getitem__(self, key: str) -> Any:
        found = value_at(self.given, key)
        return self.rows[key].default if found is OMIT else found

    def is_given(self, key: str) -> bool:
        return value_at(self.given, key) is not OMIT

    @property
    def is_wan(self) -> bool:
        """False for a config of another model, whose files are of no use for Wan."""
        return self["model_type"] == "WAN_2_2"

    @property
    def has_two_experts(self) -> bool:
        return len(self.variant.experts) > 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; 1 at least."""
        return max(1, self.clips // (self["batch_size"] * self["gradient_accumulation_steps"]))

    @property
    def settings(self) -> SimpleNamespace:
        """The top-level values as attributes, the form that `onewan.onetrainer.settings` reads."""
        return SimpleNamespace(**{key: self[key] for key in self.rows if "." not in key})

    def resolve(self, value: Any) -> Path:
        """A path of the config; backslashes of a config from Windows become slashes."""
        text = str(value)
        # A file on Linux may have a backslash in its name, so an existing path is kept.
        path = Path(text if Path(text).exists() else text.replace("\\", "/"))
        return path if path.is_absolute() else self.root / path

    def resolved_if_local(self, value: Any) -> str:
        """The path if it exists, else `value`, which may name a Hugging Face repository."""
        path = self.resolve(value)
        return str(path) if path.exists() else str(value)

    def notice(self, key: str, text: str) -> None:
        self.notices.append(f"{self.prefix}{key}: {text}")

    def problem(self, key: str, text: str) -> None:
        self.problems.setdefault(f"{self.prefix}{key}", text)


def convert(rows: Iterable[Row], context: Context, *, within: str = "") -> dict[str, Any]:
    """The run-file fields of all `rows` that apply, nested, with an entry for each key.

    `within` names the list whose items the rows describe, for the account.
    """
    document: dict[str, Any] = {}
    for row in rows:  # a problem does not stop the others: all are reported at once
        value = context[row.key]
        applies = row.when is None or row.when.holds(context)
        _record(row, value, context, applies, within)
        if row.convert is None or not applies:
            continue
        try:
            converted = row.convert(value, context)
        except SettingError as error:
            context.problem(row.key, str(error))
        except (TypeError, ValueError, OnewanError) as error:
            context.problem(row.key, f"is {value!r}: {' '.join(str(error).split())}")
        else:
            if converted is not OMIT:
                set_path(document, row.field, converted)
    return document


def _record(row: Row, value: Any, context: Context, applies: bool, within: str) -> None:
    key = f"{context.prefix}{row.key}"
    note = f"{within}, {row.field}" if within else row.field
    outcome: Outcome = "carried" if applies else "not applicable"
    if not applies and row.when is not None:
        note = row.when.reason
    if not context.is_given(row.key):
        outcome = "defaulted"
    context.entries[key] = Entry(key, value, outcome, note)


def enabled_items(
    items: Iterable[dict[str, Any]], rows: Iterable[Row], name: str, context: Context
) -> Iterator[Context]:
    """A context for each item of the list `name` that is enabled; others are accounted for."""
    by_key = {row.key: row for row in rows}
    for number, given in enumerate(items):
        item = replace(context, given=given, rows=by_key, prefix=f"{name}.{number}.")
        if item["enabled"]:
            yield item
            continue
        for key, value in flatten(given):
            full = f"{item.prefix}{key}"
            context.entries[full] = Entry(full, value, "not applicable", "this item is disabled")


# ------------------------------------------------------------------------------- general converters


def copied(default: Any = OMIT) -> Converter:
    """The value itself, unless it is null or the run file's own `default`."""
    return lambda value, _: OMIT if value is None or value == default else value


# ------------------------------------------------------------------------------------ nested values


def value_at(node: Any, key: str) -> Any:
    """The value at a dotted key, or `OMIT`."""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return OMIT
        node = node[part]
    return node


def set_path(document: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for part in above:
        document = document.setdefault(part, {})
    document[last] = value


def merge(document: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the nested fields `more` to `document`."""
    for key, value in more.items():
        held = document.get(key)
        if isinstance(held, dict) and isinstance(value, dict):
            merge(held, value)
        else:
            document[key] = value


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all leaves; an empty mapping or list is a leaf."""
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}{key}.")
    elif isinstance(node, list) and node:
        for number, value in enumerate(node):
            yield from flatten(value, f"{prefix}{number}.")
    else:
        yield prefix[:-1], node
