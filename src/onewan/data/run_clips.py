"""The clips of a run file, and which of them are held out for validation: without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from onewan.config.schema import ResolvedRun
from onewan.data.buckets import clip_planner, clip_sources
from onewan.data.index import index_clips
from onewan.data.probes import MediaProbes
from onewan.data.report import ClipWarning, DatasetReport
from onewan.data.validation_split import split_validation_clips


def clips_of_run(config: ResolvedRun, probes: MediaProbes) -> DatasetReport:
    """The clips of the training and the validation sources of `config`, as its planner takes them.

    A file that is in both is among both. DataError for sources that can't be read.
    """
    planner = replace(clip_planner(config), probes=probes)
    use_masks = config.video_data.masks
    training = index_clips(
        clip_sources(config.video_data.sources, config), planner, use_masks=use_masks
    )
    if not config.validation.sources:
        return training
    validation = index_clips(
        clip_sources(config.validation.sources, config),
        planner,
        use_masks=use_masks,
        key_path="validation.sources",
    )
    return replace(
        training,
        validation_clips=validation.clips,
        problems=(*training.problems, *validation.problems),
        warnings=(*training.warnings, *validation.warnings),
    )


def with_held_out(
    config: ResolvedRun, report: DatasetReport, digests: Mapping[Path, str]
) -> DatasetReport:
    """`report` with `validation.share` of its training clips held out, where `config` says so.

    `digests` are those of the files' content by path.
    """
    validation = config.validation
    if validation.sources or (validation.share is None and validation.clips == 0):
        return report
    clips, held_out = split_validation_clips(
        report.clips, validation.share, config.train.seed, digests
    )
    warnings = report.warnings
    if validation.share and not held_out:
        text = "validation.share holds out no clip: it needs two files that are not target: base"
        warnings = (*warnings, ClipWarning(path=None, text=text))
    return replace(report, clips=clips, validation_clips=held_out, warnings=warnings)
