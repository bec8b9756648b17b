"""Model and clips of `benchmarks/gpu.py`: full-size transformers with random weights, so that
nothing is downloaded, and a clip of any size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from onewan.arithmetic.flops import TransformerSize
from onewan.demo.tiny_model import write_tiny_model
from onewan.media.write import write_video
from onewan.variants import VARIANTS, VariantName

HEAD_DIM = 128
SHARD_BYTES = 4 << 30
DTYPE = torch.bfloat16


def write_model(
    folder: Path, variant: VariantName, size: TransformerSize, device: torch.device
) -> None:
    """A tiny model whose transformers are replaced by random ones of the full size."""
    write_tiny_model(folder, variant)
    facts = VARIANTS[variant]
    for expert in facts.experts:
        target = folder / expert.component
        for file in target.iterdir():
            file.unlink()
        with torch.device("meta"):
            module = WanTransformer3DModel(
                num_attention_heads=size.width // HEAD_DIM,
                attention_head_dim=HEAD_DIM,
                in_channels=facts.in_channels,
                out_channels=facts.latent_channels,
                text_dim=64,  # that of the tiny text encoder
                ffn_dim=size.feed_forward,
                num_layers=size.layers,
            )
        module.save_config(target)
        write_shards(target, module, device)


def write_shards(target: Path, module: torch.nn.Module, device: torch.device) -> None:
    """Random bfloat16 weights for every parameter of `module`, drawn on the device."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"diffusion_pytorch_model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in module.named_parameters():
        value = torch.empty(parameter.shape, dtype=DTYPE, device=device)
        if parameter.dim() == 1:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            value.normal_(std=0.02)
        shard[name] = value.cpu()
        total += value.nbytes
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )


def write_clip(folder: Path, size: tuple[int, int, int]) -> None:
    """One clip with a moving gradient."""
    frames, height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    pattern = [((rows + columns * 2 + 3 * f) % 256).astype(np.uint8) for f in range(frames)]
    folder.mkdir(parents=True)
    write_video(folder / "clip.mp4", np.repeat(np.stack(pattern)[..., None], 3, axis=3), fps=16)
    (folder / "clip.txt").write_text("a gradient moves across the picture", encoding="utf-8")
