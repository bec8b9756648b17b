"""`Overlay`: a finished adapter that is computed beside the weights of a transformer.

Layers, parameters and their names stay as they are: each layer gets a hook that adds what the
adapter adds to its output, and buffers for the adapter's tensors. So it lies over whatever the
layer is (trained by any method, packed, streamed), and nothing is left of it once it is removed.

Every layer of Wan that an adapter changes is linear in its weight and its bias: the output with
W + dW and b + db is the output with W and b plus that with dW and db.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from onewan.adapters.merging import check_modules_exist
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.untrusted import named

_PARTS = ("down", "up", "weight", "bias")
"""Names of a layer's tensors: of a low-rank pair, and of differences of its weight and bias."""


class Overlay:
    """A finished adapter for `transformer`, which has it only while it is attached."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        modules: Mapping[str, ModuleAdapter],
        name: str,
        *,
        strength: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`modules` are LoRAs and differences, by the names of layers, and `strength` multiplies
        them. The tensors of blocks are kept in `dtype`, that of the matrix products, all others in
        float32. The transformer may be on the meta device.

        CheckpointError, which names the adapter as `name`, for layers that the transformer does not
        have, for shapes that do not fit, and for kinds that depend on the weights.
        """
        check_modules_exist(transformer, modules, name)
        self._layers: list[tuple[nn.Module, dict[str, Tensor]]] = []
        self._attached: list[tuple[nn.Module, list[str], RemovableHandle]] = []
        problems: list[str] = []
        for module, adapter in modules.items():
            try:
                layer = _layer(transformer, module)
                parts = _parts(layer, adapter, strength)
            except (ValueError, RuntimeError, IndexError) as error:
                problems.append(f"{module} {str(error).splitlines()[0]}")
                continue
            kept = dtype if module.startswith("blocks.") else torch.float32
            # Copies: the file may be replaced, and where tensors begin in a mapped file, and thus
            # how products round, differs by file.
            copies = {p: t.to(kept, copy=True).contiguous() for p, t in parts.items()}
            self._layers.append((layer, copies))
        if problems:
            raise CheckpointError(
                f"{name}: does not fit the model in {len(problems)} of {len(modules)} layers: "
                f"{named(problems, '; ')}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for _, tensors in self._layers for t in tensors.values())

    def attach(self, device: torch.device | None = None) -> None:
        """Add the adapter to the transformer, with its tensors on `device`, or, with None, where
        the weights of each layer are. Not while its blocks compute."""
        for layer, tensors in self._layers:
            place = device or next(layer.parameters()).device
            prefix = f"overlay_{_count(layer)}"
            names = {part: f"{prefix}_{part}" for part in tensors}
            # All before the first is registered: memory may not suffice.
            there = {part: tensor.to(place) for part, tensor in tensors.items()}
            for part, tensor in there.items():
                # Not persistent: it is no part of the model's weights.
                layer.register_buffer(names[part], tensor, persistent=False)
            handle = layer.register_forward_hook(_Hook(names))
            self._attached.append((layer, list(names.values()), handle))

    def detach(self) -> None:
        """Remove the adapter from the transformer. Repeatable."""
        while self._attached:
            layer, names, handle = self._attached.pop()
            handle.remove()
            for name in names:
                del layer._buffers[name]

    @contextmanager
    def attached(self, device: torch.device | None = None) -> Iterator[None]:
        """A context in which the transformer has the adapter."""
        try:
            self.attach(device)
            yield
        finally:
            self.detach()


class _Hook:
    """Adds to a layer's output what its tensors, buffers of the layer with these `names`, add."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Read anew at each use, since the buffers of blocks may be streamed.
        tensors = {part: layer._buffers[name] for part, name in self._names.items()}
        (x, *_) = inputs
        # In the precision of the layer itself: a few compute in float32 also under autocast.
        if output.dtype == torch.float32:
            with torch.autocast(x.device.type, enabled=False):
                return _sum(layer, x.float(), output, _as_type(torch.float32, tensors))
        return _sum(layer, x, output, tensors)


def _as_type(dtype: torch.dtype, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {part: None if t is None else t.to(dtype) for part, t in tensors.items()}


def _sum(
    layer: nn.Module, x: Tensor, output: Tensor, tensors: Mapping[str, Tensor | None]
) -> Tensor:
    """`output` plus what a layer with the tensors of an adapter in place of its own returns for the
    input `x`.

    Without gradients it overwrites `output`, which is the layer's own: another tensor of this size
    is 0.9 GB in the feed-forward layer of A14B at 81x480x832.
    """
    down, up, weight, bias = (tensors.get(part) for part in _PARTS)
    in_place = not torch.is_grad_enabled() and output.is_contiguous()
    if down is None or up is None:
        added = _difference(layer, x, weight, bias).to(output.dtype)
        return output.add_(added) if in_place else output + added
    low = F.linear(x, down)
    if not in_place:
        return output + F.linear(low, up, bias).to(output.dtype)
    rows = output.view(-1, output.shape[-1])
    rows.addmm_(low.flatten(0, -2).to(output.dtype), up.to(output.dtype).T)
    return output if bias is None else output.add_(bias)


def _difference(layer: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The output of a layer with differences of its weight and bias in place of these."""
    base: Any = _base(layer)
    if weight is None:
        assert bias is not None
        return bias.reshape(-1, 1, 1, 1) if isinstance(base, nn.Conv3d) else bias
    if isinstance(base, nn.RMSNorm):
        return F.rms_norm(x, base.normalized_shape, weight, base.eps)
    if isinstance(base, nn.LayerNorm):
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
    if isinstance(base, nn.Conv3d):
        return F.conv3d(x, weight, bias, base.stride, base.padding)
    return F.linear(x, weight, bias)


# ----------------------------------------------------------------------------------- construction


def _layer(transformer: WanTransformer3DModel, module: str) -> nn.Module:
    """The layer called `module`; ValueError for a parameter and for other kinds of layers."""
    try:
        layer = transformer.get_submodule(module)
    except AttributeError:  # a modulation table is a parameter
        raise ValueError("is no layer") from None
    if not isinstance(_base(layer), nn.Linear | nn.Conv3d | nn.RMSNorm | nn.LayerNorm):
        raise ValueError("is no layer with a weight")
    return layer


def _base(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _parts(layer: nn.Module, adapter: ModuleAdapter, strength: float) -> dict[str, Tensor]:
    """The tensors of `_PARTS` that the adapter has, float32, with `strength` and alpha in them;
    ValueError if they do not fit the layer."""
    base: Any = _base(layer)
    is_linear = isinstance(base, nn.Linear)
    parts: dict[str, Tensor] = {}
    if adapter.kind not in ("lora", "difference"):
        raise ValueError(f"has a {adapter.kind}, and only LoRAs and differences can be laid over")
    if adapter.kind == "lora" and is_linear:
        down, up = adapter.tensors["lora_A"].float(), adapter.tensors["lora_B"].float()
        _check("outputs", up.shape[0], base.out_features)
        _check("inputs", down.shape[1], base.in_features)
        parts = {"down": down, "up": strength * adapter.scale * up}
    elif adapter.changes_weight:
        # A packed weight has another shape than the layer.
        shape = (base.out_features, base.in_features) if is_linear else tuple(base.weight.shape)
        # Without memory: the shape alone is needed.
        added = adapter.difference(torch.empty(shape, device="meta"))
        assert added is not None
        _check("a weight", list(added.shape), list(shape))
        parts["weight"] = strength * added
    bias = adapter.bias_difference()
    if bias is not None:
        if base.bias is None:
            raise ValueError("has no bias")
        _check("a bias", list(bias.shape), list(base.bias.shape))
        parts["bias"] = strength * bias
    return parts


def _check(what: str, got: object, want: object) -> None:
    if got != want:
        raise ValueError(f"has {what} of {got} in the file, and of {want} in the model")


def _count(layer: nn.Module) -> int:
    """A number that no attached overlay of `layer` has."""
    numbers = (name.split("_")[1] for name in layer._buffers if name.startswith("overlay_"))
    return 1 + max(map(int, numbers), default=-1)
