"""The configuration of a component: read beside its weights, or inferred from their shapes.

A configuration is in the header of files that onewan wrote, or in config.json beside the weights in
the diffusers and the official layout. Single files of other programs have none. For these the
widths follow from shapes, and all other settings are the same in every Wan 2.2 model.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

from onewan.errors import CheckpointError
from onewan.formats.container import TensorFile
from onewan.formats.untrusted import named, parse_json, read_json
from onewan.variants import TI2V_5B_LATENTS_MEAN, TI2V_5B_LATENTS_STD

ComponentKind = Literal["transformer", "vae", "text_encoder"]

CONFIG = "onewan.config"
"""Entry of the header with the diffusers or transformers configuration as JSON, in files that
onewan wrote. Some of it can't be inferred from shapes (the number of heads, for example)."""

_LARGEST_SETTING = 1 << 24
_LARGEST_SETTINGS = {
    "num_layers": 1000,
    "num_res_blocks": 100,
    "dim_mult": 1000,
    "rope_max_seq_len": 1 << 16,
    "patch_size": 64,
    "z_dim": 1 << 16,
}
"""Limits of settings that decide how much memory or time building a module takes; far above those
of any Wan model."""

HEAD_DIM = 128
"""Channels of an attention head in every Wan model; can't be inferred from shapes."""


def configuration(
    file: TensorFile, kind: ComponentKind, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Arguments of the diffusers or transformers class of a component of this `kind`: from its
    configuration if there is one, otherwise from the `shapes` of its weights by diffusers' (text
    encoder: transformers') keys. CheckpointError if weights that determine the widths are missing,
    or their shapes are impossible."""
    try:
        stored = _stored_config(file)
        # `dim` marks an official configuration, which has other keys than diffusers'.
        if stored is not None and "dim" not in stored:
            return _checked(file, kind, shapes, stored)
        if kind == "transformer":
            return _transformer_config(file, shapes, stored or {})
        return _vae_config(shapes) if kind == "vae" else _t5_config(shapes)
    except KeyError as error:
        raise CheckpointError(
            f"{file.path}: is an incomplete {kind.replace('_', ' ')}, without {error.args[0]}; "
            "copy or download it again"
        ) from None
    except (IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{file.path}: has weights of impossible shapes ({error}); download it again"
        ) from error


def _stored_config(file: TensorFile) -> dict[str, Any] | None:
    """The configuration in the header, or in config.json beside the weights."""
    if text := file.metadata.get(CONFIG):
        try:
            config = parse_json(text)
        except ValueError as error:
            raise CheckpointError(
                f"{file.path}: {CONFIG} in its header is not valid JSON ({error}); convert or "
                "download it again"
            ) from error
        return config if isinstance(config, dict) else None
    beside = file.path / "config.json"
    if not file.path.is_dir() or not beside.is_file():
        return None
    return read_json(beside)


def _checked(
    file: TensorFile,
    kind: ComponentKind,
    shapes: Mapping[str, tuple[int, ...]],
    config: dict[str, Any],
) -> dict[str, Any]:
    """`config` if a module can be built from it in the memory of its weights; CheckpointError names
    a setting that is missing, no number, or larger than any model's."""
    needed = {
        "transformer": ("num_attention_heads", "attention_head_dim", "in_channels", "ffn_dim"),
        "vae": (),
        "text_encoder": ("d_model", "num_heads", "vocab_size"),
    }[kind]
    layers = {"transformer": "blocks.", "text_encoder": "encoder.block."}.get(kind)
    wrong = [f"{name} is missing" for name in needed if name not in config]
    wrong += [
        f"{name} is {value!r:.60}"
        for name, value in config.items()
        if not _is_possible(name, value, is_number=name in (*needed, *_LARGEST_SETTINGS))
    ]
    if layers is not None:
        depth = len(layers.split(".")) - 1
        blocks = {int(name.split(".")[depth]) for name in shapes if name.startswith(layers)}
        if config.get("num_layers") != max(blocks, default=-1) + 1:
            wrong.append(
                f"num_layers is {config.get('num_layers')!r:.60}, and there are weights of "
                f"{max(blocks, default=-1) + 1}"
            )
    if wrong:
        raise CheckpointError(
            f"{file.path}: its configuration does not describe its weights ({named(wrong, '; ')}); "
            "correct it or download it again"
        )
    return config


def _is_possible(name: str, value: object, *, is_number: bool) -> bool:
    """Whether a setting, or each part of a list, is within limits; `is_number`: and a number."""
    parts = value if isinstance(value, list) else [value]
    limit = _LARGEST_SETTINGS.get(name, _LARGEST_SETTING)
    numbers = [p for p in parts if isinstance(p, int) and not isinstance(p, bool)]
    if len(parts) > 1000 or not all(-limit <= number <= limit for number in numbers):
        return False
    return not is_number or value is None or len(numbers) == len(parts)


def _transformer_config(
    file: TensorFile, shapes: Mapping[str, tuple[int, ...]], official: Mapping[str, Any]
) -> dict[str, Any]:
    width, in_channels, *patch = shapes["patch_embedding.weight"]
    heads = official.get("num_heads")
    if heads is None:
        heads, rest = divmod(width, HEAD_DIM)
        if rest or not heads:
            raise CheckpointError(
                f"{file.path}: has a width of {width}, which is no multiple of {HEAD_DIM}, the "
                "width of Wan's attention heads; put its config.json beside it"
            )
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    embedder = "condition_embedder"
    reference = shapes.get("ref_conv.weight")
    return {
        **({} if reference is None else {"reference_channels": reference[1]}),
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // prod(patch),
        "text_dim": shapes[f"{embedder}.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes[f"{embedder}.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": max(blocks) + 1,
        "eps": official.get("eps", 1e-6),
    }


def _vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    base, channels = shapes["encoder.conv_in.weight"][0], shapes["post_quant_conv.weight"][0]
    # Only the 2.2 VAE has layers named ``downsampler`` and ``upsampler``; the 2.1 VAE numbers its
    # own. The defaults of the class are those of the 2.1 VAE.
    if not any("sampler." in name for name in shapes):
        return {"base_dim": base, "z_dim": channels}
    decoder_out = shapes["decoder.conv_out.weight"][1]
    return {
        "base_dim": base,
        "decoder_base_dim": decoder_out,
        "z_dim": channels,
        "is_residual": True,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": list(TI2V_5B_LATENTS_MEAN),
        "latents_std": list(TI2V_5B_LATENTS_STD),
    }


def _t5_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vocabulary, width = shapes["shared.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    blocks = {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.block.")}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_heads": heads,
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": max(blocks) + 1,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }
