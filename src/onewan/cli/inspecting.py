"""The command `onewan inspect`: weights, the folder of a run, videos and images. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onewan.checkpoint.inspect import inspect
from onewan.cli.output import say, write_json
from onewan.config.load import RESOLVED_NAME, load_run
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError
from onewan.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, describe, extension
from onewan.runs.exports import best_weights, exported_weights
from onewan.runs.layout import RunLayout
from onewan.runs.status import MEAN_OF, read_status
from onewan.runs.status_text import losses_text, validations_text


def inspect_path(path: Path, *, as_json: bool, show_all: bool) -> int:
    """Print what is at `path`; returns the exit status."""
    if (path / RESOLVED_NAME).is_file():
        return _print(path, "run", *_run(path), as_json=as_json)
    if extension(path) in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not path.is_dir():
        return _print(path, "media", *describe(path), as_json=as_json)
    report = inspect(path)
    if as_json:
        write_json(report.as_json())
    elif report.kind == "unreadable":
        raise CheckpointError(f"{report.path}: {report.summary}")
    else:
        for line in report.lines(show_all=show_all):
            say(line)
    return 1 if report.kind == "unreadable" else 0


def _print(path: Path, kind: str, summary: str, rows: Mapping[str, str], *, as_json: bool) -> int:
    if as_json:
        write_json({"path": str(path), "kind": kind, "summary": summary, **rows})
        return 0
    say(f"{path}: {summary}")
    for label, text in rows.items():
        say(f"  {label:<12} {text}")
    return 0


def _run(folder: Path) -> tuple[str, dict[str, str]]:
    """(what the run trains, how far it is and how to go on)."""
    config, layout, status = load_run(folder), RunLayout(folder), read_status(folder)
    losses = losses_text({name: expert.loss for name, expert in status.experts.items()})
    reason = f": {status.reason}" if status.reason else ""
    updated = "" if status.updated is None else f", {status.updated.astimezone():%Y-%m-%d %H:%M}"
    rows = {
        "steps": f"{status.step} of {config.train.steps} ({status.state}{reason}{updated})",
        "loss": f"{losses} (mean of {MEAN_OF} steps)" if losses else "none yet",
        "validation": validations_text(
            {name: expert.validation for name, expert in status.experts.items()}
        ),
        "weights": _weights(config, layout),
        "go on with": _next_command(config, layout, status.step),
        "use it": f"onewan sample {folder}",
    }
    summary = f"a run of {config.model.facts().title}, {config.method.kind}"
    return summary, {label: text for label, text in rows.items() if text}


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
