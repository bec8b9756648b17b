"""What a run trains, as shapes of weights: an adapter of each kind, the experts, or embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from onewan.arithmetic.layer_names import (
    block_of,
    grouped_linears,
    grouped_weights,
    matching,
)
from onewan.config.method import (
    AdapterMethod,
    DoraMethod,
    EmbeddingMethod,
    FineTuneMethod,
    LohaMethod,
    LokrMethod,
    LoraMethod,
    OftMethod,
    RankedMethod,
)
from onewan.config.schema import ResolvedRun
from onewan.formats.container import open_tensors
from onewan.memory.plan.shapes import TransformerShape
from onewan.memory.plan.storage import Shape, StateBytes, state_bytes
from onewan.variants import Expert

_EMBEDDING_TOKENS = 8
"""Vectors of a placeholder whose number follows from the tokens of its `initial_text`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedWeights:
    """The trained weights of one expert, or of the embeddings, in bytes."""

    count: int
    """Number of weights."""
    weights: int
    """Bytes of what is added to the model for training: adapters, float32 copies, residuals of
    Kahan's summation. 0 for fine-tuning that stores its weights as the model does."""
    stored: int
    """Bytes of the trained weights themselves, as a checkpoint has them."""
    gradients: int
    """Bytes of all gradients; with a fused step of the largest one."""
    state: StateBytes
    averages: int
    """Bytes of the moving averages; 0 without `train.ema`."""

    @property
    def saved(self) -> int:
        """Bytes of this part of a checkpoint: weights, optimizer state, averages."""
        return self.stored + self.state.device + self.state.host + self.averages


def trained_weights(
    config: ResolvedRun, shape: TransformerShape, expert: Expert
) -> TrainedWeights | None:
    """What is trained of `expert`; None with the method "embedding"."""
    method = config.method
    if isinstance(method, EmbeddingMethod):
        return None
    if isinstance(method, FineTuneMethod):
        return _fine_tuned(config, method, shape)
    shapes = _adapter_shapes(config, method, shape, expert)
    frozen = 0
    if isinstance(method, LoraMethod) and method.init == "pissa":
        frozen = 4 * sum(map(prod, shapes))  # the initial matrices, which stay as they are
    return _weights(config, shapes, added=4 * sum(map(prod, shapes)) + frozen, gradient_bytes=4)


def trained_embeddings(config: ResolvedRun, text_width: int) -> TrainedWeights | None:
    """The vectors of placeholders; None if none is trained."""
    trained = [e for e in config.embeddings if e.train]
    if not trained:
        return None
    shapes = [(e.token_count or _EMBEDDING_TOKENS, text_width) for e in trained]
    return _weights(config, shapes, added=4 * sum(map(prod, shapes)), gradient_bytes=4)


def fine_tuned_names(
    config: ResolvedRun, method: FineTuneMethod, shape: TransformerShape
) -> list[str]:
    """Names of the weights that full fine-tuning trains."""
    names = _in_blocks(config, [name for name, _ in shape.named_weights()])
    return _chosen(names, method.modules, grouped_weights(names, set(shape.linears())))


def _fine_tuned(
    config: ResolvedRun, method: FineTuneMethod, shape: TransformerShape
) -> TrainedWeights:
    shapes_of = dict(shape.named_weights())
    shapes = [shapes_of[name] for name in fine_tuned_names(config, method, shape)]
    count = sum(map(prod, shapes))
    stored = 4 if config.model.dtype == "float32" else 2
    # float32 replaces the weight in `stored` bytes; Kahan's residual is kept beside it.
    trained = 4 if method.weights == "float32" else stored
    residual = 2 * count if method.weights == "kahan" else 0
    return _weights(
        config,
        shapes,
        added=(trained - stored) * count + residual,
        gradient_bytes=trained,
        fused=method.fused_step,
    )


