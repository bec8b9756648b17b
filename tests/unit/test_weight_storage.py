"""Packed matrices: the elements and values of the reference libraries, and how little they need.

bitsandbytes is the reference of nf4, torchao that of int8; fp8 is compared with its formula.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as bitsandbytes
import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from onewan.memory.plan.storage import Storage, matrix_bytes
from onewan.model import weight_storage
from onewan.model.gguf_forms import DECODERS, DECODERS_WITH_LEVELS
from onewan.model.quantized_linear import QuantizedLinear
from onewan.model.weight_storage import Stored, expanded, is_finite, packed

PACKED = pytest.mark.parametrize("form", ["F8_E4M3", "int8", "nf4"])


def matrix(rows: int = 96, columns: int = 320, seed: int = 0) -> Tensor:
    """Normal values with a few large ones, a row of zeros, and tiny values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values[::7, ::11] *= 30
    values[3] = 0
    values[5] *= 1e-30
    return values


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrices are converted in several groups of rows, the last one shorter."""
    monkeypatch.setattr(weight_storage, "GROUP_ON_CPU", 64 * 320)
    yield


def q8_0(values: Tensor) -> Stored:
    data = gguf.quants.quantize(values.numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(np.asarray(data).view(np.int8)), None, None


def random_blocks(kind: str, rows: int, columns: int) -> Stored:
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = torch.randint(-128, 128, (rows, columns // block * size), dtype=torch.int8)
    return data, None, weight_storage.levels_of(kind)


# ------------------------------------------------------------------------------ against references


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_has_the_elements_and_values_of_bitsandbytes(dtype: torch.dtype) -> None:
    for values in (matrix(), matrix(64, 2)):  # blocks within rows, and over many rows
        values = values.to(dtype)
        data, state = bitsandbytes.quantize_4bit(
            values, blocksize=64, quant_type="nf4", compress_statistics=False
        )
        weight, scale, levels = packed("nf4", values)
        assert scale is not None
        assert torch.equal(weight.view(torch.uint8).flatten(), data.flatten())
        assert torch.equal(scale, state.absmax)
        theirs = bitsandbytes.dequantize_4bit(data, state)
        assert theirs.dtype == dtype
        assert torch.equal(expanded("nf4", (weight, scale, levels), dtype), theirs)


def test_int8_expands_as_in_torchao_and_is_packed_with_another_scale() -> None:
    from torchao.quantization import Int8Tensor, PerRow

    values = matrix()
    theirs: Any = Int8Tensor.from_hp(values, granularity=PerRow())
    stored = (theirs.qdata, theirs.scale.reshape(-1, 1), None)
    assert torch.equal(expanded("int8", stored), theirs.dequantize())
    weight, scale, _ = packed("int8", values)
    assert scale is not None
    usual = values.abs().amax(1) > 1e-6  # torchao has a smallest scale, which row 5 is below
    torch.testing.assert_close(scale[usual] * 127, theirs.scale.reshape(-1, 1)[usual] * 127.5)
    # Theirs cuts off the largest value of each row by half a step.
    ours_error = (expanded("int8", packed("int8", values)) - values).abs().amax(1, keepdim=True)
    assert (ours_error <= scale / 2 * (1 + 1e-5)).all()
    assert (weight.int() - theirs.qdata.int())[usual].abs().max() == 1
    assert relative(expanded("int8", packed("int8", values)), theirs.dequantize()) < 0.01


def test_int8_has_the_elements_of_bitsandbytes_vectorwise() -> None:
    values = matrix(64, 320)[:3]
    elements, largest, _ = bitsandbytes.int8_vectorwise_quant(values.half())
    weight, scale, _ = packed("int8", values.half())
    assert scale is not None
    torch.testing.assert_close(scale.flatten() * 127, largest)
    assert (weight.int() - elements.int()).abs().max() <= 1  # it computes in half precision


def test_fp8_is_the_nearest_element_times_the_scale_of_the_row() -> None:
    values = matrix()
    weight, scale, _ = packed("F8_E4M3", values)
    assert scale is not None and scale.shape == (96, 1)
    torch.testing.assert_close(scale.flatten() * 448, values.abs().amax(1), rtol=1e-6, atol=0)
    nearest = (values / scale.clamp(min=1e-45)).to(torch.float8_e4m3fn)
    assert torch.equal(weight, nearest.view(torch.int8))
    assert torch.equal(expanded("F8_E4M3", (weight, scale, None)), nearest.float() * scale)


# ------------------------------------------------------------------------- properties of every form


@PACKED
def test_rows_of_zeros_and_denormal_values_are_stored(form: str) -> None:
    values = torch.zeros(64, 64)
    values[1] = torch.linspace(-1e-44, 1e-44, 64)
    values[2, 0] = 3e38
    result = expanded(form, packed(form, values))
    assert result.isfinite().all() and not result[0].any() and not result[3:].any()
    assert result[1].abs().max() <= 1.5e-44
    assert result[2, 0] == pytest.approx(3e38, rel=1e-6)


@PACKED
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_shows_in_the_scale(form: str, bad: float) -> None:
    values = matrix()
    assert is_finite(form, packed(form, values))
    values[70, 13] = bad
    assert not is_finite(form, packed(form, values))


@PACKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_groups_of_rows_change_no_bit(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packed(form, matrix(200).to(dtype))
    values = expanded(form, whole)
    monkeypatch.setattr(weight_storage, "GROUP_ON_CPU", 64 * 320)
    parts = packed(form, matrix(200).to(dtype))
    for a, b in zip(whole, parts, strict=True):
        assert a is b or torch.equal(a, b)
    assert torch.equal(expanded(form, parts), values)


def every_form(values: Tensor) -> dict[str, Stored]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(len(values), values.shape[1] // 64, 1, generator=generator)
    e4m3 = values.to(torch.float8_e4m3fn).view(torch.int8)
    return {
        "F8_E4M3": (e4m3, None, None),
        "F8_E4M3 one": (e4m3, torch.tensor(0.3), None),
        "F8_E4M3 blocks": (e4m3, scales, None),
        "F8_E5M2": (values.to(torch.float8_e5m2).view(torch.int8), scales[:, 0], None),
        "int8": packed("int8", values),
        "nf4": packed("nf4", values),
        "Q8_0": q8_0(values),
    }


@pytest.mark.usefixtures("small_groups")
def test_values_are_rounded_once_to_the_type_that_is_asked_for() -> None:
    for form, stored in every_form(matrix(150)).items():
        exact = expanded(form.split()[0], stored)
        assert exact.shape == (150, 320)
        for dtype in (torch.bfloat16, torch.float16):
            rounded = expanded(form.split()[0], stored, dtype)
            assert torch.equal(rounded, exact.to(dtype)), form


def test_scales_of_every_shape_multiply_their_values() -> None:
    values = matrix(150)
    stored = every_form(values)
    e4m3 = values.to(torch.float8_e4m3fn).float()
    blocks = stored["F8_E4M3 blocks"][1]
    rows = stored["F8_E5M2"][1]
    assert blocks is not None and rows is not None
    assert torch.equal(expanded("F8_E4M3", stored["F8_E4M3"]), e4m3)
    assert torch.equal(expanded("F8_E4M3", stored["F8_E4M3 one"]), e4m3 * 0.3)
    want = (e4m3.unflatten(1, (5, 64)) * blocks).flatten(1)
    assert torch.equal(expanded("F8_E4M3", stored["F8_E4M3 blocks"]), want)
    e5m2 = values.to(torch.float8_e5m2).float()
    assert torch.equal(expanded("F8_E5M2", stored["F8_E5M2"]), e5m2 * rows)


# ------------------------------------------------------------------------------------------- memory


def on(device: torch.device, stored: Stored) -> Stored:
    weight, scale, levels = stored
    return (
        weight.to(device),
        None if scale is None else scale.to(device),
        None if levels is None else levels.to(device),
    )


@pytest.mark.parametrize(
    ("storage", "form"), [("fp8", "F8_E4M3"), ("int8", "int8"), ("nf4", "nf4")]
)
def test_the_plan_counts_the_bytes_of_a_packed_matrix(storage: Storage, form: str) -> None:
    stored = [tensor for tensor in packed(form, matrix(96, 320)) if tensor is not None]
    assert sum(tensor.nbytes for tensor in stored) == matrix_bytes(storage, (96, 320))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_same_on_a_device_and_the_host_waits_for_nothing(
    sim: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    import simulated_gpu

    monkeypatch.setattr(weight_storage, "GROUP", 64 * 512)
    forms = every_form(matrix(150, 512))
    forms |= {kind: random_blocks(kind, 150, 512) for kind in (*DECODERS, *DECODERS_WITH_LEVELS)}
    assert len(forms) == 18
    for name, stored in forms.items():
        form = name.split()[0]
        layer = QuantizedLinear(form, on(sim, stored), None)
        x = torch.randn(3, 512, dtype=dtype).to(sim).requires_grad_(True)
        with simulated_gpu.trace() as trace:
            values = expanded(form, layer.stored, dtype)
            out = layer(x)
            out.backward(torch.ones_like(out))
        assert not trace.waits(), name
        host = expanded(form, stored, dtype)  # random bytes are NaN in places
        assert torch.equal(values.cpu().nan_to_num(), host.nan_to_num()), name


@pytest.mark.parametrize(
    ("form", "bytes_of_value"),
    [
        ("F8_E4M3 blocks", 4),
        ("F8_E5M2", 4),
        ("int8", 0),
        ("nf4", 6),
        ("Q8_0", 4),
        ("Q4_0", 6),
        ("Q4_K", 10),
        ("Q5_K", 10),
        ("Q6_K", 7),
        ("IQ4_XS", 10),
    ],
)
def test_expanding_takes_temporary_memory_for_one_group_of_rows(
    sim: torch.device, form: str, bytes_of_value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (64 * 40, 512)
    stored = every_form(matrix(*shape)).get(form) or random_blocks(form, *shape)
    stored, group = on(sim, stored), 64 * 512
    monkeypatch.setattr(weight_storage, "GROUP", group)
    device = torch.get_device_module("sim")
    device.reset_peak_memory_stats()
    before = device.memory_allocated()
    result = expanded(form.split()[0], stored, torch.bfloat16)
    temporary = device.max_memory_allocated() - before - result.nbytes
    assert temporary <= bytes_of_value * group + 8192  # of levels, in pairs


# ---------------------------------------------------------------------------------------- the layer


def layer_of(form: str, values: Tensor) -> QuantizedLinear:
    stored = q8_0(values) if form == "Q8_0" else packed(form, values)
    bias = torch.randn(len(values), generator=torch.Generator().manual_seed(2))
    return QuantizedLinear(form, stored, nn.Parameter(bias, requires_grad=False))


FORMS = pytest.mark.parametrize("form", ["F8_E4M3", "int8", "nf4", "Q8_0"])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_as_a_linear_layer_with_its_expanded_weight(
    form: str, dtype: torch.dtype
) -> None:
    layer = layer_of(form, matrix())
    assert (layer.in_features, layer.out_features) == (320, 96)
    plain = nn.Linear(320, 96, dtype=dtype)
    plain.weight.data = layer.dequantized_weight().to(dtype)
    plain.bias.data = layer.bias.data.to(dtype)
    x = torch.randn(2, 5, 320, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    ours, theirs = layer(x), plain(y)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


@FORMS
def test_stored_tensors_may_be_exchanged_between_two_uses(form: str) -> None:
    """As streaming does: every frozen tensor is copied as bytes and bound to the copy, before the
    forward and again before the backward pass. The old memory is free at once."""
    layer, reference = layer_of(form, matrix()), layer_of(form, matrix())
    x = torch.randn(5, 320, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    reference(y).square().sum().backward()

    def rebind() -> list[Any]:
        old: list[Any] = []
        for tensor in (*layer.parameters(), *layer.buffers()):
            assert not tensor.requires_grad
            old.append(weakref.ref(tensor.untyped_storage()))
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8).clone()
            tensor.data = flat.view(tensor.dtype).view(tensor.shape)
        gc.collect()
        return [reference for reference in old if reference() is not None]

    assert not rebind()
    out = layer(x)
    assert not rebind()
    for tensor in (layer.weight, *layer.buffers()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    out.square().sum().backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


@FORMS
def test_a_cast_of_the_model_does_not_change_the_weight(form: str) -> None:
    layer = layer_of(form, matrix())
    before = layer.dequantized_weight()
    model = nn.Sequential(layer).to(torch.bfloat16).half().float()
    assert torch.equal(layer.dequantized_weight(), before)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = nn.Sequential(layer_of(form, matrix(seed=1)))
    other.load_state_dict(state)
    x = torch.randn(3, 320)
    assert torch.equal(other(x), model(x))
    assert layer.to("meta").weight.is_meta
