"""The command plan: the memory and time that a run needs, before anything is loaded.

Imports neither torch nor diffusers, so that it answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from onewan.arithmetic.byte_sizes import format_bytes, parse_bytes
from onewan.arithmetic.collectives import Network
from onewan.arithmetic.durations import format_duration
from onewan.cli.importing import run_file_of
from onewan.cli.output import say, write_json
from onewan.config.load import load_run
from onewan.config.resolve import with_steps_of_epochs
from onewan.config.schema import ResolvedRun
from onewan.data.buckets import bytes_of_archives, expected_buckets
from onewan.memory.plan import (
    ARCHIVES,
    MACHINE_SIZE,
    Bucket,
    BucketPlan,
    Plan,
    Processes,
    RunTime,
    Settings,
    Sharing,
    divided,
    find_machine,
    make_plan,
    of_each_process,
    read_stored_model,
)
from onewan.parallel.run_division import division_of
from onewan.train.cadence import Cadence
from onewan.variants import ExpertName

_BUCKETS_SHOWN = 8
_WAITING = 0.02
"""Share of a run's steps, above which it is said that processes wait in them."""


def plan(
    run: Path,
    overrides: Sequence[str],
    *,
    vram: int | None,
    ram: int | None,
    gpus: int,
    as_json: bool,
) -> int:
    """Print the plan of a run. Returns 0 if the run fits, else 1."""
    config = load_run(run_file_of(run), overrides)
    found = plan_of(config, vram, ram, gpus)
    if as_json:
        write_json(found.as_data())
    else:
        for line in _lines(config, found):
            say(line)
    return 0 if found.fits else 1


def plan_of(
    config: ResolvedRun,
    vram: int | None = None,
    ram: int | None = None,
    gpus: int = 1,
    network: Network | None = None,
) -> Plan:
    """The plan of `config`; `vram` and `ram`, in bytes, replace those of the run file. With several
    `gpus` it is that of one of as many processes, and has what they give together, with gradients
    summed over `network` (`divided`)."""
    division = division_of(config, gpus)
    memory = config.memory
    machine = find_machine(
        vram if vram is not None or memory.vram is None else parse_bytes(memory.vram),
        ram if ram is not None or memory.ram is None else parse_bytes(memory.ram),
    )
    expected = expected_buckets(config)
    each: dict[ExpertName, int] = {
        name: max(1, count) for name, count in expected.batches_per_epoch.items()
    }
    config = with_steps_of_epochs(config, each)
    clips = {
        Bucket(frames=frames, width=width, height=height): count
        for (frames, (width, height)), count in expected.clips.items()
    }
    stored = read_stored_model(config)
    machine_size = MACHINE_SIZE if network is None else network.machine_size
    share = of_each_process(machine, gpus, machine_size=machine_size)
    plan = make_plan(config, clips, share, stored, notes=expected.notes)
    if gpus > 1:
        plan = divided(plan, config, clips, stored, machine, division, _is_due(config), network)
    plan = replace(plan, clips=0 if expected.assumed else sum(clips.values()))
    if unpacked := bytes_of_archives(config):
        plan = replace(plan, disk={ARCHIVES: unpacked, **plan.disk})
    return plan


def _is_due(config: ResolvedRun) -> Callable[[int], bool]:
    """Whether something is done, or changes, after so many steps."""
    cadence, changes = Cadence.of(config), {change.step for change in config.changes}
    return lambda step: step in changes or cadence.at(step).anything


def _lines(config: ResolvedRun, plan: Plan) -> Iterator[str]:
    machine, worst = plan.machine, plan.worst
    yield (
        f"{config.model.facts().title}, {config.method.kind}, on {machine.name}: "
        f"{format_bytes(machine.device_budget)} of {format_bytes(machine.vram)} of device memory "
        f"and {format_bytes(machine.host_budget)} of {format_bytes(machine.ram)} of host memory "
        "can be used."
    )
    yield (
        f"The clips that need most are {worst.bucket} (frames x height x width), "
        f"{worst.tokens:,} tokens each."
    )
    if plan.processes is not None:
        count = plan.processes.count
        yield (
            f"This is the plan of each of {count} processes, which have a device each and share "
            f"{format_bytes(count * machine.ram)} of host memory."
        )
    yield ""
    yield from _phase_table(plan)
    yield ""
    yield f"Training with {worst.bucket}, on the device:"
    for name, amount in sorted(worst.training.device.items(), key=lambda item: -item[1]):
        yield f"  {name:<45}{format_bytes(amount):>10}"
    yield "and in host memory:"
    host = {**worst.training.pinned, **worst.training.pageable}
    for name, amount in sorted(host.items(), key=lambda item: -item[1]):
        yield f"  {name:<45}{format_bytes(amount):>10}"
    yield ""
    yield "Settings and the time of a step, by arithmetic and not measured:"
    for bucket in plan.buckets[:_BUCKETS_SHOWN]:
        yield f"  {bucket.bucket}: {_settings_text(bucket.settings, plan)}"
        yield f"    {_time_text(bucket)}"
    if len(plan.buckets) > _BUCKETS_SHOWN:
        yield f"  and {len(plan.buckets) - _BUCKETS_SHOWN} buckets that need less memory"
    if plan.processes is None:
        yield from _run_time_lines(plan.run_time)
    else:
        yield from _process_lines(config, plan.processes, plan.sharing)
    disk = ", ".join(f"{name} {format_bytes(amount)}" for name, amount in plan.disk.items())
    yield f"Disk: {disk}."
    for note in plan.notes:
        yield f"Note: {note}."
    yield ""
    yield from _verdict(plan)


