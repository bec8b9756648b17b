"""The charts of a figure (`figures.Figure`) as SVG.

Each says what it shows, in which unit, and on which machine. Bars and lines begin at zero. Black
marks are what arithmetic says, and thin lines go from the least repeat to the largest. Charts are
narrow, with the names of bars above them, so that a phone shows them without scrolling.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from figures import CaseValue, Chart, Figure, Value
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tables import number

COLORS: tuple[str, ...] = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#999999",
    "#F0E442",
)
"""Okabe and Ito's, which people with any color vision can tell apart."""
INK = "#222222"
WIDTH = 5.6
"""Inches."""
LINE = 0.17
"""Inches from one line of text to the next."""
LETTERS = 74
"""Of a line of text that is as wide as a chart."""

_ROOM_FOR_NUMBER = 0.14
"""Of a chart's width, that the number at a bar takes."""

_STYLE = {
    "font.size": 9.0,
    "svg.fonttype": "none",  # letters stay letters, which can be searched and read aloud
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


def draw(figure: Figure) -> list[str]:
    """The charts of `figure`, each a whole SVG document."""
    return [_svg(figure, chart, index) for index, chart in enumerate(figure.charts)]


def _svg(figure: Figure, chart: Chart, index: int) -> str:
    values = [
        value
        for value in figure.values
        if value.measure == chart.measure
        and value.repeats
        and all(value.case.get(key) == part for key, part in chart.only.items())
    ]
    if not values:
        raise ValueError(f"{figure.name}: no value is a {chart.measure!r}, so nothing is drawn")
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": f"{figure.name}-{index}"}
    with mpl.rc_context(style):
        drawn = _lines if chart.kind == "lines" else _bars
        canvas, marks = drawn(figure, chart, values)
        title = chart.title or figure.title
        _finish(canvas, figure, title, marks, values)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _series(chart: Chart, values: Sequence[Value]) -> list[CaseValue]:
    """The names of the colors, in the order of the values."""
    return list(dict.fromkeys(value.case.get(chart.series, "") for value in values))


def _label(value: Value, keys: Sequence[str]) -> str:
    """The case in words: numbers have the name of what they count."""
    parts = [(key, value.case.get(key)) for key in keys]
    return ", ".join(
        part if isinstance(part, str) else f"{key} {part:,}"
        for key, part in parts
        if part not in ("", None)
    )


def _telling_keys(chart: Chart, values: Sequence[Value]) -> list[str]:
    """The keys that distinguish the groups of bars: without those that follow from keys before."""
    keys = [
        key for key in dict.fromkeys(key for v in values for key in v.case) if key != chart.series
    ]
    chosen: list[str] = []
    for key in keys:
        before = [tuple(str(value.case.get(k)) for k in chosen) for value in values]
        with_it = [
            (*one, str(value.case.get(key))) for one, value in zip(before, values, strict=True)
        ]
        if len(set(with_it)) > len(set(before)):
            chosen.append(key)
    return chosen


def _bars(
    figure: Figure, chart: Chart, values: Sequence[Value]
) -> tuple[Canvas, list[Line2D | Patch]]:
    """Horizontal bars, those of a case together below its name."""
    series = _series(chart, values)
    colors = dict(zip(series, _cycle(), strict=False))
    keys = _telling_keys(chart, values)
    groups: dict[str, list[Value]] = {}
    for value in values:
        groups.setdefault(_label(value, keys), []).append(value)
    names = {name: textwrap.wrap(name, LETTERS) for name in groups}
    lines = sum(len(names[name]) + len(group) + 0.5 for name, group in groups.items())
    canvas = Canvas(figsize=(WIDTH, lines * LINE + 1.5))
    axes = canvas.add_axes((0, 0, 1, 1))
    largest = max(max((*value.repeats, value.expected or 0)) for value in values) or 1.0
    y = 0.0
    for name, group in groups.items():
        for line in names[name]:
            axes.text(0, y + 0.5, line, va="center", ha="left")
            y += 1
        for value in group:
            _bar(axes, value, y + 0.5, colors[value.case.get(chart.series, "")], largest)
            y += 1
        y += 0.5
    axes.set_ylim(y, 0)
    axes.set_xlim(0, largest * 1.18)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(_unit(values[0]))
    axes.xaxis.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    marks: list[Line2D | Patch] = [
        Patch(color=colors[name], label=str(name)) for name in series if name != ""
    ]
    return canvas, marks + list(_legend_of_arithmetic(figure, values, "|"))


def _bar(axes: Axes, value: Value, y: float, color: str, largest: float) -> None:
    axes.barh(y, value.median, height=0.78, color=color)
    end = value.median
    if len(value.repeats) > 1:
        axes.plot([min(value.repeats), max(value.repeats)], [y, y], color=INK, linewidth=0.8)
        end = max(end, *value.repeats)
    if value.expected is not None:
        axes.plot([value.expected] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.8)
        if value.expected < end + largest * _ROOM_FOR_NUMBER:
            end = max(end, value.expected)
    text = number(value.median)
    if value.ratio is not None:
        text += f" ({number(value.ratio)}x)"
    axes.text(end + largest * 0.015, y, text, va="center", ha="left", fontsize=8)


def _lines(
    figure: Figure, chart: Chart, values: Sequence[Value]
) -> tuple[Canvas, list[Line2D | Patch]]:
    """A line for each series; what arithmetic says is dashed."""
    canvas = Canvas(figsize=(WIDTH, 4.0))
    axes = canvas.add_axes((0, 0, 1, 1))
    marks: list[Line2D | Patch] = []
    for name, color in zip(_series(chart, values), _cycle(), strict=False):
        points = sorted(
            (value for value in values if value.case.get(chart.series, "") == name),
            key=lambda value: float(value.case[chart.x]),
        )
        x = [float(value.case[chart.x]) for value in points]
        axes.plot(x, [value.median for value in points], color=color, marker="o", markersize=4)
        for place, value in zip(x, points, strict=True):
            if len(value.repeats) > 1:
                ends = [min(value.repeats), max(value.repeats)]
                axes.plot([place] * 2, ends, color=color, linewidth=0.8)
        told = [value.expected for value in points if value.expected is not None]
        if len(told) == len(points):
            axes.plot(x, told, color=color, linestyle="--")
        if name != "":
            marks.append(Line2D([], [], color=color, marker="o", markersize=4, label=str(name)))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xticks(sorted({float(value.case[chart.x]) for value in values}))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel(chart.x)
    axes.set_ylabel(_unit(values[0]))
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    return canvas, marks + list(_legend_of_arithmetic(figure, values, "--"))


def _legend_of_arithmetic(figure: Figure, values: Sequence[Value], how: str) -> Iterator[Line2D]:
    if any(value.expected is not None for value in values):
        if how == "--":
            yield Line2D([], [], color="black", linestyle=how, label=figure.arithmetic)
        else:
            mark = {"marker": how, "markersize": 10, "markeredgewidth": 1.8, "linestyle": "none"}
            yield Line2D([], [], color="black", label=figure.arithmetic, **mark)


def _finish(
    canvas: Canvas,
    figure: Figure,
    title: str,
    marks: Sequence[Line2D | Patch],
    values: Sequence[Value],
) -> None:
    """The title above the chart with its legend, and the machine below it."""
    height = canvas.get_figheight()
    headings = textwrap.wrap(title, 58)
    rows = _rows_of_legend(marks)
    top = 0.12 + 0.2 * len(headings) + 0.2 * rows + 0.1
    canvas.set_figheight(height := height + top - 0.6)
    axes = canvas.axes[0]
    left = 0.12 if not axes.get_ylabel() else 0.62
    axes.set_position(
        (left / WIDTH, 0.75 / height, (WIDTH - left - 0.12) / WIDTH, 1 - (0.75 + top) / height)
    )
    text = "\n".join(headings)
    canvas.text(0.12 / WIDTH, 1 - 0.1 / height, text, va="top", fontsize=10.5, fontweight="bold")
    if marks:
        canvas.legend(
            handles=list(marks), loc="upper left", frameon=False, fontsize=8.5, handlelength=1.4,
            bbox_to_anchor=(0.06 / WIDTH, 1 - (0.12 + 0.2 * len(headings)) / height),
            ncols=-(-len(marks) // rows), borderaxespad=0, columnspacing=1.2, labelspacing=0.3,
        )  # fmt: skip
    below = f"{figure.machine.title}, {figure.date[:10]}"
    baselines = {value.baseline for value in values if value.ratio is not None}
    if baselines:
        below += f"; in brackets: relative to {', '.join(sorted(baselines))}"
    below = "\n".join(textwrap.wrap(below, 90))
    canvas.text(0.12 / WIDTH, 0.1 / height, below, va="bottom", fontsize=7.5, color="#555555")


def _rows_of_legend(marks: Sequence[Line2D | Patch]) -> int:
    """Lines of text that the legend takes: it has columns of the width of its longest label."""
    if not marks:
        return 0
    longest = max(len(str(mark.get_label())) for mark in marks) + 6
    columns = max(1, min(len(marks), 84 // longest))
    return -(-len(marks) // columns)


def _unit(value: Value) -> str:
    return f"{value.measure}, {value.unit}" if value.unit else value.measure


def _cycle() -> list[str]:
    return list(COLORS) * 4
