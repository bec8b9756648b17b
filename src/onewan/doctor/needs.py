"""What a run needs of the machine: disk and time for the cache, and the verdict of its plan."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes, parse_bytes
from onewan.arithmetic.durations import format_duration
from onewan.config.resolve import condition_shares, trained_experts, with_steps_of_epochs
from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.data.expert_clips import batches_per_epoch, clips_by_expert
from onewan.doctor.environment import Environment
from onewan.doctor.finding import Finding
from onewan.errors import OnewanError
from onewan.memory.plan import (
    CACHE,
    Bucket,
    Machine,
    Plan,
    find_machine,
    free_bytes,
    full_disks,
    machine_of,
    make_plan,
    read_stored_model,
    smallest_machine,
)

_VAE_FLOPS = 4.8e6
"""Operations of the VAE's encoder for a pixel of a frame, by the sizes of its convolutions: that of
the A14B variants has 96 channels at full size, 192 at a half, 384 at a quarter and an eighth. That
of TI2V-5B has 160, of pixels in blocks of 2x2: about two thirds of it."""
_TEXT_FLOPS = 2 * 5.7e9 * 512
"""Operations of the text encoder for a caption: 5.7 billion weights, 512 tokens."""
_CARD_FLOPS = 25e12
"""Float32 operations/s of convolutions on a card of today, without TF32; the VAE computes in
float32. Cards differ by a factor of two or so."""
_CORE_FLOPS = 40e9
"""The same of a CPU core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a run needs, as far as it can be told without loading a model."""

    cache_bytes: int
    """Of the encoded clips."""
    cache_seconds: float
    """About how long it takes to encode them."""
    cache_free: int
    """Bytes that are free on the disk of the cache."""
    plan: Plan | None
    """None if it can't be made, if the run trains on the CPU, or without a card."""
    smallest: Machine | None
    """Without a card: the smallest machine that the run fits on, if there is one."""
    verdict: str
    """Of the plan, in one line."""
    findings: tuple[Finding, ...] = ()

    def lines(self) -> Iterator[str]:
        """The needs as lines of text."""
        if self.cache_bytes:
            yield (
                f"cache   {format_bytes(self.cache_bytes)} on the disk "
                f"({format_bytes(self.cache_free)} are free), about "
                f"{format_duration(self.cache_seconds)} to encode what is not in it yet"
            )
        yield f"plan    {self.verdict}"

    def as_data(self) -> dict[str, Any]:
        """The needs as plain data."""
        return {
            "cache": {
                "bytes": self.cache_bytes,
                "seconds": round(self.cache_seconds, 1),
                "free_bytes": self.cache_free,
            },
            "plan": {
                "verdict": self.verdict,
                "fits": None if self.plan is None else self.plan.fits,
                "problems": [] if self.plan is None else self.plan.problems(),
                "smallest": None
                if self.smallest is None
                else {"vram": self.smallest.vram, "ram": self.smallest.ram},
            },
        }


def needs_of(
    config: ResolvedRun,
    training: Sequence[Clip],
    held_out: Sequence[Clip],
    environment: Environment,
) -> Needs:
    """The needs of a run with these clips, at least one, to train and to validate on."""
    clips = (*training, *held_out)
    on_cpu = config.model.device == "cpu"
    has_card = not on_cpu and bool(environment.torch.devices or environment.cards)
    buckets = Counter(
        Bucket(frames=clip.frames, width=clip.size[0], height=clip.size[1]) for clip in clips
    )
    machine, is_assumed = _machine(config, environment)
    findings, plan, smallest = list[Finding](), None, None
    try:
        config = _with_steps(config, training)
        stored = read_stored_model(config)

        def plan_on(machine: Machine) -> Plan:
            return make_plan(config, buckets, machine, stored, advice=False)

        plan = plan_on(machine)
        smallest = smallest_machine(plan_on, machine.ram) if is_assumed and not on_cpu else None
    except OnewanError as error:
        verdict = f"can't be made: {error.message}"
        findings.append(Finding(severity="problem", kind="plan", text=f"the plan {verdict}"))
    else:
        if on_cpu:
            verdict = "not made, since the run trains on the CPU (model.device)"
        elif is_assumed:
            verdict = _without_card(smallest, machine.ram)
            findings += _plan_notes(stored.notes)
        else:
            verdict = _verdict(plan)
            if not plan.fits:
                text = f"the run does not fit: {'; '.join(plan.problems())}; see `onewan plan`"
                findings.append(Finding(severity="problem", kind="plan", text=text))
            findings += _plan_notes(plan.notes)
    size = 0 if plan is None else plan.disk.get(CACHE, 0)
    if plan is not None:
        findings += [
            Finding(severity="problem", kind="disk", text=text)
            for text in full_disks(config, plan.disk)
        ]
    return Needs(
        cache_bytes=size,
        cache_seconds=_encoding_seconds(config, clips, has_card=has_card),
        cache_free=free_bytes(config.video_data.cache_dir),
        plan=None if on_cpu or is_assumed else plan,
        smallest=smallest,
        verdict=verdict,
        findings=tuple(findings),
    )


