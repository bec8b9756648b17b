"""The shortest training loop of diffusers and PEFT, which the benchmarks compare onewan with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from onewan.model.precision import compute_context

LINEARS = r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"
"""The linear layers of the blocks, which `method.modules` of a run file selects by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The tensors of the one clip that both loops train on, on the device."""

    latents: Tensor
    """[1, C, F, h, w]"""
    text: Tensor
    """[1, 512, D]"""
    condition: Tensor | None = None
    """Further input channels, of I2V-A14B."""
    timestep_per_token: bool = False
    """TI2V-5B has a timestep for each token in the official code."""

    @property
    def tokens(self) -> int:
        return self.latents[0, 0].numel() // 4


def bare_step(
    transformer: WanTransformer3DModel,
    clip: Clip,
    dtype: torch.dtype,
    *,
    method: Literal["lora", "full"] = "lora",
    checkpointing: bool = False,
    max_norm: float | None = None,
) -> Callable[[], None]:
    """One step of the loop: noise, forward, backward, AdamW, and nothing else.

    A LoRA of rank 32 has float32 weights, as in onewan; full fine-tuning trains all weights in the
    dtype that they have. `max_norm` clips the norm of the gradients.
    """
    if method == "lora":
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=LINEARS))
    else:
        transformer.requires_grad_(True)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    if method == "lora":
        for parameter in parameters:
            parameter.data = parameter.data.float()
    arguments: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(parameters, **arguments)
    latents, condition = clip.latents, clip.condition

    def step() -> None:
        t = torch.rand(1, device=latents.device)
        noise = torch.randn_like(latents)
        x = (1 - t) * latents + t * noise
        inputs = x if condition is None else torch.cat([x, condition], dim=1)
        timestep = (t * 1000).expand(1, clip.tokens) if clip.timestep_per_token else t * 1000
        with compute_context(dtype, latents.device):
            prediction = transformer(inputs, timestep, clip.text, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise - latents).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
