"""What 1 to 1,024 GPUs give a run, simulated, and the bytes that real processes send, counted.

No such machines were there. Memory and the duration of a step are those of `onewan plan --gpus N`
on the true models; what processes send each other is arithmetic, with the rates of the connections
as parameters. Where weights are sharded, those of a block are gathered, and its gradients are
summed, while other blocks compute: a block takes as long as the longer of the two. All other sums
and exchanges are counted as if nothing were computed at the same time.

Efficiency is the rate of clips of N GPUs relative to N times that of one, which has as many clips
in a step as each of them. Where the run does not fit on one GPU, that is a GPU which would have the
memory and the settings of the plan, and so waits for nobody. Where GPUs share one clip, it is the
rate of one GPU that trains the clip alone.

What processes send is then counted in runs of 2 and 4 real processes on a tiny model: calls of
torch.distributed, and the bytes that the kernel has sent over their connections (Linux only).

    python benchmarks/scaling.py [--clips 1] [--nvlink 300] [--infiniband 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import Chart, Figure, Value, add_output_options, measured_here, save
from measuring import Size
from messages import agreements, meetings, of_blocks, sums, sums_of_gloo
from sent_bytes import COUNTED_STEPS, counted
from small_runs import SmallRuns, add_scale_options, scale_in_words, write_runs
from support.torchrun import together

from onewan.arithmetic.collectives import Network
from onewan.cli.plan import plan_of
from onewan.config.load import load_run
from onewan.config.method import FineTuneMethod
from onewan.config.schema import ResolvedRun
from onewan.memory.plan import Plan
from onewan.parallel.division import Division
from onewan.parallel.run_division import division_of

GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
MACHINE = 8
"""GPUs of a machine."""
STEPS_IN_A_ROW = 10
"""Of an expert, after which the processes of two experts meet."""
GOAL = 95.0
"""Efficiency in percent, of a LoRA on T2V-A14B on eight GPUs with NVLink."""
FINE_TUNING_GOAL = 90.0
"""The same of full fine-tuning."""
TOLERANCE = 0.02
"""By which counted bytes may differ from the arithmetic."""

RUN_FILE = """
model: {{path: Owner/Model, variant: {variant}}}
wan_config: {{max_frames: {frames}}}
video_data: {{resolution: [{width}, {height}]}}
method: {{kind: lora, rank: 32}}
train: {{steps: 2000, save_every: 500, switch_expert_every: {in_a_row}}}
validation: {{clips: 0}}
"""


NVLINK, PCIE, ETHERNET = "NVLink, InfiniBand", "PCIe, InfiniBand", "PCIe, Ethernet"
"""Connections within a machine, and between machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is trained, and on which GPUs."""

    name: str
    variant: str = "t2v-a14b"
    size: Size = (81, 480, 832)
    """Of a clip."""
    vram: int = 80 * 10**9
    """Bytes of a GPU, from which its rates follow."""
    ram: int = 250 * 10**9
    """Bytes of host memory for each GPU."""
    networks: tuple[str, ...] = (NVLINK, PCIE, ETHERNET)
    overrides: tuple[str, ...] = ()
    goal: float | None = None
    """Efficiency in percent on a machine with NVLink."""
    is_alone: bool = True
    """Whether the run fits on one GPU. Where it does not, rows begin with the smallest number of
    GPUs that it fits on, and GPUs are compared with one that would have the memory."""
    one_clip: bool = False
    """Whether GPUs share the tokens of the one clip of a step, on one machine."""


FINE_TUNING = ("method={kind: fine_tune}", "parallel.experts=together")
ONE_CLIP = ("parallel.experts=together", "parallel.sequence_parallel=auto")
SETUPS = (
    Setup(name="T2V-A14B, H100", goal=GOAL),
    Setup(
        name="T2V-A14B, H100, experts together",
        overrides=("parallel.experts=together",),
        goal=GOAL,
    ),
    Setup(name="TI2V-5B, H100", variant="ti2v-5b", size=(121, 704, 1280)),
    Setup(
        name="T2V-A14B, H100, full fine-tuning, FSDP2",
        overrides=(*FINE_TUNING, "parallel.weights=sharded"),
        goal=FINE_TUNING_GOAL,
        is_alone=False,
    ),
    Setup(
        name="T2V-A14B, H100, full fine-tuning, HSDP",
        overrides=(*FINE_TUNING, "parallel.weights=sharded_per_machine"),
        goal=FINE_TUNING_GOAL,
        is_alone=False,
    ),
    Setup(name="T2V-A14B, H100, one clip, Ulysses", overrides=ONE_CLIP, one_clip=True),
    Setup(
        name="T2V-A14B, H100, one clip of 161x720x1280, Ulysses",
        size=(161, 720, 1280),
        overrides=ONE_CLIP,
        one_clip=True,
    ),
    Setup(
        name="T2V-A14B, RTX 4090, streamed",
        vram=24 * 10**9,
        ram=96 * 10**9,
        networks=(PCIE, ETHERNET),
        overrides=("memory.weights=fp8",),
    ),
)


# ------------------------------------------------------------------------------------ prediction


def networks_of(options: argparse.Namespace) -> Mapping[str, Network]:
    """By their names, from gigabytes and microseconds."""
    between = {NVLINK: options.infiniband, PCIE: options.infiniband, ETHERNET: options.ethernet}
    return {
        name: Network(
            within=1e9 * (options.nvlink if name == NVLINK else options.pcie),
            between=1e9 * rate,
            machine_size=MACHINE,
            delay=1e-6 * options.delay,
        )
        for name, rate in between.items()
    }


def predicted(setup: Setup, options: argparse.Namespace, folder: Path) -> Iterator[Value]:
    """The rows of `setup`, one for each number of GPUs."""
    file = folder / "run.yaml"
    frames, height, width = setup.size
    content = RUN_FILE.format(
        variant=setup.variant, frames=frames, height=height, width=width, in_a_row=STEPS_IN_A_ROW
    )
    file.write_text(content, encoding="utf-8")

    def config(clips: int) -> ResolvedRun:
        return load_run(file, [*setup.overrides, f"train.accumulation={clips}"])

    def clips(gpus: int) -> int:
        if setup.one_clip:
            return 1
        return options.clips * division_of(config(gpus), gpus).parts

    networks = {name: networks_of(options)[name] for name in setup.networks}
    alone = plan_of(config(clips(1)), setup.vram, setup.ram) if setup.is_alone else None
    assert alone is None or alone.fits
    for gpus in sorted(options.gpus):
        if setup.one_clip and gpus > MACHINE:
            continue
        each = config(clips(gpus))
        memory = setup.vram, gpus * setup.ram
        plans = {
            name: plan_of(each, *memory, gpus, network) if gpus > 1 or alone is None else alone
            for name, network in networks.items()
        }
        if alone is not None or next(iter(plans.values())).fits:
            yield from _row(setup, each, plans, alone, options)


def _row(
    setup: Setup,
    config: ResolvedRun,
    plans: Mapping[str, Plan],
    alone: Plan | None,
    options: argparse.Namespace,
) -> Iterator[Value]:
    """By the `plans` of one of several processes with each network. `alone` is that of one GPU."""
    first = plans[setup.networks[0]]
    gpus = 1 if first.processes is None else first.processes.count
    division = division_of(config, gpus)
    own_steps = STEPS_IN_A_ROW if division.side_by_side else 1
    passes = 1 if setup.one_clip else options.clips
    small = meetings(config, division, own_steps, passes) + agreements(first, division, passes)
    trained = isinstance(config.method, FineTuneMethod)
    sent = sums(config, first, division) + of_blocks(first, division, passes, trained=trained)
    sent += small
    case = {"simulated": setup.name, "GPUs": gpus, "division": _division(division)}

    def value(measure: str, number: float, unit: str = "", **more: Any) -> Value:
        return Value(case=case, measure=measure, unit=unit, repeats=(number,), **more)

    yield value("device memory of each", first.peak.device_bytes / 1e9, "GB")
    yield value("host memory of each", first.host_peak.host_bytes / 1e9, "GB")
    yield value("sent by each in a step", sent.size / 1e6, "MB")
    yield value("collectives in a step", sent.calls)
    waits = 1e-6 * options.host_delay * small.in_turn + small.size / (1e9 * options.host_rate)
    for name, plan in plans.items():
        step = without = plan.run_time.step if alone is None else alone.run_time.step
        if (found := plan.processes) is not None:
            assert plan.fits and not found.unpaired_steps
            step = found.step + waits
            if alone is None:
                without = found.step - found.summing - found.waiting - found.exchanging
        if plan is first:
            yield value("a step", step, "s")
        goal = setup.goal if gpus == MACHINE and name == NVLINK else None
        percent = 100 * without / step / (gpus if setup.one_clip else 1)
        yield value(_efficiency(name), percent, "%", limit=goal, at_least=goal is not None)


def _efficiency(network: str) -> str:
    return f"efficiency, {network}"


def _division(division: Division) -> str:
    parts = [f"{division.parts} parts"] if division.parts > 1 else []
    if division.side_by_side:
        parts = ["2 experts", *parts]
    if division.sequence > 1:
        parts.append(f"{division.sequence} of a clip")
    return " x ".join(parts) or "one"


# ---------------------------------------------------------------------------------------- counting


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A run of real processes."""

    processes: int
    experts: str = "together"
    """Of `parallel.experts`."""
    name: str = ""
    """What is added to the division, for the table."""
    width: int = 128
    """Channels of the tiny model; its heads have 128 each."""
    machine_size: int = 8
    """Processes that take themselves to be on one machine."""
    overrides: tuple[str, ...] = ()


