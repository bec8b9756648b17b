"""Phases of a run at the true sizes of the variants, counted by live bytes over fake tensors.

`count_step` builds what a run builds (onewan's adapters on the transformer, its forward pass, its
optimizer) without weights, and counts one training step with `live_bytes.LiveBytes`.

    python benchmarks/true_size.py t2v-a14b 81x480x832 [--method full] [--blocks 4] [--top 20]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from live_bytes import LiveBytes, Storage, fake_device
from measuring import parse_size
from torch import nn

from onewan.adapters.adapter_config import adapter_config_for
from onewan.adapters.lora import attach_adapter
from onewan.config.method import LoraMethod
from onewan.memory.activations import KeptActivations
from onewan.memory.block_backward import BlockComputation
from onewan.memory.block_runner import CheckpointedBlocks, ResidentWeights
from onewan.memory.block_weights import BlockWeights
from onewan.memory.host_memory import HostMemory
from onewan.memory.streaming import BlockStream
from onewan.model.attention_backends import attention_backend
from onewan.model.forward import predict_velocity
from onewan.model.meta_init import transformer_on_meta
from onewan.model.precision import keep_float32_islands
from onewan.model.quantized_linear import QuantizedLinear
from onewan.model.weight_storage import packed
from onewan.variants import VARIANTS, Variant, VariantName

TEXT_TOKENS = 512
TEXT_WIDTH = 4096

CountedMethod = Literal["lora", "full"]
Storing = Literal["bf16", "fp8", "int8", "nf4"]
_FORMS = {"fp8": "F8_E4M3", "int8": "int8", "nf4": "nf4"}
"""Names in `onewan.model.weight_storage`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the counted step trains."""

    method: CountedMethod = "lora"
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    """Of the weights and the matrix products."""
    storage: Storing = "bf16"
    """How the matrices of the blocks are stored."""
    both_experts: bool = False
    """Whether the other expert's adapter and optimizer state are on the device too."""
    checkpointing: bool = True
    """Whether blocks are computed again in the backward pass."""
    whole_blocks: bool = False
    """Checkpoint blocks as diffusers does, and not in parts. What follows is without effect then.
    """
    streamed_blocks: int = 0
    """Blocks whose frozen weights are in host memory and come through a ring of two buffers."""
    offload_inputs: bool = False
    keep_attention: Literal["no", "device", "host"] = "no"
    feed_forward_chunks: int = 1
    clean_first_frame: bool = True
    """Whether the clip keeps its first frame, where the variant has that (TI2V-5B)."""
    blocks: int | None = None
    """Number of blocks, if not all."""
    workspaces: bool = True
    """As in `LiveBytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Bytes of device memory in one training step; of the second step, so that the optimizer has
    its state from the beginning."""

    variant: VariantName
    size: tuple[int, int, int]
    """Frames, height and width of the clip in pixels."""
    tokens: int
    weights: int
    """The transformer's parameters and buffers without what is trained beside them."""
    buffers: int
    """The device memory of the blocks' stream."""
    trained: int
    """Adapter weights and optimizer state; for full fine-tuning the optimizer state alone."""
    kept: int
    """What the forward pass leaves for the backward pass: block inputs and all else."""
    peaks: dict[str, int]
    """The peak of each part: ``forward``, ``backward`` and ``update``, everything included."""
    kept_to_host: int
    """Block inputs and attention outputs that were copied to host memory."""
    kept_to_device: int
    at_peak: list[Storage]
    """What is alive at the peak, largest first."""

    @property
    def peak(self) -> int:
        """The highest peak of all parts."""
        return max(self.peaks.values())

    @property
    def over_weights(self) -> int:
        """The peak without the weights of the transformer that are on the device all the time."""
        return self.peak - self.weights - self.buffers


def latent_shape(facts: Variant, size: tuple[int, int, int]) -> tuple[int, int, int, int, int]:
    """Shape of the latents of one clip, [1, C, F, h, w]."""
    frames, height, width = size
    temporal, spatial = facts.temporal_compression, facts.spatial_compression
    return (
        1,
        facts.latent_channels,
        (frames - 1) // temporal + 1,
        height // spatial,
        width // spatial,
    )


