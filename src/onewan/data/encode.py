"""Clips and captions -> entries: latents, the condition, masks, text; through the cache or not.

`prepare` is the one way from a run file to a data set that trains. It indexes the sources, finds
out what is not in the cache yet, encodes just that (captions before videos, so that the 11 GB text
encoder and the VAE are never loaded together), reports every clip that can't be used, and holds out
those to validate on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from onewan.config.schema import ResolvedRun, VideoDataFields
from onewan.data.cache import ContentDigests, EntryCache, Kind, key_of
from onewan.data.decode import decode
from onewan.data.index import Clip, Note, Problem, Report, index_clips
from onewan.data.masks import MASK_VERSION, Mask, latent_mask, of_mask
from onewan.data.validation_split import split, without
from onewan.errors import DataError
from onewan.model.sources import Component, Placed, fingerprint
from onewan.model.wan import WanModel
from onewan.variants import Variant

ENCODING_VERSION = 1
"""Raised when decoding, resizing or encoding changes its numbers: old entries then don't count."""

LoadModel = Callable[[Collection[Component]], WanModel]
"""Loads the given components of the run's model, on the device of the run."""


class LatentSource(Protocol):
    """Where a data loader gets the parts of an entry from."""

    prefetch: bool
    """Whether another thread may read ahead."""

    def video(self, clip: Clip) -> dict[str, Tensor]:
        """The parts of a clip's entry, float32.

        ``latents`` [C, F, h, w]; for I2V-A14B, ``condition`` of the same shape; for a clip that has
        a mask, ``mask`` [1, F, h, w] from 0 to 1.
        """
        ...

    def text(self, caption: str) -> Tensor:
        """[length, dim]: the valid tokens of a caption."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Clips that can be trained on, and where their entries come from."""

    clips: tuple[Clip, ...]
    held_out: tuple[Clip, ...]
    """Clips to validate on, which never train; none unless the run file asks for them."""
    report: Report
    source: LatentSource
    digest: str
    """Of all that decides the entries and their order: equal data sets have equal digests."""
    encoded: int
    """Entries that had to be encoded."""


class Progress(Protocol):
    def __call__(self, what: str, done: int, total: int) -> None:
        """Told after each caption and clip; may raise to stop, which loses nothing."""
        ...


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
    del what, done, total


def prepare(
    config: ResolvedRun,
    places: Mapping[Placed, Path],
    load: LoadModel,
    *,
    extra_prompts: Sequence[str] = (),
    encode_text_online: bool = False,
    progress: Progress = silent,
    verify: bool = False,
) -> Dataset:
    """The data set of a resolved run file, with every missing entry encoded.

    `places` says where the VAE, the text encoder and the tokenizer are: their content keys the
    cache. `extra_prompts` are encoded as captions are, for sampling later without the text encoder.
    With `encode_text_online` no text is encoded at all, neither now nor by the data set's source.
    `verify` reads every entry that is there and encodes the damaged ones again. Clips that fail to
    decode are dropped and join the report. DataError if no clip is left to train on, or none of
    those that were named to validate on.
    """
    if not config.video_data.sources:
        raise DataError("video_data.sources: is empty; name at least one folder of clips")
    variant = config.model.facts()
    # Content decides, not names: the digests also key the data set when nothing is cached.
    digests = ContentDigests(config.video_data.cache_dir / "digests.json")
    report, content = _indexed(config, variant, digests)
    if config.video_data.cache:
        digests.save()
        source = _CachedLatents(config, variant, places, content)
    else:
        source = _OnlineEncoder(variant, encode_text_online=encode_text_online)
    texts = [] if encode_text_online else _texts(config, report, extra_prompts)
    made = source.fill((*report.clips, *report.held_out), texts, load, progress, verify)
    report = _usable(config, report, made, content)
    digest = key_of(
        clips=[_causes(clip, content) for clip in report.clips],
        held_out=[_causes(clip, content) for clip in report.held_out],
    )
    return Dataset(
        clips=report.clips,
        held_out=report.held_out,
        report=report,
        source=source,
        digest=digest,
        encoded=made.encoded,
    )


