"""Rounding to bfloat16: the mean is right, and what can stay as it is stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onewan.train.rounding import split, stochastic_round_


def _rounded(source: Tensor, seed: int = 0) -> Tensor:
    target = torch.full(source.shape, 7.0, dtype=torch.bfloat16)
    stochastic_round_(target, source, torch.Generator().manual_seed(seed))
    return target


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -1e-20, 1.9999, 6e-39])
def test_the_mean_is_the_number(value: float) -> None:
    source = torch.full((200_000,), value)
    rounded = _rounded(source).double()
    neighbours = rounded.unique()
    assert len(neighbours) == 2
    gap = (neighbours[1] - neighbours[0]).item()
    assert neighbours[0] < source[0].double() < neighbours[1]
    # The standard deviation of the mean is at most gap / 2 / sqrt(200 000).
    assert abs(rounded.mean().item() - source[0].double().item()) < 6 * gap / 2 / 200_000**0.5


def test_stays_within_one_unit_and_on_the_neighbours() -> None:
    source = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    bits = source.view(torch.int32)
    lower = (bits & -65536).view(torch.float32)
    upper = ((bits & -65536) + 65536).view(torch.float32)
    rounded = _rounded(source).float()
    assert ((rounded == lower) | (rounded == upper)).all()
    assert (rounded == lower).any()
    assert (rounded == upper).any()


def test_numbers_that_a_bfloat16_has_stay() -> None:
    exact = torch.randn(10_000).bfloat16()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf]).bfloat16()
    for numbers in (exact, special):
        assert torch.equal(_rounded(numbers.float()).view(torch.int16), numbers.view(torch.int16))
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert _rounded(odd).isnan().all()


def test_depends_on_the_generator_alone() -> None:
    source = torch.randn(1000)
    first = _rounded(source, 3)
    torch.rand(5)
    assert torch.equal(first, _rounded(source, 3))
    assert not torch.equal(first, _rounded(source, 4))


def test_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match=r"not torch\.float32 to torch\.float16"):
        stochastic_round_(torch.zeros(2).half(), torch.zeros(2), torch.Generator())
    with pytest.raises(TypeError, match=r"not torch\.bfloat16 to torch\.bfloat16"):
        stochastic_round_(torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16(), torch.Generator())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_split_keeps_what_is_rounded_off(dtype: torch.dtype) -> None:
    source = torch.randn(10_000)
    high, rest = split(source, dtype)
    assert torch.equal(high, source.to(dtype))
    assert high.dtype == rest.dtype == dtype
    error = (high.float() + rest.float() - source).abs()
    assert (error <= source.abs() * 2.0**-16 + 2.0**-25).all()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38 * 1.1])
    high, rest = split(odd, dtype)
    assert torch.equal(rest[:3], torch.zeros(3, dtype=dtype))
    assert rest.isfinite().all()
    assert torch.equal(high.isnan(), odd.isnan())
