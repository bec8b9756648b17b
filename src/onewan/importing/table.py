"""Rows that turn OneTrainer's keys into run-file fields, and the account of every key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from onewan.documents import format_value
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
    least: float | None = None
    """The smallest number that other converters can use."""


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
    may_read: Callable[[Path], object] = lambda _: None
    """Called with each other file that the config names, before it is read; raises to refuse it."""
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

    def has_wrong_values(self) -> bool:
        """Whether values can't be converted; each of them becomes a problem."""
        wrong = list(wrong_values(self.rows.values(), self.given))
        for key, text in wrong:
            self.problem(key, text)
        return bool(wrong)

    def resolve(self, value: Any) -> Path:
        """A path of the config; backslashes of a config from Windows become slashes."""
        text = str(value)
        # A file on Linux may have a backslash in its name, so an existing path is kept.
        return self.root / (text if exists(self.root / text) else text.replace("\\", "/"))

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
        except (TypeError, ValueError, ArithmeticError, OnewanError) as error:
            reason = " ".join(str(error).split())
            context.problem(row.key, f"is {format_value(value)}: {reason}")
        else:
            if converted is not OMIT:
                set_path(document, row.field, converted)
    return document


_NULLABLE = (
    *("clip_grad_norm", "cache_dir", "token_count"),
    *("frames", "diffusion_steps", "cfg_scale"),  # of a sample
)
"""Keys with a default that may be null in OneTrainer's config; so may all whose default is null."""

_LONGEST = 10_000
"""Characters; no path or prompt has more."""

_LARGEST = 1e15
"""No setting has numbers beyond it, and whole numbers beyond it are inexact as floats."""


def wrong_values(rows: Iterable[Row], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, problem) of each value in `given` that is not of the type of its row's default, or out
    of the range in which others can be computed from it."""
    sections: dict[str, None] = {}
    for row in rows:
        section, _, _ = row.key.rpartition(".")
        if section and section in given and not isinstance(given[section], Mapping):
            sections[section] = None
        value = value_at(given, row.key)
        if value is not OMIT and (problem := _wrong_value(row, value)):
            yield row.key, f"is {format_value(value)}; {problem}"
    for section in sections:
        yield section, f"is {format_value(given[section])}; give an object"


def _wrong_value(row: Row, value: Any) -> str | None:
    if value is None:
        is_nullable = row.default is None or row.key in _NULLABLE
        return None if is_nullable else "remove the key for the default, or give a value"
    if isinstance(value, (list, dict)):
        return "give a single value"
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"give at most {_LONGEST} characters"
    if isinstance(value, float | int) and abs(value) > _LARGEST:
        return "give a smaller number"
    match row.default:
        case bool():
            return None if isinstance(value, bool) else "give true or false"
        case int() | float():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return "give a number"
            if isinstance(row.default, int) and value != int(value):
                return "give a whole number"
            if row.least is not None and value < row.least:
                return f"give {row.least:g} or more"
        case str() if isinstance(value, bool):
            return "give text"
    return None


def enabled_items(
    items: Iterable[dict[str, Any]], rows: Iterable[Row], name: str, context: Context
) -> Iterator[Context]:
    """A context for each item of the list `name` that is enabled; others are accounted for."""
    by_key = {row.key: row for row in rows}
    for number, given in enumerate(items):
        item = replace(context, given=given, rows=by_key, prefix=f"{name}.{number}.")
        if item.has_wrong_values():
            continue
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


def exists(path: Path) -> bool:
    """Whether there is something at `path`; False for one that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a NUL in it
        return False


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all leaves, such as an empty mapping and a list without mappings."""
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}{key}.")
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        for number, value in enumerate(node):
            yield from flatten(value, f"{prefix}{number}.")
    else:
        yield prefix[:-1], node
