"""Bytes of the files that a run writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onewan.config.method import FineTuneMethod
from onewan.config.resolve import condition_shares
from onewan.config.schema import ResolvedRun
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.free_space import CACHE
from onewan.memory.plan.stored import COMPUTED_TYPES
from onewan.memory.plan.trained import TrainedWeights


def disk_bytes(
    config: ResolvedRun, trained: Sequence[TrainedWeights], clips: Mapping[Bucket, int]
) -> dict[str, int]:
    """By what they are for. `trained` is everything that the run trains, `clips` are the numbers of
    its clips by bucket."""
    variant = config.model.facts()
    channels = variant.latent_channels * variant.encoded_videos
    latents = sum(
        count * 4 * channels * bucket.latent_cells(variant) for bucket, count in clips.items()
    )
    latents += sum(
        4 * variant.latent_channels * _condition_cells(config, bucket, count)
        for bucket, count in clips.items()
    )
    kept = config.train.keep_last + 1 + config.train.keep_best
    exports = -(-config.train.steps // config.train.save_every)
    if config.output.keep_last is not None:
        exports = min(exports, config.output.keep_last)
    exports += config.validation.clips > 0  # the best one
    dtype = config.output.dtype
    if dtype is None:
        dtype = config.model.dtype if isinstance(config.method, FineTuneMethod) else "float32"
    exported = sum(t.count for t in trained) * COMPUTED_TYPES[dtype] * len(config.output.formats)
    exported *= 1 if config.train.ema is None else 2
    return {
        **({CACHE: latents} if config.video_data.cache else {}),
        "checkpoints": kept * sum(t.saved for t in trained),
        "exported weights": exports * exported,
    }


def _condition_cells(config: ResolvedRun, bucket: Bucket, clips: int) -> int:
    """Latent cells that the conditions of a bucket's `clips` take in the cache besides that of the
    first frame (`onewan.model.conditioning.ConditionPart`)."""
    variant, used = config.model.facts(), {*condition_shares(config).used}
    cells = bucket.latent_cells(variant)
    frames = (bucket.frames - 1) // variant.temporal_compression + 1
    ends = len(used & {"both", "last"}) if bucket.frames > 1 else 0
    if not variant.condition_channels:
        return clips * min(ends, 1) * cells // frames
    # The latents of gray frames are the same for all clips of a shape.
    # An image that is given its last frame is given its first one, which is the same.
    gray = {"none"} if frames == 1 else {"none", "last"}
    if variant.condition != "first_frame_channels":  # Wan2.2-Fun has zeros without a frame
        gray.discard("none")
    empty = cells if used & gray else 0
    return clips * ends * cells // frames + empty
