"""The step of each optimizer: it learns, goes on exactly, and is the same fused and unfused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
)
from onewan.errors import ConfigError
from onewan.train.optim import averages_itself, needs_all_weights
from onewan.train.update import ParameterGroup, Rounding, Updater

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
ALONE = [name for name, choice in CHOICES.items() if needs_all_weights(choice) is None]
"""Those that can take one weight for itself."""


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao's functions as they are, without half a minute of compilation."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


class Net(nn.Module):
    """Two layers; the first is large enough (4096) that 8-bit states are 8-bit states."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 8, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


def _group(net: nn.Module, lr: float, part: slice = slice(None)) -> ParameterGroup:
    named = list(net.named_parameters())[part]
    return ParameterGroup(
        names=tuple(n for n, _ in named), parameters=tuple(p for _, p in named), lr=lr
    )


def _updater(net: nn.Module, choice: Optimizer, **settings: Any) -> Updater:
    """Over two groups, where the optimizer takes two rates."""
    second = choice.lr if choice.name == "prodigy" else 2 * choice.lr
    return Updater(
        [_group(net, choice.lr, slice(0, 2)), _group(net, second, slice(2, None))],
        choice,
        seed=7,
        **settings,
    )


def _loss(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 64, generator=generator)
    goal = x[:, :8] + 0.5 * x[:, 8:16]
    dtype = next(net.parameters()).dtype
    return F.mse_loss(net(x.to(dtype)).float(), goal)


def _train(net: nn.Module, updater: Updater, steps: range, limit: float | None = None) -> None:
    for step in steps:
        updater.begin(step, 1 - step / 100)
        _loss(net, step).backward()
        updater.norm(limit)
        updater.step()


def _bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def _equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", CHOICES)
def test_learns(name: str) -> None:
    net, choice = Net(), CHOICES[name]
    updater = _updater(net, choice)
    before = _loss(net, 1000).item()
    _train(net, updater, range(60))
    with updater.evaluating():
        assert _loss(net, 1000).item() < 0.8 * before
    assert all(p.grad is None for p in net.parameters())


def _cut_and_resumed(
    choice: Optimizer, dtype: torch.dtype, other: dict[str, Any] | None = None, **settings: Any
) -> None:
    uncut = Net(dtype)
    updater = _updater(uncut, choice, **settings)
    _train(uncut, updater, range(4))
    state, weights = _through_a_file(updater.state_dict()), _bits(uncut)
    _train(uncut, updater, range(4, 8))

    resumed = Net(dtype)
    for parameter in resumed.parameters():  # what a new process has before it reads the state
        nn.init.normal_(parameter)
    again = _updater(resumed, choice, **(settings if other is None else other))
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    _train(resumed, again, range(4, 8))
    assert _equal(_bits(uncut), _bits(resumed))
    assert again.lr == updater.lr
    with updater.evaluating(), again.evaluating():
        assert _equal(_bits(uncut), _bits(resumed))


@pytest.mark.parametrize("name", CHOICES)
def test_resumes_to_the_bit(name: str) -> None:
    _cut_and_resumed(CHOICES[name], torch.float32)


@pytest.mark.parametrize("name", CHOICES)
def test_resumes_to_the_bit_with_plain_bfloat16(name: str) -> None:
    """torch's own loading would cast float32 states to bfloat16."""
    _cut_and_resumed(CHOICES[name], torch.bfloat16)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_resumes_to_the_bit_with_rounding(name: str, fused: bool, rounding: Rounding) -> None:
    _cut_and_resumed(CHOICES[name], torch.bfloat16, rounding=rounding, fused=fused)


@pytest.mark.parametrize("name", ALONE)
def test_a_state_fits_with_and_without_the_fused_step(name: str) -> None:
    _cut_and_resumed(CHOICES[name], torch.float32, other={"fused": True}, fused=False)
    _cut_and_resumed(CHOICES[name], torch.float32, other={"fused": False}, fused=True)


