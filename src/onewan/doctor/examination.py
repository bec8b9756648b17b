"""The data of a run: every file through the trainer's planner and reader, and what was found.

Loads no model, and writes nothing but what the cache remembers about files. The clips are those
that `onewan cache` would encode, in the same order and with the same split for validation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.data.clip_list import clip_data
from onewan.data.expert_clips import timestep_lines
from onewan.data.probes import MediaProbes
from onewan.data.report import ClipProblem, ClipWarning, DatasetReport
from onewan.data.run_clips import clips_of_run, with_contents, with_held_out
from onewan.data.sources.copies import Copies
from onewan.data.sources.read import label_of
from onewan.data.sources.remote import Progress, no_progress
from onewan.doctor.captions import caption_findings
from onewan.doctor.clip_table import TABLE_ROWS, clip_table, findings_by_path
from onewan.doctor.duplicates import alike, same_content
from onewan.doctor.environment import Environment
from onewan.doctor.finding import Finding, without_names
from onewan.doctor.inspection import Advance, InspectedClip, Inspector, content_digests
from onewan.doctor.needs import Needs, needs_of
from onewan.model.sources import may_be_repository

MOST_PREVIEWS = 300
"""Clips that get a preview; of a larger data set, so many at equal distances in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was found in the data of a run."""

    sources: tuple[Path | str, ...]
    """Of the training clips, then of the validation clips."""
    clips: tuple[InspectedClip, ...]
    """Those that are trained or validated on, in the data set's order."""
    held_out: frozenset[Clip]
    """Those of them that are validated on."""
    report: DatasetReport
    """The trainer's own report, with what the examination adds to its problems and warnings."""
    of_data: tuple[Finding, ...]
    """The report's problems and warnings."""
    of_run: tuple[Finding, ...]
    """What else keeps the run from starting, or was assumed about it."""
    needs: Needs | None
    """None if no clip can be used."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything that was found."""
        return (*self.of_data, *self.of_run)

    @property
    def buckets(self) -> list[tuple[int, tuple[int, int], int]]:
        """(frames, (width, height), number of clips) of each bucket."""
        counts = Counter((item.clip.frames, item.clip.size) for item in self.clips)
        return [(*bucket, count) for bucket, count in sorted(counts.items())]

    def lines(self) -> Iterator[str]:
        """The examination for a terminal."""
        yield f"Data: {', '.join(label_of(path, short=True) for path in self.sources)}"
        if self.clips:
            clips = [item.clip for item in self.clips]
            table = clip_table(clips, findings_by_path(self.findings), self.held_out)
            yield from (f"  {line}" for line in table)
            yield ""
        # The table says what is taken of each, unless it is cut.
        yield from self.report.lines(with_taken=len(self.clips) > TABLE_ROWS)
        yield ""
        if self.needs is not None:
            yield "Needs"
            yield from (f"  {line}" for line in self.needs.lines())
        yield from (f"  {finding.severity}: {finding.text}" for finding in self.of_run)

    def as_data(self) -> dict[str, Any]:
        """The examination as plain data."""
        return {
            "sources": [without_names(label_of(path)) for path in self.sources],
            "clips": [
                {
                    **clip_data(item.clip, is_held_out=item.clip in self.held_out),
                    "path": without_names(str(item.clip.path)),
                }
                for item in self.clips
            ],
            "buckets": [
                {"frames": frames, "width": size[0], "height": size[1], "clips": number}
                for frames, size, number in self.buckets
            ],
            **({} if self.needs is None else self.needs.as_data()),
        }


