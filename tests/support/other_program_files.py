"""The golden weights in the forms that other programs give them.

Written with safetensors' and gguf's own writers, and quantized by formulas of this file alone, so
that errors of onewan's writer and reader can't cancel. Names of the text encoder are written out
for the same reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDERS = {"t2v-a14b": "t2v-A14B", "i2v-a14b": "i2v-A14B", "ti2v-5b": "ti2v-5B"}
LARGEST = 448.0  # of e4m3
SHAPE = "comfy.gguf.orig_shape."


def shards(folder: Path) -> dict[str, Tensor]:
    """The official weights in the shards of `folder`, bfloat16, under official names."""
    files = sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def single(
    weights: Mapping[str, Tensor],
    path: Path,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    save_file(
        {prefix + n: t.to(dtype or t.dtype).contiguous() for n, t in weights.items()},
        path,
        metadata=metadata,
    )
    return path


def in_blocks(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Matrices that programs quantize: those of linear layers in blocks."""
    for name, tensor in weights.items():
        block = name.startswith(("blocks.", "encoder.block."))
        if block and tensor.ndim == 2 and "relative_attention_bias" not in name:
            yield name


class Quantized:
    """A written file, the values that it represents, and bounds of their quantization error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Tensor] = {}
        """float32, by the names in the file."""
        self.bounds: dict[str, Tensor] = {}
        """Largest |error| that the format allows each element of a quantized weight."""


def fp8(weights: Mapping[str, Tensor], path: Path, scheme: str, prefix: str = "") -> Quantized:
    """`scheme`: old, old_one (scale of shape [1]), new, new_header, or plain (a mere cast)."""
    result = Quantized(path)
    stored: dict[str, Tensor] = {}
    layers: dict[str, object] = {}
    chosen = set(in_blocks(weights))
    for name, tensor in weights.items():
        if name not in chosen:
            stored[prefix + name] = tensor.to(torch.float16)
            result.values[name] = tensor.to(torch.float16).float()
            continue
        values = tensor.float()
        scale = torch.tensor(1.0) if scheme == "plain" else values.abs().max() / LARGEST
        packed = (values / scale).to(torch.float8_e4m3fn)
        # A mantissa of three bits: half a step is 1/16, and below 2^-6 it is 2^-10.
        result.bounds[name] = torch.maximum(values.abs() / 16, scale * 2**-10)
        result.values[name] = packed.float() * scale
        stored[prefix + name] = packed
        layer = name.removesuffix(".weight")
        layers[layer] = {"format": "float8_e4m3fn"}
        if scheme.startswith("old"):
            one = scale.reshape(1) if scheme == "old_one" else scale
            stored[f"{prefix}{layer}.scale_weight"] = one.clone()
            stored[f"{prefix}{layer}.scale_input"] = torch.tensor(0.5)
        elif scheme.startswith("new"):
            stored[f"{prefix}{layer}.weight_scale"] = scale.clone()
        if scheme == "new":
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    if scheme.startswith("old"):
        stored[prefix + "scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    header = None
    if scheme == "new_header":
        header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    single(stored, path, metadata=header)
    return result


def as_gguf(
    weights: Mapping[str, Tensor],
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    *,
    flat_patches: bool = False,
) -> Quantized:
    """`flat_patches`: the patch embedding in two axes, its shape beside it, as ComfyUI-GGUF may."""
    result = Quantized(path)
    writer = gguf.GGUFWriter(str(path), "wan")
    chosen = set(in_blocks(weights))
    for name, tensor in weights.items():
        data = tensor.float().numpy()
        if name in chosen:
            packed = gguf.quants.quantize(data, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            result.values[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
            if kind == gguf.GGMLQuantizationType.Q8_0:
                result.bounds[name] = _q8_bound(packed, data.shape)
            continue
        result.values[name] = tensor.float()
        if data.ndim == 5 and flat_patches:
            shape = json.dumps(list(data.shape))
            writer.add_string(SHAPE + name, shape)
            data = data.reshape(data.shape[0], -1)
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return result


def _q8_bound(packed: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Half a step d of each block of 32, and up to 127 times d's own rounding to float16."""
    scales = packed.reshape(-1, 34)[:, :2].copy().view(np.float16).astype(np.float32)
    bound = scales / 2 + 127 * (scales * 2**-11 + 2**-25)
    return torch.from_numpy(np.repeat(bound, 32, axis=1).reshape(shape))


_T5 = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def text_encoder(folder: Path) -> dict[str, Tensor]:
    """The official text encoder in `folder`, under transformers' names, as ComfyUI has it."""
    weights = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    renamed = {}
    for name, tensor in weights.items():
        if name == "token_embedding.weight":
            renamed["shared.weight"] = tensor
        elif name == "norm.weight":
            renamed["encoder.final_layer_norm.weight"] = tensor
        else:
            _, block, rest = name.split(".", 2)
            start = next(s for s in _T5 if rest.startswith(s + "."))
            renamed[f"encoder.block.{block}.{_T5[start]}{rest[len(start) :]}"] = tensor
    return renamed


def spiece(folder: Path) -> Tensor:
    """The SentencePiece model as ComfyUI's text encoders carry it: uint8 [bytes]."""
    data = (folder / "google" / "umt5-xxl" / "spiece.model").read_bytes()
    return torch.tensor(list(data), dtype=torch.uint8)
