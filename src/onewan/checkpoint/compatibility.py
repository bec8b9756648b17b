"""Which programs read a file: measured behavior, as rules over keys, shapes and types.

Measured in November 2026 with ComfyUI 0.33 and 0.3.64, diffusers 0.42.1, musubi-tuner 30c658c and
DiffSynth-Studio fed7b18: each key format was loaded, and is called readable if every tensor was
used and the result was right. Which base models musubi-tuner reads is taken from its documentation,
and what ai-toolkit 27a03a9 and diffusion-pipe 8f83dbf do with alphas from their source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onewan.formats.lora import LINEARS, AdapterLayout, WanShape
from onewan.formats.weights import ComponentFile


@dataclass(frozen=True, slots=True)
class ProgramSupport:
    """Whether one program reads a file."""

    name: str
    reads: bool
    note: str = ""
    """Why it does not read the file, or what the user has to do so that it does."""


def programs_reading_weights(weights: ComponentFile) -> tuple[ProgramSupport, ...]:
    """Support by the programs that were tested with the weights of a model."""
    found = [_support("ComfyUI", _comfyui_obstacle(weights))]
    if "reference_channels" in weights.config:
        obstacle = "has no layer for a reference image (ref_conv)"
        others = ("diffusers", "musubi-tuner", "the official code")
        return (*found, *(_support(program, obstacle) for program in others))
    found.append(_diffusers_support(weights))
    if weights.kind == "transformer":
        found.append(_support("musubi-tuner", _musubi_obstacle(weights)))
    return (*found, _support("the official code", _official_obstacle(weights)))


def _support(program: str, obstacle: str | None) -> ProgramSupport:
    return ProgramSupport(program, obstacle is None, obstacle or "")


def _is_single_safetensors(weights: ComponentFile) -> bool:
    return len(weights.file.files) == 1 and weights.file.container == "safetensors"


def _comfyui_obstacle(weights: ComponentFile) -> str | None:
    """Why ComfyUI does not read the file; None if it does."""
    if weights.file.container == "gguf":
        return "needs the nodes of ComfyUI-GGUF"
    if not _is_single_safetensors(weights):
        return "needs one safetensors file"
    needed = "transformers" if weights.kind == "text_encoder" else "official"
    if weights.key_format != needed:
        return f"needs {needed} keys"
    if weights.kind == "transformer" and weights.prefix not in ("", "model.diffusion_model."):
        return f"does not know the prefix {weights.prefix}"
    if weights.kind != "transformer" and weights.prefix:
        return f"needs keys without the prefix {weights.prefix}"
    return _comfyui_fp8_obstacle(weights)


def _comfyui_fp8_obstacle(weights: ComponentFile) -> str | None:
    scales = [entry.scale for entry in weights.entries.values() if entry.scale]
    if not scales:
        return None
    if any(weights.file.tensors[scale].elements != 1 for scale in scales):
        return "needs one scale for each weight, but some weights have several"
    described = any(n.endswith(".comfy_quant") for n in weights.file.tensors)
    described = described or "_quantization_metadata" in weights.file.metadata
    # Without the description or marker ComfyUI takes the file for a plain cast and ignores the
    # scales, so that it loads but computes something else.
    if any(scale.endswith(".weight_scale") for scale in scales):
        return (
            None if described else "needs comfy_quant or _quantization_metadata beside weight_scale"
        )
    if f"{weights.prefix}scaled_fp8" not in weights.file.tensors:
        return "needs the marker scaled_fp8 beside scale_weight"
    dtypes = {e.info.dtype for e in weights.entries.values() if e.packing == "fp8"}
    return "needs float8_e4m3fn with scale_weight" if dtypes != {"F8_E4M3"} else None


def _diffusers_support(weights: ComponentFile) -> ProgramSupport:
    program = "diffusers"
    own = "transformers" if weights.kind == "text_encoder" else "diffusers"
    folder = weights.path.is_dir() and (weights.path / "config.json").is_file()
    if folder and weights.key_format == own and weights.quantization == "none":
        return ProgramSupport(program, True, "from_pretrained")
    if weights.kind == "text_encoder":
        return ProgramSupport(
            program, False, "needs a folder with config.json and transformers keys"
        )
    if weights.quantization.startswith("fp8"):
        return ProgramSupport(program, False, "would ignore the scales and load wrong weights")
    if weights.path.is_dir() or weights.file.container == "pickle":
        return ProgramSupport(
            program, False, "needs a folder in its layout, or one safetensors file"
        )
    if weights.kind == "vae":
        # diffusers' key map for single files is that of the 2.1 VAE; the 2.2 VAE numbers its layers
        # by stage.
        is_2_1 = not weights.config.get("is_residual")
        return ProgramSupport(
            program, is_2_1, "from_single_file" if is_2_1 else "can't map the keys of the 2.2 VAE"
        )
    if weights.prefix == "diffusion_model.":
        return ProgramSupport(program, False, "does not know the prefix diffusion_model.")
    if weights.file.container == "gguf":
        return ProgramSupport(
            program, True, "from_single_file with GGUFQuantizationConfig and config= of the model"
        )
    # `from_single_file` loads with the configuration of a Wan 2.1 model. Only that of T2V 14B is
    # the same in Wan 2.2.
    is_default = weights.variant is not None and weights.variant.name == "t2v-a14b"
    how = "from_single_file" + ("" if is_default else " with config= and subfolder= of the model")
    return ProgramSupport(program, True, how)


def _musubi_obstacle(weights: ComponentFile) -> str | None:
    if weights.variant is not None and weights.variant.name == "ti2v-5b":
        return "does not support TI2V-5B"
    if weights.quantization != "none" and weights.quantization != "fp8":
        return f"does not read {weights.quantization} base models"
    if weights.key_format != "official" or not _is_single_safetensors(weights):
        return "needs one safetensors file with official keys"
    return None


def _official_obstacle(weights: ComponentFile) -> str | None:
    if weights.key_format != "official" or weights.prefix or weights.quantization != "none":
        return "needs the official layout; convert with --to official"
    if weights.kind == "transformer":
        own = weights.path.is_dir() and (weights.path / "config.json").is_file()
        return None if own else "needs a folder with config.json"
    return None if weights.file.container == "pickle" else "needs a .pth file"


# ----------------------------------------------------------------------------------------- adapters


def programs_reading_adapter(
    layout: AdapterLayout, shape: WanShape | None, *, is_scaled: bool
) -> tuple[ProgramSupport, ...]:
    """Support by the programs that were tested with LoRAs. `shape` is that of the base model, None
    if it is unknown; `is_scaled` says whether a module's alpha differs from its rank."""
    return (*_adapter_support(layout, shape), *_readers_without_alpha(layout, is_scaled=is_scaled))


