"""Sources -> clips, with a report of every file that can't be used and why.

Reads no more of a file than its header, one frame and its end. One bad file never hides another:
each is in the report with its reason, and the others are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from onewan.arithmetic.buckets import floor_to_4n_plus_1
from onewan.data.captions import read_lines, several_lines_note
from onewan.data.clip import Clip, ClipPlanner, ClipSource
from onewan.data.clip_notes import clip_notes
from onewan.data.report import ClipProblem, ClipWarning, DatasetReport
from onewan.data.sources.item import SourceItem
from onewan.data.sources.read import read_source, source_problem
from onewan.errors import DataError, combined
from onewan.media.cuts import cut_detector


def index_clips(
    sources: Sequence[ClipSource],
    planner: ClipPlanner,
    *,
    use_masks: bool,
    key_path: str = "video_data.sources",
) -> DatasetReport:
    """All clips of all `sources`, in an order that depends on names alone, and what is wrong.

    A clip depends on its own file and name, not on what else a source contains. `key_path` is where
    the run file names the sources. Raises DataError with all that can't be read; that no clip is
    found is not an error here.
    """
    clips = list[Clip]()
    problems = list[ClipProblem]()
    warnings = list[ClipWarning]()
    warnings += _planner_notes(planner)
    wrong = [f"{s.path}: {why}" for s in sources if (why := source_problem(s.path, key_path))]
    if wrong:
        raise combined(DataError, wrong)
    for source in sources:
        contents = read_source(source, planner.video_formats, use_masks=use_masks)
        problems += contents.problems
        warnings += contents.warnings
        files = ((item.path, *item.masks) for item in contents.items)
        planner.probes.prepare(chain.from_iterable(files))
        line_counts = list[int]()
        for item in contents.items:
            try:
                lines = _caption_lines(item)
                captions = _captions(item, source, lines, planner.seed)
                planned = planner.plan(item, source, captions)
            except DataError as error:
                problems.append(_problem(item, error))
                continue
            clips += planned
            line_counts.append(len(lines) if item.captions is None else 1)
            notes = clip_notes(planner, planned, source.speed)
            warnings += [ClipWarning(path=item.path, text=text) for text in notes]
        if several := sum(number > 1 for number in line_counts):
            text = several_lines_note(
                source.path, several, len(line_counts), whole=source.captions.whole
            )
            warnings.append(ClipWarning(path=None, text=text))
    return DatasetReport(clips=tuple(clips), problems=tuple(problems), warnings=tuple(warnings))


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
            f"changes of scene are those by {cut_detector()}; `pip install onewan[scenes]` adds "
            "PySceneDetect, which is used where it is installed"
        )
    elif planner.frame_strategy == "keyframe" and not planner.needs_cuts:
        texts.append(
            "clips begin at key frames of the codec, which need not be changes of scene; "
            "`pip install onewan[scenes]` finds these"
        )
    return [ClipWarning(path=None, text=text) for text in texts]


def _caption_lines(item: SourceItem) -> tuple[str, ...]:
    """The captions of the source itself, or the lines of its text file."""
    return read_lines(item.path, item.texts) if item.captions is None else item.captions


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
