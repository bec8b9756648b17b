"""Rows that turn OneTrainer's keys into run-file fields, and the account of every key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from onewan.errors import OnewanError
from onewan.onetrainer.settings import SettingError
from onewan.variants import Variant

Outcome = Literal["carried", "defaulted", "not applicable", "unknown"]

OMIT: Final[Any] = object()
"""Returned by a converter to leave the run file's own default."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The outcome of one key of the OneTrainer config."""

    key: str
    """Dotted, such as ``transformer.learning_rate`` or ``concepts.0.path``."""
    value: Any
    outcome: Outcome
    note: str
    """The field of the run file, or the reason why there is none."""


class Condition(NamedTuple):
    """When a row applies, and why its key has no effect otherwise."""

    holds: Callable[[Context], bool]
    reason: str


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
    row: Row = Row("", "", None)
    """The row whose converter is called."""
    prefix: str = ""
    """Of keys in reports, such as ``concepts.0.``."""
    clips: int = 0
    """Of all training concepts, with their repeats; in an item, of that concept. 0 if unknown."""
    entries: dict[str, Entry] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """The first problem of each key."""

    def __getitem__(self, key: str) -> Any:
        return value_at(self.given, key) if self.is_given(key) else self.rows[key].default

    def is_given(self, key: str = "") -> bool:
        """Whether the config has the key, by default that of the row."""
        return value_at(self.given, key or self.row.key) is not OMIT

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
        return self.root / (text if Path(text).exists() else text.replace("\\", "/"))

    def notice(self, text: str, key: str = "") -> None:
        """Tell the user something about a key, by default that of the row."""
        self.notices.append(f"{self.prefix}{key or self.row.key}: {text}")

    def problem(self, key: str, text: str) -> None:
        self.problems.setdefault(f"{self.prefix}{key}", text)


def convert(rows: Iterable[Row], context: Context, *, within: str = "") -> dict[str, Any]:
    """The run-file fields of all `rows` that apply, nested, with an entry for each key.

    `within` names the list whose items the rows describe, for the account.
    """
    document: dict[str, Any] = {}
    for row in rows:  # a problem does not stop the others: all are reported at once
        key, value = f"{context.prefix}{row.key}", context[row.key]
        outcome: Outcome = "carried" if context.is_given(row.key) else "defaulted"
        note = f"{within}, {row.field}" if within else row.field
        if row.when is not None and not row.when.holds(context):
            outcome = "not applicable" if outcome == "carried" else outcome
            context.entries[key] = Entry(key, value, outcome, row.when.reason)
            continue
        context.entries[key] = Entry(key, value, outcome, note)
        try:
            converted = row.convert(value, replace(context, row=row)) if row.convert else OMIT
        except SettingError as error:
            context.problem(row.key, str(error))
        except (TypeError, ValueError, OnewanError) as error:
            context.problem(row.key, f"is {value!r}: {' '.join(str(error).split())}")
        else:
            if converted is not OMIT:
                set_path(document, row.field, converted)
    return document


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
        for key, value in flatten(given, item.prefix):
            context.entries[key] = Entry(key, value, "not applicable", "this item is disabled")


def copied(default: Any = OMIT) -> Converter:
    """The value itself, unless it is null or the run file's own `default`."""
    return lambda value, _: OMIT if value is None or value == default else value


def mapped(**fields: Any) -> Converter:
    """The run file's value for each of OneTrainer's; its default for all others."""
    return lambda value, _: fields.get(str(value), OMIT)


def setting(read: Callable[[Any], Any], default: Any = None) -> Converter:
    """What `read` makes of OneTrainer's settings, unless it is the run file's own `default`."""
    return lambda _, context: OMIT if (found := read(context.settings)) == default else found


def path(value: Any, context: Context) -> Any:
    """The resolved path; the run file's default if there is none."""
    return str(context.resolve(value)) if value else OMIT


def value_at(node: Any, key: str) -> Any:
    """The value at a dotted key, or `OMIT`."""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return OMIT
        node = node[part]
    return node


def set_path(document: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path; a tuple becomes a list, as in a run file."""
    *above, last = path.split(".")
    for part in above:
        document = document.setdefault(part, {})
    document[last] = list(value) if isinstance(value, tuple) else value


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