SHARDED = ("method={kind: fine_tune}",)
SHARED = ("parallel.sequence_parallel=auto", "memory.keep_attention=no")
COUNTED = (
    Counted(processes=2),
    Counted(processes=4),
    Counted(processes=4, experts="side_by_side"),
    Counted(processes=2, name="sharded", overrides=SHARDED),
    Counted(processes=4, name="sharded", overrides=SHARDED),
    Counted(
        processes=4,
        name="sharded within 2",
        machine_size=2,
        overrides=(*SHARDED, "parallel.weights=sharded_per_machine"),
    ),
    Counted(processes=2, width=512, overrides=SHARED),
    Counted(processes=4, width=512, overrides=SHARED),
)


def compared(options: argparse.Namespace, folder: Path) -> tuple[list[Value], str]:
    """What real processes send, beside the arithmetic, and what they train."""
    values: list[Value] = []
    for number, case in enumerate(COUNTED):
        scale = argparse.Namespace(**{**vars(options), "width": max(case.width, options.width)})
        values += _compared(case, write_runs(scale, folder / str(number)))
    return values, scale_in_words(write_runs(options, folder / "words"), options)


def _compared(case: Counted, runs: SmallRuns) -> Iterator[Value]:
    side_by_side = case.experts == "side_by_side"
    parts = case.processes // 2 if side_by_side else case.processes
    own = COUNTED_STEPS + 3
    overrides = [
        f"train.accumulation={1 if SHARED[0] in case.overrides else parts}",
        f"parallel.experts={case.experts}",
        f"train.steps={2 * own if side_by_side else own}",
        "train.save_every=1000",
        f"output.dir={(runs.folder / 'runs').as_posix()}",
        "logging.tensorboard=false",
        *case.overrides,
    ]
    config = runs.config(*overrides, both_experts=True)
    division = division_of(config, case.processes)
    network = Network(within=1e9, between=1e9, machine_size=case.machine_size)
    plan = plan_of(config, gpus=case.processes, network=network)
    trained = isinstance(config.method, FineTuneMethod)
    expected = sums(config, plan, division) + meetings(config, division, 1, 1)
    expected += of_blocks(plan, division, 1, trained=trained) + agreements(plan, division, 1)
    expected += sums_of_gloo(config, plan)
    by_rank = together(
        case.processes, counted, runs.folder / "run.yaml", overrides, case.machine_size
    )
    calls, sizes = zip(*by_rank, strict=True)
    named = {
        "processes": case.processes,
        "counted": ", ".join([_division(division), *([case.name] if case.name else [])]),
    }
    yield Value(case=named, measure="collectives in a step", repeats=calls, expected=expected.calls)
    yield Value(
        case=named,
        measure="sent by each in a step",
        unit="kB",
        repeats=tuple(size / 1e3 for size in sizes),
        expected=expected.size / 1e3,
    )
    yield Value(
        case=named,
        measure="difference",
        repeats=(abs(statistics.mean(sizes) / expected.size - 1),),
        limit=TOLERANCE,
    )


