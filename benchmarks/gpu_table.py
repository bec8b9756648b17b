"""The table of training steps at true size, from figures of `benchmarks/gpu.py` on real devices.

It lists every case that the benchmark has, so that it also says what has never run on one.
"""

from __future__ import annotations

from collections.abc import Sequence

from figures import Figure, Value

from onewan.variants import VARIANTS

SIZES = ("17x256x256", "33x480x832", "81x480x832", "81x720x1280")
"""Frames x height x width."""
COLUMNS = (
    ("bare loop, LoRA", ("bare", "one", "resident", "lora")),
    ("bare loop, full", ("bare", "one", "resident", "full")),
    ("one expert, LoRA", ("onewan", "one", "resident", "lora")),
    ("both, LoRA", ("onewan", "both", "resident", "lora")),
    ("one, streamed LoRA", ("onewan", "one", "streamed", "lora")),
    ("both, streamed LoRA", ("onewan", "both", "streamed", "lora")),
    ("one, full", ("onewan", "one", "resident", "full")),
    ("both, full", ("onewan", "both", "resident", "full")),
    ("one, streamed full", ("onewan", "one", "streamed", "full")),
    ("both, streamed full", ("onewan", "both", "streamed", "full")),
)
"""Titles, and (loop, experts, placing, method) of the cases."""

NOT_RUN = "not run"


def is_real(figure: Figure) -> bool:
    """Whether a figure is of `gpu.py` on a device whose times say something."""
    return figure.name.startswith("gpu_on_") and figure.machine.device_type not in {"cpu", "sim"}


def table(figures: Sequence[Figure], sizes: Sequence[str] = SIZES) -> str:
    """Markdown: seconds per step and peaks by device, variant and size."""
    devices: dict[str, list[Figure]] = {}
    for figure in sorted(figures, key=lambda figure: figure.date):
        devices.setdefault(figure.machine.device, []).append(figure)
    titles = [title for title, _ in COLUMNS]
    lines = [
        f"| device | variant | size | {' | '.join(titles)} |",
        "| --- | --- | --- |" + " ---: |" * len(titles),
    ]
    for device, measured in (devices or {"no real device": []}).items():
        cells: dict[tuple[str, ...], dict[str, Value]] = {}
        for value in (value for figure in measured for value in figure.values):  # the newest wins
            key = tuple(str(value.case[part]) for part in ("variant", "size", "settings"))
            cells.setdefault(key, {})[value.measure] = value
        for variant, facts in VARIANTS.items():
            for size in sizes:
                row = [
                    "-"
                    if len(facts.experts) == 1 and title.startswith("both")
                    else cell(cells.get((variant, size, title), {}))
                    for title in titles
                ]
                lines.append(f"| {device} | {variant} | {size} | {' | '.join(row)} |")
    return "\n".join(lines)


def cell(values: dict[str, Value]) -> str:
    """Seconds and peak of a case, or why there are none."""
    seconds, peak = values.get("duration of a step"), values.get("device peak")
    if seconds is None:
        return NOT_RUN
    if not seconds.repeats:
        return "did not fit"
    return f"{seconds.median:.2f} s" + ("" if peak is None else f", {peak.median:.0f} GB")
