"""Fixtures for all tests: the simulated accelerator, and the material beside the repository."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import SkipTest

import pytest

if TYPE_CHECKING:
    import torch

# The same tests everywhere: accelerators of this machine are hidden, also from the processes that
# tests start. `ONEWAN_DEVICE=auto` leaves them where they are, and with ONEWAN_TEST_DEVICE they are
# there for the tests that take the fixture `accelerator`.
TEST_DEVICE = os.environ.get("ONEWAN_TEST_DEVICE") or "sim"
if "ONEWAN_DEVICE" not in os.environ:
    os.environ["ONEWAN_DEVICE"] = "cpu"
if os.environ["ONEWAN_DEVICE"] == "cpu" and TEST_DEVICE == "sim":
    os.environ |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "-1")
    os.environ["ONEAPI_DEVICE_SELECTOR"] = "opencl:cpu"

# A shell starts what runs in its background with Ctrl-C ignored, which processes inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# With which cuBLAS gives the same results each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tiny models are faster on one thread, and tests run side by side. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None]:
    """Import the tests, and with them torch and diffusers, without looking for garbage in between;
    what they imported is not looked through later either."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before `-m accelerator` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Load the simulated accelerator before the first test, where one of them needs it.

    PyTorch starts its threads for devices at the first backward pass of a process, and only for the
    devices that it knows by then.
    """
    for item in items:
        if "accelerator" in getattr(item, "fixturenames", ()):
            item.add_marker("accelerator")
    if TEST_DEVICE != "sim":
        return
    if any({"sim", "accelerator"} & set(getattr(item, "fixturenames", ())) for item in items):
        with contextlib.suppress(SkipTest):  # each of those tests says so
            import simulated_gpu  # noqa: F401


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The simulated accelerator, with fresh statistics and without a limit.

    Tests that look for an accelerator do not find it: outside of the fixture it is not available.
    Skips where there is no C++ compiler; in CI that is an error.
    """
    import simulated_gpu
    import torch

    monkeypatch.delenv("ONEWAN_DEVICE", raising=False)
    module = torch.get_device_module("sim")
    module.empty_cache()
    module.reset_peak_memory_stats()
    simulated_gpu.reset_counters()
    simulated_gpu.set_available(True)
    yield torch.device("sim")
    simulated_gpu.set_available(False)
    simulated_gpu.set_capacity(None)
    module.set_per_process_memory_fraction(1)


@pytest.fixture
def accelerator(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """The simulated accelerator, or the real one that ``ONEWAN_TEST_DEVICE`` names, with kernels
    whose results are the same each time (`support.accelerator`)."""
    if TEST_DEVICE == "sim":
        yield request.getfixturevalue("sim")
        return
    import torch

    monkeypatch.delenv("ONEWAN_DEVICE", raising=False)
    gc.collect()
    yield torch.device(TEST_DEVICE, 0)


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden outputs and real clips. Skips without it; in CI that is a failure."""
    if not SHARED.is_dir():
        message = "needs ../shared (golden outputs and clips), which is not here"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return SHARED


@pytest.fixture(scope="session")
def clips(shared: Path) -> Path:
    """Real clips: good, odd and bad ones."""
    return shared / "clips"


@pytest.fixture(scope="session")
def real_checkout() -> Path:
    """The OneTrainer checkout that ``ONETRAINER`` names; tests do not change it."""
    named = os.environ.get("ONETRAINER")
    if not named:
        pytest.skip("needs a OneTrainer checkout: make test ONETRAINER=PATH")
    return Path(named).resolve()
