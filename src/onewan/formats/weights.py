"""Opens a file of weights of any program as one component, with the keys of diffusers.

`open_component` detects component, key format, prefix, variant and widths from keys and shapes. It
reads headers only, without torch, and ignores file names. `ComponentFile.read` returns the values
of a weight: fp8 times its scale, GGUF dequantized by the reference decoder, computed in float32
before anything is rounded to another type.

=============  ===========================================  ======================================
component      key formats                                  prefixes
=============  ===========================================  ======================================
transformer    official, diffusers                          none, ``model.diffusion_model.``,
                                                            ``diffusion_model.``
vae            official, diffusers                          none, ``vae.``, ``first_stage_model.``
text_encoder   official, transformers                       none, ``text_encoders.umt5xxl....``
=============  ===========================================  ======================================

ComfyUI's older keys for fp8 are ``X.scale_weight``, ``X.scale_input`` and a marker ``scaled_fp8``;
the newer ones are ``X.weight_scale``, ``X.input_scale``, and ``X.comfy_quant`` or the header's
``_quantization_metadata``. The weight is the stored value times the scale, of which there is one,
one for each row, or one for each block of a row (musubi-tuner). Input scales are for fp8 matrix
products, which training does not use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onewan.dtypes import FP8
from onewan.errors import CheckpointError
from onewan.formats import key_maps
from onewan.formats.backends import TensorInfo
from onewan.formats.configs import ComponentKind, configuration
from onewan.formats.container import TensorFile, open_tensors
from onewan.formats.untrusted import first_line, named, parse_json
from onewan.variants import (
    VARIANTS,
    Variant,
    variant_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KeyFormat = Literal["official", "diffusers", "transformers"]
Packing = Literal["plain", "fp8", "gguf"]

TOKENIZER = "spiece_model"
"""Key of the SentencePiece model, as bytes, in ComfyUI's files of the text encoder."""

