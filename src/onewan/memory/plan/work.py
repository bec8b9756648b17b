"""FLOPs of a step, bytes over the bus, and the seconds that follow from a machine's rates.

`onewan.arithmetic.flops` has the operations of each kind. Attention's backward pass computes its
scores again; what gradient checkpointing recomputes depends on whether attention outputs are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from onewan.arithmetic.flops import (
    FLASH_BACKWARD,
    Flops,
    Trained,
    forward_flops,
    training_flops,
)
from onewan.config.method import FineTuneMethod, Method
from onewan.memory.plan.activations import AHEAD, Batch
from onewan.memory.plan.machine import Machine
from onewan.memory.plan.settings import Settings

RING = 2
"""Device buffers for the weights of streamed blocks."""

_ADAPTER_SHARE = 0.01
"""Operations of an adapter, relative to the linear layers that it is on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one forward and backward pass over a batch computes and copies."""

    forward_flops: float
    backward_flops: float
    """Recomputation included."""
    model_flops: float
    """Of both passes without recomputation, as model FLOPs utilisation counts them."""
    forward_to_device: float
    """Bytes: weights of streamed blocks."""
    backward_to_device: float
    """Bytes: weights again, but for those that are still in the ring; block inputs and attention
    outputs that were in host memory."""
    to_host: float
    """Bytes: block inputs and attention outputs, in the forward pass."""
    written_back: float = 0
    """Bytes in the backward pass: weights and optimizer state that were updated."""

    @property
    def to_device(self) -> float:
        return self.forward_to_device + self.backward_to_device

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """(forward, backward): copies in both directions overlap with computing and each other."""
        return (
            max(
                self.forward_flops / machine.flops,
                self.forward_to_device / machine.bus,
                self.to_host / machine.bus,
            ),
            max(
                self.backward_flops / machine.flops,
                self.backward_to_device / machine.bus,
                self.written_back / machine.bus,
            ),
        )


def clip_flops(batch: Batch, attended: int | None = None) -> Flops:
    """One forward pass over the batch. Each token attends to `attended` tokens; None: to all of its
    clip."""
    flops = forward_flops(batch.shape.size, batch.tokens)
    if attended is not None:
        less = 4 * batch.tokens * (batch.tokens - attended) * batch.shape.width
        flops = replace(flops, attention=flops.attention - less * batch.shape.layers)
    return flops * batch.clips


def step_work(
    batch: Batch,
    settings: Settings,
    method: Method,
    block_bytes: int,
    *,
    attended: int | None = None,
    streamed_state: int = 0,
) -> StepWork:
    """The work of one forward and backward pass. `block_bytes` are those of a block's weights;
    `streamed_state` those of a trained block's optimizer state that is streamed with it."""
    layers, flops = batch.shape.layers, clip_flops(batch, attended)
    trains_linears = isinstance(method, FineTuneMethod)
    adapter = 0.0 if trains_linears else _ADAPTER_SHARE * flops.linear
    trained: Trained = "weights" if trains_linears else "adapter"
    forward = flops.total + adapter
    both = training_flops(flops, trained, attention_backward=FLASH_BACKWARD) + 2 * adapter
    recomputed = 0.0
    if settings.checkpointing:
        kept = settings.keep_attention != "no"
        recomputed = forward - (flops.attention if kept else 0)
    streamed = settings.streamed(layers)
    loads = max(0, streamed - RING) if streamed else 0
    kept_on_host = 0
    if settings.offload_inputs:
        kept_on_host += layers * batch.block_input
    if settings.keep_attention == "host":
        kept_on_host += layers * batch.attention_outputs
    # The last blocks of the forward pass are still on the device when the backward pass begins.
    returning = kept_on_host * max(layers - AHEAD, 0) // layers
    written = streamed * (block_bytes + streamed_state) if trains_linears else 0
    # Trained blocks are updated where they are in the ring, and need not come again either.
    weights = loads * block_bytes
    return StepWork(
        forward_flops=forward,
        backward_flops=both - forward + recomputed,
        model_flops=training_flops(flops, trained),
        forward_to_device=weights,
        backward_to_device=weights + returning + (written and streamed * streamed_state),
        to_host=kept_on_host,
        written_back=written,
    )
