"""Memory of training steps at true size: what the project promises, by counts and by the plan, rows
of the table in docs/performance.md against the plan, and what the table relies on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import simulated_gpu  # registers the device
from fine_tuning import count_fine_tuning
from memory import FINE_TUNED, FULL_SPEED, LEAN, Row, config_of, describe, measure, planned
from true_size import Settings, count_step

from onewan.config.load import load_run
from onewan.memory.plan import Bucket, Machine, make_plan

pytestmark = pytest.mark.long

assert simulated_gpu

GB = 10**9
CLIP, LONGEST = (81, 480, 832), (121, 704, 1280)
BOTH = replace(FULL_SPEED, both_experts=True)
PROMISED = (
    (Row(variant="t2v-a14b", size=CLIP, settings=BOTH, resident=0), 17.0),
    (Row(variant="t2v-a14b", size=CLIP, settings=LEAN, resident=0), 13.0),
    (Row(variant="i2v-a14b", size=CLIP, settings=BOTH, resident=0), 17.2),
    (Row(variant="ti2v-5b", size=LONGEST, settings=FULL_SPEED, resident=0), 9.0),
    (Row(variant="t2v-a14b", size=CLIP, settings=FINE_TUNED, resident=0), 20.0),
)
"""Rows of LoRA rank 32 and of full fine-tuning with everything streamed, and the gigabytes that
they take at most. Lean runs park what belongs to the idle expert in host memory."""
OTHERS = (
    Row(variant="i2v-a14b", size=CLIP, settings=LEAN, resident=20),
    Row(variant="ti2v-5b", size=LONGEST, settings=Settings(offload_inputs=True)),
    Row(variant="t2v-a14b", size=(17, 256, 256), settings=LEAN, resident=0),
)


def name_of(value: object) -> str:
    """Of a case, for its identifier."""
    return f"{value.variant}-{describe(value)}" if isinstance(value, Row) else str(value)


@pytest.mark.parametrize(
    ("row", "promised"), [*PROMISED, *((row, None) for row in OTHERS)], ids=name_of
)
def test_the_plan_is_within_5_percent_of_the_counted_bytes_and_both_within_the_promise(
    row: Row, promised: float | None
) -> None:
    result = measure(row)
    if promised is not None:
        assert max(result.peak, result.planned) <= promised * GB
    assert result.planned == pytest.approx(result.peak, rel=0.05)
    assert result.planned_to_device == pytest.approx(result.to_device, rel=0.01)
    assert result.planned_to_host == pytest.approx(result.to_host, rel=0.01)


def test_fine_tuning_an_expert_takes_20_gb_of_the_device_and_100_gb_of_the_host(
    tmp_path: Path,
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: model, variant: t2v-a14b, experts: low}\n"
        "method: {kind: fine_tune, fused_step: true}\n"
        "train: {max_grad_norm: null}\n"
        "optimizer: {name: adamw_8bit}\n"
        "memory: {resident_blocks: 0}\n",
        encoding="utf-8",
    )
    machine = Machine(name="any", vram=24 * GB, ram=110 * GB, flops=1e14, bus=25e9)
    bucket = Bucket(frames=CLIP[0], height=CLIP[1], width=CLIP[2])
    plan = make_plan(load_run(file), [bucket], machine, advice=False)
    assert plan.fits
    assert plan.worst.training.device_bytes <= 20 * GB
    assert plan.host_peak.host_bytes < 100 * GB


def test_the_updates_of_a_small_clip_are_in_the_plan() -> None:
    # Activations are small there, and the peak is the update of the largest weight.
    row = Row(variant="t2v-a14b", size=(17, 256, 256), settings=FINE_TUNED, resident=0)
    peaks = count_fine_tuning(config_of(row), row.size, blocks=3).peaks
    assert planned(row).training.device_bytes == pytest.approx(max(peaks.values()), rel=0.05)


def test_each_block_adds_the_same_to_a_peak() -> None:
    def peaks(blocks: int) -> dict[str, int]:
        settings = Settings(
            offload_inputs=True, keep_attention="host", blocks=blocks, streamed_blocks=blocks
        )
        return count_step("t2v-a14b", 17, 256, 256, settings).peaks

    few, more, many = peaks(4), peaks(5), peaks(9)
    for part, peak in many.items():
        assert peak == pytest.approx(few[part] + 5 * (more[part] - few[part]), abs=50_000)