def _phase_table(plan: Plan) -> Iterator[str]:
    """A line for each phase: its peak on the device and in host memory."""
    yield f"{'phase':<22}{'device':>10}{'host, pinned':>15}{'host, other':>15}"
    for phase in plan.phases:
        other = phase.host_bytes - phase.pinned_bytes
        yield (
            f"{phase.phase:<22}{format_bytes(phase.device_bytes):>10}"
            f"{format_bytes(phase.pinned_bytes):>15}{format_bytes(other):>15}"
        )


def _settings_text(settings: Settings, plan: Plan) -> str:
    layers = plan.layers
    if plan.sharing.is_sharded:
        parts = [f"a shard of each of {layers} blocks stays on the device"]
    elif settings.streamed(layers):
        parts = [f"{settings.resident_blocks} of {layers} blocks stay on the device"]
    else:
        parts = [f"all {layers} blocks stay on the device"]
    if not settings.checkpointing:
        parts.append("no gradient checkpointing")
    if settings.offload_inputs:
        parts.append("block inputs go to host memory")
    if settings.keep_attention != "no":
        where = "on the device" if settings.keep_attention == "device" else "in host memory"
        parts.append(f"attention outputs are kept {where}")
    if settings.feed_forward_chunks > 1:
        parts.append(f"{settings.feed_forward_chunks} chunks of the feed-forward layer")
    if settings.park_idle:
        parts.append("the optimizer state of the idle expert is in host memory")
    return "; ".join(parts)


def _time_text(bucket: BucketPlan) -> str:
    time = bucket.time
    copied = f"{format_bytes(time.bytes_to_device)} to the device"
    if time.bytes_to_host:
        copied += f" and {format_bytes(time.bytes_to_host)} to the host"
    return (
        f"{time.seconds:.3g} s, {time.slowdown:.2f} times as long as without copies; "
        f"{time.flops / 1e12:,.0f} TFLOP; {copied}"
    )


def _run_time_lines(time: RunTime) -> Iterator[str]:
    parts = [f"{time.steps:,} steps {format_duration(time.steps * time.step)}"]
    if time.samples:
        parts.append(_videos(time.samples, "sample video", time.sample))
    if time.full_samples:
        parts.append(_videos(time.full_samples, "full sample video", time.full_sample))
    if time.validations:
        parts.append(f"validation {format_duration(time.validations * time.validation)}")
    yield f"The whole run takes about {format_duration(time.total)}: {', '.join(parts)}."


def _process_lines(config: ResolvedRun, found: Processes, sharing: Sharing) -> Iterator[str]:
    yield ""
    yield f"With {found.count} devices: {found.division}."
    yield from _reasons(config, sharing)
    step = f"A step takes {format_duration(found.step)}"
    if found.parts > 1:
        clips = "1 clip" if found.clips_of_each == 1 else f"{found.clips_of_each} clips"
        step += f" with {clips} of its {found.clips} on each device"
    if found.gradient_bytes:
        step += (
            f", {format_duration(found.summing)} of it for the sums of "
            f"{format_bytes(found.gradient_bytes)} of gradients"
        )
    yield f"{step}."
    if found.weight_bytes:
        yield (
            "For weights and gradients that are sharded each process sends "
            f"{format_bytes(found.weight_bytes)} in a step, most of it while it computes; it waits "
            f"{format_duration(found.waiting)} for the rest."
        )
    if found.token_bytes:
        yield (
            f"For the tokens that {found.sequence} processes share each sends "
            f"{format_bytes(found.token_bytes)} in a step, which takes "
            f"{format_duration(found.exchanging)}."
        )
    whole = f"The whole run takes about {format_duration(found.total)}"
    if found.alone is None:
        yield f"{whole}. One device does not have the memory for it."
    else:
        yield (
            f"{whole} instead of {format_duration(found.alone)} on one device: "
            f"{found.alone / found.total:.2f} times as fast."
        )
    if found.unpaired_steps > _WAITING * found.steps:
        yield (
            f"{found.unpaired_steps:,} of {found.steps:,} steps are trained while the processes of "
            "the other expert wait: where something is due, such as by train.save_every, within a "
            "block of train.switch_expert_every steps, or where one expert has more steps."
        )
    yield f"All processes together need {format_bytes(found.host_bytes)} of host memory."


def _reasons(config: ResolvedRun, sharing: Sharing) -> Iterator[str]:
    """Why weights are sharded, or tokens shared, where the run file leaves that open."""
    if sharing.is_sharded and config.parallel.weights == "auto":
        yield (
            "Weights are sharded since full fine-tuning has gradients and optimizer state of the "
            "size of the model (parallel.weights is auto)."
        )
    if sharing.sequence > 1 and config.parallel.sequence_parallel == "auto":
        yield (
            "Tokens are shared since a step has fewer clips than there are processes for it "
            "(parallel.sequence_parallel is auto)."
        )


def _videos(count: int, what: str, seconds: float) -> str:
    """`count` videos that take `seconds` each."""
    videos = f"1 {what}" if count == 1 else f"{count} {what}s"
    return f"{videos} {format_duration(count * seconds)} ({format_duration(seconds)} each)"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.fits:
        peak = plan.peak
        yield (
            f"It fits: the highest peak is that of {peak.phase}, {format_bytes(peak.device_bytes)}."
        )
        heading = "These changes would make it faster:"
    else:
        yield "It does not fit:"
        for problem in plan.problems():
            yield f"  {problem}"
        heading = "Each of these changes makes it fit; those that cost least time come first:"
    if plan.suggestions:
        yield heading
        for suggestion in plan.suggestions:
            yield f"  {suggestion.text}"
            yield f"    {' '.join(suggestion.change)}"
    elif not plan.fits and plan.enough is None:
        yield "No single setting makes it fit; train at a smaller size, or on a larger device."
    if plan.enough is not None:
        yield f"{plan.enough_text} (--gpus {plan.enough})."
