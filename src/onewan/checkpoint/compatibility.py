"""Which programs read a file: measured behavior, as rules over keys, shapes and types.

Measured in November 2026 with ComfyUI 0.33 and 0.3.64, diffusers 0.42.1, musubi-tuner 30c658c and
DiffSynth-Studio fed7b18: each key format was loaded, and is called readable if every tensor was
used and the result was right. Which base models musubi-tuner reads is taken from its documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onewan.formats.lora import LINEARS, AdapterLayout, WanShape
from onewan.formats.weights import ComponentFile


@dataclass(frozen=True, slots=True)
class ProgramSupport:
    """One program and this file."""

    program: str
    reads: bool
    why: str = ""
    """What is in the way, or what it takes."""


def programs_for_weights(weights: ComponentFile) -> tuple[ProgramSupport, ...]:
    """The programs that were tried with the weights of a model."""
    found = [_verdict("ComfyUI", _against_comfyui(weights)), _diffusers(weights)]
    if weights.kind == "transformer":
        found.append(_verdict("musubi-tuner", _against_musubi(weights)))
    return (*found, _verdict("the official code", _against_official(weights)))


def _verdict(program: str, obstacle: str | None) -> ProgramSupport:
    return ProgramSupport(program, obstacle is None, obstacle or "")


def _single(weights: ComponentFile) -> bool:
    return len(weights.file.files) == 1 and weights.file.container == "safetensors"


def _against_comfyui(weights: ComponentFile) -> str | None:
    """What keeps ComfyUI from reading the file; None if nothing does."""
    if weights.file.container == "gguf":
        return "needs the nodes of ComfyUI-GGUF"
    if not _single(weights):
        return "wants one safetensors file"
    wanted = "transformers" if weights.kind == "text_encoder" else "official"
    if weights.key_format != wanted:
        return f"wants the {wanted} names"
    if weights.kind == "transformer" and weights.prefix not in ("", "model.diffusion_model."):
        return f"does not know the prefix {weights.prefix}"
    if weights.kind != "transformer" and weights.prefix:
        return f"wants the names without {weights.prefix}"
    return _against_comfyui_fp8(weights)


def _against_comfyui_fp8(weights: ComponentFile) -> str | None:
    scales = [entry.scale for entry in weights.entries.values() if entry.scale]
    if not scales:
        return None
    if any(weights.file.tensors[scale].elements != 1 for scale in scales):
        return "wants one scale for each weight, and these have several"
    noted = any(n.endswith(".comfy_quant") for n in weights.file.tensors)
    noted = noted or "_quantization_metadata" in weights.file.metadata
    if any(scale.endswith(".weight_scale") for scale in scales):
        return None if noted else "wants comfy_quant or _quantization_metadata beside weight_scale"
    if f"{weights.prefix}scaled_fp8" not in weights.file.tensors:
        return "wants the marker scaled_fp8 beside scale_weight"
    types = {e.info.dtype for e in weights.entries.values() if e.packing == "fp8"}
    return "wants float8_e4m3fn with scale_weight" if types != {"F8_E4M3"} else None


def _diffusers(weights: ComponentFile) -> ProgramSupport:
    program = "diffusers"
    own = "transformers" if weights.kind == "text_encoder" else "diffusers"
    folder = weights.path.is_dir() and (weights.path / "config.json").is_file()
    if folder and weights.key_format == own and weights.quantization == "none":
        return ProgramSupport(program, True, "from_pretrained")
    if weights.kind == "text_encoder":
        return ProgramSupport(
            program, False, "wants a folder with config.json and transformers' names"
        )
    if weights.quantization.startswith("fp8"):
        return ProgramSupport(program, False, "would drop the scales and give wrong weights")
    if weights.path.is_dir() or weights.file.container == "pickle":
        return ProgramSupport(program, False, "wants its own folder, or one safetensors file")
    if weights.kind == "vae":
        flat = not weights.config.get("is_residual")
        return ProgramSupport(
            program, flat, "from_single_file" if flat else "can't map the Wan 2.2 VAE"
        )
    if weights.prefix == "diffusion_model.":
        return ProgramSupport(program, False, "does not know the prefix diffusion_model.")
    if weights.file.container == "gguf":
        return ProgramSupport(
            program, True, "from_single_file with GGUFQuantizationConfig and config= of the model"
        )
    is_default = weights.variant is not None and weights.variant.name == "t2v-a14b"
    how = "from_single_file" + ("" if is_default else " with config= and subfolder= of the model")
    return ProgramSupport(program, True, how)


def _against_musubi(weights: ComponentFile) -> str | None:
    if weights.variant is not None and weights.variant.name == "ti2v-5b":
        return "has no TI2V-5B"
    if weights.quantization != "none" and weights.quantization != "fp8":
        return f"does not read {weights.quantization} as a base"
    if weights.key_format != "official" or not _single(weights):
        return "wants one safetensors file with official names"
    return None


def _against_official(weights: ComponentFile) -> str | None:
    if weights.key_format != "official" or weights.prefix or weights.quantization != "none":
        return "wants its own layout; convert to official"
    if weights.kind == "transformer":
        own = weights.path.is_dir() and (weights.path / "config.json").is_file()
        return None if own else "wants a folder with config.json"
    return None if weights.file.container == "pickle" else "wants a .pth file"


# ----------------------------------------------------------------------------------------- adapters


def programs_for_adapter(
    layout: AdapterLayout, shape: WanShape | None
) -> tuple[ProgramSupport, ...]:
    """The programs that were tried with LoRAs. `shape` is that of the model, where it is known."""
    return tuple(_adapter_programs(layout, shape))


def _adapter_programs(layout: AdapterLayout, shape: WanShape | None) -> Iterator[ProgramSupport]:
    kinds = set(layout.kinds.values())
    plain = kinds == {"lora"}
    key_format = layout.key_format
    alphas = all("alpha" in parts for parts in layout.modules.values())
    blocks = {int(m.split(".")[1]) for m in layout.modules if m.startswith("blocks.")}
    # Of a model that is not known, the last block in the file may be its last.
    layers = shape.num_layers if shape else max(blocks, default=-1) + 1
    whole = alphas and len(layout.modules) >= layers * len(LINEARS) > 0
    if key_format == "comfyui":
        odd = kinds & {"dora"} or any("oft_R" in parts for parts in layout.modules.values())
        yield _verdict("ComfyUI", "has no spelling for DoRA and OFT of PEFT" if odd else None)
        yield _verdict("diffusers", None if plain else "reads nothing but LoRA for Wan")
        yield _verdict("musubi-tuner", None if plain else "was not tried with this kind")
        even = len(set(layout.ranks.values())) <= 1
        against = None if plain and even else "wants one rank for all modules"
        yield _verdict("DiffSynth-Studio", against if plain else "reads nothing but LoRA")
    elif key_format == "kohya":
        yield _verdict("ComfyUI", None if kinds <= {"lora", "loha", "lokr"} else "not this kind")
        missing = "wants every module of every block with its alpha; convert to kohya or comfyui"
        yield _verdict("diffusers", None if plain and whole else missing)
        yield _verdict("musubi-tuner", None if plain and alphas else "wants an alpha everywhere")
        yield ProgramSupport("DiffSynth-Studio", False, "does not know lora_unet_")
    else:
        only = key_format == "diffusers" and kinds <= {"lora", "dora"}
        other = "does not know these names; convert to comfyui"
        yield ProgramSupport("ComfyUI", False, other)
        yield ProgramSupport("diffusers", only, "" if only else other)
        yield ProgramSupport("musubi-tuner", False, other)
        bare = plain and layout.trainer == "DiffSynth-Studio"
        yield ProgramSupport("DiffSynth-Studio", bare, "" if bare else other)
