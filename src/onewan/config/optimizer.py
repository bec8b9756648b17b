"""How weights move: the `optimizer` section, one class for each, and courses of the learning rate.

Each has only the fields that mean something to it. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from onewan.config.section import Decay, Float, Int, Keyed, Positive, Section, Share

OPTIMIZER_PACKAGES = (
    "torch.optim",
    "bitsandbytes.optim",
    "torchao.optim",
    "pytorch_optimizer",
    "schedulefree",
    "prodigyopt",
    "prodigyplus",
    "lion_pytorch",
    "came_pytorch",
    "adam_mini",
    "transformers.optimization",
)
"""Where `optimizer.class_path` may lead. A closed list, so that a run file from a stranger runs no
code but that of optimizers."""


class AdamWOptimizer(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW, fused."""
    lr: Positive = 1e-4
    """Learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: Float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""


class AdamW8bitOptimizer(AdamWOptimizer):
    name: Literal["adamw_8bit"] = "adamw_8bit"  # pyright: ignore[reportIncompatibleVariableOverride]
    """AdamW of bitsandbytes, its state in 8 bits."""
    paged: bool = False
    """Let the state move to host memory when the GPU's is short (CUDA)."""


class AdamWScheduleFreeOptimizer(AdamWOptimizer):
    name: Literal["adamw_schedule_free"] = "adamw_schedule_free"  # pyright: ignore[reportIncompatibleVariableOverride]
    """AdamW whose averaged weights take the place of a schedule (package schedulefree)."""
    warmup_steps: Int = Field(default=0, ge=0)
    """Its own warm-up, which its average knows of; use it instead of `train.warmup_steps`."""


class AdafactorOptimizer(Section):
    name: Literal["adafactor"] = "adafactor"
    """Adafactor: the square's running mean as a product of rows and columns."""
    lr: Positive = 1e-4
    """Learning rate."""
    decay_rate: Float = Field(default=-0.8, lt=0)
    """Exponent of the running mean's decay."""
    clip_threshold: Positive = 1.0
    """Root mean square of an update above which it is scaled down."""
    scale_parameter: bool = False
    """Scale the learning rate by the weight's own size."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """Weight decay."""


class ProdigyOptimizer(Section):
    name: Literal["prodigy"] = "prodigy"
    """Prodigy: AdamW that finds its own learning rate (package prodigyopt)."""
    lr: Positive = 1.0
    """Multiplies the rate that it finds; leave it at 1."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    d0: Positive = 1e-6
    """The first guess of the learning rate."""
    d_coef: Positive = 1.0
    """Multiplies its guesses: 0.5 is more careful, 2 bolder."""
    safeguard_warmup: bool = True
    """Keep the guess from growing because of a warm-up."""
    bias_correction: bool = True
    """Adam's correction of its means at the start."""


class ProdigyPlusOptimizer(Section):
    name: Literal["prodigy_plus_schedule_free"] = "prodigy_plus_schedule_free"
    """Prodigy and schedule-free in one (package prodigy-plus-schedule-free)."""
    lr: Positive = 1.0
    """Multiplies the rate that it finds; leave it at 1."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of the running means of the gradient and of its square."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    d0: Positive = 1e-6
    """The first guess of the learning rate."""
    d_coef: Positive = 1.0
    """Multiplies its guesses: 0.5 is more careful, 2 bolder."""
    factored: bool = True
    """Keep the square's running mean as rows and columns."""


