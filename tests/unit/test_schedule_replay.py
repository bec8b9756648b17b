"""The replay of a schedule of copies: against hand-made timelines, and the predictions that
docs/performance.md makes from recorded schedules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from schedule_replay import Durations, Entry, hidden_share, replay, slowdown
from streaming import CARDS, SIZES, Recording, TinyRun, durations

# A block computes 2 s forward and 4 s backward; its weights arrive in 3 s, what it keeps in 1 s.
TIMES = Durations(forward=2.0, backward=4.0, load=3.0, kept=1.0)


def test_computations_wait_for_their_weights_and_copies_for_their_buffer() -> None:
    schedule = [
        Entry("load", 0, buffer=0),  # 0 to 3
        Entry("load", 1, buffer=1),  # 3 to 6
        Entry("use", 0, buffer=0),
        Entry("compute", 0),  # 3 to 5
        Entry("done", 0, buffer=0),
        Entry("load", 2, buffer=0),  # the buffer is free at 5, the bus at 6: 6 to 9
        Entry("use", 1, buffer=1),
        Entry("compute", 1),  # 6 to 8
        Entry("done", 1, buffer=1),
        Entry("use", 2, buffer=0),
        Entry("compute", 2, backward=True),  # 9 to 13
        Entry("done", 2, buffer=0),
        Entry("step"),
    ]
    assert replay(schedule, TIMES) == [13.0]


def test_kept_tensors_leave_beside_computations_and_return_before_they_are_needed() -> None:
    schedule = [
        Entry("compute", 0),  # 0 to 2
        Entry("leave", 0),  # 2 to 3
        Entry("compute", 1),  # 2 to 4
        Entry("drop", 0),  # left at 3 already
        Entry("fetch", 0),  # 4 to 5
        Entry("compute", 1, backward=True),  # 4 to 8
        Entry("take", 0),
        Entry("compute", 0, backward=True),  # 8 to 12
        Entry("step"),
    ]
    assert replay(schedule, TIMES) == [12.0]
    slow = Durations(forward=2.0, backward=4.0, load=3.0, kept=10.0)
    # The copy to the host ends at 12, the one back at 22; `drop` makes block 1's end wait for 12.
    assert replay(schedule, slow) == [26.0]


def test_copies_to_the_device_share_the_bus() -> None:
    schedule = [
        Entry("compute", 0),
        Entry("leave", 0),  # 2 to 3
        Entry("load", 1, buffer=0),  # 0 to 3
        Entry("fetch", 0),  # ready at 3, the bus is free at 3: 3 to 4
        Entry("take", 0),
        Entry("step"),
    ]
    assert replay(schedule, TIMES) == [4.0]


def test_a_copy_uses_the_first_gap_of_the_bus() -> None:
    schedule = [
        Entry("load", 0, buffer=0),  # 0 to 3
        Entry("use", 0, buffer=0),
        *[Entry("compute", 0)] * 3,  # 3 to 9
        Entry("done", 0, buffer=0),
        Entry("load", 1, buffer=0),  # 9 to 12
        Entry("leave", 0),  # the other direction: 9 to 10
        Entry("fetch", 0),  # 10 is within a load: 12 to 13
        Entry("take", 0),
        Entry("step"),
    ]
    assert replay(schedule, TIMES) == [13.0]


def test_slowdown_needs_a_step_behind_the_warm_up() -> None:
    with pytest.raises(ValueError, match="1 steps"):
        slowdown([Entry("compute", 0), Entry("step")], TIMES)


def test_the_share_of_copies_that_is_hidden() -> None:
    step = [
        Entry("load", 0, buffer=0),  # 0 to 3; in the second step 5 to 8
        Entry("use", 0, buffer=0),
        Entry("compute", 0),  # 3 to 5; 8 to 10
        Entry("done", 0, buffer=0),
        Entry("step"),
    ]
    assert hidden_share(step * 2, TIMES) == 0.0  # 3 s of copies, and 3 s longer
    other = [replace(entry, buffer=1) for entry in step]
    # The second step's load happens beside the first one's computation: 3 to 6.
    assert hidden_share([*step, *other], TIMES) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="nothing is copied"):
        hidden_share([Entry("compute", 0), Entry("step")] * 2, TIMES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def all_streamed(tiny: TinyRun) -> Recording:
    return tiny.record(resident=0, offload=True)


@pytest.fixture(scope="module")
def half_streamed(tiny: TinyRun) -> Recording:
    return tiny.record(resident=20, offload=True)


@pytest.fixture(scope="module")
def quarter_streamed(tiny: TinyRun) -> Recording:
    """With block inputs on the device too."""
    return tiny.record(resident=30, offload=False)


def test_a_step_loads_no_more_blocks_than_it_must(
    tiny: TinyRun, all_streamed: Recording, half_streamed: Recording
) -> None:
    changing = tiny.record(resident=20, offload=True, switches=True)
    assert (all_streamed.loads, half_streamed.loads, changing.loads) == (76, 36, 58)
    for recording in (all_streamed, half_streamed, changing):
        assert recording.loads == recording.least
        assert recording.bytes_to_device == recording.loads * recording.block_bytes
        assert recording.misses == 0
    assert all_streamed.losses[0] == half_streamed.losses[0] == changing.losses[0]


def test_block_inputs_leave_and_return_in_the_recorded_step(all_streamed: Recording) -> None:
    kinds = [entry.kind for entry in all_streamed.entries]
    # Those of the last block are still on the device when the backward pass takes them.
    assert (kinds.count("leave"), kinds.count("fetch")) == (3 * 40, 3 * 39)


def test_a_fetch_waits_for_the_first_part_of_the_block_behind_it() -> None:
    schedule = [
        Entry("compute", 0),  # 0 to 2
        Entry("leave", 0),
        Entry("compute", 1, backward=True, part="first"),  # 2 to 5
        Entry("fetch", 0),  # 5 to 7.5
        Entry("compute", 1, backward=True, part="rest"),  # 5 to 6
        Entry("take", 0),
        Entry("step"),
    ]
    times = Durations(forward=2.0, backward=4.0, load=3.0, kept=2.5, first=3.0)
    assert replay(schedule, times) == [7.5]


@pytest.mark.parametrize("size", [size for size, tokens in SIZES.items() if tokens > 9_000])
@pytest.mark.parametrize("card", ["RTX 3090", "RTX 4090", "RTX 5090", "H100"])
def test_streaming_is_free_at_the_sizes_of_videos(
    all_streamed: Recording, quarter_streamed: Recording, card: str, size: str
) -> None:
    chosen = next(c for c in CARDS if c.name == f"{card}, PCIe 4")
    # On an H100 30 blocks (21 of its 80 GB) and the inputs of smaller clips (12 GB) can stay.
    stays = card == "H100" and SIZES[size] < 20_000
    recording = quarter_streamed if stays else all_streamed
    assert slowdown(recording.entries, durations(chosen, SIZES[size], "bf16")) <= 1.02


def test_small_clips_in_fp8_on_a_card_of_24_gb(
    all_streamed: Recording, half_streamed: Recording
) -> None:
    card = next(c for c in CARDS if c.name == "RTX 4090, PCIe 4")
    small = durations(card, SIZES["17x256x256"], "fp8")
    # 20 resident blocks are 7 GB; LoRA, optimizer, ring and activations of this size are 4 GB.
    assert slowdown(half_streamed.entries, small) <= 1.15
    assert slowdown(all_streamed.entries, small) > 1.4  # so the test could fail


def test_the_table_replaces_what_is_between_its_markers(tmp_path: Path) -> None:
    from markers import replace_between

    document = tmp_path / "page.md"
    document.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n", encoding="utf-8")
    replace_between(document, "x", "new")
    replace_between(document, "x", "newer")
    assert document.read_text(encoding="utf-8") == (
        "a\n<!-- x: begin -->\nnewer\n<!-- x: end -->\nb\n"
    )
    with pytest.raises(ValueError, match="begin"):
        replace_between(document, "y", "new")
