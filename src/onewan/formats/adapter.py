"""One adapter on one layer: its tensors, and what they add to the layer's weight.

========== ============================================== ========================================
kind       parts                                          added to the weight W [out, in]
========== ============================================== ========================================
lora       lora_A [r, in], lora_B [out, r]                s B A, where s = alpha / r
dora       the same and magnitude m                       m (W + s B A) / |W + s B A| - W; the norm
                                                          runs over inputs for m [out] or [out, 1],
                                                          over outputs for m [1, in]
loha       hada_w1_a, _b and hada_w2_a, _b, like B and A  s (w1_a w1_b) * (w2_a w2_b), elementwise
lokr       lokr_w1 and lokr_w2, each also as _a, _b       s kron(w1, w2), where s counts only if one
                                                          of the two is a product
oft        oft_blocks [n, size, size] (LyCORIS)           R^T W - W by blocks of outputs
oft        rotation [n or 1, size, size] (PEFT)           W R^T - W by blocks of inputs
difference diff, as the weight                            diff
========== ============================================== ========================================

Each may have diff_b, added to the layer's bias; loha and lokr also a magnitude. These are LyCORIS'
conventions, which ComfyUI and musubi-tuner share; `from_peft` turns PEFT's, where the scale always
counts and OFT turns inputs, into them. Sources: LoRA arXiv 2106.09685, DoRA 2402.09353, FedPara
(LoHa) 2108.06098, LyCORIS (LoKr) 2309.14859, OFT 2306.07280; each is checked against PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from onewan.errors import CheckpointError
from onewan.formats.lora import AdapterKind, block_size, kind_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleAdapter:
    """What one layer gets. Tensors are on the CPU, in the precision of their file."""

    kind: AdapterKind
    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    """None where the scale is 1; LyCORIS' OFT bounds the rotation by it."""

    @property
    def rank(self) -> int | None:
        """None for kinds, or full factors, that have none."""
        for part in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if part in self.tensors:
                return self.tensors[part].shape[0]
        return None

    @property
    def scale(self) -> float:
        """What the product counts."""
        rank = self.rank
        return 1.0 if self.alpha is None or rank is None else self.alpha / rank

    @property
    def needs_weight(self) -> bool:
        """Whether what it adds depends on the weight that it is added to."""
        return self.kind == "oft" or "magnitude" in self.tensors

    def difference(self, weight: Tensor | None = None) -> Tensor | None:
        """What is added to the weight at strength 1, float32 [out, in].

        None if only the bias changes. `weight` [out, in] is that of the base model; ValueError if
        it is needed and not given.
        """
        if weight is None and self.needs_weight:
            raise ValueError(f"{self.kind} depends on the weight")
        if self.kind == "oft":
            assert weight is not None
            return self._turned(weight.float()) - weight.float()
        added = self._product()
        if added is None or "magnitude" not in self.tensors:
            return added
        assert weight is not None
        return _scaled_to(weight.float() + added, self._part("magnitude")) - weight.float()

    def bias_difference(self) -> Tensor | None:
        """What is added to the bias, float32 [out]; None if nothing is."""
        if "lora_B.bias" in self.tensors:  # PEFT's ``lora_bias``, which is scaled too
            return self.scale * self._part("lora_B.bias")
        return self._part("diff_b") if "diff_b" in self.tensors else None

    def _part(self, name: str) -> Tensor:
        return self.tensors[name].float()

    def _product(self) -> Tensor | None:
        if self.kind in ("lora", "dora"):
            return self.scale * (self._part("lora_B") @ self._part("lora_A"))
        if self.kind == "loha":
            first = self._part("hada_w1_a") @ self._part("hada_w1_b")
            return self.scale * (first * (self._part("hada_w2_a") @ self._part("hada_w2_b")))
        if self.kind == "lokr":
            factors = [
                self._part(name)
                if name in self.tensors
                else self._part(f"{name}_a") @ self._part(f"{name}_b")
                for name in ("lokr_w1", "lokr_w2")
            ]
            return self.scale * torch.kron(factors[0], factors[1])
        return self._part("diff") if "diff" in self.tensors else None

    def _turned(self, weight: Tensor) -> Tensor:
        out, into = weight.shape
        if "rotation" in self.tensors:
            rotation = self._part("rotation")
            blocks = weight.reshape(out, -1, rotation.shape[-1])
            turned = torch.einsum("onk,njk->onj", blocks, rotation.expand(blocks.shape[1], -1, -1))
            return turned.reshape(out, into)
        triangles = self._part("oft_blocks")
        skew = triangles - triangles.transpose(1, 2)
        # LyCORIS' constraint: alpha is the longest that the generator may be.
        if self.alpha and (length := skew.norm() + 1e-8) > self.alpha:
            skew = skew * (self.alpha / length)
        one = torch.eye(skew.shape[-1])
        rotation = (one + skew) @ torch.linalg.inv(one - skew)
        blocks = weight.reshape(len(skew), -1, into)
        return torch.einsum("knm,kni->kmi", rotation, blocks).reshape(out, into)