def _readers_without_alpha(layout: AdapterLayout, *, is_scaled: bool) -> Iterator[ProgramSupport]:
    """Trainers that continue a LoRA without its alpha: one ignores it, one refuses the keys."""
    if layout.key_format.startswith("diffusion_model.transformer_"):
        # Its own file of both experts.
        yield ProgramSupport("ai-toolkit", True)
        yield ProgramSupport("diffusion-pipe", False, "was not tested with these keys")
        return
    remedy = "convert to no_alpha"
    has_alpha = any("alpha" in parts for parts in layout.modules.values())
    common = None
    if layout.key_format != "comfyui":
        common = f"was not tested with these keys; {remedy}"
    elif set(layout.kinds.values()) != {"lora"}:
        common = "was tested with LoRA only"
    elif not all(module.startswith("blocks.") for module in layout.modules):
        common = "trains layers of the blocks only"
    ignored = f"ignores alpha, which is not the rank here; {remedy}" if is_scaled else None
    yield _support("ai-toolkit", common or ignored)
    refused = f"refuses the keys of alpha; {remedy}" if has_alpha else None
    if len(set(layout.ranks.values())) > 1:
        refused = "needs the same rank in all modules"
    obstacle = common or refused
    yield ProgramSupport(
        "diffusion-pipe", obstacle is None, obstacle or "in a folder that holds no other file"
    )


