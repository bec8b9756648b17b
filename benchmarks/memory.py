"""The memory of a training step by variant, size and settings: counted beside planned.

Device peaks are live bytes over fake tensors at true size (`true_size.count_step`), of the second
step of a run with one expert, or of both with their adapters on the device; those of full
fine-tuning are of a run's own code from the loaded transformer on (`fine_tuning`). What a block
adds to a peak is the same for each block, so a row is counted with 4 and with 5 blocks and
continued to all of them. The plan's figures are those of `onewan plan` for the same settings.

    python benchmarks/memory.py [--rows 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from figures import Chart, Figure, Value, add_output_options, as_case, measured_here, save
from fine_tuning import count_fine_tuning, run_config
from true_size import Settings, count_step

from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.memory.plan import Bucket, BucketPlan, Machine, make_plan
from onewan.variants import VARIANTS, VariantName

FEW, MORE = 4, 5
"""Numbers of blocks that are counted. From 4 on, the first blocks and the last ones, which differ,
are apart."""

RUN_FILE = """
model: {{path: model, variant: {variant}, experts: {experts}, dtype: bfloat16}}
wan_config: {{max_frames: {frames}}}
video_data: {{sources: [{{path: clips}}]}}
method: {method}
memory:
  weights: {storage}
  resident_blocks: {resident}
  offload_inputs: {offload_inputs}
  keep_attention: "{keep_attention}"
  feed_forward_chunks: {chunks}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table."""

    variant: VariantName
    size: tuple[int, int, int]
    """Frames, height and width."""
    settings: Settings
    """Without `blocks` and `streamed_blocks`, which follow from the row."""
    resident: int | None = None
    """Blocks that stay on the device; None is all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Counted and planned bytes of a row."""

    variant: str
    size: str
    tokens: int
    what: str
    peak: int
    """Of the device, counted."""
    planned: int
    to_device: int
    """Over the bus per step, counted."""
    to_host: int
    planned_to_device: float
    planned_to_host: float

    @property
    def difference(self) -> float:
        """The planned peak relative to the counted one, minus 1."""
        return self.planned / self.peak - 1


def continued(few: int, more: int, layers: int) -> int:
    """A figure that grows evenly with the blocks, from those with `FEW` and `MORE` of them."""
    return few + (more - few) * (layers - FEW) // (MORE - FEW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What a row takes with all blocks, counted."""

    tokens: int
    peak: int
    to_device: int
    to_host: int


def counted(row: Row) -> Counted:
    """The row's device peak and the bytes that it copies."""
    return counted_fine_tuning(row) if row.settings.method == "full" else counted_adapter(row)


def counted_fine_tuning(row: Row) -> Counted:
    """Of a row that fine-tunes; all of its blocks are streamed."""
    assert row.resident == 0
    layers = VARIANTS[row.variant].num_layers
    few, more = (count_fine_tuning(config_of(row), row.size, blocks) for blocks in (FEW, MORE))
    return Counted(
        tokens=few.tokens,
        peak=max(continued(few.peaks[part], more.peaks[part], layers) for part in few.peaks),
        to_device=continued(few.to_device, more.to_device, layers),
        to_host=continued(few.to_host, more.to_host, layers),
    )


def counted_adapter(row: Row) -> Counted:
    """Of a row that trains a LoRA."""
    layers = VARIANTS[row.variant].num_layers
    streamed = row.resident is not None and row.resident < layers
    few, more = (
        count_step(
            row.variant,
            *row.size,
            replace(row.settings, blocks=blocks, streamed_blocks=blocks if streamed else 0),
        )
        for blocks in (FEW, MORE)
    )
    parts = few.peaks.keys()
    # Each part by itself: with all blocks another one may have the highest peak.
    peak = max(continued(few.peaks[part], more.peaks[part], layers) for part in parts)
    loaded = 0
    if streamed and row.resident is not None:
        block = few.buffers // 2
        peak += row.resident * block
        loaded = 2 * (layers - row.resident - 2) * block
    back = continued(few.kept_to_device, more.kept_to_device, layers)
    return Counted(
        tokens=few.tokens,
        peak=peak,
        to_device=loaded + back,
        to_host=continued(few.kept_to_host, more.kept_to_host, layers),
    )