@pytest.mark.parametrize("rounding", ["none", "stochastic", "kahan"])
@pytest.mark.parametrize("name", ALONE)
def test_fused_is_the_same_to_the_bit(name: str, rounding: Rounding) -> None:
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    plain, fused = Net(dtype), Net(dtype)
    one = _updater(plain, CHOICES[name], rounding=rounding)
    two = _updater(fused, CHOICES[name], rounding=rounding, fused=True)
    for step in range(5):
        for net, updater in ((plain, one), (fused, two)):
            updater.begin(step, 0.5)
            _loss(net, step).backward()
        assert all(p.grad is None for p in fused.parameters())
        assert torch.equal(one.norm(None), two.norm(None))
        assert not _equal(_bits(plain), _bits(fused))  # one has moved in the backward pass
        one.step()
        two.step()
        assert _equal(_bits(plain), _bits(fused))


@pytest.mark.parametrize("name", ["adamw_schedule_free", "adamw", "muon"])
def test_weights_without_a_gradient_count_their_steps_too(name: str) -> None:
    """A group's counters (schedule-free's) go on whether or not each weight took part."""
    nets = Net(), Net()
    updaters = _updater(nets[0], CHOICES[name]), _updater(nets[1], CHOICES[name], fused=True)
    for step in range(6):
        for net, updater in zip(nets, updaters, strict=True):
            updater.begin(step, 1.0)
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
            (net.first(x) if step in {0, 3} else net(x)).square().mean().backward()
            updater.step()
    assert _equal(_bits(nets[0]), _bits(nets[1]))


def test_rates_follow_the_factor_and_the_group() -> None:
    net = Net()
    updater = _updater(net, SgdOptimizer(lr=0.5))
    before = _bits(net)
    updater.begin(3, 0.1)
    assert updater.lr == pytest.approx(0.05)
    _loss(net, 0).backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    updater.step()
    for name, parameter in net.named_parameters():
        rate = 0.1 if name.startswith("second") else 0.05
        torch.testing.assert_close(parameter.detach(), before[name] - rate * gradients[name])


def test_rates_in_tensors_follow_the_factor() -> None:
    updater = _updater(Net(), AdamWLowBitOptimizer(lr=0.5))
    for factor in (0.1, 0.3):
        updater.begin(0, factor)
        rates = [group["lr"] for group in updater._groups.values()]
        assert all(isinstance(rate, Tensor) for rate in rates)
        assert [float(rate) for rate in rates] == pytest.approx([0.5 * factor, factor])


def test_prodigy_shows_the_rate_that_it_found() -> None:
    net = Net()
    updater = _updater(net, ProdigyOptimizer(d0=1e-3))
    updater.begin(0, 0.5)
    assert updater.lr == pytest.approx(0.5e-3)
    _train(net, updater, range(60))
    updater.begin(60, 0.5)
    assert updater.lr > 0.6e-3


def test_norm_and_limit() -> None:
    net = Net()
    updater = _updater(net, SgdOptimizer(lr=1.0))
    updater.begin(0, 1.0)
    _loss(net, 0).backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    before = [g.clone() for g in gradients]
    norm = updater.norm(None)
    assert norm.dtype == torch.float32
    assert norm.ndim == 0
    torch.testing.assert_close(norm.double(), exact)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients, strict=True))
    assert torch.equal(updater.norm(exact.item() / 4), norm)
    after = torch.cat([g.double().flatten() for g in gradients]).norm()
    torch.testing.assert_close(after, exact / 4, rtol=1e-4, atol=0)