def _indexed(
    config: ResolvedRun, variant: Variant, digests: ContentDigests
) -> tuple[Report, dict[Path, str]]:
    """What all sources hold, and the content's digest of each clip and mask by its path.

    What is named both to train and to validate on is only held out.
    """
    sizes = config.video_data.resolution

    def index(video_data: VideoDataFields, field: str) -> Report:
        return index_clips(
            video_data,
            config.wan_config,
            seed=config.train.seed,
            target_fps=config.video_data.target_fps,
            resolutions=sizes if isinstance(sizes, tuple) else (sizes,),
            size_multiple=variant.size_multiple,
            temporal_compression=variant.temporal_compression,
            field=field,
        )

    training = index(config.video_data, "video_data.sources")
    held_out = Report(clips=(), problems=(), notes=())
    if config.validation.sources:
        apart = config.video_data.model_copy(update={"sources": config.validation.sources})
        held_out = index(apart, "validation.sources")
    every = (*training.clips, *held_out.clips)
    paths = {clip.path for clip in every} | {clip.mask.path for clip in every if clip.mask}
    content = {path: digests.of(path) for path in sorted(paths)}
    clips, shared = without(training.clips, held_out.clips, content)
    report = Report(
        clips=tuple(clips),
        held_out=held_out.clips,
        problems=(*training.problems, *held_out.problems, *shared),
        notes=(*training.notes, *held_out.notes),
    )
    return report, content


def _texts(config: ResolvedRun, report: Report, extra_prompts: Sequence[str]) -> list[str]:
    """All texts that training, validation and sampling may ask for."""
    captions = {caption for clip in report.clips for caption in clip.captions}
    captions |= {clip.captions[0] for clip in report.held_out}
    empty = {""} if config.train.caption_dropout else set[str]()
    return sorted(captions | empty | set(extra_prompts))


def _usable(config: ResolvedRun, report: Report, made: _Made, content: dict[Path, str]) -> Report:
    """The report without the clips that failed, and with `validation.share` of them held out."""
    bad = {problem.path for problem in made.problems}
    clips = tuple(clip for clip in report.clips if clip.path not in bad)
    held_out = tuple(clip for clip in report.held_out if clip.path not in bad)
    notes = (*report.notes, *made.notes)
    if config.validation.share:
        clips, held_out = split(clips, config.validation.share, config.train.seed, content)
        if not held_out:
            text = "no clip is held out by validation.share: there are too few that show data"
            notes = (*notes, Note(path=None, text=text))
    report = replace(
        report,
        clips=clips,
        held_out=held_out,
        # A file of two sources is told in both; once is enough.
        problems=tuple(dict.fromkeys((*report.problems, *made.problems))),
        notes=tuple(dict.fromkeys(notes)),
    )
    if not clips:
        raise DataError("\n".join(["no clip can be used", *report.lines()]))
    if config.validation.sources and not held_out:
        raise DataError("\n".join(["no clip of validation.sources can be used", *report.lines()]))
    return report


def _causes(clip: Clip, content: Mapping[Path, str]) -> list[object]:
    """All of a clip that training depends on."""
    mask = [content[clip.mask.path], clip.mask.start] if clip.mask else None
    target = "base" if clip.is_prior else "data"
    settings = [clip.repeats, clip.loss_weight, target]
    return [clip.name, content[clip.path], _span(clip), clip.captions, settings, mask]


