"""Optimizers over a small network, for the tests of `onewan.train.optimizers`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onewan.config.optimizer import (
    AdafactorOptimizer,
    AdamMiniOptimizer,
    AdamW8bitOptimizer,
    AdamWLowBitOptimizer,
    AdamWOptimizer,
    AdamWScheduleFreeOptimizer,
    CameOptimizer,
    CustomOptimizer,
    LionOptimizer,
    MuonOptimizer,
    Optimizer,
    ProdigyOptimizer,
    ProdigyPlusOptimizer,
    SgdOptimizer,
    joint_only_reason,
)
from onewan.train.optimizers.joint import JointOptimizer
from onewan.train.optimizers.parameters import ParameterGroup
from onewan.train.optimizers.per_weight import PerWeightOptimizer
from onewan.train.optimizers.trainable_optimizer import build_trainable_optimizer

CHOICES: dict[str, Optimizer] = {
    "adamw": AdamWOptimizer(lr=3e-3),
    "adamw_8bit": AdamW8bitOptimizer(lr=3e-3),
    "adamw_schedule_free": AdamWScheduleFreeOptimizer(lr=1e-2, warmup_steps=2),
    "adafactor": AdafactorOptimizer(lr=3e-3),
    "prodigy": ProdigyOptimizer(d0=1e-2),
    "prodigy_plus": ProdigyPlusOptimizer(d0=1e-3),
    "lion": LionOptimizer(lr=1e-3),
    "muon": MuonOptimizer(lr=1e-2),
    "came": CameOptimizer(lr=3e-3),
    "adam_mini": AdamMiniOptimizer(lr=3e-3),
    "sgd": SgdOptimizer(lr=0.3, momentum=0.5),
    "low_bit_8": AdamWLowBitOptimizer(lr=3e-3, bits="8"),
    "low_bit_4": AdamWLowBitOptimizer(lr=3e-3, bits="4"),
    "low_bit_fp8": AdamWLowBitOptimizer(lr=3e-3, bits="fp8"),
    "custom": CustomOptimizer(class_path="pytorch_optimizer.StableAdamW", lr=3e-3),
}
PER_WEIGHT = [name for name, choice in CHOICES.items() if joint_only_reason(choice) is None]
"""Those that can update each weight separately."""


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torchao's functions without compilation, which takes half a minute. Import it to use it."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


class Net(nn.Module):
    """Two layers; the first has 4096 weights, the least for which 8-bit states have 8 bits."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 8, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


def group_of(net: nn.Module, lr: float, chosen: slice = slice(None)) -> ParameterGroup:
    named = list(net.named_parameters())[chosen]
    return ParameterGroup(
        names=tuple(n for n, _ in named), parameters=tuple(p for _, p in named), lr=lr
    )


def build(
    groups: list[ParameterGroup], choice: Optimizer, **settings: Any
) -> JointOptimizer | PerWeightOptimizer:
    optimizer = build_trainable_optimizer(groups, choice, **settings)
    assert isinstance(optimizer, JointOptimizer | PerWeightOptimizer)
    return optimizer


def optimizer_over(
    net: nn.Module, choice: Optimizer, **settings: Any
) -> JointOptimizer | PerWeightOptimizer:
    """In two groups, of two learning rates where the optimizer supports that."""
    second = choice.lr if choice.name == "prodigy" else 2 * choice.lr
    groups = [group_of(net, choice.lr, slice(0, 2)), group_of(net, second, slice(2, None))]
    return build(groups, choice, seed=7, **settings)


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 64, generator=generator)
    target = x[:, :8] + 0.5 * x[:, 8:16]
    dtype = next(net.parameters()).dtype
    return F.mse_loss(net(x.to(dtype)).float(), target)


def train(
    net: nn.Module,
    optimizer: JointOptimizer | PerWeightOptimizer,
    steps: range,
    max_norm: float | None = None,
) -> None:
    for number in steps:
        step = optimizer.begin_step(number, 1 - number / 100)
        loss_of(net, number).backward()
        step.clip_grad_norm(max_norm)
        step.apply()


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def are_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
