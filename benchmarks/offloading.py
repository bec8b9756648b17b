"""What streaming blocks and offloading activations cost and save: memory, copies, waits, time.

For each setting, from everything resident to everything streamed with block inputs and attention
outputs in host memory: the device's peak, the bytes that a step copies in each direction and the
blocks that it had to wait for, beside the memory plan. On the CPU these are counted on the
simulated accelerator of ``tests/simulated_gpu``, with the host's waits; times say nothing there, so
the share of the copies' time that passes beside computations is predicted for several machines,
from the recorded order of copies and computations (`streaming.py`). On a real device steps are
timed: their duration relative to the resident one, and the share of the copies' time that does not
make them longer, by the measured rate of copies.

    python benchmarks/offloading.py [--json FILE]
    python benchmarks/offloading.py --device cuda --true-size --size 81x480x832
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from figures import Chart, Figure, Value, add_output_options, measured_here, on_its_device, save
from measuring import WARM_UP, in_turns, peak_of, release, simulated_device
from small_runs import SmallRuns, add_scale_options, build, scale_in_words, step_of, write_runs
from streaming import CARDS, predict

from onewan.devices import device_memory, synchronize
from onewan.train.run import Run

NO_COPIES = "all resident"
SETTINGS: dict[str, tuple[str, ...]] = {
    NO_COPIES: (
        "memory.resident_blocks={all}", "memory.offload_inputs=false", "memory.keep_attention=no",
    ),
    "half streamed": (
        "memory.resident_blocks={half}", "memory.offload_inputs=false", "memory.keep_attention=no",
    ),
    "all streamed": (
        "memory.resident_blocks=0", "memory.offload_inputs=false", "memory.keep_attention=no",
    ),
    "all streamed, block inputs on the host": (
        "memory.resident_blocks=0", "memory.offload_inputs=true", "memory.keep_attention=no",
    ),
    "all streamed, block inputs and attention on the host": (
        "memory.resident_blocks=0", "memory.offload_inputs=true", "memory.keep_attention=host",
    ),
}  # fmt: skip
PREDICTED = (("17x256x256", "bf16"), ("33x384x672", "bf16"), ("81x480x832", "bf16"))
"""Sizes of clips and storage of the weights."""
MACHINES = ("RTX 3090, PCIe 4", "RTX 4090, PCIe 4", "RTX 5090, PCIe 5", "H100, PCIe 5")


def measured(
    runs: SmallRuns, name: str, seconds: dict[str, list[float]], steps: int
) -> list[Value]:
    """One of `SETTINGS` on the device; `seconds` gets its times where they say something."""
    release(runs.device)
    before = device_memory(runs.device)[0] or 0
    settings = [s.format(all=runs.layers, half=runs.layers // 2) for s in SETTINGS[name]]
    config = runs.config(*settings, "memory.attention=flash", "memory.feed_forward_chunks=1")
    run = build(config)
    step = step_of(run)
    for _ in range(WARM_UP):
        step()
    waits, peak, copied, misses = counted(run, step, runs.device)
    plan = runs.plan(config)
    case = {"settings": name}
    values: list[Value] = []
    if peak is not None:
        planned = plan.training.device_bytes / 1e6
        values.append(
            Value(
                case=case,
                measure="device peak",
                unit="MB",
                repeats=((peak - before) / 1e6,),
                expected=planned,
            )
        )
    for direction, size, planned in zip(
        ("device", "host"), copied, (plan.time.bytes_to_device, plan.time.bytes_to_host),
        strict=True,
    ):  # fmt: skip
        values.append(
            Value(
                case=case,
                measure=f"to the {direction} per step",
                unit="MB",
                repeats=(size / 1e6,),
                expected=planned / 1e6,
            )
        )
    values.append(Value(case=case, measure="blocks waited for", repeats=(misses,), limit=0))
    if waits is not None:
        measure = "waits of the host per step"
        values.append(Value(case=case, measure=measure, repeats=(waits,), limit=1))
    if runs.device.type != "sim":
        seconds |= in_turns({name: step}, steps, runs.device)
        rate = copy_rate(runs.device)
        copying = copied[0] / rate["to the device"] + copied[1] / rate["to the host"]
        measure = "time of the copies alone"
        values.append(Value(case=case, measure=measure, unit="s", repeats=(copying,)))
    return values


def counted(
    run: Run, step: Callable[[], None], device: torch.device
) -> tuple[int | None, int | None, tuple[int, int], int]:
    """Of one step: waits of the host (None on a real device, where nothing counts them), the peak
    of the device, bytes copied to the device and to the host, and blocks that were missing."""
    trace = None
    if device.type == "sim":
        import simulated_gpu  # pyright: ignore[reportMissingImports]

        trace = simulated_gpu.trace()
    before, misses = run.memory.copied, 0 if run.memory.stream is None else run.memory.stream.misses
    with trace or nullcontext() as traced:
        peak = peak_of(step, device)
    after = run.memory.copied
    # The measurement itself waits for the device at its end.
    waits = None if traced is None else sum(traced.waits().values()) - 1
    return (
        waits,
        peak,
        (after.to_device - before.to_device, after.to_host - before.to_host),
        0 if run.memory.stream is None else run.memory.stream.misses - misses,
    )


def copy_rate(device: torch.device, size: int = 1 << 28) -> dict[str, float]:
    """Bytes/s of copies between pinned host memory and `device`, the median of five."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    copies = {
        "to the device": lambda: there.copy_(host, non_blocking=True),
        "to the host": lambda: host.copy_(there, non_blocking=True),
    }
    times = in_turns(copies, 5, device)
    synchronize(device)
    return {name: size / median(taken) for name, taken in times.items()}


