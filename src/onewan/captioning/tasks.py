"""Which files of a run's sources need a caption, and which frames of them are shown to a model.

The clips are those that the trainer's own planner takes, with the run's spans and sizes. Several
clips of a file have one caption, so the frames are spread over all of them.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from onewan.config.schema import ResolvedRun
from onewan.data.buckets import clip_planner, clip_sources
from onewan.data.captions import caption_path, review_path
from onewan.data.clip import Clip
from onewan.data.decode import frames_at
from onewan.data.probes import MediaProbes
from onewan.data.report import ClipProblem
from onewan.data.sources.item import SourceItem
from onewan.data.sources.names import pairing_key
from onewan.data.sources.read import SourceReader, kind_of, label_of, source_problem
from onewan.errors import DataError, combined

_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionTask:
    """A file that needs a caption."""

    name: str
    """Of the file, relative to its source."""
    clips: tuple[Clip, ...]
    """Its clips, one at least."""
    target: Path
    """The text file to write."""
    trigger_word: str
    """That of its source; empty if there is none."""
    moments: tuple[tuple[float, Clip], ...]
    """The frames that are shown: when each is, ascending, in the file's own clock, s, and the clip
    that has it."""
    size: tuple[int, int]
    """(width, height) of these frames, pixels."""

    @property
    def path(self) -> Path:
        return self.clips[0].path

    @property
    def seconds(self) -> float:
        """The time from the beginning of its first clip to the end of its last one; 0 for an
        image."""
        if self.clips[0].kind == "image":
            return 0.0
        ends = (clip.start + clip.frames / clip.fps for clip in self.clips)
        return max(ends) - min(clip.start for clip in self.clips)

    def images(self) -> list[str]:
        """The frames as JPEG files in data URLs. DataError if the file is damaged there."""
        urls = dict[float, str]()
        # Clip by clip, since each has frames of its own part of the file only.
        for clip in dict.fromkeys(clip for _, clip in self.moments):
            times = [time for time, of in self.moments if of == clip]
            frames = frames_at(replace(clip, size=self.size), times, threads=1)
            urls |= {
                time: _data_url(Image.fromarray(frame))
                for time, frame in zip(times, frames, strict=True)
            }
        return [urls[time] for time, _ in self.moments]


@dataclass(slots=True)
class CaptionPlan:
    """The files of all sources, by what becomes of them."""

    tasks: list[CaptionTask] = field(default_factory=list[CaptionTask])
    """In the order of the sources and names."""
    captioned: int = 0
    """Files that have a caption file already."""
    given: int = 0
    """Files whose source gives a caption, such as a table."""
    problems: list[ClipProblem] = field(default_factory=list[ClipProblem])
    """Files that training can't use, and others that no caption can be written for."""
    notes: list[str] = field(default_factory=list[str])
    folders: set[Path] = field(default_factory=set[Path])
    """Those in which caption files are, or will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlanner:
    """Finds the tasks of a run."""

    config: ResolvedRun
    frames: int
    """Largest number of frames of each file."""
    longest_side: int
    """Of these frames, pixels."""
    for_review: bool
    """Whether captions go into files of their own, which training does not read, also of clips
    that have captions."""

    def plan(self) -> CaptionPlan:
        """The tasks, in the sources of `config` for training and validation. DataError with all
        sources that can't be read."""
        video_data = self.config.video_data
        file = video_data.cache_dir / "probes.jsonl" if video_data.cache else None
        planner = replace(clip_planner(self.config), probes=MediaProbes(file))
        reader = SourceReader(
            planner.video_formats, use_masks=False, takes_condition_image=False, takes_control=False
        )
        sections = (*video_data.sources, *self.config.validation.sources)
        sources = clip_sources(sections, self.config)
        plan = CaptionPlan()
        wrong = [
            f"{label_of(source.path)}: {why}"
            for source in sources
            if (why := source_problem(source, "video_data.sources"))
        ]
        if wrong:
            raise combined(DataError, wrong)
        files = _Files(for_review=self.for_review)
        for source in sources:
            if isinstance(source.path, str) or kind_of(source) == "webdataset":
                plan.notes.append(
                    f"{label_of(source.path, short=True)} is left out: no text can be written "
                    "beside files that are in archives or elsewhere; copy them to a folder here"
                )
                continue
            contents = reader.read(source)
            plan.problems += contents.problems
            own = replace(planner, **source.planning)
            groups = files.needed(contents.items, plan)
            own.probes.prepare(path for path in groups)
            for path, items in groups.items():
                try:
                    clips = [
                        clip for item in items for clip in own.plan(_alone(item), source, ("",))
                    ]
                except DataError as error:
                    plan.problems.append(ClipProblem.from_error(path, error))
                    continue
                # A part of a file has its times in its name.
                name = items[0].name if len(items) == 1 else path.name
                word = source.captions.trigger_word
                plan.tasks.append(self._task(name, clips, files.target(path), word))
        return plan

    def _task(self, name: str, clips: list[Clip], target: Path, trigger_word: str) -> CaptionTask:
        owners = {time: clip for clip in clips for time in clip.times()}
        moments = sorted(owners.items(), key=lambda moment: moment[0])
        size = clips[0].size
        scale = min(1.0, self.longest_side / max(size))
        width, height = (max(1, round(side * scale)) for side in size)
        return CaptionTask(
            name=name,
            clips=tuple(clips),
            target=target,
            trigger_word=trigger_word,
            moments=tuple(moments[index] for index in spread(len(moments), self.frames)),
            size=(width, height),
        )


@dataclass(slots=True, kw_only=True)
class _Files:
    """The files that were found in sources, each of which is captioned once."""

    for_review: bool
    found: dict[str, Path] = field(default_factory=dict[str, Path])
    """By the key of their caption files."""

    def target(self, path: Path) -> Path:
        """The caption file to write for the media file `path`."""
        return review_path(path) if self.for_review else caption_path(path)

    def needed(
        self, items: Sequence[SourceItem], plan: CaptionPlan
    ) -> dict[Path, list[SourceItem]]:
        """The items of a source by their files, of the files that are to be captioned; `plan` gets
        the number of the others."""
        captions_of_clips = {pairing_key(caption_path(item.path)) for item in items}
        groups = dict[Path, list[SourceItem]]()
        for item in items:
            path = item.path
            plan.folders.add(path.parent)
            if path in groups:  # another part of the video
                groups[path].append(item)
                continue
            other = self.found.setdefault(pairing_key(path.with_suffix("")), path)
            if other is not path:
                if other != path:
                    text = f"{path.name} has the same caption file as {other.name}"
                    plan.notes.append(text)
            elif item.captions is not None and not self.for_review:
                plan.given += 1
            elif os.path.lexists(self.target(path)) or (item.texts and not self.for_review):
                plan.captioned += 1
            elif self.for_review and pairing_key(self.target(path)) in captions_of_clips:
                name = self.target(path).name
                reason = f"{name} would be the caption of another clip; rename one of them"
                plan.problems.append(ClipProblem(path=path, reason=reason))
            else:
                groups[path] = [item]
        return groups


def spread(number: int, wanted: int) -> Iterator[int]:
    """Indices of `wanted` of `number` things at equal distances, the first and the last among them;
    the middle one if one is wanted, and all if there are not more."""
    if wanted >= number:
        yield from range(number)
    elif wanted == 1:
        yield (number - 1) // 2
    else:
        yield from (round(i * (number - 1) / (wanted - 1)) for i in range(wanted))


def _alone(item: SourceItem) -> SourceItem:
    """`item` without masks and conditions, which captions do not depend on."""
    return replace(item, masks=(), condition_images=(), controls=())


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
