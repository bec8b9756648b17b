"""Sampling with experts that do not fit on the device: their blocks are streamed.

A training run samples with the settings of its memory plan; this is for a model alone.
"""

from __future__ import annotations

from itertools import chain

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from onewan.devices import is_host, total_and_free_memory
from onewan.memory.execution import BlockExecution
from onewan.memory.plan import Settings
from onewan.memory.residency import DeviceResidency
from onewan.model.transformer import WanTransformer
from onewan.model.wan import WanModel

WEIGHTS_SHARE = 0.5
"""Share of the device's free memory that the weights of an expert may take. The rest is for its
activations, which are 6 GB at 81x480x832 with guidance, and for the VAE, which runs alone."""


def sampling_residency(
    model: WanModel, device: torch.device, limit: int | None = None, *, beside: int = 0
) -> DeviceResidency:
    """The owner of `device` for sampling with `model`, which is in host memory; of the device's
    memory it counts on `limit` bytes at most, `beside` of which lie beside an expert's weights.

    Experts larger than `WEIGHTS_SHARE` of what is free there keep as many blocks there as that
    share holds; the others come from host memory while the blocks before them compute.
    """
    residency = DeviceResidency(device)
    if is_host(device):
        return residency
    _, free = total_and_free_memory(device)
    if free is not None and limit is not None:
        free = min(free, limit)
    if free is not None:
        free = max(0, free - beside)
    experts = [model.expert(expert) for expert in model.variant.experts]
    room = None if free is None else int(WEIGHTS_SHARE * free)
    if room is None or max(map(_bytes, experts)) <= room:
        return residency
    # The ring has two buffers.
    settings = Settings(resident_blocks=max(0, min(_fitting(e, room) for e in experts) - 2))
    execution = BlockExecution(residency.device, settings, streams=True)
    for expert in experts:
        assert isinstance(expert, WanTransformer)  # as `onewan.model.load` returns it
        residency.manage(expert, alternating=True, placement=execution.add(expert))
    return residency


def _fitting(expert: WanTransformer3DModel, room: int) -> int:
    """The number of blocks that fit into `room` bytes beside what is outside of the blocks."""
    outside = _bytes(expert) - _bytes(expert.blocks)
    return max(0, room - outside) * len(expert.blocks) // _bytes(expert.blocks)


def _bytes(module: nn.Module) -> int:
    tensors = chain(module.parameters(), module.buffers())
    return sum(tensor.nbytes for tensor in tensors)
