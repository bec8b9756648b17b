"""The comparison of runs: results, settings that differ, curves and samples side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from onewan.documents import leaf_values
from onewan.errors import ConfigError, OnewanError
from onewan.files import replacing
from onewan.pages import document
from onewan.pages.plots import Plot
from onewan.report.curves import Source, expert_label, speed_plots, step_plots, timestep_plots
from onewan.report.page import SCRIPTS, STYLES, plots_data
from onewan.report.parts import (
    made_at,
    method_text,
    model_text,
    plots_section,
    results,
    text,
)
from onewan.report.record import RunRecord, read_record
from onewan.report.samples import compared_samples
from onewan.report.videos import VideoChoice

MOST_RUNS = 6
"""Runs of one page; it has a color for each of so many."""
_NOT_COMPARED = ("output.dir", "output.name", "schema_version")
"""Settings in which any two runs differ."""


def write_comparison(folders: Sequence[Path], out: Path, choice: VideoChoice | None = None) -> Path:
    """Write the page that compares the runs in `folders` to `out`; returns its path.

    ConfigError, with a line for each, for folders that are none of runs or that can't be compared;
    OSError if the page can't be written.
    """
    page = comparison_page(_records(folders), out.parent, choice or VideoChoice())
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return out


def _records(folders: Sequence[Path]) -> list[RunRecord]:
    problems, records = list[str](), list[RunRecord]()
    if len(folders) > MOST_RUNS:
        problems.append(f"{len(folders)} runs are too many for one page; give {MOST_RUNS} at most")
    twice = {folder for folder in folders if folders.count(folder) > 1}
    problems += [f"{folder}: is given twice; name two runs" for folder in sorted(twice)]
    for folder in dict.fromkeys(folders):
        try:
            record = read_record(folder)
        except OnewanError as error:
            problems.append(error.message)
            continue
        if not len(record.history.steps) and not record.history.validations:
            problems.append(f"{folder}: has no step yet; compare it when it has")
        records.append(record)
    if problems:
        raise ConfigError("compare", problems)
    return records


def comparison_page(records: Sequence[RunRecord], folder: Path, choice: VideoChoice) -> str:
    """The page about `records`, for a file in `folder`, in UTF-8."""
    names = _names(records)
    training, speed, levels = list[list[Plot]](), list[list[Plot]](), list[list[Plot]]()
    experts = sorted({expert for record in records for expert in record.history.experts})
    for expert in experts:
        sources = [
            Source(
                label=name,
                color=f"run{index}",
                expert=expert,
                history=record.history,
                mark=index % 3,
                dash=index % 4,
            )
            for index, (name, record) in enumerate(zip(names, records, strict=True))
            if expert in record.history.experts
        ]
        of = f", {expert_label(expert)}" if len(experts) > 1 or expert != "single" else ""
        training.append(step_plots(sources, of, bands=False))
        speed.append(speed_plots(sources, of, bands=False))
        levels.append(timestep_plots(sources, of))
    sections = {
        "training": ("Training", _by_kind(training)),
        "timesteps": ("Noise levels", _by_kind(levels)),
        "speed": ("Speed and memory", _by_kind(speed)),
    }
    title = " and ".join(names) if len(names) == 2 else f"{len(names)} runs"
    body = [
        f'<div class="head"><h1>{text(title)} compared</h1></div>',
        f'<p class="facts">page of {made_at(datetime.now(timezone.utc))}</p>',
        *_navigation(),
        *_results(records, names),
        *_settings(records, names),
        *plots_section("training", *sections["training"]),
        *compared_samples(records, names, folder, choice),
        *plots_section("timesteps", *sections["timesteps"]),
        *plots_section("speed", *sections["speed"]),
    ]
    return document.page(
        f"{title} compared",
        body,
        styles=STYLES,
        scripts=SCRIPTS,
        data={"plots": plots_data([plot for _, plots in sections.values() for plot in plots])},
        local_media=True,
    )


def _by_kind(experts: Sequence[Sequence[Plot]]) -> list[Plot]:
    """The plots of all experts, those of the same kind beside each other."""
    kinds: dict[str, list[Plot]] = {}
    for plots in experts:
        for plot in plots:
            kinds.setdefault(plot.title.partition(",")[0], []).append(plot)
    return [plot for plots in kinds.values() for plot in plots]


def _names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run: that of its folder, with those above it where several have the same."""
    names = [record.name for record in records]
    paths = [record.layout.root.absolute().parts for record in records]
    for depth in range(2, max(map(len, paths)) + 1):
        if len(set(names)) == len(names):
            break
        names = [
            "/".join(parts[-depth:]) if names.count(name) > 1 else name
            for name, parts in zip(names, paths, strict=True)
        ]
    return names


def _navigation() -> Iterator[str]:
    yield '<nav class="inside" aria-label="parts of this page">'
    for name, heading in (
        ("results", "Results"),
        ("settings", "Settings"),
        ("training", "Training"),
        ("samples", "Samples"),
        ("timesteps", "Noise levels"),
        ("speed", "Speed and memory"),
    ):
        yield f'<a href="#{name}">{heading}</a>'
    yield "</nav>"


def _header(names: Sequence[str]) -> str:
    cells = (
        f'<th scope="col"><span class="dot c-run{index}"></span>{text(name)}'
        for index, name in enumerate(names)
    )
    return f"<thead><tr><td></td>{''.join(cells)}</thead>"


def _results(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[str]:
    columns = [_column(record) for record in records]
    yield '<section id="results"><h2>Results</h2>'
    yield f'<div class="wide"><table class="results">{_header(names)}'
    for row in dict.fromkeys(row for column in columns for row in column):
        yield f'<tr><th scope="row">{text(row)}'
        for column in columns:
            value, more = column.get(row, ("", ""))
            yield f'<td>{text(value)}<div class="soft">{text(more)}</div>'
    yield "</table></div></section>"


def _column(record: RunRecord) -> dict[str, tuple[str, str]]:
    begin = record.history.processes[0].begin if record.history.processes else None
    warnings = len(record.history.warnings)
    what = ", ".join(part for part in (model_text(record), method_text(record)) if part)
    rows = {
        "State": (record.state, f"started {made_at(begin)}" if begin else ""),
        "Trains": (what, ""),
        **results(record),
    }
    if warnings:
        rows["Warnings"] = (f"{warnings:,}", "")
    if record.gaps:
        rows["Could not be read"] = ("; ".join(record.gaps), "")
    return rows


def _settings(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[str]:
    """The settings that are not the same in all runs."""
    columns = [dict(leaf_values(record.settings)) for record in records]
    rows = [
        name
        for name in dict.fromkeys(name for column in columns for name in column)
        if name not in _NOT_COMPARED and _differs(columns, name)
    ]
    yield '<section id="settings"><h2>Settings that differ</h2>'
    if not rows:
        yield "<p>None: all settings are the same, but for the runs' names.</p></section>"
        return
    yield f'<div class="wide"><table class="results">{_header(names)}'
    for name in rows:
        yield f'<tr><th scope="row">{text(name)}'
        for column in columns:
            yield f"<td>{text(_value(column, name))}"
    yield "</table></div></section>"


def _differs(columns: Sequence[Mapping[str, Any]], name: str) -> bool:
    first, *others = (column.get(name) for column in columns)
    return any(other != first for other in others)


def _value(column: Mapping[str, Any], name: str) -> str:
    """A setting as YAML has it."""
    if name not in column:
        return "-"
    value = column[name]
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
