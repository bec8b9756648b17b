"""Training methods and embeddings: one class for each `method.kind`, and the `embeddings` section.

Each class has only the fields that its method takes.
"""

# Sections are immutable, so a subclass may narrow the type of a field and take its default away.
# pyright: reportIncompatibleVariableOverride=false, reportGeneralTypeIssues=false

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from onewan.config.section import Decay, Distinct, Int, Keyed, Positive, Section

ADAPTER_GROUPS = ("self_attention", "cross_attention", "attention", "ffn", "all_linears")
"""Names of groups of an expert's linear layers, for `method.modules` of adapters."""

WEIGHT_GROUPS = ("all", *ADAPTER_GROUPS, "norms", "biases")
"""Names of groups of an expert's weights, for `method.modules` of full fine-tuning."""


def _in_groups(groups: Sequence[str]) -> AfterValidator:
    """Refuses an entry that is neither a group nor a pattern, since it selects nothing."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name in groups or any(sign in name for sign in "*?[."):
                continue
            near = difflib.get_close_matches(name, groups, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"the groups are {', '.join(groups)}"
            if name in WEIGHT_GROUPS:
                remedy = f"adapters have {', '.join(groups)}; for others use fine_tune"
            rule = "must name groups, or layers by a pattern with one of * ? [ ."
            raise ValueError(f"{rule}, got '{name}'; {remedy}")
        return value

    return AfterValidator(check)


_Modules = Annotated[tuple[str, ...], Field(min_length=1), Distinct]
_AdapterModules = Annotated[_Modules, _in_groups(ADAPTER_GROUPS)]


class PerModule(Section):
    modules: _AdapterModules
    """Groups or patterns, as in `method.modules`."""
    rank: Int | None = Field(default=None, ge=1)
    """Rank of these layers; null is the method's."""
    alpha: Positive | None = None
    """Alpha of these layers; null is their rank, or the method's alpha if that is given."""

    @model_validator(mode="after")
    def _changes_something(self) -> PerModule:
        if self.rank is None and self.alpha is None:
            raise ValueError("gives neither rank nor alpha; give one, or remove the entry")
        return self


class _Adapter(Section):
    modules: _AdapterModules = ("self_attention", "cross_attention", "ffn")
    """Layers with an adapter: groups (`self_attention`, `cross_attention`, `attention` for both,
    `ffn`, `all_linears`, which includes those outside the blocks) and patterns of diffusers' module
    names (`blocks.*.attn1.to_[qkv]`)."""
    init_from: Annotated[tuple[Path, ...], Distinct] = ()
    """Adapter files to initialize from, in any supported format, at most one for each expert.
    Layers, rank and alpha of that expert then come from the file; differences of biases and norms
    in it stay fixed and are exported again."""


class _RankedAdapter(_Adapter):
    rank: Int = Field(default=32, ge=1)
    """Rank of the adapter; a higher rank has more capacity, and needs more memory and disk."""
    alpha: Positive | None = None
    """The adapter is scaled by alpha / rank; null: alpha is the rank (scale 1)."""
    per_module: tuple[PerModule, ...] = ()
    """Ranks and alphas for some of the layers; the last entry that matches a layer applies."""


class _LowRank(_RankedAdapter):
    dropout: Decay = 0.0
    """Dropout probability of the adapter's inputs during training."""
    lora_plus_ratio: Positive = 1.0
    """LoRA+: ratio of B's learning rate to A's (16 is common; 1 turns it off)."""


class LoraMethod(_LowRank):
    kind: Literal["lora"] = "lora"
    """LoRA: a low-rank adapter beside the frozen weights."""
    use_rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank) instead of alpha / rank."""
    init: Literal["zero", "pissa"] = "zero"
    """`zero`: B is zero. `pissa`: A and B are initialized from the top singular vectors of each
    weight, which often converges faster; exported as a plain LoRA of twice the rank. Neither
    changes the model before the first step."""


class DoraMethod(_LowRank):
    kind: Literal["dora"] = "dora"
    """DoRA: LoRA for the direction of each weight, and a trained magnitude."""


class LohaMethod(_RankedAdapter):
    kind: Literal["loha"] = "loha"
    """LoHa: the elementwise product of two low-rank matrices."""


class LokrMethod(_RankedAdapter):
    kind: Literal["lokr"] = "lokr"
    """LoKr: the Kronecker product of a small matrix and a larger low-rank one."""
    factor: Annotated[Int, Field(ge=1)] | Literal[-1] = -1
    """Largest side of the small matrix, at least 1; -1 makes both matrices about equally large."""
    decompose_both: bool = False
    """Decompose the small matrix into low-rank factors too."""


class OftMethod(_Adapter):
    kind: Literal["oft"] = "oft"
    """OFT: an orthogonal, block-diagonal transformation of each layer's inputs."""
    block_size: Int = Field(default=32, ge=2)
    """OFT block size; must divide the input width of every adapted layer."""


class FineTuneMethod(Section):
    kind: Literal["fine_tune"] = "fine_tune"
    """Full fine-tuning of the experts' weights."""
    modules: Annotated[_Modules, _in_groups(WEIGHT_GROUPS)] = ("all",)
    """Weights to train: `all`, groups (`self_attention`, `cross_attention`, `attention`, `ffn`,
    `all_linears`, `norms`, `biases`) and patterns of diffusers' parameter
    names (`blocks.*.attn1.*`)."""
    weights: Literal["stochastic", "kahan", "float32"] = "stochastic"
    """How trained weights are stored, so that small updates are not lost. `stochastic`: bfloat16
    with stochastic rounding (2 bytes per weight). `kahan`: bfloat16 and the rounding error in
    bfloat16 (Kahan summation, 4 bytes). `float32`: float32 (4 bytes)."""
    fused_step: bool = False
    """Update each weight in the backward pass, so that all gradients are never in memory at once.
    Needs `train.accumulation` 1 and `train.max_grad_norm` null."""


class EmbeddingMethod(Section):
    kind: Literal["embedding"] = "embedding"
    """Textual inversion: only the `embeddings` are trained."""


class EmbeddingSection(Section):
    placeholder: str = Field(pattern=r"^\S+$")
    """Word in captions and prompts that the vectors replace, such as <fox>."""
    token_count: Int | None = Field(default=None, ge=1, le=64)
    """Number of vectors; null is the number of tokens of `initial_text`."""
    initial_text: str = "*"
    """Text whose embedding initializes the vectors: a few words for the concept."""
    is_output_embedding: bool = False
    """false: the vectors replace the placeholder's tokens at the text encoder's input. true: they
    are inserted into its output, which leaves the outputs of all other words unchanged."""
    init_from: Path | None = None
    """Embedding file to initialize from, instead of `initial_text`."""
    train: bool = True
    """false: use the vectors of `init_from` without training them."""
    lr: Positive | None = None
    """Learning rate; null is `optimizer.lr`."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the exported file, after the step; null is the placeholder without punctuation."""


class ResolvedEmbedding(EmbeddingSection):
    name: str


RankedMethod: TypeAlias = LoraMethod | DoraMethod | LohaMethod | LokrMethod
"""Adapters that have ranks."""

AdapterMethod: TypeAlias = RankedMethod | OftMethod

Method: TypeAlias = Annotated[
    AdapterMethod | FineTuneMethod | EmbeddingMethod,
    Field(discriminator="kind"),
    Keyed(key="kind", default="lora"),
]
