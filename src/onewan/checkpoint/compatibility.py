"""Which programs read a file: what was measured of them, as rules over names, shapes and types.

Measured in November 2026 with ComfyUI 0.33 and 0.3.64, diffusers 0.42.1, musubi-tuner 30c658c and
DiffSynth-Studio fed7b18: each spelling was loaded, and counted as read if every tensor was used and
the result was right. Only what musubi-tuner takes as a base model is as its documentation says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onewan.formats.lora import LINEARS, AdapterLayout, WanShape
from onewan.formats.weights import Weights


@dataclass(frozen=True, slots=True)
class Reader:
    """One program and this file."""

    program: str
    reads: bool
    why: str = ""
    """What is in the way, or what it takes."""


def readers_of_weights(weights: Weights) -> tuple[Reader, ...]:
    """The programs that were tried with the weights of a model."""
    found = [_verdict("ComfyUI", _against_comfyui(weights)), _diffusers(weights)]
    if weights.part == "transformer":
        found.append(_verdict("musubi-tuner", _against_musubi(weights)))
    return (*found, _verdict("the official code", _against_official(weights)))


def _verdict(program: str, obstacle: str | None) -> Reader:
    return Reader(program, obstacle is None, obstacle or "")


def _single(weights: Weights) -> bool:
    return len(weights.file.files) == 1 and weights.file.kind == "safetensors"


def _against_comfyui(weights: Weights) -> str | None:
    """What keeps ComfyUI from reading the file; None if nothing does."""
    if weights.file.kind == "gguf":
        return "needs the nodes of ComfyUI-GGUF"
    if not _single(weights):
        return "wants one safetensors file"
    wanted = "transformers" if weights.part == "text_encoder" else "official"
    if weights.naming != wanted:
        return f"wants the {wanted} names"
    if weights.part == "transformer" and weights.prefix not in ("", "model.diffusion_model."):
        return f"does not know the prefix {weights.prefix}"
    if weights.part != "transformer" and weights.prefix:
        return f"wants the names without {weights.prefix}"
    return _against_comfyui_fp8(weights)


def _against_comfyui_fp8(weights: Weights) -> str | None:
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


def _diffusers(weights: Weights) -> Reader:
    program = "diffusers"
    own = "transformers" if weights.part == "text_encoder" else "diffusers"
    folder = weights.path.is_dir() and (weights.path / "config.json").is_file()
    if folder and weights.naming == own and weights.quantisation == "none":
        return Reader(program, True, "from_pretrained")
    if weights.part == "text_encoder":
        return Reader(program, False, "wants a folder with config.json and transformers' names")
    if weights.quantisation.startswith("fp8"):
        return Reader(program, False, "would drop the scales and give wrong weights")
    if weights.path.is_dir() or weights.file.kind == "pickle":
        return Reader(program, False, "wants its own folder, or one safetensors file")
    if weights.part == "vae":
        flat = not weights.config.get("is_residual")
        return Reader(program, flat, "from_single_file" if flat else "can't map the Wan 2.2 VAE")
    if weights.prefix == "diffusion_model.":
        return Reader(program, False, "does not know the prefix diffusion_model.")
    if weights.file.kind == "gguf":
        return Reader(
            program, True, "from_single_file with GGUFQuantizationConfig and config= of the model"
        )
    known = weights.variant is not None and weights.variant.name == "t2v-a14b"
    how = "from_single_file" + ("" if known else " with config= and subfolder= of the model")
    return Reader(program, True, how)


def _against_musubi(weights: Weights) -> str | None:
    if weights.variant is not None and weights.variant.name == "ti2v-5b":
        return "has no TI2V-5B"
    if weights.quantisation != "none" and weights.quantisation != "fp8":
        return f"does not read {weights.quantisation} as a base"
    if weights.naming != "official" or not _single(weights):
        return "wants one safetensors file with official names"
    return None


def _against_official(weights: Weights) -> str | None:
    if weights.naming != "official" or weights.prefix or weights.quantisation != "none":
        return "wants its own layout; convert to official"
    if weights.part == "transformer":
        own = weights.path.is_dir() and (weights.path / "config.json").is_file()
        return None if own else "wants a folder with config.json"
    return None if weights.file.kind == "pickle" else "wants a .pth file"


# ----------------------------------------------------------------------------------------- adapters


def readers_of_adapter(layout: AdapterLayout, shape: WanShape | None) -> tuple[Reader, ...]:
    """The programs that were tried with LoRAs. `shape` is that of the model, where it is known."""
    return tuple(_adapter_readers(layout, shape))


def _adapter_readers(layout: AdapterLayout, shape: WanShape | None) -> Iterator[Reader]:
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
        yield Reader("DiffSynth-Studio", False, "does not know lora_unet_")
    else:
        only = key_format == "diffusers" and kinds <= {"lora", "dora"}
        other = "does not know these names; convert to comfyui"
        yield Reader("ComfyUI", False, other)
        yield Reader("diffusers", only, "" if only else other)
        yield Reader("musubi-tuner", False, other)
        bare = plain and layout.trainer == "DiffSynth-Studio"
        yield Reader("DiffSynth-Studio", bare, "" if bare else other)
