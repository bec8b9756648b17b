"""Limits of a variant's samples: the checks that the run file's rules and the sampler share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from onewan.variants import Variant


class GivesFiles(Protocol):
    """A sample, or a prompt of a run file, with the files that are given."""

    @property
    def image(self) -> Path | None:
        """The first frame."""
        ...

    @property
    def last_image(self) -> Path | None:
        """The last frame."""
        ...

    @property
    def control(self) -> Path | None:
        """The control video."""
        ...

    @property
    def reference(self) -> Path | None:
        """The reference image."""
        ...


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


def given_files(sample: GivesFiles) -> dict[str, Path | None]:
    """The files that a sample is given, by the names of its fields."""
    return {
        "image": sample.image,
        "last_image": sample.last_image,
        "control": sample.control,
        "reference": sample.reference,
    }


def file_errors(
    variant: Variant, files: Mapping[str, Path | None], frames: int | None = None
) -> Iterator[tuple[str, str]]:
    """(field, message) of what is wrong with the `files` that a sample is given, or with their
    absence. `frames`: None stands for the variant's own number."""
    if variant.needs_image and files["image"] is None and files["last_image"] is None:
        yield "image", f"{variant.name} starts from an image, got nothing; give an image file"
    image = (variant.takes_image, "image", "i2v-a14b or ti2v-5b")
    kinds = {
        "image": image,
        "last_image": image,
        "control": (variant.takes_control, "control video", "fun-control-a14b"),
        "reference": (
            variant.reference_channels is not None,
            "reference image",
            "fun-control-a14b",
        ),
    }
    for field, (is_taken, noun, instead) in kinds.items():
        if not is_taken and (given := files[field]) is not None:
            yield (
                field,
                f"{variant.name} takes no {noun}, got {str(given)!r}; leave it out, or use "
                f"{instead}",
            )
    if variant.takes_image and files["last_image"] is not None and frames == 1:
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
