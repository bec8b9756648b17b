"""The formats that weights are converted to, and what each is for: one table for the command line
and for the page. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

ModelFormat = Literal["diffusers", "official", "single", "fp8_scaled"]

MODEL_FORMATS: Mapping[str, str] = {
    "diffusers": "a folder that WanPipeline.from_pretrained loads",
    "official": "the layout of the Wan-AI repositories: high_noise_model/, Wan2.1_VAE.pth, ...",
    "single": ".safetensors with official names, as ComfyUI reads them",
    "fp8_scaled": "the same with the large layers in 8 bits: half the size of bfloat16",
}
"""Of models and their components, by `ModelFormat`."""

LORA_FORMATS: Mapping[str, str] = {
    "comfyui": "also read by diffusers, musubi-tuner and DiffSynth-Studio",
    "no_alpha": "the same with alpha / rank multiplied into the weights, also read by ai-toolkit "
    "and diffusion-pipe",
    "diffusers": "keys as diffusers itself writes them",
    "kohya": "as musubi-tuner and kohya's programs write them",
}
"""Of LoRAs and other adapters, by `onewan.formats.lora.LoraFormat`."""