class LionOptimizer(Section):
    name: Literal["lion"] = "lion"
    """Lion: the sign of a momentum (package lion-pytorch)."""
    lr: Positive = 2e-5
    """Learning rate, about a fifth of AdamW's."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Shares of the momentum in the update, and its decay."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""


class MuonOptimizer(Section):
    name: Literal["muon"] = "muon"
    """Muon (PyTorch's) on layers' matrices; AdamW of the same learning rate on all else."""
    lr: Positive = 1e-3
    """Learning rate."""
    momentum: Decay = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look ahead by the momentum."""
    ns_steps: Int = Field(default=5, ge=1, le=99)
    """Newton-Schulz iterations that make the update orthogonal."""
    match_adamw: bool = True
    """Scale updates to the size of AdamW's, so that its learning rates hold; false leaves them."""
    weight_decay: Float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""


class CameOptimizer(Section):
    name: Literal["came"] = "came"
    """CAME: Adafactor guided by its confidence (package came-pytorch)."""
    lr: Positive = 1e-4
    """Learning rate."""
    betas: tuple[Decay, Decay, Decay] = (0.9, 0.999, 0.9999)
    """Decay of the update, of the square's mean, and of the instability's."""
    clip_threshold: Positive = 1.0
    """Root mean square of an update above which it is scaled down."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""


class AdamMiniOptimizer(AdamWOptimizer):
    name: Literal["adam_mini"] = "adam_mini"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Adam-mini: one running square for each block of a weight (package adam-mini)."""


class SgdOptimizer(Section):
    name: Literal["sgd"] = "sgd"
    """Stochastic gradient descent."""
    lr: Positive = 1e-2
    """Learning rate."""
    momentum: Decay = 0.0
    """Decay of the momentum."""
    nesterov: bool = False
    """Look ahead by the momentum."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """Weight decay."""


class AdamWLowBitOptimizer(AdamWOptimizer):
    name: Literal["adamw_low_bit"] = "adamw_low_bit"  # pyright: ignore[reportIncompatibleVariableOverride]
    """AdamW of torchao, its state in few bits."""
    bits: Literal["8", "4", "fp8"] = "8"
    """Bits of the state."""


class AdamWOffloadOptimizer(AdamWOptimizer):
    name: Literal["adamw_cpu_offload"] = "adamw_cpu_offload"  # pyright: ignore[reportIncompatibleVariableOverride]
    """AdamW whose state and step are on the CPU (torchao's CPUOffloadOptimizer; needs a GPU)."""


class CustomOptimizer(Section):
    name: Literal["custom"] = "custom"
    """A class of another package."""
    class_path: str = Field(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$")
    """Its import path, such as pytorch_optimizer.StableAdamW; only of packages of optimizers that
    onewan knows (the message names them)."""
    lr: Positive = 1e-4
    """Learning rate."""
    arguments: dict[str, bool | Int | Float | str | tuple[Float, ...] | None] = Field(default={})
    """Its other arguments by name."""

    @field_validator("class_path")
    @classmethod
    def _is_in_known_package(cls, value: str) -> str:
        if not value.startswith(tuple(f"{name}." for name in OPTIMIZER_PACKAGES)):
            raise ValueError(
                f"must be in one of {', '.join(OPTIMIZER_PACKAGES)}, got '{value}'; a run file "
                "can't name other code"
            )
        return value

    @field_validator("arguments")
    @classmethod
    def _has_no_lr(cls, value: dict[str, object]) -> dict[str, object]:
        if "lr" in value:
            raise ValueError(f"must not contain lr, got {value['lr']}; use optimizer.lr")
        return value


AVERAGING_OPTIMIZERS = (AdamWScheduleFreeOptimizer, ProdigyPlusOptimizer)
"""Those whose averaged weights take the place of a schedule."""

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
    """Course of the learning rate between warm-up and cooldown: it stays."""


class LinearSchedule(Section):
    kind: Literal["linear"] = "linear"
    """It falls in a straight line."""
    end_factor: Share = 0.0
    """Where it ends, as a share of the full rate."""


class CosineSchedule(Section):
    kind: Literal["cosine"] = "cosine"
    """It falls along half a cosine."""
    end_factor: Share = 0.0
    """Where it ends, as a share of the full rate."""


class CosineRestartsSchedule(Section):
    kind: Literal["cosine_with_restarts"] = "cosine_with_restarts"
    """Several half cosines, each from the full rate."""
    cycles: Int = Field(default=3, ge=1)
    """How many."""
    end_factor: Share = 0.0
    """Where each ends, as a share of the full rate."""


class RexSchedule(Section):
    kind: Literal["rex"] = "rex"
    """Reflected exponential: stays high for long, then falls fast."""
    end_factor: Share = 0.0
    """Where it ends, as a share of the full rate."""


class PolynomialSchedule(Section):
    kind: Literal["polynomial"] = "polynomial"
    """It falls as a power of the steps left."""
    power: Positive = 2.0
    """1 is linear; more falls faster at first."""
    end_factor: Share = 0.0
    """Where it ends, as a share of the full rate."""


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
