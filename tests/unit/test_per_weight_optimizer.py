"""The fused step is bit-exact and holds one gradient; rounding keeps small updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.optimizers import (
    CHOICES,
    PER_WEIGHT,
    Net,
    are_equal,
    build,
    group_of,
    loss_of,
    optimizer_over,
    train,
    uncompiled,  # noqa: F401  (used by each test)
    weights_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onewan.config.optimizer import AdamWOptimizer, SgdOptimizer
from onewan.devices import HOST
from onewan.train.optimizers.parameters import ParameterGroup
from onewan.train.rounding import Rounding

# ------------------------------------------------------------------------------- the fused step


@pytest.mark.parametrize("rounding", ["none", "stochastic", "kahan"])
@pytest.mark.parametrize("name", PER_WEIGHT)
def test_a_fused_step_gives_the_same_bits(name: str, rounding: Rounding) -> None:
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    plain, fused = Net(dtype), Net(dtype)
    optimizers = (
        optimizer_over(plain, CHOICES[name], rounding=rounding),
        optimizer_over(fused, CHOICES[name], rounding=rounding, fused=True),
    )
    for number in range(5):
        steps = []
        for net, optimizer in zip((plain, fused), optimizers, strict=True):
            steps.append(optimizer.begin_step(number, 0.5))
            loss_of(net, number).backward()
        assert all(p.grad is None for p in fused.parameters())
        assert torch.equal(*(step.clip_grad_norm(None) for step in steps))
        # Only the fused weights have been updated by the backward pass.
        assert not are_equal(weights_of(plain), weights_of(fused))
        for step in steps:
            step.apply()
        assert are_equal(weights_of(plain), weights_of(fused))


@pytest.mark.parametrize("name", ["adamw_schedule_free", "adamw", "muon"])
def test_counters_advance_for_weights_without_a_gradient(name: str) -> None:
    """So a group's counters (schedule-free optimizers have some) are the same in a fused step."""
    nets = Net(), Net()
    optimizers = (
        optimizer_over(nets[0], CHOICES[name]),
        optimizer_over(nets[1], CHOICES[name], fused=True),
    )
    for number in range(6):
        for net, optimizer in zip(nets, optimizers, strict=True):
            step = optimizer.begin_step(number, 1.0)
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(number))
            (net.first(x) if number in {0, 3} else net(x)).square().mean().backward()
            step.apply()
    assert are_equal(weights_of(nets[0]), weights_of(nets[1]))


def test_a_fused_step_holds_one_gradient_at_a_time() -> None:
    """In a stack of checkpointed blocks, as each gradient is complete no other is left."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.SiLU()) for _ in range(6))
    parameters = list(blocks.parameters())
    held = []

    def count(_: Tensor) -> None:
        held.append(sum(p.grad is not None for p in parameters))

    for parameter in parameters:  # registered before the optimizer's hooks, so it is called first
        parameter.register_post_accumulate_grad_hook(count)
    optimizer = build([group_of(blocks, 1e-3)], AdamWOptimizer(), fused=True)
    before = weights_of(blocks)
    step = optimizer.begin_step(0, 1.0)
    x = torch.randn(4, 16)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
        assert isinstance(x, Tensor)
    x.square().mean().backward()
    assert held == [1] * len(parameters)
    step.apply()
    assert not any(torch.equal(before[n], p) for n, p in blocks.named_parameters())


def test_a_fused_step_takes_one_backward_pass_after_it_has_begun() -> None:
    net = Net()
    optimizer = optimizer_over(net, AdamWOptimizer(), fused=True)
    with pytest.raises(RuntimeError, match=r"begin_step\(\) comes before the backward pass"):
        loss_of(net, 0).backward()
    step = optimizer.begin_step(0, 1.0)
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="takes one backward pass"):
        loss_of(net, 0).backward()
    with pytest.raises(ValueError, match="can't clip"):
        step.clip_grad_norm(1.0)
    step.apply()
    with pytest.raises(RuntimeError, match=r"begin_step\(\) comes before the backward pass"):
        loss_of(net, 0).backward()


# ------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_survive_rounding(dtype: torch.dtype) -> None:
    """Updates far below a weight's last bit are lost without rounding and kept with it."""
    reached = {}
    for rounding in ("none", "stochastic", "kahan"):
        if rounding == "stochastic" and dtype == torch.float16:
            continue
        weight = nn.Parameter(torch.ones(4000).to(dtype))
        group = ParameterGroup(names=("w",), parameters=(weight,), lr=2e-5)
        optimizer = build([group], SgdOptimizer(), rounding=rounding, seed=1)
        for number in range(500):
            step = optimizer.begin_step(number, 1.0)
            weight.sum().backward()
            step.apply()
        residual = optimizer.state_dict()["w"]["rest"]
        value = weight.detach().float() if residual is None else weight.detach() + residual.float()
        reached[rounding] = value.mean().item()
    assert reached.pop("none") == 1.0
    # float32 gets to 0.99. Kahan's two bfloat16 have 16 bits: a step of 2e-5 is 2.6 of the last.
    assert reached.pop("kahan") == pytest.approx(0.99, abs=1e-3)
    for mean in reached.values():
        assert mean == pytest.approx(0.99, abs=4e-4)


