"""What a run is trained with and on, for its record: versions of packages, system and device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import time

import torch

from onewan.devices import device_name, is_host, total_and_free_memory
from onewan.runs.events import Environment, Processes
from onewan.train.run import Run

_PACKAGES = ("onewan", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "av")
"""Those on which results depend; of other optimizers' libraries the saved states know."""


def environment(device: torch.device) -> Environment:
    """The event about this process, which trains on `device`."""
    total = None if is_host(device) else total_and_free_memory(device)[0]
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    return Environment(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        device=device_name(device),
        device_memory=total,
        packages={"python": platform.python_version(), **versions},
    )


def processes(run: Run) -> Processes:
    """The event about the processes that train `run`. To be called by all of them."""
    run.ranks.gathered(None)  # so that all read their clocks at the same time
    clock = time.time()
    own = (socket.gethostname(), os.getpid(), str(run.device), run.group.experts, clock)
    hostnames, pids, devices, experts, clocks = zip(*run.ranks.gathered(own), strict=True)
    return Processes(
        hostnames=hostnames,
        pids=pids,
        devices=devices,
        experts=experts,
        clocks_ahead=[round(each - clocks[0], 3) for each in clocks],
    )


def _version(name: str) -> str:
    """The version of an installed package; empty if it is not installed, as onewan in a checkout
    that is only on the path."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
