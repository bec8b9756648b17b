"""The parts of a report that are lists: clips, files, settings and processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onewan import documents
from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.data.report import count
from onewan.doctor.finding import without_names
from onewan.pages.document import block, data_uri
from onewan.report.history import History, Process
from onewan.report.parts import STATE_STYLES, list_of, made_at, text
from onewan.report.record import RunRecord
from onewan.report.steps import number

_MOST_SHEET_BYTES = 3_000_000
"""Of the pages of the contact sheet in a report."""
_CAPTIONS_SHOWN = 3
_CAPTION_LENGTH = 600


def clips_html(record: RunRecord) -> Iterator[str]:
    """What the run was trained on."""
    clips, data = record.clips, record.history.latest.get("data", {})
    yield '<section id="clips"><h2>Clips</h2>'
    if not data and not clips.clips:
        yield "<p>The data was not ready yet.</p></section>"
        return
    yield from _counts(record)
    yield from _contact_sheet(record)
    if clips.clips:
        listed = clips.counts.get("listed")
        some = isinstance(listed, int) and listed > len(clips.clips)
        of = f"{len(clips.clips):,} of {listed:,}" if some else f"{len(clips.clips):,}"
        where = ", at equal distances; all are in clips.jsonl" if some else ""
        yield f"<details><summary>Clips and captions ({of}{where})</summary>"
        yield (
            '<p class="tools"><label>Find <input type="search" id="find" data-list=".clip" '
            'placeholder="name or caption"></label> <span id="shown" role="status"></span></p>'
        )
        yield '<div class="list left" tabindex="0" role="group" aria-label="clips"><table>'
        yield '<thead><tr><th scope="col">Clip<th scope="col">Trained as<th scope="col">Captions'
        yield "</thead>"
        for clip in clips.clips:
            yield from _clip(clip)
        yield "</table></div></details>"
    if clips.left_out:
        total = clips.counts.get("left_out", len(clips.left_out))
        yield f"<details open><summary>Files that can't be used ({total})</summary>"
        yield from list_of(f"{each.get('path')}: {each.get('reason')}" for each in clips.left_out)
        yield "</details>"
    report = data.get("report")
    if isinstance(report, list) and report:
        yield "<details><summary>The report of the data, as the run printed it</summary>"
        yield block(without_names("\n".join(map(str, report))))
        yield "</details>"
    yield "</section>"


def _counts(record: RunRecord) -> Iterator[str]:
    counts, sizes = record.clips.counts, dict[tuple[Any, ...], int]()
    parts = list[str]()
    for name, noun, what in (
        ("clips", "clip", "trained on"),
        ("held_out", "clip", "held out for validation"),
        ("left_out", "file", "left out, since it can't be used"),
    ):
        number_of = counts.get(name)
        if isinstance(number_of, int) and number_of:
            what = what if number_of == 1 else what.replace("it can", "they can")
            parts.append(f"{count(number_of, noun)} {what}")
    for clip in record.clips.clips:
        shape = (clip.get("width"), clip.get("height"), clip.get("frames"))
        sizes[shape] = sizes.get(shape, 0) + 1
    if parts:
        yield f"<p>{text('; '.join(parts))}.</p>"
    if sizes:
        yield '<div class="wide"><table><thead><tr><th scope="col">Size<th scope="col">Frames'
        yield '<th scope="col">Clips in the list</thead>'
        for (width, height, frames), clips in sorted(sizes.items(), key=str):
            yield f"<tr><td>{text(width)}x{text(height)}<td>{text(frames)}<td>{clips:,}"
        yield "</table></div>"


def _contact_sheet(record: RunRecord) -> Iterator[str]:
    pages, room = record.clips.counts.get("contact_sheet"), _MOST_SHEET_BYTES
    if not isinstance(pages, list) or not pages:
        return
    yield "<details><summary>Contact sheet: first, middle and last frame of each clip</summary>"
    for index, page in enumerate(pages, start=1):
        try:
            content = Path(str(page)).read_bytes()
        except (OSError, ValueError):
            yield f"<p>{text(page)} is no longer there.</p>"
            continue
        if len(content) > room:
            yield f"<p>The other pages are in {text(Path(str(page)).parent)}.</p>"
            break
        room -= len(content)
        source = data_uri("image/jpeg", content)
        alt = f"contact sheet, page {index}"
        yield f'<img class="sheetpage" loading="lazy" alt="{alt}" src="{source}">'
    yield "</details>"


def _clip(clip: Mapping[str, Any]) -> Iterator[str]:
    frames, size = clip.get("frames"), f"{clip.get('width')}x{clip.get('height')}"
    how = size
    if clip.get("kind") == "video":
        begin, end = number(clip.get("start")), number(clip.get("end"))
        how += f", {frames} frames at {number(clip.get('fps')):.4g} fps"
        if math.isfinite(begin) and math.isfinite(end):
            how += f", {begin:.2f} to {end:.2f} s"
    else:
        how += ", image"
    more = [
        "held out for validation" if clip.get("held_out") else "",
        "with a loss mask" if clip.get("mask") else "",
        f"condition image {clip['condition_image']}" if clip.get("condition_image") else "",
        f"control video {clip['control']}" if clip.get("control") else "",
    ]
    captions = clip.get("captions")
    captions = [str(each) for each in captions] if isinstance(captions, list) else []
    yield f'<tr class="clip"><td>{text(clip.get("name"))}'
    yield f"<td>{text('; '.join([how, *(part for part in more if part)]))}<td>"
    for caption in captions[:_CAPTIONS_SHOWN]:
        cut = caption if len(caption) <= _CAPTION_LENGTH else f"{caption[:_CAPTION_LENGTH]} ..."
        yield f"<div>{text(cut) or '<i>no text</i>'}</div>"
    if len(captions) > _CAPTIONS_SHOWN:
        yield f"<div>and {len(captions) - _CAPTIONS_SHOWN} others</div>"


def files_html(record: RunRecord) -> Iterator[str]:
    """Exported weights and saved states, the best ones marked."""
    history, layout = record.history, record.layout
    yield '<section id="files"><h2>Files</h2>'
    exports = sorted(history.exports.items(), key=lambda item: (item[1]["step"], item[0]))
    if not exports:
        yield "<p>No weights are exported yet.</p>"
    else:
        yield '<div class="wide"><table class="left"><thead><tr><th scope="col">Exported weights'
        yield '<th scope="col">Of<th scope="col">Step<th scope="col">Size<th scope="col"></thead>'
        newest = exports[-1][1]["step"]
        for name, event in exports:
            best = history.best.get(name, event if number(event.get("best_loss")) > 0 else None)
            mark = ""
            if best is not None:
                mark = (
                    f"best, validation loss {number(best.get('loss', best.get('best_loss'))):.4f}"
                )
            elif event["step"] == newest:
                mark = "newest"
            size = _size(layout.weights_dir / name)
            yield f"<tr><td>{text(name)}<td>{text(event.get('expert', ''))}"
            yield f'<td class="number">{event["step"]:,}<td class="number">{size}'
            yield f'<td><span class="mark">{text(mark)}</span>'
        yield "</table></div>"
    states = layout.saved_steps()
    if states:
        named = ", ".join(f"{step:,}" for step in states)
        yield f"<p>States to resume from, in state/: those of the steps {named}.</p>"
    else:
        yield "<p>No state is saved that the run could be resumed from.</p>"
    yield "</section>"


def _size(path: Path) -> str:
    try:
        if path.is_dir():  # a fully fine-tuned transformer in diffusers' layout
            return format_bytes(sum(p.stat().st_size for p in path.rglob("*") if p.is_file()))
        return format_bytes(path.stat().st_size)
    except OSError:
        return "deleted since"


def settings_html(record: RunRecord) -> Iterator[str]:
    """What changed while the run trained, and the run file as it was written and with all
    defaults."""
    yield '<section id="settings"><h2>Settings</h2>'
    yield from _changes(record.history)
    for name, content in (
        ("run.yaml, as it was written", record.run_text),
        ("resolved.yaml, with all defaults", record.resolved_text),
    ):
        if content:
            yield f"<details><summary>{name}</summary>"
            yield block(without_names(content))
            yield "</details>"
    yield "</section>"


def _changes(history: History) -> Iterator[str]:
    if not history.changes:
        return
    yield "<p>These settings were changed while the run trained.</p>"
    yield '<div class="wide"><table class="left"><thead><tr><th scope="col">After step'
    yield '<th scope="col">Setting<th scope="col">Before<th scope="col">From then on</thead>'
    for (step, name), event in sorted(history.changes.items()):
        yield f'<tr><td class="number">{step:,}<td><code>{text(name)}</code>'
        for value in (event.get("old"), event.get("new")):
            yield f"<td>{text(documents.format_value(value))}"
    yield "</table></div>"


def processes_html(record: RunRecord) -> Iterator[str]:
    """The processes that trained the run, versions and device."""
    history = record.history
    yield '<section id="processes"><h2>Processes and versions</h2>'
    if history.processes:
        yield '<div class="wide"><table class="left"><thead><tr><th scope="col">Started'
        yield '<th scope="col">Machine<th scope="col">Steps<th scope="col">Time'
        yield '<th scope="col">How it ended</thead>'
        for process in history.processes[-50:]:
            yield from _process(process)
        yield "</table></div>"
    yield from _environment(history)
    if history.notes:
        yield f"<details><summary>Notes ({len(history.notes)})</summary>"
        yield from list_of(note.text for note in history.notes.values())
        yield "</details>"
    yield "</section>"


def _process(process: Process) -> Iterator[str]:
    begin = made_at(process.begin) if process.begin else "unknown"
    steps = "none"
    if process.last_step > process.first_step:
        steps = f"{process.first_step + 1:,} to {process.last_step:,}"
    yield f"<tr><td>{begin}<td>{text(process.host)}, process {process.pid}"
    yield f'<td class="number">{steps}'
    yield f'<td class="number">{format_duration(process.seconds)}'
    yield f'<td><span class="{STATE_STYLES[process.how]}">{process.how}</span>'


def _environment(history: History) -> Iterator[str]:
    found, attention = history.latest.get("environment"), history.latest.get("attention", {})
    if found is None:
        yield "<p>Versions were not recorded by the onewan that trained this run.</p>"
        return
    packages = found.get("packages")
    versions = packages.items() if isinstance(packages, Mapping) else ()
    memory = number(found.get("device_memory"))
    device = str(found.get("device", ""))
    lines = [
        ("system", found.get("system", "")),
        ("device", f"{device}{f', {format_bytes(memory)}' if memory > 0 else ''}"),
        ("attention", attention.get("backend", "not chosen yet")),
        *versions,
    ]
    yield block(without_names("\n".join(f"{name:<13} {value}" for name, value in lines)))
