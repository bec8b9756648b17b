"""Distilled LoRAs for tiny models, with the keys of the published files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 4


def write_distilled(
    model: Path, folder: Path, *, form: str = "alpha", size: float = 0.1
) -> dict[str, Path]:
    """A LoRA for each transformer of the tiny model in the folder `model`, by expert.

    `form` "alpha" is that of Wan2.2-Lightning: float32 pairs with an alpha. "differences" is that
    of Wan2.2-Distill-Loras: without alphas, with differences of biases and norms, and with keys
    that only Wan 2.1 has weights for. `size` is that of the values.
    """
    names = {"high": "transformer", "low": "transformer_2"}
    if not (model / "transformer_2").is_dir():
        names = {"single": "transformer"}
    files: dict[str, Path] = {}
    for number, (expert, component) in enumerate(names.items()):
        config = json.loads((model / component / "config.json").read_text(encoding="utf-8"))
        name = "fast.safetensors" if expert == "single" else f"{expert}_noise_model.safetensors"
        files[expert] = folder / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(config, form, size, seed=number), files[expert])
    return files


def _tensors(config: dict, form: str, size: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    ffn = config["ffn_dim"]
    dtype = torch.float32 if form == "alpha" else torch.bfloat16

    def random(*shape: int) -> Tensor:
        return (size * torch.randn(*shape, generator=generator)).to(dtype)

    layers = {
        f"{kind}_attn.{name}": (width, width) for kind in ("self", "cross") for name in "qkvo"
    }
    layers |= {"ffn.0": (ffn, width), "ffn.2": (width, ffn)}
    tensors: dict[str, Tensor] = {}
    for block in range(config["num_layers"]):
        start = f"diffusion_model.blocks.{block}"
        for layer, (outputs, inputs) in layers.items():
            key = f"{start}.{layer}"
            tensors[f"{key}.lora_down.weight"] = random(RANK, inputs)
            tensors[f"{key}.lora_up.weight"] = random(outputs, RANK)
            if form == "alpha":
                tensors[f"{key}.alpha"] = torch.tensor(8.0)
            else:
                tensors[f"{key}.diff_b"] = random(outputs)
        if form == "differences":
            tensors[f"{start}.self_attn.norm_q.diff"] = random(width)
            tensors[f"{start}.norm3.diff"] = random(width)
            tensors[f"{start}.norm3.diff_b"] = random(width)
            tensors[f"{start}.diff_m"] = random(1, 6, width)
            tensors[f"{start}.cross_attn.k_img.lora_down.weight"] = random(RANK, width)
            tensors[f"{start}.cross_attn.k_img.lora_up.weight"] = random(width, RANK)
            tensors[f"{start}.cross_attn.k_img.diff_b"] = random(width)
    return tensors
