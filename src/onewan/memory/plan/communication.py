"""`Communication`: what a process sends for sharded weights and shared tokens, in a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onewan.arithmetic.collectives import (
    SUM_BYTES,
    BlockSeconds,
    Network,
    bytes_of_exchange,
    bytes_of_gathering,
    bytes_of_shards,
    bytes_of_sum,
)
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.choose import training_work
from onewan.memory.plan.costs import RunCosts
from onewan.memory.plan.machine import Machine
from onewan.memory.plan.result import BucketPlan
from onewan.memory.plan.sharded import Exchanged, exchanged
from onewan.parallel.division import Group
from onewan.variants import PATCH_SIZE

_IN_FORWARD = 4
"""Tensors of tokens that are exchanged in a block's forward pass: queries, keys, values, output."""
_IN_BACKWARD = 8
"""In its backward pass: queries, keys and values again, the output and its gradient, and the three
gradients of the first ones."""
_OUTPUT_AGAIN = 1
"""Where attention outputs are not kept, the output too is exchanged again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """Of one process in one optimizer step."""

    weights: float = 0.0
    """Bytes sent: shards of weights, and gradients of blocks."""
    waiting: float = 0.0
    """Seconds in which it computes nothing because of these."""
    tokens: float = 0.0
    """Bytes sent of queries, keys, values and outputs, and of predictions."""
    exchanging: float = 0.0
    """Seconds of these, during which nothing else is computed."""

    def __add__(self, other: Communication) -> Communication:
        return Communication(
            weights=self.weights + other.weights,
            waiting=self.waiting + other.waiting,
            tokens=self.tokens + other.tokens,
            exchanging=self.exchanging + other.exchanging,
        )

    def times(self, factor: float) -> Communication:
        return Communication(
            weights=factor * self.weights,
            waiting=factor * self.waiting,
            tokens=factor * self.tokens,
            exchanging=factor * self.exchanging,
        )


def communication(
    costs: RunCosts,
    buckets: Sequence[BucketPlan],
    clips: Mapping[Bucket, int],
    machine: Machine,
    network: Network,
    group: Group,
) -> Communication:
    """That of a process of `group` in a step, on average over the `clips` of all `buckets`."""
    total, count = Communication(), sum(clips.values())
    sent = exchanged(costs.config, costs.transformer, costs.sharing)
    for bucket in buckets:
        found = _of_shards(costs, bucket, sent, machine, network, group)
        found += _of_tokens(costs, bucket, network, group)
        total += found.times(costs.config.train.accumulation * clips[bucket.bucket] / count)
    return total


def slowest(found: Iterable[Communication]) -> Communication:
    """Of several groups, that which takes longest."""
    return max(found, key=lambda each: each.waiting + each.exchanging)


def summed_numbers(costs: RunCosts) -> int:
    """How many numbers of gradients every process sums with all others of its group in a step."""
    embeddings = 0 if costs.embeddings is None else costs.embeddings.count
    if costs.sharing.is_sharded and costs.is_fine_tuning:
        return exchanged(costs.config, costs.transformer, costs.sharing).summed + embeddings
    experts = [trained.count for trained in costs.trained.values() if trained is not None]
    return max(experts, default=0) + embeddings


def _of_shards(
    costs: RunCosts,
    plan: BucketPlan,
    sent: Exchanged,
    machine: Machine,
    network: Network,
    group: Group,
) -> Communication:
    """Of the weights of blocks, in a forward and a backward pass over one batch."""
    shards, layers = costs.sharing.shards, costs.layers
    if not costs.sharing.is_sharded:
        return Communication()
    ranks, machines = group.ranks[:shards], len(group.ranks) // shards
    work = training_work(costs, plan.bucket, plan.settings)
    gradients = SUM_BYTES * sent.reduced
    block = BlockSeconds(
        forward=work.forward_flops / machine.flops / layers,
        backward=work.backward_flops / machine.flops / layers,
        gather=network.seconds_of_shards(sent.gathered, ranks),
        reduce=network.seconds_of_shards(gradients, ranks) if gradients else 0.0,
        between=network.seconds_of_sum_between(gradients / shards, machines, shards)
        if gradients
        else 0.0,
    )
    # The last block is gathered once for both passes.
    gathered = (2 * layers - 1) * bytes_of_shards(sent.gathered, shards)
    reduced = bytes_of_shards(gradients, shards) + bytes_of_sum(gradients / shards, machines)
    return Communication(weights=gathered + layers * reduced, waiting=block.waiting(layers))


def _of_tokens(costs: RunCosts, plan: BucketPlan, network: Network, group: Group) -> Communication:
    """Of what attention exchanges, in a forward and a backward pass over one batch."""
    sequence, layers = costs.sharing.sequence, costs.layers
    if sequence == 1:
        return Communication()
    ranks = group.sharing_clips(group.first)
    batch = costs.batch(plan.bucket, sequence=sequence)
    rows, shape = batch.tokens * batch.clips, batch.shape
    exchanges = _IN_FORWARD + _IN_BACKWARD
    if plan.settings.keep_attention == "no":
        exchanges += _OUTPUT_AGAIN
    own = rows * shape.width * batch.compute_bytes
    patches = 4 * rows * shape.out_channels * PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    sent = layers * exchanges * bytes_of_exchange(own, sequence)
    gathered = bytes_of_gathering(patches, sequence)
    return Communication(
        tokens=sent + gathered,
        exchanging=layers * exchanges * network.seconds_of_exchange(own, ranks)
        + network.seconds_of_shards(sequence * patches, ranks),
    )
