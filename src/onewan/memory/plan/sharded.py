"""Bytes of a process that has a shard of its expert's blocks (FSDP2, HSDP).

Sharded are the weights and biases of the linear layers of blocks (`onewan.memory.sharded_blocks`).
As torch's `fully_shard` divides them, each is cut along its first dimension into chunks of
ceil(rows / processes) rows; the last processes may have fewer rows, or none. Buffers for whole
blocks come beside the shards: one for the block that computes, one for the block whose weights are
gathered ahead of their use. Everything else, adapters too, is whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from onewan.config.method import FineTuneMethod
from onewan.config.schema import ResolvedRun
from onewan.memory.plan.sharing import Sharing
from onewan.memory.plan.storage import Shape, StateBytes, state_bytes
from onewan.memory.plan.stored import COMPUTED_TYPES, StoredTransformer
from onewan.memory.plan.trained import TrainedWeights, fine_tuned_names

WHOLE_BLOCKS = 2
"""Blocks whose weights are whole at the same time: one that computes, and the next one."""
_REDUCED = 4
"""Bytes of a number of a gradient that is reduce-scattered: float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter, as it is trained or computed with."""

    block: int | None
    """Index of the block that it is sharded with; None for one that each process has whole."""
    rows: int
    """Size of its first dimension, along which it is sharded."""
    row: int
    """Numbers in each row."""
    size: float
    """Bytes of a number in the model."""
    trained_size: int
    """Bytes of a number while it is trained, and of its gradient; 0 if it is frozen."""
    residual: int
    """Bytes of a number of its residual, with Kahan's summation."""

    def rows_of(self, sharing: Sharing, rank: int) -> int:
        """How many rows the process `rank` of those that share the weights has."""
        if self.block is None:
            return self.rows
        chunk = -(-self.rows // sharing.shards)
        return min(chunk, max(0, self.rows - rank * chunk))

    @property
    def numbers(self) -> int:
        return self.rows * self.row

    def padded(self, sharing: Sharing) -> int:
        """How many numbers the processes send, as many rows each as the first one has."""
        return sharing.shards * self.rows_of(sharing, 0) * self.row

    @property
    def computed_size(self) -> float:
        """Bytes of a number in the forward pass."""
        return self.trained_size or self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """What one process has of one expert, in bytes."""

    shards: int
    """Of blocks' weights, in the form in which they compute."""
    replicated: int
    """Weights that are whole: those outside of the blocks, norms and modulation."""
    adapters: int
    """Weights of adapters, which are whole too."""
    residuals: int
    """Of Kahan's summation."""
    gradients: int
    """Of what is trained: of its shards, and whole ones of the rest."""
    state: StateBytes
    """Of the optimizer."""
    averages: int
    whole_weights: int
    """At the peak: of the block that computes, and of those that are gathered ahead of it, with
    the padding of the last shards."""
    block_gradients: int
    """Whole ones of the block that is differentiated, in the type of its weights; 0 if blocks are
    frozen."""
    reduced_gradients: int
    """Whole ones in float32 of the block before, which are being reduce-scattered, with the
    sums of the process's rows."""

    @property
    def parameters(self) -> int:
        """Its weights between two steps."""
        return self.shards + self.replicated + self.adapters + self.residuals


def rank_bytes(
    config: ResolvedRun,
    stored: StoredTransformer,
    trained: TrainedWeights | None,
    sharing: Sharing,
    rank: int = 0,
) -> RankBytes:
    """What the process `rank` of the `sharing.shards` has of an expert; the first one has most.

    `trained` is what is trained of the expert as `trained_weights` counts it, whole; None if it is
    only sampled with.
    """
    fine_tunes = trained is not None and isinstance(config.method, FineTuneMethod)
    weights = list(expert_weights(config, stored, fine_tunes=fine_tunes))
    numbers = [(weight, weight.rows_of(sharing, rank) * weight.row) for weight in weights]
    whole_weights, gradients_of, reduced = ([0.0] * stored.shape.layers for _ in range(3))
    ahead = min(WHOLE_BLOCKS, stored.shape.layers) - 1
    for weight in weights:
        if weight.block is not None:
            gathered = ahead * weight.padded(sharing)
            whole_weights[weight.block] += (weight.numbers + gathered) * weight.computed_size
            if weight.trained_size:
                gradients_of[weight.block] += weight.numbers * weight.trained_size
                sums = weight.padded(sharing) * (1 + 1 / sharing.shards)
                reduced[weight.block] += _REDUCED * sums
    own = [(weight, count) for weight, count in numbers if weight.trained_size and count]
    shapes: list[Shape] = [
        (weight.rows_of(sharing, rank), weight.row) if weight.row > 1 else (count,)
        for weight, count in own
    ]
    gradients, state, averages = 0, StateBytes(device=0), 0
    if fine_tunes:
        gradients = sum(weight.trained_size * count for weight, count in own)
        state = state_bytes(config.optimizer, shapes)
        averages = 0 if config.train.ema is None else 4 * sum(map(prod, shapes))
    elif trained is not None:
        gradients, state, averages = trained.gradients, trained.state, trained.averages
    return RankBytes(
        shards=round(sum(n * w.computed_size for w, n in numbers if w.block is not None)),
        replicated=round(sum(n * w.computed_size for w, n in numbers if w.block is None)),
        adapters=0 if fine_tunes or trained is None else trained.weights,
        residuals=sum(weight.residual * count for weight, count in own),
        gradients=gradients,
        state=state,
        averages=averages,
        whole_weights=round(max(whole_weights)),
        block_gradients=round(max(gradients_of)),
        reduced_gradients=round(max(reduced)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """What processes that share an expert's weights send each other, as the sizes of the whole."""

    gathered: int
    """Bytes of one block's weights (of the largest), with the padding of the last shards."""
    reduced: int
    """Numbers of the gradients of one block that are reduce-scattered, likewise; 0 if the blocks
    are frozen."""
    summed: int
    """Numbers of fine-tuned weights that are not sharded, whose gradients are summed whole."""


def exchanged(config: ResolvedRun, stored: StoredTransformer, sharing: Sharing) -> Exchanged:
    """What the processes exchange of an expert that is trained."""
    gathered, reduced = ([0.0] * stored.shape.layers for _ in range(2))
    summed = 0
    fine_tunes = isinstance(config.method, FineTuneMethod)
    for weight in expert_weights(config, stored, fine_tunes=fine_tunes):
        if weight.block is None:
            summed += weight.numbers if weight.trained_size else 0
            continue
        gathered[weight.block] += weight.padded(sharing) * weight.computed_size
        reduced[weight.block] += weight.padded(sharing) if weight.trained_size else 0
    return Exchanged(gathered=round(max(gathered)), reduced=round(max(reduced)), summed=summed)


def expert_weights(
    config: ResolvedRun, stored: StoredTransformer, *, fine_tunes: bool
) -> Iterator[Weight]:
    """All parameters of an expert but those of adapters, with their sizes in memory."""
    method, shape = config.method, stored.shape
    plain = COMPUTED_TYPES[config.model.dtype]
    trained, precision = set[str](), "stochastic"
    if fine_tunes and isinstance(method, FineTuneMethod):
        trained.update(fine_tuned_names(config, method, shape))
        precision = method.weights
    matrix_size = _matrix_size(stored, plain)
    linears = shape.linears()
    for name, sizes in shape.named_weights():
        is_sharded = name.startswith("blocks.") and name.rpartition(".")[0] in linears
        size = 4 if _is_float32(name) else plain
        yield Weight(
            block=int(name.split(".")[1]) if is_sharded else None,
            rows=sizes[0],
            row=prod(sizes[1:]),
            size=matrix_size if is_sharded and len(sizes) == 2 else size,
            trained_size=(4 if precision == "float32" else size) if name in trained else 0,
            residual=2 if precision == "kahan" and name in trained and size == 2 else 0,
        )


def _matrix_size(stored: StoredTransformer, plain: int) -> float:
    """Bytes of a number of the matrices of blocks, which may be packed."""
    if not stored.expands:
        return plain
    shape = stored.shape
    biases = {f"{name}.bias": out for name, (out, _) in shape.block_linears().items()}
    vectors = {**biases, **shape.block_vectors()}
    others = sum(size * (4 if _is_float32(name) else plain) for name, size in vectors.items())
    return (stored.block_bytes - others) / shape.block_matrix_weights


def _is_float32(name: str) -> bool:
    """Whether a weight is loaded in float32 in any case: norms in front of layers, modulation, the
    time embedding (`_keep_in_fp32_modules` of diffusers' transformer)."""
    return not {"norm2", "scale_shift_table", "time_embedder"}.isdisjoint(name.split("."))
