"""Keys of other trainers' LoRA files as documented, with random tensors.

Written from the published layout of their files (keys, where alpha is), not from their code. The
difference that a file represents follows its definition: alpha / rank times up times down.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

WIDTH, FFN = 64, 256
RANK = 4

# (official, diffusers, outputs, inputs): the ten linear layers of a block.
LAYERS = [
    *(
        (f"self_attn.{o}", f"attn1.{d}", WIDTH, WIDTH)
        for o, d in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    ),
    *(
        (f"cross_attn.{o}", f"attn2.{d}", WIDTH, WIDTH)
        for o, d in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    ),
    ("ffn.0", "ffn.net.0.proj", FFN, WIDTH),
    ("ffn.2", "ffn.net.2", WIDTH, FFN),
]


@dataclass
class Written:
    """A file of some trainer."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    """The differences that are added to the weights, by diffusers' names of modules."""
    key_format: str = "comfyui"
    trainer: str | None = None
    expert: str | None = None


def _pairs(blocks: range, layers: slice = slice(None), dtype: torch.dtype = torch.float32):
    """(official, diffusers, down, up) of each layer."""
    generator = torch.Generator().manual_seed(11)
    for n in blocks:
        for official, diffusers, out, into in LAYERS[layers]:
            down = torch.randn(RANK, into, generator=generator).mul(0.2).to(dtype)
            up = torch.randn(out, RANK, generator=generator).mul(0.2).to(dtype)
            yield f"blocks.{n}.{official}", f"blocks.{n}.{diffusers}", down, up


def _delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    return scale * (up.double() @ down.double())


def musubi() -> Written:
    """Every module with its alpha, dots as underscores."""
    file = Written(key_format="kohya", trainer="musubi-tuner")
    file.metadata = {"ss_network_module": "networks.lora_wan", "ss_network_alpha": "1.0"}
    for official, diffusers, down, up in _pairs(range(3)):
        start = "lora_unet_" + official.replace(".", "_")
        file.tensors[f"{start}.lora_down.weight"] = down
        file.tensors[f"{start}.lora_up.weight"] = up
        file.tensors[f"{start}.alpha"] = torch.tensor(1.0)
        file.deltas[diffusers] = _delta(down, up, 1.0 / RANK)
    return file


def ai_toolkit() -> Written:
    """Official names, bfloat16, alphas in tensors of the same type."""
    file = Written()
    for official, diffusers, down, up in _pairs(range(3), dtype=torch.bfloat16):
        start = f"diffusion_model.{official}"
        file.tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
        file.tensors[f"{start}.alpha"] = torch.tensor(8.0, dtype=torch.bfloat16)
        file.deltas[diffusers] = _delta(down, up, 8.0 / RANK)
    return file


def diffusion_pipe() -> Written:
    """Official names; alpha is always the rank and is not written."""
    file = Written()
    for official, diffusers, down, up in _pairs(range(3)):
        start = f"diffusion_model.{official}"
        file.tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
        file.deltas[diffusers] = _delta(down, up, 1.0)
    return file


def diffsynth() -> Written:
    """Official names without a prefix, PEFT's name of the adapter inside."""
    file = Written(key_format="no prefix, official names", trainer="DiffSynth-Studio")
    for official, diffusers, down, up in _pairs(range(3)):
        file.tensors[f"{official}.lora_A.default.weight"] = down
        file.tensors[f"{official}.lora_B.default.weight"] = up
        file.deltas[diffusers] = _delta(down, up, 1.0)
    return file


def diffsynth_whole_pipeline() -> Written:
    file = Written(key_format="pipe.dit2., official names", trainer=None, expert="low")
    for official, diffusers, down, up in _pairs(range(1)):
        file.tensors[f"pipe.dit2.{official}.lora_A.default.weight"] = down
        file.tensors[f"pipe.dit2.{official}.lora_B.default.weight"] = up
        file.deltas[diffusers] = _delta(down, up, 1.0)
    return file