def build_transformer(
    facts: Variant,
    device: torch.device,
    dtype: torch.dtype,
    blocks: int | None = None,
    *,
    heads: int | None = None,
    blocks_on: torch.device | None = None,
) -> Any:
    """The variant's transformer without values, as `onewan.model.load` loads it: `dtype`, but for
    the weights that diffusers keeps in float32. `blocks` and `heads`: those numbers instead of the
    variant's; the feed-forward width is in proportion to the heads. `blocks_on`: another device for
    the weights of the blocks."""
    heads = heads or facts.num_attention_heads
    transformer: Any = transformer_on_meta(
        {
            "num_attention_heads": heads,
            "attention_head_dim": facts.attention_head_dim,
            "in_channels": facts.in_channels,
            "out_channels": facts.latent_channels,
            "ffn_dim": facts.ffn_dim * heads // facts.num_attention_heads,
            "num_layers": blocks or facts.num_layers,
            "text_dim": TEXT_WIDTH,
            "reference_channels": facts.reference_channels,
        }
    )
    islands = set(transformer._keep_in_fp32_modules)
    for name, parameter in list(transformer.named_parameters()):
        path, _, leaf = name.rpartition(".")
        own = torch.float32 if islands.intersection(name.split(".")) else dtype
        where = (blocks_on or device) if name.startswith("blocks.") else device
        value = torch.empty(parameter.shape, dtype=own, device=where)
        transformer.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    keep_float32_islands(transformer)
    transformer.rope.to(device)  # it has buffers
    return transformer


def count_step(
    variant: VariantName, frames: int, height: int, width: int, settings: Settings | None = None
) -> Counts:
    """One training step of one expert on one clip of that size."""
    settings = settings or Settings()
    facts, size = VARIANTS[variant], (frames, height, width)
    shape = latent_shape(facts, size)
    with fake_device() as device, LiveBytes(workspaces=settings.workspaces) as live:
        live.mark("build")
        on_host = torch.device("cpu") if settings.streamed_blocks else device
        transformer = build_transformer(
            facts, device, settings.dtype, settings.blocks, blocks_on=on_host
        )
        if settings.storage != "bf16":
            pack_blocks(transformer, _FORMS[settings.storage])
        weights = live.current(device.type)
        parameters = make_trainable(transformer, facts, settings, device)
        optimizer = optimizer_with_state(parameters)
        idle = [torch.empty_like(p) for p in parameters * 3] if settings.both_experts else []
        trained = live.current(device.type) - weights
        stream, store = execute_blocks(transformer, settings, device)
        inputs = step_inputs(facts, shape, device, clean=settings.clean_first_frame)
        before = live.current(device.type)
        live.mark("forward")
        prediction = predict_velocity(transformer, **inputs, dtype=settings.dtype)
        kept = live.current(device.type) - before
        live.mark("backward")
        F.mse_loss(prediction, torch.randn(shape, device=device)).backward()
        del prediction
        live.mark("update")
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del idle
    peaks = live.peaks(device.type)
    del peaks["build"]
    return Counts(
        variant=variant,
        size=size,
        tokens=(shape[2] + facts.reference_frames) * shape[3] * shape[4] // 4,
        weights=weights,
        buffers=0 if stream is None else stream.device_bytes,
        trained=trained,
        kept=kept,
        kept_to_host=0 if store is None else store.bytes_to_host,
        kept_to_device=0 if store is None else store.bytes_to_device,
        peaks=peaks,
        at_peak=live.at_peak(device.type, max(peaks, key=lambda part: peaks[part])),
    )


