"""The accelerator that tests compute on: the simulated one, or a real one of this machine.

``ONEWAN_TEST_DEVICE=cuda`` (PyTorch's name of a device) chooses a real one, for the tests that take
the fixture `accelerator`. The simulated accelerator is not loaded then: PyTorch would take it for
the machine's own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

VARIABLE = "ONEWAN_TEST_DEVICE"
NAME = os.environ.get(VARIABLE) or "sim"
IS_SIMULATED = NAME == "sim"
if IS_SIMULATED:
    import simulated_gpu  # registers the device
else:
    # Steps are compared bit for bit. Only for a whole process, since fixtures of a module compute
    # before those of a test, and without `warn_only`, which leaves attention as it is.
    torch.use_deterministic_algorithms(True)

DEVICE = torch.device(NAME, 0)
MEMORY = torch.get_device_module(DEVICE)
"""PyTorch's module for it, such as `torch.cuda`."""

simulated_only = pytest.mark.skipif(
    not IS_SIMULATED, reason="only the simulated accelerator counts this or has this limit"
)
real_only = pytest.mark.skipif(
    IS_SIMULATED, reason=f"only a real accelerator has this; {VARIABLE}=cuda chooses one"
)


@contextmanager
def checked(*, where: bool = True) -> Iterator[None]:
    """On the simulated accelerator, an access without an order is an error at the end (without
    `where` in half the time, but not by its lines), and copies arrive as late as they may. On a
    real one, such an access can only give other numbers."""
    if not IS_SIMULATED:
        yield
        return
    with simulated_gpu.sanitizer(where=where) as found, simulated_gpu.late_copies():
        yield
    found.raise_if_any()


@contextmanager
def waits_of_the_host() -> Iterator[list[str]]:
    """The list is filled, at the end, with the places where the host waited for the device."""
    places: list[str] = []
    if IS_SIMULATED:
        with simulated_gpu.trace(where=True) as trace:
            yield places
        places += trace.waits().elements()
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places += [
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    ]


def assert_near(found: Tensor, expected: Tensor, name: str, *, within: float) -> None:
    """On the simulated accelerator, which has the kernels of the CPU: the same bits. On a real one,
    whose kernels sum in another order: `within` of `expected`, relative to its norm."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, name
    if torch.equal(found.cpu(), expected.cpu()):
        return
    difference = (found.cpu().double() - expected.cpu().double()).norm()
    relative = float(difference / expected.cpu().double().norm().clamp(min=1e-12))
    limit = 0.0 if IS_SIMULATED else within
    assert relative <= limit, f"{name} differs by {relative:.2g}, more than {limit:g}"
