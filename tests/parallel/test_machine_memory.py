"""Frozen weights that are streamed are in a machine's memory once, whatever the number of
processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_transformer
from support.torchrun import together

from onewan.devices import HOST
from onewan.memory.block_weights import BlockWeights
from onewan.memory.host_memory import HostMemory
from onewan.parallel.machine_memory import MachineMemory
from onewan.parallel.ranks import join

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="memory without a name in a file system is Linux's"
)

MEGABYTES = 128


def _taken() -> tuple[bool, bool, bool]:
    """Whether the blocks have the weights that they had; whether what one process writes into a
    master is in those of all; and whether this process writes them."""
    with join(HOST, 60) as ranks:
        model = tiny_transformer()
        before = {name: p.clone() for name, p in model.named_parameters()}
        machine = MachineMemory(ranks)
        weights = BlockWeights.take(list(model.blocks), HostMemory(HOST, machine=machine))
        weights.check_bound_to_host()
        is_same = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        ranks.gathered(None)
        master = weights.blocks[1].sources[0][1]
        if not ranks.is_first:
            master[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
        ranks.gathered(None)
        return is_same, master[:4].tolist() == [1, 2, 3, 4], machine.is_writer


def test_processes_take_the_same_masters() -> None:
    first, second = together(2, _taken)
    assert first == (True, True, True)
    assert second == (True, True, False)


def _own_megabytes() -> tuple[float, float]:
    """The process's part of all memory that is in use (what several have is divided among them)
    for masters that are shared, and for those of its own, MB."""

    def used() -> float:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:"))

    def taken(host: HostMemory) -> float:
        with torch.no_grad():
            blocks = [torch.nn.Linear(1000, 1000 * MEGABYTES // 4).requires_grad_(False)]
            blocks[0].weight.fill_(1)
        before = used()
        weights = BlockWeights.take(blocks, host)
        assert weights.blocks[0].sources[0][1].sum() > 0  # each page is looked at
        ranks.gathered(None)
        # What the blocks had before is freed.
        return used() - before + MEGABYTES

    with join(HOST, 60) as ranks:
        own = taken(HostMemory(HOST))  # first, since PyTorch takes some memory when it begins
        return taken(HostMemory(HOST, machine=MachineMemory(ranks))), own


def test_each_process_has_its_part_of_the_memory() -> None:
    for shared, own in together(2, _own_megabytes):
        assert own == pytest.approx(MEGABYTES, rel=0.15)
        assert shared == pytest.approx(MEGABYTES / 2, rel=0.15)


def _without_it() -> bool:
    with join(HOST, 60) as ranks:
        machine = MachineMemory(ranks)
        # One process asks for another size, as one whose model differs would.
        return machine.region(1000 + ranks.rank) is None


def test_processes_that_differ_have_memory_of_their_own() -> None:
    assert together(2, _without_it) == [True, True]
