"""Averages of weights: against a plain loop and diffusers, to the bit and back."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from onewan.train.ema import Ema


def _weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(2)
    return {
        "a": nn.Parameter(torch.randn(5, 3).to(dtype)),
        "b": nn.Parameter(torch.randn(7).to(dtype)),
    }


def _move(weights: dict[str, nn.Parameter], step: int) -> None:
    for weight in weights.values():
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype))


@pytest.mark.parametrize("device", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_average_by_its_definition(device: str, dtype: torch.dtype) -> None:
    weights = _weights(dtype)
    ema = Ema(weights, 0.6, device)  # pyright: ignore
    expected = {name: weight.detach().double() for name, weight in weights.items()}
    for count in range(20):
        _move(weights, count)
        ema.update(count)
        decay = min(0.6, (1 + count) / (10 + count))
        for name, weight in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
        averages = ema.tensors()
        assert list(averages) == ["a", "b"]
        for name, average in averages.items():  # each time: the first decays are soon forgotten
            assert average.dtype == torch.float32
            torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_starts_as_the_weights_and_is_a_copy() -> None:
    weights = _weights()
    ema = Ema(weights, 0.9, "device")
    first = weights["a"].detach().clone()
    _move(weights, 0)
    assert torch.equal(ema.tensors()["a"], first)
    ema.tensors()["a"].zero_()
    assert torch.equal(ema.tensors()["a"], first)


def test_agrees_with_diffusers_once_warm() -> None:
    """Its first steps have another decay; later, both have the decay that was asked for."""
    weights = _weights()
    theirs = EMAModel(list(weights.values()), decay=0.3, use_ema_warmup=False)
    ema = Ema(weights, 0.3, "host")
    for count in range(4, 12):
        _move(weights, count)
        theirs.optimization_step = count + 1
        theirs.step(list(weights.values()))
        ema.update(count + 2)
    for average, other in zip(ema.tensors().values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(average, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_gives_the_weights_back_to_the_bit(dtype: torch.dtype) -> None:
    weights = _weights(dtype)
    ema = Ema(weights, 0.9, "host")
    _move(weights, 1)
    ema.update(0)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    averages = ema.tensors()
    with pytest.raises(KeyboardInterrupt), ema.applied():
        for name, weight in weights.items():
            assert torch.equal(weight, averages[name].to(dtype))
            assert not torch.equal(weight, before[name])
        raise KeyboardInterrupt
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        assert torch.equal(ema.tensors()[name], averages[name])


def test_resumes_to_the_bit() -> None:
    weights = _weights()
    uncut = Ema(weights, 0.9, "host")
    for count in range(3):
        _move(weights, count)
        uncut.update(count)
    state = {name: average.clone() for name, average in uncut.state_dict().items()}
    resumed = Ema(weights, 0.9, "device")
    resumed.load_state_dict(state)
    for count in range(3, 6):
        _move(weights, count)
        uncut.update(count)
        resumed.update(count)
    assert all(torch.equal(uncut.tensors()[n], a) for n, a in resumed.tensors().items())


def test_restarts_from_the_weights() -> None:
    weights = _weights()
    ema = Ema(weights, 0.9, "host")
    _move(weights, 0)
    ema.restart()
    assert all(torch.equal(average, weights[name]) for name, average in ema.tensors().items())
    _move(weights, 1)
    assert not torch.equal(ema.tensors()["a"], weights["a"])


def test_other_weights_are_refused() -> None:
    ema = Ema(_weights(), 0.9, "host")
    state: dict[str, Tensor] = ema.state_dict()
    with pytest.raises(ValueError, match="b is only on one side"):
        ema.load_state_dict({"a": state["a"]})
    with pytest.raises(ValueError, match=r"b: has the shape \(1,\), not \(7,\)"):
        ema.load_state_dict({"a": state["a"], "b": torch.zeros(1)})


def test_lies_where_it_is_told() -> None:
    host, device = Ema(_weights(), 0.9, "host"), Ema(_weights(), 0.9, "device")
    for ema in (host, device):
        ema.to(torch.device("meta"))
    assert all(average.device.type == "cpu" for average in host._averages.values())
    assert all(average.is_meta for average in device._averages.values())


def test_of_nothing_is_nothing() -> None:
    ema = Ema({}, 0.9, "host")
    ema.update(0)
    with ema.applied():
        assert ema.tensors() == {}
