"""What the processes of a run send each other in a step, by arithmetic: calls of torch.distributed
and bytes, from the plan of the run."""

from __future__ import annotations

import pickle
from typing import NamedTuple

from onewan.arithmetic.collectives import (
    SUM_BYTES,
    bytes_of_gathering,
    bytes_of_shards,
    bytes_of_sum,
    bytes_of_telling,
    steps_of_telling,
    sums_of,
)
from onewan.config.method import FineTuneMethod
from onewan.config.schema import ResolvedRun
from onewan.memory.plan import Plan, read_stored_model
from onewan.memory.plan.sharded import exchanged, expert_weights
from onewan.parallel.division import Division
from onewan.runs.events import StepDone
from onewan.train.cadence import Cadence


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


def meetings(config: ResolvedRun, division: Division, own_steps: int, clips: int) -> Sent:
    """What a process sends in a step when all meet, after `own_steps` steps of it: what becomes of
    the run. `clips` are its own, of a step."""
    count = sum(len(group.ranks) for group in division.groups)
    if count == 1:
        return Sent(0, 0, 0)
    done = StepDone(
        step=1000, expert="high", loss=0.1, grad_norm=0.1, lr=1e-4, t=(0.5,) * clips, seconds=1.0,
        memory_allocated=2**36, step_memory_peak=2**36, bytes_to_device=2**36, bytes_to_host=2**36,
        tokens_per_second=1e3, tflops=1e3, mfu=0.5,
    )  # fmt: skip
    due = Cadence.of(config).at(1)
    # What became of the steps, and whether a process was told to stop.
    found = gathered(([done] * own_steps, False), count)
    # Changed settings, what is due, whether to stop, and whether a sample video is ordered.
    meeting = found + told((None, due, False, False), count)
    return meeting.times(1 / own_steps)


def agreements(plan: Plan, division: Division, passes: int) -> Sent:
    """What processes with shards send in a step to agree on each of its passes, and that there is
    none any more, and for the norm of the gradients (`onewan.memory.sharded_blocks`)."""
    if not division.is_sharded:
        return Sent(0, 0, 0)
    members = len(division.groups[0].ranks)
    flags = summed(2 * (plan.layers + 1), members).times(passes + 1)
    return flags + summed(plan.sharing.shards, members)


def sums(config: ResolvedRun, plan: Plan, division: Division) -> Sent:
    """Of gradients that each process has as a whole, with a number for each parameter that says
    whether it has one."""
    if plan.processes is None:
        return Sent(0, 0, 0)
    stored = next(iter(read_stored_model(config).experts.values()))
    parameters = 2 * stored.shape.layers * len(stored.shape.block_linears())  # of a LoRA
    if isinstance(config.method, FineTuneMethod):
        weights = expert_weights(config, stored, fine_tunes=True)
        parameters = sum(weight.block is None or not division.is_sharded for weight in weights)
    numbers = plan.processes.gradient_bytes // SUM_BYTES
    return summed(numbers + parameters, len(division.groups[0].ranks)) if numbers else Sent(0, 0, 0)


def of_blocks(plan: Plan, division: Division, passes: int, *, trained: bool) -> Sent:
    """Of the weights of blocks that are sharded, and of tokens that are shared, in so many forward
    and backward passes. Times of these are the plan's."""
    found, calls = plan.processes, 0
    if found is None:
        return Sent(0, 0, 0)
    if division.is_sharded:
        # A block is gathered for each of its two passes, but the last one, which stays.
        calls += 2 * plan.layers - 1 + trained * plan.layers
        if len(division.groups[0].ranks) > plan.sharing.shards:
            calls += trained * plan.layers
    if division.sequence > 1:
        calls += plan.layers * (12 + (plan.worst.settings.keep_attention == "no")) + 1
    return Sent(passes * calls, found.weight_bytes + found.token_bytes, 0)


def sums_of_gloo(config: ResolvedRun, plan: Plan) -> Sent:
    """What gloo sends besides: to reduce and scatter gradients it sums them in all processes, and
    each then takes its part. NCCL sends each process its part only."""
    if not plan.sharing.is_sharded:
        return Sent(0, 0, 0)
    stored, shards = next(iter(read_stored_model(config).experts.values())), plan.sharing.shards
    numbers = plan.layers * exchanged(config, stored, plan.sharing).reduced
    return Sent(0, bytes_of_shards(SUM_BYTES * numbers, shards), 0)