def test_the_norm_of_bfloat16_gradients_is_computed_in_float32() -> None:
    weight = nn.Parameter(torch.zeros(300, 301, dtype=torch.bfloat16))
    group = ParameterGroup(names=("w",), parameters=(weight,), lr=0.1)
    for fused in (False, True):
        updater = Updater([group], SgdOptimizer(), fused=fused)
        updater.begin(0, 1.0)
        (weight * 1.0).sum().backward()
        torch.testing.assert_close(updater.norm(None).item(), (300 * 301) ** 0.5, rtol=1e-5, atol=0)
        updater.step()
        if not fused:
            weight.grad = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_survive_rounding(dtype: torch.dtype) -> None:
    """Updates far below a weight's last bit: plain weights stay, rounded ones arrive."""
    reached = {}
    for rounding in ("none", "stochastic", "kahan"):
        if rounding == "stochastic" and dtype == torch.float16:
            continue
        weight = nn.Parameter(torch.ones(4000).to(dtype))
        group = ParameterGroup(names=("w",), parameters=(weight,), lr=2e-5)
        updater = Updater([group], SgdOptimizer(), rounding=rounding, seed=1)
        for step in range(500):
            updater.begin(step, 1.0)
            weight.sum().backward()
            updater.step()
        rest = updater.state_dict()["w"]["rest"]
        whole = weight.detach().float() if rest is None else weight.detach() + rest.float()
        reached[rounding] = whole.mean().item()
    assert reached.pop("none") == 1.0
    # float32 gets to 0.99. Kahan's two bfloat16 have 16 bits: a step of 2e-5 is 2.6 of the last.
    assert reached.pop("kahan") == pytest.approx(0.99, abs=1e-3)
    for mean in reached.values():
        assert mean == pytest.approx(0.99, abs=4e-4)


def test_kahan_follows_float32() -> None:
    exact, low = Net(torch.bfloat16).float(), Net(torch.bfloat16)
    one = _updater(exact, CHOICES["lion"])
    two = _updater(low, CHOICES["lion"], rounding="kahan")
    for step in range(20):
        for updater in (one, two):
            updater.begin(step, 0.1)
        for (_, a), (_, b) in zip(exact.named_parameters(), low.named_parameters(), strict=True):
            gradient = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = gradient.bfloat16()
            a.grad = b.grad.float()
        one.step()
        two.step()
    rests = {name: entry["rest"] for name, entry in two.state_dict().items()}
    for name, parameter in low.named_parameters():
        wanted = dict(exact.named_parameters())[name].detach()
        torch.testing.assert_close(
            parameter.detach() + rests[name].float(), wanted, rtol=2e-5, atol=2e-6
        )
        # What is stored is the nearest bfloat16 up to Kahan's own rounding.
        torch.testing.assert_close(parameter.detach().float(), wanted, rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize("lr", [1e-4, 1e-5])
def test_kahan_against_float64(lr: float) -> None:
    """AdamW over 300 steps: bfloat16 with Kahan's rest stays within its 16 bits of float64, where
    bfloat16 alone does not even get away from its start."""
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).mul(0.05).bfloat16()

    def trained(dtype: torch.dtype, rounding: Rounding) -> Tensor:
        weight = nn.Parameter(start.to(dtype, copy=True))
        group = ParameterGroup(names=("w",), parameters=(weight,), lr=lr)
        updater = Updater([group], AdamWOptimizer(lr=lr), rounding=rounding)
        generator = torch.Generator().manual_seed(1)
        slope = torch.randn(64, 64, generator=generator)
        for step in range(300):
            updater.begin(step, 1.0)
            gradient = slope + torch.randn(64, 64, generator=generator)
            weight.grad = gradient.bfloat16().to(dtype)
            updater.step()
        rest = updater.state_dict()["w"]["rest"]
        return weight.detach().double() + (0 if rest is None else rest.double())

    exact = trained(torch.float64, "none")
    moved = (exact - start.double()).abs().mean()
    assert (trained(torch.bfloat16, "kahan") - exact).abs().mean() < 1e-2 * moved
    assert (trained(torch.bfloat16, "none") - exact).abs().mean() > 0.3 * moved


def test_rounding_leaves_float32_weights_to_simply_move() -> None:
    net, plain = Net(), Net()
    net.second.to(torch.bfloat16)
    updater = _updater(net, AdamWOptimizer(lr=1e-3), rounding="stochastic")
    other = _updater(plain, AdamWOptimizer(lr=1e-3))
    updater.begin(0, 1.0)
    other.begin(0, 1.0)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        b.grad = torch.ones_like(b)
        a.grad = torch.ones_like(a)
    updater.step()
    other.step()
    assert torch.equal(net.first.weight, plain.first.weight)
    assert net.first.weight.dtype == torch.float32
    moved = updater.state_dict()["second.weight"]["state"]["exp_avg"]
    assert moved.dtype == torch.float32  # the optimizer saw float32


