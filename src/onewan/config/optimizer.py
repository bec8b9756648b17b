"""Optimizers and learning-rate schedules: one class for each `optimizer.name` and `schedule.kind`.

Each class has only the fields that its optimizer takes. adamw, adamw_8bit, adafactor, prodigy,
muon, lion and adamw_schedule_free are supported in every combination; the others are best effort.
"""

# A subclass of an optimizer has a `name` of its own.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from onewan.config.section import Decay, Float, Int, Keyed, Positive, Section, Share

OPTIMIZER_PACKAGES = (
    *("torch.optim", "bitsandbytes.optim", "torchao.optim", "transformers.optimization"),
    *("pytorch_optimizer", "schedulefree", "prodigyopt", "prodigyplus"),
    *("lion_pytorch", "came_pytorch", "adam_mini"),
)
"""Packages that `optimizer.class_path` may name: an allow-list, so that an untrusted run file can't
import arbitrary code."""

Lr = Annotated[Positive, Field(description="Learning rate.")]
Betas = Annotated[tuple[Decay, Decay], Field(description="Decay rates of the first two moments.")]
Eps = Annotated[Positive, Field(description="Added to the denominator for numerical stability.")]
WeightDecay = Annotated[Float, Field(ge=0, description="Decoupled weight decay.")]
L2Penalty = Annotated[Float, Field(ge=0, description="Weight decay, as an L2 penalty.")]
Momentum = Annotated[Decay, Field(description="Decay rate of the momentum.")]
ClipThreshold = Annotated[Positive, Field(description="Maximum root mean square of an update.")]


