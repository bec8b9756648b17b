"""Writes the tables of README.md, docs/start.md and docs/memory.md: what trains on cards of 12 to
80 GB, according to the memory plan.

    python benchmarks/cards.py            # writes the tables between their markers
    python benchmarks/cards.py --print    # prints them

Everything is arithmetic of `onewan.memory.plan`; nothing is run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from markers import replace_between

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.memory.plan import Bucket, Plan, Settings, find_machine, make_plan
from onewan.memory.plan.machine import card_for_memory
from onewan.memory.plan.stored import FP8_TEXT_ENCODER, assumed_model, with_changes
from onewan.variants import VARIANTS, VariantName

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "memory.md"
OVERVIEWS = (ROOT / "README.md", ROOT / "docs" / "start.md")
TABLE = "cards"

MEMORIES = (12, 16, 24, 32, 48, 80)
"""GB of device memory."""
ANY_HOST = 10**12
"""Bytes of host memory that the large table allows; it says how many are needed."""
COMMON_HOST = 64 * 10**9
"""Bytes of host memory that the overview allows."""
SIZES: tuple[tuple[VariantName, tuple[int, int, int]], ...] = (
    ("t2v-a14b", (33, 480, 832)),
    ("t2v-a14b", (81, 480, 832)),
    ("t2v-a14b", (81, 720, 1280)),
    ("ti2v-5b", (81, 480, 832)),
    ("ti2v-5b", (121, 704, 1280)),
)
"""Variants, and frames, height and width of a clip."""
WEIGHTS = ("as_stored", "fp8", "nf4")
"""Tried in this order."""
COMMON: tuple[tuple[str, VariantName, tuple[int, int, int], tuple[str, ...]], ...] = (
    ("A14B, photos 768x768", "t2v-a14b", (1, 768, 768), ("fp8", "nf4")),
    ("A14B, 33 frames 512x512", "t2v-a14b", (33, 512, 512), ("fp8", "nf4")),
    ("A14B, 81 frames 832x480", "t2v-a14b", (81, 480, 832), ("fp8", "nf4")),
    ("TI2V-5B, 121 frames 1280x704", "ti2v-5b", (121, 704, 1280), WEIGHTS),
)
"""Columns of the overview: title, variant, clip, and weights in the order in which they are tried.
A14B begins with fp8, as the files that most people have."""
COMMON_STEPS = 2000


def table() -> str:
    """The table in Markdown."""
    lines = [
        "| device | variant | clip | weights | settings | device peak | host memory | s/step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for memory in MEMORIES:
        for variant, size in SIZES:
            lines.append(row(memory, variant, size))
    return "\n".join(lines)


def overview() -> str:
    """For people with one card: time of a step and of a run, and host memory, in Markdown."""
    titles = [title for title, *_ in COMMON]
    lines = [f"| card | {' | '.join(titles)} | sample video |", "| --- |" + " --- |" * 5]
    for memory in MEMORIES:
        found = [smallest_change(memory, *column, COMMON_HOST) for _, *column in COMMON]
        video = next(plan for plan, _ in filter(None, found)).run_time.sample
        cells = [*map(brief, found), format_duration(video)]
        lines.append(f"| {memory} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def brief(found: tuple[Plan, str] | None) -> str:
    """Time of a step and of a run, host memory, and the storage of weights if it is unusual."""
    if found is None:
        return "no"
    plan, weights = found
    step = plan.run_time.step
    hours = COMMON_STEPS * step / 3600
    run = f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.0f} h"
    host = f"{plan.host_peak.host_bytes / 1e9:.0f} GB"
    return ", ".join(
        [
            f"{step:.0f} s" if step >= 10 else f"{step:.2g} s",
            run,
            host,
            *(["nf4"] if weights == "nf4" else []),
        ]
    )


def title_of(variant: VariantName) -> str:
    return VARIANTS[variant].title.removeprefix("Wan 2.2 ")


def row(memory: int, variant: VariantName, size: tuple[int, int, int]) -> str:
    frames, height, width = size
    start = f"| {memory} GB | {title_of(variant)} | {frames}x{height}x{width} | "
    found = smallest_change(memory, variant, size, WEIGHTS, ANY_HOST)
    if found is None:
        return f"{start} | does not fit | | | |"
    return start + " | ".join(cells(*found, VARIANTS[variant].num_layers)) + " |"


@cache
def smallest_change(
    memory: int,
    variant: VariantName,
    size: tuple[int, int, int],
    tried: tuple[str, ...],
    host: int,
) -> tuple[Plan, str] | None:
    """The plan with the first of the `tried` weights that fits, and which that is; None if none
    fits. `memory` is in GB, `host` in bytes."""
    frames, height, width = size
    bucket = Bucket(frames=frames, width=width, height=height)
    with tempfile.TemporaryDirectory() as folder:
        for weights in tried:
            plan = plan_of(Path(folder), memory, variant, bucket, weights, host)
            if plan.fits:
                return plan, weights
    return None


def plan_of(
    folder: Path, memory: int, variant: VariantName, bucket: Bucket, weights: str, host: int
) -> Plan:
    """A LoRA of rank 32 with AdamW on all experts, sampled at 640x384 with 33 frames. On cards that
    do not hold the text encoder in bfloat16 it is given in fp8."""
    machine = find_machine(memory * 10**9, host)
    config = run_of(folder, variant, weights)
    stored = with_changes(assumed_model(config), config)
    if stored.text_encoder > machine.device_budget:
        config = run_of(folder, variant, weights, f"model.text_encoder={FP8_TEXT_ENCODER}")
        stored = with_changes(stored, config)
    return make_plan(config, [bucket], machine, stored, advice=False)


def run_of(folder: Path, variant: VariantName, weights: str, *overrides: str) -> ResolvedRun:
    file = folder / "run.yaml"
    file.write_text(
        f"model: {{path: Owner/Model, variant: {variant}}}\n"
        f"memory: {{weights: {weights}}}\n"
        "validation: {clips: 0}\n"
        "sample: {prompts: [{prompt: a}], width: 640, height: 384, frames: 33}\n",
        encoding="utf-8",
    )
    if VARIANTS[variant].needs_image:
        raise ValueError("I2V-A14B needs an image; it takes the memory of T2V-A14B")
    return load_run(file, overrides)


def cells(plan: Plan, weights: str, layers: int) -> Iterator[str]:
    worst = plan.worst
    yield "bf16" if weights == "as_stored" else weights
    yield ", ".join(settings_of(worst.settings, layers))
    yield format_bytes(plan.peak.device_bytes)
    yield format_bytes(plan.host_peak.host_bytes)
    yield f"{worst.time.seconds:.3g}"


def settings_of(settings: Settings, layers: int) -> Iterator[str]:
    yield f"{settings.resident_blocks} of {layers} blocks resident"
    if settings.offload_inputs:
        yield "inputs offloaded"
    if settings.keep_attention != "no":
        yield f"attention kept ({settings.keep_attention})"
    if settings.feed_forward_chunks > 1:
        yield f"{settings.feed_forward_chunks} chunks"
    if settings.park_idle:
        yield "idle expert parked"


def rates() -> str:
    """The assumed rates, one card for each memory."""
    cards = {memory: card_for_memory(memory * 10**9) for memory in MEMORIES}
    return "; ".join(
        f"{memory} GB: {card.flops / 1e12:.0f} TFLOP/s and {card.bus / 1e9:.0f} GB/s ({card.name})"
        for memory, card in cards.items()
    )


def document_part() -> str:
    return f"{table()}\n\nRates that the times assume: {rates()}."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the table instead")
    if parser.parse_args().print:
        print(f"{document_part()}\n\n{overview()}")
    else:
        replace_between(DOCUMENT, TABLE, document_part())
        for document in OVERVIEWS:
            replace_between(document, TABLE, overview())
    return 0


if __name__ == "__main__":
    sys.exit(main())
