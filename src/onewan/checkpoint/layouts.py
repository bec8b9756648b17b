"""How each layout stores a model: which files it has, and the keys in each of them.

=============  ==============================  =======================  ============================
layout         a transformer                   a VAE                    a text encoder
=============  ==============================  =======================  ============================
``diffusers``  folder: config.json, shards     folder                   folder (transformers)
``official``   folder: its config.json,        ``.pth``                 ``.pth``
               shards
``single``     ``.safetensors``                ``.safetensors``         ``.safetensors`` with
                                                                        transformers keys
``fp8_scaled`` the same, linear layers of the  (as ``single``)          the same
               blocks as float8_e4m3fn
=============  ==============================  =======================  ============================

fp8_scaled has ComfyUI's older keys, which its older and newer versions read: ``X.weight``,
``X.scale_weight`` (float32, one value) and an empty tensor ``scaled_fp8`` as a marker.

`plan_component` lists the files before anything is written, so that the free space can be checked
and impossible requests fail early.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onewan.checkpoint.component import ComponentWeights, NotFiniteError, SourceWeight, source_name
from onewan.checkpoint.target_formats import ModelFormat
from onewan.dtypes import dtype_name
from onewan.formats import key_maps
from onewan.formats.configs import CONFIG
from onewan.formats.finite import all_finite
from onewan.formats.model_folder import ComponentName
from onewan.formats.modelspec import model_spec
from onewan.formats.weights import TOKENIZER
from onewan.formats.write import LazyTensor, write_safetensors
from onewan.formats.write_pth import write_pth
from onewan.model.load import official_scheduler
from onewan.variants import TEXT_LENGTH, Variant, VariantName

SHARD_BYTES = 10_000_000_000
"""Maximum size of a shard in the official and the diffusers layout; diffusers' own default."""

FORMAT_VERSION = 1
"""Version of the ``onewan.*`` entries of the header."""

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_MARKER = "scaled_fp8"
_LINEAR = re.compile(
    r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))\.weight"
    r"|encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i_[01]|o))\.weight"
)
"""Weights that fp8_scaled quantizes: the linear layers in the blocks, which are nearly all of a
transformer or text encoder. The layers outside are sensitive (timestep, head) and small."""

BytesCallback = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to write, with its size."""

    path: str
    """Path under the destination, with slashes; empty if it is the destination itself."""
    bytes: int
    write: Callable[[Path, BytesCallback], None]


def plan_component(
    component: ComponentWeights,
    to: ModelFormat,
    path: str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[OutputFile]:
    """The files of `component` in layout `to`; `path` is its file or folder under the destination,
    empty for the destination itself.

    For `dtype` None each weight keeps its type (bfloat16 if the source has it quantized).
    """
    if to == "fp8_scaled" and component.kind != "vae":
        tensors = _renamed(component, to, _fp8(component, dtype or torch.bfloat16))
    else:
        stored = {n: w.as_stored(n, dtype) for n, w in component.weights.items()}
        tensors = _renamed(component, to, stored)
    if to == "diffusers":
        return _folder(component, path, tensors, _config(component, dtype), shard_bytes)
    if to == "official" and component.kind == "transformer":
        # Numbered and with an index even if there is one shard: that of TI2V-5B is in the root
        # folder, beside the files of the other components.
        config = official_config(component)
        return _folder(component, path, tensors, config, shard_bytes, numbered=True)
    if to == "official":
        return [OutputFile(path, _bytes(tensors), lambda file, on: write_pth(file, tensors, on))]
    metadata = header(component)
    if component.tokenizer is not None:
        tokenizer = component.tokenizer()
        tensors[TOKENIZER] = LazyTensor(tuple(tokenizer.shape), tokenizer.dtype, lambda: tokenizer)
    return [
        OutputFile(
            path,
            _bytes(tensors),
            lambda file, on: write_safetensors(file, tensors, metadata, on),
        )
    ]


def _bytes(tensors: Mapping[str, LazyTensor]) -> int:
    return sum(tensor.bytes for tensor in tensors.values())


def header(component: ComponentWeights) -> dict[str, str]:
    """The header's metadata of a single file: ModelSpec, facts of the source, configuration."""
    facts = {
        **component.facts,
        "format_version": FORMAT_VERSION,
        "version": version("onewan"),
        "component": component.kind,
        "source": source_name(component.source),
    }
    if component.variant is not None:
        facts["variant"] = component.variant.name
    if component.expert is not None:
        facts["expert"] = component.expert
    title = None if component.variant is None else component.variant.title
    return {
        **model_spec("wan_2_2", datetime.now(timezone.utc), title),
        **{f"onewan.{name}": str(value) for name, value in facts.items()},
        CONFIG: json.dumps(component.config, sort_keys=True),
    }


# ------------------------------------------------------------------------------------------ tensors


