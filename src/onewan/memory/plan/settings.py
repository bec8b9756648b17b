"""`Settings`: what is kept where, and what is computed again, for the clips of one bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KeepAttention = Literal["no", "device", "host"]
WeightStorage = Literal["as_stored", "bf16", "fp8", "int8", "nf4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of the run file's `memory` section with a value for each.

    `weights` and `checkpointing` are never chosen by the plan, only judged: they change the numbers
    or follow from the run file.
    """

    weights: WeightStorage = "as_stored"
    checkpointing: bool = True
    """Gradient checkpointing: only the input of each block is kept for the backward pass."""
    resident_blocks: int
    """Blocks whose weights stay on the device; the others are streamed."""
    offload_inputs: bool = False
    """Block inputs are in host memory between the forward and the backward pass."""
    keep_attention: KeepAttention = "no"
    feed_forward_chunks: int = 1
    park_idle: bool = False
    """While one expert trains, adapters, optimizer state and averages of the other are in host
    memory. Fine-tuned experts are always parked; and while videos are sampled, optimizer state and
    averages of both are in host memory in any case."""

    def streamed(self, layers: int) -> int:
        """Blocks of an expert of `layers` blocks that are streamed from host memory."""
        return max(0, layers - self.resident_blocks)
