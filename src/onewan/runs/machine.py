"""`Machine`: how busy this machine is, read once for all who look at it.

Hides where the numbers come from: psutil, and NVIDIA's driver through ``nvidia-smi``, which needs
no package and no memory of a device.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from onewan.arithmetic.byte_sizes import format_bytes

_QUERY = ("index", "name", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu")
_CPU_SECONDS = 0.5
"""In which it is counted how busy the CPU is."""
_SECONDS = 10
"""For which an answer of the driver is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU; what its driver does not say is None."""

    name: str
    load: float | None
    """Share of the time in which it computes, 0 to 1."""
    used: float | None
    """Bytes of its memory."""
    total: float | None
    temperature: float | None
    """Degrees Celsius."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """How busy the machine is."""

    gpus: tuple[Gpu, ...] = ()
    cpu: float = 0.0
    """Share of all cores, 0 to 1."""
    ram_used: int = 0
    ram_total: int = 0
    disk_free: int = 0
    """Bytes that runs may still write."""


def gpus_of(answer: str) -> tuple[Gpu, ...]:
    """The GPUs in the answer of ``nvidia-smi`` to a query in CSV, in the order of their indexes."""
    found: list[Gpu] = []
    for row in csv.reader(answer.splitlines(), skipinitialspace=True):
        if len(row) == len(_QUERY):
            load, used, total, temperature = map(_number, row[2:])
            found.append(
                Gpu(
                    name=row[1],
                    load=None if load is None else load / 100,
                    used=None if used is None else used * 2**20,
                    total=None if total is None else total * 2**20,
                    temperature=temperature,
                )
            )
    return tuple(found)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # such as "[N/A]", of parts of a GPU
        return None


class Machine:
    """This machine, with the disk of the folder `runs`. `read` is called by one thread."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._has_driver = True
        self.now = Readings()
        """Replaced as a whole, so that any thread may read it."""

    def read(self) -> Readings:
        """Read how busy the machine is now, which takes up to a second."""
        memory = psutil.virtual_memory()
        self.now = Readings(
            gpus=self._gpus(),
            # Not since the call before: psutil counts that for each thread by itself.
            cpu=psutil.cpu_percent(_CPU_SECONDS) / 100,
            ram_used=memory.total - memory.available,
            ram_total=memory.total,
            disk_free=psutil.disk_usage(str(self._runs)).free,
        )
        return self.now

    def _gpus(self) -> tuple[Gpu, ...]:
        if not self._has_driver:
            return ()
        command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except FileNotFoundError:
            self._has_driver = False
            return ()
        except (OSError, subprocess.TimeoutExpired):
            return self.now.gpus
        return gpus_of(done.stdout) if done.returncode == 0 else ()


def gauges_of(now: Readings) -> Iterator[tuple[str, str, float | None]]:
    """(name, value, share from 0 to 1 if it has one) of what a person reads."""
    for number, gpu in enumerate(now.gpus):
        parts = [] if gpu.load is None else [f"{100 * gpu.load:.0f} %"]
        if gpu.used is not None and gpu.total is not None:
            parts.append(f"{format_bytes(gpu.used)} of {format_bytes(gpu.total)}")
        if gpu.temperature is not None:
            parts.append(f"{gpu.temperature:.0f} °C")
        yield f"GPU {number}, {gpu.name}", ", ".join(parts) or "says nothing", gpu.load
    yield "CPU", f"{100 * now.cpu:.0f} %", now.cpu
    if now.ram_total:
        ram = f"{format_bytes(now.ram_used)} of {format_bytes(now.ram_total)}"
        yield "RAM", ram, now.ram_used / now.ram_total
        yield "Disk of the runs", f"{format_bytes(now.disk_free)} free", None