def _renamed(
    component: ComponentWeights, to: ModelFormat, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """`tensors` with the keys of the layout; the key of a scale follows that of its weight."""
    kind = component.kind
    # ComfyUI reads the text encoder with transformers keys only.
    if to == "diffusers" or (kind == "text_encoder" and to != "official"):
        return dict(tensors)
    by_stage = bool(component.config.get("is_residual"))

    def official(name: str) -> str:
        if kind == "vae":
            return key_maps.vae_to_official(name, by_stage=by_stage)
        return (
            key_maps.to_official(name) if kind == "transformer" else key_maps.t5_to_official(name)
        )

    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name == _MARKER:
            renamed[name] = tensor
        elif name.endswith(".scale_weight"):
            module = official(f"{name.removesuffix('.scale_weight')}.weight")
            renamed[f"{module.removesuffix('.weight')}.scale_weight"] = tensor
        else:
            renamed[official(name)] = tensor
    return renamed


def _fp8(component: ComponentWeights, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The weights, with linear layers in the blocks as fp8 and scale and all others in `dtype`."""
    tensors: dict[str, LazyTensor] = {
        _MARKER: LazyTensor(
            (0,), torch.float8_e4m3fn, lambda: torch.empty(0, dtype=torch.float8_e4m3fn)
        )
    }
    for name, weight in component.weights.items():
        if not _LINEAR.fullmatch(name):
            tensors[name] = weight.as_stored(name, dtype)
            continue
        scale_name = f"{name.removesuffix('.weight')}.scale_weight"
        tensors[name], tensors[scale_name] = _fp8_pair(name, weight)
    return tensors


def _fp8_pair(name: str, weight: SourceWeight) -> tuple[LazyTensor, LazyTensor]:
    """(fp8 weight, its scale); unchanged bits if the source stores the weight so already."""
    # The two tensors are written far apart, so the weight is read twice (for its scale and for its
    # values) instead of being kept. The scale, one value, is cached.
    scales: list[Tensor] = []

    def scale() -> Tensor:
        if not scales:
            scales.append(weight.fp8()[1] if weight.fp8 else _scale(weight.read(), name))
        return scales[0]

    def packed() -> Tensor:
        if weight.fp8:
            bits = weight.fp8()[0]
            if not all_finite(bits):
                raise NotFiniteError(f"{name}: holds values that are NaN")
            return bits
        return (weight.read().float() / scale()).to(torch.float8_e4m3fn)

    return LazyTensor(weight.shape, torch.float8_e4m3fn, packed), LazyTensor(
        (), torch.float32, scale
    )


def _scale(weight: Tensor, name: str) -> Tensor:
    """float32 []: the scale that maps the largest magnitude in `weight` to 448, the maximum of
    float8_e4m3fn. NotFiniteError if a value is not finite."""
    largest = weight.abs().max().float()
    if not torch.isfinite(largest):
        raise NotFiniteError(f"{name}: holds values that are NaN or infinite")
    # A weight of zeros: any scale is right but 0, by which the weight would be divided.
    return largest / _FP8_MAX if largest else torch.ones(())


# ------------------------------------------------------------------------------- folders of shards


def _folder(
    component: ComponentWeights,
    path: str,
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    shard_bytes: int,
    numbered: bool = False,
) -> list[OutputFile]:
    """config.json, the shards and their index. A single shard has no number and no index, unless
    `numbered`."""
    stem = "model" if component.kind == "text_encoder" else "diffusion_pytorch_model"
    under = f"{path}/" if path else ""
    shards = _shards(tensors, shard_bytes)
    numbered = numbered or len(shards) > 1
    files = [
        f"{stem}{f'-{n:05}-of-{len(shards):05}' if numbered else ''}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    written = [_json(f"{under}config.json", config)]
    for file, shard in zip(files, shards, strict=True):
        # The default argument binds this iteration's shard.
        def write(
            target: Path, on_bytes: BytesCallback, shard: dict[str, LazyTensor] = shard
        ) -> None:
            write_safetensors(target, shard, {}, on_bytes)

        written.append(OutputFile(f"{under}{file}", _bytes(shard), write))
    if numbered:
        file_of = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {
            "metadata": {"total_size": _bytes(tensors)},
            "weight_map": dict(sorted(file_of.items())),
        }
        written.append(_json(f"{under}{stem}.safetensors.index.json", index))
    return written


def _shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> list[dict[str, LazyTensor]]:
    """`tensors` in order, divided into shards of at most `shard_bytes`. A larger tensor gets a
    shard of its own."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.bytes
    return shards


def _json(path: str, data: Mapping[str, Any]) -> OutputFile:
    return _text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _text(path: str, text: str) -> OutputFile:
    return _content(path, text.encode())


def _content(path: str, content: bytes) -> OutputFile:
    """A small file with known content."""

    def write(target: Path, on_bytes: BytesCallback) -> None:
        target.write_bytes(content)
        on_bytes(len(content))

    return OutputFile(path, len(content), write)


def _config(component: ComponentWeights, dtype: torch.dtype | None) -> dict[str, Any]:
    config = dict(component.config)
    if component.kind == "text_encoder":  # transformers loads the weights in this type
        config["dtype"] = dtype_name(dtype or component.dtype)
    return config


def official_config(component: ComponentWeights) -> dict[str, Any]:
    """config.json of an official transformer. As in the official files, ``text_dim`` and
    ``patch_size`` are left out if they have the values of the released models."""
    config, variant = component.config, component.variant
    assert variant is not None
    kind = variant.name.partition("-")[0]
    fields: dict[str, Any] = {
        "_class_name": "WanModel",
        "_diffusers_version": config["_diffusers_version"],
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "model_type": "i2v" if kind == "fun" else kind,
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": TEXT_LENGTH,
    }
    if variant.reference_channels is not None:  # VideoX-Fun's names
        fields |= {"add_ref_conv": True, "in_dim_ref_conv": config["reference_channels"]}
    if config["text_dim"] != 4096:
        fields["text_dim"] = config["text_dim"]
    if list(config["patch_size"]) != [1, 2, 2]:
        fields["patch_size"] = list(config["patch_size"])
    return fields


# ------------------------------------------------------------------------------------ whole models

# Parts of the names that ComfyUI's repackaged files have on the hub: example workflows find ours.
_NAME_PARTS: Mapping[VariantName, tuple[str, str]] = {
    "t2v-a14b": ("t2v", "14B"),
    "i2v-a14b": ("i2v", "14B"),
    "ti2v-5b": ("ti2v", "5B"),
    "fun-inp-a14b": ("fun_inpaint", "14B"),
    "fun-control-a14b": ("fun_control", "14B"),
}
_DTYPE_PARTS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def path_in_model(
    name: ComponentName,
    component: ComponentWeights,
    variant: Variant,
    to: ModelFormat,
    dtype: torch.dtype,
) -> str:
    """The path of a component in the folder of a whole model, where programs that read the layout
    look for it. `dtype` is the type of most of its parameters."""
    if to == "diffusers":
        return name
    single = len(variant.experts) == 1
    if to == "official":
        return {
            "transformer": "" if single else "high_noise_model",
            "transformer_2": "low_noise_model",
            "vae": "Wan2.2_VAE.pth" if single else "Wan2.1_VAE.pth",
            "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        }[name]
    short = _DTYPE_PARTS[dtype]
    if component.kind == "vae":
        return "wan2.2_vae.safetensors" if single else "wan_2.1_vae.safetensors"
    if component.kind == "text_encoder":
        return f"umt5_xxl_{'fp8_e4m3fn_scaled' if to == 'fp8_scaled' else short}.safetensors"
    expert = next(e for e in variant.experts if e.component == name)
    kind, size = _NAME_PARTS[variant.name]
    stored = "fp8_scaled" if to == "fp8_scaled" else short
    return f"wan2.2_{kind}{expert.file_suffix}_{size}_{stored}.safetensors"


def plan_model_extras(
    to: ModelFormat,
    variant: Variant,
    components: Collection[ComponentName],
    tokenizer: Mapping[str, bytes],
) -> list[OutputFile]:
    """The files of a whole model besides `components`: pipeline index, scheduler and `tokenizer`
    (contents by file name)."""
    written: list[OutputFile] = []
    if to == "diffusers":
        scheduler = official_scheduler(variant)
        written.append(_text("scheduler/scheduler_config.json", scheduler.to_json_string()))
        written.append(_json("model_index.json", _model_index(variant, components, tokenizer)))
    where = "google/umt5-xxl" if to == "official" else "tokenizer"
    written += [_content(f"{where}/{name}", data) for name, data in sorted(tokenizer.items())]
    return written


def _model_index(
    variant: Variant, components: Collection[ComponentName], tokenizer: Collection[str]
) -> dict[str, Any]:
    image = variant.pipeline == "WanImageToVideoPipeline"
    transformer = ["diffusers", "WanTransformer3DModel"]
    # The first class reads tokenizer.json unchanged, the second converts a SentencePiece model.
    kind = "PreTrainedTokenizerFast" if "tokenizer.json" in tokenizer else "T5TokenizerFast"
    classes: dict[str, list[str]] = {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    index: dict[str, Any] = {
        "_class_name": variant.pipeline,
        "_diffusers_version": version("diffusers"),
        "boundary_ratio": variant.boundary,
        "expand_timesteps": variant.has_clean_first_frame,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", kind] if tokenizer else [None, None],
    }
    index |= {n: c if n in components else [None, None] for n, c in classes.items()}
    # Wan 2.2 has no image encoder, but the pipeline's constructor expects both entries.
    if image:
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index
