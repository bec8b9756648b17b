"""The values of a starter run file that fit a device: the largest clips, the plainest weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onewan import documents
from onewan.arithmetic.buckets import floor_to_4n_plus_1
from onewan.arithmetic.byte_sizes import format_bytes
from onewan.cli.starter import StarterValues, starter
from onewan.config.resolve import resolve
from onewan.config.schema import ResolvedRun, RunConfig
from onewan.errors import MemoryPlanError
from onewan.memory.plan import Bucket, Machine, Plan, find_machine, make_plan
from onewan.memory.plan.stored import FP8_TEXT_ENCODER, assumed_model, with_changes
from onewan.variants import VARIANTS, Variant, VariantName

_SHARES_OF_FRAMES = (1.0, 0.6, 0.4, 0.2, 0.1, 0.01)
_AREAS = (None, 256 * 256)
_WEIGHTS = ("as_stored", "fp8", "nf4")
_SAMPLES = ((832, 480), (640, 384), (448, 256))


def fitting_values(variant: VariantName, vram: int, ram: int | None) -> StarterValues:
    """The values for a device of `vram` bytes and a host of `ram` bytes (None: this one).

    As many frames at 480p as fit come first, then weights as they are stored, then large samples.
    MemoryPlanError if not even the smallest values fit.
    """
    machine = find_machine(vram, ram)
    plan: Plan | None = None
    for values in _ladder(VARIANTS[variant], vram):
        plan = _plan(variant, values, machine)
        if plan.fits:
            return values
    assert plan is not None
    raise MemoryPlanError(
        f"--vram {format_bytes(vram)}, with {format_bytes(machine.ram)} of host memory: not even "
        f"the smallest clips of {variant} fit; give more, or choose another variant",
        plan.problems(),
    )


def _ladder(variant: Variant, vram: int) -> Iterator[StarterValues]:
    """Values in the order in which they are tried."""
    text = f"{vram // 10**6}MB" if vram % 10**9 else f"{vram // 10**9}GB"
    for area in _AREAS:
        for share in _SHARES_OF_FRAMES:
            for weights in _WEIGHTS:
                for sample in _SAMPLES:
                    for encoder in (None, FP8_TEXT_ENCODER):
                        yield StarterValues(
                            vram=text,
                            frames=floor_to_4n_plus_1(max(1, round(variant.frames * share))),
                            resolution=area,
                            weights=weights,
                            text_encoder=encoder,
                            sample_size=sample,
                        )


def _plan(variant: VariantName, values: StarterValues, machine: Machine) -> Plan:
    config = _resolved(starter(variant, values))
    side = (832, 480) if values.resolution is None else (256, 256)
    bucket = Bucket(frames=values.frames, width=side[0], height=side[1])
    stored = with_changes(assumed_model(config), config)
    return make_plan(config, [bucket], machine, stored, advice=False)


def _resolved(text: str) -> ResolvedRun:
    data = documents.parse_yaml(text)
    data["output"]["name"] = "run"
    config = RunConfig.model_validate(data)
    if not config.sample.prompts:  # of I2V-A14B they are commented out, but will be there
        sample = config.sample.model_validate({**config.sample.model_dump(), "prompts": ["a"]})
        config = config.model_copy(update={"sample": sample})
    return resolve(config, Path.cwd())
