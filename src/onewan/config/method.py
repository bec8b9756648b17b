"""What a run trains: the `method` section, one class for each kind, and `embeddings`.

Each kind has only the fields that mean something to it. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, field_validator, model_validator

from onewan.config.section import Decay, Distinct, Int, Keyed, Positive, Section

ADAPTER_GROUPS = ("self_attention", "cross_attention", "attention", "ffn", "all_linears")
"""Names that `method.modules` takes for groups of an expert's linear layers."""

WEIGHT_GROUPS = ("all", *ADAPTER_GROUPS, "norms", "biases")
"""Names that it takes for groups of an expert's weights, where the weights themselves train."""


def _check_modules(value: tuple[str, ...], groups: Sequence[str]) -> tuple[str, ...]:
    """`value`, or ValueError if an entry is neither a group nor a pattern: it selects nothing."""
    for name in value:
        if name in groups or any(sign in name for sign in "*?[."):
            continue
        near = difflib.get_close_matches(name, groups, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"the groups are {', '.join(groups)}"
        if name in WEIGHT_GROUPS:
            remedy = f"adapters have {', '.join(groups)}; for others use fine_tune"
        raise ValueError(
            f"must name groups, or layers by a pattern with one of * ? [ ., got '{name}'; {remedy}"
        )
    return value


_AdapterModules = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    AfterValidator(lambda value: _check_modules(value, ADAPTER_GROUPS)),
    Distinct,
]
_WeightModules = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    AfterValidator(lambda value: _check_modules(value, WEIGHT_GROUPS)),
    Distinct,
]


class PerModule(Section):
    modules: _AdapterModules
    """Groups or patterns, as `method.modules` takes them."""
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
    """Which layers train: groups (`self_attention`, `cross_attention`, `attention` for both, `ffn`,
    `all_linears` for those outside the blocks too) and patterns of diffusers' names
    (`blocks.*.attn1.to_[qkv]`)."""
    init_from: Annotated[tuple[Path, ...], Distinct] = ()
    """Adapter files to go on from, in any format that is read: one for an expert, which is then
    given its layers, ranks and alphas by the file."""


class _RankedAdapter(_Adapter):
    rank: Int = Field(default=32, ge=1)
    """Rank of the adapter: more holds more, and costs memory and disk."""
    alpha: Positive | None = None
    """The adapter counts alpha/rank times; null is the rank itself, so once."""
    per_module: tuple[PerModule, ...] = ()
    """Other ranks and alphas for some of the layers; the last entry that names a layer holds."""


class LoraMethod(_RankedAdapter):
    kind: Literal["lora"] = "lora"
    """What is trained: a low-rank adapter (LoRA) beside the frozen weights."""
    dropout: Decay = 0.0
    """Probability with which an input of the adapter is dropped while training."""
    use_rslora: bool = False
    """rsLoRA: count alpha/sqrt(rank) times instead of alpha/rank."""
    init: Literal["zero", "pissa"] = "zero"
    """`zero`: B is zero, so nothing changes at first. `pissa`: start from the principal part of
    each weight, which the rest is then relieved of; learns faster. Exported as a plain LoRA of
    twice the rank."""
    lora_plus_ratio: Positive = 1.0
    """LoRA+: the learning rate of B is this many times that of A (16 is usual)."""


class DoraMethod(_RankedAdapter):
    kind: Literal["dora"] = "dora"
    """LoRA for the direction of each weight, and its length for itself (DoRA)."""
    dropout: Decay = 0.0
    """Probability with which an input of the adapter is dropped while training."""
    lora_plus_ratio: Positive = 1.0
    """LoRA+: the learning rate of B is this many times that of A (16 is usual)."""


class LohaMethod(_RankedAdapter):
    kind: Literal["loha"] = "loha"
    """The elementwise product of two low-rank matrices (LoHa)."""


class LokrMethod(_RankedAdapter):
    kind: Literal["lokr"] = "lokr"
    """The Kronecker product of a small matrix and a larger, low-rank one (LoKr)."""
    factor: Int = -1
    """Sides of the small matrix are at most this; -1 makes the two about as large as each other."""

    @field_validator("factor")
    @classmethod
    def _is_factor(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError(f"must be at least 1, or -1, got {value}")
        return value

    decompose_both: bool = False
    """Make the small matrix low-rank too."""


class OftMethod(_Adapter):
    kind: Literal["oft"] = "oft"
    """A rotation of each layer's inputs in blocks, which keeps lengths and angles (OFT)."""
    block_size: Int = Field(default=32, ge=2)
    """Inputs that turn together; must divide the width of every layer it is on."""


class FineTuneMethod(Section):
    kind: Literal["fine_tune"] = "fine_tune"
    """The weights of the experts themselves."""
    modules: _WeightModules = ("all",)
    """Which weights train: `all`, groups (`self_attention`, `cross_attention`, `attention`, `ffn`,
    `all_linears`, `norms`, `biases`) and patterns of diffusers' names of weights
    (`blocks.*.attn1.*`)."""
    weights: Literal["stochastic", "kahan", "float32"] = "stochastic"
    """How small updates survive. `stochastic`: bfloat16 weights, rounded up or down at random so
    that the mean is right (2 bytes per weight). `kahan`: bfloat16 weights and what was rounded off
    (4 bytes). `float32`: the trained weights are float32 (4 bytes)."""
    fused_step: bool = False
    """Update each weight as soon as its gradient is there, in the backward pass, so that gradients
    never stand in memory together. Takes one forward pass per step (`train.accumulation` 1) and no
    limit on the gradient of all weights (`train.max_grad_norm` null)."""


class EmbeddingMethod(Section):
    kind: Literal["embedding"] = "embedding"
    """Nothing but the placeholders of `embeddings` (textual inversion)."""


class EmbeddingFields(Section):
    placeholder: str = Field(pattern=r"^\S+$")
    """The word in captions and prompts that the vectors stand for, such as <fox>."""
    token_count: Int | None = Field(default=None, ge=1, le=64)
    """How many vectors; null is the number of tokens of `initial_text`."""
    initial_text: str = "*"
    """What the vectors start as: a word or a few for what the placeholder will mean."""
    is_output_embedding: bool = False
    """false: the vectors enter the text encoder in place of the placeholder's tokens. true: they
    join what comes out of it, at the placeholder's place; the text encoder never trains then, and
    no other word is influenced."""
    init_from: Path | None = None
    """An embedding file to go on from, instead of `initial_text`."""
    train: bool = True
    """false: use the vectors of `init_from` as they are."""
    lr: Positive | None = None
    """Learning rate; null is `optimizer.lr`."""


class EmbeddingSection(EmbeddingFields):
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the exported file, and in ComfyUI's prompts (embedding:NAME); null is the placeholder
    without its signs."""


class ResolvedEmbedding(EmbeddingFields):
    name: str


RankedMethod: TypeAlias = LoraMethod | DoraMethod | LohaMethod | LokrMethod
"""Adapters that have ranks."""

AdapterMethod: TypeAlias = LoraMethod | DoraMethod | LohaMethod | LokrMethod | OftMethod

Method: TypeAlias = Annotated[
    LoraMethod
    | DoraMethod
    | LohaMethod
    | LokrMethod
    | OftMethod
    | FineTuneMethod
    | EmbeddingMethod,
    Field(discriminator="kind"),
    Keyed(key="kind", default="lora"),
]