class AdamWOptimizer(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW of PyTorch, with the fused kernel."""
    lr: Lr = 1e-4
    betas: Betas = (0.9, 0.999)
    eps: Eps = 1e-8
    weight_decay: WeightDecay = 0.01


class AdamW8bitOptimizer(AdamWOptimizer):
    name: Literal["adamw_8bit"] = "adamw_8bit"
    """AdamW of bitsandbytes, with 8-bit optimizer state."""
    paged: bool = False
    """Page optimizer state out to CPU memory when GPU memory runs out (CUDA only)."""


class AdamWScheduleFreeOptimizer(AdamWOptimizer):
    name: Literal["adamw_schedule_free"] = "adamw_schedule_free"
    """Schedule-free AdamW: averages weights instead of decaying the rate (package schedulefree)."""
    warmup_steps: Int = Field(default=0, ge=0)
    """Warm-up that the weight average accounts for; use it instead of `train.warmup_steps`."""


class AdafactorOptimizer(Section):
    name: Literal["adafactor"] = "adafactor"
    """Adafactor: AdamW with a factored second moment, which needs little memory."""
    lr: Lr = 1e-4
    decay_rate: Float = Field(default=-0.8, lt=0)
    """Exponent of the second moment's decay rate, 1 - step^decay_rate."""
    clip_threshold: ClipThreshold = 1.0
    scale_parameter: bool = False
    """Scale the learning rate by the root mean square of the weight."""
    weight_decay: L2Penalty = 0.0


class _Prodigy(Section):
    lr: Positive = 1.0
    """Factor of the estimated learning rate; leave it at 1."""
    betas: Betas = (0.9, 0.999)
    weight_decay: WeightDecay = 0.0
    d0: Positive = 1e-6
    """Initial estimate of the learning rate."""
    d_coef: Positive = 1.0
    """Factor of the estimate: 0.5 is more cautious, 2 more aggressive."""


class ProdigyOptimizer(_Prodigy):
    name: Literal["prodigy"] = "prodigy"
    """Prodigy: AdamW that estimates its learning rate (package prodigyopt)."""
    eps: Eps = 1e-8
    safeguard_warmup: bool = True
    """Keep the estimate from growing during warm-up."""
    bias_correction: bool = True
    """Adam's bias correction."""


class ProdigyPlusOptimizer(_Prodigy):
    name: Literal["prodigy_plus_schedule_free"] = "prodigy_plus_schedule_free"
    """Prodigy with schedule-free averaging (package prodigy-plus-schedule-free). Best effort."""
    betas: Betas = (0.9, 0.99)
    factored: bool = True
    """Factored second moment, which needs less memory."""


class LionOptimizer(Section):
    name: Literal["lion"] = "lion"
    """Lion (package lion-pytorch): sign of the momentum, with a fifth of AdamW's learning rate."""
    lr: Lr = 2e-5
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """beta1: weight of the momentum in the update; beta2: decay rate of the momentum."""
    weight_decay: WeightDecay = 0.0


class MuonOptimizer(Section):
    name: Literal["muon"] = "muon"
    """Muon of PyTorch for weight matrices, AdamW with the same learning rate for all else."""
    lr: Lr = 1e-3
    momentum: Momentum = 0.95
    nesterov: bool = True
    """Nesterov momentum."""
    ns_steps: Int = Field(default=5, ge=1, le=99)
    """Newton-Schulz iterations that orthogonalize the update."""
    match_adamw: bool = True
    """Scale updates to the root mean square of AdamW's, so that AdamW's learning rates apply."""
    weight_decay: WeightDecay = 0.01


class CameOptimizer(Section):
    name: Literal["came"] = "came"
    """CAME: Adafactor with confidence-guided updates (package came-pytorch). Best effort."""
    lr: Lr = 1e-4
    betas: tuple[Decay, Decay, Decay] = (0.9, 0.999, 0.9999)
    """beta1, beta2, beta3: decay rates of the update, the second moment and the confidence."""
    clip_threshold: ClipThreshold = 1.0
    weight_decay: WeightDecay = 0.0


class AdamMiniOptimizer(AdamWOptimizer):
    name: Literal["adam_mini"] = "adam_mini"
    """Adam-mini: one second moment per block of a weight (package adam-mini). Best effort."""


class SgdOptimizer(Section):
    name: Literal["sgd"] = "sgd"
    """Stochastic gradient descent. Best effort."""
    lr: Lr = 1e-2
    momentum: Momentum = 0.0
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: L2Penalty = 0.0


class AdamWLowBitOptimizer(AdamWOptimizer):
    name: Literal["adamw_low_bit"] = "adamw_low_bit"
    """AdamW of torchao, with low-bit optimizer state. Best effort."""
    bits: Literal["8", "4", "fp8"] = "8"
    """Precision of the optimizer state."""


class AdamWOffloadOptimizer(AdamWOptimizer):
    name: Literal["adamw_cpu_offload"] = "adamw_cpu_offload"
    """AdamW with its state and step on the CPU (torchao's CPUOffloadOptimizer; needs a GPU). Best
    effort."""


class CustomOptimizer(Section):
    name: Literal["custom"] = "custom"
    """An optimizer class of another package. Best effort."""
    class_path: str = Field(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$")
    """Import path of the class, such as pytorch_optimizer.StableAdamW. Only packages of a fixed
    list are allowed; the error message names them."""
    lr: Lr = 1e-4
    arguments: dict[str, bool | Int | Float | str | tuple[Float, ...] | None] = Field(default={})
    """Keyword arguments of the class, without lr."""

    @field_validator("class_path")
    @classmethod
    def _is_in_known_package(cls, value: str) -> str:
        if not value.startswith(tuple(f"{name}." for name in OPTIMIZER_PACKAGES)):
            rule = f"must be in one of {', '.join(OPTIMIZER_PACKAGES)}"
            raise ValueError(f"{rule}, got '{value}'; a run file can't name other code")
        return value

    @field_validator("arguments")
    @classmethod
    def _has_no_lr(cls, value: dict[str, object]) -> dict[str, object]:
        if "lr" in value:
            raise ValueError(f"must not contain lr, got {value['lr']}; use optimizer.lr")
        return value


AVERAGING_OPTIMIZERS = (AdamWScheduleFreeOptimizer, ProdigyPlusOptimizer)
"""Optimizers that average weights instead of decaying the learning rate."""

Optimizer: TypeAlias = Annotated[
    AdamWOptimizer
    | AdamW8bitOptimizer
    | AdamWScheduleFreeOptimizer
    | AdafactorOptimizer
    | ProdigyOptimizer
    | ProdigyPlusOptimizer
    | LionOptimizer
    | MuonOptimizer
    | CameOptimizer
    | AdamMiniOptimizer
    | SgdOptimizer
    | AdamWLowBitOptimizer
    | AdamWOffloadOptimizer
    | CustomOptimizer,
    Field(discriminator="name"),
    Keyed(key="name", default="adamw"),
]


class ConstantSchedule(Section):
    kind: Literal["constant"] = "constant"
    """Learning-rate schedule between warm-up and cooldown: constant."""


class _Decay(Section):
    end_factor: Share = 0.0
    """Factor of the learning rate at the end of the decay."""


class LinearSchedule(_Decay):
    kind: Literal["linear"] = "linear"
    """Linear decay."""


class CosineSchedule(_Decay):
    kind: Literal["cosine"] = "cosine"
    """Cosine decay."""


class CosineRestartsSchedule(_Decay):
    kind: Literal["cosine_with_restarts"] = "cosine_with_restarts"
    """Cosine decay with hard restarts at the full learning rate."""
    cycles: Int = Field(default=3, ge=1)
    """Number of cosine cycles."""


class RexSchedule(_Decay):
    kind: Literal["rex"] = "rex"
    """REX (reflected exponential): stays high for long, then decays fast."""


class PolynomialSchedule(_Decay):
    kind: Literal["polynomial"] = "polynomial"
    """Polynomial decay."""
    power: Positive = 2.0
    """Exponent: 1 is linear; larger values decay faster at first."""


Schedule: TypeAlias = Annotated[
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | CosineRestartsSchedule
    | RexSchedule
    | PolynomialSchedule,
    Field(discriminator="kind"),
    Keyed(key="kind", default="constant", text=True),
]


def joint_only_reason(choice: Optimizer) -> str | None:
    """Why the optimizer can't update each weight separately; None if it can.

    The fused step and rounding to bfloat16 need that (`onewan.train.optimizers.per_weight`).
    """
    name = choice.class_path if isinstance(choice, CustomOptimizer) else choice.name
    if any(family in name.lower() for family in ("prodigy", "dadapt")):
        return "it estimates one learning rate from all weights together"
    if isinstance(choice, AdamWOffloadOptimizer):
        return "it copies gradients to the CPU in its own backward hooks"
    return None
