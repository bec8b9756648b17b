"""The simulated accelerator of `tests/simulated_gpu`: a device whose checks find errors."""

from __future__ import annotations

import gc
import io
import math

import pytest
import simulated_gpu
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("sim")
SIM = torch.device("sim")
gpu = torch.get_device_module("sim")


# ------------------------------------------------------------------ a device like others


def trained(device: str) -> list[Tensor]:
    """The output and the gradients of convolution, norm, linear layer and attention."""
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
    modules = nn.ModuleList([convolution, nn.Linear(4, 8)])
    x = torch.randn(2, 2, 4, 5, 6)
    modules.to(device)
    tokens = convolution(x.to(device)).flatten(2).transpose(1, 2)
    q = modules[1](F.layer_norm(tokens, (4,)))[:, None]
    out = F.scaled_dot_product_attention(q, q, q)
    (out.square().mean() + out[out > 0].sum() + F.gelu(q).softmax(-1).std()).backward()
    grads = [p.grad for p in modules.parameters()]
    assert all(g is not None and g.device.type == device for g in grads)
    return [out.detach().cpu(), *[g.cpu() for g in grads if g is not None]]


def test_float32_has_the_bits_of_the_cpu() -> None:
    for ours, theirs in zip(trained("sim"), trained("cpu"), strict=True):
        assert torch.equal(ours, theirs)


def test_a_parameter_that_moves_stays_the_same_object() -> None:
    layer = nn.Linear(3, 3)
    weight = layer.weight
    layer.to(SIM)
    assert layer.weight is weight and weight.device.type == "sim"
    layer.to("cpu")
    assert layer.weight is weight and weight.device.type == "cpu"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda host, there: host + there,
        lambda host, there: there.add_(host),
        lambda host, there: host.add_(there),
        lambda host, there: torch.cat([there, host]),
        lambda host, there: F.linear(there[None], host[None]),
        lambda host, there: torch.where(there > 0, there, host),
        lambda host, there: host.sum().add_(there.sum()),
        lambda host, there: F.scaled_dot_product_attention(
            *(t.view(1, 1, 1, 3) for t in (there, host, there))
        ),
    ],
)
def test_host_and_device_do_not_mix(wrong) -> None:
    with pytest.raises(RuntimeError, match="device"):
        wrong(torch.ones(3), torch.ones(3, device=SIM))


def test_numbers_and_indices_may_be_on_the_host() -> None:
    x = torch.arange(4.0, device=SIM) * torch.tensor(2.0) + 1
    assert x.device.type == "sim"
    assert x[torch.tensor([3, 0])].tolist() == [7.0, 1.0]


def test_views_share_memory_and_resized_results_get_their_own() -> None:
    x = torch.zeros(4, 4, device=SIM)
    x[1:3].t()[0].fill_(1)
    assert x.sum().item() == 2
    out = torch.empty(0, device=SIM)
    torch.add(x, 1, out=out)
    assert out.shape == (4, 4) and out.sum().item() == 18


def allocated_before() -> int:
    """Bytes in use, without those that earlier tests left to the garbage collector."""
    gc.collect()
    return gpu.memory_allocated()


def test_memory_is_counted() -> None:
    start = allocated_before()
    x = torch.zeros(1000, device=SIM)  # 4000 bytes, which allocators round up
    y = x + 1
    assert gpu.memory_allocated() - start == 2 * 4096
    view = x.view(10, 100)[3:].t()
    del x, y
    assert gpu.memory_allocated() - start == 4096
    del view
    assert gpu.memory_allocated() == start
    assert gpu.max_memory_allocated() - start == 2 * 4096
    assert gpu.memory_reserved() >= start + 2 * 4096
    gpu.empty_cache()
    assert gpu.memory_reserved() == start
    gpu.reset_peak_memory_stats()
    assert gpu.max_memory_allocated() == start


