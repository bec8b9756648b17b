"""Plain LoRAs of one rank on the same layers of some blocks, for tests of what is around them."""

from __future__ import annotations

from collections.abc import Sequence

from onewan.adapters.adapter_config import AdapterConfig
from onewan.formats.lora import LINEARS


def lora_spec(
    *, rank: int, alpha: float, layers: Sequence[int], modules: Sequence[str], dropout: float = 0.0
) -> AdapterConfig:
    """`modules` are layers within a block (``attn1.to_q``), or how several begin (``attn1``)."""
    inside = [name for name in LINEARS if name.startswith(tuple(modules))]
    names = tuple(f"blocks.{layer}.{name}" for layer in layers for name in inside)
    return AdapterConfig(
        kind="lora",
        modules=names,
        ranks=dict.fromkeys(names, rank),
        alphas=dict.fromkeys(names, float(alpha)),
        dropout=dropout,
    )
