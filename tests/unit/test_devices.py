"""The choice of the device, what it can do, its memory and its rate.

Machines that are not there are PyTorch's own modules for them, with functions that check how they
are called and answer what is given: so `torch.mps` has what it has in PyTorch, and nothing more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import simulated_gpu
import torch
from safetensors.torch import load_file
from support.other_program_files import fp8
from support.tiny_models import TinyModels
from torch.overrides import TorchFunctionMode

from onewan import devices
from onewan.devices import (
    DeviceFacts,
    available_devices,
    can_pin,
    copy_,
    device_facts,
    device_memory,
    fused_attention,
    has_streams,
    is_accelerator,
    kind_of,
    page_runtime,
    reset_peak,
    resolve_device,
    supports,
    synchronize,
)
from onewan.dtypes import WeightStorage
from onewan.errors import ConfigError
from onewan.formats.model_folder import describe_components
from onewan.memory.copy_queue import InOrderQueue, StreamQueue, copy_queue
from onewan.memory.device import (
    MEMORY_FRACTION,
    empty_cache_near,
    limit_memory,
    matrix_product_rate,
)
from onewan.memory.host_memory import HostMemory
from onewan.model.device_fit import check_dtypes

GB = 10**9


class Module:
    """A module of PyTorch for devices that are not there: its functions are only called in the way
    that PyTorch's are, and return what is in `values`."""

    def __init__(self, real: Any, values: dict[str, Any]) -> None:
        self._real, self._values = real, values
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        real = getattr(self._real, name)

        def call(*given: Any, **named: Any) -> Any:
            inspect.signature(real).bind(*given, **named)
            self.called.append(name)
            return self._values[name]

        return call


class Tensors(TorchFunctionMode):
    """Tensors of a device that is not there are on the meta device, and dtypes that it has not are
    refused as PyTorch refuses them."""

    def __init__(self, kind: str, missing: set[torch.dtype]) -> None:
        super().__init__()
        self._kind, self._missing = kind, missing

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == self._kind:
            kwargs["device"] = "meta"
            if func is torch.empty:
                return SimpleNamespace(
                    device=torch.device(self._kind, torch.device(device).index or 0)
                )
        if self._missing & {a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)}:
            raise TypeError(f"the {self._kind} framework doesn't support this dtype")
        return func(*args, **kwargs)


@contextmanager
def machine(
    kind: str, values: dict[str, Any], *, hip: str | None = None, count: int = 1, missing: Any = ()
) -> Iterator[Module]:
    """A machine with `count` devices of PyTorch's `kind`."""
    module = Module(getattr(torch, kind), values)

    def refuse(device: Any) -> Any:
        assert torch.device(device).type == kind, f"torch.{device} is not to be asked here"
        return module

    with pytest.MonkeyPatch.context() as patch, Tensors(kind, set(missing)):
        patch.setattr(torch, "get_device_module", refuse)
        patch.setattr(torch.version, "hip", hip)
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "device_count", lambda: count)
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        patch.setattr(devices, "_can_pin", lambda _: True)
        patch.delenv(devices.VARIABLE, raising=False)
        supports.cache_clear()
        yield module
    supports.cache_clear()


CUDA_VALUES = {
    "is_bf16_supported": True,
    "get_device_name": "NVIDIA GeForce RTX 4090",
    "get_device_properties": SimpleNamespace(major=8, minor=9),
    "mem_get_info": (20 * GB, 24 * GB),
}


def test_a_machine_with_cuda() -> None:
    with machine("cuda", CUDA_VALUES, count=2):
        device = resolve_device("auto")
        assert device == torch.device("cuda:0") == resolve_device("cuda")
        assert [str(d) for d in available_devices()] == ["cuda:0", "cuda:1", "cpu"]
        assert device_facts(device) == DeviceFacts(
            name="cuda:0",
            kind="CUDA",
            title="NVIDIA GeForce RTX 4090",
            memory=24 * GB,
            capability="8.9",
            driver="",
            without=(),
            emulates_bfloat16=False,
        )
        assert has_streams(device) and can_pin(device)
        assert "cudnn" in fused_attention(device)


def test_a_card_without_units_for_bfloat16_is_noticed() -> None:
    with machine("cuda", {**CUDA_VALUES, "is_bf16_supported": False}):
        assert device_facts(torch.device("cuda:0")).emulates_bfloat16


def test_a_machine_with_rocm_is_asked_as_one_with_cuda_but_for_what_nvidia_alone_has() -> None:
    radeon = SimpleNamespace(gcnArchName="gfx1100:sramecc+:xnack-", major=11, minor=0)
    values = {
        **CUDA_VALUES,
        "get_device_name": "AMD Radeon RX 7900",
        "get_device_properties": radeon,
    }
    with machine("cuda", values, hip="6.4.1"):
        device = resolve_device("auto")
        facts = device_facts(device)
        assert (device.type, facts.kind, facts.capability) == ("cuda", "ROCm", "gfx1100")
        assert not {"cudnn", "flash_attn_3"} & {*fused_attention(device)}
        assert {"flash", "efficient"} <= {*fused_attention(device)}


def test_a_machine_with_xpu() -> None:
    arc = SimpleNamespace(driver_version="1.6.33")
    values = {
        "is_bf16_supported": True,
        "get_device_name": "Intel Arc B580",
        "get_device_properties": arc,
        "mem_get_info": (10 * GB, 12 * GB),
        "memory_allocated": 3,
        "max_memory_allocated": 5,
        "synchronize": None,
        "set_per_process_memory_fraction": None,
    }
    with machine("xpu", values) as module:
        device = resolve_device("auto")
        facts = device_facts(device)
        assert (facts.name, facts.kind, facts.driver) == ("xpu:0", "XPU", "1.6.33")
        assert device_memory(device) == (3, 5)
        synchronize(device)
        assert limit_memory(device, 6 * GB) == 6 * GB
        assert {"synchronize", "set_per_process_memory_fraction"} <= {*module.called}
        assert has_streams(device) and can_pin(device) and page_runtime(device) is None
        assert {*fused_attention(device)} == {"flash", "overrideable"}


