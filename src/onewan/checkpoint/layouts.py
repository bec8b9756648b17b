"""How each layout arranges a model on disk: which file holds what, under which names.

=============  ==============================  =======================  ============================
layout         a transformer                   a VAE                    a text encoder
=============  ==============================  =======================  ============================
``diffusers``  folder: config.json, shards     folder                   folder (transformers)
``official``   folder: its config.json,        ``.pth``                 ``.pth``
               shards
``single``     ``.safetensors``                ``.safetensors``         ``.safetensors``, names of
                                                                        transformers
``fp8_scaled`` the same, linear layers of the  (as ``single``)          the same
               blocks as float8_e4m3fn
=============  ==============================  =======================  ============================

fp8_scaled is ComfyUI's older spelling, which its older and newer versions read: ``X.weight``,
``X.scale_weight`` (float32, one number) and an empty tensor ``scaled_fp8`` as the mark.

`plan_component` lists the files before anything is written, so that sizes are known beforehand and
an impossible request is refused in time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from onewan.checkpoint.component import ComponentWeights, SourceWeight, name_of
from onewan.dtypes import dtype_name
from onewan.errors import CheckpointError
from onewan.formats import key_maps
from onewan.formats.configs import CONFIG
from onewan.formats.model_folder import ComponentName
from onewan.formats.modelspec import model_spec
from onewan.formats.weights import TOKENIZER
from onewan.formats.write import LazyTensor, write_safetensors
from onewan.formats.write_pth import write_pth
from onewan.model.load import official_scheduler
from onewan.variants import TEXT_LENGTH, Variant

ModelFormat = Literal["diffusers", "official", "single", "fp8_scaled"]

SHARD_BYTES = 10_000_000_000
"""A shard of the official and the diffusers layout has at most this, as diffusers writes them."""

FORMAT_VERSION = 1
"""Version of the ``onewan.*`` part of the header."""

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_MARK = "scaled_fp8"
_LINEAR = re.compile(
    r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))\.weight"
    r"|encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i_[01]|o))\.weight"
)
"""What fp8_scaled quantises: linear layers within blocks, the bulk of transformer and encoder."""

BytesCallback = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file that will be written."""

    path: str
    """Path under the destination, with slashes; empty if it is the destination itself."""
    bytes: int
    write: Callable[[Path, BytesCallback], None]


