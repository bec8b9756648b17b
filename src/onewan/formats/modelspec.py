"""ModelSpec 1.0.0 metadata (github.com/Stability-AI/ModelSpec) for the files that onewan writes."""

from __future__ import annotations

import json
from datetime import datetime
from importlib.resources import files
from typing import Literal

SpecName = Literal["wan_2_2", "wan_2_2-lora", "wan_2_2-embedding"]

HASH = "modelspec.hash_sha256"
"""Field for the SHA-256 of all bytes after the header, ``0x`` and 64 hexadecimal digits; the writer
(`onewan.formats.write`) sets it."""


def model_spec(
    name: SpecName,
    date: datetime,
    title: str | None = None,
    resolution: tuple[int, int] | None = None,
) -> dict[str, str]:
    """The fields ``modelspec.*`` except the hash. `resolution` is (width, height) in pixels."""
    # The constant fields are data files, which a test compares with the specification.
    resource = files("onewan") / "resources" / "sd_model_spec" / f"{name}.json"
    spec: dict[str, str] = json.loads(resource.read_text(encoding="utf-8"))
    spec["modelspec.date"] = date.isoformat(timespec="seconds")
    if title is not None:
        spec["modelspec.title"] = title
    if resolution is not None:
        spec["modelspec.resolution"] = f"{resolution[0]}x{resolution[1]}"
    return spec
