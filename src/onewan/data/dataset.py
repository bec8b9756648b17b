"""`prepare`: from a run file to the data set that is trained and validated on.

Finds the clips, encodes those that the cache does not contain, reports every clip that can't be
used, and splits off the validation clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS
from onewan.config.clips import SourceSection
from onewan.config.resolve import condition_shares
from onewan.config.schema import ResolvedRun
from onewan.data.ahead import worker_count
from onewan.data.buckets import known_cuts_of
from onewan.data.cache import ContentDigests, EntryCache
from onewan.data.cache_use import Needed
from onewan.data.cached_latents import CachedLatents
from onewan.data.clip import Clip
from onewan.data.conditions import FIRST_FRAME, Conditions
from onewan.data.contact_sheet import clips_to_show, write_contact_sheet
from onewan.data.encode import (
    FillResult,
    LatentSource,
    LoadModel,
    OnlineEncoder,
    ProgressCallback,
    no_progress,
)
from onewan.data.entry_keys import EntryKeys, bounds_key
from onewan.data.found_cuts import FoundCuts
from onewan.data.keys import entry_key
from onewan.data.probes import MediaProbes
from onewan.data.report import ClipWarning, DatasetReport
from onewan.data.run_clips import clips_of_run, with_contents, with_held_out
from onewan.data.sources.copies import Copies
from onewan.data.sources.place import first_few
from onewan.data.sources.read import label_of
from onewan.errors import DataError, one_line
from onewan.files import replacing
from onewan.formats.model_folder import ComponentName
from onewan.model.conditioning import conditioning_of
from onewan.parallel.environment import is_first_process


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The clips of a run, and where their encoded tensors come from."""

    clips: tuple[Clip, ...]
    """Training clips."""
    validation_clips: tuple[Clip, ...]
    """Clips that are held out of training; none unless the run file asks for them."""
    report: DatasetReport
    source: LatentSource
    digest: str
    """Of everything that the training samples and their order depend on."""
    encoded: int
    """Number of cache entries that had to be encoded."""


def prepare(
    config: ResolvedRun,
    component_paths: Mapping[ComponentName, Path],
    load_model: LoadModel,
    *,
    extra_prompts: Sequence[str] = (),
    encode_text_online: bool = False,
    progress: ProgressCallback = no_progress,
    verify: bool = False,
    check_clips: Callable[[Sequence[Clip]], None] = lambda _: None,
) -> Dataset:
    """The data set of a resolved run file, with all missing cache entries encoded.

    `component_paths` are the files of the VAE, the text encoder and the tokenizer, whose content
    keys the cache. `extra_prompts` are encoded like captions, for sampling later without the text
    encoder. With `encode_text_online` no text is encoded, neither here nor by the source. `verify`
    reads all entries and media files that exist, and encodes again what is damaged or has changed
    without another size or time. `check_clips` gets the training clips before anything is encoded,
    and raises if they can't be used. Clips that can't be decoded are left out and reported. Raises
    DataError if no training clip is left, or if the run file names validation sources and none of
    their clips is left. Where torchrun has started several processes, the first one writes the list
    of problems and the contact sheet.
    """
    if not config.video_data.sources:
        raise DataError("video_data.sources: is empty; name at least one folder of clips")
    # Needed without a cache too: the split and the data set's digest depend on content, not names.
    known_digests = ContentDigests(config.video_data.cache_dir / "digests.jsonl", verify=verify)
    probes = MediaProbes(config.video_data.cache_dir / "probes.jsonl", verify=verify)
    copies = Copies(config.video_data.cache_dir, progress=progress, verify=verify)
    report, digests = _index(config, known_digests, probes, copies)
    check_clips(report.clips)
    clips = (*report.clips, *report.validation_clips)
    shown = clips_to_show(clips)
    if config.video_data.cache:
        # Now, so that interrupted encoding does not repeat the reading.
        known_digests.save()
        probes.save()
        source = _cached_latents(config, component_paths, digests)
        texts = [] if encode_text_online else _texts(config, report, extra_prompts)
        result = source.fill(clips, texts, load_model, progress, verify=verify, previewed=shown)
    else:
        source = OnlineEncoder(
            config.model.facts(),
            load_model,
            encode_text_online=encode_text_online,
            vae_dtype=config.video_data.vae_dtype,
            checking_workers=worker_count(config.video_data.workers),
        )
        result = source.prepare(clips, progress)
    report = _final_report(config, report, result, digests)
    if isinstance(source, CachedLatents) and is_first_process():
        report = _with_contact_sheet(config, report, source, shown)
    return Dataset(
        clips=report.clips,
        validation_clips=report.validation_clips,
        report=report,
        source=source,
        digest=_dataset_digest(report, digests),
        encoded=result.encoded,
    )


