"""A forward and a backward pass of a small transformer, by one process and by several that share
the tokens of its clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onewan.adapters.adapter_config import adapter_config_for
from onewan.adapters.lora import attach_adapter
from onewan.config.method import LoraMethod
from onewan.devices import HOST
from onewan.memory.activations import KeptActivations
from onewan.memory.block_backward import BlockComputation
from onewan.memory.block_runner import CheckpointedBlocks
from onewan.model.forward import NoisyLatents, predict_velocities
from onewan.model.precision import keep_float32_islands
from onewan.model.shared_tokens import TokenSharing
from onewan.model.transformer import WanTransformer
from onewan.parallel.ranks import join
from onewan.parallel.sequence import SequenceParallel

HEADS, WIDTH, LAYERS, CHANNELS = 4, 64, 2, 16
DIVIDES, DOES_NOT = (3, 4, 8), (3, 6, 6)
"""Latent frames, height and width with 24 and with 27 tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed, and how."""

    size: tuple[int, int, int] = DOES_NOT
    clean: tuple[int, ...] = ()
    """Latent frames of the first sample at timestep 0, as in TI2V-5B."""
    train: str = "weights"
    """Or "adapters", or "text": nothing but the text's embeddings."""
    reference: bool = False
    """Whether there is a layer for a reference image (Fun-Control), whose tokens come first."""
    checkpointing: bool = True
    batches: int = 1
    """How many go through each block together."""
    dtype: torch.dtype = torch.float32
    how: dict[str, Any] = field(default_factory=dict[str, Any])
    """Settings of `BlockComputation`."""


def results(
    case: Case, sharing: TokenSharing | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The predictions of a case, and the gradients of this process by name."""
    dtype = dtype or case.dtype
    model = _model(case, dtype)
    model.sharing = sharing
    batches = [_batch(case, number) for number in range(case.batches)]
    predictions = predict_velocities(model, batches, dtype=dtype)
    # Not a mean over tokens: each has another weight in the loss.
    losses = [(p * _normal(9, p.shape)).square().mean() + p.sum() / 1000 for p in predictions]
    torch.autograd.backward(losses)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"text {n}": b.text.grad for n, b in enumerate(batches) if b.text.grad is not None}
    predicted = {f"prediction {n}": p.detach() for n, p in enumerate(predictions)}
    return {**found, **predicted}


def bytes_sent(cases: Sequence[Case]) -> list[int]:
    """Bytes that this process sends the others in a forward and a backward pass of each case."""
    found = list[int]()
    with join(HOST, 60) as ranks:
        group = tuple(range(ranks.count))
        ranks.prepare([group])
        exchanged = ranks.exchanged

        def counted(
            rows: Tensor, given: Sequence[int], taken: Sequence[int], to: Sequence[int]
        ) -> Tensor:
            found[-1] += rows[0].nbytes * (sum(given) - given[ranks.rank])
            return exchanged(rows, given, taken, to)

        ranks.exchanged = counted
        for case in cases:
            found.append(0)
            results(case, SequenceParallel(ranks=ranks, group=group))
    return found


def alone_and_together(cases: dict[str, Case]) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """The results of each case by one process, and by all processes of this run together."""
    found = dict[str, dict[str, tuple[Tensor, Tensor]]]()
    with join(HOST, 60) as ranks:
        group = tuple(range(ranks.count))
        ranks.prepare([group])
        for name, case in cases.items():
            alone = results(case)
            shared = results(case, SequenceParallel(ranks=ranks, group=group))
            assert alone.keys() == shared.keys()
            gradients = [g for n, g in sorted(shared.items()) if not n.startswith("prediction")]
            ranks.add(gradients, group)
            found[name] = {n: (alone[n].float(), shared[n].float()) for n in alone}
    return found


def _model(case: Case, dtype: torch.dtype) -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        text_dim=24,
        ffn_dim=96,
        num_layers=LAYERS,
    )
    if case.reference:
        model.add_ref_conv(16)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * _normal(name, parameter.shape)  # those that begin as zeros too
    islands = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not islands & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    keep_float32_islands(model)
    model.requires_grad_(case.train == "weights")
    if case.train == "adapters":
        method = LoraMethod(kind="lora", rank=4)
        attach_adapter(model, adapter_config_for(method, model, None), 1, "high")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * _normal(name, parameter.shape)
    model.block_runner = CheckpointedBlocks(
        blocks=list(model.blocks),  # pyright: ignore[reportArgumentType]
        computation=BlockComputation(**case.how),
        store=KeptActivations(HOST, lambda size: torch.empty(size, dtype=torch.uint8)),
        checkpointing=case.checkpointing,
    )
    return model.train()


def _batch(case: Case, number: int) -> NoisyLatents:
    frames, height, width = case.size
    clean = torch.zeros(2, frames, dtype=torch.bool)
    clean[0, list(case.clean)] = True
    text = _normal(2 * number, (2, 512, 24))
    return NoisyLatents(
        x=_normal(2 * number + 1, (2, 16, frames + number, height, width)),
        t=torch.tensor([0.3, 0.8]),
        text=text.requires_grad_(case.train == "text"),
        clean_frames=torch.cat([clean, clean[:, :1].repeat(1, number)], 1) if case.clean else None,
        reference=_normal(7, (2, 16, height, width)) if case.reference else None,
    )


def _normal(seed: int | str, shape: Sequence[int]) -> Tensor:
    number = seed if isinstance(seed, int) else sum(map(ord, seed))
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))