def _scaled_to(weight: Tensor, magnitude: Tensor) -> Tensor:
    """`weight` with rows (or columns, for a magnitude [1, in]) of the length that is asked for."""
    by_input = magnitude.ndim == 2 and magnitude.shape[0] == 1 and weight.shape[0] != 1
    length = weight.norm(dim=0 if by_input else 1, keepdim=True)
    wanted = magnitude.reshape(1, -1) if by_input else magnitude.reshape(-1, 1)
    return weight * (wanted / length.clamp_min(torch.finfo(torch.float32).tiny))


def from_peft(
    module: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> ModuleAdapter:
    """The adapter of a layer from PEFT's tensors, by our part names, and PEFT's settings.

    `settings` are those of ``LoraConfig`` and its kin (``to_dict()``, ``adapter_config.json``) or
    empty, which means alpha = rank. ValueError, TypeError or KeyError where they make no sense.
    """
    adapter = ModuleAdapter(kind=kind_of(parts), tensors=dict(parts))
    if adapter.kind == "oft":
        rotation = peft_rotation(parts["oft_R"].float(), settings)
        return replace(adapter, tensors={"rotation": rotation})
    rank = adapter.rank
    if settings:
        asked = settings["lora_alpha"] if "lora_alpha" in settings else settings["alpha"]
        alpha = float(_of_module(settings.get("alpha_pattern"), module, asked))
        if rank is not None:
            # rsLoRA counts alpha/sqrt(rank) times.
            alpha *= sqrt(rank) if settings.get("use_rslora") else 1.0
            adapter = replace(adapter, alpha=alpha)
        elif adapter.kind == "lokr":
            scale = alpha / int(_of_module(settings.get("rank_pattern"), module, settings["r"]))
            adapter = _folded(adapter, "lokr_w1", scale)
    return adapter


def _folded(adapter: ModuleAdapter, part: str, scale: float) -> ModuleAdapter:
    """`adapter` with one part multiplied; the very same if by 1."""
    if scale == 1.0:
        return adapter
    tensor = adapter.tensors[part]
    folded = (tensor.float() * scale).to(tensor.dtype)
    return replace(adapter, tensors={**adapter.tensors, part: folded})


def _of_module(pattern: Any, module: str, otherwise: Any) -> Any:
    """The value that PEFT takes for `module`: of the first expression that matches its end."""
    for expression, value in dict(pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", module):
            return value
    return otherwise


def peft_rotation(triangles: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """PEFT's rotation [n, size, size] from the numbers above the diagonal of its generator.

    Cayley's transform, by default as the first terms of its Neumann series, as PEFT has it: then
    the matrix is only nearly a rotation. With one block for all (``block_share``), n is 1.
    """
    if settings.get("coft"):
        raise CheckpointError(
            "the adapter is constrained OFT (coft), which onewan does not read; merge it with PEFT"
        )
    size = block_size(triangles.shape[1])
    assert size is not None
    rows, columns = torch.triu_indices(size, size, 1)
    q = torch.zeros(len(triangles), size, size)
    q[:, rows, columns] = triangles
    q = q - q.transpose(1, 2)
    one = torch.eye(size).expand_as(q)
    if not settings.get("use_cayley_neumann", True):
        return torch.linalg.solve(one + q, one - q, left=False)
    terms = int(settings.get("num_cayley_neumann_terms", 5))
    if terms < 2:
        return one.clone()
    total, power = one + 2 * q, q
    if terms == 2:
        return total
    # 1 + 2q + 2q^2 + ... + q^last: the last term counts once, and three terms have four.
    last = max(3, terms - 1)
    for exponent in range(2, last + 1):
        power = power @ q
        total = total + (power if exponent == last else 2 * power)
    return total
