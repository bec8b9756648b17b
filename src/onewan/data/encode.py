"""Encoding of clips, conditions, masks and captions; the source that encodes at each use, without a
cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from onewan.arithmetic.condition_shares import Given
from onewan.data.ahead import results_ahead
from onewan.data.clip import Clip
from onewan.data.companions import Companion
from onewan.data.decode import (
    check_conditions,
    condition_image,
    control_frames,
    decode,
    decode_mask,
    decoder_threads,
    frames_at,
    start_image,
)
from onewan.data.masks import uniform_mask_note
from onewan.data.report import ClipProblem, ClipWarning
from onewan.errors import DataError
from onewan.model.conditioning import ConditionPart, ConditionPixels
from onewan.model.sources import PipelineComponent
from onewan.model.wan import WanModel
from onewan.variants import TEXT_LENGTH, Variant

ENCODING_VERSION = 3
"""Incremented when decoding, resizing or encoding of clips gives other values, so that no cache
entry of an older version is used."""

TEXT_ENCODING_VERSION = 1
"""The same for captions."""

VaeDtype = Literal["float32", "bfloat16"]

LoadModel = Callable[[Collection[PipelineComponent]], WanModel]
"""Loads the given components of the run's model, on the device of the run."""


class LatentSource(Protocol):
    """Where a data loader gets the encoded tensors of clips and captions from."""

    workers: int
    """The number of threads that read it ahead of the training step; 0: it is read in turn."""

    def video(self, clip: Clip, given: Given) -> dict[str, Tensor]:
        """The encoded tensors of a clip, float32, in host memory.

        ``latents`` [C, F, h, w]; the parts of the variant's condition for a sample that is given
        the frames `given` (see `onewan.model.conditioning`), if the clip has them; for a clip that
        has a mask, ``mask`` [1, F, h, w] from 0 to 1. There may be parts that `given` does not
        need.
        """
        ...

    def text(self, caption: str) -> Tensor:
        """[length, dim]: the embeddings of a caption's valid tokens, in the encoder's dtype."""
        ...


class ProgressCallback(Protocol):
    """Reports the progress of long work on a data set."""

    def __call__(self, activity: str, done: int, total: int, /) -> None:
        """Called after each item: `done` of `total` items of `activity`, such as "encoding clips",
        are finished. It may raise to stop the work; everything finished so far is kept."""
        ...


def no_progress(activity: str, done: int, total: int) -> None:
    """A `ProgressCallback` that does nothing."""
    del activity, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class FillResult:
    """What preparing the encoded tensors of a data set found."""

    problems: tuple[ClipProblem, ...]
    """Clips that can't be decoded or whose mask can't; they must not be used."""
    warnings: tuple[ClipWarning, ...]
    encoded: int
    """Number of cache entries that were made."""


def encode_frames(
    model: WanModel, frames_FHWC: np.ndarray, vae_dtype: VaeDtype, *, with_condition: bool
) -> dict[str, Tensor]:
    """Encode a clip's frames, uint8: ``latents``, and `with_condition` the ``condition`` whose
    image is the first frame; [C, F, h, w], float32, computed by the VAE in `vae_dtype`."""
    pixels = _pixels(model, frames_FHWC)
    with _precision(pixels.device, vae_dtype):
        entry = {"latents": model.encode_video(pixels)}
        if with_condition:
            given = ConditionPixels(shape=pixels.shape, image=pixels[:, :, 0])
            entry["condition"] = model.encode_part("condition", given)
    return {name: tensor[0].cpu() for name, tensor in entry.items()}


def clip_parts(clip: Clip, parts: Iterable[ConditionPart]) -> list[ConditionPart]:
    """Those of `parts` that `clip` has: it may be without a control video or a reference image."""
    missing = set[ConditionPart]()
    if clip.conditions.control is None:
        missing.add("control")
    if not clip.conditions.as_reference:
        missing.add("reference")
    return [part for part in parts if part not in missing]


def decode_part(clip: Clip, part: ConditionPart) -> dict[str, np.ndarray]:
    """The frames that a part of a clip's condition is made of, by the names of their fields in
    `ConditionPixels`: uint8 [F, H, W, 3]. DataError, which names the clip, if a file is damaged."""
    frames = dict[str, np.ndarray]()
    if part in ("condition", "end_of_both"):
        frames["image"] = start_image(clip)[None]
    if part == "reference":
        frames["image"] = condition_image(clip)[None]
    if part in ("end_of_both", "end_of_last", "last_frame"):
        frames["last"] = frames_at(clip, [clip.times()[-1]])
    if part == "control":
        assert clip.conditions.control is not None
        frames["control"] = control_frames(clip, clip.conditions.control, range(clip.frames))
    return frames


def encode_part(
    model: WanModel,
    clip: Clip,
    part: ConditionPart,
    frames: Mapping[str, np.ndarray],
    vae_dtype: VaeDtype,
) -> Tensor:
    """Encode a part of a clip's condition from what `decode_part` gives: [C, F, h, w], float32, by
    the VAE in `vae_dtype`."""
    given = {
        name: pixels if name == "control" else pixels[:, :, 0]
        for name, pixels in ((n, _pixels(model, each)) for n, each in frames.items())
    }
    width, height = clip.size
    pixels = ConditionPixels(shape=(1, 3, clip.frames, height, width), **given)
    assert model.vae is not None
    with _precision(model.vae.device, vae_dtype):
        return model.encode_part(part, pixels)[0].cpu()