def test_past_the_limit_memory_is_out() -> None:
    start = allocated_before()
    simulated_gpu.set_capacity(start + 10_000)
    kept = torch.zeros(1024, device=SIM)
    for allocate in (lambda: torch.empty(2048, device=SIM), lambda: torch.cat([kept, kept])):
        with pytest.raises(torch.OutOfMemoryError, match="8192 bytes were asked for"):
            allocate()
    assert gpu.mem_get_info() == (10_000 - 4096, start + 10_000)
    torch.zeros(1024, device=SIM)
    simulated_gpu.set_capacity(2 * (start + 10_000))
    gpu.set_per_process_memory_fraction(0.5)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2048, device=SIM)


def test_what_is_in_memory_is_listed_with_its_place() -> None:
    gc.collect()
    with simulated_gpu.trace(where=True):
        kept = torch.zeros(3000, device=SIM) + 1
    # Earlier tests may have left larger ones.
    found = [
        place for size, number, place in simulated_gpu.resident() if (size, number) == (12000, 1)
    ]
    assert kept.nbytes == 12000
    assert any("aten::add" in place and "test_simulated_gpu.py:" in place for place in found)


def test_pinned_memory_is_as_large_as_asked_for() -> None:
    gc.collect()
    start = simulated_gpu.pinned_bytes()
    x, y = torch.empty(1001, dtype=torch.uint8, pin_memory=True), torch.ones(7).pin_memory()
    assert x.is_pinned() and x[5:].is_pinned() and y.is_pinned()
    assert not torch.ones(7).is_pinned()
    assert simulated_gpu.pinned_bytes() - start == 1001 + 28
    del x, y
    assert simulated_gpu.pinned_bytes() == start


def test_random_numbers_are_the_devices_own() -> None:
    torch.manual_seed(7)
    host = torch.get_rng_state()
    first = [torch.rand(4, device=SIM), F.dropout(torch.ones(8, device=SIM), 0.5)]
    assert torch.equal(host, torch.get_rng_state())
    torch.manual_seed(7)
    again = [torch.rand(4, device=SIM), F.dropout(torch.ones(8, device=SIM), 0.5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    generator = torch.Generator("sim").manual_seed(7)
    assert torch.equal(torch.rand(4, device=SIM, generator=generator), first[0])
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=SIM, generator=torch.Generator())


def test_recomputation_draws_the_same_numbers_again() -> None:
    x = torch.ones(64, device=SIM, requires_grad=True)
    out = checkpoint(lambda t: F.dropout(t, 0.5), x, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out)


def test_autocast_follows_the_lists_for_accelerators() -> None:
    layer = nn.Linear(4, 4).to(SIM)
    with torch.autocast("sim", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 4, device=SIM))
        assert y.dtype == torch.bfloat16
        assert F.layer_norm(y, (4,)).dtype == torch.float32
        assert y.softmax(-1).dtype == y.norm().dtype == y.norm(2, 1).dtype == torch.float32
        assert torch.cat([y, y.float()]).dtype == torch.float32
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
def test_optimizer_states_are_on_the_device(options) -> None:
    results = []
    for device in ("sim", "cpu"):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
        for _ in range(2):
            layer(torch.ones(2, 4, device=device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moments = [s["exp_avg"] for s in optimizer.state.values()]
        assert {m.device.type for m in moments} == {device}
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, map_location="cpu")["state"]
        assert {s["exp_avg"].device.type for s in loaded.values()} == {"cpu"}
        results.append(layer.weight.detach().cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_operators_have_the_bits_of_the_cpu(dtype) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8, dtype=dtype).unbind()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*leaves)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, gradient)
    aten = torch.ops.aten
    there = [t.to(SIM).requires_grad_() for t in (q, k, v)]
    for out in (
        F.scaled_dot_product_attention(*there),
        aten._scaled_dot_product_efficient_attention(*there, None, True)[0],
        aten._scaled_dot_product_flash_attention(*there)[0],
    ):
        assert torch.equal(out.cpu(), expected)
        found = torch.autograd.grad(out, there, gradient.to(SIM))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    chosen = SDPBackend(torch._fused_sdp_choice(*there))
    assert chosen.name == ("EFFICIENT" if dtype == torch.float32 else "FLASH") + "_ATTENTION"
    with sdpa_kernel(SDPBackend.MATH):
        assert torch._fused_sdp_choice(*there) == 0