def simpletuner_diffusers() -> Written:
    """diffusers' names, attention alone, alpha in the header."""
    file = Written(key_format="diffusers")
    for _, diffusers, down, up in _pairs(range(3), slice(0, 8)):
        start = f"transformer.{diffusers}"
        file.tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
        file.deltas[diffusers] = _delta(down, up, 16 / RANK)
    settings = {"r": RANK, "lora_alpha": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    file.metadata["lora_adapter_metadata"] = json.dumps(
        {f"transformer.{name}": value for name, value in settings.items()}
    )
    return file


def simpletuner_lycoris() -> Written:
    """LoKr under diffusers' names with underscores; alpha of full factors does not count."""
    file = Written(key_format="lycoris_, diffusers names", trainer="LyCORIS")
    generator = torch.Generator().manual_seed(12)
    for n in range(2):
        for _, diffusers, out, into in LAYERS:
            module = f"blocks.{n}.{diffusers}"
            start = "lycoris_" + module.replace(".", "_")
            w1 = torch.randn(4, 4, generator=generator) * 0.2
            w2 = torch.randn(out // 4, into // 4, generator=generator) * 0.2
            file.tensors |= {f"{start}.lokr_w1": w1, f"{start}.lokr_w2": w2}
            file.tensors[f"{start}.alpha"] = torch.tensor(5.0)
            # Block (i, j) of the Kronecker product is w1[i, j] times w2.
            product = w1.double()[:, None, :, None] * w2.double()[None, :, None, :]
            file.deltas[module] = product.reshape(out, into)
    return file


def peft() -> Written:
    file = Written(key_format="base_model.model., diffusers names", trainer="PEFT")
    for _, diffusers, down, up in _pairs(range(2), slice(4, 6)):
        start = f"base_model.model.{diffusers}"
        file.tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
        file.deltas[diffusers] = _delta(down, up, 1.0)
    return file


def onetrainer() -> Written:
    """Older files: diffusers' names with underscores."""
    file = Written(key_format="lora_transformer_2_, diffusers names", trainer="OneTrainer")
    file.metadata, file.expert = {"ot_branch": "master"}, "low"
    for _, diffusers, down, up in _pairs(range(2)):
        start = "lora_transformer_2_" + diffusers.replace(".", "_")
        file.tensors[f"{start}.lora_down.weight"] = down
        file.tensors[f"{start}.lora_up.weight"] = up
        file.tensors[f"{start}.alpha"] = torch.tensor(2.0)
        file.deltas[diffusers] = _delta(down, up, 2.0 / RANK)
    return file


def low_expert_of_diffusers() -> Written:
    file = Written(key_format="transformer_2., diffusers names", expert="low")
    for _, diffusers, down, up in _pairs(range(1)):
        start = f"transformer_2.{diffusers}"
        file.tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
        file.deltas[diffusers] = _delta(down, up, 1.0)
    return file


def checkpoint_prefix() -> Written:
    """Prefix of ComfyUI's whole checkpoints, layers beside the blocks, names of ``lora.up``."""
    file = Written(key_format="model.diffusion_model., official names")
    for official, diffusers, down, up in _pairs(range(1)):
        start = f"model.diffusion_model.{official}"
        file.tensors |= {f"{start}.lora.down.weight": down, f"{start}.lora.up.weight": up}
        file.deltas[diffusers] = _delta(down, up, 1.0)
    down, up = torch.ones(2, WIDTH), torch.ones(WIDTH, 2)
    start = "model.diffusion_model.time_embedding.2"
    file.tensors |= {f"{start}.lora.down.weight": down, f"{start}.lora.up.weight": up}
    file.deltas["condition_embedder.time_embedder.linear_2"] = _delta(down, up, 1.0)
    return file


TRAINERS = [
    musubi,
    ai_toolkit,
    diffusion_pipe,
    diffsynth,
    diffsynth_whole_pipeline,
    simpletuner_diffusers,
    simpletuner_lycoris,
    peft,
    onetrainer,
    low_expert_of_diffusers,
    checkpoint_prefix,
]
