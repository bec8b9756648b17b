"""A trainable's optimizer learns, follows learning rates, measures and clips gradients."""

from __future__ import annotations

import pytest
import torch
from support.optimizers import (
    CHOICES,
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

from onewan.config.optimizer import (
    AdamWLowBitOptimizer,
    AdamWOptimizer,
    MuonOptimizer,
    ProdigyOptimizer,
    ProdigyPlusOptimizer,
    SgdOptimizer,
)
from onewan.errors import ConfigError
from onewan.train.optimizers.parameters import ParameterGroup
from onewan.train.rounding import Rounding


@pytest.mark.parametrize("name", CHOICES)
def test_training_lowers_the_loss(name: str) -> None:
    net, choice = Net(), CHOICES[name]
    optimizer = optimizer_over(net, choice)
    before = loss_of(net, 1000).item()
    train(net, optimizer, range(60))
    with optimizer.evaluating():
        assert loss_of(net, 1000).item() < 0.8 * before
    assert all(p.grad is None for p in net.parameters())


def test_learning_rates_follow_the_factor_and_the_group() -> None:
    net = Net()
    optimizer = optimizer_over(net, SgdOptimizer(lr=0.5))
    before = weights_of(net)
    step = optimizer.begin_step(3, 0.1)
    assert optimizer.lr == pytest.approx(0.05)
    loss_of(net, 0).backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    step.apply()
    for name, parameter in net.named_parameters():
        lr = 0.1 if name.startswith("second") else 0.05
        torch.testing.assert_close(parameter.detach(), before[name] - lr * gradients[name])


def test_learning_rates_in_tensors_follow_the_factor() -> None:
    optimizer = optimizer_over(Net(), AdamWLowBitOptimizer(lr=0.5))
    for factor in (0.1, 0.3):
        optimizer.begin_step(0, factor)
        groups = {id(m.group): m.group for m in optimizer.parameters}
        rates = [group["lr"] for group in groups.values()]
        assert all(isinstance(rate, Tensor) for rate in rates)
        assert [float(rate) for rate in rates] == pytest.approx([0.5 * factor, factor])


def test_the_learning_rate_shown_for_prodigy_is_its_estimate() -> None:
    net = Net()
    optimizer = optimizer_over(net, ProdigyOptimizer(d0=1e-3))
    optimizer.begin_step(0, 0.5)
    assert optimizer.lr == pytest.approx(0.5e-3)
    train(net, optimizer, range(60))
    optimizer.begin_step(60, 0.5)
    assert optimizer.lr > 0.6e-3


def test_prodigy_plus_estimates_one_learning_rate_and_groups_keep_their_ratio() -> None:
    net = Net()
    optimizer = optimizer_over(net, ProdigyPlusOptimizer(d0=1e-3))
    train(net, optimizer, range(40))
    first, second = {id(m.group): m.group for m in optimizer.parameters}.values()
    assert first["d"] == second["d"] > 1e-3
    assert second["lr"] == 2 * first["lr"]


def test_gradients_are_measured_without_a_limit_and_clipped_to_one() -> None:
    net = Net()
    step = optimizer_over(net, SgdOptimizer(lr=1.0)).begin_step(0, 1.0)
    loss_of(net, 0).backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    before = [g.clone() for g in gradients]
    norm = step.clip_grad_norm(None)
    assert norm.dtype == torch.float32
    assert norm.ndim == 0
    torch.testing.assert_close(norm.double(), exact)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients, strict=True))
    assert torch.equal(step.clip_grad_norm(exact.item() / 4), norm)
    after = torch.cat([g.double().flatten() for g in gradients]).norm()
    torch.testing.assert_close(after, exact / 4, rtol=1e-4, atol=0)


