"""Rounding to bfloat16: the expected result is the value, and representable values stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onewan.train.rounding import round_with_residual, stochastic_round_


def rounded(source: Tensor, seed: int = 0) -> Tensor:
    target = torch.full(source.shape, 7.0, dtype=torch.bfloat16)
    stochastic_round_(target, source, torch.Generator().manual_seed(seed))
    return target


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -1e-20, 1.9999, 6e-39])
def test_the_mean_of_many_roundings_is_the_value(value: float) -> None:
    source = torch.full((200_000,), value)
    results = rounded(source).double()
    neighbours = results.unique()
    assert len(neighbours) == 2
    gap = (neighbours[1] - neighbours[0]).item()
    assert neighbours[0] < source[0].double() < neighbours[1]
    # The standard deviation of the mean is at most gap / 2 / sqrt(200 000).
    assert abs(results.mean().item() - source[0].double().item()) < 6 * gap / 2 / 200_000**0.5


def test_each_value_becomes_one_of_its_two_neighbours() -> None:
    source = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    bits = source.view(torch.int32)
    lower = (bits & -65536).view(torch.float32)
    upper = ((bits & -65536) + 65536).view(torch.float32)
    results = rounded(source).float()
    assert ((results == lower) | (results == upper)).all()
    assert (results == lower).any()
    assert (results == upper).any()


def test_values_that_bfloat16_represents_stay() -> None:
    exact = torch.randn(10_000).bfloat16()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf]).bfloat16()
    for values in (exact, special):
        assert torch.equal(rounded(values.float()).view(torch.int16), values.view(torch.int16))
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert rounded(nans).isnan().all()


def test_rounding_depends_on_the_generator_alone() -> None:
    source = torch.randn(1000)
    first = rounded(source, 3)
    torch.rand(5)
    assert torch.equal(first, rounded(source, 3))
    assert not torch.equal(first, rounded(source, 4))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"not torch\.float32 to torch\.float16"):
        stochastic_round_(torch.zeros(2).half(), torch.zeros(2), torch.Generator())
    with pytest.raises(TypeError, match=r"not torch\.bfloat16 to torch\.bfloat16"):
        stochastic_round_(torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16(), torch.Generator())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_is_what_rounding_took_off(dtype: torch.dtype) -> None:
    source = torch.randn(10_000)
    high, residual = round_with_residual(source, dtype)
    assert torch.equal(high, source.to(dtype))
    assert high.dtype == residual.dtype == dtype
    error = (high.float() + residual.float() - source).abs()
    assert (error <= source.abs() * 2.0**-16 + 2.0**-25).all()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38 * 1.1])
    high, residual = round_with_residual(special, dtype)
    assert torch.equal(residual[:3], torch.zeros(3, dtype=dtype))
    assert residual.isfinite().all()
    assert torch.equal(high.isnan(), special.isnan())
