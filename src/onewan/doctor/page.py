"""The HTML page of `onewan doctor --html`: the findings, and a contact sheet whose clips play.

One file that refers to nothing outside itself: pictures and videos are in it as data, and its
content security policy forbids a browser to load anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onewan.data.report import count
from onewan.data.sources.read import label_of
from onewan.doctor.clip_table import conditions, findings_by_path, origin, taken, timesteps
from onewan.doctor.diagnosis import Diagnosis
from onewan.doctor.examination import Examination
from onewan.doctor.finding import Finding, without_names
from onewan.doctor.inspection import InspectedClip, Preview
from onewan.pages import document
from onewan.pages.document import block, data_uri

MOST_VIDEO_BYTES = 40_000_000
"""Of all videos together; clips behind that have pictures only. A browser opens such a page in a
few seconds."""
_CAPTIONS_SHOWN = 3
_FEW_NOTES = 12
"""Up to so many are listed as they are; more are grouped by their kinds."""
_FRAME_NAMES = ("first frame", "middle frame", "last frame")


def html_page(diagnosis: Diagnosis, title: str, most_video_bytes: int = MOST_VIDEO_BYTES) -> str:
    """The page about `diagnosis` as a document in UTF-8."""
    found = diagnosis.examination
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="summary {"wrong" if diagnosis.problems else "right"}">'
        f"{_text(diagnosis.summary)}</p>",
        *_findings(diagnosis),
        *(_numbers(found) if found else ()),
        *(_sheet(found, most_video_bytes) if found and found.clips else ()),
        *_environment(diagnosis),
    ]
    return document.page(
        title,
        body,
        styles=("players.css", "doctor.css"),
        scripts=("players.js", "filter.js"),
    )


def _text(text: str) -> str:
    """`text` of files and people, which may contain anything, as text of the page."""
    return document.text(without_names(text))


def _findings(diagnosis: Diagnosis) -> Iterator[str]:
    for severity, heading in (("problem", "Problems"), ("note", "Notes")):
        chosen = [finding for finding in diagnosis.findings if finding.severity == severity]
        if not chosen:
            continue
        # Notes can be many, and the cards have those of their clips.
        is_long = severity == "note" and len(chosen) > _FEW_NOTES
        yield f'<details class="{severity}s" open>'
        yield f"<summary><h2>{heading} ({len(chosen)})</h2></summary>"
        kinds = dict.fromkeys(finding.kind for finding in chosen) if is_long else [""]
        for kind in kinds:
            group = [finding for finding in chosen if kind in ("", finding.kind)]
            if kind:
                yield f"<details><summary>{_text(kind.capitalize())} ({len(group)})</summary>"
            yield "<ul>"
            for finding in group:
                name = "" if finding.path is None else f"<b>{_text(finding.path.name)}:</b> "
                yield f"<li>{name}{_text(finding.text)}</li>"
            yield "</ul>"
            if kind:
                yield "</details>"
        yield "</details>"


def _numbers(found: Examination) -> Iterator[str]:
    """The sources, the buckets and what the run needs."""
    sources = ", ".join(_text(label_of(path, short=True)) for path in found.sources)
    held_out = f", {len(found.held_out)} held out for validation" if found.held_out else ""
    yield "<h2>Data</h2>"
    yield f"<p>{count(len(found.clips), 'clip')} from {sources}{held_out}.</p>"
    if found.buckets:
        yield f"<details><summary>{count(len(found.buckets), 'bucket')}</summary>"
        yield '<div class="wide"><table><thead><tr><th>Frames<th>Trained at<th>Clips</thead>'
        for frames, (width, height), number in found.buckets:
            yield f"<tr><td>{frames}<td>{width}x{height}<td>{number}"
        yield "</table></div></details>"
    if found.needs is not None:
        yield "<h2>Needs</h2>"
        yield "<ul>"
        for line in found.needs.lines():
            name, text = line.split(maxsplit=1)
            yield f"<li><b>{name.capitalize()}:</b> {_text(text)}</li>"
        yield "</ul>"


def _sheet(found: Examination, most_video_bytes: int) -> Iterator[str]:
    about = findings_by_path(found.findings)
    shown = [(item, item.preview) for item in found.clips if item.preview is not None]
    room, cards, without_video = most_video_bytes, list[str](), 0
    for item, preview in shown:
        video = preview.video
        if video is not None and len(video) > room:
            video, without_video = None, without_video + 1
        room -= len(video or b"")
        notes = about.get(item.clip.path, [])
        cards += _card(item, preview, video, notes, is_held_out=item.clip in found.held_out)
    yield "<h2>Clips as they are trained</h2>"
    yield (
        "<p>First, middle and last frame of each clip, after crop and resampling, made smaller. "
        "The first one plays as a video, at the speed at which the model sees it.</p>"
    )
    if len(shown) < len(found.clips):
        yield (
            f"<p>The sheet has {len(shown)} of {len(found.clips)} clips, at equal distances in the "
            "order of their names.</p>"
        )
    if without_video:
        yield (
            f"<p>{count(without_video, 'video')} can't be played here, since the videos of a page "
            f"are limited to {most_video_bytes // 1_000_000} MB.</p>"
        )
    yield (
        '<p class="tools"><label>Find <input type="search" id="find" data-list=".card" '
        'placeholder="name, caption or note"></label> '
        '<label><input type="checkbox" id="noted"> only clips with notes</label> '
        '<span id="shown" role="status"></span></p>'
    )
    yield '<ul class="sheet">'
    yield from cards
    yield "</ul>"


def _card(
    item: InspectedClip,
    preview: Preview,
    video: bytes | None,
    notes: Sequence[Finding],
    *,
    is_held_out: bool,
) -> Iterator[str]:
    clip, (width, height) = item.clip, preview.size
    name = _text(clip.name)
    shape = "portrait" if height > width else "landscape"
    yield f'<li class="card {shape}"{" data-noted" if notes else ""}>'
    yield '<div class="frames">'
    sizes = f'width="{width}" height="{height}"'
    for index, frame in enumerate(preview.frames):
        image = data_uri("image/jpeg", frame)
        if index == 0 and video is not None:
            # The poster is there at once; the video is decoded when it is played.
            source = f'poster="{image}" src="{data_uri("video/mp4", video)}"'
            options = f'controls muted loop playsinline preload="none" aria-label="{name}"'
            yield f'<div class="player"><video {sizes} {options} {source}></video></div>'
        else:
            label = _FRAME_NAMES[index] if len(preview.frames) == len(_FRAME_NAMES) else "frame"
            yield f'<img {sizes} alt="{label} of {name}" loading="lazy" src="{image}">'
    yield "</div>"
    yield f"<h3>{name}</h3>"
    frames = (
        "" if clip.kind == "image" else f", {count(clip.frames, 'frame')} at {clip.fps:.4g} fps"
    )
    yield (
        f"<p>{_text(taken(clip))}{frames}, {clip.size[0]}x{clip.size[1]} "
        f'<span class="of">of {_text(origin(clip))}</span></p>'
    )
    if is_held_out:
        yield "<p>Held out for validation.</p>"
    if own := timesteps(clip):
        yield f"<p>Trained at {own} only.</p>"
    if given := conditions(clip):
        yield f"<p>With {_text(given)}:</p>"
        yield '<div class="frames">'
        for picture in preview.conditions:
            source = data_uri("image/jpeg", picture)
            yield f'<img {sizes} alt="{_text(given)} of {name}" loading="lazy" src="{source}">'
        yield "</div>"
    for caption in clip.captions[:_CAPTIONS_SHOWN]:
        yield f"<blockquote>{_text(caption) or '<i>no text</i>'}</blockquote>"
    if others := len(clip.captions) - _CAPTIONS_SHOWN:
        yield f"<p>and {count(others, 'other caption')}</p>" if others > 0 else ""
    if notes:
        yield "<ul>"
        yield from (f"<li>{_text(note.text)}</li>" for note in notes)
        yield "</ul>"
    yield "</li>"


def _environment(diagnosis: Diagnosis) -> Iterator[str]:
    yield "<h2>Environment</h2>"
    yield block("\n".join(diagnosis.environment.lines()))
