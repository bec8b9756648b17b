"""Size, length and steps of sample videos where the run file has none.

A sample shows what is trained, at a price that can be paid every 250 steps: it has the training
size, 25 denoising steps, and as many frames as cost no more than fifty training steps. With
distilled LoRAs, their few steps are what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onewan.arithmetic.buckets import Size, floor_to_4n_plus_1, sizes_for
from onewan.arithmetic.flops import (
    FLASH_BACKWARD,
    Trained,
    TransformerSize,
    forward_flops,
    token_count,
    training_flops,
)
from onewan.config.method import EmbeddingMethod, FineTuneMethod
from onewan.config.schema import RunConfig
from onewan.variants import Variant

SAMPLING_STEPS = 25
"""ai-toolkit's number for Wan 2.2 (config/examples/train_lora_wan22_14b_24gb.yaml), and more than
the 20 of ComfyUI's templates; the official 40 to 50 take twice the time for little more."""

TRAINING_STEPS = 50
"""Training steps that a sample may cost: with one prompt, a fifth of the 250 steps between two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDefaults:
    """Values for the fields of `sample` that are null."""

    width: int
    height: int
    frames: int
    steps: int


def sample_defaults(config: RunConfig, resolutions: tuple[int | str, ...]) -> SampleDefaults:
    """The values for a run with these training sizes (areas or "WxH"), of which the first counts.

    What the run file gives of size, steps and guidance is part of the price. There are never fewer
    frames than in the training clips, and never more than the variant's own number.
    """
    variant, sample = config.model.facts(), config.sample
    width, height = _training_size(variant, resolutions[0], config.video_data.max_resolution)
    steps = min(SAMPLING_STEPS, variant.sampling_steps) if sample.steps is None else sample.steps
    longest = floor_to_4n_plus_1(
        config.wan_config.max_frames or variant.frames, variant.temporal_compression
    )
    guidance = sample.guidance or tuple(expert.guidance_scale for expert in variant.experts)
    if sample.distilled is not None:
        passes = sample_passes(sample.distilled.steps, (sample.distilled.guidance,))
    else:
        passes = sample_passes(steps, guidance)
    limit = TRAINING_STEPS * _step(config, variant, longest, (width, height))
    video = sample.width or width, sample.height or height
    least = min(longest, variant.frames)
    counts = range(variant.frames, least, -variant.temporal_compression)
    affordable = (n for n in counts if passes * _forward(variant, n, video) <= limit)
    return SampleDefaults(width=width, height=height, frames=next(affordable, least), steps=steps)


def sample_passes(steps: int, guidance: Sequence[float]) -> float:
    """Passes through a transformer that a sample takes, with these guidance scales of its experts.

    The negative prompt takes a second pass, unless the scale is 1.
    """
    return steps * sum(1 if scale == 1 else 2 for scale in guidance) / len(guidance)


def _training_size(variant: Variant, resolution: int | str, max_resolution: Size) -> Size:
    """The training size of a clip in the official shape, landscape of 16:9."""
    width, height = variant.sample_size
    return sizes_for(resolution, width / height, variant.size_multiple, max_resolution)[0]


def _step(config: RunConfig, variant: Variant, frames: int, size: Size) -> float:
    """Operations of an optimizer step on the longest clips."""
    trained: Trained = "adapter"
    if isinstance(config.method, FineTuneMethod):
        trained = "weights"
    elif isinstance(config.method, EmbeddingMethod):
        trained = "embeddings"
    clip = training_flops(
        forward_flops(TransformerSize.of_variant(variant), _tokens(variant, frames, size)),
        trained,
        attention_backward=FLASH_BACKWARD,
        recomputations=int(config.memory.gradient_checkpointing),
    )
    return config.train.batch_size * config.train.accumulation * clip


def _forward(variant: Variant, frames: int, size: Size) -> int:
    tokens = _tokens(variant, frames, size)
    return forward_flops(TransformerSize.of_variant(variant), tokens).total


def _tokens(variant: Variant, frames: int, size: Size) -> int:
    latents = (frames - 1) // variant.temporal_compression + 1
    width, height = (side // variant.spatial_compression for side in size)
    return token_count(latents + variant.reference_frames, height, width)
