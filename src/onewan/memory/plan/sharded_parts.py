"""`ShardedParts`: what a process with shards has of all experts, in the phases of a run.

Shards stay on the device, also those of the expert that does not compute, and optimizer state and
averages leave it only while videos are sampled. Host memory has whole weights while they are
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onewan.memory.plan.sharded import RankBytes
from onewan.memory.plan.sharing import Sharing
from onewan.memory.plan.trained import TrainedWeights
from onewan.variants import ExpertName


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedParts:
    """What one process has of the experts that it loads."""

    loaded: Mapping[ExpertName, RankBytes]
    trained: frozenset[ExpertName]
    """Of `loaded`, the experts that the run trains."""
    sharing: Sharing
    embeddings: TrainedWeights | None
    averages_on_device: bool

    @property
    def weights(self) -> dict[str, int]:
        """On the device, with the buffers for whole blocks."""
        parts = self.loaded.values()
        return {
            "weights that are not sharded": sum(part.replicated for part in parts),
            "shards of the blocks": sum(part.shards for part in parts),
            "whole blocks, gathered": max(part.whole_weights for part in parts),
        }

    def on_device(self, *, training: bool) -> dict[str, int]:
        """What is trained, optimizer state, averages and gradients."""
        parts, others = self._trained, [] if self.embeddings is None else [self.embeddings]
        device = {
            "trained weights": sum(part.adapters + part.residuals for part in parts)
            + sum(other.weights for other in others),
            "optimizer state": sum(part.state.device for part in self._with_state)
            + sum(other.state.device for other in others),
        }
        if self.averages_on_device:
            device["averages"] = self.averages
        if training:
            # The gradients of an expert are dropped after its step.
            device["gradients"] = max((part.gradients for part in parts), default=0)
            device["gradients"] += sum(other.gradients for other in others)
            device["whole gradients of blocks"] = max(
                (part.block_gradients + part.reduced_gradients for part in parts), default=0
            )
        return device

    @property
    def on_host(self) -> dict[str, int]:
        """What the run file keeps in host memory."""
        others = [] if self.embeddings is None else [self.embeddings]
        state = sum(part.state.host for part in self._with_state)
        host = {"optimizer state": state + sum(other.state.host for other in others)}
        if not self.averages_on_device:
            host["averages"] = self.averages
        return host

    @property
    def block_gradients(self) -> int:
        """Bytes of the whole gradients of the block that is differentiated."""
        return max((part.block_gradients for part in self._trained), default=0)

    @property
    def averages(self) -> int:
        """Bytes of the averages."""
        own = sum(part.averages for part in self._trained)
        return own + (0 if self.embeddings is None else self.embeddings.averages)

    @property
    def _trained(self) -> list[RankBytes]:
        return [part for name, part in self.loaded.items() if name in self.trained]

    @property
    def _with_state(self) -> list[RankBytes]:
        """Those that this process trains: it makes optimizer state in the first step of each."""
        if not self.sharing.side_by_side:
            return self._trained
        return sorted(self._trained, key=lambda part: part.state.device)[-1:]
