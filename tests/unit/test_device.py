"""The choice of the device, its memory and its rate."""

from __future__ import annotations

import pytest
import simulated_gpu
import torch

from onewan.errors import ConfigError
from onewan.memory.device import (
    MEMORY_FRACTION,
    device_memory,
    empty_cache_near,
    limit_memory,
    matrix_product_rate,
    reset_peak,
    resolve_device,
)


def test_auto_is_the_cpu_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_cpu_has_one_name(name: str) -> None:
    assert resolve_device(name) == torch.device("cpu")


@pytest.mark.parametrize(
    "name", ["gpu", "CPU", "", "cpu:x", "cuda 1", "cuda:99", "hpu", "xla", "vulkan", "meta"]
)
def test_a_device_that_is_not_there_is_the_users_error(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_device(name)
    (problem,) = caught.value.details
    assert problem.startswith(f"model.device: {name!r} ")
    assert problem.endswith("; try auto or cpu")
    assert "\n" not in problem


def test_memory_is_unknown_on_a_cpu() -> None:
    assert device_memory(torch.device("cpu")) == (None, None)


def test_memory_is_limited_to_what_was_given_or_nearly_all(sim: torch.device) -> None:
    simulated_gpu.set_capacity(100 << 20)
    assert limit_memory(sim) == int((100 << 20) * MEMORY_FRACTION)
    limit = limit_memory(sim, 40 << 20)
    assert limit == 40 << 20
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(50 << 20, dtype=torch.uint8, device=sim)
    # More than there is means nearly all.
    assert limit_memory(sim, 1 << 40) == int((100 << 20) * MEMORY_FRACTION)
    assert limit_memory(torch.device("cpu"), 1) is None


def test_the_cache_is_emptied_only_near_the_limit(sim: torch.device) -> None:
    module = torch.get_device_module(sim)
    empty = module.memory_reserved(sim)
    held = torch.empty(4 << 20, dtype=torch.uint8, device=sim)
    reserved = module.memory_reserved(sim)
    del held
    empty_cache_near(sim, 2 * reserved)
    assert module.memory_reserved(sim) == reserved > empty
    empty_cache_near(sim, reserved)
    assert module.memory_reserved(sim) < reserved
    empty_cache_near(torch.device("cpu"), None)


def test_the_rate_of_matrix_products_is_measured_on_an_accelerator(sim: torch.device) -> None:
    rate = matrix_product_rate(sim, torch.float32, seconds=0.02)
    assert rate is not None and 1e7 < rate < 1e16
    assert matrix_product_rate(torch.device("cpu"), torch.float32) is None


def test_the_peak_can_begin_anew(sim: torch.device) -> None:
    large = torch.empty(4 << 20, dtype=torch.uint8, device=sim)
    del large
    allocated, peak = device_memory(sim)
    assert allocated is not None and peak is not None and peak >= allocated + (4 << 20)
    reset_peak(sim)
    assert device_memory(sim) == (allocated, allocated)
