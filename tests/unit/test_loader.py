"""Batches: every clip once per epoch, one bucket per batch, an order that is computed and not
stored; and the masks, weights and captions of their clips."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from support.clips import clip as make_clip
from torch import Tensor

from onewan.arithmetic.condition_shares import Given
from onewan.data.clip import Clip
from onewan.data.companions import Companion
from onewan.data.loader import Batch, StepBatches, WanDataLoader
from onewan.model.conditioning import conditioning_of
from onewan.variants import VARIANTS, ExpertName


class NumberedSource:
    """A `LatentSource` whose tensors contain the number that is the clip's name or caption."""

    workers = 0

    def video(self, clip: Clip, given: Given) -> dict[str, Tensor]:
        del given
        frames = (clip.frames - 1) // 4 + 1
        entry = {"latents": torch.full((4, frames, 2, 2), float(clip.name))}
        if clip.mask:
            entry["mask"] = torch.full((1, frames, 2, 2), float(clip.name) / 16)
        return entry

    def text(self, caption: str) -> Tensor:
        return torch.full((3, 8), float(caption or EMPTY))


EMPTY = -1.0
"""The number in the text of an empty caption."""


class SourceWithWorkers(NumberedSource):
    def __init__(self, workers: int) -> None:
        self.workers = workers


def clip(number: int, frames: int = 5, repeats: int = 1) -> Clip:
    captions = (str(number), str(100 + number))
    return make_clip(str(number), captions=captions, frames=frames, repeats=repeats)


CLIPS = (
    [clip(n) for n in range(5)] + [clip(n, frames=9) for n in range(5, 8)] + [clip(8, repeats=3)]
)


TEXT_ONLY = conditioning_of(VARIANTS["t2v-a14b"])


def both(clips: Sequence[Clip]) -> dict[ExpertName, Sequence[Clip]]:
    """The same clips for both experts."""
    return {"high": clips, "low": clips}


