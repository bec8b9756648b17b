"""`ModuleAdapter`: an adapter on one layer, and the weight difference that it computes.

An adapter is a ``dict[str, ModuleAdapter]`` by module name (``blocks.0.attn1.to_q``, diffusers'
names), wherever it comes from: training (`onewan.adapters.lora.adapter_of`), a file of any trainer
(`onewan.formats.lora_files.read_adapter`) or a state dict in memory (`parse_adapter` there).

========== ============================================== ========================================
kind       tensors                                        added to the weight W [out, in]
========== ============================================== ========================================
lora       lora_A [r, in], lora_B [out, r]                s B A, where s = alpha / r
dora       the same and magnitude m                       m (W + s B A) / |W + s B A| - W; the norm
                                                          runs over inputs for m [out] or [out, 1],
                                                          over outputs for m [1, in]
loha       hada_w1_a, _b and hada_w2_a, _b, like B and A  s (w1_a w1_b) * (w2_a w2_b), elementwise
lokr       lokr_w1 and lokr_w2, each also as _a, _b       s kron(w1, w2); s is 1 if neither of the
                                                          two is a product (there is no rank then)
oft        oft_blocks [n, size, size] (LyCORIS)           R^T W - W by blocks of outputs
oft        rotation [n or 1, size, size] (PEFT)           W R^T - W by blocks of inputs
difference diff, as the weight                            diff
========== ============================================== ========================================

Each may have diff_b, added to the layer's bias; loha and lokr also a magnitude. On the patch
embedding, a convolution, `in` is all axes of W after the first, flattened: a product is reshaped to
W, and the factors of a LoRA may have W's axes. These are LyCORIS'
conventions, which ComfyUI and musubi-tuner share; `onewan.formats.peft` converts PEFT's to them.
Sources: LoRA arXiv 2106.09685, DoRA 2402.09353, FedPara (LoHa) 2108.06098, LyCORIS (LoKr)
2309.14859, OFT 2306.07280; each formula is tested against PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onewan.formats.adapter_parts import AdapterKind

BIASES = ("lora_B.bias", "diff_b")
"""Tensors that change a layer's bias, in the order that `ModuleAdapter` looks for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleAdapter:
    """The adapter on one layer. Tensors are on the CPU, in the precision of their source."""

    kind: AdapterKind
    tensors: Mapping[str, Tensor]
    """By the names in the table above."""
    alpha: float | None = None
    """None where the scale is 1. For LyCORIS' OFT: the bound on the norm of the generator."""

    @property
    def rank(self) -> int | None:
        """None for kinds without a rank, and for a LoKr of two full factors."""
        for part in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if part in self.tensors:
                return self.tensors[part].shape[0]
        return None

    @property
    def scale(self) -> float:
        """Multiplier of the low-rank product: alpha / rank (LoRA, arXiv 2106.09685, section 4.1;
        LyCORIS uses the same for LoHa and LoKr). rsLoRA's sqrt(rank) is already in alpha."""
        rank = self.rank
        return 1.0 if self.alpha is None or rank is None else self.alpha / rank

    @property
    def needs_weight(self) -> bool:
        """Whether the difference depends on the weight that it is added to."""
        return self.kind == "oft" or "magnitude" in self.tensors

    @property
    def changes_weight(self) -> bool:
        """Whether it changes the layer's weight, and not its bias alone."""
        return self.kind != "difference" or "diff" in self.tensors

    def difference(self, weight: Tensor | None = None) -> Tensor | None:
        """The difference to add to the weight at strength 1, float32 [out, in].

        None if only the bias changes. `weight` is that of the base model, whose shape the result
        has; ValueError if it is needed and not given, RuntimeError if the difference does not fit.
        """
        if weight is None and self.needs_weight:
            raise ValueError(f"the difference of {self.kind} depends on the weight")
        if self.kind == "oft":
            assert weight is not None
            return self._rotated(weight.float()) - weight.float()
        added = self._product()
        if added is None or weight is None:
            return added
        if added.ndim == 2 and len(added) == len(weight):
            added = added.reshape(weight.shape)
        if "magnitude" not in self.tensors:
            return added
        return _with_magnitude(weight.float() + added, self._float("magnitude")) - weight.float()

    def bias_difference(self) -> Tensor | None:
        """The difference to add to the bias, float32 [out]; None if the bias does not change."""
        if "lora_B.bias" in self.tensors:  # PEFT's ``lora_bias`` is scaled like the product
            return self.scale * self._float("lora_B.bias")
        return self._float("diff_b") if "diff_b" in self.tensors else None

    def _float(self, part: str) -> Tensor:
        return self.tensors[part].float()

    def _product(self) -> Tensor | None:
        """The scaled product of the factors, float32 [out, in]; None if there are none."""
        if self.kind in ("lora", "dora"):
            return self.scale * (
                self._float("lora_B").flatten(1) @ self._float("lora_A").flatten(1)
            )
        if self.kind == "loha":
            first = self._float("hada_w1_a") @ self._float("hada_w1_b")
            return self.scale * (first * (self._float("hada_w2_a") @ self._float("hada_w2_b")))
        if self.kind == "lokr":
            factors = [
                self._float(part)
                if part in self.tensors
                else self._float(f"{part}_a") @ self._float(f"{part}_b")
                for part in ("lokr_w1", "lokr_w2")
            ]
            return self.scale * torch.kron(factors[0], factors[1])
        return self._float("diff") if "diff" in self.tensors else None

    def _rotated(self, weight: Tensor) -> Tensor:
        """`weight` with its blocks of inputs (PEFT) or outputs (LyCORIS) rotated."""
        shape = weight.shape
        weight = weight.flatten(1)
        out_features, in_features = weight.shape
        if "rotation" in self.tensors:
            rotation = self._float("rotation")
            blocks = weight.reshape(out_features, -1, rotation.shape[-1])
            # `expand`: one rotation may be shared by all blocks.
            rotated = torch.einsum("onk,njk->onj", blocks, rotation.expand(blocks.shape[1], -1, -1))
            return rotated.reshape(shape)
        generator = self._float("oft_blocks")
        skew = generator - generator.transpose(1, 2)
        # LyCORIS' ``constraint``: alpha bounds the norm of the generator; 1e-8 is LyCORIS' own.
        if self.alpha and self.alpha > 0 and (norm := skew.norm() + 1e-8) > self.alpha:
            skew = skew * (self.alpha / norm)
        identity = torch.eye(skew.shape[-1])
        rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
        blocks = weight.reshape(len(skew), -1, in_features)
        return torch.einsum("knm,kni->kmi", rotation, blocks).reshape(shape)


def _with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """`weight` [out, in] with its rows scaled to the norms `magnitude`; for a magnitude [1, in],
    its columns."""
    matrix = weight.flatten(1)
    by_input = magnitude.ndim == 2 and magnitude.shape[0] == 1 and matrix.shape[0] != 1
    norm = matrix.norm(dim=0 if by_input else 1, keepdim=True)
    target = magnitude.reshape(1, -1) if by_input else magnitude.reshape(-1, 1)
    # A row of zeros has no direction: it stays zero instead of becoming NaN.
    scaled = matrix * (target / norm.clamp_min(torch.finfo(torch.float32).tiny))
    return scaled.reshape(weight.shape)
