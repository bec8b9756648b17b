"""Moving averages: equal to a plain loop and to diffusers, and bit-exact when resumed."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from onewan.train.ema import Ema


def some_weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(2)
    return {
        "a": nn.Parameter(torch.randn(5, 3).to(dtype)),
        "b": nn.Parameter(torch.randn(7).to(dtype)),
    }


def change(weights: dict[str, nn.Parameter], step: int) -> None:
    for weight in weights.values():
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype))


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_follow_their_definition(offload: bool, dtype: torch.dtype) -> None:
    weights = some_weights(dtype)
    ema = Ema(weights, 0.6, offload=offload)
    expected = {name: weight.detach().double() for name, weight in weights.items()}
    for count in range(20):
        change(weights, count)
        ema.update(count)
        decay = min(0.6, (1 + count) / (10 + count))
        for name, weight in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
        averages = ema.state_dict()
        assert list(averages) == ["a", "b"]
        for (
            name,
            average,
        ) in averages.items():  # at each update, since the first decays have no effect later
            assert average.dtype == torch.float32
            torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_averages_start_as_copies_of_the_weights() -> None:
    weights = some_weights()
    ema = Ema(weights, 0.9, offload=False)
    first = weights["a"].detach().clone()
    change(weights, 0)
    assert torch.equal(ema.state_dict()["a"], first)
    ema.state_dict()["a"].zero_()
    assert torch.equal(ema.state_dict()["a"], first)


def test_averages_agree_with_diffusers_after_its_warm_up() -> None:
    """Its warm-up has another decay; later, both have the requested decay."""
    weights = some_weights()
    theirs = EMAModel(list(weights.values()), decay=0.3, use_ema_warmup=False)
    ema = Ema(weights, 0.3, offload=True)
    for count in range(4, 12):
        change(weights, count)
        theirs.optimization_step = count + 1
        theirs.step(list(weights.values()))
        ema.update(count + 2)
    for average, other in zip(ema.state_dict().values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(average, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_bit_exact_after_applied(dtype: torch.dtype) -> None:
    weights = some_weights(dtype)
    ema = Ema(weights, 0.9, offload=True)
    change(weights, 1)
    ema.update(0)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    averages = ema.state_dict()
    with pytest.raises(KeyboardInterrupt), ema.applied():
        for name, weight in weights.items():
            assert torch.equal(weight, averages[name].to(dtype))
            assert not torch.equal(weight, before[name])
        raise KeyboardInterrupt
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        assert torch.equal(ema.state_dict()[name], averages[name])


def test_resuming_is_bit_exact() -> None:
    weights = some_weights()
    uninterrupted = Ema(weights, 0.9, offload=True)
    for count in range(3):
        change(weights, count)
        uninterrupted.update(count)
    state = {name: average.clone() for name, average in uninterrupted.state_dict().items()}
    resumed = Ema(weights, 0.9, offload=False)
    resumed.load_state_dict(state)
    for count in range(3, 6):
        change(weights, count)
        uninterrupted.update(count)
        resumed.update(count)
    assert all(
        torch.equal(uninterrupted.state_dict()[n], a) for n, a in resumed.state_dict().items()
    )


def test_reset_starts_at_the_weights() -> None:
    weights = some_weights()
    ema = Ema(weights, 0.9, offload=True)
    change(weights, 0)
    ema.reset()
    assert all(torch.equal(average, weights[name]) for name, average in ema.state_dict().items())
    change(weights, 1)
    assert not torch.equal(ema.state_dict()["a"], weights["a"])


def test_averages_of_other_weights_are_refused() -> None:
    ema = Ema(some_weights(), 0.9, offload=True)
    state: dict[str, Tensor] = ema.state_dict()
    with pytest.raises(ValueError, match="b is only in this run"):
        ema.load_state_dict({"a": state["a"]})
    with pytest.raises(ValueError, match=r"b: has the shape \(1,\), not \(7,\)"):
        ema.load_state_dict({"a": state["a"], "b": torch.zeros(1)})


def test_offloaded_averages_stay_in_host_memory_and_others_move() -> None:
    offloaded, beside = (
        Ema(some_weights(), 0.9, offload=True),
        Ema(some_weights(), 0.9, offload=False),
    )
    for ema in (offloaded, beside):
        ema.to(torch.device("meta"))
    assert all(average.device.type == "cpu" for average in offloaded.averages.values())
    assert all(average.is_meta for average in beside.averages.values())


def test_an_average_without_weights_is_empty() -> None:
    ema = Ema({}, 0.9, offload=True)
    ema.update(0)
    with ema.applied():
        assert ema.state_dict() == {}
