"""What 1 to 1,024 GPUs give a run, simulated, and the bytes that real processes send, counted.

No such machines were there. Memory and the duration of a step are those of `onewan plan --gpus N`,
for adapters on the true models; what processes send each other is arithmetic, with the rates of
the connections as parameters. Gradients are summed after the backward pass, during which nothing
else is computed: all of that time is in a step. Efficiency is the rate of clips of N GPUs relative
to N times that of one, which has as many clips in a step as each of them.

What processes send is then counted in runs of 2 and 4 real processes on a tiny model: calls of
torch.distributed, and the bytes that the kernel has sent over their connections (Linux only).

    python benchmarks/scaling.py [--clips 1] [--nvlink 300] [--infiniband 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import pickle
import socket
import statistics
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from figures import ROOT, Chart, Figure, Value, add_output_options, measured_here, save
from measuring import Size
from small_runs import add_scale_options, scale_in_words, write_runs
from torch.distributed import distributed_c10d

sys.path.append(str(ROOT / "tests"))

from support.torchrun import together, train

from onewan.arithmetic.collectives import (
    SUM_BYTES,
    Network,
    bytes_of_gathering,
    bytes_of_sum,
    bytes_of_telling,
    steps_of_telling,
    sums_of,
)
from onewan.cli.plan import plan_of
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.memory.plan import Plan, read_stored_model
from onewan.parallel.division import Division
from onewan.parallel.run_division import division_of
from onewan.runs.events import StepDone
from onewan.train import steps as steps_module
from onewan.train.cadence import Cadence

GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
MACHINE = 8
"""GPUs of a machine."""
STEPS_IN_A_ROW = 10
"""Of an expert, after which the processes of two experts meet."""
GOAL = 95.0
"""Efficiency in percent, of a LoRA on T2V-A14B on eight GPUs with NVLink."""
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


SETUPS = (
    Setup(name="T2V-A14B, H100", goal=GOAL),
    Setup(
        name="T2V-A14B, H100, experts together",
        overrides=("parallel.experts=together",),
        goal=GOAL,
    ),
    Setup(name="TI2V-5B, H100", variant="ti2v-5b", size=(121, 704, 1280)),
    Setup(
        name="T2V-A14B, RTX 4090, streamed",
        vram=24 * 10**9,
        ram=96 * 10**9,
        networks=(PCIE, ETHERNET),
        overrides=("memory.weights=fp8",),
    ),
)


# ------------------------------------------------------------------------------- small messages


class Sent(NamedTuple):
    """What a process sends, on average over those of the run."""

    calls: float
    """Of torch.distributed."""
    size: float
    """Bytes."""
    in_turn: float
    """Messages one after another, until all have what they wait for."""

    def __add__(self, other: Sent) -> Sent:  # type: ignore[override]  # not as tuples
        return Sent(*(one + more for one, more in zip(self, other, strict=True)))

    def times(self, factor: float) -> Sent:
        return Sent(*(factor * part for part in self))


def summed(numbers: int, ranks: int) -> Sent:
    if ranks == 1:
        return Sent(0, 0, 0)
    calls = sums_of(numbers)
    return Sent(calls, bytes_of_sum(SUM_BYTES * numbers, ranks), calls * 2 * (ranks - 1))


def gathered(value: object, ranks: int) -> Sent:
    """`Connection.gathered`: the sizes of the objects first, each an int64."""
    return Sent(2, bytes_of_gathering(8 + _size(value), ranks), 2 * (ranks - 1))


def told(value: object, ranks: int) -> Sent:
    """`Connection.from_first`, likewise."""
    return Sent(2, bytes_of_telling(8 + _size(value), ranks), 2 * steps_of_telling(ranks))


def _size(value: object) -> int:
    return len(pickle.dumps(value))


def small_messages(config: ResolvedRun, division: Division, own_steps: int, clips: int) -> Sent:
    """What a process sends in a step besides gradients: which parameters have one, and at every
    meeting, after `own_steps` steps, what becomes of the run. `clips` are its own, of a step."""
    count = sum(len(group.ranks) for group in division.groups)
    if count == 1:
        return Sent(0, 0, 0)
    shape = next(iter(read_stored_model(config).experts.values())).shape
    matrices = 2 * shape.layers * len(shape.block_linears())
    done = StepDone(
        step=1000, expert="high", loss=0.1, grad_norm=0.1, lr=1e-4, t=(0.5,) * clips, seconds=1.0,
        memory_allocated=2**36, step_memory_peak=2**36, bytes_to_device=2**36, bytes_to_host=2**36,
        tokens_per_second=1e3, tflops=1e3, mfu=0.5,
    )  # fmt: skip
    due = Cadence.of(config).at(1)
    meeting = (
        gathered([done] * own_steps, count)  # what became of the steps
        + told((False, config), count)  # whether a setting has changed
        + told((due, False), count)  # what is due
        + gathered(False, count)  # whether to stop
    )
    return summed(matrices, division.parts) + meeting.times(1 / own_steps)


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

    networks = {name: networks_of(options)[name] for name in setup.networks}
    alone = plan_of(config(options.clips), setup.vram, setup.ram)
    assert alone.fits
    for gpus in sorted(options.gpus):
        each = config(options.clips * division_of(config(gpus), gpus).parts)
        memory = setup.vram, gpus * setup.ram
        plans = {
            name: plan_of(each, *memory, gpus, network) if gpus > 1 else alone
            for name, network in networks.items()
        }
        yield from _row(setup, each, plans, alone.run_time.step, options)


def _row(
    setup: Setup,
    config: ResolvedRun,
    plans: Mapping[str, Plan],
    alone: float,
    options: argparse.Namespace,
) -> Iterator[Value]:
    """By the `plans` of one of several processes with each network. `alone` are the seconds of a
    step of one GPU."""
    first = plans[setup.networks[0]]
    gpus = 1 if first.processes is None else first.processes.count
    division = division_of(config, gpus)
    gradients = 0 if first.processes is None else first.processes.gradient_bytes // SUM_BYTES
    own_steps = STEPS_IN_A_ROW if division.side_by_side else 1
    small = small_messages(config, division, own_steps, options.clips)
    sent = summed(gradients, division.parts) + small
    case = {"simulated": setup.name, "GPUs": gpus, "division": _division(division)}

    def value(measure: str, number: float, unit: str = "", **more: Any) -> Value:
        return Value(case=case, measure=measure, unit=unit, repeats=(number,), **more)

    yield value("device memory of each", first.peak.device_bytes / 1e9, "GB")
    yield value("host memory of each", first.host_peak.host_bytes / 1e9, "GB")
    yield value("sent by each in a step", sent.size / 1e6, "MB")
    yield value("collectives in a step", sent.calls)
    waits = 1e-6 * options.host_delay * small.in_turn + small.size / (1e9 * options.host_rate)
    for name, plan in plans.items():
        step = alone
        if plan.processes is not None:
            assert plan.fits and not plan.processes.unpaired_steps
            step = plan.processes.step + waits
        if plan is first:
            yield value("a step", step, "s")
        goal = setup.goal if gpus == MACHINE and name == NVLINK else None
        percent = 100 * alone / step
        yield value(_efficiency(name), percent, "%", limit=goal, at_least=goal is not None)


def _efficiency(network: str) -> str:
    return f"efficiency, {network}"


def _division(division: Division) -> str:
    if not division.side_by_side:
        return "one" if division.parts == 1 else f"{division.parts} parts"
    return "2 experts" + ("" if division.parts == 1 else f" x {division.parts} parts")


# ---------------------------------------------------------------------------------------- counting


class Counted(NamedTuple):
    """What one process has sent in a step, on average over some."""

    calls: float
    size: float


COUNTED: tuple[tuple[int, str], ...] = ((2, "together"), (4, "together"), (4, "side_by_side"))
"""Processes, and `parallel.experts`."""
COUNTED_STEPS = 4
"""Of each process; two come before them."""


def counted(run_file: Path, overrides: Sequence[str]) -> Counted:
    """Train a run as one of several processes; what this one has sent in the middle of it."""
    calls = Counter[str]()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return call(*given, **named)

        return count

    for name in ("all_reduce", "all_gather", "broadcast"):
        wrapped = counting(name, getattr(dist, name))
        # Objects are gathered and told by functions that call those of their own module.
        for module in (dist, distributed_c10d):
            setattr(module, name, wrapped)
    before_steps: list[tuple[int, int]] = []
    train_step = steps_module.train_step

    def step(*given: Any) -> Any:
        before_steps.append((calls.total(), bytes_sent()))
        return train_step(*given)

    steps_module.train_step = step
    train(run_file, overrides)
    first, last = before_steps[1], before_steps[1 + COUNTED_STEPS]
    return Counted(*((end - begin) / COUNTED_STEPS for begin, end in zip(first, last, strict=True)))


_TCP_INFO_BYTES_SENT = 200
"""Where the kernel's `tcp_info` has the bytes that a connection has sent, without headers."""


