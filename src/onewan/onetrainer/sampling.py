"""OneTrainer's `SampleConfig` -> a request, and its way of moving parts -> the sampler's stage."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onewan.onetrainer import settings
from onewan.sample.generate import SampleRequest
from onewan.variants import Variant


def request_of(sample: Any, variant: Variant) -> SampleRequest:
    """The request for `sample`, with sizes and frame count rounded to what the VAE accepts."""
    low = getattr(sample, "wan_low_cfg_scale", None)
    image = (sample.base_image_path or "").strip()
    return SampleRequest(
        prompt=sample.prompt,
        negative_prompt=sample.negative_prompt or "",
        image=Path(image) if image else None,
        width=settings.rounded_size(sample.width, variant),
        height=settings.rounded_size(sample.height, variant),
        frames=settings.rounded_frames(sample.frames, variant),
        steps=sample.diffusion_steps,
        guidance=settings.guidance_of(sample.cfg_scale, low, variant),
        shift=variant.flow_shift,
        seed=random.getrandbits(30) if sample.random_seed else sample.seed,
        fps=getattr(sample, "wan_fps", None) or variant.fps,
    )


class Stage:
    """The sampler's stage where a program brings parts by name and keeps no list of where they
    were. Puts every module back into its own mode on the way out."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        device: torch.device,
        names: Mapping[int, str],
        bring: Callable[[str], None],
    ) -> None:
        """`names` has the parts' names by ``id``; `bring` makes one of them the only one there."""
        self.device = device
        self._parts = parts
        self._names = names
        self._bring = bring
        self._there: nn.Module | None = None
        self._modes = {module: module.training for part in parts for module in part.modules()}

    def __enter__(self) -> Stage:
        for part in self._parts:
            part.eval()
        return self

    def enter(self, part: nn.Module) -> None:
        if part is not self._there:
            self._bring(self._names[id(part)])
            self._there = part

    def __exit__(self, *_: object) -> None:
        for part in self._parts:
            part.train(self._modes[part])
        for module, training in self._modes.items():
            module.training = training
