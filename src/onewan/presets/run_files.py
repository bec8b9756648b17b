"""The run files in ``configs/``: for each variant, method and size of card the one that
`onewan init` writes, and what is known of them without planning them again.

``scripts/write_configs.py`` writes the files, and `LISTED` with what their plans say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.errors import OnewanError
from onewan.presets.starter import METHODS, MethodKind, StarterRequest
from onewan.variants import VariantName

CARDS_GB = (12, 16, 24, 32, 80)
LISTED = "run_files.json"
"""In ``onewan/resources``: a `RunFile` for each file in ``configs/``."""

_WEIGHTS = {"as_stored": "as stored"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A run file in ``configs/``, and what its plan says."""

    variant: VariantName
    method: MethodKind
    card_gb: int
    host_gb: int
    frames: int
    """Of a training clip."""
    size: str
    """Area of a training clip, as `video_data.resolution` gives it."""
    weights: str
    """Of the frozen blocks, as in `memory.weights`."""
    step_seconds: float
    """By arithmetic, on a card of about this memory."""
    device_bytes: int
    """At the highest peak."""
    host_bytes: int

    @property
    def file(self) -> str:
        """Its name in ``configs/``."""
        return f"{self.variant}/{self.method}_{self.card_gb}gb.yaml"


def listed() -> list[RunFile]:
    """The run files that there are, by variant, method and card."""
    text = (files("onewan") / "resources" / LISTED).read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)
    return [RunFile(**row) for row in rows]


def as_listed(found: Sequence[RunFile]) -> str:
    """The text of `LISTED`."""
    rows = ",\n".join(f"  {json.dumps(asdict(row))}" for row in found)
    return f"[\n{rows}\n]\n"


def matching(
    variant: VariantName | None, method: MethodKind | None, vram: int | None
) -> list[RunFile]:
    """The run files of a variant, of a method, for a device of `vram` bytes; None is any.

    OnewanError if the device is smaller than all that there are run files for.
    """
    cards = [card for card in CARDS_GB if vram is None or card * 10**9 <= vram]
    if not cards:
        least = format_bytes(CARDS_GB[0] * 10**9)
        raise OnewanError(f"--vram: the smallest device with a run file has {least}")
    return [
        row
        for row in listed()
        if variant in (None, row.variant)
        and method in (None, row.method)
        and (vram is None or row.card_gb == cards[-1])
    ]


HEADINGS = ("variant", "method", "card", "clips", "weights", "step", "host")


def cells(row: RunFile) -> tuple[str, ...]:
    """What the table says of a run file, in the order of `HEADINGS`."""
    return (
        row.variant,
        row.method,
        f"{row.card_gb} GB",
        f"{row.frames} frames, {row.size}",
        _WEIGHTS.get(row.weights, row.weights),
        format_duration(row.step_seconds),
        f"{format_bytes(row.host_bytes)} of {row.host_gb} GB",
    )


def alternatives(request: StarterRequest, vram: int, ram: int) -> list[str]:
    """What does fit, where a run file for `request` does not: other memory, or other methods."""
    rows = [row for row in listed() if row.variant == request.variant]
    own = [row for row in rows if row.method == request.method]
    lines = [
        f"{row.method} of {row.variant} fits a device of {row.card_gb} GB with {row.host_gb} GB of "
        "host memory"
        for row in sorted(own, key=lambda row: (row.host_gb, row.card_gb))[:1]
    ]
    here = {
        row.method for row in rows if row.card_gb * 10**9 <= vram and row.host_gb * 10**9 <= ram
    }
    if here:
        methods = ", ".join(name for name in METHODS if name in here)
        lines.append(f"with this memory these methods of {request.variant} fit: {methods}")
    return lines
