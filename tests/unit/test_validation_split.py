"""Validation clips are chosen by content and seed, copies together, and never all clips."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from support.clips import clip

from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS, ClipTimesteps
from onewan.data.validation_split import exclude_validation_clips, split_validation_clips

CLIPS = tuple(clip(f"{n:02}") for n in range(20))
CONTENT = {each.path: f"digest of {each.name}" for each in CLIPS}


def held(clips=CLIPS, share: float = 0.25, seed: int = 7, content=CONTENT) -> set[str]:
    """The content that is held out; checks that the other clips remain, in the order given."""
    training, held_out = split_validation_clips(clips, share, seed, content)
    out = {content[each.path] for each in held_out}
    assert len(out) == len(held_out)
    assert training == tuple(each for each in clips if content[each.path] not in out)
    assert held_out == tuple(each for each in clips if each in held_out)
    return out


def test_the_share_is_rounded_and_at_least_one() -> None:
    for share, number in ((0.25, 5), (0.07, 1), (0.12, 2), (0.13, 3), (0.001, 1), (0.999, 19)):
        assert len(held(share=share)) == number
    assert split_validation_clips(CLIPS, 0, 7, CONTENT) == (CLIPS, ())


def test_the_choice_depends_on_the_seed_and_prefers_no_clip() -> None:
    assert held(seed=1) == held(seed=1)
    assert len({frozenset(held(seed=seed)) for seed in range(10)}) == 10
    every = [held(seed=seed) for seed in range(200)]
    for digest in CONTENT.values():  # none is preferred: 50 of 200 are expected
        assert 28 < sum(digest in each for each in every) < 76


def test_the_choice_for_a_seed_never_changes() -> None:
    """A resumed run must hold out the same clips, with a later version too."""
    assert held(seed=7) == {f"digest of {n}" for n in ("00", "01", "07", "11", "15")}


def test_names_and_order_do_not_matter() -> None:
    shuffled = random.Random(3).sample(CLIPS, len(CLIPS))
    assert held(shuffled) == held()
    renamed = [
        replace(each, path=Path(f"x/{i}"), name=f"x/{i}") for i, each in enumerate(CLIPS[::-1])
    ]
    content = {new.path: CONTENT[old.path] for new, old in zip(renamed, CLIPS[::-1], strict=True)}
    assert held(renamed, content=content) == held()


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_adding_or_removing_a_file_moves_at_most_one_other(share: float) -> None:
    before = held(share=share)
    for extra in range(30):
        new = clip(f"new {extra}")
        content = CONTENT | {new.path: f"new {extra}"}
        after = held((*CLIPS, new), share=share, content=content)
        assert len((before ^ after) - {content[new.path]}) <= 1
    for gone in CLIPS:
        after = held([each for each in CLIPS if each != gone], share=share)
        assert len((before ^ after) - {CONTENT[gone.path]}) <= 1


def test_no_kind_of_timesteps_is_held_out_altogether() -> None:
    """Else an expert would have no clip. The draw of the others stays as it is."""
    for rare in held(seed=7):
        kinds = {True: ClipTimesteps(t_min=0.9), False: ALL_TIMESTEPS}
        clips = [replace(each, timesteps=kinds[CONTENT[each.path] == rare]) for each in CLIPS]
        out = held(clips)
        assert out > held() - {rare} and rare not in out and len(out) == 5
    # Of two such files one may be held out.
    clips = [
        replace(each, timesteps=ClipTimesteps(t_max=0.5 if n < 2 else 1.0))
        for n, each in enumerate(CLIPS)
    ]
    assert len({"digest of 00", "digest of 01"} & held(clips)) == 1


def test_copies_stay_together() -> None:
    copies = [clip(f"copy of {each.name}", captions=("another",)) for each in CLIPS]
    content = CONTENT | {
        copy.path: CONTENT[each.path] for copy, each in zip(copies, CLIPS, strict=True)
    }
    # Copies do not change the choice, and the first clip of each content is validated on.
    assert held((*CLIPS, *copies), content=content) == held()
    _, held_out = split_validation_clips((*CLIPS, *copies), 0.25, 7, content)
    assert set(held_out) <= set(CLIPS)
    _, held_out = split_validation_clips((*copies, *CLIPS), 0.25, 7, content)
    assert set(held_out) <= set(copies)
    # The same file in two sources: equal clips.
    training, held_out = split_validation_clips((*CLIPS, *CLIPS), 0.25, 7, CONTENT)
    assert (len(training), len(held_out)) == (30, 5) and set(training).isdisjoint(held_out)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_one_file_always_remains_for_training(share: float) -> None:
    assert split_validation_clips(CLIPS[:1], share, 7, CONTENT) == (CLIPS[:1], ())
    assert split_validation_clips((), share, 7, CONTENT) == ((), ())
    assert split_validation_clips(CLIPS[:1] * 3, share, 7, CONTENT) == (CLIPS[:1] * 3, ())
    assert len(held(CLIPS[:2], share=share)) == 1


@pytest.mark.parametrize("share", [0.1, 0.25, 0.999])
def test_prior_preservation_clips_are_not_chosen(share: float) -> None:
    base = tuple(clip(f"base {n}", is_prior=True) for n in range(40))
    content = CONTENT | {each.path: each.name for each in base}
    # The same clips are held out as without them.
    assert held((*base, *CLIPS), share=share, content=content) == held(share=share)
    assert split_validation_clips((*base, *CLIPS[:1]), share, 7, content) == (
        (*base, *CLIPS[:1]),
        (),
    )
    assert split_validation_clips(base, share, 7, content) == (base, ())


def test_a_held_out_clip_is_no_prior_preservation_clip_either() -> None:
    base = tuple(replace(each, name=f"base {each.name}", is_prior=True) for each in CLIPS)
    training, held_out = split_validation_clips((*base, *CLIPS), 0.25, 7, CONTENT)
    assert held_out and not {c.path for c in training} & {c.path for c in held_out}
    assert not any(each.is_prior for each in held_out)


def test_a_file_of_both_sources_is_excluded_from_training_and_reported() -> None:
    copy, other = clip("val/copy"), clip("val/other")
    content = CONTENT | {copy.path: CONTENT[CLIPS[3].path], other.path: "other"}
    left, problems = exclude_validation_clips((*CLIPS, CLIPS[3]), (other, copy), content)
    assert left == [each for each in CLIPS if each != CLIPS[3]]
    (problem,) = problems  # one problem, though the file is in two sources
    assert problem.path == CLIPS[3].path
    assert problem.reason == (
        "is in validation.sources too (as val/copy), so it is held out of training; remove it "
        "from one of them"
    )
    assert exclude_validation_clips(CLIPS, (other,), content) == (list(CLIPS), [])
    assert exclude_validation_clips(CLIPS, (), content) == (list(CLIPS), [])


@pytest.mark.parametrize(("files", "held_out"), [(1, 0), (19, 0), (20, 2), (40, 4)])
def test_without_a_fraction_a_tenth_of_twenty_files_or_more_is_held_out(
    files: int, held_out: int
) -> None:
    clips = tuple(clip(f"{number}.mp4") for number in range(files))
    content = {each.path: f"{number:040}" for number, each in enumerate(clips)}
    training, validation = split_validation_clips(clips, None, 7, content)
    assert (len(training), len(validation)) == (files - held_out, held_out)
    # Copies are no further clips.
    assert not split_validation_clips((clips[0],) * 40, None, 7, content)[1]
