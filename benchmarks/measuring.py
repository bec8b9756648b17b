"""What the benchmarks measure with: clocks, the memory of a device, and steps that take turns."""

from __future__ import annotations

import gc
import importlib
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from onewan.devices import device_memory, empty_cache, reset_peak, synchronize

Size = tuple[int, int, int]
"""Frames, height and width."""
WARM_UP = 2
"""Steps before those that are timed: the first one creates the optimizer's state."""


def parse_size(text: str) -> Size:
    """``81x480x832`` -> frames, height, width."""
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


def simulated_device() -> torch.device:
    """The device ``sim`` of ``tests/simulated_gpu``, which it registers with PyTorch.

    Before the first backward pass of the process. Its first use on a machine compiles it.
    """
    if "simulated_gpu" not in sys.modules:
        sys.path.append(str(Path(__file__).parents[1] / "tests"))
    importlib.import_module("simulated_gpu")
    return torch.device("sim", 0)


def release(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    empty_cache(device)


def clock(device: torch.device) -> float:
    """Seconds, of which differences count: of the CPU's work for the process where the CPU
    computes, which other work on the machine does not make longer; else of the wall clock, once
    the device has finished."""
    if device.type == "cpu":
        return time.process_time()
    synchronize(device)
    return time.perf_counter()


def clock_name(device: torch.device) -> str:
    """What `clock` counts, for a figure's text."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return "CPU time of one thread" if threads == 1 else f"CPU time of {threads} threads"
    return "wall-clock time"


def in_turns(
    loops: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call of each loop, after `WARM_UP` calls.

    The order within a turn is random, so that changes in the machine's speed affect all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in loops}
    order = random.Random(0)
    for turn in range(repeats + WARM_UP):
        for name in order.sample(sorted(loops), len(loops)):
            begin = clock(device)
            loops[name]()
            taken = clock(device) - begin
            if turn >= WARM_UP:
                times[name].append(taken)
    return times


def peak_of(work: Callable[[], object], device: torch.device) -> int | None:
    """The device's peak in bytes while `work` runs; None where it does not count its memory."""
    reset_peak(device)
    work()
    synchronize(device)
    return device_memory(device)[1]
