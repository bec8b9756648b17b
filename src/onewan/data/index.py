"""Sources -> clips, with a report of every file that can't be used and why.

Reads no more of a file than its header, one frame and its end. One bad file never hides another:
each is in the report with its reason, and the others are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from onewan.data.captions import read_lines, several_lines_note
from onewan.data.clip import Clip, ClipPlanner, ClipSource
from onewan.data.report import ClipProblem, ClipWarning, DatasetReport
from onewan.data.sources.item import SourceItem
from onewan.data.sources.read import read_source, source_problem
from onewan.errors import DataError, combined


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
    if planner.longest_clip != planner.max_frames:
        text = (
            f"wan_config.max_frames is {planner.max_frames}; {planner.longest_clip} are used, "
            f"since a clip has {planner.temporal_compression}n+1 frames"
        )
        warnings.append(ClipWarning(path=None, text=text))
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
                clip = planner.plan(item, source, captions)
            except DataError as error:
                problems.append(_problem(item, error))
                continue
            clips.append(clip)
            line_counts.append(len(lines) if item.captions is None else 1)
            warnings += [ClipWarning(path=item.path, text=t) for t in planner.warnings(clip)]
        if several := sum(number > 1 for number in line_counts):
            text = several_lines_note(
                source.path, several, len(line_counts), whole=source.captions.whole
            )
            warnings.append(ClipWarning(path=None, text=text))
    return DatasetReport(clips=tuple(clips), problems=tuple(problems), warnings=tuple(warnings))


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
