"""A run file's clips as the planner of clips takes them, and the buckets that they will have.

Without torch: `onewan plan` reads headers only, and answers before anything is encoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from onewan.arithmetic.buckets import Size, sizes_for
from onewan.config.clips import SourceSection
from onewan.config.resolve import default_clips_per_video, trained_experts
from onewan.config.schema import ResolvedRun
from onewan.config.timesteps import timesteps_of
from onewan.data.augment import Augmentation
from onewan.data.captions import CaptionSettings
from onewan.data.clip import Bucket, ClipPlanner, ClipSource
from onewan.data.found_cuts import FoundCuts
from onewan.data.sources.archives import archives_of
from onewan.data.sources.copies import Copies
from onewan.data.sources.item import SourceItem
from onewan.data.sources.names import Patterns
from onewan.data.sources.read import SourceReader, kind_of, label_of, source_problem
from onewan.data.validation_split import default_fraction
from onewan.errors import DataError
from onewan.files import total_bytes
from onewan.media import RGB, probe_header
from onewan.variants import Expert, ExpertName

_MOST_HEADERS = 100
"""Files whose headers are read; of a larger data set, so many at equal distances in its order."""
_THREADS = 4
_ASPECTS = (16 / 9, 9 / 16, 4 / 3, 1.0)
"""Shapes of frames that are assumed where there are no clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedBuckets:
    """The buckets of a run's clips, by the headers of their files."""

    clips: Mapping[tuple[int, Size], int]
    """Number of clips by (frames, size), scaled up to all files where not all were read. Each of
    the alternatives of which a pass through the data has one counts."""
    batches_per_epoch: Mapping[ExpertName, int]
    """Micro-batches in which each trained expert has every clip of its own once, or as often as the
    clip's source says."""
    assumed: bool = False
    """Whether there are no clips yet, so that common sizes stand for them."""
    notes: tuple[str, ...] = ()
    """What was assumed, for the user."""


def clip_planner(config: ResolvedRun) -> ClipPlanner:
    """The planner of clips with the run file's settings."""
    variant, video_data, wan_config = config.model.facts(), config.video_data, config.wan_config
    cuts_file = video_data.cache_dir / "cuts.jsonl" if video_data.cache else None
    return ClipPlanner(
        seed=config.train.seed,
        fps=video_data.target_fps,
        max_frames=wan_config.max_frames,
        clip_lengths=wan_config.clip_lengths,
        max_duration=video_data.max_duration,
        frame_strategy=wan_config.frame_sample_strategy,
        clips_per_video=wan_config.clips_per_video,
        stride=wan_config.stride,
        avoid_cuts=wan_config.avoid_cuts,
        slow_video=video_data.slow_video,
        resolutions=video_data.resolution,
        min_resolution=video_data.min_resolution,
        max_resolution=video_data.max_resolution,
        video_formats=video_data.supported_formats,
        interlaced=video_data.interlaced,
        background=_rgb(video_data.background),
        size_multiple=variant.size_multiple,
        temporal_compression=variant.temporal_compression,
        takes_condition_image=variant.takes_condition_image,
        condition_is_reference=variant.reference_channels is not None,
        takes_control=variant.takes_control,
        cuts=FoundCuts(cuts_file),
    )


def known_cuts_of(config: ResolvedRun) -> FoundCuts:
    """The changes of scene of the files that were searched before; others have none."""
    return FoundCuts(config.video_data.cache_dir / "cuts.jsonl", search=False)