def _adapter_support(layout: AdapterLayout, shape: WanShape | None) -> Iterator[ProgramSupport]:
    kinds = set(layout.kinds.values())
    only_lora = kinds == {"lora"}
    key_format = layout.key_format
    alphas = all("alpha" in parts for parts in layout.modules.values())
    blocks = {int(m.split(".")[1]) for m in layout.modules if m.startswith("blocks.")}
    # The number of blocks of an unknown model is at least that of the blocks in the file.
    layers = shape.num_layers if shape else max(blocks, default=-1) + 1
    complete = alphas and len(layout.modules) >= layers * len(LINEARS) > 0
    if key_format == "comfyui":
        yield _support("ComfyUI", _comfyui_adapter_obstacle(layout))
        yield _support("diffusers", None if only_lora else "reads only LoRA for Wan")
        yield _support("musubi-tuner", None if only_lora else "was not tested with this kind")
        one_rank = len(set(layout.ranks.values())) <= 1
        obstacle = None if one_rank else "needs the same rank in all modules"
        yield _support("DiffSynth-Studio", obstacle if only_lora else "reads only LoRA")
    elif key_format == "kohya":
        yield _support("ComfyUI", _comfyui_adapter_obstacle(layout))
        # diffusers' converter for kohya files looks up every layer of every block.
        missing = "needs every module of every block with its alpha; convert to kohya or comfyui"
        by_diffusers = missing if only_lora else "reads only LoRA for Wan"
        yield _support("diffusers", None if only_lora and complete else by_diffusers)
        yield _support("musubi-tuner", _musubi_adapter_obstacle(layout, has_alphas=alphas))
        yield ProgramSupport("DiffSynth-Studio", False, "does not know lora_unet_")
    else:
        unknown = "does not know these keys; convert to comfyui"
        by_diffusers = key_format == "diffusers" and kinds <= {"lora", "dora"}
        by_diffsynth = only_lora and layout.trainer == "DiffSynth-Studio"
        # ComfyUI renames VideoX-Fun's prefix to kohya's.
        is_fun = layout.prefix == "lora_unet__"
        yield _support("ComfyUI", _comfyui_adapter_obstacle(layout) if is_fun else unknown)
        yield _support("diffusers", None if by_diffusers else unknown)
        yield _support("musubi-tuner", unknown)
        yield _support("DiffSynth-Studio", None if by_diffsynth else unknown)


def _comfyui_adapter_obstacle(layout: AdapterLayout) -> str | None:
    """Why ComfyUI does not apply an adapter as its file means it; None if it does. The endings of
    keys are the same under ``diffusion_model.`` and ``lora_unet_``."""
    if any("oft_R" in parts for parts in layout.modules.values()):
        return "has no keys for PEFT's OFT, which rotates inputs"
    # Scaled outputs are computed from the norms of the unchanged weight.
    if "dora" in layout.kinds.values() and not layout.magnitude_by_input:
        return "applies DoRA right only with a magnitude for each input, [1, in]"
    if any("lora_B.bias" in parts for parts in layout.modules.values()):
        return "does not know PEFT's biases"
    return None


def _musubi_adapter_obstacle(layout: AdapterLayout, *, has_alphas: bool) -> str | None:
    """Why musubi-tuner does not read an adapter with kohya's keys; None if it does."""
    if not set(layout.kinds.values()) <= {"lora", "loha", "lokr"}:
        return "reads only LoRA, LoHa and LoKr"
    parts = {part for parts in layout.modules.values() for part in parts}
    if parts & {"magnitude", "diff_b"}:
        return "ignores magnitudes and differences of biases"
    if "lokr_w1_a" in parts:
        return "ignores a LoKr whose first factor is a product too"
    return None if has_alphas else "needs alpha everywhere"
