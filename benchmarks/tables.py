"""The values of a figure (`figures.Figure`) as a table, in Markdown or as rows of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from figures import Figure, Value

NO_VALUE = "-"
MISSED = ", missed"
"""The end of a limit that is not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells of text."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: int
    """The first column of numbers, which are aligned to the right."""

    def markdown(self) -> str:
        lines = [
            f"| {' | '.join(self.titles)} |",
            "|" + " --- |" * self.numbers + " ---: |" * (len(self.titles) - self.numbers),
            *(f"| {' | '.join(row)} |" for row in self.rows),
        ]
        return "\n".join(lines)


def tables_of(figure: Figure) -> list[Table]:
    """The figure's values: a row for each case, and a column for each measure with what arithmetic
    says beside it; or, with `figure.across`, a column for each value of that key. Cases that are
    described by other keys have a table of their own."""
    kinds: dict[tuple[str, ...], list[Value]] = {}
    for value in figure.values:
        kinds.setdefault(tuple(value.case), []).append(value)
    parts = [replace(figure, values=tuple(values)) for values in kinds.values()]
    return [
        _pivot(part) if figure.across in part.values[0].case else _by_measure(part)
        for part in parts
    ]


def _by_measure(figure: Figure) -> Table:
    keys = _keys(figure)
    measures = list(dict.fromkeys(value.measure for value in figure.values))
    groups = _groups(figure, keys)
    titles, getters = [*keys], []
    for measure in measures:
        own = [value for value in figure.values if value.measure == measure]
        unit = f", {own[0].unit}" if own[0].unit and len({v.unit for v in own}) == 1 else ""
        units_differ = len({v.unit for v in own}) > 1
        titles.append(measure + unit)
        getters.append((measure, "value with unit" if units_differ else "value"))
        if any(value.expected is not None for value in own):
            titles.append(figure.arithmetic)
            getters.append((measure, "expected"))
        if any(value.ratio is not None for value in own):
            baselines = list(dict.fromkeys(value.baseline for value in own if value.baseline))
            titles.append(f"relative to {baselines[0]}" if len(baselines) == 1 else "ratio")
            getters.append((measure, "ratio"))
        if any(value.limit is not None for value in own):
            titles.append("limit")
            getters.append((measure, "limit"))
    rows = [
        (
            *(str(case_value) for case_value in case),
            *(_cell(values.get(measure), part) for measure, part in getters),
        )
        for case, values in groups.items()
    ]
    return Table(titles=tuple(titles), rows=tuple(rows), numbers=len(keys))


def _pivot(figure: Figure) -> Table:
    keys = [key for key in _keys(figure) if key != figure.across]
    columns = list(dict.fromkeys(str(value.case[figure.across]) for value in figure.values))
    measures = list(dict.fromkeys(value.measure for value in figure.values))
    rows: dict[tuple[str, ...], dict[str, Value]] = {}
    for value in figure.values:
        case = tuple(_shown(value.case.get(key)) for key in keys)
        if len(measures) > 1:
            case = (*case, f"{value.measure}, {value.unit}" if value.unit else value.measure)
        rows.setdefault(case, {})[str(value.case[figure.across])] = value
    titles = [*keys, *(["measured"] if len(measures) > 1 else []), *columns]
    cells = [
        (*case, *(_cell(found.get(column), "value") for column in columns))
        for case, found in rows.items()
    ]
    return Table(titles=tuple(titles), rows=tuple(cells), numbers=len(titles) - len(columns))


def _keys(figure: Figure) -> list[str]:
    return list(dict.fromkeys(key for value in figure.values for key in value.case))


def _groups(figure: Figure, keys: Sequence[str]) -> dict[tuple[str, ...], dict[str, Value]]:
    groups: dict[tuple[str, ...], dict[str, Value]] = {}
    for value in figure.values:
        case = tuple(_shown(value.case.get(key)) for key in keys)
        groups.setdefault(case, {})[value.measure] = value
    return groups


def _shown(part: str | float | None) -> str:
    if part is None:
        return NO_VALUE
    return f"{part:,}" if isinstance(part, int) else str(part)


def _cell(value: Value | None, part: str) -> str:
    if value is None:
        return NO_VALUE
    if part == "limit":
        if value.limit is None:
            return NO_VALUE
        bound = "at least" if value.at_least else "at most"
        return f"{bound} {value.limit:g}" + ("" if value.keeps_limit else MISSED)
    if not value.repeats:
        return value.reason if part.startswith("value") else NO_VALUE
    if part == "expected":
        return NO_VALUE if value.expected is None else number(value.expected)
    if part == "ratio":
        return NO_VALUE if value.ratio is None else number(value.ratio)
    text = number(value.median)
    if len(value.repeats) > 1:
        text += f" ({number(min(value.repeats))} to {number(max(value.repeats))})"
    return f"{text} {value.unit}".strip() if part == "value with unit" else text


def number(value: float) -> str:
    """About three digits, and no exponent where a person would write none."""
    size = abs(value)
    if size == 0:
        return "0"
    if not 1e-3 <= size < 1e9:
        return f"{value:.2e}"
    if value == int(value) and size >= 10:
        return f"{value:,.0f}"
    digits = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 0.1 else 4
    return f"{value:,.{digits}f}"
