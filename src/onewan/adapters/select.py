"""Which linear layers a method trains: the user's words -> module names in a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from onewan.errors import ConfigError

ModuleGroup = Literal["self_attention", "cross_attention", "ffn"]

MODULES: dict[ModuleGroup, tuple[str, ...]] = {
    "self_attention": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    "cross_attention": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    "ffn": ("ffn.net.0.proj", "ffn.net.2"),
}
"""The ten linear layers of a transformer block, by diffusers' names."""


def select_modules(groups: Sequence[ModuleGroup]) -> tuple[str, ...]:
    """Names of the linear layers in each block that `groups` mean, in the model's order."""
    return tuple(name for group in MODULES if group in groups for name in MODULES[group])


def select_layers(asked: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Numbers of the blocks to train; None is all. ConfigError for a block that is not there."""
    if asked is None:
        return tuple(range(num_layers))
    if outside := [n for n in asked if n >= num_layers]:
        raise ConfigError(
            "run file",
            [
                f"wan_config.transformer_layers_to_train: has no block {n}; "
                f"the model's blocks are 0 to {num_layers - 1}"
                for n in outside
            ],
        )
    return tuple(sorted(set(asked)))
