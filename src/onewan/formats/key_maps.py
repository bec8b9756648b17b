"""Maps between official and diffusers or transformers state-dict keys.

`ref_conv` is a layer of VideoX-Fun's Wan2.2-Fun-Control that diffusers does not have; it has the
same name in both.

Each map is a one-to-one renaming: no tensor is reshaped, split or joined. Tests compare the outputs
on official weights. ComfyUI, musubi-tuner, GGUF and most LoRA files use official keys; only
ComfyUI's files of the text encoder have those of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# -------------------------------------------------------------------------------------- transformer

# diffusers' and official parts of a key. All consist of whole path components, so that no
# replacement cuts into another one. norm2 and norm3 are swapped, so keys are mapped in one pass.
_OUTSIDE_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "ref_conv": "ref_conv",
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
_OUTSIDE_BLOCKS_INVERSE = {official: ours for ours, official in _OUTSIDE_BLOCKS.items()}
_IN_BLOCK_INVERSE = {official: ours for ours, official in _IN_BLOCK.items()}


def _renamed(name: str, outside: dict[str, str], in_block: dict[str, str]) -> str:
    """`name`, of a module or of a tensor in it, with its parts replaced by the tables; KeyError if
    they do not contain it."""
    prefix, table, rest = "", outside, name
    if name.startswith("blocks."):
        number, _, rest = name.removeprefix("blocks.").partition(".")
        if not re.fullmatch(r"\d{1,4}", number, re.ASCII):
            raise KeyError(name)
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
    return _renamed(name, _OUTSIDE_BLOCKS_INVERSE, _IN_BLOCK_INVERSE)


def transformer_names(num_layers: int, *, takes_reference: bool = False) -> set[str]:
    """diffusers' keys of all tensors of a Wan 2.2 transformer with `num_layers` blocks; with
    `takes_reference`, of one that has Fun-Control's `ref_conv`."""
    # The tables of modulation are parameters themselves, not modules with a weight and a bias.
    left_out = {"scale_shift_table"} | (set() if takes_reference else {"ref_conv"})
    modules = [m for m in _OUTSIDE_BLOCKS if m not in left_out]
    inside = [m for m in _IN_BLOCK if m != "scale_shift_table"]
    modules += [f"blocks.{n}.{m}" for n in range(num_layers) for m in inside]
    tables = ["scale_shift_table", *(f"blocks.{n}.scale_shift_table" for n in range(num_layers))]
    return {
        *(f"{m}.weight" for m in modules),
        *(f"{m}.bias" for m in modules if not m.endswith((".norm_q", ".norm_k"))),
        *tables,
    }


# ---------------------------------------------------------------------------------------------- VAE

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_ENDS = {
    "conv1": "conv_in",
    "head.0": "norm_out",
    "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
}
_VAE_OUTSIDE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_RESIDUAL_INVERSE = {ours: official for official, ours in _RESIDUAL.items()}
_VAE_ENDS_INVERSE = {ours: official for official, ours in _VAE_ENDS.items()}
_VAE_OUTSIDE_INVERSE = {ours: official for official, ours in _VAE_OUTSIDE.items()}

# Index of the resampling layer in its stage, after the residual blocks: two in the encoder, three
# in the decoder (``num_res_blocks`` is 2 in both VAEs).
_RESAMPLER_INDEX = {"down": 2, "up": 3}
_RESAMPLER = r"(?:resample|time_conv)\."


def vae_to_diffusers(name: str) -> str:
    """diffusers' key of a tensor of an official VAE; KeyError for one that no Wan VAE has.

    Source: ``wan/modules/{vae2_1,vae2_2}.py``. The 2.1 VAE numbers the layers of all stages
    consecutively (``decoder.upsamples.7``), the 2.2 VAE by stage
    (``decoder.upsamples.1.upsamples.3``).
    """
    half, _, rest = name.partition(".")
    if half in _VAE_OUTSIDE:
        return f"{_VAE_OUTSIDE[half]}.{rest}"
    if half not in ("encoder", "decoder"):
        raise KeyError(name)
    if match := re.fullmatch(
        r"(down|up)samples\.([0-9]{1,4})\.\1samples\.([0-9]{1,4})\.(.+)", rest
    ):
        way, stage, index, inner = match.groups()
        if re.match(_RESAMPLER, inner):
            return f"{half}.{way}_blocks.{stage}.{way}sampler.{inner}"
        inner = _replace_start(inner, _RESIDUAL)
        return f"{half}.{way}_blocks.{stage}.resnets.{index}.{inner}"
    if match := re.fullmatch(r"downsamples\.([0-9]{1,4})\.(.+)", rest):
        inner = match[2]
        if not re.match(_RESAMPLER, inner):
            inner = _replace_start(inner, _RESIDUAL)
        return f"{half}.down_blocks.{match[1]}.{inner}"
    if match := re.fullmatch(r"upsamples\.([0-9]{1,4})\.(.+)", rest):
        stage, index = divmod(int(match[1]), _RESAMPLER_INDEX["up"] + 1)
        if index == _RESAMPLER_INDEX["up"]:
            return f"{half}.up_blocks.{stage}.upsamplers.0.{match[2]}"
        return f"{half}.up_blocks.{stage}.resnets.{index}.{_replace_start(match[2], _RESIDUAL)}"
    ours = _replace_start(rest, _VAE_ENDS)
    if match := re.fullmatch(r"(mid_block\.resnets\.\d)\.(.+)", ours):
        ours = f"{match[1]}.{_replace_start(match[2], _RESIDUAL)}"
    return f"{half}.{ours}"


