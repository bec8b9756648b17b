"""`AdapterConfig`: kind, modules, ranks and alphas of an adapter, from a run file or a LoRA file.

It holds everything about an adapter except its weights. `onewan.adapters.lora` puts it on a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Literal, cast

from diffusers import WanTransformer3DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from torch import Tensor, nn

from onewan.adapters.layers import triangles_of
from onewan.adapters.select import select_linears
from onewan.arithmetic.layer_names import block_of
from onewan.config.method import (
    AdapterMethod,
    DoraMethod,
    LohaMethod,
    LokrMethod,
    LoraMethod,
    OftMethod,
)
from onewan.errors import CheckpointError, ConfigError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.lora_files import AdapterFile
from onewan.formats.peft import PeftSettings, as_peft_alpha, default_and_patterns

TrainedKind = Literal["lora", "dora", "loha", "lokr", "oft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Kind, modules, ranks and alphas of the adapter on one transformer."""

    kind: TrainedKind
    modules: tuple[str, ...]
    """Linear layers by diffusers' names (``blocks.0.attn1.to_q``), in the model's order."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By module; OFT has none."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """By module; OFT has none."""
    dropout: float = 0.0
    use_rslora: bool = False
    """rsLoRA (arXiv 2312.03732): the scale is alpha / sqrt(rank) instead of alpha / rank."""
    pissa: bool = False
    """Whether a LoRA is initialized from the largest singular vectors of the weight."""
    factor: int = -1
    """LoKr: PEFT's ``decompose_factor``."""
    decompose_both: bool = False
    """LoKr: whether the small matrix is a low-rank product too."""
    block_size: int = 0
    """OFT: number of inputs that are rotated together."""

    def scale(self, module: str) -> float:
        """Multiplier of the low-rank product."""
        rank = self.ranks[module]
        return self.alphas[module] / (sqrt(rank) if self.use_rslora else rank)

    def peft_settings(self, module: str) -> PeftSettings:
        """PEFT's settings for one module, from which `from_peft` makes a `ModuleAdapter`."""
        if self.kind == "oft":
            return PeftSettings(neumann_terms=None)
        return PeftSettings(
            alpha=float(self.alphas[module]),
            rank=self.ranks[module],
            rank_stabilized=self.use_rslora,
        )

    def peft_config(self) -> PeftConfig:
        """The configuration with which PEFT attaches the adapter.

        DoRA and PiSSA are attached as plain LoRA: `onewan.adapters.lora` adds the rest, since PEFT
        would compute it in the precision of the base weights.
        """
        # One regular expression, which PEFT matches with whole names. It compares the entries of a
        # list with the ends of names too.
        modules = "|".join(re.escape(m) for m in self.modules)
        if self.kind == "oft":
            # The exact Cayley transform: PEFT's default, a short Neumann series, is not
            # orthogonal where the generator is large.
            return OFTConfig(
                r=0,
                oft_block_size=self.block_size,
                use_cayley_neumann=False,
                target_modules=modules,
            )
        rank, ranks = default_and_patterns(self.ranks)
        common_alpha, others = default_and_patterns(self.alphas)
        alpha = as_peft_alpha(common_alpha)
        alphas = {pattern: as_peft_alpha(other) for pattern, other in others.items()}
        if self.kind == "loha":
            return LoHaConfig(
                r=rank,
                alpha=alpha,
                rank_pattern=ranks,
                alpha_pattern=alphas,
                target_modules=modules,
            )
        if self.kind == "lokr":
            return LoKrConfig(
                r=rank,
                alpha=alpha,
                decompose_factor=self.factor,
                decompose_both=self.decompose_both,
                rank_pattern=ranks,
                alpha_pattern=alphas,
                target_modules=modules,
            )
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            use_rslora=self.use_rslora,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            target_modules=modules,
            bias="none",
        )


def adapter_config_for(
    method: AdapterMethod,
    transformer: WanTransformer3DModel,
    layers: Sequence[int] | None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
) -> AdapterConfig:
    """The adapter that `method` describes, on the modules that it names within the blocks `layers`
    (None: in all blocks, and outside them).

    `rank` and `alpha` are settings of one expert and replace the method's; with a rank but no alpha
    the expert's alpha is that rank. ConfigError where modules, blocks, ranks or block sizes do not
    fit the model.
    """
    modules = select_linears(transformer, method.modules, layers)
    if isinstance(method, OftMethod):
        _check_block_size(transformer, modules, method.block_size)
        return AdapterConfig(kind="oft", modules=modules, block_size=method.block_size)
    if alpha is None:
        alpha = method.alpha if rank is None else float(rank)
    default = rank or method.rank
    ranks = dict.fromkeys(modules, default)
    alphas = dict.fromkeys(modules, float(default) if alpha is None else alpha)
    for index, entry in enumerate(method.per_module):
        field = f"method.per_module.{index}.modules"
        named = select_linears(transformer, entry.modules, layers, field)
        chosen = [module for module in named if module in ranks]
        if not chosen:
            raise ConfigError(
                "run file",
                [
                    f"{field}: names no layer that has an adapter, such as {named[0]}; add it to "
                    "method.modules, or leave the entry out"
                ],
            )
        for module in chosen:
            ranks[module] = entry.rank or ranks[module]
            own = float(ranks[module]) if alpha is None else alpha
            alphas[module] = own if entry.alpha is None else entry.alpha
    config = _ranked_config(method, modules, ranks, alphas)
    if config.pissa:
        _check_pissa_ranks(transformer, ranks)
    return config