def test_fake_tensors_may_be_on_the_device() -> None:
    start = allocated_before()
    with FakeTensorMode():
        q = torch.empty(1, 40, 32760, 128, device=SIM, requires_grad=True)
        out = F.scaled_dot_product_attention(q, q, q)
        out.sum().backward()
        assert out.grad_fn is not None and "Efficient" in out.grad_fn.name()
        assert q.grad is not None and q.grad.device.type == "sim"
    assert gpu.memory_allocated() == start


# ------------------------------------------------------------------ copies and waits


def test_waits_are_counted_with_their_places() -> None:
    x = torch.ones(3, device=SIM)
    with simulated_gpu.trace() as trace:
        x.sum().item()
        x.cpu()
        x[x > 0]
        torch.ones(3).pin_memory().to(SIM, non_blocking=True)
        torch.ones(3).to(SIM, non_blocking=True)
        _ = x + 1
        gpu.synchronize()
    kinds = [kind for kind, *_ in trace.events]
    assert kinds == [
        "wait_item",
        "from_device_blocking",
        "wait_copy",
        "wait_shape",
        "to_device_pinned",
        "to_device_pageable",
        "wait_device",
    ]
    assert sum(trace.waits().values()) == 4
    assert all("test_simulated_gpu.py:" in place for place in trace.waits())
    assert simulated_gpu.counters()["to_device_pinned"] == (1, 12)


# ------------------------------------------------------------------ order of streams


def pinned(value: float, size: int = 256) -> Tensor:
    return torch.full((size,), float(value)).pin_memory()


def prefetched(*, wait: bool = True, guard: bool = True) -> Tensor:
    """The sum of six buffers that a second stream copies to the device, two at a time.

    Without `wait` they are used before they have come, without `guard` they are overwritten while
    they are used.
    """
    copies, compute = gpu.Stream(), gpu.current_stream()
    host = [pinned(n) for n in range(6)]
    ring = [torch.zeros(256, device=SIM) for _ in range(2)]
    copies.wait_stream(compute)
    total = torch.zeros((), device=SIM)
    used: list[torch.Event | None] = [None, None]
    for n, source in enumerate(host):
        event = used[n % 2]
        if guard and event is not None:
            copies.wait_event(event)
        with gpu.stream(copies):
            ring[n % 2].copy_(source, non_blocking=True)
        if wait:
            compute.wait_event(copies.record_event())
        total += ring[n % 2].sum()
        used[n % 2] = compute.record_event()
    return total


def test_correct_prefetching_is_silent() -> None:
    with simulated_gpu.sanitizer() as found, simulated_gpu.late_copies():
        total = prefetched().item()
    assert found == [] and total == 256 * sum(range(6))
    found.raise_if_any()


def test_a_missing_wait_is_found_and_gives_nan() -> None:
    with simulated_gpu.sanitizer() as found, simulated_gpu.late_copies():
        total = prefetched(wait=False).item()
    assert math.isnan(total)
    assert any("reads memory (aten::sum at" in line and "wrote (copy to" in line for line in found)
    assert all("test_simulated_gpu.py:" in line for line in found)
    with pytest.raises(AssertionError, match="without a wait"):
        found.raise_if_any()


def test_overwriting_a_buffer_that_is_in_use_is_found() -> None:
    with simulated_gpu.sanitizer() as found:
        prefetched(guard=False)
    assert any("writes memory (copy to the device" in line for line in found)


@pytest.mark.parametrize("how", ["stream", "event", "device", "host waits for event", "query"])
def test_each_kind_of_wait_orders(how: str) -> None:
    copies, compute = gpu.Stream(), gpu.current_stream()
    with simulated_gpu.sanitizer() as found, simulated_gpu.late_copies():
        with gpu.stream(copies):
            x = pinned(3).to(SIM, non_blocking=True)
            done = gpu.Event()
            done.record()
        if how == "stream":
            compute.wait_stream(copies)
        elif how == "event":
            compute.wait_event(done)
        elif how == "device":
            gpu.synchronize()
        elif how == "host waits for event":
            done.synchronize()
        else:
            assert [done.query(), done.query()] == [False, True]
        assert (x * 2).sum().item() == 2 * 3 * 256
        x.record_stream(compute)
        del x
    assert found == []