def loader(
    batch_size: int = 2, accumulation: int = 1, source: NumberedSource | None = None
) -> WanDataLoader:
    return WanDataLoader(
        both(CLIPS),
        source or NumberedSource(),
        TEXT_ONLY,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=7,
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_epoch_has_every_clip_and_the_samples_of_a_step_are_numbered(
    accumulation: int,
) -> None:
    data = loader(accumulation=accumulation)
    # 8 clips of 5 frames (one of them three times) and 3 of 9: 4 and 2 batches per epoch.
    steps = [data.step(n, "high", n) for n in range(6)]
    batches = [b for step in steps for b in step.batches][:6]
    seen = Counter(name for b in batches for name in b.names)
    assert seen == {**{str(n): 1 for n in range(8)}, "8": 3}
    assert sorted(len(b) for b in batches) == [1, 2, 2, 2, 2, 2]
    for step in steps:
        indices = [index for b in step.batches for index in b.sample_indices]
        assert indices == list(range(step.global_size))


def test_of_alternatives_each_epoch_has_one_and_all_come_in_turn() -> None:
    spans = [replace(clip(n, repeats=2), take=n - 20, takes=3) for n in (20, 21, 22)]
    data = WanDataLoader(
        both([clip(1), *spans, clip(2)]),
        NumberedSource(),
        TEXT_ONLY,
        batch_size=2,
        accumulation=1,
        seed=7,
    )
    # 2 clips, and twice one of the three spans: a short batch never comes.
    assert data.batches_per_epoch == {"high": 2, "low": 2}
    epochs = [
        [
            name
            for n in (2 * epoch, 2 * epoch + 1)
            for name in data.step(n, "high", n).batches[0].names
        ]
        for epoch in range(30)
    ]
    turns = [[name for name in epoch if int(name) >= 20] for epoch in epochs]
    assert all(Counter(epoch) >= Counter(["1", "2"]) and len(epoch) == 4 for epoch in epochs)
    assert all(len(turn) == 2 for turn in turns)
    # In three epochs each span comes twice, in an order that differs.
    for start in range(0, 30, 3):
        assert Counter(chain(*turns[start : start + 3])) == {"20": 2, "21": 2, "22": 2}
    assert len({tuple(chain(*turns[k : k + 3])) for k in range(0, 30, 3)}) > 3
    again = WanDataLoader(
        both([*spans, clip(2), clip(1)]),
        NumberedSource(),
        TEXT_ONLY,
        batch_size=2,
        accumulation=1,
        seed=7,
    )
    names = {name for n in (58, 59) for name in again.step(n, "high", n).batches[0].names}
    assert names == set(epochs[29])  # other clips in the list have no influence on the spans


def test_a_batch_has_clips_of_one_bucket_and_their_own_captions() -> None:
    data = loader()
    for n in range(12):
        (batch,) = data.step(n, "low", n).batches
        assert batch.latents.shape[2:] in {(2, 2, 2), (3, 2, 2)}
        assert batch.text.shape == (len(batch), 512, 8)
        for i, name in enumerate(batch.names):
            assert float(batch.latents[i, 0, 0, 0, 0]) == float(name)
            assert float(batch.text[i, 0, 0]) in {float(name), 100 + float(name)}
            assert batch.text[i, 3:].count_nonzero() == 0


def test_the_order_is_a_function_of_seed_expert_and_step() -> None:
    forward = [loader().step(n, "high", n).batches[0].names for n in range(20)]
    backward = [loader().step(n, "high", n).batches[0].names for n in reversed(range(20))]
    assert forward == backward[::-1]
    one = loader()  # going back and forth between epochs changes nothing
    assert [one.step(n, "high", n).batches[0].names for n in (13, 2, 19)] == [
        forward[n] for n in (13, 2, 19)
    ]
    assert forward[:6] != forward[6:12]
    low = [loader().step(n, "low", n).batches[0].names for n in range(20)]
    assert low != forward
    # The order depends on the number of the expert's step, not on that of the run's.
    assert loader().step(99, "high", 4).batches[0].names == forward[4]


def test_an_epoch_is_shuffled_once_per_expert_however_often_they_alternate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shuffled = list[tuple[object, ...]]()
    draw = WanDataLoader._random

    def counting(self: WanDataLoader, purpose: str, *counters: int | str) -> random.Random:
        if purpose == "batches":
            shuffled.append(counters)
        return draw(self, purpose, *counters)

    monkeypatch.setattr(WanDataLoader, "_random", counting)
    one = loader()
    for n in range(12):  # two epochs of each expert
        for expert in ("high", "low"):
            assert one.step(n, expert, n).batches[0].names == (
                loader().step(n, expert, n).batches[0].names
            )
    fresh = 24  # one for each of the loaders that are made for comparison
    assert len(shuffled) == fresh + 4


def test_every_caption_is_drawn() -> None:
    data = loader()
    seen = {
        float(batch.text[i, 0, 0])
        for n in range(60)
        for batch in data.step(n, "high", n).batches
        for i in range(len(batch))
    }
    assert seen == {float(n) for n in range(9)} | {100.0 + n for n in range(9)}


def contents(step: StepBatches) -> list[object]:
    """All that a step is made of, as values that can be compared."""
    return [
        step.number,
        step.expert,
        step.global_size,
        [(b.names, b.captions, b.latents.tolist(), b.first_sample_index) for b in step.batches],
    ]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_each_expert_goes_through_its_own_clips_from_any_step_on(workers: int) -> None:
    """The order of an expert is that of a loader of its clips alone, for any workers."""

    def expert_at(step: int) -> tuple[ExpertName, int]:
        return ("low", step - step // 3 - 1) if step % 3 else ("high", step // 3)

    def data(clips: Mapping[ExpertName, Sequence[Clip]]) -> WanDataLoader:
        source = SourceWithWorkers(workers)
        return WanDataLoader(clips, source, TEXT_ONLY, batch_size=2, accumulation=1, seed=7)

    own: dict[ExpertName, Sequence[Clip]] = {"high": CLIPS[:3], "low": CLIPS[2:]}
    both_experts = data(own)
    assert both_experts.batches_per_epoch == {"high": 2, "low": 5}
    steps = [contents(step) for step in both_experts.steps(0, 16, expert_at)]
    for start in (1, 7, 15):
        again = data(own).steps(start, 16, expert_at)
        assert [contents(step) for step in again] == steps[start:]
    for expert, clips in own.items():
        alone = data({expert: clips})
        names = {clip.name for clip in clips}
        for number in range(16):
            if expert_at(number)[0] == expert:
                step = alone.step(number, *expert_at(number))
                assert contents(step) == steps[number]
                assert names.issuperset(name for batch in step.batches for name in batch.names)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [1, 4])
def test_steps_are_the_same_with_any_workers_and_from_any_step_on(
    workers: int, accumulation: int
) -> None:
    def expert_at(step: int) -> tuple[ExpertName, int]:
        return ("high" if step % 2 == 0 else "low"), step // 2

    def steps(workers: int, start: int, stop: int) -> list[list[object]]:
        data = loader(accumulation=accumulation, source=SourceWithWorkers(workers))
        return [contents(step) for step in data.steps(start, stop, expert_at)]

    in_turn = steps(0, 0, 14)  # more than an epoch of each expert
    assert [step[0] for step in in_turn] == list(range(14))
    for start in range(14):
        assert steps(workers, start, 14) == in_turn[start:]
    assert steps(workers, 5, 5) == []


def test_validation_batches_are_spread_over_the_clips_with_first_captions() -> None:
    names = [b.names for b in loader().validation_batches(CLIPS, 4)]
    assert names == [("0",), ("2",), ("4",), ("6",)]
    assert len(loader().validation_batches(CLIPS, 99)) == 9
    assert loader().validation_batches(CLIPS, 0) == []
    # The first caption of each clip has the clip's own number, below 100.
    assert all(float(b.text[0, 0, 0]) < 100 for b in loader().validation_batches(CLIPS, 9))


def test_validation_batches_are_the_same_each_time() -> None:
    """For any clips, in the order given, whatever was drawn before and whatever is trained on."""
    held_out = [clip(n, frames=9) for n in (20, 3, 11, 7, 15)]
    data = WanDataLoader(
        both(CLIPS),
        NumberedSource(),
        TEXT_ONLY,
        batch_size=2,
        accumulation=1,
        seed=7,
        caption_dropout=1.0,
    )
    first = data.validation_batches(held_out, 3)
    data.step(4, "high", 4)
    again, elsewhere = (
        data.validation_batches(held_out, 3),
        loader(batch_size=1).validation_batches(held_out, 3),
    )
    for batches in (first, again, elsewhere):
        assert [(b.names, b.captions, b.first_sample_index) for b in batches] == [
            (("20",), ("20",), 0),
            (("3",), ("3",), 1),
            (("7",), ("7",), 2),
        ]
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, batches, strict=True))
    assert data.validation_batches([], 3) == []