def test_a_machine_with_an_apple_gpu() -> None:
    values = {
        "recommended_max_memory": 48 * GB,
        "driver_allocated_memory": 8 * GB,
        "current_allocated_memory": 3 * GB,
        "synchronize": None,
        "empty_cache": None,
        "set_per_process_memory_fraction": None,
    }
    missing = {torch.float64, torch.float8_e4m3fn}
    with machine("mps", values, missing=missing) as module:
        device = resolve_device("auto")
        assert device_facts(device) == DeviceFacts(
            name="mps:0",
            kind="MPS",
            title="Apple GPU",
            memory=48 * GB,
            capability="",
            driver="",
            without=("float8_e4m3fn",),
            emulates_bfloat16=False,
        )
        assert not supports(device, torch.float64)
        assert device_memory(device) == (3 * GB, None)
        assert limit_memory(device) == int(48 * GB * MEMORY_FRACTION)
        empty_cache_near(device, 8 * GB)
        synchronize(device)
        reset_peak(device)
        assert {"empty_cache", "synchronize"} <= {*module.called}
        # No streams: copies are made in the order of the calls, and memory is not pinned for them.
        assert not has_streams(device) and not can_pin(device)
        assert type(copy_queue(device)) is InOrderQueue
        notices: list[str] = []
        host = HostMemory(device, notify=notices.append)
        assert not host.allocate(16).is_pinned and not host.allocate_staging(16).is_pinned
        assert notices == []
        with pytest.raises(ConfigError, match=r"memory.host_weights: is pinned, but .* to mps:0"):
            HostMemory(device, pinned=True, notify=notices.append).allocate(16)
        assert fused_attention(device) == ()


def test_dtypes_that_a_device_has_not_are_refused_before_loading(tmp_path: Path) -> None:
    model = TinyModels(tmp_path, layers=1)("t2v-a14b")
    (weights,) = (model / "transformer").glob("*.safetensors")
    fp8(load_file(weights), tmp_path / "high_noise.safetensors", "new")
    paths = {"transformer": tmp_path / "high_noise.safetensors", "vae": model / "vae"}
    described = describe_components(paths)

    def problems(storage: WeightStorage, missing: set[torch.dtype]) -> list[str]:
        with machine("mps", {}, missing=missing):
            device = torch.device("mps:0")
            try:
                check_dtypes(device, "bfloat16", storage, described, [*paths])
            except ConfigError as error:
                return list(error.problems)
        return []

    apple = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float64}
    has_none = "mps:0 (MPS) has no fp8; set it to bf16, int8 or nf4"
    assert problems("fp8", apple) == [f"memory.weights: {has_none}"]
    (kept,) = problems("as_stored", apple)
    assert kept.startswith("memory.weights: as_stored keeps model.transformer in fp8, as ")
    assert kept.endswith(f", and {has_none}")
    assert problems("nf4", apple) == [] == problems("as_stored", set())
    (dtype,) = problems("nf4", {torch.bfloat16})
    assert dtype == "model.dtype: mps:0 (MPS) has no bfloat16 here; set it to float32"


def test_a_machine_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: Any) -> Any:
        raise AssertionError(f"torch.{device} is asked")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_device_module", refuse)
    cpu = resolve_device("auto")
    assert cpu == torch.device("cpu") and available_devices() == (cpu,)
    assert kind_of(cpu) == "CPU" and not is_accelerator(cpu) and not has_streams(cpu)
    assert device_memory(cpu) == (None, None)
    assert page_runtime(cpu) is None and type(copy_queue(cpu)) is InOrderQueue
    assert not HostMemory(cpu).allocate(16).is_pinned
    assert fused_attention(cpu) == ("flash",)
    for call in (synchronize, reset_peak, devices.empty_cache):
        call(cpu)


def test_a_device_of_another_package_is_told_by_what_its_module_has(sim: torch.device) -> None:
    assert kind_of(sim) == "sim" and is_accelerator(sim) and has_streams(sim)
    assert type(copy_queue(sim)) is StreamQueue
    assert page_runtime(sim) is None and HostMemory(sim).allocate(16).is_pinned


def test_only_copies_that_the_program_can_wait_for_are_queued(
    sim: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, target = torch.ones(64).pin_memory(), torch.empty(64, device=sim)
    copy_(target, host)
    assert simulated_gpu.counters()["to_device_pinned"][0] == 1
    monkeypatch.delattr(torch.get_device_module(sim), "Stream")
    copy_(target, host)
    copy_(host, target)
    counted = simulated_gpu.counters()
    assert counted["to_device_blocking"][0] == counted["from_device_blocking"][0] == 1


def test_a_variable_says_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine("cuda", CUDA_VALUES, count=2):
        monkeypatch.setenv(devices.VARIABLE, "cuda:1")
        assert resolve_device("auto") == torch.device("cuda:1")
        monkeypatch.setenv(devices.VARIABLE, "auto")
        assert resolve_device("auto") == torch.device("cuda:0")
        assert resolve_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv(devices.VARIABLE, "gpu")
    with pytest.raises(ConfigError) as caught:
        resolve_device("auto")
    assert caught.value.details[0].startswith("environment variable ONEWAN_DEVICE: 'gpu' can't be")


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
    assert problem.endswith("; choose auto, or what is here: cpu")
    assert "aten::" not in problem and len(problem) < 200
    assert "\n" not in problem


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