def pack_blocks(transformer: Any, form: str) -> None:
    """Store the matrices of the blocks in `form`, as loading does."""
    for name, layer in list(transformer.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            stored = packed(form, layer.weight.detach())
            transformer.blocks.set_submodule(name, QuantizedLinear(form, stored, layer.bias))


def make_trainable(
    transformer: Any, facts: Variant, settings: Settings, device: torch.device
) -> list[nn.Parameter]:
    """Prepare the transformer for training as a run does; returns what is trained."""
    if settings.method == "lora":
        method = LoraMethod(kind="lora", rank=settings.rank)
        config = adapter_config_for(method, transformer, None)
        attach_adapter(transformer, config, 0, facts.experts[0].name)
    else:
        transformer.requires_grad_(True)
    transformer.train()
    for module in transformer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                # A fake tensor can't get data on another device.
                module._parameters[name] = nn.Parameter(parameter.detach().to(device))
    return [p for p in transformer.parameters() if p.requires_grad]


def execute_blocks(
    transformer: Any, settings: Settings, device: torch.device
) -> tuple[BlockStream | None, KeptActivations | None]:
    """Make the transformer's blocks run as `settings` say; returns what streams them, if anything
    does, and what keeps tensors for the backward pass."""
    if settings.whole_blocks:
        if settings.checkpointing:
            transformer.enable_gradient_checkpointing()
        return None, None
    host = HostMemory(device)
    store = KeptActivations(device, lambda size: host.allocate(size).tensor)
    stream = None
    if settings.streamed_blocks:
        stream = BlockStream(device, host=host)
        weights = BlockWeights.take(list(transformer.blocks), host)
        stream.select(weights, len(weights) - settings.streamed_blocks)
    transformer.block_runner = CheckpointedBlocks(
        blocks=list(transformer.blocks),
        computation=BlockComputation(
            keep_attention=settings.keep_attention != "no",
            chunks=settings.feed_forward_chunks,
            backend=attention_backend("flash"),  # fake tensors need a backend by name
        ),
        weights=stream or ResidentWeights(),
        store=store,
        checkpointing=settings.checkpointing,
        offload_inputs=settings.offload_inputs,
        offload_attention=settings.keep_attention == "host",
    )
    return stream, store


def optimizer_with_state(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as a run builds it, after a first step, so that its state exists."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def step_inputs(
    facts: Variant, shape: tuple[int, ...], device: torch.device, *, clean: bool
) -> dict[str, Any]:
    """The tensors of one clip for `predict_velocity`, by the names of its arguments."""
    extra = facts.in_channels - facts.latent_channels
    return {
        "x_BCFHW": torch.randn(shape, device=device),
        "t_B": torch.rand(1, device=device),
        "text_BLD": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, device=device),
        "condition_BCFHW": torch.randn(1, extra, *shape[2:], device=device) if extra else None,
        "clean_frames_BF": torch.arange(shape[2], device=device)[None] == 0
        if clean and facts.has_clean_first_frame
        else None,
    }


def describe(storages: Iterable[Storage], top: int) -> list[str]:
    """The largest of `storages`, equal ones counted together, one line each."""
    groups: Counter[tuple[int, str]] = Counter()
    for s in storages:
        dtype = str(s.dtype).removeprefix("torch.")
        groups[s.bytes, f"{s.shape} {dtype}  {s.operator}  {s.place}"] += 1
    ordered = sorted(groups.items(), key=lambda item: -item[0][0] * item[1])
    return [
        f"{size * count / 1e9:7.3f} GB  {count:4} x {what}" for (size, what), count in ordered[:top]
    ]


def print_counts(
    title: str, figures: Mapping[str, int], at_peak: Iterable[Storage], top: int
) -> None:
    """Print bytes by name as gigabytes, and the largest `top` tensors of the peak."""
    print(f"{title}, GB:")
    for name, value in figures.items():
        print(f"  {name:18} {value / 1e9:8.3f}")
    print("alive at the peak:")
    for line in describe(at_peak, top):
        print("  " + line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variant", choices=sorted(VARIANTS))
    parser.add_argument("size", type=parse_size, help="frames x height x width, as 81x480x832")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--blocks", type=int, help="number of blocks, if not all")
    parser.add_argument("--storage", choices=("bf16", *_FORMS), default="bf16")
    parser.add_argument("--both", action="store_true", help="both experts' adapters on the device")
    parser.add_argument("--whole-blocks", action="store_true", help="as diffusers checkpoints them")
    parser.add_argument("--streamed", type=int, default=0, help="blocks that are streamed")
    parser.add_argument("--offload-inputs", action="store_true", help="block inputs on the host")
    parser.add_argument("--keep-attention", choices=("no", "device", "host"), default="no")
    parser.add_argument("--chunks", type=int, default=1, help="of the feed-forward layer")
    parser.add_argument("--no-workspaces", action="store_true", help="leave out WORKSPACES")
    parser.add_argument("--top", type=int, default=20, help="tensors of the peak to list")
    options = parser.parse_args()
    settings = Settings(
        method=options.method,
        storage=options.storage,
        both_experts=options.both,
        whole_blocks=options.whole_blocks,
        streamed_blocks=options.streamed,
        offload_inputs=options.offload_inputs,
        keep_attention=options.keep_attention,
        feed_forward_chunks=options.chunks,
        blocks=options.blocks,
        workspaces=not options.no_workspaces,
    )
    frames, height, width = options.size
    counts = count_step(options.variant, frames, height, width, settings)
    figures = {
        "weights": counts.weights,
        "buffers": counts.buffers,
        "trained": counts.trained,
        "kept": counts.kept,
    }
    figures |= {f"peak of {part}": peak for part, peak in counts.peaks.items()}
    figures["peak over weights"] = counts.over_weights
    title = f"{counts.variant}, {counts.tokens} tokens, {options.method}"
    print_counts(title, figures, counts.at_peak, options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