def bytes_sent() -> int:
    """Over all connections of this process but those to the store, by which processes meet and give
    signs of life."""
    store = int(os.environ["MASTER_PORT"])
    return sum(size for port, size in _connections() if port != store)


def _connections() -> Iterator[tuple[int, int]]:
    """(the other end's port, bytes sent) of each."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, no socket, not connected
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    port = found.getpeername()[1]
                    told = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    yield port, struct.unpack_from("<Q", told, _TCP_INFO_BYTES_SENT)[0]


def compared(options: argparse.Namespace, folder: Path) -> tuple[list[Value], str]:
    """What real processes send, beside the arithmetic, and what they train."""
    values: list[Value] = []
    runs = write_runs(options, folder)
    for processes, experts in COUNTED:
        side_by_side = experts == "side_by_side"
        parts = processes // 2 if side_by_side else processes
        own = COUNTED_STEPS + 3
        overrides = [
            f"train.accumulation={parts}",
            f"parallel.experts={experts}",
            f"train.steps={2 * own if side_by_side else own}",
            "train.save_every=1000",
            f"output.dir={(folder / f'{processes}_{experts}').as_posix()}",
            "logging.tensorboard=false",
        ]
        config = runs.config(*overrides, both_experts=True)
        division = division_of(config, processes)
        found = plan_of(config, gpus=processes).processes
        assert found is not None
        expected = summed(found.gradient_bytes // SUM_BYTES, parts)
        expected += small_messages(config, division, 1, 1)
        by_rank = together(processes, counted, runs.folder / "run.yaml", overrides)
        case = {"processes": processes, "counted": _division(division)}
        calls, sizes = zip(*by_rank, strict=True)
        values += [
            Value(
                case=case,
                measure="collectives in a step",
                repeats=calls,
                expected=expected.calls,
            ),
            Value(
                case=case,
                measure="sent by each in a step",
                unit="kB",
                repeats=tuple(size / 1e3 for size in sizes),
                expected=expected.size / 1e3,
            ),
            Value(
                case=case,
                measure="difference",
                repeats=(abs(statistics.mean(sizes) / expected.size - 1),),
                limit=TOLERANCE,
            ),
        ]
    return values, scale_in_words(runs, options)


# ----------------------------------------------------------------------------------------- program


def figure_of(values: Sequence[Value], what: str, options: argparse.Namespace) -> Figure:
    clips = "1 clip" if options.clips == 1 else f"{options.clips} clips"
    return measured_here(
        name="scaling",
        title="1 to 1,024 GPUs, simulated",
        measured=(
            "Simulated, not measured: memory and steps by the plan, for a LoRA of rank 32 at "
            f"81x480x832 (TI2V-5B: 121x704x1280) with {clips} of a step on each GPU, and {MACHINE} "
            f"GPUs in a machine; NVLink {options.nvlink:g}, PCIe {options.pcie:g}, InfiniBand "
            f"{options.infiniband:g}, Ethernet {options.ethernet:g} GB/s, and {options.delay:g} µs "
            f"for each message of a ring; small messages through the host at {options.host_rate:g} "
            f"GB/s with {options.host_delay:g} µs each. Gradients are summed after the backward "
            "pass, not during it. Efficiency is relative to one GPU with as many clips; the "
            "duration of a step is that with the first connections. The last table is counted: "
            f"real processes that train {what}."
        ),
        values=values,
        charts=[
            Chart(
                measure=_efficiency(NVLINK),
                title=f"Efficiency, simulated: {setup.name}; {NVLINK}",
                only={"simulated": setup.name},
            )
            for setup in (SETUPS[0], SETUPS[2])
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