def _span(clip: Clip) -> list[object]:
    return [clip.start, clip.fps, clip.frames, list(clip.size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What came of filling in the missing entries."""

    problems: tuple[Problem, ...]
    notes: tuple[Note, ...]
    encoded: int


def _problem(error: DataError, clip: Clip) -> Problem:
    return Problem(path=clip.path, reason=str(error).removeprefix(f"{clip.path}: "))


def _note_if_plain(mask: Mask, values: Tensor) -> list[Note]:
    """A note on a mask that does not tell one place from another."""
    if not values.any():
        text = (
            "a mask that is black all over: its clip trains as without it, or not at all where "
            "train.loss.unmasked_weight is 0"
        )
    elif bool((values == 1).all()):
        text = "a mask that is white (or transparent) all over: its clip trains as without it"
    else:
        return []
    return [Note(path=mask.path, text=text)]


def encode_clip(model: WanModel, clip: Clip) -> dict[str, Tensor]:
    """Decode and encode one clip: ``latents`` and, for I2V-A14B, ``condition``, [C, F, h, w]."""
    frames = torch.from_numpy(decode(clip).frames)
    device = model.vae.device if model.vae is not None else "cpu"
    pixels = frames.to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    entry = {"latents": model.encode_video(pixels), **model.encode_condition(pixels)}
    return {name: tensor[0].cpu() for name, tensor in entry.items()}


def encode_mask(clip: Clip, mask: Mask, variant: Variant) -> Tensor:
    """Decode a clip's mask and bring it to the latents' places: [1, F, h, w], float32."""
    try:
        values = latent_mask(
            mask,
            fps=clip.fps,
            frames=clip.frames,
            size=clip.size,
            spatial=variant.spatial_compression,
            temporal=variant.temporal_compression,
        )
    except DataError as error:
        raise of_mask(error, clip.path, mask.path) from error
    return torch.from_numpy(values)


class _OnlineEncoder:
    """Encodes at every call; nothing is written."""

    prefetch = False  # the VAE and the text encoder share the device with the training step

    def __init__(self, variant: Variant, *, encode_text_online: bool) -> None:
        self._variant = variant
        self._live_text = encode_text_online
        self._model: WanModel | None = None

    def video(self, clip: Clip) -> dict[str, Tensor]:
        entry = encode_clip(self._loaded(), clip)
        if clip.mask:
            entry["mask"] = encode_mask(clip, clip.mask, self._variant)
        return entry

    def text(self, caption: str) -> Tensor:
        return self._loaded().encode_prompt(caption).cpu()

    def _loaded(self) -> WanModel:
        if self._model is None:
            raise ValueError("there was nothing to encode, so no model was loaded")
        return self._model

    def fill(
        self,
        clips: Sequence[Clip],
        captions: Sequence[str],
        load: LoadModel,
        progress: Progress,
        verify: bool,
    ) -> _Made:
        """Load what encodes. Clips and masks that do not decode are found here, before the first
        step, and not at step 191."""
        del captions, verify
        if clips:
            # With live text, whoever encodes it has a text encoder of their own.
            text: tuple[Component, ...] = () if self._live_text else ("text_encoder", "tokenizer")
            self._model = load(("vae", *text))
        problems, notes = list[Problem](), list[Note]()
        for done, clip in enumerate(clips, start=1):
            try:
                decode(clip)
                if clip.mask:
                    values = encode_mask(clip, clip.mask, self._variant)
                    notes += _note_if_plain(clip.mask, values)
            except DataError as error:
                problems.append(_problem(error, clip))
            progress("checking clips", done, len(clips))
        return _Made(problems=tuple(problems), notes=tuple(notes), encoded=0)


class _CachedLatents:
    """Reads entries from the cache; `fill` makes those that are missing."""

    prefetch = True

    def __init__(
        self,
        config: ResolvedRun,
        variant: Variant,
        places: Mapping[Placed, Path],
        content: Mapping[Path, str],
    ) -> None:
        self._cache = EntryCache(config.video_data.cache_dir)
        self._variant = variant
        self._places = places
        self._dtype = config.model.dtype
        self._content = content

    @cached_property
    def _text_causes(self) -> dict[str, object]:
        return {
            "version": ENCODING_VERSION,
            "text_encoder": fingerprint(self._places["text_encoder"]),
            "tokenizer": fingerprint(self._places["tokenizer"]),
            "dtype": self._dtype,
        }

    @cached_property
    def _video_causes(self) -> dict[str, object]:
        return {
            "version": ENCODING_VERSION,
            "vae": fingerprint(self._places["vae"]),
            "first_frame_condition": self._variant.condition_channels > 0,
        }

    def video(self, clip: Clip) -> dict[str, Tensor]:
        entry = self._cache.load("video", self._video_key(clip))
        if clip.mask:
            entry |= self._cache.load("mask", self._mask_key(clip, clip.mask))
        return entry

    def text(self, caption: str) -> Tensor:
        return self._cache.load("text", self._text_key(caption))["text"]

    def _video_key(self, clip: Clip) -> str:
        return key_of(content=self._content[clip.path], span=_span(clip), **self._video_causes)

    def _text_key(self, caption: str) -> str:
        return key_of(caption=caption, **self._text_causes)

    def _mask_key(self, clip: Clip, mask: Mask) -> str:
        # A key of its own: another mask leaves the clip's latents valid, another VAE the mask.
        return key_of(
            version=MASK_VERSION,
            content=self._content[mask.path],
            span=[mask.start, clip.fps, clip.frames, list(clip.size)],
            compression=[self._variant.spatial_compression, self._variant.temporal_compression],
        )

    def fill(
        self,
        clips: Sequence[Clip],
        captions: Sequence[str],
        load: LoadModel,
        progress: Progress,
        verify: bool,
    ) -> _Made:
        """Encode what is missing; says which clips failed, and how much was encoded."""
        if verify:
            masked = [(clip, clip.mask) for clip in clips if clip.mask]
            self._discard_damaged("text", map(self._text_key, captions))
            self._discard_damaged("video", map(self._video_key, clips))
            self._discard_damaged("mask", (self._mask_key(*pair) for pair in masked))
        masks = self._fill_masks(clips, progress)  # first, since it takes seconds
        texts = self._fill_texts(captions, load, progress)
        problems, videos = self._fill_videos(clips, load, progress)
        return _Made(
            problems=(*masks.problems, *problems),
            notes=masks.notes,
            encoded=masks.encoded + texts + videos,
        )

    def _fill_texts(self, captions: Sequence[str], load: LoadModel, progress: Progress) -> int:
        keys = {caption: self._text_key(caption) for caption in captions}
        missing = [c for c in captions if not self._cache.has("text", keys[c])]
        if missing:
            model = load(("text_encoder", "tokenizer"))
            for done, caption in enumerate(missing, start=1):
                entry = {"text": model.encode_prompt(caption)}
                self._cache.save("text", keys[caption], entry, about=caption)
                progress("encoding captions", done, len(missing))
        return len(missing)

    def _fill_videos(
        self, clips: Sequence[Clip], load: LoadModel, progress: Progress
    ) -> tuple[list[Problem], int]:
        keyed = [(self._video_key(clip), clip) for clip in clips]
        if all(self._cache.has("video", key) for key, _ in keyed):
            return [], 0
        model = load(("vae",))
        return self._fill_entries("video", keyed, lambda clip: encode_clip(model, clip), progress)

    def _fill_masks(self, clips: Sequence[Clip], progress: Progress) -> _Made:
        def encode(clip: Clip) -> dict[str, Tensor]:
            assert clip.mask
            return {"mask": encode_mask(clip, clip.mask, self._variant)}

        masks = [(self._mask_key(clip, clip.mask), clip, clip.mask) for clip in clips if clip.mask]
        keyed = [(key, clip) for key, clip, _ in masks]
        problems, encoded = self._fill_entries("mask", keyed, encode, progress)
        notes = list[Note]()
        for key, _, mask in masks:
            if self._cache.has("mask", key):
                notes += _note_if_plain(mask, self._cache.load("mask", key)["mask"])
        return _Made(problems=tuple(problems), notes=tuple(notes), encoded=encoded)

    def _fill_entries(
        self,
        kind: Kind,
        keyed: Sequence[tuple[str, Clip]],
        encode: Callable[[Clip], dict[str, Tensor]],
        progress: Progress,
    ) -> tuple[list[Problem], int]:
        """Encode the missing entries of clips; says which clips failed, and how many were made."""
        missing = {key for key, _ in keyed if not self._cache.has(kind, key)}
        what = {"video": "encoding clips", "mask": "encoding masks"}[kind]
        problems, tried = list[Problem](), set[str]()
        for key, clip in keyed:
            if self._cache.has(kind, key):
                continue
            tried.add(key)
            try:
                self._cache.save(kind, key, encode(clip), about=clip.name)
            except DataError as error:
                # A copy of a damaged file comes here too, so that it is not used either.
                problems.append(_problem(error, clip))
            progress(what, len(tried), len(missing))
        return problems, sum(self._cache.has(kind, key) for key in missing)

    def _discard_damaged(self, kind: Kind, keys: Iterable[str]) -> None:
        for key in keys:
            if self._cache.has(kind, key) and self._cache.problem(kind, key):
                self._cache.discard(kind, key)
