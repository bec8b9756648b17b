"""Live bytes over fake tensors: exact where they can be added up by hand, and equal to the
simulated GPU's own statistics where a model is small enough to run."""

from __future__ import annotations

import simulated_gpu
import torch
from live_bytes import ALLOCATION_BYTES, LiveBytes, fake_device
from torch import Tensor, nn
from true_size import build_transformer, latent_shape, step_inputs

from onewan.adapters.adapter_config import adapter_config_for
from onewan.adapters.lora import attach_adapter
from onewan.config.method import LoraMethod
from onewan.model.forward import predict_velocity
from onewan.variants import VARIANTS

assert simulated_gpu  # it registers the device

MEGABYTE = 1 << 20


def floats(count: int, device: torch.device) -> Tensor:
    """`count` MiB of float32."""
    return torch.zeros(count * MEGABYTE // 4, device=device)


def test_current_and_peak_of_a_computation_done_by_hand() -> None:
    with fake_device() as device, LiveBytes() as live:
        a = floats(3, device)
        b = a * 2  # 6
        host = torch.zeros(MEGABYTE)
        c = (a + b) * b  # the sum lives until the product exists: 6 + 3 + 3
        del b, host
        assert live.current("sim") == 6 * MEGABYTE
        view = a.view(3, -1)[1:]
        del a
        assert live.current("sim") == 6 * MEGABYTE  # the view keeps the storage
        c += 1
        del view
        assert live.current("sim") == 3 * MEGABYTE
        assert live.current("cpu") == 0
    assert live.peak("sim") == 12 * MEGABYTE
    assert live.peak("cpu") == 4 * MEGABYTE
    assert [s.bytes for s in live.at_peak("sim")] == [3 * MEGABYTE] * 4


def test_sizes_are_rounded_as_the_allocator_rounds_them() -> None:
    with fake_device() as device, LiveBytes() as live:
        kept = [torch.zeros(1, device=device), torch.zeros(129, device=device)]
        assert live.current("sim") == 3 * ALLOCATION_BYTES
    del kept


def test_backward_pass_keeps_what_it_needs() -> None:
    """x exp(x): the factor exp(x) is saved once, x twice (one storage)."""
    with fake_device() as device, LiveBytes() as live:
        x = floats(4, device).requires_grad_(True)
        live.mark("forward")
        y = (x * x.exp()).sum()
        live.mark("backward")
        y.backward()
        live.mark("after")
        del y
        assert x.grad is not None
        assert live.current("sim") == 8 * MEGABYTE
    peaks = live.peaks("sim")
    # The product is freed by the sum; the 512 bytes are the sum's.
    assert peaks["forward"] == 12 * MEGABYTE + ALLOCATION_BYTES
    # x, exp(x), the gradients of both factors, and the sum of them or a product for the second.
    assert 16 * MEGABYTE < peaks["backward"] < 20 * MEGABYTE + 8 * ALLOCATION_BYTES


def test_peak_names_operator_and_line() -> None:
    with fake_device() as device, LiveBytes() as live:
        large = floats(2, device)
        small = large[:4] + 1
    del small
    first = live.at_peak("sim")[0]
    assert (first.bytes, first.operator) == (2 * MEGABYTE, "aten.zeros.default")
    assert first.place.startswith("test_live_bytes.py:")


def narrow_step(device: torch.device) -> tuple[int, nn.Module]:
    """A training step of T2V-A14B with two blocks of its real width / 20 on few tokens; returns
    the bytes that the simulated GPU itself counted at the peak."""
    facts = VARIANTS["t2v-a14b"]
    transformer = build_transformer(facts, device, torch.bfloat16, 2, heads=2)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.fill_(0.01)
    config = adapter_config_for(LoraMethod(kind="lora", rank=4), transformer, None)
    attach_adapter(transformer, config, 0, "high")
    transformer.enable_gradient_checkpointing()
    transformer.train()
    inputs = step_inputs(facts, latent_shape(facts, (17, 64, 64)), device, clean=True)
    predict_velocity(transformer, **inputs, dtype=torch.bfloat16).sum().backward()
    return torch.get_device_module("sim").max_memory_allocated(), transformer


def test_counts_equal_the_simulated_gpus_statistics() -> None:
    memory = torch.get_device_module("sim")
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    measured, transformer = narrow_step(torch.device("sim", 0))
    with fake_device(fused_kernels=False) as device, LiveBytes() as live:
        narrow_step(device)
    del transformer
    counted = live.peak("sim")
    assert counted > 10 * MEGABYTE
    assert abs(measured - before - counted) <= 64 * ALLOCATION_BYTES
