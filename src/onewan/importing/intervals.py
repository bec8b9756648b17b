"""OneTrainer's intervals, a number with a unit, in optimizer steps or minutes."""

from __future__ import annotations

from onewan.importing.table import Context
from onewan.onetrainer.settings import SettingError

_MINUTES = {"SECOND": 1 / 60, "MINUTE": 1.0, "HOUR": 60.0}


def steps(context: Context, key: str) -> int | None:
    """Optimizer steps; None for never and for times. OneTrainer counts micro-batches."""
    value, unit = context[key], str(context[f"{key}_unit"])
    match unit:
        case "EPOCH":
            return max(1, round(value * context.steps_per_epoch))
        case "STEP":
            return max(1, round(value / context["gradient_accumulation_steps"]))
        case "ALWAYS":
            return 1
        case "NEVER":
            return None
        case _ if unit in _MINUTES:
            return None
        case _:
            raise SettingError(f"has the unit {unit}, which is not known; select another unit")


def minutes(context: Context, key: str) -> float | None:
    """Minutes; None for intervals that are not times."""
    factor = _MINUTES.get(str(context[f"{key}_unit"]))
    return None if factor is None else float(context[key]) * factor


def report_time(context: Context, key: str, field: str) -> None:
    """A notice where an interval is a time and the run file takes steps."""
    if minutes(context, key) is not None and context.is_given(key):
        unit = str(context[f"{key}_unit"]).lower()
        context.notice(key, f"is {context[key]:g} {unit}s; onewan counts steps, so set {field}")
