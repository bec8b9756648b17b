"""The data of a run: every file through the trainer's planner and reader, and what was found.

Loads no model, and writes nothing but what the cache remembers about files. The clips are those
that `onewan cache` would encode, in the same order and with the same split for validation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.data.probes import MediaProbes
from onewan.data.report import ClipProblem, ClipWarning, DatasetReport
from onewan.data.run_clips import clips_of_run, with_held_out
from onewan.data.sources.read import label_of
from onewan.data.validation_split import exclude_validation_clips
from onewan.doctor.captions import caption_findings
from onewan.doctor.clip_table import clip_data, clip_table, findings_by_path
from onewan.doctor.duplicates import alike, same_content
from onewan.doctor.environment import Environment
from onewan.doctor.finding import Finding, without_names
from onewan.doctor.inspection import Advance, InspectedClip, inspect_clips
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
        yield from self.report.lines()
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
                clip_data(item.clip, is_held_out=item.clip in self.held_out) for item in self.clips
            ],
            "buckets": [
                {"frames": frames, "width": size[0], "height": size[1], "clips": number}
                for frames, size, number in self.buckets
            ],
            **({} if self.needs is None else self.needs.as_data()),
        }


def examine(
    config: ResolvedRun, environment: Environment, *, previews: bool, advance: Advance
) -> Examination:
    """The data of `config`, all of which is decoded. With `previews`, clips have small pictures.

    DataError if a source is not a folder that can be read.
    """
    probes = MediaProbes(config.video_data.cache_dir / "probes.jsonl")
    report = clips_of_run(config, probes)
    if config.video_data.cache:
        with suppress(OSError):  # the cache of another user, say
            probes.save()  # for the run that follows
    once = _each_once((*report.clips, *report.validation_clips))
    step = max(1, -(-len(once) // MOST_PREVIEWS))
    previewed = [previews and index % step == 0 for index in range(len(once))]
    fps = config.video_data.target_fps
    inspected = list(inspect_clips(once, previewed, fps, advance))
    undecodable = [
        ClipProblem.from_error(item.clip.path, item.error) for item in inspected if item.error
    ]
    usable = tuple(item for item in inspected if not item.error)
    report = _without_unusable(config, report, usable, undecodable)
    added = list(_added_findings(config, usable))
    used = (*report.clips, *report.validation_clips)
    needs = needs_of(config, used, environment) if used else None
    report = replace(
        report,
        problems=tuple(dict.fromkeys(report.problems)),
        warnings=tuple(dict.fromkeys((*report.warnings, *_as_warnings(added)))),
    )
    return Examination(
        sources=tuple(s.path for s in (*config.video_data.sources, *config.validation.sources)),
        clips=tuple(item for item in usable if item.clip in set(used)),
        held_out=frozenset(report.validation_clips),
        report=report,
        of_data=tuple(_of_report(report, added)),
        of_run=(*_missing_model(config), *(needs.findings if needs else _nothing(config))),
        needs=needs,
    )


def _each_once(clips: Iterable[Clip]) -> list[Clip]:
    """The clips of which each is decoded; the same span may be in two sources."""
    spans = {(c.path, c.start, c.fps, c.frames, c.size, c.background): c for c in clips}
    return list(spans.values())


def _without_unusable(
    config: ResolvedRun,
    report: DatasetReport,
    usable: Sequence[InspectedClip],
    undecodable: Sequence[ClipProblem],
) -> DatasetReport:
    """`report` without the clips that can't be decoded, split for validation as in training."""
    digests = {item.clip.path: item.digest for item in usable}
    failed = {problem.path for problem in undecodable}
    clips = [clip for clip in report.clips if clip.path not in failed]
    validation = tuple(clip for clip in report.validation_clips if clip.path not in failed)
    remaining, in_both = exclude_validation_clips(clips, validation, digests)
    report = replace(
        report,
        clips=tuple(remaining),
        validation_clips=validation,
        problems=(*report.problems, *undecodable, *in_both),
    )
    return with_held_out(config, report, digests)


def _added_findings(config: ResolvedRun, usable: Sequence[InspectedClip]) -> Iterator[Finding]:
    """What the trainer's own report does not look at."""
    for item in usable:
        for kind, text in item.pixels.notes() if item.pixels else ():
            yield Finding(severity="note", kind=kind, path=item.clip.path, text=text)
    yield from _duplicates(usable)
    yield from caption_findings([item.clip for item in usable], config)
    batch = config.train.batch_size
    for (frames, size), count in Counter((i.clip.frames, i.clip.size) for i in usable).items():
        if count < batch:
            yield Finding(
                severity="note",
                kind="small bucket",
                text=f"the bucket of {frames} frames at {size[0]}x{size[1]} has {count} "
                f"clip{'s' if count > 1 else ''}, fewer than train.batch_size ({batch}), so its "
                "batches are short; fewer values of video_data.resolution make fewer buckets",
            )


def _duplicates(usable: Sequence[InspectedClip]) -> Iterator[Finding]:
    # Several clips of one file have its content, and may look alike.
    files = list({item.clip.path: item for item in reversed(usable)}.values())[::-1]
    same = same_content([item.digest for item in files])
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
                text=f"{text} {files[other].clip.name}; take one out, unless it is to be trained "
                "twice as often",
            )


def _as_warnings(findings: Sequence[Finding]) -> list[ClipWarning]:
    return [ClipWarning(path=finding.path, text=finding.text) for finding in findings]


def _of_report(report: DatasetReport, added: Sequence[Finding]) -> Iterator[Finding]:
    """The problems and warnings of `report`, of which `added` have a kind already."""
    for problem in report.problems:
        text, kind = problem.reason, "unusable"
        yield Finding(severity="problem", kind=kind, path=problem.path, text=text)
    kinds = {(finding.path, finding.text): finding.kind for finding in added}
    for warning in report.warnings:
        kind = kinds.get((warning.path, warning.text), "changed" if warning.path else "data set")
        yield Finding(severity="note", kind=kind, path=warning.path, text=warning.text)


def _missing_model(config: ResolvedRun) -> Iterator[Finding]:
    """Paths of the model that are neither here nor on the hub; files are checked when it loads."""
    for component, given in config.model.sources().items():
        if not Path(given).expanduser().exists() and not may_be_repository(given):
            text = f"model.{component}: {given} does not exist; correct the path"
            yield Finding(severity="problem", kind="model", text=text)


def _nothing(config: ResolvedRun) -> tuple[Finding, ...]:
    if not config.video_data.sources:
        text = "video_data.sources: is empty; name at least one folder of clips"
    else:
        text = "no clip can be used"
    return (Finding(severity="problem", kind="data set", text=text),)