_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_IGNORED_SUFFIXES = (".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """The key and form of a weight in the file."""

    key: str
    info: TensorInfo
    scale: str | None = None
    """Key of the scale that an fp8 weight is multiplied by."""

    @property
    def packing(self) -> Packing:
        if self.info.is_quantized:
            return "gguf"
        return "fp8" if self.info.dtype in FP8 else "plain"


@dataclass(frozen=True, kw_only=True)
class ComponentFile:
    """The weights of one component in one file or folder; `open_component` creates it."""

    file: TensorFile
    kind: ComponentKind
    key_format: KeyFormat
    prefix: str
    entries: Mapping[str, StoredWeight]
    """By diffusers' (text encoder: transformers') names."""
    unexpected: tuple[str, ...]
    """Keys of the file that no Wan 2.2 component of this kind has."""
    variant: Variant | None
    """Inferred from the channels. None for the text encoder, which all variants share, and for the
    VAE of the A14B models, which two variants share."""
    config: Mapping[str, Any]
    """Arguments of the diffusers or transformers class."""
    tokenizer: str | None = field(default=None)
    """Key of a SentencePiece model in the file."""

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def quantization(self) -> str:
        """``none``, ``fp8_scaled``, ``fp8`` (a plain cast) or ``gguf``."""
        packings = {entry.packing for entry in self.entries.values()}
        if "gguf" in packings:
            return "gguf"
        if "fp8" not in packings:
            return "none"
        return "fp8_scaled" if any(e.scale for e in self.entries.values()) else "fp8"

    def read(
        self, name: str, dtype: torch.dtype | None = None, *, keep_mapped: bool = False
    ) -> Tensor:
        """The values of weight `name` on the CPU, in `dtype`; for None as stored, or float32 if
        they are stored quantized. They are mapped from the file if nothing has to be computed;
        `keep_mapped` is as in `TensorFile.read`. CheckpointError for a scale of a wrong shape."""
        entry = self.entries[name]
        tensor = self.file.read(entry.key, keep_mapped=keep_mapped)
        if entry.packing == "gguf":
            tensor = _dequantize_gguf(tensor, entry.info)
        elif entry.packing == "fp8":
            scale = None if entry.scale is None else self.file.read(entry.scale)
            tensor = dequantize_fp8(tensor, scale, f"{self.path}: {entry.scale}")
        return tensor if dtype is None else tensor.to(dtype)


def dequantize_fp8(weight: Tensor, scale: Tensor | None, where: str) -> Tensor:
    """float32 of the shape of `weight`: an fp8 `weight` times its `scale`, of a shape that
    `check_fp8_scale` allows. `where` names the scale for the CheckpointError."""
    values = weight.float()
    if scale is None:
        return values
    check_fp8_scale(weight.shape, scale, where)
    scale = scale.float()
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.ndim == 2:
        return values * scale
    return (values.reshape(len(values), scale.shape[1], -1) * scale).reshape(weight.shape)


def check_fp8_scale(shape: Sequence[int], scale: Tensor, where: str) -> None:
    """CheckpointError, which names the scale as `where`, unless it is one value, [out, 1] or, one
    for each block of a row, [out, blocks, 1] for a weight of `shape`, [out, in]."""
    if scale.numel() == 1 or (len(shape) == 2 and scale.shape == (shape[0], 1)):
        return
    if len(shape) == 2 and scale.ndim == 3 and scale.shape[::2] == (shape[0], 1):
        blocks = scale.shape[1]
        if blocks and shape[1] % blocks == 0:
            return
    raise CheckpointError(
        f"{where}: is {list(scale.shape)} for a weight of {list(shape)}, expected one "
        "value, one for each row, or one for each block of a row; download the file again"
    )


def _dequantize_gguf(data: Tensor, info: TensorInfo) -> Tensor:
    # Imported lazily, so that headers can be inspected without torch and gguf.
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(data.numpy(), GGMLQuantizationType[info.dtype])
    return torch.from_numpy(values).reshape(info.shape)


# --------------------------------------------------------------------------------------- detection

_Translate = Callable[[str], str]


def _diffusers_transformer(name: str) -> str:
    key_maps.to_official(name)  # raises KeyError for a key that Wan does not have
    return name


def _diffusers_vae(name: str) -> str:
    key_maps.vae_to_official(name, by_stage="sampler." in name)
    return name


def _transformers_t5(name: str) -> str:
    if name == "encoder.embed_tokens.weight":  # the tied embedding is stored under either name
        return "shared.weight"
    key_maps.t5_to_official(name)
    return name


# Each is tried with each prefix, and the one that explains the most keys is taken: some keys, such
# as ``patch_embedding.weight``, are the same in two formats.
_TRANSLATIONS: tuple[tuple[ComponentKind, KeyFormat, _Translate, tuple[str, ...]], ...] = (
    (
        "transformer",
        "official",
        key_maps.to_diffusers,
        ("", "model.diffusion_model.", "diffusion_model."),
    ),
    (
        "transformer",
        "diffusers",
        _diffusers_transformer,
        ("", "model.diffusion_model.", "diffusion_model.", "transformer."),
    ),
    ("vae", "official", key_maps.vae_to_diffusers, ("", "vae.", "first_stage_model.")),
    ("vae", "diffusers", _diffusers_vae, ("", "vae.")),
    ("text_encoder", "official", key_maps.t5_to_transformers, ("",)),
    (
        "text_encoder",
        "transformers",
        _transformers_t5,
        ("", "text_encoders.umt5xxl.transformer.", "text_encoder."),
    ),
)

_RELATED_MODELS = (
    (r"(^|\.)vace_blocks\.", "a Wan VACE transformer"),
    (r"(^|\.)(face_adapter|motion_encoder|pose_patch_embedding)\.", "a Wan Animate transformer"),
    (r"(^|\.)(casual_audio_encoder|audio_injector|cond_encoder)\.", "a Wan S2V transformer"),
    (r"(^|\.)control_adapter\.", "a Wan Fun-Control-Camera transformer"),
    (
        r"\.k_img\.|(^|\.)img_emb\.|\.add_k_proj\.|(^|\.)image_embedder\.",
        "a Wan 2.1 image-to-video transformer, which has a CLIP branch",
    ),
)
"""Models that have most keys of Wan 2.2, by patterns of their additional keys. The order matters:
Animate also has the CLIP branch."""

_OTHER_ARCHITECTURES = (
    (r"(^|\.)double_blocks\.\d", "a Flux or HunyuanVideo model"),
    (r"(^|\.)(single_)?transformer_blocks\.\d", "a diffusers transformer of another model"),
    (r"(^|\.)joint_blocks\.\d", "a Stable Diffusion 3 model"),
    (r"(^|\.)(input_blocks|output_blocks)\.\d", "a Stable Diffusion 1, 2 or XL model"),
    (r"(^|\.)(down|up)_blocks\.\d+\.(attentions|motion_modules)\.", "a diffusers U-Net"),
    (r"(^|\.)(decoder|encoder)\.(mid|up|down)\.", "the VAE of a Stable Diffusion or Flux model"),
    (r"(^|\.)text_model\.encoder\.", "a CLIP text encoder"),
    (r"(^|\.)visual\.|vision_model\.", "a vision encoder"),
    (r"(^|\.)decoder\.block\.\d", "a T5 model with a decoder"),
    (r"(^|\.)layers\.\d+\.(self_attn|attention|mlp)\.", "a language model"),
)

_ADAPTER = re.compile(
    r"\.(lora_(A|B|down|up)|hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_(blocks|R)|dora_scale|diff|diff_b"
    r"|lora_magnitude_vector)(\.|$)"
)


def looks_like_adapter(file: TensorFile) -> bool:
    """Whether some key is that of an adapter (LoRA, DoRA, LoHa, LoKr, OFT)."""
    return any(_ADAPTER.search(name) for name in file.tensors)


def foreign_model(file: TensorFile) -> str | None:
    """The model other than Wan 2.2 that the file belongs to, in words; None if it is unknown."""
    for pattern, what in (*_RELATED_MODELS, *_OTHER_ARCHITECTURES):
        if any(re.search(pattern, name) for name in file.tensors):
            return what
    return None


def open_component(source: Path | TensorFile) -> ComponentFile:
    """The component in the file or folder `source`. CheckpointError if it is not one of Wan 2.2;
    the message names the other model if it is known."""
    file = source if isinstance(source, TensorFile) else open_tensors(source)
    if looks_like_adapter(file):
        raise CheckpointError(
            f"{file.path}: is an adapter (LoRA, DoRA, LoHa, LoKr or OFT), not the weights of "
            "a model; give a transformer, VAE or text encoder"
        )
    best: tuple[int, ComponentKind, KeyFormat, str, dict[str, StoredWeight], list[str]] | None = (
        None
    )
    for kind, key_format, translate, prefixes in _TRANSLATIONS:
        for prefix in prefixes:
            entries, unexpected = _translated(file, prefix, translate)
            if entries and (best is None or len(entries) > best[0]):
                best = (len(entries), kind, key_format, prefix, entries, unexpected)
    # Other models share a few keys with Wan; a damaged or extended Wan file has most of its own.
    if best is None or best[0] < len(file.tensors) / 4:
        what = foreign_model(file)
        examples = named(sorted(file.tensors)) or "none"
        raise CheckpointError(
            f"{file.path}: {f'is {what}, not' if what else 'holds no weights of'} Wan 2.2"
            f" (its keys: {examples}); give a Wan 2.2 transformer, VAE or text encoder"
        )
    _, kind, key_format, prefix, entries, unexpected = best
    if unexpected and kind == "transformer" and (what := foreign_model(file)):
        raise CheckpointError(
            f"{file.path}: is {what}; give a transformer of Wan 2.2 (docs/variants.md lists those "
            "that can be trained, and what others would take)"
        )
    _check_quantization(file, entries)
    shapes = {name: entry.info.shape for name, entry in entries.items()}
    config = configuration(file, kind, shapes)
    return ComponentFile(
        file=file,
        kind=kind,
        key_format=key_format,
        prefix=prefix,
        entries=entries,
        unexpected=tuple(name for name in unexpected if not name.endswith(TOKENIZER)),
        variant=_variant(file, kind, config),
        config=config,
        tokenizer=next((name for name in unexpected if name.endswith(TOKENIZER)), None),
    )


def _translated(
    file: TensorFile, prefix: str, translate: _Translate
) -> tuple[dict[str, StoredWeight], list[str]]:
    """(weights by diffusers' or transformers' keys, keys that `translate` does not know) for the
    keys after `prefix`."""
    entries: dict[str, StoredWeight] = {}
    unexpected: list[str] = []
    scales: dict[str, str] = {}
    for key, info in file.tensors.items():
        name = key.removeprefix(prefix)
        if name == _MARKER or name.endswith(_IGNORED_SUFFIXES):
            continue
        if ending := next((e for e in _SCALE_SUFFIXES if name.endswith(e)), None):
            scales[f"{key.removesuffix(ending)}.weight"] = key
            continue
        try:
            if not key.startswith(prefix):
                raise KeyError(key)
            entries[translate(name)] = StoredWeight(key, info)
        except KeyError:
            unexpected.append(key)
    # Afterwards, since a scale can precede its weight in the file.
    for name, entry in entries.items():
        if scale := scales.pop(entry.key, None):
            entries[name] = StoredWeight(entry.key, entry.info, scale)
    return entries, [*unexpected, *scales.values()]


def _check_quantization(file: TensorFile, entries: Mapping[str, StoredWeight]) -> None:
    """CheckpointError if the file stores weights in a form that can't be dequantized."""
    for entry in entries.values():
        if entry.packing == "gguf" and file.container != "gguf":  # such as safetensors' F4
            raise CheckpointError(
                f"{file.path}: {entry.key} is stored as {entry.info.dtype}, an unsupported "
                "quantization; give a file in fp8_scaled, GGUF, float32, float16 or bfloat16"
            )
        # GGUF's own types never get here; any other integer or 4-bit type would be read as values.
        if entry.packing == "plain" and (
            entry.scale is not None or entry.info.dtype[0] not in "FB" or entry.info.dtype == "BOOL"
        ):
            raise CheckpointError(
                f"{file.path}: {entry.key} is stored as {entry.info.dtype}"
                f"{' with a scale' if entry.scale else ''}, an unsupported quantization; "
                "give a file in fp8_scaled, GGUF, float32, float16 or bfloat16"
            )
    formats = {str(v)[:60] for v in _declared_formats(file)}
    if unknown := sorted(formats - {"float8_e4m3fn", "float8_e5m2"}):
        raise CheckpointError(
            f"{file.path}: its weights are quantized as {named(unknown)}, which is not "
            "supported; give a file in float8_e4m3fn or float8_e5m2, or one that is not quantized"
        )


