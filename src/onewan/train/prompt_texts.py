"""`PromptTexts`: the embeddings of sample prompts, also of those that are given while a run trains.

Prompts of the run file are encoded before training, and the text encoder is freed. For another one
it is loaded again, takes its turn on the device, and is freed; the cache then has the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
from torch import Tensor

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.data.cached_latents import CachedLatents
from onewan.data.encode import LatentSource, no_progress
from onewan.errors import CheckpointError
from onewan.files import total_bytes
from onewan.memory.residency import DeviceResidency
from onewan.model.wan import WanModel


class PromptTexts:
    """Called with a prompt, returns its embedding [length, dim] from `source`."""

    def __init__(
        self,
        source: LatentSource,
        encoder_path: Path,
        load_encoder: Callable[[], WanModel],
        model: WanModel,
        residency: DeviceResidency,
    ) -> None:
        """`load_encoder` loads tokenizer and text encoder, whose weights are at `encoder_path`,
        into host memory. The modules of `model` leave the device for it where they have to."""
        self._source = source
        self._encoder_path = encoder_path
        self._load_encoder = load_encoder
        self._model = model
        self._residency = residency

    def __call__(self, prompt: str) -> Tensor:
        """CheckpointError if the text encoder is needed and host memory has no room for it."""
        source = self._source
        if isinstance(source, CachedLatents) and not source.has_text(prompt):
            self._encode(source, prompt)
        return source.text(prompt)

    def _encode(self, source: CachedLatents, prompt: str) -> None:
        size, free = total_bytes(self._encoder_path), psutil.virtual_memory().available
        if size > free:
            raise CheckpointError(
                f"{self._encoder_path}: the text encoder, which encodes a new prompt, has "
                f"{format_bytes(size)}, and {format_bytes(free)} of host memory are free; free "
                "some, or give the prompt in sample.prompts when the run starts"
            )
        loaded = self._load_encoder()
        encoder = loaded.text_encoder
        assert encoder is not None
        model = self._model
        modules = [m for m in (model.transformer, model.transformer_2, model.vae) if m is not None]
        try:
            with self._residency.taking_turns([encoder, *modules]) as bring:
                bring(encoder)
                source.fill((), [prompt], lambda _: loaded, no_progress)
        finally:
            self._residency.forget(encoder)