def config_of(row: Row) -> ResolvedRun:
    """A run with the row's settings."""
    facts, settings = VARIANTS[row.variant], row.settings
    if settings.method == "full":
        return run_config(
            row.variant,
            row.size[0],
            offload_inputs=settings.offload_inputs,
            keep_attention=settings.keep_attention,
            chunks=settings.feed_forward_chunks,
        )
    text = RUN_FILE.format(
        variant=row.variant,
        experts="both" if settings.both_experts or len(facts.experts) == 1 else "high",
        frames=row.size[0],
        method=f"{{kind: lora, rank: {settings.rank}}}",
        storage=settings.storage,
        resident=facts.num_layers if row.resident is None else row.resident,
        offload_inputs=str(settings.offload_inputs).lower(),
        keep_attention=settings.keep_attention,
        chunks=settings.feed_forward_chunks,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return load_run(file)


def planned(row: Row) -> BucketPlan:
    """The plan of a run with the row's settings, on a machine that it fits."""
    frames, height, width = row.size
    machine = Machine(name="any", vram=10**13, ram=10**13, flops=1e14, bus=25e9)
    bucket = Bucket(frames=frames, width=width, height=height)
    return make_plan(config_of(row), [bucket], machine, advice=False).worst


def describe(row: Row) -> str:
    """The row's settings in words."""
    settings, layers = row.settings, VARIANTS[row.variant].num_layers
    words = [settings.storage]
    if settings.method == "full":
        words.append("full fine-tuning with a fused step and AdamW in 8 bits")
    if settings.whole_blocks:
        words.append("blocks checkpointed as a whole")
    if row.resident is None:
        words.append("all blocks resident")
    else:
        words.append(f"{layers - row.resident} of {layers} blocks streamed")
    if settings.offload_inputs:
        words.append("block inputs on the host")
    if settings.keep_attention != "no":
        words.append(f"attention kept on the {settings.keep_attention}")
    if settings.feed_forward_chunks > 1:
        words.append(f"{settings.feed_forward_chunks} feed-forward chunks")
    if settings.both_experts:
        words.append("both experts' LoRA and optimizer state on the device")
    return ", ".join(words)


def measure(row: Row) -> Result:
    """Count and plan a row."""
    found, plan = counted(row), planned(row)
    return Result(
        variant=row.variant,
        size="x".join(map(str, row.size)),
        tokens=found.tokens,
        what=describe(row),
        peak=found.peak,
        planned=plan.training.device_bytes,
        to_device=found.to_device,
        to_host=found.to_host,
        planned_to_device=plan.time.bytes_to_device,
        planned_to_host=plan.time.bytes_to_host,
    )


FULL_SPEED = Settings(offload_inputs=True, keep_attention="host")
LEAN = Settings(offload_inputs=True, keep_attention="host", feed_forward_chunks=8)
FINE_TUNED = replace(FULL_SPEED, method="full")
SIZES = ((17, 256, 256), (33, 480, 832), (81, 480, 832), (81, 720, 1280))


def rows() -> list[Row]:
    """The rows of the table."""
    main = (81, 480, 832)
    both = replace(FULL_SPEED, both_experts=True)
    fp8 = replace(FULL_SPEED, storage="fp8")
    longest = (121, 704, 1280)
    return [
        Row(variant="t2v-a14b", size=main, settings=both, resident=0),
        Row(variant="t2v-a14b", size=main, settings=LEAN, resident=0),
        Row(variant="i2v-a14b", size=main, settings=both, resident=0),
        Row(variant="i2v-a14b", size=main, settings=LEAN, resident=0),
        Row(variant="ti2v-5b", size=longest, settings=FULL_SPEED, resident=0),
        Row(variant="ti2v-5b", size=longest, settings=LEAN, resident=0),
        Row(variant="t2v-a14b", size=main, settings=FINE_TUNED, resident=0),
        Row(variant="t2v-a14b", size=main, settings=Settings()),
        Row(variant="t2v-a14b", size=main, settings=Settings(offload_inputs=True), resident=0),
        Row(variant="t2v-a14b", size=main, settings=FULL_SPEED, resident=20),
        Row(variant="t2v-a14b", size=main, settings=fp8, resident=0),
        *(Row(variant="t2v-a14b", size=size, settings=FULL_SPEED, resident=0) for size in SIZES),
        *(Row(variant="t2v-a14b", size=size, settings=LEAN, resident=0) for size in SIZES[:1]),
        Row(variant="t2v-a14b", size=SIZES[3], settings=LEAN, resident=0),
        Row(variant="t2v-a14b", size=main, settings=Settings(), resident=0),
        Row(variant="ti2v-5b", size=longest, settings=Settings()),
        Row(variant="ti2v-5b", size=main, settings=FULL_SPEED, resident=0),
    ]


def figure_of(results: Sequence[Result]) -> Figure:
    """The counted figures beside those of the plan."""
    values: list[Value] = []
    for r in results:
        case = as_case(variant=r.variant, size=r.size, tokens=r.tokens, settings=r.what)
        for measure, counted_bytes, planned_bytes in (
            ("device peak", r.peak, r.planned),
            ("to the device per step", r.to_device, r.planned_to_device),
            ("to the host per step", r.to_host, r.planned_to_host),
        ):
            values.append(
                Value(
                    case=case,
                    measure=measure,
                    unit="GB",
                    repeats=(counted_bytes / 1e9,),
                    expected=planned_bytes / 1e9,
                )
            )
    return measured_here(
        name="memory",
        title="Peak of device memory in a training step, at true size",
        measured=(
            "The live bytes of one training step, over tensors without values, so that it takes no "
            "accelerator: every storage is noted when it is created and when it is dropped, and "
            "rounded up as CUDA's allocator does. LoRA of rank 32 unless it says full fine-tuning. "
            "Weights, gradients, optimizer state and activations are in it; the driver's context "
            "and fragmentation are not."
        ),
        values=values,
        charts=[
            Chart(measure="device peak"),
            Chart(
                measure="to the device per step",
                title="Bytes that a training step copies to the device",
            ),
        ],
        arithmetic="plan",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, help="only so many of the rows, the first ones")
    add_output_options(parser)
    options = parser.parse_args()
    results: list[Result] = []
    for row in rows()[: options.rows]:
        results.append(measure(row))
        last = results[-1]
        print(
            f"{last.variant} {last.size}, {last.what}: {last.peak / 1e9:.2f} GB, plan "
            f"{last.planned / 1e9:.2f} ({last.difference:+.1%})",
            flush=True,
        )
        save(figure_of(results), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