def survey(config: ResolvedRun) -> DatasetReport:
    """The clips of a run, as `prepare` finds them, but nothing is decoded, fetched, unpacked or
    written: what decoding shows, such as damage and changes of scene, is not known.

    DataError if a source can't be read, or if no clip is found in sources of which none is
    elsewhere.
    """
    video_data = config.video_data
    here = [source for source in video_data.sources if isinstance(source.path, Path)]
    config = config.model_copy(
        update={"video_data": video_data.model_copy(update={"sources": here})}
    )
    probes = MediaProbes(video_data.cache_dir / "probes.jsonl")
    copies = Copies(video_data.cache_dir, make=False)
    known_digests = ContentDigests(video_data.cache_dir / "digests.jsonl")
    report, digests = _index(config, known_digests, probes, copies, known_cuts_of(config))
    report = with_held_out(config, report, digests)
    if len(here) == len(video_data.sources):
        _require_clips(config, report)
    return report


def needed(
    config: ResolvedRun,
    component_paths: Mapping[ComponentName, Path],
    *,
    extra_prompts: Sequence[str] = (),
    encode_text_online: bool = False,
) -> Needed:
    """What a run needs of the folder of its cache; the arguments are those of `prepare`.

    Reads the clips, and encodes nothing. DataError if a source can't be read, or a file of another
    machine: then nobody knows what the run needs.
    """
    folder = config.video_data.cache_dir
    known_digests = ContentDigests(folder / "digests.jsonl")
    probes = MediaProbes(folder / "probes.jsonl")
    copies = Copies(folder)
    report, digests = _index(config, known_digests, probes, copies)
    if failed := copies.remote.failed:
        reasons = [f"{path.name}: {reason}" for path, reason in failed.items()]
        text = "what the run needs is not known, since files can't be fetched; try again later"
        raise DataError(text, reasons)
    clips = (*report.clips, *report.validation_clips)
    texts = [] if encode_text_online else _texts(config, report, extra_prompts)
    source = _cached_latents(config, component_paths, digests)
    return Needed(
        entries=frozenset(source.entries(clips, texts, clips_to_show(clips))),
        copies=copies.used,
        runs=frozenset([config.output.name]),
    )


def _cached_latents(
    config: ResolvedRun,
    component_paths: Mapping[ComponentName, Path],
    digests: Mapping[Path, str],
) -> CachedLatents:
    """What reads and fills the cache of a run."""
    keys = EntryKeys(
        variant=config.model.facts(),
        component_paths=component_paths,
        text_dtype=config.model.dtype,
        digests=digests,
        vae_dtype=config.video_data.vae_dtype,
    )
    return CachedLatents(
        EntryCache(config.video_data.cache_dir),
        keys,
        conditioning=conditioning_of(keys.variant, condition_shares(config)),
        workers=worker_count(config.video_data.workers),
    )


def _index(
    config: ResolvedRun,
    known_digests: ContentDigests,
    probes: MediaProbes,
    copies: Copies,
    cuts: FoundCuts | None = None,
) -> tuple[DatasetReport, dict[Path, str]]:
    """The clips of all sources, and the digest of the content of each of their files by path.

    A file among both the training and the validation sources is only validated on.
    """
    report = clips_of_run(config, probes, copies, cuts)
    clips = (*report.clips, *report.validation_clips)
    paths = {path for clip in clips for path in clip.files}
    # Each file once, though it may be in several sources.
    digests = {path: known_digests.of(path) for path in sorted(paths)}
    changed = [
        ClipWarning(
            path=path, text="has other content than before, though not another size or time"
        )
        for path in known_digests.changed
    ]
    report = with_contents(config, report, digests)
    report = replace(report, warnings=(*report.warnings, *changed))
    return report, digests


def _places(sources: Sequence[SourceSection]) -> str:
    return first_few([label_of(source.path) for source in sources])


def _texts(config: ResolvedRun, report: DatasetReport, extra_prompts: Sequence[str]) -> list[str]:
    """All texts that training, validation and sampling need."""
    captions = {caption for clip in report.clips for caption in clip.captions}
    captions |= {text for clip in report.clips for text in clip.class_captions if text is not None}
    # Validation uses the first caption of a clip, so that its loss is always that of the same text.
    captions |= {clip.captions[0] for clip in report.validation_clips}
    # A dropped caption is replaced by the embeddings of the empty one.
    shares = [
        config.train.caption_dropout if clip.caption_dropout is None else clip.caption_dropout
        for clip in report.clips
    ]
    empty = {""} if any(shares) else set[str]()
    return sorted(captions | empty | set(extra_prompts))