def _machine(config: ResolvedRun, environment: Environment) -> tuple[Machine, bool]:
    """The machine that the run is planned for, and whether its card is an assumption."""
    vram = None if config.memory.vram is None else parse_bytes(config.memory.vram)
    ram = None if config.memory.ram is None else parse_bytes(config.memory.ram)
    # The driver of NVIDIA's cards is asked by `find_machine`, and torch about the others.
    others = [d for d in environment.torch.devices if d.memory and not environment.cards]
    if vram is None and others:
        return machine_of(others[0].title, others[0].memory, ram), False
    return find_machine(vram, ram), vram is None and not environment.cards


def _with_steps(config: ResolvedRun, training: Sequence[Clip]) -> ResolvedRun:
    """`config` with the steps that its epochs are."""
    own_clips = clips_by_expert(trained_experts(config), training)
    batches = batches_per_epoch(own_clips, config.train.batch_size)
    # An expert without clips is a finding of its own.
    return with_steps_of_epochs(config, {name: max(1, n) for name, n in batches.items()})


def _verdict(plan: Plan) -> str:
    peak, machine = plan.peak, plan.machine
    where = f"{machine.name} with {format_bytes(machine.vram)}"
    if not plan.fits:
        return f"does not fit on {where}"
    return (
        f"fits on {where}: {format_bytes(peak.device_bytes)} at most ({peak.phase}); "
        f"{plan.run_time.steps:,} steps take about {format_duration(plan.run_time.total)}"
    )


def _without_card(smallest: Machine | None, ram: int) -> str:
    """What the run needs, on a machine with `ram` bytes of host memory and no card."""
    if smallest is None:
        return "no card was found here, and the run fits on none; see `onewan plan`"
    size = smallest.vram // 10**9
    text = f"no card was found here; the run needs one of {size} GB or more"
    if smallest.ram > ram:
        text += f", with {format_bytes(smallest.ram)} of host memory (here are {format_bytes(ram)})"
    return f"{text}; `onewan plan --vram {size}GB` has the settings, and what needs less"


def _plan_notes(notes: Sequence[str]) -> list[Finding]:
    return [Finding(severity="note", kind="plan", text=note) for note in notes]


def _encoding_seconds(config: ResolvedRun, clips: Sequence[Clip], *, has_card: bool) -> float:
    if not config.video_data.cache:
        return 0.0
    pixels = sum(clip.frames * clip.size[0] * clip.size[1] for clip in clips)
    variant = config.model.facts()
    # The video of the first image is as long as the clip, and is encoded like it; so are a control
    # video, and those that end with the last frame.
    with_last = len({*condition_shares(config).used} & {"both", "last"})
    with_last = with_last if variant.condition_channels else 0
    flops = _VAE_FLOPS * pixels * (variant.encoded_videos + with_last)
    flops += _TEXT_FLOPS * len({text for clip in clips for text in clip.captions})
    rate = _CARD_FLOPS if has_card else _CORE_FLOPS * (os.cpu_count() or 1)
    return flops / rate