def vae_to_official(name: str, *, by_stage: bool) -> str:
    """The inverse of `vae_to_diffusers`. `by_stage` is true for the 2.2 VAE (``is_residual``)."""
    half, _, rest = name.partition(".")
    if half in _VAE_OUTSIDE_INVERSE:
        return f"{_VAE_OUTSIDE_INVERSE[half]}.{rest}"
    if half not in ("encoder", "decoder"):
        raise KeyError(name)
    if match := re.fullmatch(r"(down|up)_blocks\.([0-9]{1,4})\.resnets\.([0-9]{1,4})\.(.+)", rest):
        way, stage, index = match[1], int(match[2]), int(match[3])
        inner = _replace_start(match[4], _RESIDUAL_INVERSE)
        if by_stage:
            return f"{half}.{way}samples.{stage}.{way}samples.{index}.{inner}"
        return f"{half}.{way}samples.{stage * (_RESAMPLER_INDEX[way] + 1) + index}.{inner}"
    if match := re.fullmatch(r"(down|up)_blocks\.([0-9]{1,4})\.\1sampler\.(.+)", rest):
        way, stage, inner = match.groups()
        return f"{half}.{way}samples.{stage}.{way}samples.{_RESAMPLER_INDEX[way]}.{inner}"
    if match := re.fullmatch(r"up_blocks\.([0-9]{1,4})\.upsamplers\.0\.(.+)", rest):
        index = int(match[1]) * (_RESAMPLER_INDEX["up"] + 1) + _RESAMPLER_INDEX["up"]
        return f"{half}.upsamples.{index}.{match[2]}"
    if match := re.fullmatch(r"down_blocks\.([0-9]{1,4})\.(.+)", rest):
        inner = match[2]
        if not re.match(_RESAMPLER, inner):
            inner = _replace_start(inner, _RESIDUAL_INVERSE)
        return f"{half}.downsamples.{match[1]}.{inner}"
    official = _replace_start(rest, _VAE_ENDS_INVERSE)
    if match := re.fullmatch(r"(middle\.[02])\.(.+)", official):
        official = f"{match[1]}.{_replace_start(match[2], _RESIDUAL_INVERSE)}"
    return f"{half}.{official}"


def _replace_start(name: str, table: Mapping[str, str]) -> str:
    """`name` with its leading components replaced by `table`; KeyError if none of them match."""
    for old, new in table.items():
        if name.startswith(old + "."):
            return new + name[len(old) :]
    raise KeyError(name)


# ------------------------------------------------------------------------------------- text encoder

_T5_OUTSIDE = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
_T5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_T5_OUTSIDE_INVERSE = {ours: official for official, ours in _T5_OUTSIDE.items()}
# The longer name first, since relative_attention_bias is inside SelfAttention.
_T5_BLOCK_INVERSE = {
    ours: official for official, ours in sorted(_T5_BLOCK.items(), key=lambda pair: -len(pair[1]))
}


def t5_to_transformers(name: str) -> str:
    """transformers' key of a tensor of the official UMT5 encoder (``wan/modules/t5.py``); KeyError
    for one that it does not have."""
    if name in _T5_OUTSIDE:
        return _T5_OUTSIDE[name]
    if match := re.fullmatch(r"blocks\.([0-9]{1,4})\.(.+)", name):
        return f"encoder.block.{match[1]}.{_replace_start(match[2], _T5_BLOCK)}"
    raise KeyError(name)


def t5_to_official(name: str) -> str:
    """The inverse of `t5_to_transformers`."""
    if name in _T5_OUTSIDE_INVERSE:
        return _T5_OUTSIDE_INVERSE[name]
    if match := re.fullmatch(r"encoder\.block\.([0-9]{1,4})\.(.+)", name):
        return f"blocks.{match[1]}.{_replace_start(match[2], _T5_BLOCK_INVERSE)}"
    raise KeyError(name)
