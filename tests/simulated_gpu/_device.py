"""`torch.sim`: the module that PyTorch asks about the device, with the names of `torch.cuda`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from simulated_gpu import _native

_DEVICE = torch.device("sim", 0)
_available = False
_initialized = True  # torch.utils.checkpoint keeps the states of generators of such devices only


# ------------------------------------------------------------------ the device
def is_available() -> bool:
    """Whether programs that look for an accelerator are to find this one."""
    return _available


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    if index not in (None, -1, 0):
        raise RuntimeError(f"sim: there is one device, sim:0, not {device}")


def _exchange_device(device: int) -> int:  # noqa: ARG001
    return 0


_maybe_exchange_device = _exchange_device


@contextlib.contextmanager
def device(device: Any):
    """A context in which `device` is the current one: there is only one."""
    set_device(device)
    yield


def get_device_name(device: Any = None) -> str:  # noqa: ARG001
    return "simulated accelerator"


def get_device_capability(device: Any = None) -> tuple[int, int]:  # noqa: ARG001
    return (0, 0)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def is_bf16_supported(including_emulation: bool = True) -> bool:  # noqa: ARG001
    return True


# ------------------------------------------------------------------ streams
def Stream(device: Any = None, priority: int = 0) -> torch.Stream:  # noqa: ARG001, N802
    return torch.Stream(_DEVICE, priority=priority)


def Event(enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):  # noqa: ARG001, N802
    return torch.Event(_DEVICE, enable_timing=enable_timing)


def current_stream(device: Any = None) -> torch.Stream:  # noqa: ARG001
    return torch.accelerator.current_stream(_DEVICE)


def default_stream(device: Any = None) -> torch.Stream:  # noqa: ARG001
    here = current_stream()
    return torch.Stream(stream_id=0, device_index=0, device_type=here.device_type)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream | None):
    """A context in which work is queued on `stream`; None changes nothing."""
    before = current_stream()
    if stream is not None:
        set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


def synchronize(device: Any = None) -> None:  # noqa: ARG001
    torch.accelerator.synchronize(_DEVICE)


# ------------------------------------------------------------------ memory
def memory_stats(device: Any = None) -> dict[str, Any]:  # noqa: ARG001
    return dict(torch.accelerator.memory_stats(_DEVICE))


def memory_allocated(device: Any = None) -> int:
    return memory_stats(device)["allocated_bytes.all.current"]


def max_memory_allocated(device: Any = None) -> int:
    return memory_stats(device)["allocated_bytes.all.peak"]


def memory_reserved(device: Any = None) -> int:
    return memory_stats(device)["reserved_bytes.all.current"]


def max_memory_reserved(device: Any = None) -> int:
    return memory_stats(device)["reserved_bytes.all.peak"]


def reset_peak_memory_stats(device: Any = None) -> None:  # noqa: ARG001
    torch.accelerator.reset_peak_memory_stats(_DEVICE)


def reset_accumulated_memory_stats(device: Any = None) -> None:  # noqa: ARG001
    torch.accelerator.reset_accumulated_memory_stats(_DEVICE)


def empty_cache() -> None:
    torch.accelerator.empty_cache()


def mem_get_info(device: Any = None) -> tuple[int, int]:  # noqa: ARG001
    """Bytes that are neither used nor reserved, and bytes in all."""
    free, total = torch.accelerator.get_memory_info(_DEVICE)
    return free, total


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:  # noqa: ARG001
    """Past this share of the device's memory, torch.OutOfMemoryError is raised."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of memory must be from 0 to 1, not {fraction}")
    _native.set_fraction(fraction)


# ------------------------------------------------------------------ random numbers
def get_rng_state(device: Any = None) -> torch.Tensor:  # noqa: ARG001
    return _native.default_generator().get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:  # noqa: ARG001
    _native.default_generator().set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state()]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    set_rng_state(new_states[0])


def manual_seed(seed: int) -> None:
    _native.default_generator().manual_seed(int(seed))


manual_seed_all = manual_seed


def seed() -> None:
    _native.default_generator().seed()


seed_all = seed


def initial_seed() -> int:
    return _native.default_generator().initial_seed()