def _rgb(color: str) -> RGB:
    """The parts of a color that is written as "#rrggbb"."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue


def clip_sources(sources: Sequence[SourceSection], config: ResolvedRun) -> list[ClipSource]:
    """`sources` of `config` with the settings of their clips."""
    return [
        ClipSource(
            path=source.path,
            repeats=source.repeats,
            loss_weight=source.loss_weight,
            is_prior=source.target == "base",
            timesteps=timesteps_of(source, config.model.facts()),
            caption_dropout=source.caption_dropout,
            kind=source.kind,
            recursive=source.recursive,
            patterns=Patterns(include=source.include, exclude=source.exclude),
            planning=_planning(source),
            use_masks=source.masks,
            condition=source.condition,
            speed=source.speed,
            augmentation=source.augment and Augmentation(**dict(source.augment)),
            captions=CaptionSettings(
                whole=config.video_data.captions == "whole",
                prefix=source.caption_prefix,
                trigger_word=source.trigger_word,
                class_word=source.class_word,
                tag_orders=source.shuffle_tags,
                kept_tags=source.keep_tags,
            ),
        )
        for source in sources
    ]


def _planning(source: SourceSection) -> dict[str, Any]:
    """The fields of the planner that a source has its own values of."""
    strategy, clips = source.frame_sample_strategy, source.clips_per_video
    if strategy is not None and clips is None:
        clips = default_clips_per_video(strategy)
    own = {
        "fps": source.target_fps,
        "max_frames": source.max_frames,
        "clip_lengths": None if source.max_frames is None else (),
        "frame_strategy": strategy,
        "clips_per_video": clips,
        "max_duration": source.max_duration,
        "resolutions": source.resolution,
        "min_resolution": source.min_resolution,
        "max_resolution": source.max_resolution,
        "interlaced": source.interlaced,
    }
    return {name: value for name, value in own.items() if value is not None}


def expected_buckets(config: ResolvedRun) -> ExpectedBuckets:
    """The buckets of the clips of `config`, for training and validation.

    Files that can't be used are left out; encoding reports them. Without any usable file, the
    buckets are those of clips of `wan_config.max_frames` frames in common shapes.
    """
    known_cuts = known_cuts_of(config)
    planner = replace(clip_planner(config), cuts=known_cuts)
    training = clip_sources(config.video_data.sources, config)
    validation = clip_sources(config.validation.sources, config)
    copies = Copies(config.video_data.cache_dir, make=False)
    reader = SourceReader(planner.video_formats, use_masks=False, copies=copies)
    files = [
        (item, source, 0 if item.split == "validation" else repeats * item.repeats)
        for source, repeats in [*((s, s.repeats) for s in training), *((s, 0) for s in validation)]
        # What is elsewhere is not fetched for a plan.
        if isinstance(source.path, Path) and source_problem(source, "") is None
        for item in reader.read(source).items
        if item.texts or item.captions is not None
    ]
    step = max(1, -(-len(files) // _MOST_HEADERS))
    read = files[::step]
    with ThreadPoolExecutor(_THREADS) as pool:
        buckets = list(pool.map(lambda file: _buckets(planner, file[0], file[1]), read))
    found = [
        (bucket, repeats, source)
        for each, (_, source, repeats) in zip(buckets, read, strict=True)
        for bucket in each
    ]
    notes = [
        f"the clips of {label_of(source.path)}, and the disk space of their copies, are not "
        "counted before they are here"
        for source in (*training, *validation)
        if isinstance(source.path, str)
    ]
    if not found:
        return _without_clips(config, planner, len(files), notes)
    if step > 1:
        notes.append(f"the headers of {len(read)} of {len(files)} files were read")
    usable = [item.path for each, (item, *_) in zip(buckets, read, strict=True) if each]
    if planner.needs_cuts and not all(map(known_cuts.knows, usable)):
        notes.append(
            "videos that were not searched for changes of scene yet count as one scene each; "
            "`onewan cache` searches them"
        )
    # The largest size may be that of a file that was not read.
    counts = Counter[tuple[int, Size]]()
    for bucket, _, source in found:
        forms = 1 + (source.augmentation.variants if source.augmentation else 0)
        counts[bucket.frames, bucket.size] += bucket.takes * forms
    remaining = step * (1 - _held_out(config, len(files)))
    return ExpectedBuckets(
        clips={b: step * n for b, n in counts.items()},
        batches_per_epoch={
            expert.name: _batches(found, expert, remaining, config.train.batch_size)
            for expert in trained_experts(config)
        },
        notes=tuple(notes),
    )


def bytes_of_archives(config: ResolvedRun) -> int:
    """What the members of archives on this machine take on the disk at most, once they are unpacked
    below the cache: the archives are not compressed."""
    sources = clip_sources([*config.video_data.sources, *config.validation.sources], config)
    archives = {
        archive
        for source in sources
        if isinstance(source.path, Path) and source_problem(source, "") is None
        if kind_of(source) == "webdataset"
        for archive in archives_of(source.path)
    }
    return sum(total_bytes(archive) for archive in archives)


def _batches(
    found: Sequence[tuple[Bucket, int, ClipSource]], expert: Expert, share: float, batch_size: int
) -> int:
    """The micro-batches in which `expert` has `share` of the clips that were found and that it
    trains, with their repeats."""
    used = Counter[tuple[int, Size]]()
    for bucket, repeats, source in found:
        if source.timesteps.part_of(expert):
            used[bucket.frames, bucket.size] += repeats
    return sum(ceil(share * count / batch_size) for count in used.values())


def _held_out(config: ResolvedRun, files: int) -> float:
    """The fraction of the training files that is held out for validation."""
    validation = config.validation
    if validation.share is not None:
        return validation.share
    return 0.0 if validation.sources or not validation.clips else default_fraction(files)


def _buckets(planner: ClipPlanner, item: SourceItem, source: ClipSource) -> list[Bucket]:
    try:
        planner = replace(planner, **source.planning)
        return planner.buckets(item.within(probe_header(item.path)), source.speed)
    except DataError:
        return []


def _without_clips(
    config: ResolvedRun, planner: ClipPlanner, files: int, notes: Sequence[str]
) -> ExpectedBuckets:
    what = f"none of {files} files can be used" if files else "there are no clips yet"
    clips = {
        (frames, size): 1
        for frames in planner.lengths
        for resolution in planner.resolutions
        for aspect in _ASPECTS
        for size in sizes_for(resolution, aspect, planner.size_multiple, planner.max_resolution)[:1]
    }
    return ExpectedBuckets(
        assumed=True,
        clips=clips,
        batches_per_epoch={expert.name: len(clips) for expert in trained_experts(config)},
        notes=(
            *notes,
            f"{what}, so clips of {planner.longest_clip} frames at the training sizes are assumed",
        ),
    )