def test_rounding_is_keyed_by_seed_part_weight_and_step() -> None:
    def moved(step: int = 0, **settings: Any) -> Tensor:
        weights = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
        group = ParameterGroup(names=("a", "b"), parameters=tuple(weights), lr=1e-3)
        settings = {"seed": 1, "name": "high", **settings}
        updater = Updater([group], SgdOptimizer(), rounding="stochastic", **settings)
        updater.begin(step, 1.0)
        for weight in weights:
            weight.sum().backward()
        updater.step()
        return torch.stack([w.detach() for w in weights])

    same = moved()
    assert torch.equal(same, moved())
    assert not torch.equal(same[0], same[1])
    for other in (moved(step=1), moved(seed=2), moved(name="low")):
        assert not torch.equal(same, other)


def test_a_fused_step_holds_one_gradient_at_a_time() -> None:
    """In a stack of checkpointed blocks, as each gradient is complete no other is left."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.SiLU()) for _ in range(6))
    parameters = list(blocks.parameters())
    held = []

    def count(_: Tensor) -> None:
        held.append(sum(p.grad is not None for p in parameters))

    for parameter in parameters:  # before the updater's own hooks, so that the gradient is there
        parameter.register_post_accumulate_grad_hook(count)
    updater = Updater([_group(blocks, 1e-3)], AdamWOptimizer(), fused=True)
    before = _bits(blocks)
    updater.begin(0, 1.0)
    x = torch.randn(4, 16)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
        assert isinstance(x, Tensor)
    x.square().mean().backward()
    assert held == [1] * len(parameters)
    updater.step()
    assert not any(torch.equal(before[n], p) for n, p in blocks.named_parameters())


@pytest.mark.parametrize("name", [n for n, c in CHOICES.items() if averages_itself(c)])
@pytest.mark.parametrize("rounding", ["none", "kahan"])
def test_averages_come_and_go_to_the_bit(name: str, rounding: Rounding) -> None:
    choice = CHOICES[name]
    if rounding != "none" and needs_all_weights(choice):
        pytest.skip("can't round")
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    nets = Net(dtype), Net(dtype)
    looked, not_looked = (_updater(net, choice, rounding=rounding) for net in nets)
    for step in range(10):
        before = _bits(nets[0])
        with looked.evaluating():
            if step > 1:  # the average of one step is that step
                assert not _equal(before, _bits(nets[0]))
        assert _equal(before, _bits(nets[0]))
        _train(nets[0], looked, range(step, step + 1))
        _train(nets[1], not_looked, range(step, step + 1))
        assert _equal(_bits(nets[0]), _bits(nets[1]))


def test_averages_are_those_of_the_library() -> None:
    from schedulefree import AdamWScheduleFree

    net, reference = Net(), Net()
    updater = Updater([_group(net, 1e-2)], AdamWScheduleFreeOptimizer())
    theirs = AdamWScheduleFree(reference.parameters(), lr=1e-2, weight_decay=0.01)
    theirs.train()
    for step in range(10):
        updater.begin(step, 1.0)
        for one in (net, reference):
            _loss(one, step).backward()
        updater.step()
        theirs.step()
        theirs.zero_grad()
    theirs.eval()
    with updater.evaluating():
        assert _equal(_bits(net), _bits(reference))
    assert not _equal(_bits(net), _bits(reference))


def test_averages_go_also_after_an_error() -> None:
    net = Net()
    updater = _updater(net, CHOICES["adamw_schedule_free"])
    _train(net, updater, range(3))
    before = _bits(net)
    with pytest.raises(KeyboardInterrupt), updater.evaluating():
        raise KeyboardInterrupt
    assert _equal(before, _bits(net))
    _train(net, updater, range(3, 4))


def test_evaluating_does_nothing_for_others() -> None:
    net = Net()
    updater = _updater(net, AdamWOptimizer())
    _train(net, updater, range(2))
    before = _bits(net)
    with updater.evaluating():
        assert _equal(before, _bits(net))


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "low_bit_8", "adamw_8bit", "came"])
@pytest.mark.parametrize("rounding", ["none", "kahan"])
def test_moves_to_a_device(name: str, rounding: Rounding) -> None:
    """All that a step uses goes along, except counters that torch keeps on the host."""
    net = Net(torch.bfloat16)
    updater = _updater(net, CHOICES[name], rounding=rounding)
    _train(net, updater, range(1))
    moved = _bits(net)
    updater.to(torch.device("cpu"))
    assert _equal(moved, _bits(net))
    updater.to(torch.device("meta"))
    for member in updater._members:
        assert member.rest is None or member.rest.is_meta
        for key, value in member.state.items():
            if isinstance(value, Tensor):
                assert value.is_meta is not (name == "low_bit_8" and key == "step")


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_stand_in_takes_gradients_only_while_it_has_numbers(rounding: Rounding) -> None:
    """Between steps it may lie on another device than its weight, and torch takes no gradient of
    another device. Another shape stands for that here: torch does not take that either."""
    net = Net(torch.bfloat16)
    updater = _updater(net, AdamWOptimizer(), rounding=rounding)
    for member in updater._members:
        member.subject.data = torch.zeros(1)
    before = _bits(net)
    _train(net, updater, range(1))
    assert not _equal(before, _bits(net))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("rounding", ["none", "stochastic", "kahan"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_trains_on_a_gpu_what_was_built_on_the_cpu(
    name: str, fused: bool, rounding: Rounding
) -> None:
    """And goes on there to the bit after a stay in host memory."""
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    nets = Net(dtype), Net(dtype)
    updaters = [_updater(net, CHOICES[name], fused=fused, rounding=rounding) for net in nets]
    for step in range(4):
        for net, updater in zip(nets, updaters, strict=True):
            for device in ("cpu", "cuda") if net is nets[0] else ("cuda",):
                net.to(device)
                updater.to(torch.device(device))
            updater.begin(step, 1.0)
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            net(x.to("cuda", dtype)).float().square().mean().backward()
            updater.norm(None)
            updater.step()
    assert _equal(_bits(nets[0]), _bits(nets[1]))
    with updaters[0].evaluating(), updaters[1].evaluating():
        assert _equal(_bits(nets[0]), _bits(nets[1]))


@pytest.mark.parametrize("fused", [False, True])
def test_muon_leaves_embeddings_to_adamw(fused: bool) -> None:
    moved = []
    for choice, name in (
        (MuonOptimizer(lr=1e-2), "embeddings"),
        (AdamWOptimizer(lr=1e-2), "embeddings"),
        (MuonOptimizer(lr=1e-2), "high"),
    ):
        torch.manual_seed(1)
        vectors = nn.Parameter(torch.randn(4, 32))
        group = ParameterGroup(names=("fox",), parameters=(vectors,), lr=1e-2)
        updater = Updater([group], choice, fused=fused, name=name)
        for step in range(3):
            updater.begin(step, 1.0)
            vectors.pow(4).sum().backward()
            updater.step()
        moved.append(vectors.detach())
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_prodigy_plus_finds_one_rate_for_groups_that_keep_theirs() -> None:
    net = Net()
    updater = _updater(net, ProdigyPlusOptimizer(d0=1e-3))
    _train(net, updater, range(40))
    first, second = updater._groups.values()
    assert first["d"] == second["d"] > 1e-3
    assert second["lr"] == 2 * first["lr"]


def test_settings_of_a_resumed_run_are_its_own() -> None:
    """A changed rate or decay holds; what the optimizer has learnt stays."""
    net = Net()
    updater = _updater(net, ProdigyOptimizer(d0=1e-3))
    _train(net, updater, range(6))
    again = _updater(Net(), ProdigyOptimizer(lr=0.5, d0=1e-3, weight_decay=0.3))
    again.load_state_dict(_through_a_file(updater.state_dict()))
    group = again._members[0].group
    assert group["weight_decay"] == 0.3
    assert group["k"] == 6
    again.begin(6, 1.0)
    updater.begin(6, 1.0)
    assert again.lr == pytest.approx(updater.lr / 2)
    again.load_state_dict(_updater(Net(), ProdigyOptimizer(d0=1e-3)).state_dict())
    assert group["k"] == 0  # a state from before the first step
    assert "d_hat" not in group
    assert not again._members[0].state


def test_a_state_is_a_copy_in_plain_containers() -> None:
    net = Net()
    updater = _updater(net, AdamWOptimizer())
    _train(net, updater, range(2))
    state = updater.state_dict()
    average = state["first.weight"]["state"]["exp_avg"].clone()
    other = _updater(Net(), AdamWOptimizer())
    other.load_state_dict(state)
    _train(net, updater, range(2, 3))
    assert torch.equal(state["first.weight"]["state"]["exp_avg"], average)
    assert type(state) is dict


def test_a_state_of_other_weights_is_refused() -> None:
    state = _updater(Net(), AdamWOptimizer()).state_dict()
    updater = _updater(Net(), AdamWOptimizer())
    with pytest.raises(ValueError, match=r"first\.bias is only in this run"):
        updater.load_state_dict({k: v for k, v in state.items() if k != "first.bias"})
    with pytest.raises(ValueError, match="more is only in the state"):
        updater.load_state_dict({**state, "more": state["first.bias"]})
    state["first.bias"]["shape"] = [63]
    with pytest.raises(ValueError, match=r"first\.bias: the state is of shape \[63\], not \(64,\)"):
        updater.load_state_dict(state)


def test_kahan_states_go_into_other_roundings() -> None:
    kahan = _updater(Net(torch.bfloat16), CHOICES["adamw"], rounding="kahan")
    other = _updater(Net(torch.bfloat16), CHOICES["adamw"], rounding="stochastic")
    other.load_state_dict(kahan.state_dict())
    kahan.load_state_dict(other.state_dict())
    assert kahan._members[0].rest is not None


def test_misuse_is_refused() -> None:
    net = Net()
    updater = _updater(net, AdamWOptimizer())
    with pytest.raises(RuntimeError, match=r"begin\(\) comes before step\(\)"):
        updater.step()
    fused = _updater(net, AdamWOptimizer(), fused=True)
    with pytest.raises(RuntimeError, match=r"begin\(\) comes before the backward pass"):
        _loss(net, 0).backward()
    fused.begin(0, 1.0)
    _loss(net, 0).backward()
    with pytest.raises(RuntimeError, match="takes one backward pass"):
        _loss(net, 0).backward()
    with pytest.raises(ValueError, match="can't limit"):
        fused.norm(1.0)
    with pytest.raises(ValueError, match="a name of its own"):
        Updater([_group(net, 1.0), _group(net, 1.0)], AdamWOptimizer())


def test_what_an_optimizer_cannot_do_is_said_at_once() -> None:
    net = Net(torch.bfloat16)
    with pytest.raises(ConfigError) as caught:
        Updater([_group(net, 1.0)], ProdigyOptimizer(), rounding="kahan", fused=True)
    text = str(caught.value)
    assert "2 problems" in text
    assert "method.weights: kahan moves each weight by itself, and optimizer.name 'prodigy'" in text
    assert "it finds one learning rate from all weights together" in text
    assert "method.fused_step: true moves each weight by itself" in text
    Updater([_group(Net(), 1.0)], ProdigyOptimizer(), rounding="kahan")  # float32: nothing to round
    with pytest.raises(ConfigError, match="stochastic rounding is for bfloat16, and the weights"):
        Updater([_group(Net(torch.float16), 1.0)], AdamWOptimizer(), rounding="stochastic")


def test_rounding_takes_no_memory_between_steps() -> None:
    net = Net(torch.bfloat16)
    updater = _updater(net, AdamWOptimizer(), rounding="stochastic")
    _train(net, updater, range(2))
    for member in updater._members:
        assert member.subject.untyped_storage().nbytes() == 4
        assert member.subject.shape == member.parameter.shape
        assert member.subject.grad is None


def test_a_saved_state_needs_no_code_to_read(tmp_path: Path) -> None:
    for name in CHOICES:
        updater = _updater(net := Net(), CHOICES[name])
        _train(net, updater, range(1))
        torch.save(updater.state_dict(), tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True).keys() == _bits(net).keys()
