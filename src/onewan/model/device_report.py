"""torch, its devices and their attention backends as JSON on standard output, for `onewan doctor`.

Run in a process of its own, since a broken installation or driver may end it. Each line is complete
when it is printed, so what was found before that is kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from onewan.devices import (
    available_devices,
    device_facts,
    fused_attention,
    is_host,
    resolve_device,
    torch_build,
)
from onewan.errors import ConfigError
from onewan.formats.untrusted import first_line
from onewan.model.attention_backends import attention_backend
from onewan.model.attention_choice import why_unusable

_HEAD_DIM = 128
"""Channels of a head of Wan 2.2's transformers, which compute attention in bfloat16."""
_PACKAGES = ("flash_attn", "flash_attn_interface", "xformers")


def report() -> Iterator[dict[str, Any]]:
    """The build and the devices; then the backends of the device that `auto` is, each with the
    reason why it can't be used for training there, or with an empty text."""
    devices = available_devices()
    yield {
        "version": torch.__version__,
        "build": torch_build(),
        "devices": [asdict(device_facts(device)) for device in devices if not is_host(device)],
    }
    device = resolve_device("auto")
    reasons = {name: _reason(name, device) for name in (*fused_attention(device), "math")}
    yield {"attention": {name: why for name, why in reasons.items() if why is not None}}


def _reason(name: str, device: torch.device) -> str | None:
    """None for a package that is not installed."""
    try:
        backend = attention_backend(name)
    except ConfigError as error:
        # Packages that are compiled for one version of torch are often there, and can't be used.
        cause = error.__cause__ or error
        is_missing = isinstance(cause, ModuleNotFoundError) and cause.name in _PACKAGES
        return None if is_missing else f"can't be imported: {first_line(cause)}"
    return why_unusable(backend, device, torch.bfloat16, _HEAD_DIM) or ""


def main() -> None:
    """Write the report, a line for each of its parts."""
    for part in report():
        sys.stdout.write(f"{json.dumps(part)}\n")
        sys.stdout.flush()
