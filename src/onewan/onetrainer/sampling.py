"""OneTrainer's `SampleConfig` -> a request for the sampler."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from onewan.onetrainer import settings
from onewan.sample.generate import SampleRequest
from onewan.variants import Variant


def request_of(sample: Any, variant: Variant) -> SampleRequest:
    """The request for `sample`, with sizes and frame count rounded to what the VAE accepts. What is
    empty is the variant's official value."""
    low = getattr(sample, "wan_low_cfg_scale", None)
    image = (sample.base_image_path or "").strip()
    last_image = (getattr(sample, "wan_last_image_path", None) or "").strip()
    return SampleRequest(
        prompt=sample.prompt,
        negative_prompt=sample.negative_prompt or "",
        image=Path(image) if image else None,
        last_image=Path(last_image) if last_image else None,
        width=settings.rounded_size(sample.width, variant),
        height=settings.rounded_size(sample.height, variant),
        frames=settings.rounded_frames(sample.frames, variant),
        steps=sample.diffusion_steps or variant.sampling_steps,
        guidance=settings.guidance_of(sample.cfg_scale, low, variant),
        shift=variant.flow_shift,
        seed=random.getrandbits(30) if sample.random_seed else sample.seed,
        fps=getattr(sample, "wan_fps", None) or variant.fps,
    )
