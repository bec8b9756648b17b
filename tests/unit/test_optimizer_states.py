"""Optimizer states: resuming is bit-exact, and states are plain, safe and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.optimizers import (
    CHOICES,
    PER_WEIGHT,
    Net,
    are_equal,
    optimizer_over,
    through_a_file,
    train,
    uncompiled,  # noqa: F401  (used by each test)
    weights_of,
)
from torch import nn

from onewan.config.optimizer import AdamWOptimizer, Optimizer, ProdigyOptimizer
from onewan.train.rounding import Rounding


def check_resume(
    choice: Optimizer, dtype: torch.dtype, other: dict[str, Any] | None = None, **settings: Any
) -> None:
    """A run that is interrupted after 4 of 8 steps ends with the bits of an uninterrupted one.

    `other` are the settings of the optimizer that resumes, if they differ.
    """
    uninterrupted = Net(dtype)
    optimizer = optimizer_over(uninterrupted, choice, **settings)
    train(uninterrupted, optimizer, range(4))
    state, weights = through_a_file(optimizer.state_dict()), weights_of(uninterrupted)
    train(uninterrupted, optimizer, range(4, 8))

    resumed = Net(dtype)
    for parameter in resumed.parameters():  # as in a new process, before it reads the state
        nn.init.normal_(parameter)
    second = optimizer_over(resumed, choice, **(settings if other is None else other))
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    train(resumed, second, range(4, 8))
    assert are_equal(weights_of(uninterrupted), weights_of(resumed))
    assert second.lr == optimizer.lr
    with optimizer.evaluating(), second.evaluating():
        assert are_equal(weights_of(uninterrupted), weights_of(resumed))


@pytest.mark.parametrize("name", CHOICES)
def test_resuming_float32_weights_is_bit_exact(name: str) -> None:
    check_resume(CHOICES[name], torch.float32)


@pytest.mark.parametrize("name", CHOICES)
def test_resuming_bfloat16_weights_is_bit_exact(name: str) -> None:
    """PyTorch's own `load_state_dict` would cast float32 states to bfloat16."""
    check_resume(CHOICES[name], torch.bfloat16)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", PER_WEIGHT)
def test_resuming_rounded_weights_is_bit_exact(name: str, fused: bool, rounding: Rounding) -> None:
    check_resume(CHOICES[name], torch.bfloat16, rounding=rounding, fused=fused)


@pytest.mark.parametrize("name", PER_WEIGHT)
def test_a_state_can_be_loaded_with_and_without_the_fused_step(name: str) -> None:
    check_resume(CHOICES[name], torch.float32, other={"fused": True}, fused=False)
    check_resume(CHOICES[name], torch.float32, other={"fused": False}, fused=True)


def test_a_resumed_run_keeps_its_own_settings() -> None:
    """A changed learning rate or decay applies; what the optimizer has estimated is kept."""
    net = Net()
    optimizer = optimizer_over(net, ProdigyOptimizer(d0=1e-3))
    train(net, optimizer, range(6))
    second = optimizer_over(Net(), ProdigyOptimizer(lr=0.5, d0=1e-3, weight_decay=0.3))
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    managed = next(iter(second.parameters))
    group = managed.group
    assert group["weight_decay"] == 0.3
    assert group["k"] == 6
    second.begin_step(6, 1.0)
    optimizer.begin_step(6, 1.0)
    assert second.lr == pytest.approx(optimizer.lr / 2)
    second.load_state_dict(optimizer_over(Net(), ProdigyOptimizer(d0=1e-3)).state_dict())
    assert group["k"] == 0  # a state from before the first step
    assert "d_hat" not in group
    assert not managed.state


def test_a_state_is_a_copy_in_plain_containers() -> None:
    net = Net()
    optimizer = optimizer_over(net, AdamWOptimizer())
    train(net, optimizer, range(2))
    state = optimizer.state_dict()
    average = state["first.weight"]["state"]["exp_avg"].clone()
    second = optimizer_over(Net(), AdamWOptimizer())
    second.load_state_dict(state)
    train(net, optimizer, range(2, 3))
    assert torch.equal(state["first.weight"]["state"]["exp_avg"], average)
    assert type(state) is dict


def test_a_state_of_other_weights_is_refused() -> None:
    state = optimizer_over(Net(), AdamWOptimizer()).state_dict()
    optimizer = optimizer_over(Net(), AdamWOptimizer())
    with pytest.raises(ValueError, match=r"first\.bias is only in this run"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "first.bias"})
    with pytest.raises(ValueError, match="more is only in the state"):
        optimizer.load_state_dict({**state, "more": state["first.bias"]})
    state["first.bias"]["shape"] = [63]
    with pytest.raises(ValueError, match=r"first\.bias: the state is of shape \[63\], not \(64,\)"):
        optimizer.load_state_dict(state)


def test_a_kahan_state_can_be_loaded_with_another_rounding_and_back() -> None:
    kahan = optimizer_over(Net(torch.bfloat16), CHOICES["adamw"], rounding="kahan")
    other = optimizer_over(Net(torch.bfloat16), CHOICES["adamw"], rounding="stochastic")
    other.load_state_dict(kahan.state_dict())
    kahan.load_state_dict(other.state_dict())
    assert next(iter(kahan.parameters)).residual is not None


def test_a_saved_state_is_read_without_running_code(tmp_path: Path) -> None:
    for name in CHOICES:
        optimizer = optimizer_over(net := Net(), CHOICES[name])
        train(net, optimizer, range(1))
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert loaded.keys() == weights_of(net).keys()
