"""The command `onewan inspect`: weights, the folder of a run, videos and images. Needs no torch."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onewan.checkpoint.inspect import inspect
from onewan.cli.output import say, write
from onewan.config.load import RESOLVED_NAME, load_run
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError
from onewan.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension, probe
from onewan.runs.event_file import read_events
from onewan.runs.exports import best_weights, exported_weights
from onewan.runs.layout import RunLayout

_MEAN_OF = 10
"""Steps of an expert whose losses are averaged: that of a single step says little."""


def inspect_path(path: Path, *, as_json: bool, show_all: bool) -> int:
    """Print what is at `path`; returns the exit status."""
    if (path / RESOLVED_NAME).is_file():
        return _print(path, "run", *_run(path), as_json=as_json)
    if extension(path) in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not path.is_dir():
        return _print(path, "media", *_media(path), as_json=as_json)
    report = inspect(path)
    if as_json:
        write(json.dumps(report.as_json(), indent=2))
    elif report.kind == "unreadable":
        raise CheckpointError(f"{report.path}: {report.summary}")
    else:
        for line in report.lines(show_all=show_all):
            say(line)
    return 1 if report.kind == "unreadable" else 0


def _print(path: Path, kind: str, summary: str, rows: Mapping[str, str], *, as_json: bool) -> int:
    if as_json:
        write(json.dumps({"path": str(path), "kind": kind, "summary": summary, **rows}, indent=2))
        return 0
    say(f"{path}: {summary}")
    for label, text in rows.items():
        say(f"  {label:<12} {text}")
    return 0


def _media(path: Path) -> tuple[str, dict[str, str]]:
    """(what it is, what its header says) of a video or an image; DataError if it can't be read."""
    info = probe(path)
    width, height = info.shown_size
    rows = {"size": f"{width}x{height}"}
    if info.kind == "video" and info.frame_interval:
        fps = 1 / info.frame_interval
        frames, seconds = info.frames_at(fps), info.last - info.start + info.frame_interval
        rows["length"] = f"{frames} frames, {fps:.4g} fps, {seconds:.2f} s"
    if info.notes:
        rows["notes"] = "; ".join(info.notes)
    article = "an" if info.kind == "image" else "a"
    return f"{article} {info.kind} ({info.codec})", rows


def _run(folder: Path) -> tuple[str, dict[str, str]]:
    """(what the run trains, how far it is and how to go on)."""
    config, layout = load_run(folder), RunLayout(folder)
    losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_MEAN_OF))
    validations: dict[str, dict[str, Any]] = {}
    done, last = 0, None
    for event in read_events(layout.events):
        last = event
        if event["event"] == "step":
            done = event["step"]
            if event["loss"] is not None:
                losses[event["expert"]].append(event["loss"])
        elif event["event"] == "validation":
            validations[event["expert"]] = event
    state = "not started" if last is None else f"last event: {last['event']}, {last['time']}"
    means = (f"{name} {sum(values) / len(values):.4f}" for name, values in losses.items())
    rows = {
        "steps": f"{done} of {config.train.steps} ({state})",
        "loss": f"{', '.join(means)} (mean of {_MEAN_OF} steps)" if losses else "none yet",
        "validation": ", ".join(map(_validation, validations.values())),
        "weights": _weights(config, layout),
        "go on with": _next_command(config, layout, done),
        "use it": f"onewan sample {folder}",
    }
    summary = f"a run of {config.model.facts().title}, {config.method.kind}"
    return summary, {label: text for label, text in rows.items() if text}


def _validation(event: Mapping[str, Any]) -> str:
    loss, base = event["loss"], event["base"]
    if loss is None:
        return f"{event['expert']} not finite"
    change = f", {100 * (loss / base - 1):+.1f} % against the base model" if base else ""
    return f"{event['expert']} {loss:.4f} (step {event['step']}{change})"


def _weights(config: ResolvedRun, layout: RunLayout) -> str:
    steps = exported_weights(config, layout)
    if not steps:
        return "none yet"
    names = ", ".join(path.name for path in steps[max(steps)].files.values())
    best = best_weights(config, layout)
    more = "" if best is None else f"; best: {', '.join(p.name for p in best.files.values())}"
    return f"newest: {names}{more}"


def _next_command(config: ResolvedRun, layout: RunLayout, done: int) -> str:
    if not layout.saved_steps():
        return f"onewan train {layout.root}"
    more = f" train.steps={2 * done}    # more steps" if done >= config.train.steps else ""
    return f"onewan train {layout.root} --resume{more}"
