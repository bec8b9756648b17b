"""Bytes that a process of a run with sharded weights has, counted on its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from onewan.config.load import load_run
from onewan.devices import HOST
from onewan.memory.sharded_blocks import ShardedTransformer
from onewan.parallel.ranks import join
from onewan.train.setup import WanModelSetup
from onewan.train.step import train_step, whole_gradients


def held_bytes(run_yaml: Path, overrides: Sequence[str]) -> Counter[str]:
    """Of the expert of the first step, in one of several processes: parameters, gradients,
    optimizer state and averages after a step; whole weights and gradients at their peak in it."""
    peaks = Counter[str]()
    with pytest.MonkeyPatch.context() as patch, join(HOST, 60.0) as ranks:
        _record_peaks(patch, peaks)
        run = WanModelSetup(load_run(run_yaml, list(overrides)), ranks=ranks).build()
        expert = run.schedule.expert_at(0)
        trained, trainables = run.bring_expert(expert[0]), run.state.trainables_of(expert[0])
        train_step(run, run.loader.step(0, *expert, run.part))  # which makes optimizer state
        whole_gradients(run, run.loader.step(0, *expert, run.part), trained, trainables)
        optimizer: Any = trainables[0].optimizer
        averages = trainables[0].ema
        managed = list(optimizer.parameters)
        states = [value for entry in managed for value in entry.state.values()]
        residuals = [entry.residual for entry in managed if entry.residual is not None]
        found = {
            "parameters": [*trained.transformer.parameters(), *residuals],
            "gradients": [entry.parameter.grad for entry in managed],
            "state": [value for value in states if isinstance(value, Tensor)],
            "averages": [] if averages is None else list(averages.averages.values()),
        }
        for name, tensors in found.items():
            peaks[name] = sum(_own(tensor).nbytes for tensor in tensors)
    return peaks


def _record_peaks(patch: pytest.MonkeyPatch, peaks: Counter[str]) -> None:
    """What is whole when a block computes, and when its gradients are complete."""
    use, send = ShardedTransformer.use, ShardedTransformer._send_gradients

    def recorded_use(self: ShardedTransformer, index: int) -> None:
        use(self, index)
        whole = sum(place.parameter.nbytes for place in self._places[index].values())
        for ahead in self._gathering.keys() - {index}:
            group: Any = self._blocks[ahead]._get_fsdp_state()._fsdp_param_group
            whole += group._all_gather_result.all_gather_output.nbytes
        peaks["whole weights"] = max(peaks["whole weights"], whole)

    def recorded_send(self: ShardedTransformer, index: int) -> None:
        places = self._places[index].values()
        whole = sum(p.parameter.grad.nbytes for p in places if p.parameter.grad is not None)
        peaks["block gradients"] = max(peaks["block gradients"], whole)
        send(self, index)
        if self._sums and (latest := self._sums[-1])._sent is not None:
            sent = latest._sent.nbytes + latest._sums.nbytes
            peaks["reduced gradients"] = max(peaks["reduced gradients"], sent)

    patch.setattr(ShardedTransformer, "use", recorded_use)
    patch.setattr(ShardedTransformer, "_send_gradients", recorded_send)


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