def _pixels(model: WanModel, frames_FHWC: np.ndarray) -> Tensor:
    """uint8 frames as the VAE takes them: [1, 3, F, H, W] in [-1, 1], on its device."""
    frames = torch.from_numpy(frames_FHWC)
    # To the device as uint8, a quarter of the bytes of float32; then to the VAE's range, [-1, 1].
    device = model.vae.device if model.vae is not None else "cpu"
    # In place: each step would otherwise write another gigabyte for a long clip.
    return frames.to(device).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1)


def _precision(device: torch.device, vae_dtype: VaeDtype) -> AbstractContextManager[object]:
    # Autocast, since the weights stay in float32 for decoding sample videos.
    # `encode_video` takes the type from it.
    if vae_dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def encode_mask(clip: Clip, mask: Companion, variant: Variant) -> Tensor:
    """Decode a clip's mask and average it per latent cell: [1, F, h, w], float32.

    Raises DataError, which names the clip, if the mask is damaged.
    """
    return torch.from_numpy(decode_mask(clip, mask, variant))


def uniform_mask_warnings(mask: Companion, values: Tensor) -> list[ClipWarning]:
    """A warning if all `values` of a mask are 0, or all are 1."""
    text = uniform_mask_note(float(values.min()), float(values.max()))
    return [] if text is None else [ClipWarning(path=mask.path, text=text, about="mask")]


def too_long_warnings(lengths: Sequence[int]) -> tuple[ClipWarning, ...]:
    """A warning if some of the captions that were encoded, of `lengths` tokens, were cut."""
    cut = [length for length in lengths if length > TEXT_LENGTH]
    if not cut:
        return ()
    captions = "1 caption has" if len(cut) == 1 else f"{len(cut)} captions have"
    text = (
        f"{captions} more than the {TEXT_LENGTH} tokens that the text encoder reads, up to "
        f"{max(cut)}; what follows is not trained on"
    )
    return (ClipWarning(path=None, text=text),)


class OnlineEncoder:
    """A `LatentSource` that decodes and encodes at each use; nothing is written to disk."""

    # The VAE and the text encoder share the device with the training step: in another thread they
    # would compete with it for memory.
    workers = 0

    def __init__(
        self,
        variant: Variant,
        load_model: LoadModel,
        *,
        encode_text_online: bool,
        vae_dtype: VaeDtype = "float32",
        checking_workers: int = 0,
    ) -> None:
        """With `encode_text_online` the training step encodes the captions itself, with a text
        encoder of its own, so none is loaded here. `checking_workers` threads decode clips in
        `prepare`."""
        self._checking_workers = checking_workers
        self._vae_dtype: VaeDtype = vae_dtype
        self._variant = variant
        self._load_model = load_model
        self._encode_text_online = encode_text_online
        self._model: WanModel | None = None

    def prepare(self, clips: Sequence[Clip], progress: ProgressCallback) -> FillResult:
        """Load the encoders, and decode all `clips` and masks once, so that damaged files are found
        now and not in the middle of training."""
        if clips:
            text: tuple[PipelineComponent, ...] = (
                () if self._encode_text_online else ("text_encoder", "tokenizer")
            )
            self._model = self._load_model(("vae", *text))
        problems, warnings = list[ClipProblem](), list[ClipWarning]()
        with closing(results_ahead(self._check, clips, workers=self._checking_workers)) as results:
            for done, (clip, result) in enumerate(results, start=1):
                try:
                    warnings += result()
                except DataError as error:
                    problems.append(ClipProblem.from_error(clip.path, error))
                progress("checking clips", done, len(clips))
        return FillResult(problems=tuple(problems), warnings=tuple(warnings), encoded=0)

    def _check(self, clip: Clip) -> list[ClipWarning]:
        """Warnings about a clip; DataError if it or its mask is damaged."""
        # Only the frames that are trained on, as in a training step.
        decode(clip, threads=decoder_threads(self._checking_workers))
        check_conditions(clip)
        if clip.mask is None:
            return []
        return uniform_mask_warnings(clip.mask, encode_mask(clip, clip.mask, self._variant))

    def video(self, clip: Clip, given: Given) -> dict[str, Tensor]:
        model, dtype = self._loaded_model(), self._vae_dtype
        parts = clip_parts(clip, model.conditioning.parts(given))
        of_first_frame = "condition" in parts and not clip.conditions.starts_elsewhere
        entry = encode_frames(model, decode(clip).frames, dtype, with_condition=of_first_frame)
        for part in parts:
            if part not in entry:
                entry[part] = encode_part(model, clip, part, decode_part(clip, part), dtype)
        if clip.mask:
            entry["mask"] = encode_mask(clip, clip.mask, self._variant)
        return entry

    def text(self, caption: str) -> Tensor:
        return self._loaded_model().encode_prompt(caption).cpu()

    def _loaded_model(self) -> WanModel:
        if self._model is None:
            raise ValueError("no encoder is loaded; call prepare first, with at least one clip")
        return self._model
