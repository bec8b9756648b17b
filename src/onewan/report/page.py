"""The report of one run: what it did, how long it took and how well it went, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from onewan.files import replacing
from onewan.pages import document
from onewan.pages.plots import Plot
from onewan.report.curves import Source, of_experts, run_plots
from onewan.report.history import History
from onewan.report.parts import (
    STATE_STYLES,
    list_of,
    made_at,
    method_text,
    model_text,
    plots_section,
    results,
    text,
)
from onewan.report.record import RunRecord, read_record
from onewan.report.samples import report_samples
from onewan.report.tables import clips_html, files_html, processes_html, settings_html
from onewan.report.videos import VideoChoice
from onewan.runs.events import Event, Started
from onewan.runs.layout import displayed
from onewan.runs.log import Listener

STYLES = ("players.css", "plots.css", "runs.css")
SCRIPTS = ("players.js", "plots.js", "filter.js")


def write_report(run: Path, out: Path | None = None, choice: VideoChoice | None = None) -> Path:
    """Write the page about a run, given by its folder or its name in ``runs``, to `out`, by default
    ``report.html`` in its folder; returns its path.

    OnewanError if there is no such run, OSError if the page can't be written.
    """
    record = read_record(run)
    path = out or record.layout.report
    page = report_page(record, path.parent, choice or VideoChoice())
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return path


@contextmanager
def reporting(listen: Listener, print_line: Callable[[str], None]) -> Iterator[Listener]:
    """Yields a listener that passes a run's events to `listen`; when the block ends, also by an
    error, the page about the run is written and `print_line` gets a line about it.

    Nothing is written for a run that did not start, and nothing is raised: a run of hours does not
    fail for its page.
    """
    started = list[Path]()

    def passing(event: Event) -> None:
        if isinstance(event, Started):
            started.append(event.run)
        listen(event)

    try:
        yield passing
    finally:
        if started:
            print_line(_report_line(started[-1]))


def _report_line(folder: Path) -> str:
    try:
        return f"report: {displayed(write_report(folder))}"
    except Exception as error:  # noqa: BLE001  (whatever it is, the run has its own result)
        reason = str(error) or type(error).__name__
        return f"the report can't be written ({reason}); try: onewan report {displayed(folder)}"


def report_page(record: RunRecord, folder: Path, choice: VideoChoice) -> str:
    """The page about `record`, for a file in `folder`, in UTF-8."""
    now = datetime.now(timezone.utc)
    history = record.history
    experts = of_experts(history)
    plots = run_plots(history)
    body = [
        *_head(record, now, plots),
        *_tiles(record),
        *_problems(record),
        *plots_section("training", "Training", plots["training"], _no_steps(history, experts)),
        *report_samples(record, folder, choice),
        *_optional_section("timesteps", "Noise levels", plots["timesteps"]),
        *_optional_section("speed", "Speed and memory", plots["speed"]),
        *clips_html(record),
        *files_html(record),
        *settings_html(record),
        *processes_html(record),
    ]
    return document.page(
        f"{record.name}: report",
        body,
        styles=STYLES,
        scripts=SCRIPTS,
        data={"plots": plots_data([plot for part in plots.values() for plot in part])},
        local_media=True,
    )


def plots_data(plots: list[Plot]) -> dict[str, object]:
    """What the script draws, by the ids of the figures."""
    return {plot.name: plot.as_data() for plot in plots}


def _optional_section(name: str, heading: str, plots: Sequence[Plot]) -> Iterator[str]:
    return plots_section(name, heading, plots) if plots else iter(())


def _head(record: RunRecord, now: datetime, plots: Mapping[str, Sequence[Plot]]) -> Iterator[str]:
    """The name of the run, how it stands, and links to the parts of the page; not to those of
    `plots` that have none, but for the training."""
    kind = STATE_STYLES[record.state]
    yield '<div class="head">'
    yield f'<h1>{text(record.name)}</h1><span class="badge {kind}">{record.state}</span>'
    yield "</div>"
    begin = record.history.processes[0].begin if record.history.processes else None
    facts = [
        model_text(record),
        method_text(record),
        f"started {made_at(begin)}" if begin else "",
        f"page of {made_at(now)}",
    ]
    yield f'<p class="facts">{text(" · ".join(fact for fact in facts if fact))}</p>'
    yield '<nav class="inside" aria-label="parts of this page">'
    for name, heading in (
        ("training", "Training"),
        ("samples", "Samples"),
        ("timesteps", "Noise levels"),
        ("speed", "Speed and memory"),
        ("clips", "Clips"),
        ("files", "Files"),
        ("settings", "Settings"),
        ("processes", "Processes"),
    ):
        if name == "training" or plots.get(name, True):
            yield f'<a href="#{name}">{heading}</a>'
    yield "</nav>"


def _tiles(record: RunRecord) -> Iterator[str]:
    yield '<ul class="tiles">'
    for name, (value, more) in results(record).items():
        yield f'<li><span class="name">{text(name)}</span>'
        yield f'<span class="value">{text(value)}</span><span class="more">{text(more)}</span></li>'
    yield "</ul>"


def _problems(record: RunRecord) -> Iterator[str]:
    """Why the run failed, its warnings, and what could not be read."""
    history = record.history
    if history.error:
        yield '<section class="box bad"><h2 class="wrong">Why it failed</h2>'
        yield from list_of(history.error.split("\n"))
        yield "</section>"
    if record.state in ("killed", "silent"):
        is_sure = record.state == "killed"
        heading = "It was killed" if is_sure else "It may have been killed"
        # Of a run without a state, `--resume=auto` begins anew.
        how = "--resume" if history.saved else "--resume=auto"
        where = f"from the state of step {history.saved[-1]:,}" if history.saved else "from step 0"
        yield f'<section class="box bad"><h2 class="wrong">{heading}</h2>'
        yield (
            f"<p>{text(record.reason[:1].upper() + record.reason[1:])}. "
            f"<code>onewan train {text(displayed(record.layout.root))} {how}</code> goes on "
            f"{where}.</p></section>"
        )
    if record.gaps:
        yield '<section class="box"><h2>What could not be read</h2>'
        yield from list_of(record.gaps)
        yield "</section>"
    if history.steps.replaced:
        count = history.steps.replaced
        yield (
            f'<section class="box"><p>{count:,} step{"s" * (count > 1)} of earlier processes '
            f"{'were' if count > 1 else 'was'} not saved before the run was resumed, so the run "
            "went on from an earlier step. This page shows what the later processes did.</p>"
            "</section>"
        )
    if history.warnings:
        yield f'<section class="box"><details open><summary><h2>Warnings ({len(history.warnings)})'
        yield "</h2></summary>"
        yield from list_of(
            f"{warning.text}{f' ({warning.count} times)' if warning.count > 1 else ''}"
            for warning in history.warnings.values()
        )
        yield "</details></section>"


def _no_steps(history: History, experts: list[Source]) -> str:
    if len(history.steps):
        return ""
    return "No step is done yet." if not experts else "No step is done yet, only a validation."