def test_kahan_weights_follow_float32_weights() -> None:
    exact, low = Net(torch.bfloat16).float(), Net(torch.bfloat16)
    optimizers = (
        optimizer_over(exact, CHOICES["lion"]),
        optimizer_over(low, CHOICES["lion"], rounding="kahan"),
    )
    for number in range(20):
        steps = [optimizer.begin_step(number, 0.1) for optimizer in optimizers]
        for (_, a), (_, b) in zip(exact.named_parameters(), low.named_parameters(), strict=True):
            gradient = torch.randn(a.shape, generator=torch.Generator().manual_seed(number))
            b.grad = gradient.bfloat16()
            a.grad = b.grad.float()
        for step in steps:
            step.apply()
    residuals = {name: entry["rest"] for name, entry in optimizers[1].state_dict().items()}
    for name, parameter in low.named_parameters():
        expected = dict(exact.named_parameters())[name].detach()
        torch.testing.assert_close(
            parameter.detach() + residuals[name].float(), expected, rtol=2e-5, atol=2e-6
        )
        # The stored weight is the nearest bfloat16, up to the rounding of the residual.
        torch.testing.assert_close(parameter.detach().float(), expected, rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize("lr", [1e-4, 1e-5])
def test_kahan_weights_stay_close_to_float64(lr: float) -> None:
    """AdamW over 300 steps: bfloat16 with Kahan's residual stays within its 16 bits of float64,
    where bfloat16 alone does not even get away from its start."""
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).mul(0.05).bfloat16()

    def trained(dtype: torch.dtype, rounding: Rounding) -> Tensor:
        weight = nn.Parameter(start.to(dtype, copy=True))
        group = ParameterGroup(names=("w",), parameters=(weight,), lr=lr)
        optimizer = build([group], AdamWOptimizer(lr=lr), rounding=rounding)
        generator = torch.Generator().manual_seed(1)
        slope = torch.randn(64, 64, generator=generator)
        for number in range(300):
            step = optimizer.begin_step(number, 1.0)
            gradient = slope + torch.randn(64, 64, generator=generator)
            weight.grad = gradient.bfloat16().to(dtype)
            step.apply()
        residual = optimizer.state_dict()["w"]["rest"]
        return weight.detach().double() + (0 if residual is None else residual.double())

    exact = trained(torch.float64, "none")
    moved = (exact - start.double()).abs().mean()
    assert (trained(torch.bfloat16, "kahan") - exact).abs().mean() < 1e-2 * moved
    assert (trained(torch.bfloat16, "none") - exact).abs().mean() > 0.3 * moved


def test_rounding_updates_float32_weights_as_usual() -> None:
    net, plain = Net(), Net()
    net.second.to(torch.bfloat16)
    optimizer = optimizer_over(net, AdamWOptimizer(lr=1e-3), rounding="stochastic")
    steps = [
        optimizer.begin_step(0, 1.0),
        optimizer_over(plain, AdamWOptimizer(lr=1e-3)).begin_step(0, 1.0),
    ]
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        b.grad = torch.ones_like(b)
        a.grad = torch.ones_like(a)
    for step in steps:
        step.apply()
    assert torch.equal(net.first.weight, plain.first.weight)
    assert net.first.weight.dtype == torch.float32
    average = optimizer.state_dict()["second.weight"]["state"]["exp_avg"]
    assert average.dtype == torch.float32  # the optimizer has seen float32 values


def test_stochastic_rounding_depends_on_seed_trainable_weight_and_step() -> None:
    def updated(number: int = 0, **settings: Any) -> Tensor:
        weights = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
        group = ParameterGroup(names=("a", "b"), parameters=tuple(weights), lr=1e-3)
        settings = {"seed": 1, "name": "high", **settings}
        step = build([group], SgdOptimizer(), rounding="stochastic", **settings).begin_step(
            number, 1.0
        )
        for weight in weights:
            weight.sum().backward()
        step.apply()
        return torch.stack([w.detach() for w in weights])

    first = updated()
    assert torch.equal(first, updated())
    assert not torch.equal(first[0], first[1])
    for other in (updated(number=1), updated(seed=2), updated(name="low")):
        assert not torch.equal(first, other)


def test_a_stand_in_takes_no_memory_between_steps() -> None:
    net = Net(torch.bfloat16)
    optimizer = optimizer_over(net, AdamWOptimizer(), rounding="stochastic")
    train(net, optimizer, range(2))
    for managed in optimizer.parameters:
        assert managed.optimized.untyped_storage().nbytes() == 4
        assert managed.optimized.shape == managed.parameter.shape
        assert managed.optimized.grad is None


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_stand_in_is_given_its_gradient_only_while_it_has_values(rounding: Rounding) -> None:
    """Between steps it may be on another device than its weight, and PyTorch accepts no gradient
    from another device. Another shape stands for that here: PyTorch does not accept that either."""
    net = Net(torch.bfloat16)
    optimizer = optimizer_over(net, AdamWOptimizer(), rounding=rounding)
    for managed in optimizer.parameters:
        managed.optimized.data = torch.zeros(1)
    before = weights_of(net)
    train(net, optimizer, range(1))
    assert not are_equal(before, weights_of(net))


# ------------------------------------------------------------------------------------ on a device


@pytest.mark.parametrize("rounding", ["none", "stochastic", "kahan"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", PER_WEIGHT)
def test_training_on_a_device_is_bit_exact_after_a_stay_in_host_memory(
    accelerator: torch.device, name: str, fused: bool, rounding: Rounding
) -> None:
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    nets = Net(dtype), Net(dtype)
    optimizers = [optimizer_over(n, CHOICES[name], fused=fused, rounding=rounding) for n in nets]
    for number in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            for device in (HOST, accelerator) if net is nets[0] else (accelerator,):
                net.to(device)
                optimizer.to(device)
            step = optimizer.begin_step(number, 1.0)
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(number))
            net(x.to(accelerator, dtype)).float().square().mean().backward()
            step.clip_grad_norm(None)
            step.apply()
    assert are_equal(weights_of(nets[0]), weights_of(nets[1]))
    with optimizers[0].evaluating(), optimizers[1].evaluating():
        assert are_equal(weights_of(nets[0]), weights_of(nets[1]))
