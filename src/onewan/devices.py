"""The devices that PyTorch can compute on here: their choice, what they can do, and their memory.

The only module that asks PyTorch about devices. What a device can do follows from the functions of
PyTorch's module for its type: `torch.cuda` (also for ROCm), `torch.xpu`, `torch.mps`, or one of
another package. A type is named only where these are not enough. Nothing is asked when this is
imported, and nothing of CUDA's on other devices.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from onewan.errors import ConfigError

log = logging.getLogger(__name__)

HOST = torch.device("cpu")
VARIABLE = "ONEWAN_DEVICE"
"""Environment variable with the device that "auto" stands for, by PyTorch's name. An Apple GPU
can't be hidden in another way."""

Stream = Any
Event = Any
"""A stream and an event of a device's module, whose classes differ."""


# ------------------------------------------------------------------------------------- the choice


def resolve_device(name: str) -> torch.device:
    """The device that `model.device` names, with its index; ConfigError if it can't be used here.

    "auto" is what the environment variable `VARIABLE` names, else the accelerator that PyTorch
    finds, else the CPU.
    """
    field, wanted = "model.device", name
    if name == "auto" and (named := os.environ.get(VARIABLE, "auto")) != "auto":
        field, wanted = f"environment variable {VARIABLE}", named
    elif name == "auto":
        wanted = str(accelerator() or HOST)
    wanted = _own_of_this_process(wanted)
    try:
        # An empty tensor, since `torch.device` accepts names of devices that are not there. Its own
        # device has an index: "cuda" means "cuda:0", but the two don't compare equal.
        device = torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, ImportError) as error:
        problem = f"{field}: {wanted!r} can't be used here ({_reason(error)}); {_choice()}"
        raise ConfigError("run file", [problem]) from error
    if device.type == "meta":
        problem = f"{field}: {wanted!r} has no memory, so nothing can be computed there"
        raise ConfigError("run file", [f"{problem}; {_choice()}"])
    return device


def _own_of_this_process(name: str) -> str:
    """A device without an index, as the one that belongs to this process where torchrun has started
    several on a machine."""
    number, found = os.environ.get("LOCAL_RANK", ""), accelerator()
    if not number or found is None or found.type != name or torch.accelerator.device_count() < 2:
        return name
    return f"{name}:{number}"


def collective_backend(device: torch.device) -> str | None:
    """The backend of torch.distributed that sends tensors between devices of this type; None where
    they go through host memory."""
    backends = torch.distributed.Backend.default_device_backend_map
    return None if is_host(device) else backends.get(device.type)


def make_current(device: torch.device) -> None:
    """Make `device` the one that PyTorch takes where none is named, as FSDP2 and NCCL do."""
    if is_accelerator(device) and device.index is not None:
        _module(device).set_device(device)


def accelerator() -> torch.device | None:
    """The accelerator that PyTorch finds and computes on by default, without an index; None if
    there is none. A build of PyTorch is for one type of accelerator."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def available_devices() -> tuple[torch.device, ...]:
    """All devices that `model.device` may name here: those of the accelerator, and the CPU."""
    found = accelerator()
    count = 0 if found is None else torch.accelerator.device_count()
    return (*(torch.device(found.type, index) for index in range(count) if found), HOST)


def _reason(error: Exception) -> str:
    """Why there is no such device. PyTorch says it by long lists: of operators that are missing for
    a device that it was not built for, and of all types of devices for an unknown name."""
    if isinstance(error, NotImplementedError):
        return f"the build of PyTorch here is {torch_build()}"
    reason = str(error).splitlines()[0]
    return "PyTorch knows no such type" if reason.startswith("Expected one of") else reason


def _choice() -> str:
    names = [str(device) for device in available_devices()]
    return f"choose auto, or what is here: {', '.join(names)}"


# -------------------------------------------------------------------------------- what there is


def is_host(device: torch.device) -> bool:
    """Whether tensors on `device` are in host memory, where the CPU computes on them at once."""
    return device.type == "cpu"


def is_accelerator(device: torch.device) -> bool:
    """Whether `device` computes by itself and has its tensors in a memory of its own, or in a part
    of the host's; not the CPU, and not the meta device."""
    return device.type not in {"cpu", "meta"}


def kind_of(device: torch.device) -> str:
    """What computes: "CUDA", "ROCm", "XPU" (Intel), "MPS" (Apple), "CPU", or PyTorch's name of
    another type. PyTorch calls ROCm "cuda" too."""
    if device.type == "cuda":
        return "ROCm" if torch.version.hip else "CUDA"
    return device.type.upper() if device.type in {"cpu", "mps", "xpu"} else device.type


