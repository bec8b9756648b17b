"""The plots of one run, or of several runs: from the histories to `onewan.pages.plots.Plot`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onewan.pages.plots import Plot, Series, Values, curve, smoothing_width, thinned
from onewan.report.history import History
from onewan.report.steps import number

_GIGABYTE = 1e9
_BINS = 50
"""Of the histogram of timesteps."""
_LOSS_BINS = 25
_PART = 5
"""The loss by timestep is that of the first and of the last one of so many parts of the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What one curve of each plot is about: an expert of a run."""

    label: str
    color: str
    expert: str
    history: History
    mark: int = 0
    """Shape of the marks of its values."""
    dash: int = 0
    """Dashes of its lines, where color alone would tell it from others."""
    part: tuple[float, float] = (-math.inf, math.inf)
    """The first and the last step of the curves that have a value for each step."""

    def steps(self) -> Values:
        """The steps that have values."""
        return self.history.steps.of(self.expert)[self._chosen()]

    def values(self, column: str) -> Values:
        """Those of one of `onewan.report.steps.COLUMNS`, of each of these steps; NaN where there is
        none."""
        return self.history.steps.column(column, self.expert)[self._chosen()]

    def _chosen(self) -> slice:
        steps = self.history.steps.of(self.expert)
        low, high = (
            np.searchsorted(steps, self.part[0]),
            np.searchsorted(steps, self.part[1], "right"),
        )
        return slice(int(low), int(high))


def of_experts(history: History, part: tuple[float, float] = (-math.inf, math.inf)) -> list[Source]:
    """The experts of one run; with `part`, the first and the last step of their curves."""
    return [
        Source(
            label=expert_label(expert),
            color=expert if expert in ("high", "low", "single") else "other",
            expert=expert,
            history=history,
            mark=index % 3,
            part=part,
        )
        for index, expert in enumerate(history.experts)
    ]


def expert_label(expert: str) -> str:
    """An expert as people call it."""
    return "the model" if expert == "single" else f"{expert} expert"


def run_plots(
    history: History, part: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, list[Plot]]:
    """All plots of one run, by the parts of a page: "training", "timesteps" and "speed". `part` is
    the first and the last step of those that have a value for each step."""
    experts = of_experts(history, part)
    return {
        "training": step_plots(experts),
        "timesteps": timestep_plots(experts),
        "speed": speed_plots(experts, limits=_plan_limits(history)),
    }


def _plan_limits(history: History) -> dict[str, dict[str, float]]:
    """The lines of the plan in the plots of speed and memory."""
    overview, plan = history.latest.get("overview", {}), history.latest.get("plan", {})
    values = {
        "seconds": {"mean by the plan": number(overview.get("step_seconds"))},
        "memory": {
            "peak of the run by the plan": number(plan.get("device_peak")) / _GIGABYTE,
            "memory that may be used": number(plan.get("device_memory")) / _GIGABYTE,
        },
    }
    return {
        name: {label: value for label, value in lines.items() if value > 0}
        for name, lines in values.items()
    }


def step_plots(sources: Sequence[Source], name: str = "", *, bands: bool = True) -> list[Plot]:
    """The plots of the losses, the gradients and the learning rates of `sources`, of those that
    have values. `name` is added to their titles; with `bands`, curves that are smoothed have a band
    from the lowest to the highest value behind them."""
    longest = max((len(each.steps()) for each in sources), default=0)
    band = "the band goes from the lowest to the highest value, triangles are above it"
    smooth = "Each step." if smoothing_width(longest) == 1 else "Smoothed."
    if bands and smoothing_width(longest) > 1:
        smooth = f"{smooth[:-1]}; {band}."
    made = [
        _with_validation(
            _plot(sources, "loss", "Training loss", smooth, name=name, bands=bands, can_cap=True),
            sources,
            name,
        ),
        validation_plot(sources, name),
        _plot(
            sources,
            "preservation_loss",
            "Loss of kept predictions",
            f"Of the base model, for class words. {smooth}",
            name=name,
            bands=bands,
        ),
        _learning_rates(sources, name),
        _plot(
            sources,
            "grad_norm",
            "Gradient norm",
            f"Before clipping. {smooth}",
            name=name,
            bands=bands,
            can_cap=True,
        ),
    ]
    return [plot for plot in made if plot is not None]


def speed_plots(
    sources: Sequence[Source],
    name: str = "",
    *,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    bands: bool = True,
) -> list[Plot]:
    """Time and memory of each step; `limits` has lines for the plots "seconds" and "memory"."""
    lines = limits or {}
    made = [
        _plot(
            sources,
            "seconds",
            "Time of a step",
            "Without validation, saving and sampling.",
            name=name,
            bands=bands,
            can_cap=True,
            unit="s",
            from_zero=True,
            limits=lines.get("seconds", {}),
        ),
        _plot(
            sources,
            "step_memory_peak",
            "Peak of device memory",
            "Of each step.",
            name=name,
            bands=bands,
            scale=1 / _GIGABYTE,
            unit="GB",
            from_zero=True,
            can_log=False,
            limits=lines.get("memory", {}),
        ),
        _plot(
            sources,
            "tflops",
            "Speed",
            "Operations of the forward and backward passes; what is computed again does not count.",
            name=name,
            bands=bands,
            unit="TFLOP/s",
            from_zero=True,
        ),
    ]
    return [plot for plot in made if plot is not None]


def validation_plot(sources: Sequence[Source], name: str = "") -> Plot | None:
    """The losses on the validation clips, with those of moving averages and of the base model."""
    series, limits = list[Series](), dict[str, float]()
    for source in sources:
        for key, dash, what in (("loss", source.dash, ""), ("ema", 1, ", moving average")):
            series += _validations(source, key, what, dash)
        base = [number(event.get("base")) for event in _events(source)]
        base = [loss for loss in base if math.isfinite(loss)]
        if base and not name:
            limits[f"base model, {source.label}"] = base[0]
    if not series:
        return None
    held_out = {
        bool(event.get("held_out"))
        for each in sources
        for event in each.history.validations.values()
    }
    clips = "held-out clips" if held_out == {True} else "clips that are trained on"
    return Plot(
        name=_id("validation", name),
        title=f"Validation loss{name}",
        series=series,
        about=f"On {clips}, with the same noise and timesteps each time.",
        limits=limits if len(limits) < 3 else {},
    )


def _with_validation(plot: Plot | None, sources: Sequence[Source], name: str) -> Plot | None:
    """`plot`, that of the training losses, with the losses on the validation clips."""
    if plot is None:
        return None
    found = [
        series
        for source in sources
        for series in _validations(source, "loss", ", validation", (source.dash + 1) % 4)
    ]
    about = f"{plot.about} Marks are the validation." if found else plot.about
    # Of several plots for the experts one fits beside the other.
    return replace(plot, series=[*plot.series, *found], about=about, is_wide=not name)


def _events(source: Source) -> list[Mapping[str, Any]]:
    """The validations of `source`."""
    events = source.history.validations.items()
    return [event for (_, expert), event in events if expert == source.expert]


def _validations(source: Source, key: str, what: str, dash: int) -> Iterable[Series]:
    """The curve of one of the losses of the validations, if there is one."""
    known = [(event["step"], number(event.get(key))) for event in _events(source)]
    known = [
        (step, loss)
        for step, loss in known
        if math.isfinite(loss) and source.part[0] <= step <= source.part[1]
    ]
    if known:
        x, y = (np.array(values, np.float64) for values in zip(*known, strict=True))
        style: dict[str, Any] = {"dash": dash, "points": True, "mark": source.mark}
        yield thinned(f"{source.label}{what}", source.color, x, y, **style)


def timestep_plots(sources: Sequence[Source], name: str = "") -> list[Plot]:
    """How often each timestep was trained, and the loss by timestep."""
    drawn = [(source, source.history.steps.timesteps(source.expert)) for source in sources]
    drawn = [(source, values) for source, values in drawn if len(values[0])]
    if not drawn:
        return []
    edges = np.linspace(0, 1, _BINS + 1)
    histograms = [
        Series(
            label=source.label,
            color=source.color,
            x=(edges[:-1] + edges[1:]) / 2,
            y=np.histogram(t[np.isfinite(t)], edges)[0].astype(np.float64),
            bars=True,
        )
        for source, (t, _, _) in drawn
    ]
    losses = [
        part
        for source, (t, loss, step) in drawn
        for part in _losses_by_timestep(source, t, loss, step)
    ]
    made = [
        Plot(
            name=_id("timesteps", name),
            title=f"Timesteps that were trained{name}",
            about="Number of clips at each noise level t, from 0 (no noise) to 1 (noise alone).",
            series=histograms,
            x_label="timestep t",
            x_range=(0.0, 1.0),
            x_whole=False,
            from_zero=True,
            can_log=False,
        )
    ]
    if losses:
        made.append(
            Plot(
                name=_id("loss-by-timestep", name),
                title=f"Loss by timestep{name}",
                about=(
                    f"Mean loss of the first and of the last {_ordinal(_PART)} of the steps. The "
                    "loss of a clip is that of its step."
                ),
                series=losses,
                x_label="timestep t",
                x_range=(0.0, 1.0),
                x_whole=False,
            )
        )
    return made


def _losses_by_timestep(source: Source, t: Values, loss: Values, step: Values) -> Iterable[Series]:
    known = np.isfinite(t) & np.isfinite(loss)
    t, loss, step = t[known], loss[known], step[known]
    if len(t) < 2 * _PART:
        return
    edges = np.linspace(0, 1, _LOSS_BINS + 1)
    bins = np.clip(np.digitize(t, edges) - 1, 0, _LOSS_BINS - 1)
    first, last = np.quantile(step, 1 / _PART), np.quantile(step, 1 - 1 / _PART)
    for which, dash, chosen in (("first", 2, step <= first), ("last", 0, step >= last)):
        counts = np.bincount(bins[chosen], minlength=_LOSS_BINS)
        sums = np.bincount(bins[chosen], weights=loss[chosen], minlength=_LOSS_BINS)
        middles, filled = (edges[:-1] + edges[1:]) / 2, counts > 0
        yield Series(
            label=f"{source.label}, {which} {_ordinal(_PART)}",
            color=source.color,
            x=middles[filled],
            y=sums[filled] / counts[filled],
            dash=dash,
            points=True,
            mark=source.mark,
        )


def _ordinal(count: int) -> str:
    return {4: "quarter", 5: "fifth"}[count]


def _learning_rates(sources: Sequence[Source], name: str) -> Plot | None:
    series = list[Series]()
    for index, source in enumerate(sources):
        steps, rates = source.steps(), source.values("lr")
        if np.isfinite(rates).any():
            # Experts often have the same rates: the dashes let both be seen.
            dash = index % 4
            series.append(thinned(source.label, source.color, steps, rates, dash=dash))
        rates = source.values("embeddings_lr")
        if np.isfinite(rates).any():
            label = f"embeddings, {source.label}"
            color = source.color if name else "embeddings"
            series.append(thinned(label, color, steps, rates, dash=(index + 2) % 4))
    if not series:
        return None
    return Plot(
        name=_id("lr", name),
        title=f"Learning rate{name}",
        about="Of each step; where experts have the same, their lines lie over each other.",
        series=series,
        from_zero=True,
    )


def _plot(
    sources: Sequence[Source],
    column: str,
    title: str,
    about: str,
    *,
    name: str,
    bands: bool,
    scale: float = 1.0,
    **options: Any,
) -> Plot | None:
    """The plot of one column of the step tables; None if no step has a value."""
    series = [
        curve(
            source.label,
            source.color,
            source.steps(),
            values,
            dash=source.dash,
            band=bands,
        )
        for source in sources
        if np.isfinite(values := scale * source.values(column)).any()
    ]
    if not series:
        return None
    return Plot(
        name=_id(column.replace("_", "-"), name),
        title=f"{title}{name}",
        about=about,
        series=series,
        **options,
    )


def _id(what: str, name: str) -> str:
    """An id for a plot that no other of the page has."""
    return "-".join(["plot", what, *("".join(c if c.isalnum() else " " for c in name)).split()])
