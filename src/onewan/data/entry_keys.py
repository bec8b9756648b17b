"""`EntryKeys`: what the entries of the cache depend on.

Each key is a hash of everything that the values of an entry depend on, and of nothing else. Only
this module knows what that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isinf
from pathlib import Path

from onewan.data.clip import WHOLE_FILE, Clip
from onewan.data.companions import Companion
from onewan.data.contact_sheet import PREVIEW_VERSION
from onewan.data.encode import ENCODING_VERSION, TEXT_ENCODING_VERSION, VaeDtype
from onewan.data.keys import entry_key
from onewan.data.masks import MASK_VERSION
from onewan.formats.model_folder import ComponentName
from onewan.media import WHITE
from onewan.model.conditioning import ConditionPart, conditioning_of
from onewan.model.sources import fingerprint
from onewan.variants import Variant


@dataclass(frozen=True, kw_only=True)
class EntryKeys:
    """The keys of the entries of one run."""

    variant: Variant
    component_paths: Mapping[ComponentName, Path]
    """The files of the encoders."""
    text_dtype: str
    """Precision of the text encoder."""
    digests: Mapping[Path, str]
    """Digests of the content of all files of clips, by path."""
    vae_dtype: VaeDtype = "float32"

    def video(self, clip: Clip) -> str:
        return entry_key(
            content=self.digests[clip.path],
            span=[*_span(clip), *_look(clip)],
            first_frame_condition=self.has_condition(clip),
            **self._video_inputs,
        )

    def condition(self, clip: Clip, part: ConditionPart) -> str:
        # An entry of its own: the clip's latents stay valid when its condition changes, and a run
        # that needs another part adds just that.
        return entry_key(
            part=part,
            shape=[clip.frames, list(clip.size)],
            sources=self._part_sources(clip, part),
            **self._video_inputs,
        )

    def mask(self, clip: Clip, mask: Companion) -> str:
        # An entry of its own: the clip's latents stay valid when the mask changes, and the mask
        # stays valid when the VAE changes.
        return entry_key(
            version=MASK_VERSION,
            content=self.digests[mask.path],
            span=[mask.start, *_span(clip)[1:], *_variation(clip)],
            compression=[self.variant.spatial_compression, self.variant.temporal_compression],
        )

    def _part_sources(self, clip: Clip, part: ConditionPart) -> list[object]:
        """What the pixels of a part of a clip's condition depend on, besides their shape."""
        sources = list[object]()
        if part in ("condition", "end_of_both"):
            of_file = clip.conditions.as_reference
            sources.append(self._frame_source(clip, 0) if of_file else self._image_source(clip))
        if part == "reference":
            sources.append(self._image_source(clip))
        if part in ("end_of_both", "end_of_last", "last_frame"):
            sources.append(self._frame_source(clip, -1))
        if part == "control":
            assert clip.conditions.control is not None
            sources.append(self._control_source(clip, clip.conditions.control))
        return sources

    def _image_source(self, clip: Clip) -> list[object]:
        if (image := clip.conditions.image) is not None:
            background = [] if image.background == WHITE else [list(image.background)]
            return [self.digests[image.path], *background, *_variation(clip)]
        return self._frame_source(clip, clip.conditions.frame)

    def _frame_source(self, clip: Clip, index: int) -> list[object]:
        return [self.digests[clip.path], clip.times()[index], *_look(clip)]

    def has_condition(self, clip: Clip) -> bool:
        """Whether the entry of a clip's latents has the condition of its first frame too."""
        is_part = "condition" in conditioning_of(self.variant).parts("first")
        return is_part and not clip.conditions.starts_elsewhere

    def preview(self, clip: Clip) -> str:
        mask = self.mask(clip, clip.mask) if clip.mask else None
        return entry_key(frames=self.frames(clip), mask=mask)

    def frames(self, clip: Clip) -> str:
        return entry_key(
            version=[PREVIEW_VERSION, ENCODING_VERSION],
            content=self.digests[clip.path],
            span=[*_span(clip), *_look(clip)],
            **self._condition_inputs(clip),
        )

    def _condition_inputs(self, clip: Clip) -> dict[str, object]:
        """The conditions that a preview shows; none of the first frame."""
        inputs = dict[str, object]()
        if clip.conditions.has_own_image:
            inputs["image"] = self._image_source(clip)
        if (control := clip.conditions.control) is not None:
            inputs["control"] = self._control_source(clip, control)
        return inputs

    def _control_source(self, clip: Clip, control: Companion) -> list[object]:
        background = [] if control.background == WHITE else [list(control.background)]
        span = [control.start, *_span(clip)[1:]]
        return [self.digests[control.path], span, *background, *_variation(clip)]

    def text(self, caption: str) -> str:
        return entry_key(caption=caption, **self._text_inputs)

    @cached_property
    def _video_inputs(self) -> dict[str, object]:
        # Not the run's dtype, which the VAE does not have.
        inputs: dict[str, object] = {
            "version": ENCODING_VERSION,
            "vae": fingerprint(self.component_paths["vae"]),
        }
        # Only then, so that entries in float32 keep the keys that they had without a choice.
        return inputs | ({} if self.vae_dtype == "float32" else {"dtype": self.vae_dtype})

    @cached_property
    def _text_inputs(self) -> dict[str, object]:
        return {
            "version": TEXT_ENCODING_VERSION,
            "text_encoder": fingerprint(self.component_paths["text_encoder"]),
            "tokenizer": fingerprint(self.component_paths["tokenizer"]),
            "dtype": self.text_dtype,
        }


def _span(clip: Clip) -> list[object]:
    """What decides which pixels of its file a clip takes."""
    # One frame has no rate, so that an image is not encoded again for another one.
    fps = clip.fps if clip.frames > 1 else None
    return [clip.start, fps, clip.frames, list(clip.size)]


def _look(clip: Clip) -> list[object]:
    """What decides the pixels of a clip, given the content of its file and the span."""
    background = [] if clip.background == WHITE else [list(clip.background)]
    fields = [] if clip.fields is None else [clip.fields]
    return [*background, *fields, *bounds_key(clip), *_variation(clip)]


def bounds_key(clip: Clip) -> list[object]:
    """Its bounds as JSON values; none if they are those of the file."""
    if clip.bounds == WHOLE_FILE:
        return []
    return [[None if isinf(time) else time for time in clip.bounds]]


def _variation(clip: Clip) -> list[object]:
    return [clip.variation.key] if clip.variation else []