def test_memory_of_earlier_work_is_not_used_without_a_wait() -> None:
    """An allocator may give out what kernels of the same stream still use."""
    for waits in (True, False):
        with simulated_gpu.sanitizer() as found:
            torch.ones(64, device=SIM).sum()
            buffer = torch.empty(256, device=SIM)
            copies = gpu.Stream()
            if waits:
                copies.wait_stream(gpu.current_stream())
            with gpu.stream(copies):
                buffer.copy_(pinned(1), non_blocking=True)
            gpu.synchronize()
        assert bool(found) != waits


def test_memory_that_is_freed_while_another_stream_uses_it_is_found() -> None:
    for recorded in (True, False):
        other = gpu.Stream()
        with simulated_gpu.sanitizer() as found:
            x = torch.ones(64, device=SIM)
            other.wait_stream(gpu.current_stream())
            with gpu.stream(other):
                x.sum()
            if recorded:
                x.record_stream(other)
            del x
        assert bool(found) != recorded
        assert recorded or "is freed at" in found[0]


@pytest.mark.parametrize("past_pytorch", [False, True])
def test_a_host_that_overwrites_what_is_being_copied_is_found(past_pytorch: bool) -> None:
    for correct in (True, False):
        with simulated_gpu.sanitizer() as found, simulated_gpu.late_copies():
            source = pinned(1)
            x = source.to(SIM, non_blocking=True)
            if correct:
                gpu.current_stream().synchronize()
            if past_pytorch:
                source.numpy()[:] = 2
            else:
                source.fill_(2)
            total = x.sum().item()
        assert bool(found) != correct
        assert total == (256 if correct else 512)


def test_a_host_that_reads_before_the_copy_has_come_is_found() -> None:
    for correct in (True, False):
        with simulated_gpu.sanitizer() as found, simulated_gpu.late_copies():
            x = torch.ones(8, device=SIM)
            y = torch.empty(8, pin_memory=True).copy_(x, non_blocking=True)
            if correct:
                gpu.current_stream().synchronize()
            total = y.sum().item()
        assert bool(found) != correct
        assert (total == 8) == correct


def test_a_pinned_buffer_may_be_used_again_in_the_order_of_its_stream() -> None:
    """To the device, from the device into the same buffer, and back, without a wait of the host."""
    with simulated_gpu.sanitizer() as found, simulated_gpu.late_copies():
        buffer, other = pinned(1), torch.full((256,), 2.0, device=SIM)
        first = buffer.to(SIM, non_blocking=True)
        buffer.copy_(other, non_blocking=True)
        second = buffer.to(SIM, non_blocking=True)
        gpu.synchronize()
        assert (first.sum().item(), second.sum().item()) == (256, 512)
    assert found == []


def test_two_streams_that_share_a_pinned_buffer_have_to_wait() -> None:
    buffer, other = pinned(1), gpu.Stream()
    x = torch.ones(256, device=SIM)
    with simulated_gpu.sanitizer() as found:
        buffer.to(SIM, non_blocking=True)
        with gpu.stream(other):
            buffer.copy_(x, non_blocking=True)
    assert any("copy from the device" in line for line in found)


def test_bytes_that_wait_for_a_copy_are_nan_in_each_floating_point_type() -> None:
    master = torch.zeros(64, dtype=torch.uint8).pin_memory()
    with simulated_gpu.late_copies():
        other = gpu.Stream()
        with gpu.stream(other):
            flat = master.to(SIM, non_blocking=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            assert flat.view(dtype).float().isnan().all()
        gpu.current_stream().wait_stream(other)
        assert flat.view(torch.bfloat16).sum().item() == 0


def test_copies_of_pageable_memory_are_staged() -> None:
    with simulated_gpu.sanitizer() as found, simulated_gpu.late_copies():
        source = torch.ones(8)
        x = source.to(SIM, non_blocking=True)
        source.zero_()
        assert x.sum().item() == 8
    assert found == []


def test_outside_of_the_fixture_no_accelerator_is_available() -> None:
    assert gpu.is_available()
    simulated_gpu.set_available(False)
    assert not torch.accelerator.is_available()
