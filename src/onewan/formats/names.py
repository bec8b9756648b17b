"""Names of the transformer's weights in the two worlds: diffusers and official.

The map is a pure renaming, one to one, for the three variants of Wan 2.2
(``facts``: official ``wan/modules/model.py`` against diffusers' ``transformer_wan.py``; output
parity is tested on official weights). ComfyUI, musubi-tuner and most LoRA files use official names.
"""

from __future__ import annotations

# (diffusers, official) parts of a name. Each pair is whole path components, so that replacing one
# cannot cut into another; norm2 and norm3 change places, which is why names are mapped in one pass.
_OUTSIDE_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_IN_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
_OUTSIDE_BLOCKS_BACK = {official: ours for ours, official in _OUTSIDE_BLOCKS.items()}
_IN_BLOCK_BACK = {official: ours for ours, official in _IN_BLOCK.items()}


def _renamed(name: str, outside: dict[str, str], in_block: dict[str, str]) -> str:
    """`name`, a module or a tensor in it, under the other world's names; KeyError if unknown."""
    prefix, table, rest = "", outside, name
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        prefix, table = f"blocks.{number}.", in_block
    if rest in table:
        return prefix + table[rest]
    module, _, tensor = rest.rpartition(".")
    if module in table and tensor in ("weight", "bias"):
        return f"{prefix}{table[module]}.{tensor}"
    raise KeyError(name)


def to_official(name: str) -> str:
    """Official name of a diffusers module or tensor, e.g. ``blocks.3.attn1.to_q`` ->
    ``blocks.3.self_attn.q``. KeyError for a name that Wan 2.2 does not have."""
    return _renamed(name, _OUTSIDE_BLOCKS, _IN_BLOCK)


def to_diffusers(name: str) -> str:
    """The inverse of `to_official`."""
    return _renamed(name, _OUTSIDE_BLOCKS_BACK, _IN_BLOCK_BACK)
