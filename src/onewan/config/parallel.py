"""The section `parallel` of the run file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from onewan.config.section import Float, Int, Section


class ParallelSection(Section):
    """How the processes that torchrun starts divide a run. It does not change what is computed: a
    step has the clips of this file's batch, whatever the number of processes."""

    experts: Literal["auto", "together", "side_by_side"] = "auto"
    """Whether half of the processes train the high and half the low expert at the same time
    (`side_by_side`), or all train the same one. `auto`: side by side where it is possible."""
    weights: Literal["auto", "replicated", "sharded", "sharded_per_machine"] = "auto"
    """Where processes train the same expert: each has all of its weights (`replicated`), or a shard
    of each block's (`sharded`, FSDP2; `sharded_per_machine`: each machine has all shards, HSDP).
    `auto`: sharded in full fine-tuning."""
    sequence_parallel: Annotated[Int, Field(ge=1)] | Literal["auto"] = "auto"
    """How many processes share the tokens of each clip (Ulysses); it divides the attention heads.
    `auto`: 1, or more where a step has fewer clips than processes."""
    timeout_minutes: Float = Field(default=30.0, gt=0)
    """A process in which nothing happens for so long has failed, and the others end."""
