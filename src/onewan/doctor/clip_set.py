"""The clips of a run file as a person looks through them: each with its source, the place of its
caption, and what was found about it.

Made from the planner's report at once; `ClipSet.examined` adds what `onewan doctor` has found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from onewan.config.schema import ResolvedRun
from onewan.data.buckets import clip_planner, known_cuts_of
from onewan.data.caption_places import Elsewhere, Origin, Place, Written, origins
from onewan.data.clip import Clip
from onewan.data.clip_views import DecodedPreviews
from onewan.data.contact_sheet import clips_to_show, write_contact_sheet
from onewan.data.found_cuts import FoundCuts
from onewan.data.probes import MediaProbes
from onewan.data.report import DatasetReport, count
from onewan.data.run_clips import clips_of_run, with_contents
from onewan.data.sources.copies import Copies
from onewan.data.sources.read import label_of
from onewan.doctor.finding import without_names
from onewan.doctor.inspection import content_digests
from onewan.errors import DataError, one_line

_STATES = {"": "All", "kept": "Kept", "noted": "Kept, with notes", "refused": "Refused"}
_OF_DATA_SET = ("data set", "small bucket", "shared caption")
"""Kinds of findings about a data set as a whole; others are about the machine and the plan."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A finding about a file."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A clip that is kept, or a file that is not."""

    number: int
    path: Path
    name: str
    clip: Clip | None
    """None if it is refused."""
    reason: str = ""
    """Why it is refused."""
    source: str
    origin: Origin
    held_out: bool = False
    notes: tuple[Note, ...] = ()

    @property
    def bucket(self) -> str:
        """The shape that the clips of a batch share, in words; "" if it is refused."""
        if self.clip is None:
            return ""
        width, height = self.clip.size
        return f"{count(self.clip.frames, 'frame')} at {width}x{height}"

    @property
    def place(self) -> Place | Elsewhere:
        """Where its caption is."""
        return self.origin.place

    @property
    def summary(self) -> str:
        """Its shape and what it is used for; of a refused file, why it is refused."""
        if self.clip is None:
            return self.reason
        mask = ", mask" if self.clip.mask else ""
        return f"{self.bucket}{mask}{', held out' if self.held_out else ''}"


@dataclass(kw_only=True, eq=False)
class ClipSet:
    """The clips of one run file, and the files that are none."""

    config: ResolvedRun
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    """What was found about the data set as a whole, and about files that are no clips."""
    unsure: tuple[str, ...]
    """What is known only after an examination."""
    captions: dict[Place, Written]
    """What was read last at each place; without those that can't be read."""
    examination: dict[str, Any] | None = None
    """The document of `onewan doctor`, once that has looked at all frames."""

    @property
    def kept(self) -> list[Entry]:
        """The entries that are clips."""
        return [entry for entry in self.entries if entry.clip is not None]

    @property
    def summary(self) -> str:
        """How many clips and files there are of each kind, in a line."""
        kept = self.kept
        numbers = [f"{count(len(kept), 'clip')} kept"]
        if noted := sum(bool(entry.notes) for entry in kept):
            numbers.append(f"{noted} with notes")
        if refused := len(self.entries) - len(kept):
            numbers.append(f"{count(refused, 'file')} refused")
        if held_out := sum(entry.held_out for entry in kept):
            numbers.append(f"{held_out} held out for validation")
        return ", ".join(numbers)

    @property
    def buckets(self) -> list[tuple[str, int]]:
        """The number of clips of each bucket, the longest and largest last. Of alternatives, of
        which each pass through the data has one, one counts."""
        clips = [(e.clip, e.bucket) for e in self.entries if e.clip and e.clip.take == 0]
        shapes = Counter((clip.frames, clip.size, name) for clip, name in clips)
        return [(name, number) for (_, _, name), number in sorted(shapes.items())]

    def batches(self, clips: int) -> str:
        """The batches that a bucket of so many clips fills, in words."""
        full, left = divmod(clips, self.config.train.batch_size)
        batches = [f"{full} full"] if full else []
        batches += [f"one of {count(left, 'clip')}"] if left else []
        return " and ".join(batches)

    def text(self, entry: Entry) -> str:
        """The caption of `entry` as it is written; of one that is elsewhere, as it is trained."""
        if not isinstance(entry.place, Elsewhere):
            written = self.captions.get(entry.place)
            return "" if written is None else written.text or ""
        return "\n".join(entry.clip.captions) if entry.clip else ""

    def choices(self) -> dict[str, dict[str, str]]:
        """What `chosen` can be asked for, with names: states, sources and buckets."""
        sources = sorted({entry.source for entry in self.entries if entry.source})
        return {
            "state": _STATES,
            "source": {"": "All", **{source: one_line(source) for source in sources}},
            "bucket": {"": "All", **{name: name for name, _ in self.buckets}},
        }

    def chosen(self, *, state: str, source: str, bucket: str, search: str) -> list[Entry]:
        """The entries that the filters leave."""
        words = search.casefold()

        def fits(entry: Entry) -> bool:
            kept = entry.clip is not None
            of_state = {"": True, "kept": kept, "noted": kept and entry.notes, "refused": not kept}
            return bool(
                of_state.get(state, True)
                and source in ("", entry.source)
                and bucket in ("", entry.bucket)
                and (words in entry.name.casefold() or words in self.text(entry).casefold())
            )

        return [entry for entry in self.entries if fits(entry)]

    def duplicates(self) -> list[tuple[str, Entry, Entry]]:
        """Kind and both clips of each pair that the examination found."""
        by_path = {without_names(str(entry.path)): entry for entry in reversed(self.entries)}
        pairs = list[tuple[str, Entry, Entry]]()
        for finding in self.examination["findings"] if self.examination else ():
            pair = by_path.get(finding.get("other", "")), by_path.get(finding["path"])
            if pair[0] is not None and pair[1] is not None:
                pairs.append((finding["kind"], pair[0], pair[1]))
        return pairs

    def findings(self) -> dict[str, list[tuple[str, str]]]:
        """Name and text of everything that was found, by kind; what was refused comes first."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for entry in self.entries:
            if entry.clip is None:
                groups.setdefault("refused", []).append((entry.name, entry.reason))
        for entry in self.entries:
            for note in entry.notes:
                groups.setdefault(note.kind, []).append((entry.name, note.text))
        return {kind: list(dict.fromkeys(found)) for kind, found in groups.items()}

    def examined(self, document: dict[str, Any]) -> None:
        """Add what `onewan doctor` has found to the entries."""
        self.examination, self.unsure = document, ()
        known = {without_names(str(entry.path)) for entry in self.entries}
        notes, problems = dict[str, list[Note]](), dict[str, str]()
        of_others = list(self.notes)
        for finding in document["findings"]:
            if finding["path"] is None:
                of_others += [finding["text"]] if finding["kind"] in _OF_DATA_SET else []
            elif finding["path"] not in known:
                of_others.append(f"{PurePath(finding['path']).name}: {finding['text']}")
            elif finding["severity"] == "problem":
                problems[finding["path"]] = finding["text"]
            else:
                note = Note(kind=finding["kind"], text=finding["text"])
                notes.setdefault(finding["path"], []).append(note)
        self.notes = tuple(dict.fromkeys(of_others))
        clips = document.get("data", {}).get("clips", ())
        held_out = {(clip["path"], clip["name"]) for clip in clips if clip["held_out"]}
        entries = list[Entry]()
        for entry in self.entries:
            path = without_names(str(entry.path))
            if entry.clip is not None and path in problems:
                entries.append(replace(entry, clip=None, reason=problems[path]))
                continue
            own = tuple(dict.fromkeys((*entry.notes, *notes.get(path, ()))))
            is_held_out = (path, entry.name) in held_out
            entries.append(replace(entry, notes=own, held_out=is_held_out))
        self.entries = tuple(entries)


def clip_set(config: ResolvedRun) -> ClipSet:
    """The clips of `config`, whose headers are read; captions are left to the caller to read.

    What is in archives and on other machines is among them once `onewan cache` has brought it, and
    which clips are held out for validation is known after an examination. DataError.
    """
    cache = config.video_data.cache_dir
    probes = MediaProbes(cache / "probes.jsonl")
    copies = Copies(cache, make=False)
    known_cuts = known_cuts_of(config)
    report = clips_of_run(config, probes, copies, known_cuts)
    with suppress(OSError):  # the cache of another user, say
        probes.save()
    clips = (*report.clips, *report.validation_clips)
    if any(clip.augmentation for clip in clips):  # whose variants are drawn by the content
        digests, unreadable = content_digests(clip.path for clip in clips)
        if unreadable:
            raise DataError(str(unreadable[0]))
        report = with_contents(config, report, digests)
    entries = tuple(_entries(config, report))
    known = {None, *(entry.path for entry in entries)}
    notes = [warning.text for warning in report.warnings if warning.path is None]
    notes += [f"{w.path.name}: {w.text}" for w in report.warnings if w.path and w.path not in known]
    return ClipSet(
        config=config,
        entries=entries,
        notes=tuple(dict.fromkeys(notes)),
        unsure=tuple(_unsure(config, report, known_cuts)),
        captions={},
    )


def _unsure(config: ResolvedRun, report: DatasetReport, known_cuts: FoundCuts) -> Iterator[str]:
    videos = {clip.path for clip in report.clips if clip.kind == "video"}
    if clip_planner(config).needs_cuts and not all(map(known_cuts.knows, videos)):
        yield (
            "not all videos were searched for changes of scene; until all frames are examined, "
            "those count as one scene, and their clips may be other ones"
        )
    if not config.validation.sources and config.validation.share:
        yield "which clips are held out for validation is known when all frames are examined"
    if any(isinstance(source.path, str) for source in config.video_data.sources):
        yield "clips on other machines are shown once `onewan cache` has brought them here"


def draw_contact_sheet(
    folder: Path, config: ResolvedRun, entries: Sequence[Entry]
) -> tuple[Path, ...]:
    """The pages of the contact sheet of `entries`, drawn into `folder` unless they are there and up
    to date. DataError for a clip that can't be read, and for a folder that can't be written."""
    clips = {entry.clip: entry for entry in entries if entry.clip is not None}
    if not clips:
        raise DataError("there is no clip to draw")
    variant = config.model.facts()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sheet = write_contact_sheet(
            folder,
            config.output.name,
            DecodedPreviews(variant),
            clips_to_show(list(clips)),
            held_out={clip for clip, entry in clips.items() if entry.held_out},
            of_clips=len(clips),
            temporal_compression=variant.temporal_compression,
        )
    except OSError as error:
        raise DataError(f"{folder}: can't be written ({error.strerror})") from error
    return sheet.pages


def _entries(config: ResolvedRun, report: DatasetReport) -> Iterator[Entry]:
    known, number = origins(config), 0
    notes = dict[Path, list[Note]]()
    for warning in report.warnings:
        if warning.path is not None:
            # The kind that `onewan doctor` gives it.
            note = Note(kind=warning.about or "file", text=warning.text)
            notes.setdefault(warning.path, []).append(note)
    by_path = {path: origin for (path, _), origin in known.items()}
    unknown = Origin("", Elsewhere("this file is not a clip"))
    for clips, held_out in ((report.clips, False), (report.validation_clips, True)):
        for clip in clips:
            origin = known.get((clip.path, clip.item_name), by_path.get(clip.path, unknown))
            yield Entry(
                number=number,
                path=clip.path,
                name=clip.name,
                clip=clip,
                source=label_of(origin.source, short=True),
                origin=origin,
                held_out=held_out,
                notes=tuple(notes.get(clip.path, ())),
            )
            number += 1
    for problem in report.problems:
        origin = by_path.get(problem.path, unknown)
        yield Entry(
            number=number,
            path=problem.path,
            name=problem.path.name,
            clip=None,
            reason=problem.reason,
            source=label_of(origin.source, short=True) if origin is not unknown else "",
            origin=origin,
        )
        number += 1
