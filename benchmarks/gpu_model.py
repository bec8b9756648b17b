"""Model and clips of `benchmarks/gpu.py`: full-size transformers with random weights, so that
nothing is downloaded, and a clip of any size."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from onewan.arithmetic.flops import TransformerSize
from onewan.demo.tiny_model import write_tiny_model
from onewan.formats.write import safetensors_parts
from onewan.media.write import write_video
from onewan.variants import VARIANTS, VariantName

HEAD_DIM = 128
DTYPE = torch.bfloat16


def write_model(
    folder: Path, variant: VariantName, size: TransformerSize, device: torch.device
) -> None:
    """A tiny model whose transformers are replaced by random ones of the full size.

    Both experts have the same weights, of which neither times nor memory depend: the second one's
    file is a hard link, so that only one takes space.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_tiny_model(folder, variant)
    facts = VARIANTS[variant]
    first: Path | None = None
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
        weights = target / "diffusion_pytorch_model.safetensors"
        if first is None:
            write_weights(weights, module, device)
        else:
            weights.hardlink_to(first)
        first = first or weights


def prepare_model(
    folder: Path, variant: VariantName, size: TransformerSize, device: torch.device
) -> None:
    """Write the model of `write_model`, unless `folder` has one of the same size."""
    note, content = folder.parent / "size.txt", repr(size)
    if not note.exists() or note.read_text(encoding="utf-8") != content:
        write_model(folder, variant, size, device)
        note.write_text(content, encoding="utf-8")


def write_weights(target: Path, module: torch.nn.Module, device: torch.device) -> None:
    """Random bfloat16 weights for every parameter of `module`.

    Drawn on the device once, for its largest matrix: each matrix begins at another one of these
    numbers. To draw 14 billion would take longer than the benchmark.
    """
    sizes = [p.numel() for p in module.parameters() if p.dim() > 1]
    drawn = torch.randn(max(sizes) + len(sizes), device=device).mul_(0.02).to(DTYPE).cpu()
    tensors: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.dim() == 1:
            value = 1.0 if name.endswith("weight") else 0.0
            tensors[name] = torch.full(parameter.shape, value, dtype=DTYPE)
        else:
            start = number % len(sizes)
            tensors[name] = drawn[start : start + parameter.numel()].view(parameter.shape)
    with target.open("wb") as file:
        for part in safetensors_parts(tensors, {"format": "pt"}):
            file.write(part)


def write_clip(folder: Path, size: tuple[int, int, int]) -> None:
    """One clip with a moving gradient."""
    frames, height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    pattern = [((rows + columns * 2 + 3 * f) % 256).astype(np.uint8) for f in range(frames)]
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / "clip.mp4", np.repeat(np.stack(pattern)[..., None], 3, axis=3), fps=16)
    (folder / "clip.txt").write_text("a gradient moves across the picture", encoding="utf-8")
