"""What the page says of a run, as JSON values: its state and results, and its sample videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from onewan.arithmetic.durations import format_duration
from onewan.errors import OnewanError
from onewan.report.curves import expert_label
from onewan.report.parts import (
    STATE_STYLES,
    clips_text,
    made_at,
    memory_text,
    method_text,
    model_text,
    recent_loss,
    steps_text,
    time_text,
    validation_text,
)
from onewan.report.record import RunRecord
from onewan.report.samples import frames_per_second
from onewan.report.steps import number

_MOST_WARNINGS = 50


def summary_data(record: RunRecord, versions: Mapping[str, Any]) -> dict[str, Any]:
    """How a run stands; `versions` are those of the page's other answers."""
    history = record.history
    begin = history.processes[0].begin if history.processes else None
    facts = [model_text(record), method_text(record), f"started {made_at(begin)}" if begin else ""]
    planned = history.planned_steps
    return {
        "state": record.state,
        "style": STATE_STYLES[record.state],
        "saved": history.saved[-1] if history.saved else None,
        "facts": " · ".join(fact for fact in facts if fact),
        "progress": min(1.0, history.steps.last / planned) if planned else 0.0,
        "activity": _activity(record),
        "tiles": list(_tiles(record)),
        "problem": _problem(record),
        "gaps": list(record.gaps),
        "warnings": [
            f"{warning.text}{f' ({warning.count} times)' if warning.count > 1 else ''}"
            for warning in [*history.warnings.values()][-_MOST_WARNINGS:]
        ],
        "versions": versions,
    }


def _activity(record: RunRecord) -> str:
    """What a run does besides steps: "encoding clips, 3 of 20"."""
    event = record.history.last_event
    done, total = event.get("done"), event.get("total")
    if record.state != "running" or done is None or total is None:
        return ""
    what = event.get("what") or f"{event.get('event')} video {event.get('number', '')}"
    return f"{what}, {done} of {total}"


def _tiles(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """(name, value, more) of each result."""
    history = record.history
    yield "Steps", *steps_text(history)
    spent, step = time_text(history)
    if record.state == "running":
        left = number(history.last_event.get("seconds_left"))
        if not math.isfinite(left):
            left = number(history.latest.get("step", {}).get("seconds_left"))
        shown = format_duration(left) if math.isfinite(left) else "not known yet"
        yield "Time left", shown, f"{spent} so far" if history.seconds else ""
        yield "Time of a step", *_two(step)
    else:
        yield "Time", spent, step
    for expert in history.experts:
        loss, count = recent_loss(history, expert)
        name = expert_label(expert)
        value = f"{loss:.4f}" if math.isfinite(loss) else "none yet"
        more = [f"mean of the last {count:,} steps" if count else ""]
        found = [event for (_, who), event in history.validations.items() if who == expert]
        if found:
            validation, change = validation_text(found[-1])
            more.append(f"validation {validation}, {change}")
        yield f"Loss, {name}", value, "; ".join(part for part in more if part)
    if (memory := memory_text(history)) is not None:
        yield "Device memory", *memory
    yield "Clips", *clips_text(record)


def _two(step: str) -> tuple[str, str]:
    """The text about the time of a step, its first number apart."""
    value, _, more = step.partition(" a step ")
    return value or "not known yet", more


def _problem(record: RunRecord) -> dict[str, Any] | None:
    """Why a run ended that did not finish, and how it goes on."""
    history = record.history
    if record.state == "failed":
        return {"heading": "It failed", "lines": history.error.split("\n")}
    if record.state not in ("killed", "silent"):
        return None
    goes_on = (
        f"It can continue from the saved state of step {history.saved[-1]:,}."
        if history.saved
        else "It has no saved state, so it begins again where it is continued."
    )
    if record.state == "silent":  # this machine can't know, so its buttons begin nothing
        goes_on += f" If it has ended, continue it with: onewan train {record.layout.root} --resume"
    return {
        "heading": "It was killed" if record.state == "killed" else "It may have been killed",
        "lines": [f"{record.reason[:1].upper()}{record.reason[1:]}.", goes_on],
    }


def samples_data(record: RunRecord, address: Callable[[Path], str]) -> dict[str, Any]:
    """The sample videos of a run: its prompts, and of each video its step, the place of its prompt
    among these, and its address."""
    prompts: dict[tuple[str, int | None, bool], int] = {}
    videos = list[tuple[int, int, str]]()
    for sample in record.samples:
        key = (sample.prompt or f"prompt {sample.number}", sample.seed, sample.is_distilled)
        try:
            where = address(sample.path)
        except OnewanError:  # a folder that leads out of the runs
            continue
        videos.append((sample.step, prompts.setdefault(key, len(prompts)), where))
    width, height = (record.setting(f"sample.{side}") for side in ("width", "height"))
    sides = [side if isinstance(side, int) and side > 0 else None for side in (width, height)]
    return {
        "prompts": [
            {"text": prompt, "seed": seed, "distilled": is_distilled}
            for prompt, seed, is_distilled in prompts
        ],
        "videos": videos,
        "shape": sides if all(sides) else [832, 480],
        "fps": frames_per_second(record),
        "expected": bool(record.setting("sample.prompts")),
    }