def examine(
    config: ResolvedRun,
    environment: Callable[[], Environment],
    *,
    previews: bool,
    advance: Advance,
    progress: Progress = no_progress,
) -> Examination:
    """The data of `config`, all of which is decoded. With `previews`, clips have small pictures.
    `progress` is called during long work that comes before the clips are known.

    `environment` gives the machine that the run is for; it is asked for last, since it may still be
    looked at. DataError if a source is not a folder that can be read.
    """
    probes = MediaProbes(config.video_data.cache_dir / "probes.jsonl")
    report = clips_of_run(config, probes, Copies(config.video_data.cache_dir, progress=progress))
    if config.video_data.cache:
        with suppress(OSError):  # the cache of another user, say
            probes.save()  # for the run that follows
    clips = (*report.clips, *report.validation_clips)
    digests, unreadable = content_digests(clip.path for clip in clips)
    report = with_contents(config, _without(report, unreadable), digests)
    once = _each_once((*report.clips, *report.validation_clips))
    step = max(1, -(-len(once) // MOST_PREVIEWS))
    inspector = Inspector(
        fps=config.model.facts().fps,
        variant=config.model.facts(),
        previewed=frozenset(once[::step]) if previews else frozenset(),
        searched=frozenset({clip.path: clip for clip in reversed(once)}.values()),
    )
    inspected = list(inspector.inspect(once, advance))
    undecodable = [
        ClipProblem.from_error(item.clip.path, item.error) for item in inspected if item.error
    ]
    report = with_held_out(config, _without(report, undecodable), digests)
    failed = {problem.path for problem in undecodable}
    usable = [item for item in inspected if item.clip.path not in failed]
    added = list(_added_findings(config, usable, digests))
    used = (*report.clips, *report.validation_clips)
    by_frames = {_frames_key(item.clip): item for item in usable}
    needs = needs_of(config, report.clips, report.validation_clips, environment()) if used else None
    report = replace(
        report,
        problems=tuple(dict.fromkeys(report.problems)),
        warnings=tuple(dict.fromkeys((*report.warnings, *_as_warnings(added)))),
    )
    return Examination(
        sources=tuple(s.path for s in (*config.video_data.sources, *config.validation.sources)),
        clips=tuple(replace(by_frames[_frames_key(clip)], clip=clip) for clip in _each_once(used)),
        held_out=frozenset(report.validation_clips),
        report=report,
        of_data=tuple(_of_report(report)),
        of_run=(*_missing_model(config), *_of_training(config, report.clips, needs)),
        needs=needs,
    )


def _each_once(clips: Sequence[Clip]) -> list[Clip]:
    """The clips of which each is decoded; the same span may be in two sources."""
    return list({_frames_key(clip): clip for clip in clips}.values())


def _frames_key(clip: Clip) -> tuple[object, ...]:
    """What the frames of a clip depend on."""
    span = (clip.path, clip.start, clip.fps, clip.frames)
    look = (clip.background, clip.fields, clip.bounds, clip.variation)
    return (*span, clip.size, *look, clip.mask, clip.conditions)


def _without(report: DatasetReport, problems: Sequence[ClipProblem]) -> DatasetReport:
    """`report` without the clips of the files that have these further `problems`."""
    failed = {problem.path for problem in problems}
    return replace(
        report,
        clips=tuple(clip for clip in report.clips if clip.path not in failed),
        validation_clips=tuple(c for c in report.validation_clips if c.path not in failed),
        problems=(*report.problems, *problems),
    )


def _added_findings(
    config: ResolvedRun, usable: Sequence[InspectedClip], digests: Mapping[Path, str]
) -> Iterator[Finding]:
    """What the trainer's own report does not look at."""
    for item in usable:
        for kind, text in item.pixels.notes() if item.pixels else ():
            yield Finding(severity="note", kind=kind, path=item.clip.path, text=text)
        if item.combs is not None:
            text = (
                "has the combs of interlaced video, although its stream says that it is not; a "
                f"source with interlaced: {item.combs} deinterlaces all of its videos, so put such "
                "files into one of their own"
            )
            yield Finding(severity="note", kind="interlaced", path=item.clip.path, text=text)
        if item.mask_note and item.clip.mask:
            path = item.clip.mask.path
            yield Finding(severity="note", kind="mask", path=path, text=item.mask_note)
    yield from _duplicates(usable, digests)
    yield from caption_findings([item.clip for item in usable], config)
    batch = config.train.batch_size
    for (frames, size), count in Counter((i.clip.frames, i.clip.size) for i in usable).items():
        if count < batch:
            yield Finding(
                severity="note",
                kind="small bucket",
                text=f"the bucket of {frames} frame{'s' * (frames > 1)} at {size[0]}x{size[1]} has "
                f"{count} clip{'s' * (count > 1)}, fewer than train.batch_size ({batch}), so its "
                "batches are short; fewer values of video_data.resolution make fewer buckets",
            )


def _duplicates(usable: Sequence[InspectedClip], digests: Mapping[Path, str]) -> Iterator[Finding]:
    # Several clips of one file have its content, and may look alike.
    files = list({item.clip.path: item for item in reversed(usable)}.values())[::-1]
    same = same_content([digests[item.clip.path] for item in files])
    hashes = {
        index: item.pixels.hash
        for index, item in enumerate(files)
        if item.pixels and item.pixels.hash and index not in same
    }
    for kind, pairs, text in (
        ("duplicate", same, "has the same content as"),
        ("near duplicate", alike(hashes), "looks nearly the same as"),
    ):
        for index, other in pairs.items():
            yield Finding(
                severity="note",
                kind=kind,
                path=files[index].clip.path,
                other=files[other].clip.path,
                text=f"{text} {files[other].clip.name}; take one out, unless it is to be trained "
                "twice as often",
            )


def _as_warnings(findings: Sequence[Finding]) -> list[ClipWarning]:
    return [ClipWarning(path=f.path, text=f.text, about=f.kind, other=f.other) for f in findings]


def _of_report(report: DatasetReport) -> Iterator[Finding]:
    """The problems and warnings of `report`."""
    for problem in report.problems:
        text, kind = problem.reason, "unusable"
        yield Finding(severity="problem", kind=kind, path=problem.path, text=text)
    for warning in report.warnings:
        kind = warning.about or ("file" if warning.path else "data set")
        yield Finding(
            severity="note", kind=kind, path=warning.path, text=warning.text, other=warning.other
        )


def _missing_model(config: ResolvedRun) -> Iterator[Finding]:
    """Paths of the model that are neither here nor on the hub; files are checked when it loads."""
    for component, given in config.model.sources().items():
        if not Path(given).expanduser().exists() and not may_be_repository(given):
            text = f"model.{component}: {given} does not exist; correct the path"
            yield Finding(severity="problem", kind="model", text=text)


def _of_training(
    config: ResolvedRun, clips: Sequence[Clip], needs: Needs | None
) -> tuple[Finding, ...]:
    """What keeps the experts from training on `clips`, and what is found about the run's needs."""
    if needs is not None:
        lines = timestep_lines(config, clips) if clips else []
        of_timesteps = (Finding(severity="problem", kind="data set", text=line) for line in lines)
        return (*of_timesteps, *needs.findings)
    if not config.video_data.sources:
        text = "video_data.sources: is empty; name at least one folder of clips"
    else:
        text = "no clip can be used"
    return (Finding(severity="problem", kind="data set", text=text),)
