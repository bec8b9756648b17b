"""The values of a starter run file that fit a device: the largest clips, the plainest weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from onewan import documents
from onewan.arithmetic.buckets import floor_to_4n_plus_1, sizes_for
from onewan.arithmetic.byte_sizes import format_bytes
from onewan.config.resolve import resolve
from onewan.config.schema import ResolvedRun, RunConfig
from onewan.errors import MemoryPlanError
from onewan.memory.plan import Bucket, Machine, Plan, find_machine, make_plan
from onewan.memory.plan.stored import (
    FP8_TEXT_ENCODER,
    StoredModel,
    assumed_model,
    read_stored_model,
    with_changes,
)
from onewan.presets.run_files import alternatives
from onewan.presets.starter import SHAPE, SMALLEST_SAMPLE, FittedValues, StarterRequest, starter

_SHARES_OF_FRAMES = (1.0, 0.6, 0.4, 0.2, 0.1, 0.01)
_SIDES = (384, 256)
_WEIGHTS = ("as_stored", "fp8", "nf4")
_SAMPLES = (None, (640, 384), SMALLEST_SAMPLE)


def fitted(request: StarterRequest, vram: int, ram: int | None) -> tuple[FittedValues, Plan]:
    """The values for a device of `vram` bytes and a host of `ram` bytes (None: this one), and the
    plan of the largest clips.

    At most the frames and the area of the purpose, or the official frames at 480p. As many frames
    as fit come first (for a motion also before the area), then weights as they are stored, then
    large samples. Files of the model count with the size that they have. MemoryPlanError if not
    even the smallest values fit.
    """
    machine = find_machine(vram, ram)
    ladder = list(_ladder(request, vram, machine.ram))
    first = _config(request, ladder[0])
    stored = read_stored_model(first) if request.models else assumed_model(first)

    def plan_of(values: FittedValues) -> Plan:
        config = _config(request, values)
        return _plan(config, values, machine, with_changes(stored, config))

    smallest = plan_of(ladder[-1])  # so that a refusal need not try the others
    if smallest.fits:
        plans = ((values, plan_of(values)) for values in ladder)
        return next((values, plan) for values, plan in plans if plan.fits)
    what = "photos" if request.frames == 1 else "clips"
    raise MemoryPlanError(
        f"--vram {format_bytes(vram)}, with {format_bytes(machine.ram)} of host memory: not even "
        f"the smallest {what} of {request.variant} fit with {request.method}; give more, or choose "
        "another variant or method",
        [*smallest.problems(), *alternatives(request, vram, machine.ram)],
    )


def _ladder(request: StarterRequest, vram: int, ram: int) -> Iterator[FittedValues]:
    """Values in the order in which they are tried."""
    text = f"{vram // 10**6}MB" if vram % 10**9 else f"{vram // 10**9}GB"
    encoders = (None,) if "text_encoder" in request.models else (None, FP8_TEXT_ENCODER)
    # Packed weights can't be trained, and those that stay frozen would be of another precision.
    packings = ("as_stored",) if request.method == "fine_tune" else _WEIGHTS
    for frames, area in _clips(request):
        limit = area or request.facts.training_area
        samples = [size for size in _SAMPLES if size is None or prod(size) < limit]
        for weights in packings:
            for sample in samples:
                for encoder in encoders:
                    yield FittedValues(
                        vram=text,
                        ram=format_bytes(ram),
                        frames=frames,
                        area=area,
                        weights=weights,
                        text_encoder=encoder,
                        sample_size=sample,
                    )


def _clips(request: StarterRequest) -> list[tuple[int, int | None]]:
    """(frames, area) of training clips, the largest first; area None is the default."""
    counts = [max(1, round(request.frames * share)) for share in _SHARES_OF_FRAMES]
    frames = list(dict.fromkeys(map(floor_to_4n_plus_1, counts)))
    limit = request.area or request.facts.training_area
    areas = [request.area, *(side * side for side in _SIDES if side * side < limit)]
    clips = [(count, area) for area in areas for count in frames]
    if request.recipe.shortens_last:
        clips.sort(key=lambda clip: -clip[0])  # stable, so that larger areas stay first
    return clips


def _plan(config: ResolvedRun, values: FittedValues, machine: Machine, stored: StoredModel) -> Plan:
    facts = config.model.facts()
    area = values.area or facts.training_area
    largest = config.video_data.max_resolution
    sizes = sizes_for(area, SHAPE[0] / SHAPE[1], facts.size_multiple, largest)
    width, height = max(sizes, key=prod)
    bucket = Bucket(frames=values.frames, width=width, height=height)
    return make_plan(config, [bucket], machine, stored, advice=False)


def _config(request: StarterRequest, values: FittedValues) -> ResolvedRun:
    """The run with these values."""
    data = documents.parse_yaml(starter(replace(request, fitted=values)))
    data["output"].setdefault("name", "run")
    config = RunConfig.model_validate(data)
    if not config.sample.prompts:  # of I2V-A14B they are commented out, but will be there
        sample = config.sample.model_validate({**config.sample.model_dump(), "prompts": ["a"]})
        config = config.model_copy(update={"sample": sample})
    return resolve(config, Path.cwd())
