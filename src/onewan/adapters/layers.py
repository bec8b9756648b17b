"""Forward passes of adapted layers: PEFT's classes with float32 adapters beside bfloat16 weights.

PEFT casts the input of a layer with a float32 adapter to float32, or casts the bfloat16 output of
autocast back to float32; its DoRA computes the weight norm in the precision of the activations,
which changes a bfloat16 model before the first step; and it reads the bytes of a quantized weight
as if they were its values. Here each layer returns the precision of its base layer, everything that
depends on weights alone is computed in float32, and base weights are read through
`base_weight_float32`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.loha.layer import Linear as PeftLoha
from peft.tuners.loha.layer import make_weight
from peft.tuners.lokr.layer import Linear as PeftLokr
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.oft.layer import Linear as PeftOft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from onewan.formats.adapter_parts import block_size
from onewan.model.quantized_linear import QuantizedLinear


def base_weight_float32(layer: BaseTunerLayer) -> Tensor:
    """float32 [out, in]: the weight under an adapter, expanded if it is quantized."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    return (base.dequantized_weight() if isinstance(base, QuantizedLinear) else base.weight).float()


@torch.no_grad()
def row_norms(layer: LoraLayer, adapter: str) -> Tensor:
    """float32 [out]: |W + s B A|, the norm over inputs. A constant to autograd, as in section 4.3
    of DoRA (arXiv 2402.09353)."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    with torch.autocast(a.device.type, enabled=False):
        return (base_weight_float32(layer) + layer.scaling[adapter] * (b @ a)).norm(dim=1)


class DoraVariant(DoraLinearVariant):
    """DoRA: x (W + s B A)^T m / |W + s B A| + bias, where |.| is the norm of each row."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        del kwargs
        base = module.get_base_layer()
        dropout = module.lora_dropout[active_adapter]
        without_bias = result
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            # PEFT computed `result` from the inputs before dropout.
            without_bias = base(x)
        if base.bias is not None:
            without_bias = without_bias - base.bias.to(without_bias.dtype)
        low = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        added = low * module.scaling[active_adapter]
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude / row_norms(module, active_adapter)
        # As a single product autograd keeps one activation of the outputs' width instead of two.
        # Before the first step `factor` - 1 is exactly 0, so the output is the base layer's in any
        # precision.
        return result + added + (factor - 1).to(without_bias.dtype) * (without_bias + added)


class PissaVariant(LoraVariant):
    """PiSSA (arXiv 2404.02948): W + s (B A - B0 A0), where A0 and B0 are the initial A and B.

    The paper subtracts s B0 A0 from the base weight once, which rounds the weight a second time.
    Here the base weight does not change and the forward pass subtracts the product: the model
    without the adapter is the base model, the base may be quantized, the output is the same before
    the first step, and a resumed run has exactly the same weights.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        del kwargs
        dropped = module.lora_dropout[active_adapter](x)
        current = module.lora_B[active_adapter](module.lora_A[active_adapter](dropped))
        # Without dropout: in the paper this product is part of the frozen base weight.
        initial = F.linear(F.linear(x, module.pissa_A), module.pissa_B)
        return result + (current - initial) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _pissa_difference(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = PissaVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _pissa_difference(module, active_adapter).to(orig_weight.dtype)


def _pissa_difference(module: Any, adapter: str) -> Tensor:
    """float32 [out, in]: s (B A - B0 A0)."""
    initial = module.pissa_B @ module.pissa_A * module.scaling[adapter]
    return module.get_delta_weight(adapter) - initial


def _forward_with_difference(layer: Any, x: Tensor) -> Tensor:
    """The output of a LoHa or LoKr layer: the base layer's, and that of the weight difference."""
    result = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return result
    total = result
    for adapter in layer.active_adapters:
        if adapter in layer._available_adapters:
            # Autocast would multiply the float32 factors in bfloat16.
            with torch.autocast(x.device.type, enabled=False):
                added = layer.get_delta_weight(adapter)
            total = total + F.linear(x, added)
    return total.to(result.dtype)


