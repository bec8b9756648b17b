"""Seeds are derived from the names of draws: equal names give equal seeds, others other seeds."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from onewan.seeds import derive_seed


def test_seeds_stay_the_same_in_every_version() -> None:
    # A run that is resumed with a later version has to draw what it would have drawn.
    assert derive_seed(42, "noise", 0, 0) == 8205565564997430678
    assert derive_seed(42, "order", 7) == 7220238296148075143
    assert derive_seed(0, "t") == 1781863655702469288


def test_seeds_of_different_draws_differ() -> None:
    names = list(product(range(3), ("noise", "t", "order"), range(20), range(20)))
    assert len({derive_seed(*name) for name in names}) == len(names)


def test_counters_with_the_same_digits_give_different_seeds() -> None:
    assert derive_seed(1, "t", 1, 11) != derive_seed(1, "t", 11, 1)
    assert derive_seed(1, "t", 11) != derive_seed(11, "t", 1)
    assert derive_seed(1, "t", 1, 1) != derive_seed(1, "t", 11)


@given(st.integers(min_value=0), st.text(), st.lists(st.integers() | st.text(), max_size=4))
def test_a_seed_fits_a_torch_generator_and_is_reproducible(
    run_seed: int, purpose: str, counters: list[int | str]
) -> None:
    seed = derive_seed(run_seed, purpose, *counters)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(run_seed, purpose, *counters)


def test_names_that_are_not_unicode_have_seeds_of_their_own() -> None:
    names = [b"caf\xe9".decode(errors="surrogateescape"), "caf\ud800", "caf?"]
    assert len({derive_seed(7, "span", name) for name in names}) == 3
