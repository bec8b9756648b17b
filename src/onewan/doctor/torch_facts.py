"""What torch, its devices and their attention backends are here, asked in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.doctor.finding import without_names

_SECONDS = 90
"""After which the import of torch is given up; a first one from a network disk takes a minute."""
_ASK = "from onewan.model.device_report import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An accelerator that torch can use, as `onewan.devices.DeviceFacts` describes it."""

    name: str
    kind: str
    title: str
    memory: int = 0
    """Bytes; 0 where it is unknown."""
    capability: str = ""
    driver: str = ""
    without: tuple[str, ...] = ()
    emulates_bfloat16: bool = False

    def line(self) -> str:
        """The device on one line."""
        parts = [f"{self.title} ({self.name}, {self.kind})"]
        if self.memory:
            parts.append(format_bytes(self.memory))
        if self.capability:
            label = "compute capability" if self.kind == "CUDA" else "architecture"
            parts.append(f"{label} {self.capability}")
        if self.driver:
            parts.append(f"driver {self.driver}")
        if self.without:
            parts.append(f"no {' or '.join(self.without)}")
        if self.emulates_bfloat16:
            parts.append("bfloat16 emulated")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """What torch says about itself when it is imported."""

    version: str | None
    """None if it can't be imported."""
    build: str = ""
    """"CUDA 12.8", "ROCm 6.4" or "CPU only"."""
    devices: tuple[Device, ...] = ()
    attention: Mapping[str, str] = field(default_factory=dict[str, str])
    """Attention backends by their names in the run file, and why one can't be used for training on
    the first device; empty if it can."""
    error: str = ""
    """Why it can't be imported, or what ended the attempt to compute."""


def ask_torch() -> Torch:
    """The facts. Raises nothing: why torch can't be asked is `Torch.error`."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Torch(version=None, error=f"its import has not ended after {_SECONDS} s")
    except OSError as error:
        return Torch(version=None, error=f"Python can't be started: {error.strerror}")
    facts = _facts(done.stdout)
    error = ""
    if done.returncode or "attention" not in facts:
        lines = done.stderr.strip().splitlines()
        ended = f"the process that imports it ends with status {done.returncode}"
        error = without_names(lines[-1][:300] if lines else ended)
    return Torch(
        version=facts.get("version"),
        build=facts.get("build", ""),
        devices=tuple(
            Device(**{**device, "without": tuple(device["without"])})
            for device in facts.get("devices", ())
        ),
        attention={name: without_names(why) for name, why in facts.get("attention", {}).items()},
        error=error,
    )


def _facts(output: str) -> dict[str, Any]:
    """The parts of the report that were printed; packages may have printed lines of their own."""
    facts = dict[str, Any]()
    for line in output.splitlines():
        try:
            part = json.loads(line)
        except ValueError:
            continue
        if isinstance(part, dict):
            facts |= part
    return facts
