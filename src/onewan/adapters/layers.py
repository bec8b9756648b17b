"""How adapted layers compute: PEFT's layers, with float32 masters at the cost of bfloat16 ones.

PEFT upcasts the input of a layer that has a float32 adapter, or hands out what autocast had made
bfloat16 as float32 again; its DoRA measures weights in the precision of the activations, which
changes a bfloat16 model before the first step; and it takes a quantised weight's bytes for its
numbers. Here each layer gives what its base layer gives, in that precision; what is made of weights
alone is made in float32; and a base weight is read through `base_numbers`.
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

from onewan.formats.lora import block_size
from onewan.model.quantized_linear import QuantizedLinear


def base_numbers(layer: BaseTunerLayer) -> Tensor:
    """float32 [out, in]: the weight under an adapter, expanded if it is quantised."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    return (base.expanded_weight() if isinstance(base, QuantizedLinear) else base.weight).float()


@torch.no_grad()
def row_lengths(layer: LoraLayer, adapter: str) -> Tensor:
    """float32 [out]: |W + s B A|, over inputs. A constant to autograd (DoRA, section 4.3)."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    with torch.autocast(a.device.type, enabled=False):
        return (base_numbers(layer) + layer.scaling[adapter] * (b @ a)).norm(dim=1)


class DoraVariant(DoraLinearVariant):
    """DoRA: x (W + s B A)^T m / |W + s B A| + bias."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        del kwargs
        base = module.get_base_layer()
        dropout = module.lora_dropout[active_adapter]
        plain = result
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            plain = base(x)
        if base.bias is not None:
            plain = plain - base.bias.to(plain.dtype)
        low = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        added = low * module.scaling[active_adapter]
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude / row_lengths(module, active_adapter)
        # One product, so that autograd keeps one activation of the outputs' width; its factor is 0
        # as long as nothing has been learned, in any precision.
        return result + added + (factor - 1).to(plain.dtype) * (plain + added)


class PissaVariant(LoraVariant):
    """PiSSA: W + s (B A - B0 A0), where A0 and B0 are what A and B started as.

    The base weight stays whole, rather than being relieved of s B0 A0 and rounded anew. So the
    model without the adapter is the base model, the base may be quantised, nothing changes before
    the first step, and a resumed run has the very same weights.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        del kwargs
        dropped = module.lora_dropout[active_adapter](x)
        now = module.lora_B[active_adapter](module.lora_A[active_adapter](dropped))
        start = F.linear(F.linear(x, module.pissa_A), module.pissa_B)
        return result + (now - start) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        start = module.pissa_B @ module.pissa_A * module.scaling[active_adapter]
        added = module.get_delta_weight(active_adapter) - start
        return orig_weight + added.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = PissaVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        start = module.pissa_B @ module.pissa_A * module.scaling[active_adapter]
        added = module.get_delta_weight(active_adapter) - start
        return orig_weight - added.to(orig_weight.dtype)


def _beside(layer: Any, x: Tensor) -> Tensor:
    """What `layer`, a LoHa or LoKr, gives: its base layer's output and that of what is added."""
    result = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return result
    total = result
    for adapter in layer.active_adapters:
        if adapter in layer._available_adapters:
            with torch.autocast(x.device.type, enabled=False):
                added = layer.get_delta_weight(adapter)
            total = total + F.linear(x, added)
    return total.to(result.dtype)


class LohaLinear(PeftLoha):
    """x (W + s (w1_a w1_b) * (w2_a w2_b))^T + bias."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        return _beside(self, x)

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        del apply_rank_dropout
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        factors = [getattr(self, name)[adapter_name] for name in names]
        scale = torch.tensor(self.scaling[adapter_name])
        # PEFT's function of autograd keeps the factors alone, and no product of them.
        return make_weight(factors[0], factors[1], factors[2], factors[3], scale)


class LokrLinear(PeftLokr):
    """x (W + s kron(w1, w2))^T + bias."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        return _beside(self, x)

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
    """(x R) W^T + bias, where R turns blocks of inputs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        if not (self.disable_adapters or self.merged):
            for adapter in self.active_adapters:
                if adapter in self.oft_R:
                    x = x + self._moved(x, adapter)
        return self.base_layer(x)

    def _moved(self, x: Tensor, adapter: str) -> Tensor:
        """x (R - 1), in the precision of `x`: what is small keeps its digits in bfloat16 too."""
        triangles = self.oft_R[adapter].weight
        assert isinstance(triangles, Tensor)
        with torch.autocast(x.device.type, enabled=False):
            turn = turn_of(triangles).to(x.dtype)
            blocks = x.unflatten(-1, (turn.shape[0], turn.shape[1]))
            return torch.einsum("...nk,nkj->...nj", blocks, turn).flatten(-2)


def turn_of(triangles: Tensor) -> Tensor:
    """float32 [n, size, size]: R - 1 from the numbers above Q's diagonal, [n, size (size-1) / 2].

    R = (1 - Q) (1 + Q)^-1, Cayley's transform, so R - 1 = -2 Q (1 + Q)^-1. PEFT's default, a few
    terms of the series, is no rotation any more where Q is large.
    """
    size = block_size(triangles.shape[1])
    assert size is not None
    rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
    upper = triangles.new_zeros(len(triangles), size, size)
    upper[:, rows, columns] = triangles
    q = upper - upper.transpose(1, 2)
    one = torch.eye(size, device=q.device, dtype=q.dtype)
    return torch.linalg.solve(one + q, -2 * q, left=False)


def triangles_of(rotation: Tensor) -> Tensor:
    """The inverse of `turn_of`: [n, size (size-1)/2] from rotations R [n, size, size], float32.

    ValueError if they are not rotations, or have eigenvalues of -1, which Cayley's have not.
    """
    size = rotation.shape[-1]
    r = rotation.double()
    one = torch.eye(size, dtype=r.dtype)
    try:
        q = torch.linalg.solve(one + r, one - r)
    except RuntimeError as error:
        raise ValueError("turns by half a circle") from error
    q = (q - q.transpose(1, 2)) / 2
    back = torch.linalg.solve(one + q, one - q, left=False)
    if not (back - r).abs().max() < 1e-3:
        raise ValueError("is no rotation")
    rows, columns = torch.triu_indices(size, size, 1)
    return q[:, rows, columns].float()