def _weights(
    config: ResolvedRun,
    shapes: Sequence[Shape],
    *,
    added: int,
    gradient_bytes: int,
    fused: bool = False,
) -> TrainedWeights:
    count = sum(map(prod, shapes))
    largest = max(map(prod, shapes), default=0)
    return TrainedWeights(
        count=count,
        weights=added,
        stored=gradient_bytes * count,
        gradients=gradient_bytes * (largest if fused else count),
        state=state_bytes(config.optimizer, shapes),
        averages=0 if config.train.ema is None else 4 * count,
    )


# ---------------------------------------------------------------------------------------- adapters


def _adapter_shapes(
    config: ResolvedRun, method: AdapterMethod, shape: TransformerShape, expert: Expert
) -> list[Shape]:
    files = [f for f in method.init_from if _is_for(f, expert, len(method.init_from))]
    if files:
        return [tensor for file in files for tensor in _shapes_in(file)]
    linears = shape.linears()
    names = _in_blocks(config, list(linears))
    chosen = _chosen(names, method.modules, grouped_linears(names))
    if isinstance(method, OftMethod):
        size = method.block_size
        triangle = size * (size - 1) // 2
        return [(linears[name][1] // size, triangle) for name in chosen]
    ranks = _ranks(config, method, chosen, expert)
    return [part for name in chosen for part in _parts(method, linears[name], ranks[name])]


def _is_for(file: Path, expert: Expert, count: int) -> bool:
    """Whether an adapter file is for `expert`, by its name where there are several."""
    other = {"high": "low", "low": "high"}.get(expert.name)
    return count == 1 or other is None or f"{other}_noise" not in file.name


def _shapes_in(file: Path) -> list[Shape]:
    """The tensors of an adapter file, but for alphas and other numbers."""
    shapes = [info.shape for info in open_tensors(file).tensors.values()]
    return [shape for shape in shapes if prod(shape) > 1]


def _ranks(
    config: ResolvedRun, method: RankedMethod, names: Sequence[str], expert: Expert
) -> Mapping[str, int]:
    settings = config.per_expert.low if expert.name == "low" else config.per_expert.high
    ranks = dict.fromkeys(names, settings.rank or method.rank)
    for entry in method.per_module:
        for name in _chosen(names, entry.modules, grouped_linears(names)):
            ranks[name] = entry.rank or ranks[name]
    return ranks


def _parts(method: RankedMethod, linear: tuple[int, int], rank: int) -> list[Shape]:
    """The trained matrices on one linear layer, as `onewan.adapters.lora` lists them."""
    out, inputs = linear
    pair: list[Shape] = [(rank, inputs), (out, rank)]
    if isinstance(method, LohaMethod):
        return pair * 2
    if isinstance(method, DoraMethod):
        return [*pair, (out,)]
    if not isinstance(method, LokrMethod):
        return pair
    (out_small, out_large), (in_small, in_large) = (
        _factors(side, method.factor) for side in (out, inputs)
    )
    parts: list[Shape] = [(out_small, in_small)]
    if method.decompose_both and rank < max(out_small, in_small) / 2:
        parts = [(out_small, rank), (rank, in_small)]
    if rank < max(out_large, in_large) / 2:
        return [*parts, (out_large, rank), (rank, in_large)]
    return [*parts, (out_large, in_large)]


def _factors(side: int, factor: int) -> tuple[int, int]:
    """(small, large) with the product `side`, as PEFT's LoKr divides the sides of a matrix."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    limit = side if factor == -1 else factor
    small = max(n for n in range(1, int(side**0.5) + 1) if side % n == 0 and n <= limit)
    return small, side // small


def _in_blocks(config: ResolvedRun, names: list[str]) -> list[str]:
    layers = config.wan_config.transformer_layers_to_train
    return names if layers is None else [n for n in names if block_of(n) in layers]


def _chosen(
    names: Sequence[str], modules: Sequence[str], groups: Mapping[str, list[str]]
) -> list[str]:
    chosen: set[str] = set()
    for entry in modules:
        chosen.update(groups[entry] if entry in groups else matching(names, entry))
    return [name for name in names if name in chosen]
