"""Groups and patterns of diffusers' names of layers and weights, as `method.modules` uses them.

A pattern has the syntax of `fnmatch` and matches a whole name or its end after a dot:
``attn1.to_q`` is that layer in all blocks, ``blocks.[0-9].*`` is everything in the first ten.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

BLOCK = re.compile(r"blocks\.(\d+)\.")
"""Beginning of the names within one transformer block."""

LINEAR_GROUPS: dict[str, str] = {
    "self_attention": r"blocks\.\d+\.attn1\.to_(q|k|v|out\.0)",
    "cross_attention": r"blocks\.\d+\.attn2\.to_(q|k|v|out\.0)",
    "attention": r"blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)",
    "ffn": r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
    "all_linears": r".*",
}
"""Groups of linear layers, by the regular expression that their full names match."""

_NORMS = r"blocks\.\d+\.(attn[12]\.norm_[qk]|norm2)\.(weight|bias)"


def block_of(name: str) -> int | None:
    """The index of the block that a layer or weight is in; None outside the blocks."""
    found = BLOCK.match(name)
    return int(found[1]) if found else None


def grouped_linears(names: Sequence[str]) -> dict[str, list[str]]:
    """Those of the linear layers `names` that each group of `config.method.ADAPTER_GROUPS` has."""
    return {g: [n for n in names if re.fullmatch(r, n)] for g, r in LINEAR_GROUPS.items()}


def grouped_weights(names: Sequence[str], linears: Collection[str]) -> dict[str, list[str]]:
    """Those of the weights `names` that each group of `config.method.WEIGHT_GROUPS` has.

    `linears` are the names of all linear layers: a group of them stands for their weights and
    biases.
    """
    layer_of = {name: name.rpartition(".")[0] for name in names}
    groups = {
        group: [n for n in names if layer_of[n] in linears and re.fullmatch(r, layer_of[n])]
        for group, r in LINEAR_GROUPS.items()
    }
    groups["all"] = list(names)
    groups["norms"] = [n for n in names if re.fullmatch(_NORMS, n)]
    groups["biases"] = [n for n in names if n.endswith(".bias")]
    return groups


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """Those of `names` that `pattern` matches, or whose end after a dot it matches."""
    # fnmatch itself ignores case on Windows.
    return [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")]