# --- Masks, weights and targets ------------------------------------------------------------------


def batch_of(clips: Sequence[Clip], **settings: bool | float) -> Batch:
    """All of `clips` in one batch; checks that `Batch.to` keeps everything."""
    data = WanDataLoader(
        both(clips),
        NumberedSource(),
        TEXT_ONLY,
        batch_size=len(clips),
        accumulation=1,
        seed=7,
        **settings,
    )
    batch = data.step(0, "high", 0).batches[0]
    assert len(batch) == len(clips)
    moved = batch.to(torch.device("cpu"))
    for field in Batch.__slots__:
        a, b = getattr(batch, field), getattr(moved, field)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert batch.to(torch.device("meta")).latents.is_meta
    return batch


def masked(number: int) -> Clip:
    return replace(clip(number), mask=Companion(path=Path("mask.png"), start=0.0, is_image=True))


def test_clips_without_a_mask_get_ones_beside_masked_clips() -> None:
    batch = batch_of([clip(1), masked(2), clip(3), masked(4)])
    assert batch.mask is not None and batch.mask.dtype == torch.float32
    assert batch.mask.shape == (4, 1, 2, 2, 2)
    expected = {"1": 1.0, "2": 2 / 16, "3": 1.0, "4": 4 / 16}
    for name, mask in zip(batch.names, batch.mask, strict=True):
        assert (mask == expected[name]).all(), name
    assert batch.to(torch.device("meta")).mask.is_meta
    assert batch_of([clip(1), clip(3)]).mask is None


def test_weights_and_targets_reach_the_batch() -> None:
    clips = [replace(clip(n), loss_weight=n / 2, is_prior=n % 2 == 0) for n in range(1, 6)]
    batch = batch_of(clips)
    assert batch.is_prior is not None and batch.is_prior.dtype == torch.bool
    assert batch.loss_weights == tuple(int(name) / 2 for name in batch.names)
    assert batch.is_prior.tolist() == [int(name) % 2 == 0 for name in batch.names]
    assert batch.to(torch.device("meta")).is_prior.is_meta
    # Weights are multiplied with float32 losses, so they have float32 values.
    (weight,) = batch_of([replace(clip(1), loss_weight=0.1)]).loss_weights
    assert weight == torch.tensor(0.1, dtype=torch.float32).item() != 0.1
    plain = batch_of([clip(1), clip(2)])
    assert plain.is_prior is None and plain.loss_weights == (1, 1)


def test_texts_with_the_class_word_reach_the_batch_with_weights_for_the_others() -> None:
    # Captions and texts are numbers here.
    kept = [replace(clip(n), class_captions=(str(200 + n), str(300 + n))) for n in (1, 2)]
    batch = batch_of([*kept, clip(3)])
    assert batch.preserved is not None
    texts = [float(text[0, 0]) for text in batch.preserved.text]
    expected = {"1": {201.0, 301.0}, "2": {202.0, 302.0}, "3": {3.0, 103.0}}
    assert all(text in expected[name] for name, text in zip(batch.names, texts, strict=True))
    assert batch.preserved.weights.tolist() == [float(name != "3") for name in batch.names]
    # The text is that of the caption which was drawn.
    drawn_captions = dict(zip(batch.names, batch.captions, strict=True))
    for name, text in zip(batch.names, texts, strict=True):
        assert name == "3" or (text > 300) == (float(drawn_captions[name]) > 100)
    assert batch.to(torch.device("meta")).preserved.text.is_meta
    assert batch_of([clip(1)]).preserved is None
    # A dropped caption has no trigger word.
    assert batch_of([replace(kept[0], caption_dropout=1.0)]).preserved is None