def _final_report(
    config: ResolvedRun, report: DatasetReport, result: FillResult, digests: Mapping[Path, str]
) -> DatasetReport:
    """The report without the clips that failed, with `validation.share` of the others held out."""
    # Split only now: a clip that can't be decoded must not take up a share of the validation clips.
    failed = {problem.path for problem in result.problems}
    clips = tuple(clip for clip in report.clips if clip.path not in failed)
    validation_clips = tuple(clip for clip in report.validation_clips if clip.path not in failed)
    report = replace(
        report,
        clips=clips,
        validation_clips=validation_clips,
        # A file that is in two sources has the same problem twice.
        problems=tuple(dict.fromkeys((*report.problems, *result.problems))),
        warnings=tuple(dict.fromkeys((*report.warnings, *result.warnings))),
    )
    report = with_held_out(config, report, digests)
    if config.video_data.cache and is_first_process():
        report = _with_list(config.video_data.cache_dir, report)
    _require_clips(config, report)
    return report


def _require_clips(config: ResolvedRun, report: DatasetReport) -> None:
    """DataError if there are none to train on, or none of `validation.sources`."""
    if not report.clips:
        raise DataError(
            f"no clip can be used in {_places(config.video_data.sources)}",
            report.lines(),
        )
    if config.validation.sources and not report.validation_clips:
        raise DataError(
            f"no clip of validation.sources can be used in {_places(config.validation.sources)}",
            report.lines(),
        )


def _with_contact_sheet(
    config: ResolvedRun, report: DatasetReport, source: CachedLatents, shown: Sequence[Clip]
) -> DatasetReport:
    """The report with the place of the contact sheet, which is written if it is out of date."""
    held_out = set(report.validation_clips)
    clips = held_out | set(report.clips)
    try:
        sheet = write_contact_sheet(
            config.video_data.cache_dir,
            config.output.name,
            source,
            [clip for clip in shown if clip in clips],
            held_out=held_out,
            of_clips=len(clips),
            temporal_compression=config.model.facts().temporal_compression,
        )
    except (OSError, DataError) as error:  # a full disk, or the cache of another user
        text = f"the contact sheet can't be written: {getattr(error, 'strerror', None) or error}"
        return replace(
            report, warnings=(*report.warnings, ClipWarning(path=None, text=one_line(text)))
        )
    return replace(report, contact_sheet=str(sheet), contact_sheet_pages=sheet.pages)


def _with_list(folder: Path, report: DatasetReport) -> DatasetReport:
    """`report` with a file in the cache folder that lists every problem, if there are any, and with
    what that file has listed before."""
    file = folder / "unusable_files.txt"
    try:
        if not report.problems:
            file.unlink(missing_ok=True)
            return report
        before = ""
        if file.exists():
            before = file.read_text(encoding="utf-8", errors="replace")
        with replacing(file) as temporary:
            lines = "".join(f"{problem}\n" for problem in report.problems)
            temporary.write_text(lines, encoding="utf-8", errors="backslashreplace")
    except OSError:  # the cache of another user: then the report itself has to name all files
        return report
    return replace(report, problem_list=file, listed_before=frozenset(before.splitlines()))


def _dataset_digest(report: DatasetReport, digests: Mapping[Path, str]) -> str:
    """A digest of all that training and validation depend on.

    Checkpoints and exported files contain it, so its inputs must not change without need.
    """

    def conditions(given: Conditions) -> list[object]:
        image, control = given.image, given.control
        return [
            given.frame,
            None if image is None else [digests[image.path], list(image.background)],
            None
            if control is None
            else [digests[control.path], control.start, list(control.background)],
            *(["reference"] if given.as_reference else []),
        ]

    # Not the clips' paths: a data set that is moved to another folder or machine is the same one.
    def inputs(clip: Clip) -> list[object]:
        mask = [digests[clip.mask.path], clip.mask.start] if clip.mask else None
        settings = [clip.repeats, clip.loss_weight, "base" if clip.is_prior else "data"]
        if clip.caption_dropout is not None:
            settings.append(clip.caption_dropout)
        if clip.timesteps != ALL_TIMESTEPS:
            settings.append({"timesteps": clip.timesteps.key()})
        if clip.class_captions:
            settings.append({"class_captions": clip.class_captions})
        if clip.takes > 1:
            settings.append([clip.take, clip.takes])
        if clip.variation is not None:
            settings.append(clip.variation.key)
        if clip.fields is not None:
            settings.append(clip.fields)
        settings += bounds_key(clip)
        if clip.conditions != FIRST_FRAME:
            settings.append(conditions(clip.conditions))
        span = [clip.start, clip.fps, clip.frames, list(clip.size)]
        return [clip.name, digests[clip.path], span, clip.captions, settings, mask]

    return entry_key(
        clips=[inputs(clip) for clip in report.clips],
        held_out=[inputs(clip) for clip in report.validation_clips],
    )
