"""The source that reads encoded clips, conditions, masks and captions from the cache, and fills
it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from onewan.arithmetic.condition_shares import Given
from onewan.data.cache import EntryCache, EntryKind
from onewan.data.clip import Clip
from onewan.data.companions import Companion
from onewan.data.contact_sheet import (
    Preview,
    preview_frames,
    preview_indices,
)
from onewan.data.decode import (
    condition_frames,
    decode,
    decoded_bytes,
    decoder_threads,
    frames_at,
)
from onewan.data.encode import (
    FillResult,
    LoadModel,
    ProgressCallback,
    clip_parts,
    decode_part,
    encode_frames,
    encode_mask,
    encode_part,
    too_long_warnings,
    uniform_mask_warnings,
)
from onewan.data.entry_keys import EntryKeys
from onewan.data.filling import CacheFiller, Filled
from onewan.data.report import ClipProblem, ClipWarning
from onewan.errors import DataError
from onewan.model.conditioning import Conditioning, ConditionPart
from onewan.model.wan import WanModel

_Decoded = TypeVar("_Decoded")


class CachedLatents:
    """A `LatentSource` that reads the cache; `fill` makes the missing entries."""

    def __init__(
        self,
        cache: EntryCache,
        keys: EntryKeys,
        *,
        conditioning: Conditioning,
        workers: int = 0,
    ) -> None:
        """`conditioning` says which parts of conditions are needed. `workers` threads decode clips
        ahead of the VAE, and read batches ahead of the training step."""
        self._cache = cache
        self.keys = keys
        self._conditioning = conditioning
        self.workers = workers
        self._filler = CacheFiller(cache)

    def video(self, clip: Clip, given: Given) -> dict[str, Tensor]:
        entry = self._cache.load("video", self.keys.video(clip))
        for part in clip_parts(clip, self._conditioning.parts(given)):
            if part not in entry:
                entry |= self._cache.load("condition", self.keys.condition(clip, part))
        if clip.mask:
            entry |= self._cache.load("mask", self.keys.mask(clip, clip.mask))
        return entry

    def has_text(self, caption: str) -> bool:
        """Whether the cache has the embedding of a caption."""
        return self._cache.has("text", self.keys.text(caption))

    def text(self, caption: str) -> Tensor:
        return self._cache.load("text", self.keys.text(caption))["text"]

    def preview(self, clip: Clip) -> Preview:
        """Small frames of a clip; they are read from its file if the cache does not have them."""
        key, tensors = self.keys.frames(clip), None
        if self._cache.has("preview", key):
            with suppress(DataError):  # a damaged entry, which is deleted
                tensors = self._cache.load("preview", key)
        if tensors is None:
            all_times = clip.times()
            times = [all_times[index] for index in preview_indices(clip.frames)]
            tensors = self._save_preview(clip, frames_at(clip, times))
        conditions = tensors.get("conditions")
        mask = self._cache.load("mask", self.keys.mask(clip, clip.mask)) if clip.mask else None
        return Preview(
            frames=tensors["frames"].numpy(),
            conditions=None if conditions is None else conditions.numpy(),
            mask=None if mask is None else mask["mask"][0].numpy(),
        )

    def preview_key(self, clip: Clip) -> str:
        return self.keys.preview(clip)

    def _parts(self, clip: Clip) -> list[ConditionPart]:
        """The parts of a clip's condition that are entries of their own."""
        parts = clip_parts(clip, self._conditioning.all_parts(clip.frames))
        with_latents = self.keys.has_condition(clip)
        return [part for part in parts if not (with_latents and part == "condition")]

    def entries(
        self, clips: Iterable[Clip], captions: Iterable[str], previewed: Iterable[Clip]
    ) -> Iterator[tuple[EntryKind, str]]:
        """Kind and key of everything that `fill` with these arguments makes."""
        for clip in clips:
            yield "video", self.keys.video(clip)
            for part in self._parts(clip):
                yield "condition", self.keys.condition(clip, part)
            if clip.mask:
                yield "mask", self.keys.mask(clip, clip.mask)
        for caption in captions:
            yield "text", self.keys.text(caption)
        for clip in previewed:
            yield "preview", self.keys.frames(clip)

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
        video_keys = [(self.keys.video(clip), clip) for clip in clips]
        condition_keys: list[tuple[str, tuple[Clip, ConditionPart]]] = [
            (self.keys.condition(clip, part), (clip, part))
            for clip in clips
            for part in self._parts(clip)
        ]
        masked = [(self.keys.mask(clip, clip.mask), clip, clip.mask) for clip in clips if clip.mask]
        text_keys = [(self.keys.text(caption), caption) for caption in captions]
        if verify:
            self._filler.find_damaged("video", (key for key, _ in video_keys))
            self._filler.find_damaged("condition", (key for key, _ in condition_keys))
            self._filler.find_damaged("text", (key for key, _ in text_keys))
        # Read below in any case, for the warnings; they are small.
        self._filler.find_damaged("mask", (key for key, _, _ in masked))
        masks = self._fill_masks(masked, progress)  # first: takes seconds and needs no model
        # Captions before videos: the 11 GB text encoder and the VAE are never loaded together.
        texts = self._fill_texts(text_keys, load_model, progress)
        vae = cache(lambda: load_model(("vae",)))
        videos = self._fill_videos(video_keys, vae, progress, set(previewed))
        conditions = self._fill_conditions(condition_keys, vae, progress)
        return FillResult(
            problems=(*masks.problems, *videos.problems, *conditions.problems),
            warnings=(
                *(ClipWarning(path=None, text=text) for text in notices),
                *masks.warnings,
                *texts.warnings,
            ),
            encoded=masks.encoded + texts.encoded + videos.encoded + conditions.encoded,
        )

    def _fill_masks(
        self, masked: Sequence[tuple[str, Clip, Companion]], progress: ProgressCallback
    ) -> FillResult:
        def compute(clip: Clip) -> Tensor:
            assert clip.mask
            return encode_mask(clip, clip.mask, self.keys.variant)

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
        vae: Callable[[], WanModel],
        progress: ProgressCallback,
        previewed: AbstractSet[Clip],
    ) -> FillResult:
        if not any(self._filler.is_missing("video", key) for key, _ in keyed):
            return FillResult(problems=(), warnings=(), encoded=0)
        model = vae()
        threads = decoder_threads(self.workers)

        def encode(clip: Clip, frames: np.ndarray) -> dict[str, Tensor]:
            if clip in previewed:
                self._save_preview(clip, [frames[index] for index in preview_indices(clip.frames)])
            has_condition = self.keys.has_condition(clip)
            return encode_frames(model, frames, self.keys.vae_dtype, with_condition=has_condition)

        return self._encode_clips(
            "video", keyed, lambda clip: decode(clip, threads=threads).frames, encode, progress
        )

    def _fill_conditions(
        self,
        keyed: Sequence[tuple[str, tuple[Clip, ConditionPart]]],
        vae: Callable[[], WanModel],
        progress: ProgressCallback,
    ) -> FillResult:
        if not any(self._filler.is_missing("condition", key) for key, _ in keyed):
            return FillResult(problems=(), warnings=(), encoded=0)
        model, dtype = vae(), self.keys.vae_dtype

        def encode(
            item: tuple[Clip, ConditionPart], frames: Mapping[str, np.ndarray]
        ) -> dict[str, Tensor]:
            clip, part = item
            return {part: encode_part(model, clip, part, frames, dtype)}

        filled = self._filler.fill(
            "condition",
            keyed,
            lambda item: decode_part(*item),
            encode,
            progress,
            about=lambda item: f"{item[1]} of {item[0].name}",
            workers=self.workers,
            size=lambda item: decoded_bytes(item[0]),
        )
        return _result(filled, [clip for _, (clip, _) in keyed])

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
        return _result(filled, [clip for _, clip in keyed])

    def _save_preview(
        self, clip: Clip, frames: Sequence[np.ndarray] | np.ndarray
    ) -> dict[str, Tensor]:
        tensors = {"frames": torch.from_numpy(preview_frames(frames))}
        if conditions := condition_frames(clip):
            tensors["conditions"] = torch.from_numpy(preview_frames(conditions))
        self._cache.save("preview", self.keys.frames(clip), tensors, clip.name)
        return tensors


def _result(filled: Filled, clips: Sequence[Clip]) -> FillResult:
    """What became of the entries of `clips`."""
    problems = [
        ClipProblem.from_error(clip.path, filled.errors[number])
        for number, clip in enumerate(clips)
        if number in filled.errors
    ]
    return FillResult(problems=tuple(problems), warnings=(), encoded=filled.encoded)
