"""Plots: their numbers for ``plots.js``, which draws them, and their text alternatives.

A plot of many values has a few buckets of them: the smoothed curve, and from the lowest to the
highest value of each bucket, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onewan.pages.document import text

Values = NDArray[np.float64]

BUCKETS = 800
"""Points of a curve, at most; a screen has not many more pixels."""
_SMOOTHED = 20
"""A curve is smoothed over its length divided by this."""
_TABLE_ROWS = 10
_DIGITS = 5
"""Significant digits of a value in the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve, or one histogram, of a plot."""

    label: str
    color: str
    """Name of a color of ``plots.css``: an expert's, or "run0", "run1", ..."""
    x: Values
    """Ascending."""
    y: Values
    """NaN where there is no value."""
    lowest: Values | None = None
    """With `highest` a band behind the curve."""
    highest: Values | None = None
    means: Values | None = None
    """Of a curve that is smoothed: the mean of each of its parts, which `y` smooths."""
    smoothing: tuple[float, int] | None = None
    """Of such a curve: over how many parts, and over how many values, `y` is smoothed."""
    dash: int = 0
    """0 is a full line, 1 to 3 are kinds of dashes."""
    points: bool = False
    """Whether each value has a mark."""
    mark: int = 0
    """Shape of the marks, 0 to 2."""
    bars: bool = False
    """Whether it is a histogram; `x` are the middles of its equal bins."""

    def as_data(self) -> dict[str, Any]:
        """What ``plots.js`` draws, which smooths `means` itself."""
        return {
            "label": self.label,
            "color": self.color,
            "x": _json(self.x, 9),
            "y": _json(self.y if self.means is None else self.means),
            "smoothing": self.smoothing,
            "lo": None if self.lowest is None else _json(self.lowest),
            "hi": None if self.highest is None else _json(self.highest),
            "dash": self.dash,
            "points": self.points,
            "mark": self.mark,
            "bars": self.bars,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Curves with common axes."""

    name: str
    """Id of its element."""
    title: str
    series: Sequence[Series]
    """At least one, and none without values."""
    about: str = ""
    """A line below the title: what is shown, and how it was computed."""
    x_label: str = "step"
    x_range: tuple[float, float] | None = None
    """None is that of the values."""
    x_whole: bool = True
    """Whether values between whole numbers have no meaning."""
    unit: str = ""
    log: bool = False
    """Whether the vertical axis is logarithmic at first."""
    can_log: bool = True
    from_zero: bool = False
    can_cap: bool = False
    """Whether the axis leaves a few very high values out at first, with a mark for each."""
    limits: Mapping[str, float] = field(default_factory=dict[str, float])
    """Horizontal lines to compare with, by their labels."""
    is_wide: bool = False

    def as_data(self) -> dict[str, Any]:
        """What ``plots.js`` draws."""
        return {
            "x": {"label": self.x_label, "range": self.x_range, "whole": self.x_whole},
            "y": {"unit": self.unit},
            "log": self.log,
            "can_log": self.can_log,
            "zero": self.from_zero,
            "cap": self.can_cap,
            "limits": [{"label": name, "y": value} for name, value in self.limits.items()],
            "series": [series.as_data() for series in self.series],
        }

    def as_figure(self) -> dict[str, Any]:
        """What ``plots.js`` makes a figure of, where the page does not have that of `html`."""
        return {
            **self.as_data(),
            "title": self.title,
            "wide": self.is_wide,
            "about": self.about,
            "summary": self._summary(),
        }

    def html(self) -> Iterator[str]:
        """The figure, without the drawing, and with a table of some of its values."""
        kind = "plot whole" if self.is_wide else "plot"
        yield f'<figure class="{kind}" id="{self.name}" data-summary="{text(self._summary())}">'
        yield f"<figcaption><h3>{text(self.title)}</h3></figcaption>"
        yield f'<p class="about">{text(self.about)}</p>'
        yield "<noscript><p>The drawing needs JavaScript; the numbers are below.</p></noscript>"
        yield "<details><summary>Numbers</summary>"
        yield from self._table()
        yield "</details></figure>"

    def _summary(self) -> str:
        """The drawing in words."""
        return f"{self.title}: {'; '.join(map(self._series_summary, self.series))}"

    def _series_summary(self, series: Series) -> str:
        known = np.flatnonzero(np.isfinite(series.y))
        if series.bars or not len(known):
            return f"{series.label}, a histogram of {len(known)} bins"
        first, last = known[0], known[-1]
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{series.label} from {series.y[first]:.4g}{unit} at {self.x_label} "
            f"{series.x[first]:,g} to {series.y[last]:.4g}{unit} at {series.x[last]:,g}"
        )

    def _table(self) -> Iterator[str]:
        unit = f", {self.unit}" if self.unit else ""
        yield '<div class="wide"><table><thead><tr>'
        yield f'<th scope="col">{text(self.x_label)}'
        yield from (f'<th scope="col">{text(each.label)}{unit}' for each in self.series)
        yield "</thead>"
        every = np.unique(np.concatenate([series.x for series in self.series]))
        count = min(_TABLE_ROWS, len(every))
        for x in every[np.linspace(0, len(every) - 1, count).astype(int)]:
            yield f'<tr><th scope="row">{x:,.9g}'
            for series in self.series:
                value = (
                    series.y[int(np.argmin(np.abs(series.x - x)))] if len(series.x) else math.nan
                )
                yield f"<td>{f'{value:,.4g}' if math.isfinite(value) else ''}"
        yield "</table></div>"


def curve(
    label: str, color: str, x: Values, y: Values, *, band: bool = True, dash: int = 0
) -> Series:
    """A series of any number of values: smoothed, in at most `BUCKETS` points, with a `band` from
    the lowest to the highest value of each."""
    count = min(BUCKETS, len(x))
    starts = np.linspace(0, len(x), count, endpoint=False).astype(int)
    ends = np.append(starts[1:], len(x)) - 1
    width = smoothing_width(len(y))
    known = np.add.reduceat(np.isfinite(y).astype(np.float64), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.add.reduceat(np.nan_to_num(y, posinf=0, neginf=0), starts) / known
    return Series(
        label=label,
        color=color,
        x=x[ends],
        y=smoothed(y, width)[ends],
        means=means,
        smoothing=(round(width * count / len(x), 3), width) if width > 1 else None,
        # `fmin` and `fmax` leave out NaN.
        lowest=np.fmin.reduceat(y, starts) if band else None,
        highest=np.fmax.reduceat(y, starts) if band else None,
        dash=dash,
    )


def thinned(label: str, color: str, x: Values, y: Values, **style: Any) -> Series:
    """A series of values that are not smoothed: those where it changes most are kept."""
    if len(x) <= BUCKETS:
        return Series(label=label, color=color, x=x, y=y, **style)
    # The first, the lowest and the highest value of each bucket, in their order.
    chosen = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), BUCKETS // 3):
        known = bucket[np.isfinite(y[bucket])]
        if len(known):
            chosen |= {int(known[0]), int(known[y[known].argmin()]), int(known[y[known].argmax()])}
    kept = np.array(sorted(chosen))
    return Series(label=label, color=color, x=x[kept], y=y[kept], **style)


def smoothing_width(count: int) -> int:
    """Over how many of `count` values a curve is smoothed."""
    return max(1, min(1000, count // _SMOOTHED))


def smoothed(y: Values, width: int) -> Values:
    """The mean of the `width` values around each one, fewer at the ends; those that are NaN do not
    count."""
    known = np.isfinite(y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    index = np.arange(len(y))
    low, high = np.maximum(0, index - width // 2), np.minimum(len(y), index + (width + 1) // 2)
    number = counts[high] - counts[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(number > 0, (sums[high] - sums[low]) / number, np.nan)


def _json(values: Values, digits: int = _DIGITS) -> list[float | int | None]:
    """`values` with few digits, whole ones as such, and null for those that JSON does not have."""
    rounded = (float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values)
    return [int(v) if v is not None and v.is_integer() and abs(v) < 2**53 else v for v in rounded]