def adapter_config_from_file(
    file: AdapterFile,
    method: AdapterMethod,
    transformer: WanTransformer3DModel,
    layers: Sequence[int] | None = None,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config of the adapter in `file`, and its weights to initialize from, float32 under PEFT's
    names.

    ConfigError if the file is of another kind than `method`, or has modules outside the blocks
    `layers`. CheckpointError if the file's adapter can't be trained or does not fit the model.
    """
    _check_against_run_file(file, method, layers)
    problems = [
        f"{module} {problem}"
        for module, adapter in file.modules.items()
        if (problem := _why_untrainable(adapter, _linear(transformer, module))) is not None
    ]
    if problems:
        raise CheckpointError(
            f"{file.path}: training can't start from {len(problems)} of its {len(file.modules)} "
            f"modules: {'; '.join(problems[:3])}"
        )
    # The model's order: it decides the order of parameters in the optimizer.
    modules = tuple(n for n, _ in transformer.named_modules() if n in file.modules)
    adapters = {module: file.modules[module] for module in modules}
    weights = {
        _peft_name(module, part): tensor
        for module, adapter in adapters.items()
        for part, tensor in _peft_tensors(adapter, _in_features(transformer, module)).items()
    }
    if isinstance(method, OftMethod):
        sizes = {a.tensors["rotation"].shape[-1] for a in adapters.values()}
        if len(sizes) > 1:
            raise CheckpointError(
                f"{file.path}: has OFT blocks of {_listed(sizes)} inputs, and a trainable "
                "adapter has a single size; merge it into the base model and train a new one"
            )
        return AdapterConfig(kind="oft", modules=modules, block_size=sizes.pop()), weights
    # A LoKr of two full factors has no rank, and its scale is 1.
    ranks = {module: adapter.rank or 1 for module, adapter in adapters.items()}
    alphas = {module: adapter.scale * ranks[module] for module, adapter in adapters.items()}
    config = _ranked_config(method, modules, ranks, alphas)
    # The alphas are made from the file's scales, rsLoRA's sqrt(rank) included.
    return replace(config, use_rslora=False, pissa=False), weights


# ------------------------------------------------------------------------------------ from the run


def _ranked_config(
    method: LoraMethod | DoraMethod | LohaMethod | LokrMethod,
    modules: tuple[str, ...],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> AdapterConfig:
    if isinstance(method, LoraMethod):
        return AdapterConfig(
            kind="lora",
            modules=modules,
            ranks=ranks,
            alphas=alphas,
            dropout=method.dropout,
            use_rslora=method.use_rslora,
            pissa=method.init == "pissa",
        )
    if isinstance(method, LokrMethod):
        return AdapterConfig(
            kind="lokr",
            modules=modules,
            ranks=ranks,
            alphas=alphas,
            factor=method.factor,
            decompose_both=method.decompose_both,
        )
    dropout = method.dropout if isinstance(method, DoraMethod) else 0.0
    return AdapterConfig(
        kind=method.kind, modules=modules, ranks=ranks, alphas=alphas, dropout=dropout
    )


def _check_block_size(
    transformer: WanTransformer3DModel, modules: Iterable[str], size: int
) -> None:
    """ConfigError for layers whose number of inputs is not a multiple of the OFT block `size`."""
    widths = {module: _in_features(transformer, module) for module in modules}
    # Reversed, so that the message names the first layer of each width.
    wrong = {width: module for module, width in reversed(widths.items()) if width % size}
    if wrong:
        raise ConfigError(
            "run file",
            [
                f"method.block_size: {size} does not divide the {width} inputs of {module}; give a "
                "divisor, or leave the layer out of method.modules"
                for width, module in wrong.items()
            ],
        )


def _check_pissa_ranks(transformer: WanTransformer3DModel, ranks: Mapping[str, int]) -> None:
    """ConfigError for layers with fewer singular values than the rank that PiSSA needs."""
    sides: dict[str, int] = {}
    for module in ranks:
        linear = _linear(transformer, module)
        assert linear is not None
        sides[module] = min(linear.in_features, linear.out_features)
    wrong = {(rank, sides[m]): m for m, rank in list(ranks.items())[::-1] if rank > sides[m]}
    if wrong:
        raise ConfigError(
            "run file",
            [
                f"method.rank: is {rank}, but {module} has only {side} singular values, and PiSSA "
                "initializes from one for each rank; give at most that, or set method.init to zero"
                for (rank, side), module in wrong.items()
            ],
        )


# ---------------------------------------------------------------------------------- from a file


def _check_against_run_file(
    file: AdapterFile, method: AdapterMethod, layers: Sequence[int] | None
) -> None:
    """ConfigError where the run file contradicts the content of `file`. Contradictions that
    are visible without opening the file are rules of `onewan.config.method_rules`."""
    problems: list[str] = []
    kinds = {adapter.kind for adapter in file.modules.values()}
    if len(kinds) == 1 and (kind := next(iter(kinds))) != method.kind and kind != "difference":
        problems.append(
            f"method.kind: is {method.kind}, but {file.path} holds {kind}; set it to {kind}, or "
            "leave method.init_from out"
        )
    if layers is not None:
        blocks = {block_of(module) for module in file.modules}
        if outside := [b for b in blocks if b is None or b not in layers]:
            where = _listed([b for b in outside if b is not None]) or "outside the blocks"
            problems.append(
                f"wan_config.transformer_layers_to_train: is {list(layers)}, but {file.path} has "
                f"layers elsewhere too (blocks: {where}); set it to null"
            )
    if problems:
        raise ConfigError("run file", problems)


_TRAINABLE_PARTS: dict[str, frozenset[str]] = {
    "lora": frozenset({"lora_A", "lora_B"}),
    "dora": frozenset({"lora_A", "lora_B", "magnitude"}),
    "loha": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "lokr": frozenset(f"lokr_w{n}{factor}" for n in (1, 2) for factor in ("", "_a", "_b")),
    "oft": frozenset({"rotation"}),
}
"""Tensors of each kind that PEFT has trainable parameters for."""


def _why_untrainable(adapter: ModuleAdapter, linear: nn.Linear | None) -> str | None:
    """Why training can't start from `adapter` on the layer `linear`; None if it can."""
    if linear is None:
        return "is not a linear layer of this model"
    if "oft_blocks" in adapter.tensors:
        return (
            "is OFT of LyCORIS, which rotates outputs, and onewan trains rotations of inputs; "
            "merge it into the base model and train a new one"
        )
    unexpected = adapter.tensors.keys() - _TRAINABLE_PARTS.get(adapter.kind, frozenset())
    if unexpected:
        return (
            f"has {' and '.join(sorted(unexpected))}, which can't be trained; merge the file into "
            "the base model and train a new adapter"
        )
    if adapter.kind != "oft" and adapter.scale == 0:
        return "has an alpha of 0, so it would get no gradient; leave the file out"
    return _shape_error(adapter, linear)


def _shape_error(adapter: ModuleAdapter, linear: nn.Linear) -> str | None:
    """Why the shapes of `adapter` do not fit the layer; None if they do."""
    shapes = {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()}
    want = (linear.out_features, linear.in_features)
    if adapter.kind in ("lora", "dora"):
        got = (shapes["lora_B"][0], shapes["lora_A"][1])
        magnitude = shapes.get("magnitude", (want[0],))
        if magnitude not in ((want[0],), (want[0], 1)):
            return f"has a magnitude {list(magnitude)}, and only one per output can be trained"
    elif adapter.kind == "loha":
        got = (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])
        if got != (shapes["hada_w2_a"][0], shapes["hada_w2_b"][1]):
            return "has two low-rank products of different shapes"
    elif adapter.kind == "lokr":
        sides = [_factor_shape(shapes, name) for name in ("lokr_w1", "lokr_w2")]
        got = (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])
    else:
        blocks, size, _ = shapes["rotation"]
        if want[1] % size == 0 and blocks in (1, want[1] // size):
            try:
                triangles_of(adapter.tensors["rotation"].float())
            except ValueError as error:
                return f"{error}, so it has no Cayley transform; merge the file into the base model"
            return None
        got = (want[0], blocks * size)
    if got != want:
        return (
            f"is for a layer of {got[1]} inputs and {got[0]} outputs, not {want[1]} and {want[0]}"
        )
    return None


def _factor_shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    """The shape of a LoKr's factor, which is a full matrix or a low-rank product."""
    return shapes.get(name) or (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1])


def _peft_tensors(adapter: ModuleAdapter, in_features: int) -> dict[str, Tensor]:
    """The tensors as PEFT's parameters have them, float32, of an adapter that can be trained."""
    parts = {part: tensor.float() for part, tensor in adapter.tensors.items()}
    if "magnitude" in parts:
        parts["magnitude"] = parts["magnitude"].reshape(-1)
    if "rotation" in parts:
        triangles = triangles_of(parts.pop("rotation"))
        blocks = in_features // adapter.tensors["rotation"].shape[-1]
        parts["oft_R"] = triangles.expand(blocks, -1).contiguous()
    return parts


def _peft_name(module: str, part: str) -> str:
    """PEFT's parameter name, without the adapter's own name in it."""
    name = "lora_magnitude_vector" if part == "magnitude" else part
    return f"{module}.{name}{'.weight' if name.startswith(('lora_', 'oft_')) else ''}"


# ------------------------------------------------------------------------- layers by their names


def _linear(transformer: WanTransformer3DModel, module: str) -> nn.Linear | None:
    try:
        found = transformer.get_submodule(module)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None


def _in_features(transformer: WanTransformer3DModel, module: str) -> int:
    return cast("nn.Linear", transformer.get_submodule(module)).in_features


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
