"""Samples per second and device memory by batch size, relative to batch size 1.

Runs of the batch sizes train the same clip, as the trainer executes a step; where the CPU computes
they take turns, so that changes in the machine's speed affect all alike. The arithmetic beside the
samples per second is that of batch size 1: the operations of a sample do not depend on the others
of its batch, so whatever is above it is work that a batch shares, such as reading the weights,
launching kernels and the optimizer's step. Memory is the device's peak in a step beside the plan's;
if the CPU computes, it is that of the simulated accelerator of ``tests/simulated_gpu``.

    python benchmarks/batch_scaling.py [--batch 1 2 4 8] [--steps 5] [--json FILE]
    python benchmarks/batch_scaling.py --device cuda --true-size --size 33x480x832
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from figures import (
    Chart,
    Figure,
    Value,
    add_output_options,
    measured_here,
    on_its_device,
    print_values,
    save,
)
from measuring import clock_name, in_turns, peak_of, release, simulated_device
from small_runs import SmallRuns, add_scale_options, build, scale_in_words, step_of, write_runs

from onewan.devices import device_memory

BATCHES = (1, 2, 4, 8)


def samples_per_second(runs: SmallRuns, batches: Sequence[int], steps: int) -> list[Value]:
    """Of each batch size."""
    together = [batches] if runs.device.type == "cpu" else [[batch] for batch in batches]
    times: dict[str, list[float]] = {}
    for group in together:  # a device may not hold several runs
        loops = {
            str(batch): step_of(build(runs.config(batch_size=batch, repeats=max(batches))))
            for batch in group
        }
        times |= in_turns(loops, steps, runs.device)
        del loops
        release(runs.device)
    rates = {batch: [batch / taken for taken in times[str(batch)]] for batch in batches}
    one = median(rates[batches[0]])
    return [
        Value(
            case={"batch size": batch},
            measure="samples per second",
            unit="1/s",
            repeats=tuple(rates[batch]),
            expected=one,
            baseline=f"batch size {batches[0]}",
            ratio=median(rates[batch]) / one,
        )
        for batch in batches
    ]


def peaks(runs: SmallRuns, batches: Sequence[int]) -> list[Value]:
    """The device's peak in the second step of each batch size; none where it does not say."""
    values: list[Value] = []
    for batch in batches:
        release(runs.device)
        before = device_memory(runs.device)[0] or 0
        config = runs.config("memory.attention=flash", batch_size=batch, repeats=max(batches))
        run = build(config)
        step = step_of(run)
        step()  # creates the optimizer's state
        peak = peak_of(step, runs.device)
        if peak is not None:
            values.append(
                Value(
                    case={"batch size": batch},
                    measure="device peak",
                    unit="MB",
                    repeats=((peak - before) / 1e6,),
                    expected=runs.plan(config).training.device_bytes / 1e6,
                )
            )
        del run, step
    return values


def figure_of(values: Sequence[Value], what: str, runs: SmallRuns) -> Figure:
    memory = any(value.measure == "device peak" for value in values)
    where = "the device" if runs.device.type != "cpu" else "the simulated accelerator"
    return measured_here(
        name="batch_scaling",
        title="Samples per second and memory by batch size",
        measured=(
            f"Steps as the trainer executes them: {what}. Seconds are "
            f"{clock_name(runs.device)}. The arithmetic is the rate of the smallest batch, since a "
            "sample has the same operations in each."
            + (f" Peaks are those of {where} in a step, beside the plan's." if memory else "")
        ),
        values=values,
        charts=[
            Chart(
                measure="samples per second",
                kind="lines",
                x="batch size",
                title="Samples per second by batch size",
            ),
            *(
                [
                    Chart(
                        measure="device peak",
                        kind="lines",
                        x="batch size",
                        title=f"Peak of the memory of {where} by batch size",
                    )
                ]
                if memory
                else []
            ),
        ],
        arithmetic="by arithmetic",
        device=str(runs.device),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="batch sizes")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (5)")
    add_scale_options(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sim = simulated_device() if options.device == "cpu" else None
    batches = sorted(options.batch)
    with tempfile.TemporaryDirectory() as folder:
        runs = write_runs(options, Path(folder) / "timed")
        values = samples_per_second(runs, batches, options.steps)
        counted = runs
        if sim is not None:
            counted = write_runs(options, Path(folder) / "counted", sim)
        values += peaks(counted, batches)
        figure = figure_of(values, scale_in_words(runs, options), runs)
    if options.device != "cpu":
        figure = on_its_device(figure)
    print_values(figure, "batch size")
    save(figure, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
