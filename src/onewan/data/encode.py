"""Clips and captions -> entries: latents, the condition, text embeddings; through the cache or not.

`prepare` is the one way from a run file to a data set that trains. It indexes the sources, finds
out what is not in the cache yet, encodes just that (captions first, then videos, so that the 11 GB
text encoder and the VAE are never loaded together), and reports every clip that can't be used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from onewan.config.schema import RunConfig
from onewan.data.cache import ContentDigests, EntryCache, Kind, key_of
from onewan.data.index import Clip, Problem, Report, index_clips
from onewan.data.sample import decode
from onewan.errors import DataError
from onewan.model.sources import Component, Placed, fingerprint
from onewan.model.wan import WanModel
from onewan.variants import VARIANTS, Variant

_T = TypeVar("_T")

ENCODING_VERSION = 1
"""Raised when decoding, resizing or encoding changes its numbers: old entries then don't count."""

LoadModel = Callable[[Collection[Component]], WanModel]
"""Loads the given components of the run's model, on the device of the run."""


class EntrySource(Protocol):
    """Where a data loader gets the parts of an entry from."""

    prefetch: bool
    """Whether another thread may read ahead."""

    def video(self, clip: Clip) -> dict[str, Tensor]:
        """``latents`` [C, F, h, w] and, for I2V-A14B, ``condition`` of the same shape; float32."""
        ...

    def text(self, caption: str) -> Tensor:
        """[length, dim]: the valid tokens of a caption."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Clips that can be trained on, and where their entries come from."""

    clips: tuple[Clip, ...]
    report: Report
    source: EntrySource
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
    config: RunConfig,
    places: Mapping[Placed, Path],
    load: LoadModel,
    *,
    extra_prompts: Sequence[str] = (),
    progress: Progress = silent,
    verify: bool = False,
) -> Dataset:
    """The data set of a resolved run file, with every missing entry encoded.

    `places` says where the VAE, the text encoder and the tokenizer are: their content keys the
    cache. `extra_prompts` are encoded as captions are, for sampling later without the text encoder.
    `verify` reads every entry that is there and encodes the damaged ones again. Clips that fail to
    decode are dropped and join the report. DataError if no clip is left.
    """
    if not config.video_data.sources:
        raise DataError("video_data.sources: is empty; name at least one folder of clips")
    variant = VARIANTS[config.model.variant]
    sizes = _filled(config.video_data.resolution)
    report = index_clips(
        config.video_data,
        config.wan_config,
        seed=config.train.seed,
        target_fps=_filled(config.video_data.target_fps),
        resolutions=sizes if isinstance(sizes, tuple) else (sizes,),
        size_multiple=variant.size_multiple,
        temporal_compression=variant.temporal_compression,
    )
    captions = sorted({c for clip in report.clips for c in clip.captions} | set(extra_prompts))
    # Content decides, not names: the digests also key the data set when nothing is cached.
    digests = ContentDigests(config.video_data.cache_dir / "digests.json")
    content = {clip: digests.of(clip.path) for clip in report.clips}
    if config.video_data.cache:
        digests.save()
        source = _CachedEntries(config, variant, places, content)
        problems, encoded = source.fill(report.clips, captions, load, progress, verify)
    else:
        model = load(("vae", "text_encoder", "tokenizer")) if report.clips else None
        source = _LiveEntries(model, variant)
        problems, encoded = _undecodable(report.clips, progress), 0
    bad = {problem.path for problem in problems}
    usable = tuple(clip for clip in report.clips if clip.path not in bad)
    report = replace(report, clips=usable, problems=(*report.problems, *problems))
    if not usable:
        raise DataError("\n".join(["no clip can be used", *report.lines()]))
    digest = key_of(
        clips=[
            [clip.name, content[clip], _span(clip), clip.captions, clip.repeats] for clip in usable
        ]
    )
    return Dataset(clips=usable, report=report, source=source, digest=digest, encoded=encoded)


def _filled(value: _T | None) -> _T:
    if value is None:
        raise ValueError("the run file has not been resolved; read it with onewan.config.load_run")
    return value


def _span(clip: Clip) -> list[object]:
    return [clip.start, clip.fps, clip.frames, list(clip.size)]


def _undecodable(clips: Sequence[Clip], progress: Progress) -> list[Problem]:
    """Problems of the clips that do not decode, found before the first step and not at step 191."""
    problems = []
    for done, clip in enumerate(clips, start=1):
        try:
            decode(clip)
        except DataError as error:
            problems.append(Problem(path=clip.path, reason=_reason(error, clip)))
        progress("checking clips", done, len(clips))
    return problems


