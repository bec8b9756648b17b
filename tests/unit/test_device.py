"""The choice of the device; `test_residency.py` has the case of an accelerator that is there."""

from __future__ import annotations

import pytest
import torch

from onewan.errors import ConfigError
from onewan.memory.device import device_memory, resolve_device


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
