"""Whole runs on a device that has no more than Apple's GPU, and without calls into CUDA."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import simulated_gpu
import torch
from support.runs import RunFile, outcome
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import onewan
from onewan.train.trainer import WanTrainer

pytestmark = pytest.mark.long

SOURCE = str(Path(onewan.__file__).parent)
EVERY_PHASE = [
    "wan_config.max_frames=5",
    "method={kind: lora, rank: 4, dropout: 0.2}",
    "train={steps: 3, save_every: 2, switch_expert_every: 1, ema: {decay: 0.9, offload: true}}",
    "validation.clips=1",
    "sample={every: 3, prompts: [a red square], width: 64, height: 64, frames: 5, steps: 2}",
]
"""Dropout, so that generators are set back for the backward pass; averages; both experts, of which
one leaves the device at each step."""
MISSING = {torch.float64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2}
"""Dtypes that MPS has not."""


class OnlyDtypesOfMps(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "sim":
                assert value.dtype not in MISSING, f"{func} makes {value.dtype}"
        return result


@pytest.fixture
def like_mps(sim: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The simulated accelerator with the functions and the dtypes of MPS, and no more."""
    module = torch.get_device_module(sim)
    for name in ("Stream", "Event", "stream", "current_stream", "device", "mem_get_info"):
        monkeypatch.delattr(module, name)
    for name in ("max_memory_allocated", "reset_peak_memory_stats", "get_device_name"):
        monkeypatch.delattr(module, name)

    def refuse(*_: Any) -> Any:
        raise AssertionError("memory is pinned")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    return sim


@pytest.fixture
def others_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What onewan calls of PyTorch's modules for CUDA, XPU and MPS fails. PyTorch and diffusers
    ask them whether they are available."""

    def refused(name: str, plain: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            assert not sys._getframe(1).f_code.co_filename.startswith(SOURCE), f"{name} is called"
            return plain(*given, **named)

        return call

    for module in (torch.cuda, torch.xpu, torch.mps):
        for name, plain in vars(module).items():
            if callable(plain) and not isinstance(plain, type):
                monkeypatch.setattr(module, name, refused(f"{module.__name__}.{name}", plain))


@pytest.mark.usefixtures("others_untouched")
def test_a_device_like_mps_trains(run_file: RunFile, like_mps: torch.device) -> None:
    run = run_file("t2v-a14b", *EVERY_PHASE, f"model.device={like_mps}")
    simulated_gpu.reset_counters()
    with OnlyDtypesOfMps():
        WanTrainer(run).fit()
    copies = {kind: number for kind, (number, _) in simulated_gpu.counters().items()}
    assert copies["to_device_blocking"] > 0 and copies["from_device_blocking"] > 0
    assert not {k for k in copies if k.endswith(("_pinned", "_pageable")) and copies[k]}
    tensors, steps = outcome(run)
    assert len(steps) == 3 and all(torch.isfinite(t).all() for t in tensors.values())