def _reason(error: DataError, clip: Clip) -> str:
    return str(error).removeprefix(f"{clip.path}: ")


def encode_clip(model: WanModel, clip: Clip) -> dict[str, Tensor]:
    """Decode and encode one clip: ``latents`` and, for I2V-A14B, ``condition``, [C, F, h, w]."""
    frames = torch.from_numpy(decode(clip).frames)
    device = model.vae.device if model.vae is not None else "cpu"
    pixels = frames.to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    entry = {"latents": model.encode_video(pixels)[0].cpu()}
    if model.variant.condition == "first_frame_channels":
        entry["condition"] = model.encode_first_frame_condition(pixels)[0].cpu()
    return entry


class _LiveEntries:
    """Encodes at every call; nothing is written."""

    prefetch = False  # the VAE and the text encoder share the device with the training step

    def __init__(self, model: WanModel | None, variant: Variant) -> None:
        self._model = model
        self._variant = variant

    def video(self, clip: Clip) -> dict[str, Tensor]:
        return encode_clip(self._loaded(), clip)

    def text(self, caption: str) -> Tensor:
        return self._loaded().encode_prompt(caption).cpu()

    def _loaded(self) -> WanModel:
        if self._model is None:
            raise ValueError("there was nothing to encode, so no model was loaded")
        return self._model


class _CachedEntries:
    """Reads entries from the cache; `fill` makes those that are missing."""

    prefetch = True

    def __init__(
        self,
        config: RunConfig,
        variant: Variant,
        places: Mapping[Placed, Path],
        content: dict[Clip, str],
    ) -> None:
        self._cache = EntryCache(config.video_data.cache_dir)
        self._text_causes = {
            "version": ENCODING_VERSION,
            "text_encoder": fingerprint(places["text_encoder"]),
            "tokenizer": fingerprint(places["tokenizer"]),
            "dtype": config.model.dtype,
        }
        self._video_causes = {
            "version": ENCODING_VERSION,
            "vae": fingerprint(places["vae"]),
            "first_frame_condition": variant.condition == "first_frame_channels",
        }
        self._content = content

    def video(self, clip: Clip) -> dict[str, Tensor]:
        return self._cache.load("video", self._video_key(clip))

    def text(self, caption: str) -> Tensor:
        return self._cache.load("text", self._text_key(caption))["text"]

    def _video_key(self, clip: Clip) -> str:
        return key_of(content=self._content[clip], span=_span(clip), **self._video_causes)

    def _text_key(self, caption: str) -> str:
        return key_of(caption=caption, **self._text_causes)

    def fill(
        self,
        clips: Sequence[Clip],
        captions: Sequence[str],
        load: LoadModel,
        progress: Progress,
        verify: bool,
    ) -> tuple[list[Problem], int]:
        """Encode what is missing. Returns the clips that failed and the number of new entries."""
        text_keys = {c: self._text_key(c) for c in captions}
        video_keys = {c: self._video_key(c) for c in clips}
        if verify:
            self._discard_damaged("text", text_keys.values())
            self._discard_damaged("video", video_keys.values())
        missing_text = [c for c in captions if not self._cache.has("text", text_keys[c])]
        if missing_text:
            model = load(("text_encoder", "tokenizer"))
            for done, caption in enumerate(missing_text, start=1):
                entry = {"text": model.encode_prompt(caption)}
                self._cache.save("text", text_keys[caption], entry, about=caption)
                progress("encoding captions", done, len(missing_text))
            del model
        missing = {k: c for c, k in video_keys.items() if not self._cache.has("video", k)}
        problems: list[Problem] = []
        if missing:
            model = load(("vae",))
            for done, (key, clip) in enumerate(missing.items(), start=1):
                try:
                    self._cache.save("video", key, encode_clip(model, clip), about=clip.name)
                except DataError as error:
                    problems.append(Problem(path=clip.path, reason=_reason(error, clip)))
                progress("encoding clips", done, len(missing))
        return problems, len(missing_text) + len(missing) - len(problems)

    def _discard_damaged(self, kind: Kind, keys: Iterable[str]) -> None:
        for key in keys:
            if self._cache.has(kind, key) and self._cache.problem(kind, key):
                self._cache.discard(kind, key)
