"""Which process of a run does what: every clip of a step is in one part, and experts are divided
where they can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onewan.parallel.division import WHOLE, Part, divide
from onewan.variants import ExpertName

BOTH: tuple[ExpertName, ...] = ("high", "low")


@given(count=st.integers(0, 40), parts=st.integers(1, 9))
def test_parts_are_consecutive_and_equal_but_for_one(count: int, parts: int) -> None:
    ranges = [Part(number, parts).of(count) for number in range(parts)]
    assert [index for own in ranges for index in own] == list(range(count))
    sizes = [len(own) for own in ranges]
    assert max(sizes) - min(sizes) <= 1


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9), parts=st.integers(1, 9))
def test_every_clip_of_a_step_is_in_one_part(sizes: list[int], parts: int) -> None:
    taken = [
        (index, place)
        for number in range(parts)
        for index, within in Part(number, parts).of_batches(sizes)
        for place in within
    ]
    assert taken == [(index, place) for index, size in enumerate(sizes) for place in range(size)]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9), parts=st.integers(1, 9))
def test_batches_stay_whole_where_there_is_one_for_each_part(sizes: list[int], parts: int) -> None:
    own = [list(Part(number, parts).of_batches(sizes)) for number in range(parts)]
    if len(sizes) >= parts:
        assert all(own)
        assert all(within == range(sizes[index]) for part in own for index, within in part)
    elif sum(sizes) >= parts:
        assert all(own), "each has at least one clip"


def test_one_process_has_everything() -> None:
    division = divide(BOTH, 1)
    assert not division.side_by_side and str(division) == "one process"
    assert division.group_of(0).experts == BOTH
    assert division.group_of(0).part(0) == WHOLE


def test_processes_that_share_the_tokens_of_a_clip_follow_each_other() -> None:
    division = divide(BOTH, 8, sequence=2, weights="sharded")
    assert (division.parts, division.sequence) == (2, 2)
    low = division.group_of(6)
    assert low.ranks == (4, 5, 6, 7)
    assert [low.part(rank) for rank in low.ranks] == [Part(0, 2)] * 2 + [Part(1, 2)] * 2
    assert [low.tokens(rank) for rank in low.ranks] == [Part(0, 2), Part(1, 2)] * 2
    assert low.sharing_clips(5) == (4, 5) and low.sharing_clips(6) == (6, 7)
    assert str(division) == (
        "8 processes, both experts trained at the same time, 4 for each expert with a part of "
        "every step's clips, 2 of them share the tokens of a clip, the weights of blocks are "
        "sharded"
    )
    with pytest.raises(ValueError, match=r"4 processes for an expert .* groups of 3"):
        divide(BOTH, 8, sequence=3)


def test_weights_are_not_sharded_where_each_expert_has_one_process() -> None:
    assert not divide(BOTH, 2, weights="sharded").is_sharded
    assert divide(BOTH, 2, "together", weights="sharded").is_sharded


@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_two_experts_are_trained_side_by_side(ranks: int) -> None:
    division = divide(BOTH, ranks)
    high, low = division.groups
    assert (high.experts, low.experts) == (("high",), ("low",))
    assert [*high.ranks, *low.ranks] == list(range(ranks)) and len(high.ranks) == len(low.ranks)
    assert (high.first, low.first) == (0, ranks // 2)
    assert division.group_of(ranks - 1) is low
    assert low.part(low.ranks[-1]) == Part(ranks // 2 - 1, ranks // 2)
    assert "both experts trained at the same time" in str(division)


@pytest.mark.parametrize(
    ("experts", "ranks", "shared", "reason"),
    [
        (("single",), 2, False, "one expert only"),
        (("low",), 4, False, "one expert only"),
        (BOTH, 3, False, "3 processes can't be divided"),
        (BOTH, 2, True, "the same embeddings"),
    ],
)
def test_what_prevents_side_by_side_is_said_if_it_was_asked_for(
    experts: tuple[ExpertName, ...], ranks: int, shared: bool, reason: str
) -> None:
    (group,) = divide(experts, ranks, shared=shared).groups
    assert group.experts == experts and group.ranks == tuple(range(ranks))
    with pytest.raises(ValueError, match=reason):
        divide(experts, ranks, "side_by_side", shared=shared)


def test_experts_are_trained_together_if_that_was_asked_for() -> None:
    division = divide(BOTH, 4, "together")
    assert len(division.groups) == 1
    assert str(division) == "4 processes, each with a part of every step's clips"