def plan_component(
    component: ComponentWeights,
    to: ModelFormat,
    place: str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[OutputFile]:
    """The files of `component` in layout `to`; `place` is that of its file or folder.

    `dtype` None leaves each weight as it is (bfloat16 where the source has it quantized).
    """
    if to == "fp8_scaled" and component.kind != "vae":
        tensors = _renamed(component, to, _fp8(component, dtype or torch.bfloat16))
    else:
        stored = {n: w.as_stored(n, dtype) for n, w in component.weights.items()}
        tensors = _renamed(component, to, stored)
    if to == "diffusers":
        return _folder(component, place, tensors, _config(component, dtype), shard_bytes)
    if to == "official" and component.kind == "transformer":
        # Numbered and with an index even if there is one shard: that of TI2V-5B lies in the root,
        # among other files of weights.
        config = official_config(component)
        return _folder(component, place, tensors, config, shard_bytes, numbered=True)
    if to == "official":
        return [OutputFile(place, _bytes(tensors), lambda path, on: write_pth(path, tensors, on))]
    metadata = header(component)
    if component.tokenizer is not None:
        tokenizer = component.tokenizer()
        tensors[TOKENIZER] = LazyTensor(tuple(tokenizer.shape), tokenizer.dtype, lambda: tokenizer)
    return [
        OutputFile(
            place,
            _bytes(tensors),
            lambda path, on: write_safetensors(path, tensors, metadata, on),
        )
    ]


def _bytes(tensors: Mapping[str, LazyTensor]) -> int:
    return sum(tensor.bytes for tensor in tensors.values())


def header(component: ComponentWeights) -> dict[str, str]:
    """What a single file says of itself."""
    facts = {
        **component.facts,
        "format_version": FORMAT_VERSION,
        "version": version("onewan"),
        "component": component.kind,
        "source": name_of(component.source),
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
    """`tensors` under the names of the layout; a scale goes with its weight."""
    part = component.kind
    if to == "diffusers" or (part == "text_encoder" and to != "official"):
        return dict(tensors)
    by_stage = bool(component.config.get("is_residual"))

    def official(name: str) -> str:
        if part == "vae":
            return key_maps.vae_to_official(name, by_stage=by_stage)
        return (
            key_maps.to_official(name) if part == "transformer" else key_maps.t5_to_official(name)
        )

    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name == _MARK:
            renamed[name] = tensor
        elif name.endswith(".scale_weight"):
            module = official(f"{name.removesuffix('.scale_weight')}.weight")
            renamed[f"{module.removesuffix('.weight')}.scale_weight"] = tensor
        else:
            renamed[official(name)] = tensor
    return renamed


def _fp8(component: ComponentWeights, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The weights with the linear layers of the blocks as fp8 and scale, the rest in `dtype`."""
    tensors: dict[str, LazyTensor] = {
        _MARK: LazyTensor(
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
    """(fp8 weight, its scale); as the source has them where it has just these."""
    scales: list[Tensor] = []  # each weight is read for its scale, and again to be written

    def scale() -> Tensor:
        if not scales:
            scales.append(weight.fp8()[1] if weight.fp8 else _scale(weight.read(), name))
        return scales[0]

    def packed() -> Tensor:
        if weight.fp8:
            return weight.fp8()[0]
        return (weight.read().float() / scale()).to(torch.float8_e4m3fn)

    return LazyTensor(weight.shape, torch.float8_e4m3fn, packed), LazyTensor(
        (), torch.float32, scale
    )


def _scale(weight: Tensor, name: str) -> Tensor:
    """float32 []: the largest magnitude in `weight` becomes the largest of float8_e4m3fn, 448."""
    largest = weight.abs().max().float()
    if not torch.isfinite(largest):
        raise CheckpointError(
            f"{name}: holds {largest.item()}, which fp8 can't; the file is damaged, get it anew"
        )
    return largest / _FP8_MAX if largest else torch.ones(())


# ------------------------------------------------------------------------------- folders of shards


def _folder(
    component: ComponentWeights,
    place: str,
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    shard_bytes: int,
    numbered: bool = False,
) -> list[OutputFile]:
    """config.json, the shards and their index; one shard has neither number nor index unless it is
    to be `numbered`."""
    stem = "model" if component.kind == "text_encoder" else "diffusion_pytorch_model"
    under = f"{place}/" if place else ""
    shards = _shards(tensors, shard_bytes)
    numbered = numbered or len(shards) > 1
    files = [
        f"{stem}{f'-{n:05}-of-{len(shards):05}' if numbered else ''}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    written = [_json(f"{under}config.json", config)]
    for file, shard in zip(files, shards, strict=True):

        def write(
            path: Path, on_bytes: BytesCallback, shard: dict[str, LazyTensor] = shard
        ) -> None:
            write_safetensors(path, shard, {}, on_bytes)

        written.append(OutputFile(f"{under}{file}", _bytes(shard), write))
    if numbered:
        homes = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {
            "metadata": {"total_size": _bytes(tensors)},
            "weight_map": dict(sorted(homes.items())),
        }
        written.append(_json(f"{under}{stem}.safetensors.index.json", index))
    return written


def _shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> list[dict[str, LazyTensor]]:
    """`tensors` in their order, cut before a shard would get too large; one alone may be."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.bytes
    return shards


def _json(place: str, data: Mapping[str, Any]) -> OutputFile:
    return _text(place, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _text(place: str, text: str) -> OutputFile:
    return _content(place, text.encode())


def _content(place: str, content: bytes) -> OutputFile:
    """A small file, whose content is known."""

    def write(path: Path, on_bytes: BytesCallback) -> None:
        path.write_bytes(content)
        on_bytes(len(content))

    return OutputFile(place, len(content), write)


def _config(component: ComponentWeights, dtype: torch.dtype | None) -> dict[str, Any]:
    config = dict(component.config)
    if component.kind == "text_encoder":  # transformers loads in the type that is said here
        config["dtype"] = dtype_name(dtype or component.dtype)
    return config


def official_config(component: ComponentWeights) -> dict[str, Any]:
    """config.json of an official transformer. ``text_dim`` and ``patch_size`` are there only where
    they are not those of every released model, as the official files have it."""
    config, variant = component.config, component.variant
    assert variant is not None
    fields: dict[str, Any] = {
        "_class_name": "WanModel",
        "_diffusers_version": config["_diffusers_version"],
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "model_type": variant.name.partition("-")[0],
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": TEXT_LENGTH,
    }
    if config["text_dim"] != 4096:
        fields["text_dim"] = config["text_dim"]
    if list(config["patch_size"]) != [1, 2, 2]:
        fields["patch_size"] = list(config["patch_size"])
    return fields


# ------------------------------------------------------------------------------------ whole models

_SIZES = {"t2v-a14b": ("t2v", "14B"), "i2v-a14b": ("i2v", "14B"), "ti2v-5b": ("ti2v", "5B")}
_SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def path_in_model(
    placed: ComponentName,
    component: ComponentWeights,
    variant: Variant,
    to: ModelFormat,
    dtype: torch.dtype,
) -> str:
    """Where a component of a whole model lies in the model's folder, as readers of the layout
    expect. `dtype` is what most of the component is stored in."""
    if to == "diffusers":
        return placed
    single = len(variant.experts) == 1
    if to == "official":
        return {
            "transformer": "" if single else "high_noise_model",
            "transformer_2": "low_noise_model",
            "vae": "Wan2.2_VAE.pth" if single else "Wan2.1_VAE.pth",
            "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        }[placed]
    short = _SHORT[dtype]
    if component.kind == "vae":
        return "wan2.2_vae.safetensors" if single else "wan_2.1_vae.safetensors"
    if component.kind == "text_encoder":
        return f"umt5_xxl_{'fp8_e4m3fn_scaled' if to == 'fp8_scaled' else short}.safetensors"
    expert = next(e for e in variant.experts if e.component == placed)
    kind, size = _SIZES[variant.name]
    stored = "fp8_scaled" if to == "fp8_scaled" else short
    return f"wan2.2_{kind}{expert.file_suffix}_{size}_{stored}.safetensors"


def plan_model_extras(
    to: ModelFormat,
    variant: Variant,
    placed: Collection[ComponentName],
    tokenizer: Mapping[str, bytes],
) -> list[OutputFile]:
    """What a whole model has besides weights: the pipeline's index, scheduler and tokenizer (its
    files by name)."""
    written: list[OutputFile] = []
    if to == "diffusers":
        scheduler = official_scheduler(variant)
        written.append(_text("scheduler/scheduler_config.json", scheduler.to_json_string()))
        written.append(_json("model_index.json", _model_index(variant, placed, tokenizer)))
    where = "google/umt5-xxl" if to == "official" else "tokenizer"
    written += [_content(f"{where}/{name}", data) for name, data in sorted(tokenizer.items())]
    return written


def _model_index(
    variant: Variant, placed: Collection[ComponentName], tokenizer: Collection[str]
) -> dict[str, Any]:
    image = variant.pipeline == "WanImageToVideoPipeline"
    transformer = ["diffusers", "WanTransformer3DModel"]
    # The first reads tokenizer.json as it is, the second makes one of a SentencePiece model.
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
    index |= {n: c if n in placed else [None, None] for n, c in classes.items()}
    if image:
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index