def test_the_norm_of_bfloat16_gradients_is_computed_in_float32() -> None:
    weight = nn.Parameter(torch.zeros(300, 301, dtype=torch.bfloat16))
    group = ParameterGroup(names=("w",), parameters=(weight,), lr=0.1)
    for fused in (False, True):
        step = build([group], SgdOptimizer(), fused=fused).begin_step(0, 1.0)
        (weight * 1.0).sum().backward()
        norm = step.clip_grad_norm(None).item()
        torch.testing.assert_close(norm, (300 * 301) ** 0.5, rtol=1e-5, atol=0)
        step.apply()
        if not fused:
            weight.grad = None


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "low_bit_8", "adamw_8bit", "came"])
@pytest.mark.parametrize("rounding", ["none", "kahan"])
def test_all_that_a_step_uses_moves_to_the_device(name: str, rounding: Rounding) -> None:
    """Except the step counters that PyTorch keeps on the CPU."""
    net = Net(torch.bfloat16)
    optimizer = optimizer_over(net, CHOICES[name], rounding=rounding)
    train(net, optimizer, range(1))
    before = weights_of(net)
    optimizer.to(torch.device("cpu"))
    assert are_equal(before, weights_of(net))
    optimizer.to(torch.device("meta"))
    for managed in optimizer.parameters:
        assert managed.residual is None or managed.residual.is_meta
        for key, value in managed.state.items():
            if isinstance(value, Tensor):
                assert value.is_meta is not (name == "low_bit_8" and key == "step")


@pytest.mark.parametrize("fused", [False, True])
def test_muon_updates_embeddings_by_adamw(fused: bool) -> None:
    results = []
    for choice, name in (
        (MuonOptimizer(lr=1e-2), "embeddings"),
        (AdamWOptimizer(lr=1e-2), "embeddings"),
        (MuonOptimizer(lr=1e-2), "high"),
    ):
        torch.manual_seed(1)
        vectors = nn.Parameter(torch.randn(4, 32))
        group = ParameterGroup(names=("fox",), parameters=(vectors,), lr=1e-2)
        optimizer = build([group], choice, fused=fused, name=name)
        for number in range(3):
            step = optimizer.begin_step(number, 1.0)
            vectors.pow(4).sum().backward()
            step.apply()
        results.append(vectors.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("rounding", ["none", "kahan"])
def test_a_step_is_applied_once(rounding: Rounding) -> None:
    net = Net(torch.bfloat16)
    optimizer = optimizer_over(net, AdamWOptimizer(), rounding=rounding)
    step = optimizer.begin_step(0, 1.0)
    loss_of(net, 0).backward()
    step.apply()
    before = weights_of(net)
    with pytest.raises(RuntimeError, match=r"has been applied; begin_step\(\) gives the next one"):
        step.apply()
    assert are_equal(before, weights_of(net))


def test_weights_of_equal_names_are_refused() -> None:
    net = Net()
    for groups in ([group_of(net, 1.0), group_of(net, 1.0)], []):
        with pytest.raises(ValueError, match="a name of its own"):
            build(groups, AdamWOptimizer())


def test_an_optimizer_of_all_weights_at_once_refuses_rounding_and_the_fused_step() -> None:
    net = Net(torch.bfloat16)
    with pytest.raises(ConfigError) as caught:
        build([group_of(net, 1.0)], ProdigyOptimizer(), rounding="kahan", fused=True)
    text = str(caught.value)
    assert "2 problems" in text
    assert (
        "method.weights: kahan updates each weight separately, which optimizer.name 'prodigy'"
        in text
    )
    assert "it estimates one learning rate from all weights together" in text
    assert "method.fused_step: true updates each weight separately" in text
    # There is nothing to round in float32 weights.
    build([group_of(Net(), 1.0)], ProdigyOptimizer(), rounding="kahan")


def test_stochastic_rounding_of_float16_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="stochastic rounding is for bfloat16, and the weights"):
        build([group_of(Net(torch.float16), 1.0)], AdamWOptimizer(), rounding="stochastic")
