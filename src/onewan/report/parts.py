"""What the report of one run and the comparison of several have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from statistics import median
from typing import Any

import numpy as np

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.doctor.finding import without_names
from onewan.pages import document
from onewan.pages.plots import Plot
from onewan.report.curves import expert_label
from onewan.report.history import History
from onewan.report.record import RunRecord
from onewan.report.steps import number
from onewan.runs.status import RunState
from onewan.variants import VARIANTS

STATE_STYLES: Mapping[RunState, str] = {
    "finished": "right",
    "failed": "wrong",
    "killed": "wrong",
    "silent": "wrong",
    "stopped": "plain",
    "running": "plain",
    "not started": "plain",
}
"""Classes of the style for the states of runs."""
_RECENT = 10
"""The mean loss at the end is that of the last steps divided by this."""


def text(content: object) -> str:
    """`content`, which may contain anything, as text of a page, without names of users."""
    return document.text(without_names(str(content)))


def list_of(lines: Iterable[str]) -> Iterator[str]:
    """Lines of text as a list."""
    yield "<ul>"
    yield from (f"<li>{text(line)}</li>" for line in lines)
    yield "</ul>"


def plots_section(name: str, heading: str, plots: Sequence[Plot], note: str = "") -> Iterator[str]:
    """A part of a page with plots beside each other."""
    yield f'<section id="{name}"><h2>{heading}</h2>'
    if note:
        yield f"<p>{note}</p>"
    yield '<div class="plots">'
    for plot in plots:
        yield from plot.html()
    yield "</div></section>"


def made_at(now: datetime) -> str:
    """When a page was made."""
    return f"{now.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def method_text(record: RunRecord) -> str:
    """What is trained and how: "lora of rank 32"."""
    kind, rank = record.setting("method.kind"), record.setting("method.rank")
    if kind is None:
        return ""
    return f"{kind} of rank {rank}" if rank is not None else str(kind).replace("_", " ")


def model_text(record: RunRecord) -> str:
    """The variant as people call it."""
    variant = record.setting("model.variant")
    return VARIANTS[variant].title if variant in VARIANTS else str(variant or "")


def steps_text(history: History) -> tuple[str, str]:
    """(steps that are done of those that are planned, those of each expert)."""
    done, planned = history.steps.last, history.planned_steps
    total = f"{done:,} of {planned:,}" if planned else f"{done:,}"
    counts = {name: len(history.steps.of(name)) for name in sorted(history.steps.experts)}
    each = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return total, each if len(counts) > 1 else ""


def time_text(history: History) -> tuple[str, str]:
    """(time of all processes, time of a step)."""
    seconds = history.steps.column("seconds")
    known = seconds[np.isfinite(seconds)]
    step = f"{format_duration(median(known.tolist()))} a step at the median" if len(known) else ""
    predicted = number(history.latest.get("overview", {}).get("step_seconds"))
    if math.isfinite(predicted) and step:
        step += f", {format_duration(predicted)} by the plan"
    return (format_duration(history.seconds) if history.seconds else "unknown"), step


def memory_text(history: History) -> tuple[str, str] | None:
    """(highest peak on the device, memory of the device and the plan's peak); None if nothing was
    measured, as on a CPU."""
    peaks = history.steps.column("step_memory_peak")
    peaks = peaks[np.isfinite(peaks)]
    plan = history.latest.get("plan", {})
    planned, limit = number(plan.get("device_peak")), number(plan.get("device_memory"))
    if not len(peaks):
        return None
    more = [
        f"of {format_bytes(limit)}" if math.isfinite(limit) else "",
        f"{format_bytes(planned)} by the plan" if math.isfinite(planned) else "",
    ]
    return format_bytes(float(peaks.max())), ", ".join(part for part in more if part)


def best_validation(history: History, expert: str) -> Mapping[str, Any] | None:
    """The validation with the lowest loss of the trained weights or of their moving average; that
    of the base model at step 0 is no result."""
    found = [
        event
        for (step, name), event in history.validations.items()
        if name == expert and step > 0 and math.isfinite(lowest_loss(event))
    ]
    return min(found, key=lowest_loss, default=None)


def lowest_loss(event: Mapping[str, Any]) -> float:
    losses = [number(event.get("loss")), number(event.get("ema"))]
    return min((loss for loss in losses if math.isfinite(loss)), default=math.nan)


def validation_text(event: Mapping[str, Any]) -> tuple[str, str]:
    """(loss, its change against the base model and its step)."""
    loss, base = lowest_loss(event), number(event.get("base"))
    change = f"{100 * (loss / base - 1):+.1f} % against the base model, " if base > 0 else ""
    return f"{loss:.4f}", f"{change}step {event['step']:,}"


def recent_loss(history: History, expert: str) -> tuple[float, int]:
    """(mean loss of the last tenth of the steps of `expert`, their number)."""
    losses = history.steps.column("loss", expert)
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return math.nan, 0
    count = max(1, len(losses) // _RECENT)
    return float(losses[-count:].mean()), count


def clips_text(record: RunRecord) -> tuple[str, str]:
    """(number of clips, how often each is seen)."""
    overview, data = (
        record.history.latest.get("overview", {}),
        record.history.latest.get("data", {}),
    )
    clips = data.get("clips", overview.get("clips"))
    if not isinstance(clips, int):
        return "unknown", "the data was not ready"
    seen = overview.get("seen")
    times = [number(value) for value in seen.values()] if isinstance(seen, Mapping) else []
    passes = ""
    if times and all(math.isfinite(value) for value in times):
        low, high = min(times), max(times)
        shown = [f"{each:,.0f}" if each >= 9.95 else f"{each:.2g}" for each in (low, high)]
        many = " to ".join(dict.fromkeys(shown))
        by = " by each expert" if len(times) > 1 else ""
        passes = f"each seen {many} times{by} in the whole run"
    return f"{clips:,}", passes


def results(record: RunRecord) -> dict[str, tuple[str, str]]:
    """The results of a run by their names, each as (value, more about it)."""
    history = record.history
    found = {"Steps": steps_text(history), "Time": time_text(history)}
    for expert in history.experts:
        who = "" if expert == "single" else f", {expert_label(expert)}"
        if (best := best_validation(history, expert)) is not None:
            found[f"Best validation loss{who}"] = validation_text(best)
        else:
            loss, count = recent_loss(history, expert)
            if count:
                found[f"Training loss{who}"] = (f"{loss:.4f}", f"mean of its last {count:,} steps")
    if (memory := memory_text(history)) is not None:
        found["Device memory"] = memory
    found["Clips"] = clips_text(record)
    return found
