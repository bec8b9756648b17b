"""What settings of `memory` change in a step on a GPU: duration, and peak beside the plan's.

Compiled blocks, packed weights, each attention backend that works on the device, and attention
that is computed again, each beside the same step without it, as the trainer executes it. A few
blocks of full width are enough: all blocks take the same time.

    python benchmarks/gpu_settings.py --device cuda --width 5120 --blocks 4 --size 33x480x832
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from figures import (
    Chart,
    Figure,
    Value,
    add_output_options,
    measured_here,
    on_its_device,
    save,
)
from measuring import in_turns, peak_of, release
from small_runs import SmallRuns, add_scale_options, build, scale_in_words, step_of, write_runs

from onewan.devices import device_memory, fused_attention
from onewan.errors import ConfigError, OnewanError
from onewan.model.attention_backends import attention_backend

PLAIN = "flash attention, kept on the device"
COMMON = (
    "memory.resident_blocks={all}",
    "memory.offload_inputs=false",
    "memory.keep_attention=device",
    "memory.feed_forward_chunks=1",
)
SETTINGS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "weights in fp8": ("memory.weights=fp8",),
    "weights in int8": ("memory.weights=int8",),
    "weights in nf4": ("memory.weights=nf4",),
    "attention computed again": ("memory.keep_attention=no",),
    "without gradient checkpointing": ("memory={gradient_checkpointing: false, attention: flash}",),
}


def settings_of(runs: SmallRuns) -> dict[str, tuple[str, ...]]:
    """`SETTINGS`, and the other attention backends that the device may have."""
    found = dict(SETTINGS)
    for name in fused_attention(runs.device):
        if name != "flash" and is_installed(name):
            found[f"{name} attention"] = (f"memory.attention={name}",)
    found["compiled"] = ("memory.compile=true",)  # last, since the compiler's processes remain
    return found


def is_installed(name: str) -> bool:
    """Whether the attention backend `name` is PyTorch's, or of a package that is here."""
    try:
        attention_backend(name)
    except ConfigError:
        return False
    return True


def measured(runs: SmallRuns, name: str, settings: tuple[str, ...], steps: int) -> list[Value]:
    """Duration and peak with `settings`, or why there are none."""
    release(runs.device)
    before = device_memory(runs.device)[0] or 0
    common = [setting.format(all=runs.layers) for setting in COMMON]
    case = {"settings": name}
    try:
        config = runs.config("memory.attention=flash", *common, *settings)
        step = step_of(build(config))
        times: list[float] = []
        peak = peak_of(
            lambda: times.extend(in_turns({name: step}, steps, runs.device)[name]), runs.device
        )
    except OnewanError as error:
        reason = str(error).splitlines()[-1].strip()
        return [Value(case=case, measure="duration of a step", unit="s", reason=reason)]
    values = [Value(case=case, measure="duration of a step", unit="s", repeats=tuple(times))]
    if peak is not None:
        values.append(
            Value(
                case=case,
                measure="device peak",
                unit="GB",
                repeats=((peak - before) / 1e9,),
                expected=runs.plan(config).training.device_bytes / 1e9,
            )
        )
    return values


def relative(values: Sequence[Value]) -> list[Value]:
    """With durations relative to the plain one."""
    durations = {
        value.case["settings"]: median(value.repeats)
        for value in values
        if value.measure == "duration of a step" and value.repeats
    }
    plain = durations.get(PLAIN)
    return [
        Value(
            case=value.case,
            measure=value.measure,
            unit=value.unit,
            repeats=value.repeats,
            baseline=PLAIN,
            ratio=value.median / plain,
        )
        if value.measure == "duration of a step" and value.repeats and plain
        else value
        for value in values
    ]


def figure_of(values: Sequence[Value], runs: SmallRuns, what: str) -> Figure:
    figure = measured_here(
        name="gpu_settings",
        title="A step with other memory settings",
        measured=(
            f"Steps as the trainer executes them: {what}, all blocks on the device, with gradient "
            "checkpointing and kept attention unless the row says otherwise."
        ),
        values=relative(values),
        charts=[Chart(measure="duration of a step")],
        arithmetic="plan",
        device=str(runs.device),
    )
    return on_its_device(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (5)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings, by their names")
    add_scale_options(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    values: list[Value] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = write_runs(options, Path(folder))
        what = scale_in_words(runs, options)
        for name, settings in settings_of(runs).items():
            if options.only and name not in options.only:
                continue
            new = measured(runs, name, settings, options.steps)
            values += new
            for value in new:
                shown = value.reason or f"{value.median:.4g} {value.unit}"
                print(f"{name}: {value.measure} {shown}", flush=True)
            save(figure_of(values, runs, what), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
