"""`division_of`: how the run of a run file is divided among processes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from onewan.config.method import FineTuneMethod
from onewan.config.optimizer import (
    AdamWOffloadOptimizer,
    AdamWOptimizer,
    AdamWScheduleFreeOptimizer,
    LionOptimizer,
    SgdOptimizer,
)
from onewan.config.resolve import trained_experts
from onewan.config.schema import RunConfig
from onewan.errors import ConfigError
from onewan.parallel.division import Division, divide
from onewan.variants import ExpertName

_BY_ELEMENT = (AdamWOptimizer, AdamWScheduleFreeOptimizer, LionOptimizer, SgdOptimizer)
"""Optimizers that compute each element of a weight by itself, so that a shard is enough."""


def division_of(config: RunConfig, ranks: int) -> Division:
    """What each of `ranks` processes does in the run `config`.

    ConfigError, with all problems, if the run file asks for what so many processes can't do.
    """
    experts: list[ExpertName] = [expert.name for expert in trained_experts(config)]
    is_fine_tuned = isinstance(config.method, FineTuneMethod)
    weights = config.parallel.weights
    if weights == "auto":
        weights = "sharded" if is_fine_tuned else "replicated"
    divided = partial(
        divide,
        experts,
        ranks,
        shared=any(embedding.train for embedding in config.embeddings),
        weights=weights,
    )
    try:
        division = divided(config.parallel.experts)
    except ValueError as error:
        problem = f"parallel.experts: can't be side_by_side: {error}; choose auto"
        raise ConfigError("run file", [problem]) from error
    each, heads = len(division.groups[0].ranks), config.model.facts().num_attention_heads
    clips = config.train.batch_size * config.train.accumulation
    problems = list[str]()
    sequence = config.parallel.sequence_parallel
    if sequence == "auto":
        sequence = _sequence(each, clips, heads)
    elif sequence > 1 and (each % sequence or heads % sequence):
        possible = ", ".join(str(n) for n in range(1, each + 1) if each % n == heads % n == 0)
        problems.append(
            f"parallel.sequence_parallel: {sequence} has to divide the {each} processes that train "
            f"an expert, and the model's {heads} attention heads; choose one of {possible}, or auto"
        )
        sequence = 1
    division = divided(config.parallel.experts, sequence=sequence)
    parts = division.parts
    if parts > clips:
        have = "1 clip" if clips == 1 else f"{clips} clips"
        problems.append(
            f"train.accumulation: a step has {have} (train.batch_size times train.accumulation), "
            f"which {parts} processes can't share; give a step at least {parts} clips, or start "
            "fewer processes"
        )
    if each > 1:
        problems += _refused(config, division)
    if problems:
        raise ConfigError("run file", problems)
    return division


def _sequence(ranks: int, clips: int, heads: int) -> int:
    """The smallest number of processes that share the tokens of a clip with which `ranks` have
    enough clips; 1 if there is none."""
    possible = (n for n in range(1, ranks + 1) if ranks % n == heads % n == 0)
    return next((n for n in possible if ranks // n <= clips), 1)


def _refused(config: RunConfig, division: Division) -> Iterator[str]:
    """What processes that train the same expert can't do."""
    each = len(division.groups[0].ranks)
    if isinstance(config.method, FineTuneMethod) and config.method.fused_step:
        yield (
            "method.fused_step: updates weights in the backward pass, before the gradients of "
            f"{each} processes are summed; set it to false, or start one process per expert"
        )
    if isinstance(config.optimizer, AdamWOffloadOptimizer):
        yield (
            f"optimizer.name: {config.optimizer.name!r} copies gradients to host memory in the "
            f"backward pass, before those of {each} processes are summed; choose adamw or "
            "adamw_8bit, or start one process per expert"
        )
    if not division.is_sharded:
        return
    if isinstance(config.method, FineTuneMethod) and type(config.optimizer) not in _BY_ELEMENT:
        names = ", ".join(sorted(str(c.model_fields["name"].default) for c in _BY_ELEMENT))
        yield (
            f"optimizer.name: {config.optimizer.name!r} computes with whole weights, and each "
            f"process has a shard of them; choose one of {names}, or parallel.weights=replicated"
        )
    if config.memory.weights not in {"as_stored", "bf16"}:
        yield (
            f"memory.weights: {config.memory.weights} packs weights, which can't be sharded; set "
            "it to as_stored, or parallel.weights to replicated"
        )
    if not config.memory.gradient_checkpointing:
        yield (
            "memory.gradient_checkpointing: has to be true where weights are sharded, since those "
            "of a block are there only while it computes"
        )
