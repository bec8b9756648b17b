"""A simulated accelerator for PyTorch: the device `sim`. README.md says what it does.

The first import compiles the extension, which takes half a minute on two cores; the result is kept
in PyTorch's folder of extensions, or in the one that the environment variable SIMULATED_GPU_BUILD
names. Import it before the first backward pass of a process: PyTorch starts its threads for devices
once.
"""

from __future__ import annotations

import torch

from simulated_gpu._build import build

_native = build()
_native.register_operators()
torch.utils.rename_privateuse1_backend("sim")

from simulated_gpu import _device  # noqa: E402

torch._register_device_module("sim", _device)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)

from simulated_gpu._checks import (  # noqa: E402
    WAITS,
    Report,
    Trace,
    capacity,
    counters,
    late_copies,
    pinned_bytes,
    reset_counters,
    resident,
    sanitizer,
    set_available,
    set_capacity,
    trace,
)

__all__ = [
    "WAITS",
    "Report",
    "Trace",
    "capacity",
    "counters",
    "late_copies",
    "pinned_bytes",
    "reset_counters",
    "resident",
    "sanitizer",
    "set_available",
    "set_capacity",
    "trace",
]