def torch_build() -> str:
    """What this build of PyTorch computes on besides the CPU, with the version: "CUDA 12.8"; or
    "CPU only"."""
    versions = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    versions["XPU"] = getattr(torch.version, "xpu", None)  # not in older versions
    found = next((f"{name} {version}" for name, version in versions.items() if version), None)
    return found or ("MPS" if torch.backends.mps.is_built() else "CPU only")


def device_name(device: torch.device) -> str:
    """What its maker calls the device, or PyTorch."""
    if device.type == "mps":  # which has no function for it
        return "Apple GPU"
    get = getattr(_module(device), "get_device_name", None)
    return str(device) if get is None else get(device)


_FUSED_ATTENTION = {
    "CPU": ("flash",),
    "CUDA": ("flash", "efficient", "cudnn", "flash_attn", "flash_attn_3", "xformers"),
    "ROCm": ("flash", "efficient", "flash_attn", "xformers"),
    "XPU": ("flash", "overrideable"),
    "MPS": (),
}


def fused_attention(device: torch.device) -> Sequence[str]:
    """The attention backends, by their names in the run file, that may have a kernel for `device`
    with a backward pass, and do not need memory for the scores of all pairs of tokens.

    Whether one has a kernel for a dtype and a size is found out by running it
    (`onewan.model.attention_choice`); the others are not touched.
    """
    # Devices of other packages fill PyTorch's general operator, or those that CUDA has.
    return _FUSED_ATTENTION.get(kind_of(device), ("flash", "efficient", "overrideable"))