def timed(values: Sequence[Value], seconds: dict[str, list[float]]) -> list[Value]:
    """Durations relative to the resident step, and what share of the copies they hide."""
    found: list[Value] = []
    copying = {
        str(value.case["settings"]): value.median
        for value in values
        if value.measure == "time of the copies alone"
    }
    resident = median(seconds[NO_COPIES])
    for name, times in seconds.items():
        taken, case = median(times), {"settings": name}
        found.append(
            Value(
                case=case,
                measure="duration of a step",
                unit="s",
                repeats=tuple(times),
                baseline=NO_COPIES,
                ratio=taken / resident,
            )
        )
        if copying[name]:
            share = 1 - max(0.0, taken - resident) / copying[name]
            found.append(Value(case=case, measure="copy time hidden", repeats=(share,)))
    return found


def predicted() -> list[Value]:
    """The share of the copies' time that is hidden on real machines, by arithmetic."""
    values: list[Value] = []
    for size, storage in PREDICTED:
        for card in CARDS:
            if card.name in MACHINES:
                found = predict(card, size, storage, 0)
                case = {
                    "settings": "T2V-A14B, all streamed, block inputs on the host",
                    "machine": card.name,
                    "size": size,
                }
                hidden = "copy time hidden (predicted)"
                values.append(Value(case=dict(case), measure=hidden, repeats=(found.hidden,)))
                slow = "step / one without copies (predicted)"
                values.append(Value(case=dict(case), measure=slow, repeats=(found.slowdown,)))
    return values


def figure_of(values: Sequence[Value], runs: SmallRuns, what: str) -> Figure:
    real = runs.device.type != "sim"
    names = {value.measure for value in values}
    charts = [
        Chart(measure="device peak", title="Peak of device memory by what is streamed"),
        Chart(measure="to the device per step", title="Copied to the device in a step"),
        Chart(measure="duration of a step", title="Duration of a step by what is streamed"),
        Chart(
            measure="copy time hidden (predicted)",
            series="machine",
            title="Share of the copies' time that passes beside computations (predicted)",
        ),
    ]
    where = (
        "Steps are timed, and the share of the time of copies that does not make them longer is by "
        "the measured rate of copies."
        if real
        else "Counted on the simulated accelerator, whose times say nothing; the share of the time "
        "of copies that passes beside computations is predicted for machines that have not run it, "
        "from the recorded order of copies and computations of a step."
    )
    return measured_here(
        name="offloading",
        title="What streaming and offloading save and cost",
        measured=f"Steps as the trainer executes them: {what}. {where}",
        values=values,
        charts=[chart for chart in charts if chart.measure in names],
        arithmetic="plan",
        device=str(runs.device),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps, on a real device")
    add_scale_options(parser, layers=8)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = simulated_device() if options.device == "cpu" else None
    seconds: dict[str, list[float]] = {}
    values: list[Value] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = write_runs(options, Path(folder), device)
        for name in SETTINGS:
            values += measured(runs, name, seconds, options.steps)
        values += timed(values, seconds) if seconds else predicted()
        figure = figure_of(values, runs, scale_in_words(runs, options))
    if options.device != "cpu":
        figure = on_its_device(figure)
    for value in values:
        expected = "" if value.expected is None else f", plan {value.expected:.4g}"
        case = ", ".join(map(str, value.case.values()))
        print(f"{case}: {value.measure} {value.median:.4g} {value.unit}{expected}")
    save(figure, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