class LohaLinear(PeftLoha):
    """x (W + s (w1_a w1_b) * (w2_a w2_b))^T + bias."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        return _forward_with_difference(self, x)

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        del apply_rank_dropout
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        factors = [getattr(self, name)[adapter_name] for name in names]
        # PEFT's autograd function saves its inputs for the backward pass, hence the scale as a
        # tensor. It saves only the factors, while autograd itself would keep two whole products.
        scale = torch.tensor(self.scaling[adapter_name])
        return make_weight(factors[0], factors[1], factors[2], factors[3], scale)


class LokrLinear(PeftLokr):
    """x (W + s kron(w1, w2))^T + bias."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        return _forward_with_difference(self, x)

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        del apply_rank_dropout
        w1, w2 = (self._factor(name, adapter_name) for name in ("lokr_w1", "lokr_w2"))
        return torch.kron(w1, w2) * self.scaling[adapter_name]

    def _factor(self, name: str, adapter: str) -> Tensor:
        whole = getattr(self, name)
        if adapter in whole:
            return whole[adapter]
        return getattr(self, f"{name}_a")[adapter] @ getattr(self, f"{name}_b")[adapter]


class OftLinear(PeftOft):
    """(x R) W^T + bias, where R rotates blocks of inputs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        if not (self.disable_adapters or self.merged):
            for adapter in self.active_adapters:
                if adapter in self.oft_R:
                    x = x + self.rotation_offset(x, adapter)
        return self.base_layer(x)

    def rotation_offset(self, x: Tensor, adapter: str) -> Tensor:
        """x (R - 1), in the precision of `x`. Near the start R is 1 + a small matrix, whose digits
        bfloat16 would lose beside the 1."""
        triangles = self.oft_R[adapter].weight
        assert isinstance(triangles, Tensor)
        with torch.autocast(x.device.type, enabled=False):
            offset = cayley_minus_identity(triangles).to(x.dtype)
            blocks = x.unflatten(-1, (offset.shape[0], offset.shape[1]))
            return torch.einsum("...nk,nkj->...nj", blocks, offset).flatten(-2)


def cayley_minus_identity(triangles: Tensor) -> Tensor:
    """float32 [n, size, size]: R - 1 from the values above the diagonal of Q,
    [n, size (size - 1) / 2].

    R = (1 - Q)(1 + Q)^-1, Cayley's transform (OFT, arXiv 2306.07280), so R - 1 = -2 Q (1 + Q)^-1.
    PEFT's default, a few terms of the Neumann series, is not orthogonal where Q is large.
    """
    size = block_size(triangles.shape[1])
    assert size is not None
    rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
    upper = triangles.new_zeros(len(triangles), size, size)
    upper[:, rows, columns] = triangles
    q = upper - upper.transpose(1, 2)
    identity = torch.eye(size, device=q.device, dtype=q.dtype)
    # Not `solve`, which waits for the device to see whether 1 + Q is singular. It can't be, since Q
    # is antisymmetric.
    return torch.linalg.solve_ex(identity + q, -2 * q, left=False).result


def triangles_of(rotation: Tensor) -> Tensor:
    """The inverse of `cayley_minus_identity`: float32 [n, size (size - 1) / 2] from rotations R
    [n, size, size].

    ValueError if a matrix is not a rotation, or has an eigenvalue of -1, which Cayley's transform
    does not reach.
    """
    size = rotation.shape[-1]
    # In float64, since 1 + R is nearly singular for rotations by almost 180 degrees.
    r = rotation.double()
    identity = torch.eye(size, dtype=r.dtype)
    try:
        q = torch.linalg.solve(identity + r, identity - r)
    except RuntimeError as error:
        raise ValueError("rotates by 180 degrees") from error
    # Q is skew-symmetric except for rounding, and only one of its triangles is returned.
    q = (q - q.transpose(1, 2)) / 2
    back = torch.linalg.solve(identity + q, identity - q, left=False)
    # 1e-3 is far above what float32 rounds off, and far below the error of a short Neumann series
    # unless its generator is almost 0. `not <` is also true for NaN.
    if not (back - r).abs().max() < 1e-3:
        raise ValueError("is not a rotation")
    rows, columns = torch.triu_indices(size, size, 1)
    return q[:, rows, columns].float()
