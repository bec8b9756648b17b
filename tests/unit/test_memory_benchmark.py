"""Counted memory of training steps at true size: rows of the table in docs/performance.md against
the plan, and what the table relies on."""

from __future__ import annotations

import pytest
import simulated_gpu  # registers the device
from memory import FULL_SPEED, LEAN, Row, measure
from true_size import Settings, count_step

assert simulated_gpu

ROWS = (
    Row(variant="t2v-a14b", size=(81, 480, 832), settings=FULL_SPEED, resident=0),
    Row(variant="i2v-a14b", size=(81, 480, 832), settings=LEAN, resident=20),
    Row(variant="ti2v-5b", size=(121, 704, 1280), settings=Settings(offload_inputs=True)),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.variant)
def test_the_plan_is_within_5_percent_of_the_counted_bytes(row: Row) -> None:
    result = measure(row)
    assert result.planned == pytest.approx(result.peak, rel=0.05)
    assert result.planned_to_device == pytest.approx(result.to_device, rel=0.01)
    assert result.planned_to_host == pytest.approx(result.to_host, rel=0.01)


def test_each_block_adds_the_same_to_a_peak() -> None:
    def peaks(blocks: int) -> dict[str, int]:
        settings = Settings(
            offload_inputs=True, keep_attention="host", blocks=blocks, streamed_blocks=blocks
        )
        return count_step("t2v-a14b", 17, 256, 256, settings).peaks

    few, more, many = peaks(4), peaks(5), peaks(9)
    for part, peak in many.items():
        assert peak == pytest.approx(few[part] + 5 * (more[part] - few[part]), abs=50_000)