def _declared_formats(file: TensorFile) -> list[object]:
    """The quantization formats that ComfyUI's newer files declare, in the header or in tensors."""
    formats: list[object] = []
    text = file.metadata.get("_quantization_metadata")
    try:
        if text is not None:
            formats += [layer["format"] for layer in parse_json(text)["layers"].values()]
        notes = [name for name in file.tensors if name.endswith(".comfy_quant")]
        # A few dozen bytes of JSON each; a larger tensor of that name is something else.
        small = [n for n in notes if file.tensors[n].elements < 4096]
        texts = [note.tobytes().decode("utf-8") for note in file.arrays(small).values()]
        formats += [parse_json(text)["format"] for text in texts]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file.path}: its quantization metadata is damaged ({first_line(error)}); download it "
            "again"
        ) from error
    return formats


# ------------------------------------------------------------------------------ variant and expert


def _variant(file: TensorFile, kind: ComponentKind, config: Mapping[str, Any]) -> Variant | None:
    if kind == "text_encoder":
        return None
    if kind == "vae":
        channels = config.get("z_dim", 16)
        fitting = [v for v in VARIANTS.values() if v.latent_channels == channels]
        if not fitting:
            raise CheckpointError(
                f"{file.path}: is a VAE with {channels} latent channels, but Wan 2.2 has 16 (A14B) "
                "and 48 (TI2V-5B); give one of these"
            )
        return fitting[0] if len(fitting) == 1 else None
    return variant_of(config, str(file.path))


_HIGH_LOW = re.compile(r"(high|low)[-_. ]?noise")

HighOrLow = Literal["high", "low"]


def expert_in_name(path: Path) -> HighOrLow | None:
    """The expert in the name of a file or folder: ``..._high_noise``, ``...-HighNoise``, or
    ``high`` as a separate word; None if the name contains neither or both."""
    stem = path.stem.lower()
    found = set(_HIGH_LOW.findall(stem)) or {"high", "low"}.intersection(re.split(r"[^a-z]+", stem))
    if len(found) != 1:
        return None
    return "high" if "high" in found else "low"


def detect_expert(
    path: Path, metadata: Mapping[str, str]
) -> tuple[HighOrLow, Literal["header", "name"]] | None:
    """(the expert of a pair that a file is for, where that was found): onewan's header, or else the
    file name; None if neither names one."""
    in_header = metadata.get("onewan.expert")
    if in_header == "high" or in_header == "low":
        return in_header, "header"
    named = expert_in_name(path)
    return None if named is None else (named, "name")
