"""The attention backends against F.scaled_dot_product_attention, bit for bit."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from onewan.errors import ConfigError
from onewan.model.attention_backends import (
    attend,
    attention_backend,
    default_backend,
    pytorch_backend,
)

SELF_AND_CROSS = [(33, 33), (101, 512), (7, 7)]
"""Numbers of queries and keys, odd ones among them; a Wan model's text has 512 keys."""


def tensors(
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, which require gradients, and the output's gradient, [2, N or M, 3, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, n, 3, head_dim, generator=generator).to(device, dtype)
        for n in (queries, keys, keys, queries)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As diffusers calls it."""
    query, key, value = (t.permute(0, 2, 1, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value).permute(0, 2, 1, 3)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal bits, in the same layout, so that no consumer has to copy."""
    for a, e in zip(actual, expected, strict=True):
        assert a.stride() == e.stride()
        assert a.dtype == e.dtype
        assert torch.equal(a.cpu(), e.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [128, 32])
@pytest.mark.parametrize(("queries", "keys"), SELF_AND_CROSS)
def test_the_default_backend_equals_pytorchs_attention(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype
) -> None:
    q, k, v, grad = tensors(queries, keys, head_dim, dtype)
    backend = default_backend("cpu", dtype, head_dim)
    assert backend.name == pytorch_backend(q, k, v).name == "flash"
    choice = torch._fused_sdp_choice(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert choice == int(SDPBackend.FLASH_ATTENTION.value)
    expected, out = sdpa(q, k, v), attend(q, k, v, backend)
    assert_same((out,), (expected,))
    assert_same(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), SELF_AND_CROSS)
def test_math_equals_pytorchs_composed_attention(
    queries: int, keys: int, dtype: torch.dtype
) -> None:
    q, k, v, grad = tensors(queries, keys, 32, dtype)
    with sdpa_kernel(SDPBackend.MATH):
        expected = sdpa(q, k, v)
        assert pytorch_backend(q, k, v).name == "math"
    # Not even where a caller runs the backward pass under autocast, as recomputation does.
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = attend(q, k, v, attention_backend("math"))
        grads = torch.autograd.grad(out, (q, k, v), grad)
    assert_same((out, *grads), (expected, *torch.autograd.grad(expected, (q, k, v), grad)))


def test_autocast_rounds_the_inputs_as_it_does_for_pytorchs_attention() -> None:
    q, k, v, grad = tensors(33, 512, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sdpa(q, k, v.bfloat16())
        out = attend(q, k, v.bfloat16(), attention_backend("flash"))
    assert out.dtype == torch.bfloat16
    grad = grad.bfloat16()
    assert_same(
        (out, *torch.autograd.grad(out, (q, k, v), grad)),
        (expected, *torch.autograd.grad(expected, (q, k, v), grad)),
    )


class _Operators(TorchDispatchMode):
    """Records the operators whose names contain "attention", with their arguments: of a tensor,
    its shape and layout."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[tuple[str, list[Any]]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "attention" in func.overloadpacket.__name__:
            given = [
                (a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a
                for a in (*args, kwargs.get("scale"))
            ]
            self.calls.append((func.overloadpacket.__name__, given))
        return func(*args, **kwargs)


def test_the_backward_pass_runs_later_from_what_was_kept() -> None:
    q, k, v, grad = tensors(33, 33, 32)
    expected = torch.autograd.grad(sdpa(q, k, v), (q, k, v), grad)
    backend = attention_backend("flash")
    out, saved = backend.forward(q, k, v)
    assert not out.requires_grad
    kept = out.clone(), tuple(t.clone() for t in saved)
    with _Operators() as seen:
        grads = backend.backward(grad, q, k, v, *kept)
    assert [name for name, _ in seen.calls] == [
        "_scaled_dot_product_flash_attention_for_cpu_backward"
    ]
    assert_same(grads, expected)


def test_attend_keeps_only_inputs_output_and_the_softmax_denominators() -> None:
    q, k, v, _ = tensors(33, 512, 32)
    shapes = list[tuple[int, ...]]()

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend(q, k, v, attention_backend("flash"))
    assert shapes == [(2, 33, 3, 32), (2, 512, 3, 32), (2, 512, 3, 32), (2, 33, 3, 32), (2, 3, 33)]


def test_frames_folded_into_the_batch_attend_within_themselves() -> None:
    q, k, v, grad = tensors(4 * 5, 4 * 5, 32)
    backend = attention_backend("flash")
    frames_q, frames_k, frames_v = (t.reshape(2 * 4, 5, 3, 32) for t in (q, k, v))
    folded = attend(frames_q, frames_k, frames_v, backend)
    # The same by a mask, in plain formulas.
    frame = torch.arange(20) // 5
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 32**0.5
    scores = scores.masked_fill(frame[:, None] != frame[None, :], -torch.inf)
    masked = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    out = folded.reshape(2, 20, 3, 32)
    torch.testing.assert_close(out, masked, rtol=1e-5, atol=1e-5)
    for a, e in zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(masked, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


_FUSED = {
    "flash": (torch.ops.aten._scaled_dot_product_flash_attention, ()),
    "efficient": (torch.ops.aten._scaled_dot_product_efficient_attention, (None, True)),
    "cudnn": (torch.ops.aten._scaled_dot_product_cudnn_attention, (None, True)),
    "overrideable": (torch.ops.aten._scaled_dot_product_fused_attention_overrideable, ()),
}


@pytest.mark.parametrize("name", _FUSED)
def test_operators_without_a_kernel_here_get_the_arguments_that_autograd_gives_them(
    name: str,
) -> None:
    """On the meta device, PyTorch's autograd calls the backward operators of all devices."""
    q, k, v, grad = tensors(33, 512, 128, torch.bfloat16, "meta")
    operator, arguments = _FUSED[name]
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    scale = {"scale": 1 / math.sqrt(128)} if name == "flash" else {}
    with _Operators() as expected:
        out = operator(*heads_first, *arguments, **scale)[0].transpose(1, 2)
        torch.autograd.grad(out, (q, k, v), grad)
    backend = attention_backend(name)
    with _Operators() as actual:
        out, saved = backend.forward(q, k, v)
        grads = backend.backward(grad, q, k, v, out, saved)
    assert actual.calls == expected.calls
    assert all(a.stride() == b.stride() for a, b in zip((out, *grads), (q, q, k, v), strict=True))


def test_flash_pads_channels_as_pytorchs_attention_does() -> None:
    q, k, v, grad = tensors(33, 512, 12, torch.bfloat16, "meta")
    backend = attention_backend("flash")
    with _Operators() as seen:
        out, saved = backend.forward(q, k, v)
        grads = backend.backward(grad, q, k, v, out, saved)
    assert [t.shape for t in (out, *grads)] == [t.shape for t in (q, q, k, v)]
    for _, given in seen.calls:
        shapes = [a[0] for a in given if isinstance(a, tuple) and len(a[0]) == 4]
        assert {shape[-1] for shape in shapes} == {16}
        assert given[-1] == 1 / math.sqrt(12)  # of the channels before padding


@pytest.mark.parametrize("name", _FUSED)
def test_every_fused_backend_takes_fake_tensors_of_a_device_that_is_not_there(name: str) -> None:
    """Bytes are counted over fake tensors."""
    backend = attention_backend(name)
    with FakeTensorMode():
        q = torch.empty(1, 33, 3, 128, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(1, 512, 3, 128, device="cuda", dtype=torch.bfloat16)
        out, saved = backend.forward(q, k, k)
        assert (out.shape, out.device, out.dtype) == (q.shape, q.device, q.dtype)
        assert saved[0].dtype == torch.float32
        assert saved[0].shape[:2] == (1, 3)
        assert saved[0].shape[2] >= 33
        assert sum(t.numel() for t in saved[1:]) <= 4
        grads = backend.backward(torch.empty_like(out), q, k, k, out, saved)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("name", ["flash", "math"])
def test_attend_takes_fake_tensors(name: str) -> None:
    with FakeTensorMode():
        q, k, v, grad = (torch.empty(2, n, 3, 32, requires_grad=True) for n in (33, 512, 512, 33))
        out = attend(q, k, v, attention_backend(name))
        out.backward(grad)
        assert q.grad is not None
        assert q.grad.shape == out.shape


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("flash_attn", "flash_attn", "flash-attn"),
        ("flash_attn_3", "flash_attn_interface", "flash-attn-3"),
        ("xformers", "xformers", "xformers"),
    ],
)
def test_a_missing_package_is_named_when_it_is_asked_for(
    name: str, module: str, package: str
) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed here")
    with pytest.raises(ConfigError) as error:
        attention_backend(name)
    (problem,) = error.value.problems
    assert problem.startswith(f"memory.attention: '{name}' needs the package {package} ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), SELF_AND_CROSS)
def test_the_default_backend_of_an_accelerator_equals_pytorchs_attention(
    queries: int, keys: int, dtype: torch.dtype, sim: torch.device
) -> None:
    q, k, v, grad = tensors(queries, keys, 32, dtype, str(sim))
    backend = default_backend(sim, dtype, 32)
    assert backend.name == pytorch_backend(q, k, v).name
    expected, out = sdpa(q, k, v), attend(q, k, v, backend)
    assert out.device.type == sim.type
    assert_same(
        (out, *torch.autograd.grad(out, (q, k, v), grad)),
        (expected, *torch.autograd.grad(expected, (q, k, v), grad)),
    )