# --- Captions ------------------------------------------------------------------------------------


def drawn(
    dropout: float,
    *,
    expert: ExpertName = "high",
    seed: int = 7,
    epochs: int = 1,
    clips: Sequence[Clip] = tuple(clip(n) for n in range(50)),
    batch_size: int = 5,
) -> list[str]:
    """The captions of `epochs` epochs of `clips`, in the order of training."""
    data = WanDataLoader(
        both(clips),
        NumberedSource(),
        TEXT_ONLY,
        batch_size=batch_size,
        accumulation=1,
        seed=seed,
        caption_dropout=dropout,
    )
    out = []
    for n in range(epochs * len(clips) // batch_size):
        for batch in data.step(n, expert, n).batches:
            out += batch.captions
            assert batch.text is not None
            values = [float(text[0, 0]) for text in batch.text]
            assert values == [float(caption or EMPTY) for caption in batch.captions]
    return out


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_caption_dropout_drops_the_given_fraction(share: float) -> None:
    captions = drawn(share, epochs=60)  # 3000 draws
    dropped = captions.count("") / len(captions)
    assert dropped == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5)
    assert drawn(0.0, epochs=4).count("") == 0
    assert drawn(1.0, epochs=4).count("") == 200


def test_dropped_captions_are_a_function_of_seed_expert_and_sample() -> None:
    one = drawn(0.5)
    assert one == drawn(0.5)
    empty = [caption == "" for caption in one]
    assert empty != [caption == "" for caption in drawn(0.5, seed=8)]
    assert empty != [caption == "" for caption in drawn(0.5, expert="low")]
    assert empty[:25] != empty[25:]
    # The clips of one batch are drawn independently.
    assert any(0 < sum(empty[i : i + 5]) < 5 for i in range(0, 50, 5))
    # A clip that keeps its caption has the same one as without dropout.
    kept = [(a, b) for a, b in zip(one, drawn(0.0), strict=True) if a]
    assert kept and all(a == b for a, b in kept)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(3, 2), (2, 3), (1, 6)])
def test_captions_are_drawn_alike_in_any_division_of_a_step(
    batch_size: int, accumulation: int
) -> None:
    clips = [replace(clip(n), captions=tuple(map(str, range(10)))) for n in range(12)]

    def captions(batch_size: int, accumulation: int) -> list[list[str]]:
        """Those of each step, by the sample's index."""
        data = WanDataLoader(
            both(clips),
            NumberedSource(),
            TEXT_ONLY,
            batch_size=batch_size,
            accumulation=accumulation,
            seed=7,
            caption_dropout=0.3,
        )
        return [[c for b in data.step(n, "high", n).batches for c in b.captions] for n in range(8)]

    together = captions(6, 1)
    assert captions(batch_size, accumulation) == together
    assert len({tuple(step) for step in together}) == 8
    assert len(set(together[0])) > 2


def test_captions_that_are_kept_are_drawn_equally_often() -> None:
    """Since dropout and the choice are two draws."""
    clips = [replace(clip(n), captions=("1", "2", "3")) for n in range(50)]
    captions = [caption for caption in drawn(0.5, epochs=60, clips=clips) if caption]
    for each in ("1", "2", "3"):
        assert captions.count(each) / len(captions) == pytest.approx(1 / 3, abs=0.06)


def test_batches_have_no_text_if_the_training_step_encodes_it() -> None:
    """Where embeddings are trained: the batch has the captions and no text."""
    clips = [clip(n) for n in range(6)]
    batch = batch_of(clips, encode_text_online=True, caption_dropout=0.5)
    assert batch.text is None
    usual = batch_of(clips, caption_dropout=0.5)
    assert usual.text is not None and usual.captions == batch.captions
    assert "" in batch.captions and any(batch.captions)


def test_a_clip_may_have_a_caption_dropout_of_its_own() -> None:
    always, never = (replace(clip(n), caption_dropout=share) for n, share in ((1, 1.0), (2, 0.0)))
    captions = drawn(0.5, epochs=200, clips=[always, never, clip(3)], batch_size=3)
    assert not {"1", "101"} & set(captions)
    assert captions.count("2") + captions.count("102") == 200
    own = captions.count("3") + captions.count("103")
    assert own / 200 == pytest.approx(0.5, abs=0.15)
