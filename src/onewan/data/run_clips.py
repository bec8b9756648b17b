"""The clips of a run file, and which of them are held out for validation: without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onewan.config.clips import SourceSection
from onewan.config.method import AdapterMethod
from onewan.config.schema import ResolvedRun
from onewan.data.augmented import with_variants
from onewan.data.buckets import clip_planner, clip_sources
from onewan.data.found_cuts import FoundCuts
from onewan.data.index import index_clips
from onewan.data.probes import MediaProbes
from onewan.data.report import ClipWarning, DatasetReport
from onewan.data.sources.copies import Copies
from onewan.data.validation_split import exclude_validation_clips, split_validation_clips
from onewan.errors import DataError


def clips_of_run(
    config: ResolvedRun,
    probes: MediaProbes,
    copies: Copies | None = None,
    cuts: FoundCuts | None = None,
) -> DatasetReport:
    """The clips of the training and the validation sources of `config`, as its planner takes them.

    A file that is in both is among both. `copies` are those of archives' members and remote files,
    by default below the run's cache, where those that are missing are made; `cuts` are the changes
    of scene, by default those in the run's cache, and files that were not searched are. DataError
    for sources that can't be read.
    """
    planner = replace(clip_planner(config), probes=probes)
    if cuts is not None:
        planner = replace(planner, cuts=cuts)
    copies = copies or Copies(config.video_data.cache_dir)

    def indexed(sources: Sequence[SourceSection], *, for_validation: bool) -> DatasetReport:
        return index_clips(
            clip_sources(sources, config),
            planner,
            use_masks=config.video_data.masks,
            for_validation=for_validation,
            copies=copies,
        )

    training = indexed(config.video_data.sources, for_validation=False)
    # Of `target: base` the run file's rules know; a concept of OneTrainer says it in its own file.
    has_prior = any(clip.is_prior for clip in training.clips)
    if has_prior and not isinstance(config.method, AdapterMethod):
        raise DataError(
            "video_data.sources: a concept has the type PRIOR_PREDICTION, which needs an adapter "
            f"method, and method.kind is {config.method.kind}; change one of them"
        )
    if not config.validation.sources:
        return training
    validation = indexed(config.validation.sources, for_validation=True)
    return replace(
        training,
        validation_clips=(*training.validation_clips, *validation.clips),
        problems=(*training.problems, *validation.problems),
        # What the planner does with all files is in both.
        warnings=tuple(dict.fromkeys((*training.warnings, *validation.warnings))),
    )


def with_contents(
    config: ResolvedRun, report: DatasetReport, digests: Mapping[Path, str]
) -> DatasetReport:
    """`report` with the variants of its training clips, and without those among them whose content
    is validated on, which are problems.

    `digests` are those of the files' content by path.
    """
    # Clips that are only validated on are taken as they are.
    trained = with_variants(report.clips, digests, config.train.seed)
    remaining, in_both = exclude_validation_clips(trained, report.validation_clips, digests)
    return replace(report, clips=tuple(remaining), problems=(*report.problems, *in_both))


def with_held_out(
    config: ResolvedRun, report: DatasetReport, digests: Mapping[Path, str]
) -> DatasetReport:
    """`report` with `validation.share` of its training clips held out, where `config` says so and
    the sources name no clips to validate on.

    `digests` are those of the files' content by path.
    """
    validation = config.validation
    if validation.sources or (validation.share is None and validation.clips == 0):
        return report
    if given := len(report.validation_clips):
        if not validation.share:
            return report
        text = f"validation.share is not used: the sources say which {given} clips to validate on"
        warning = ClipWarning(path=None, text=text)
        return replace(report, warnings=(*report.warnings, warning))
    clips, held_out = split_validation_clips(
        report.clips, validation.share, config.train.seed, digests
    )
    warnings = report.warnings
    if validation.share and not held_out:
        text = "validation.share holds out no clip: it needs two files that are not target: base"
        warnings = (*warnings, ClipWarning(path=None, text=text))
    return replace(report, clips=clips, validation_clips=held_out, warnings=warnings)
