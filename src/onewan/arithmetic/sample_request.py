"""Limits of a variant's samples: the checks that the run file's rules and the sampler share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from onewan.variants import Variant


def request_errors(
    variant: Variant,
    *,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: Sequence[float] | None = None,
) -> Iterator[tuple[str, str]]:
    """(field, message) of every value that `variant` can't sample with.

    None stands for the variant's own value. diffusers would round sizes and frames silently.
    """
    for name, side in (("width", width), ("height", height)):
        if side is not None and (error := _side_error(variant, side)):
            yield name, error
    temporal = variant.temporal_compression
    if frames is not None and (frames < 1 or frames % temporal != 1):
        below = max(0, frames - 1) // temporal * temporal + 1
        yield (
            "frames",
            f"must be {temporal}n+1, got {frames}; the nearest are {below} and {below + temporal}",
        )
    if steps is not None and steps < 1:
        official = variant.sampling_steps
        yield "steps", f"must be at least 1, got {steps}; the official number is {official}"
    if guidance is not None and (error := _guidance_error(variant, guidance)):
        yield "guidance", error


def image_errors(
    variant: Variant,
    image: Path | str | None,
    last_image: Path | str | None,
    frames: int | None = None,
) -> Iterator[tuple[str, str]]:
    """(field, message) of what is wrong with `image` and `last_image`, the first and the last frame
    of a sample, or with their absence. `frames`: None stands for the variant's own number."""
    if variant.needs_image and image is None and last_image is None:
        yield "image", f"{variant.name} starts from an image, got nothing; give an image file"
    for field, given in (("image", image), ("last_image", last_image)):
        if not variant.takes_image and given is not None:
            yield (
                field,
                f"{variant.name} takes no image, got {str(given)!r}; leave it out, or use "
                "i2v-a14b or ti2v-5b",
            )
    if variant.takes_image and last_image is not None and frames == 1:
        yield "last_image", "a sample of one frame has no other last frame; give more frames"


def _side_error(variant: Variant, side: int) -> str | None:
    multiple = variant.size_multiple
    if side >= multiple and side % multiple == 0:
        return None
    nearest = max(multiple, round(side / multiple) * multiple)
    return (
        f"must be a multiple of {multiple} for {variant.name}, got {side}; the nearest is {nearest}"
    )


def _guidance_error(variant: Variant, guidance: Sequence[float]) -> str | None:
    count = len(variant.experts)
    official = _listed([expert.guidance_scale for expert in variant.experts])
    if len(guidance) != count:
        form = "[high, low]" if count == 2 else "[scale]"
        return (
            f"must have one scale for each expert of {variant.name}, {form}, got "
            f"{_listed(guidance)}; give {count}, or leave it out for the official {official}"
        )
    if min(guidance) < 1:
        return (
            f"must be at least 1 (no guidance) for each expert, got {_listed(guidance)}; "
            f"raise it, or leave it out for the official {official}"
        )
    return None


def _listed(values: Sequence[float]) -> str:
    return f"[{', '.join(map(str, values))}]"
