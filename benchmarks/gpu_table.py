"""The table of measured training steps, from the committed results of `benchmarks/gpu.py`.

It lists every case that the benchmark has, so that it also says what has never run on a real
device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markers import replace_between

from onewan.variants import VARIANTS

COLUMNS = (
    ("bare loop, LoRA", ("bare", "one", "resident", "lora")),
    ("one expert, LoRA", ("onewan", "one", "resident", "lora")),
    ("both, LoRA", ("onewan", "both", "resident", "lora")),
    ("one, streamed LoRA", ("onewan", "one", "streamed", "lora")),
    ("both, streamed LoRA", ("onewan", "both", "streamed", "lora")),
    ("one, full", ("onewan", "one", "resident", "full")),
    ("one, streamed full", ("onewan", "one", "streamed", "full")),
    ("both, streamed full", ("onewan", "both", "streamed", "full")),
)
"""Titles, and (loop, experts, placing, method) of the cases."""

NOT_RUN = "not run"


def write_table(document: Path, results: Path, sizes: Sequence[str]) -> None:
    """Replace the table ``gpu`` of `document` by one of the files in the folder `results`."""
    found = [
        result
        for file in sorted(results.glob("*.json"))
        if (result := json.loads(file.read_text(encoding="utf-8"))).get("is_real", True)
    ]
    replace_between(document, "gpu", table(found, sizes))


def table(results: Sequence[dict[str, Any]], sizes: Sequence[str]) -> str:
    """Markdown: seconds per step by variant, size and device."""
    lines = [
        f"| device | variant | size | {' | '.join(title for title, _ in COLUMNS)} |",
        "| --- | --- | --- |" + " ---: |" * len(COLUMNS),
    ]
    devices = {result["device"]: result for result in results} or {"no real device": {"cases": []}}
    for device, result in devices.items():
        cells = {key_of(case): case for case in result["cases"]}
        for variant in VARIANTS:
            for size in sizes:
                row = [cell(cells.get((variant, size, *key))) for _, key in COLUMNS]
                if len(VARIANTS[variant].experts) == 1:
                    row = [
                        "-" if key[1] == "both" else text
                        for text, (_, key) in zip(row, COLUMNS, strict=True)
                    ]
                lines.append(f"| {device} | {variant} | {size} | {' | '.join(row)} |")
    return "\n".join(lines)


def key_of(case: dict[str, Any]) -> tuple[str, ...]:
    """Variant, size, loop, experts, placing and method; older results had one resident expert and
    a LoRA only."""
    return (
        case["variant"],
        case["size"],
        case["loop"],
        case.get("experts", "one"),
        case.get("placing", "resident"),
        case.get("method", "lora"),
    )


def cell(case: dict[str, Any] | None) -> str:
    """Seconds and peak of a case, or why there are none."""
    if case is None:
        return NOT_RUN
    if "failed" in case:
        return "did not fit"
    peak = case.get("peak_bytes")
    memory = "" if peak is None else f", {peak / 1e9:.0f} GB"
    return f"{case['seconds']:.2f} s{memory}"
