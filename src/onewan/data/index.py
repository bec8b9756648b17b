"""Sources -> clips, with a report of every file that can't be used and why.

Reads no more of a file than its header, one frame and its end. One bad file never hides another:
each is in the report with its reason, and the others are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onewan.arithmetic.buckets import floor_to_4n_plus_1
from onewan.data.captions import CP1252_NOTE, read_caption_file, several_lines_note
from onewan.data.clip import Clip, ClipPlanner, ClipSource
from onewan.data.clip_notes import clip_notes
from onewan.data.report import ClipProblem, ClipWarning, DatasetReport
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.copies import Copies
from onewan.data.sources.item import SourceItem
from onewan.data.sources.read import SourceReader, label_of, source_problem
from onewan.data.sources.remote import Progress, no_progress
from onewan.errors import DataError, combined
from onewan.media.cuts import cut_detector


def index_clips(
    sources: Sequence[ClipSource],
    planner: ClipPlanner,
    *,
    use_masks: bool,
    for_validation: bool = False,
    copies: Copies | None = None,
) -> DatasetReport:
    """All clips of all `sources`, in an order that depends on names alone, and what is wrong.

    A clip depends on its own file and name, not on what else a source contains. With
    `for_validation` the sources are those of `validation`, and clips that a source marks for
    training are left out; otherwise those that it marks for validation are the report's
    `validation_clips`. `copies` is needed for archives and for sources elsewhere, and is told of
    progress. Raises DataError with all that can't be read; that no clip is found is not an error
    here.
    """
    key_path = "validation.sources" if for_validation else "video_data.sources"
    reader = SourceReader(
        planner.video_formats,
        use_masks,
        copies,
        takes_condition_image=planner.takes_condition_image,
        takes_control=planner.takes_control,
    )
    planners = [replace(planner, **source.planning) for source in sources]
    contents = _read_all(sources, reader, key_path)
    progress = no_progress if copies is None else copies.progress
    reports = [
        _source_report(source, inside, own, progress, for_validation=for_validation)
        for source, inside, own in zip(sources, contents, planners, strict=True)
    ]
    return DatasetReport(
        clips=tuple(clip for report in reports for clip in report.clips),
        validation_clips=tuple(clip for report in reports for clip in report.validation_clips),
        problems=tuple(problem for report in reports for problem in report.problems),
        warnings=(
            *dict.fromkeys(note for own in planners for note in _planner_notes(own)),
            *(warning for report in reports for warning in report.warnings),
        ),
    )


def _source_report(
    source: ClipSource,
    contents: SourceContents,
    planner: ClipPlanner,
    progress: Progress,
    *,
    for_validation: bool,
) -> DatasetReport:
    """The clips of one source."""
    clips, held_out = list[Clip](), list[Clip]()
    problems, warnings = list(contents.problems), list(contents.warnings)
    items = contents.items
    if for_validation:
        items = [item for item in items if item.split != "train"]
        if others := len(contents.items) - len(items):
            text = f"{others} clips of {label_of(source.path)} are not validated on: split is train"
            warnings.append(ClipWarning(path=None, text=text))
    planner.prepare(items, source, progress)
    line_counts = list[int]()
    for item in items:
        try:
            lines = item.captions
            if lines is None:
                file = read_caption_file(item.path, item.texts)
                lines = file.lines
                if file.is_cp1252:
                    warnings.append(
                        ClipWarning(path=file.path, text=CP1252_NOTE, about="caption encoding")
                    )
            planned = planner.plan(item, source, _captions(item, source, lines, planner.seed))
        except DataError as error:
            problems.append(_problem(item, error))
            continue
        if item.split == "validation" and not for_validation:
            held_out += [clip for clip in planned if clip.take == 0]
        else:
            clips += planned
        line_counts.append(len(lines) if item.captions is None else 1)
        notes = clip_notes(planner, planned, source.speed)
        warnings += [ClipWarning(path=item.path, text=n.text, about=n.about) for n in notes]
    if several := sum(number > 1 for number in line_counts):
        place = label_of(source.path, short=True)
        whole = source.captions.whole
        text = several_lines_note(place, several, len(line_counts), whole=whole)
        warnings.append(ClipWarning(path=None, text=text))
    if planner.takes_control:
        warnings += _without_control(source, [*clips, *held_out])
    return DatasetReport(
        clips=tuple(clips),
        validation_clips=tuple(held_out),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _without_control(source: ClipSource, clips: Sequence[Clip]) -> list[ClipWarning]:
    """A warning if some of the `clips` of a source have no control video."""
    without = sorted({clip.name for clip in clips if clip.conditions.control is None})
    if not without:
        return []
    of = len({clip.name for clip in clips})
    text = (
        f"{len(without)} of {of} files of {label_of(source.path, short=True)} have no control "
        f"video and are trained with zeros in its place, such as {without[0]}; a control video "
        "is NAME.control.mp4 beside NAME.mp4, or in the column `control` of a table"
    )
    return [ClipWarning(path=None, text=text)]


def _read_all(
    sources: Sequence[ClipSource], reader: SourceReader, key_path: str
) -> list[SourceContents]:
    """What all sources contain; one DataError with all that can't be read at all."""
    problems = [(source, source_problem(source, key_path)) for source in sources]
    wrong = [f"{label_of(source.path)}: {why}" for source, why in problems if why]
    contents = list[SourceContents]()
    for source, why in problems:
        try:
            contents.append(SourceContents() if why else reader.read(source))
        except DataError as error:  # noqa: PERF203  (a few sources)
            wrong.append(error.message)
    if wrong:
        raise combined(DataError, wrong)
    return contents


def _planner_notes(planner: ClipPlanner) -> list[ClipWarning]:
    """Notes about what the planner does with all files."""
    field = "wan_config.clip_lengths" if planner.clip_lengths else "wan_config.max_frames"
    texts = [
        f"{field} is {wanted}; {used} are used, since a clip has "
        f"{planner.temporal_compression}n+1 frames"
        for wanted in planner.clip_lengths or (planner.max_frames,)
        if (used := floor_to_4n_plus_1(wanted, planner.temporal_compression)) != wanted
    ]
    if planner.needs_cuts and cut_detector() != "PySceneDetect":
        texts.append(
            f'changes of scene are those by {cut_detector()}; `pip install "onewan[cuts]"` adds '
            "PySceneDetect, which is used where it is installed"
        )
    elif planner.frame_strategy == "keyframe" and not planner.needs_cuts:
        texts.append(
            "clips begin at key frames of the codec, which need not be changes of scene; "
            '`pip install "onewan[cuts]"` finds these'
        )
    return [ClipWarning(path=None, text=text) for text in texts]


def _captions(
    item: SourceItem, source: ClipSource, lines: Sequence[str], seed: int
) -> tuple[str, ...]:
    # A source that gives several captions has said what each of them is.
    settings = source.captions
    if item.captions is not None:
        settings = replace(settings, whole=False)
    return settings.captions(lines, seed)


def _problem(item: SourceItem, error: DataError) -> ClipProblem:
    problem = ClipProblem.from_error(item.path, error)
    if not item.origin:
        return problem
    return replace(problem, reason=f"{problem.reason} ({item.origin})")