# ----------------------------------------------------------------------------------------- program


def figure_of(values: Sequence[Value], what: str, options: argparse.Namespace) -> Figure:
    clips = "1 clip" if options.clips == 1 else f"{options.clips} clips"
    return measured_here(
        name="scaling",
        title="1 to 1,024 GPUs, simulated",
        measured=(
            "Simulated, not measured: memory and steps by the plan, for a LoRA of rank 32, or full "
            "fine-tuning with AdamW, of both experts, at 81x480x832 (TI2V-5B: 121x704x1280) with "
            f"{clips} of a step on each GPU, and {MACHINE} GPUs in a machine; NVLink "
            f"{options.nvlink:g}, PCIe {options.pcie:g}, InfiniBand {options.infiniband:g}, "
            f"Ethernet {options.ethernet:g} GB/s, and {options.delay:g} µs for each message of a "
            f"ring; small messages through the host at {options.host_rate:g} GB/s with "
            f"{options.host_delay:g} µs each. Weights that are sharded are gathered, and their "
            "gradients summed, while other blocks compute; other sums and exchanges are counted as "
            "if nothing were computed at that time. Efficiency is relative to one GPU with as many "
            "clips: for full fine-tuning to one that would have the memory, where GPUs share one "
            "clip to one that trains it alone. The duration of a step is that with the first "
            f"connections. The last table is counted: real processes that train {what}; sharded: "
            "full fine-tuning of it; of a clip: with 512 channels."
        ),
        values=values,
        charts=[
            Chart(
                measure=_efficiency(NVLINK),
                title=f"Efficiency, simulated: {setup.name}; {NVLINK}",
                only={"simulated": setup.name},
            )
            for setup in (SETUPS[0], SETUPS[2], SETUPS[3])
        ],
        arithmetic="by arithmetic",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=list(GPUS), help="numbers of GPUs")
    add("--clips", type=int, default=1, help="of a step on each GPU (1)")
    add("--nvlink", type=float, default=300.0, help="GB/s of a GPU within its machine (300)")
    add("--pcie", type=float, default=25.0, help="the same without NVLink (25)")
    add("--infiniband", type=float, default=50.0, help="GB/s of a machine to others (50)")
    add("--ethernet", type=float, default=1.25, help="the same without InfiniBand (1.25)")
    add("--delay", type=float, default=20.0, help="µs of each message of a ring (20)")
    add("--host-rate", type=float, default=1.25, help="GB/s of messages through the host (1.25)")
    add("--host-delay", type=float, default=100.0, help="µs of each of these (100)")
    add_scale_options(parser, width=128, layers=2, size=(5, 64, 64))
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("the kernel of Linux counts the bytes that processes send; run it there")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        values = [value for setup in SETUPS for value in predicted(setup, options, Path(folder))]
        real, what = compared(options, Path(folder) / "counted")
        figure = figure_of([*values, *real], what, options)
    print(figure.measured)
    for value in figure.values:
        case = ", ".join(f"{key} {part}" for key, part in value.case.items())
        expected = "" if value.expected is None else f" (by arithmetic {value.expected:.4g})"
        print(f"{case}: {value.measure} {value.median:.4g} {value.unit}{expected}")
    save(figure, options)
    return 1 if figure.missed() else 0


if __name__ == "__main__":
    sys.exit(main())
