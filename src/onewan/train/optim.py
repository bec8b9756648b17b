"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from onewan.config.schema import AdamWOptimizer


def _adamw(parameters: Iterable[nn.Parameter], choice: AdamWOptimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=choice.lr,
        betas=choice.betas,
        eps=choice.eps,
        weight_decay=choice.weight_decay,
        fused=True,  # one kernel for all tensors, on CPU, CUDA and ROCm
    )


OPTIMIZERS: Mapping[
    str, Callable[[Iterable[nn.Parameter], AdamWOptimizer], torch.optim.Optimizer]
] = {"adamw": _adamw}


def build_optimizer(
    parameters: Iterable[nn.Parameter], choice: AdamWOptimizer
) -> torch.optim.Optimizer:
    """The optimizer that the run file's `optimizer` section names."""
    return OPTIMIZERS[choice.name](parameters, choice)
