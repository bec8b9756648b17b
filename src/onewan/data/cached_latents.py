"""The source that reads encoded clips, masks and captions from the cache, and fills the cache.

Only this module knows which inputs the key of an entry depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from onewan.data.cache import EntryCache, EntryKind, entry_key
from onewan.data.clip import Clip
from onewan.data.contact_sheet import (
    PREVIEW_VERSION,
    Preview,
    preview_frames,
    preview_indices,
)
from onewan.data.decode import decode, decoded_bytes, decoder_threads, frames_at
from onewan.data.encode import (
    ENCODING_VERSION,
    TEXT_ENCODING_VERSION,
    FillResult,
    LoadModel,
    ProgressCallback,
    VaeDtype,
    encode_frames,
    encode_mask,
    too_long_warnings,
    uniform_mask_warnings,
)
from onewan.data.filling import CacheFiller
from onewan.data.masks import MASK_VERSION, Mask
from onewan.data.report import ClipProblem, ClipWarning
from onewan.errors import DataError
from onewan.formats.model_folder import ComponentName
from onewan.media import WHITE
from onewan.model.sources import fingerprint
from onewan.variants import Variant

_Decoded = TypeVar("_Decoded")


class CachedLatents:
    """A `LatentSource` that reads the cache; `fill` makes the missing entries."""

    def __init__(
        self,
        cache: EntryCache,
        variant: Variant,
        component_paths: Mapping[ComponentName, Path],
        text_dtype: str,
        digests: Mapping[Path, str],
        *,
        vae_dtype: VaeDtype = "float32",
        workers: int = 0,
    ) -> None:
        """`component_paths` are the files of the encoders, `text_dtype` the precision of the text
        encoder, and `digests` the digests of all clips' and masks' content by path. `workers`
        threads decode clips ahead of the VAE, and read batches ahead of the training step."""
        self._cache = cache
        self._variant = variant
        self._component_paths = component_paths
        self._text_dtype = text_dtype
        self._digests = digests
        self.workers = workers
        self._vae_dtype: VaeDtype = vae_dtype
        self._filler = CacheFiller(cache)

    def video(self, clip: Clip) -> dict[str, Tensor]:
        entry = self._cache.load("video", self.video_key(clip))
        if clip.mask:
            entry |= self._cache.load("mask", self.mask_key(clip, clip.mask))
        return entry

    def text(self, caption: str) -> Tensor:
        return self._cache.load("text", self.text_key(caption))["text"]

    def preview(self, clip: Clip) -> Preview:
        """Small frames of a clip; they are read from its file if the cache does not have them."""
        key, tensors = self._frames_key(clip), None
        if self._cache.has("preview", key):
            with suppress(DataError):  # a damaged entry, which is deleted
                tensors = self._cache.load("preview", key)
        if tensors is None:
            all_times = clip.times()
            times = [all_times[index] for index in preview_indices(clip.frames)]
            tensors = self._save_preview(clip, frames_at(clip, times))
        mask = self._cache.load("mask", self.mask_key(clip, clip.mask)) if clip.mask else None
        return Preview(
            frames=tensors["frames"].numpy(),
            mask=None if mask is None else mask["mask"][0].numpy(),
        )

    # --- Keys: everything that the values of an entry depend on, and nothing else -----------------

    def video_key(self, clip: Clip) -> str:
        return entry_key(
            content=self._digests[clip.path],
            span=[*_span(clip), *_look(clip)],
            **self._video_inputs,
        )

    def mask_key(self, clip: Clip, mask: Mask) -> str:
        # An entry of its own: the clip's latents stay valid when the mask changes, and the mask
        # stays valid when the VAE changes.
        return entry_key(
            version=MASK_VERSION,
            content=self._digests[mask.path],
            span=[mask.start, *_span(clip)[1:], *_variation(clip)],
            compression=[self._variant.spatial_compression, self._variant.temporal_compression],
        )

    def preview_key(self, clip: Clip) -> str:
        mask = self.mask_key(clip, clip.mask) if clip.mask else None
        return entry_key(frames=self._frames_key(clip), mask=mask)

    def _frames_key(self, clip: Clip) -> str:
        return entry_key(
            version=[PREVIEW_VERSION, ENCODING_VERSION],
            content=self._digests[clip.path],
            span=[*_span(clip), *_look(clip)],
        )

    def text_key(self, caption: str) -> str:
        return entry_key(caption=caption, **self._text_inputs)

    @cached_property
    def _video_inputs(self) -> dict[str, object]:
        # Not the run's dtype, which the VAE does not have.
        inputs: dict[str, object] = {
            "version": ENCODING_VERSION,
            "vae": fingerprint(self._component_paths["vae"]),
            "first_frame_condition": self._variant.condition_channels > 0,
        }
        # Only then, so that entries in float32 keep the keys that they had without a choice.
        return inputs | ({} if self._vae_dtype == "float32" else {"dtype": self._vae_dtype})

    @cached_property
    def _text_inputs(self) -> dict[str, object]:
        return {
            "version": TEXT_ENCODING_VERSION,
            "text_encoder": fingerprint(self._component_paths["text_encoder"]),
            "tokenizer": fingerprint(self._component_paths["tokenizer"]),
            "dtype": self._text_dtype,
        }

    def entries(
        self, clips: Iterable[Clip], captions: Iterable[str], previewed: Iterable[Clip]
    ) -> Iterator[tuple[EntryKind, str]]:
        """Kind and key of everything that `fill` with these arguments makes."""
        for clip in clips:
            yield "video", self.video_key(clip)
            if clip.mask:
                yield "mask", self.mask_key(clip, clip.mask)
        for caption in captions:
            yield "text", self.text_key(caption)
        for clip in previewed:
            yield "preview", self._frames_key(clip)

    # --- Filling ----------------------------------------------------------------------------------

    def fill(
        self,
        clips: Sequence[Clip],
        captions: Sequence[str],
        load_model: LoadModel,
        progress: ProgressCallback,
        *,
        verify: bool = False,
        previewed: Collection[Clip] = (),
    ) -> FillResult:
        """Encode what the cache does not contain; the result lists clips that can't be decoded.

        Of the clips `previewed`, small frames are kept while they are at hand. `verify` reads all
        entries that exist and encodes the damaged ones again; masks are always read. Several
        processes may fill one cache at the same time, and share the work (`onewan.data.filling`).
        """
        notices = self._cache.remove_abandoned()
        video_keys = [(self.video_key(clip), clip) for clip in clips]
        masked = [(self.mask_key(clip, clip.mask), clip, clip.mask) for clip in clips if clip.mask]
        text_keys = [(self.text_key(caption), caption) for caption in captions]
        if verify:
            self._filler.find_damaged("video", (key for key, _ in video_keys))
            self._filler.find_damaged("text", (key for key, _ in text_keys))
        # Read below in any case, for the warnings; they are small.
        self._filler.find_damaged("mask", (key for key, _, _ in masked))
        masks = self._fill_masks(masked, progress)  # first: takes seconds and needs no model
        # Captions before videos: the 11 GB text encoder and the VAE are never loaded together.
        texts = self._fill_texts(text_keys, load_model, progress)
        videos = self._fill_videos(video_keys, load_model, progress, set(previewed))
        return FillResult(
            problems=(*masks.problems, *videos.problems),
            warnings=(
                *(ClipWarning(path=None, text=text) for text in notices),
                *masks.warnings,
                *texts.warnings,
            ),
            encoded=masks.encoded + texts.encoded + videos.encoded,
        )

    def _fill_masks(
        self, masked: Sequence[tuple[str, Clip, Mask]], progress: ProgressCallback
    ) -> FillResult:
        def compute(clip: Clip) -> Tensor:
            assert clip.mask
            return encode_mask(clip, clip.mask, self._variant)

        keyed = [(key, clip) for key, clip, _ in masked]
        result = self._encode_clips(
            "mask", keyed, compute, lambda _, mask: {"mask": mask}, progress
        )
        warnings = list[ClipWarning]()
        for key, _, mask in masked:
            # Masks encoded earlier too, so that every start of the run gives the same warnings.
            if self._cache.has("mask", key):
                warnings += uniform_mask_warnings(mask, self._cache.load("mask", key)["mask"])
        return replace(result, warnings=tuple(warnings))

    def _fill_texts(
        self, keyed: Sequence[tuple[str, str]], load_model: LoadModel, progress: ProgressCallback
    ) -> FillResult:
        if not any(self._filler.is_missing("text", key) for key, _ in keyed):
            return FillResult(problems=(), warnings=(), encoded=0)
        model, lengths = load_model(("text_encoder", "tokenizer")), list[int]()

        def encode(caption: str, _: str) -> dict[str, Tensor]:
            lengths.append(model.token_count(caption))
            return {"text": model.encode_prompt(caption)}

        filled = self._filler.fill(
            "text", keyed, lambda caption: caption, encode, progress, about=str
        )
        return FillResult(problems=(), warnings=too_long_warnings(lengths), encoded=filled.encoded)

    def _fill_videos(
        self,
        keyed: Sequence[tuple[str, Clip]],
        load_model: LoadModel,
        progress: ProgressCallback,
        previewed: AbstractSet[Clip],
    ) -> FillResult:
        if not any(self._filler.is_missing("video", key) for key, _ in keyed):
            return FillResult(problems=(), warnings=(), encoded=0)
        model = load_model(("vae",))
        threads = decoder_threads(self.workers)

        def encode(clip: Clip, frames: np.ndarray) -> dict[str, Tensor]:
            if clip in previewed:
                self._save_preview(clip, [frames[index] for index in preview_indices(clip.frames)])
            return encode_frames(model, frames, self._vae_dtype)

        return self._encode_clips(
            "video", keyed, lambda clip: decode(clip, threads=threads).frames, encode, progress
        )

    def _encode_clips(
        self,
        kind: Literal["video", "mask"],
        keyed: Sequence[tuple[str, Clip]],
        read: Callable[[Clip], _Decoded],
        encode: Callable[[Clip, _Decoded], dict[str, Tensor]],
        progress: ProgressCallback,
    ) -> FillResult:
        """Makes the missing entries of one kind: `read` in threads, `encode` in this one."""
        filled = self._filler.fill(
            kind,
            keyed,
            read,
            encode,
            progress,
            about=lambda clip: clip.name,
            workers=self.workers,
            size=decoded_bytes,
        )
        problems = [
            ClipProblem.from_error(clip.path, filled.errors[number])
            for number, (_, clip) in enumerate(keyed)
            if number in filled.errors
        ]
        return FillResult(problems=tuple(problems), warnings=(), encoded=filled.encoded)

    def _save_preview(
        self, clip: Clip, frames: Sequence[np.ndarray] | np.ndarray
    ) -> dict[str, Tensor]:
        tensors = {"frames": torch.from_numpy(preview_frames(frames))}
        self._cache.save("preview", self._frames_key(clip), tensors, clip.name)
        return tensors


def _span(clip: Clip) -> list[object]:
    """What decides which pixels of its file a clip takes."""
    # One frame has no rate, so that an image is not encoded again for another one.
    fps = clip.fps if clip.frames > 1 else None
    return [clip.start, fps, clip.frames, list(clip.size)]


def _look(clip: Clip) -> list[object]:
    """What decides the pixels of a clip, given the content of its file and the span."""
    background = [] if clip.background == WHITE else [list(clip.background)]
    fields = [] if clip.fields is None else [clip.fields]
    return [*background, *fields, *_variation(clip)]


def _variation(clip: Clip) -> list[object]:
    return [clip.variation.key] if clip.variation else []