@cache
def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` has tensors of `dtype` and converts them to float32. MPS has no float64 and
    no fp8, and bfloat16 since macOS 14 only."""
    try:
        stored = torch.zeros(8, dtype=torch.uint8, device=device)
        stored.view(dtype).float()
    except (RuntimeError, TypeError):
        return False
    return True


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 without units for it, and so slowly, as NVIDIA's cards
    before Ampere do. False where a device does not tell."""
    ask = getattr(_module(device), "is_bf16_supported", None)
    return ask is not None and supports(device, torch.bfloat16) and not ask(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What PyTorch says about a device."""

    name: str
    """PyTorch's name, such as "cuda:0"."""
    kind: str
    """As `kind_of` gives it."""
    title: str
    """What its maker calls it."""
    memory: int
    """Bytes; 0 where it is unknown."""
    capability: str
    """NVIDIA's compute capability such as "9.0", AMD's architecture such as "gfx1100", or empty."""
    driver: str
    """Version of the driver, where PyTorch knows it; or empty."""
    without: tuple[str, ...]
    """Dtypes of weights that it has not: bfloat16, float8_e4m3fn."""
    emulates_bfloat16: bool


def device_facts(device: torch.device) -> DeviceFacts:
    """The facts about an accelerator that is here."""
    ask = getattr(_module(device), "get_device_properties", None)
    properties: Any = None if ask is None else ask(device)
    kind = kind_of(device)
    capability = ""
    if kind == "CUDA":
        capability = f"{properties.major}.{properties.minor}"
    elif kind == "ROCm":
        capability = properties.gcnArchName.partition(":")[0]
    dtypes = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    total, _ = total_and_free_memory(device)
    return DeviceFacts(
        name=str(device),
        kind=kind,
        title=device_name(device),
        memory=total or 0,
        capability=capability,
        driver=str(getattr(properties, "driver_version", "")),
        without=tuple(name for name, dtype in dtypes.items() if not supports(device, dtype)),
        emulates_bfloat16=emulates_bfloat16(device),
    )


# ------------------------------------------------------------------------- its work and the host's


def has_streams(device: torch.device) -> bool:
    """Whether work on `device` is queued in streams that this program can order and wait for, so
    that copies can go on beside computations. The CPU and MPS have none."""
    return is_accelerator(device) and hasattr(_module(device), "Stream")


def copy_(target: Tensor, source: Tensor) -> Tensor:
    """Copy `source` into `target`; between host memory and a device with streams the copy is queued
    on its current stream, and asynchronous if the host's side is pinned. Returns `target`."""
    return target.copy_(source, non_blocking=_is_queued(source.device, target.device))


def moved(tensor: Tensor, device: torch.device, *, copy: bool = False) -> Tensor:
    """`tensor` on `device`: itself if it is there and not to be a `copy`, else a copy that is
    queued as `copy_` queues it."""
    queued = _is_queued(tensor.device, device)
    return tensor.to(device, non_blocking=queued, copy=copy)


def _is_queued(source: torch.device, target: torch.device) -> bool:
    # PyTorch lets no program wait for a copy from MPS to the host that is not blocking.
    return all(has_streams(device) for device in (source, target) if is_accelerator(device))


def new_stream(device: torch.device) -> Stream:
    """A further stream of a device that has streams."""
    return _module(device).Stream(device)


def current_stream(device: torch.device) -> Stream:
    """The stream that computations on `device` are queued on."""
    return _module(device).current_stream(device)


def on_stream(device: torch.device, stream: Stream) -> AbstractContextManager[Any]:
    """The context, per thread, in which work on `device` is queued on `stream`."""
    return _module(device).stream(stream)


def new_event(device: torch.device) -> Event:
    """An event to record on streams of `device`."""
    return _module(device).Event()


def synchronize(device: torch.device) -> None:
    """Wait until all work that has been queued on `device` is done."""
    if is_accelerator(device):
        _call(device, "synchronize")


def can_pin(device: torch.device) -> bool:
    """Whether PyTorch pins (page-locks) host memory for copies to `device`. MPS shares the host's
    memory, and copies to it are not queued."""
    return has_streams(device) and _can_pin(device.type)


@cache
def _can_pin(device_type: str) -> bool:
    found = torch.accelerator.current_accelerator()
    if found is None or found.type != device_type:
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except RuntimeError as error:
        log.warning("host memory can't be pinned, so copies to %s wait (%s)", device_type, error)
        return False


def page_runtime(device: torch.device) -> Any:
    """The functions of the driver that pin memory which is already allocated (``cudaHostRegister``,
    under this name for ROCm too); None where PyTorch has none, on all but CUDA and ROCm."""
    if device.type != "cuda":
        return None
    torch.empty(0, device=device)  # initializes the device, which registering needs
    return torch.cuda.cudart()


def generator_state(device: torch.device) -> Tensor | None:
    """The state of the device's global random generator; None where that is the CPU's."""
    return _module(device).get_rng_state(device) if is_accelerator(device) else None


def set_generator_state(device: torch.device, state: Tensor | None) -> None:
    """Set what `generator_state` returned."""
    if state is not None:
        _module(device).set_rng_state(state, device)


# ------------------------------------------------------------------------------------- its memory


def device_memory(device: torch.device) -> tuple[int | None, int | None]:
    """(allocated now, peak since `reset_peak` or the start of the process) in bytes; None where a
    device does not report them: both on the CPU, the peak on MPS."""
    if not is_accelerator(device):
        return None, None
    return _call(device, "memory_allocated"), _call(device, "max_memory_allocated")


def reserved_memory(device: torch.device) -> int | None:
    """Bytes that PyTorch holds of an accelerator, for tensors or to be used again; None where it
    does not say."""
    return _call(device, "memory_reserved")


def total_and_free_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes of the whole device, and those that no process uses; None where it does not say. Of
    MPS: what Apple recommends at most, and what this process has left of it."""
    module = _module(device)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        return total, free
    if hasattr(module, "recommended_max_memory"):
        total = int(module.recommended_max_memory())
        return total, max(0, total - (reserved_memory(device) or 0))
    return None, None


def limit_share(device: torch.device, share: float) -> bool:
    """Let PyTorch allocate at most that share of `total_and_free_memory`'s whole; past it an
    allocation is a `torch.OutOfMemoryError`. False where the device has no such limit."""
    name = "set_per_process_memory_fraction"
    has_limit = is_accelerator(device) and hasattr(_module(device), name)
    if has_limit:
        _call(device, name, share)
    return has_limit


def reset_peak(device: torch.device) -> None:
    """Let the peak of `device_memory` begin anew, where the device has one."""
    if is_accelerator(device):
        _call(device, "reset_peak_memory_stats")


def empty_cache(device: torch.device) -> None:
    """Give memory that no tensor uses back to the device."""
    empty = getattr(_module(device), "empty_cache", None) if is_accelerator(device) else None
    if empty is not None:
        empty()


_NAMES_OF_MPS = {
    "memory_allocated": "current_allocated_memory",
    "memory_reserved": "driver_allocated_memory",
}


def _call(device: torch.device, name: str, *arguments: Any) -> Any:
    """The function `name` of the device's module; None if it has none of that name."""
    module = _module(device)
    if device.type == "mps":  # whose functions take no device, since there is one
        function = getattr(module, _NAMES_OF_MPS.get(name, name), None)
        return None if function is None else function(*arguments)
    function = getattr(module, name, None)
    return None if function is None else function(*arguments, device)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
