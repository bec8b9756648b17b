"""Batches: every clip once a pass, buckets apart, each expert on its own count, no memory; and
what each clip's source, mask and captions say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from onewan.data.clip import Clip
from onewan.data.loader import Batch, WanDataLoader
from onewan.data.masks import Mask
from onewan.model.conditioning import conditioning_of
from onewan.variants import VARIANTS, ExpertName


class Numbers:
    """Entries that tell where they come from."""

    prefetch = False

    def video(self, clip: Clip) -> dict[str, Tensor]:
        frames = (clip.frames - 1) // 4 + 1
        entry = {"latents": torch.full((4, frames, 2, 2), float(clip.name))}
        if clip.mask:
            entry["mask"] = torch.full((1, frames, 2, 2), float(clip.name) / 16)
        return entry

    def text(self, caption: str) -> Tensor:
        return torch.full((3, 8), float(caption or EMPTY))


EMPTY = -1.0
"""What stands for the text of an empty caption."""


class InBackground(Numbers):
    prefetch = True


def clip(number: int, frames: int = 5, repeats: int = 1) -> Clip:
    return Clip(
        path=Path(str(number)),
        name=str(number),
        captions=(str(number), str(100 + number)),
        kind="video",
        start=0.0,
        fps=16.0,
        frames=frames,
        size=(64, 64),
        source_size=(64, 64),
        repeats=repeats,
    )


CLIPS = (
    [clip(n) for n in range(5)] + [clip(n, frames=9) for n in range(5, 8)] + [clip(8, repeats=3)]
)


TEXT_ONLY = conditioning_of(VARIANTS["t2v-a14b"])


def loader(
    batch_size: int = 2, accumulation: int = 1, source: Numbers | None = None
) -> WanDataLoader:
    return WanDataLoader(
        CLIPS,
        source or Numbers(),
        TEXT_ONLY,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=7,
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_pass_sees_every_clip(accumulation: int) -> None:
    data = loader(accumulation=accumulation)
    # 8 clips of 5 frames (one of them three times) and 3 of 9: 4 and 2 batches a pass.
    steps = [data.step(n, "high", n) for n in range(6)]
    batches = [b for step in steps for b in step.batches][:6]
    seen = Counter(name for b in batches for name in b.names)
    assert seen == {**{str(n): 1 for n in range(8)}, "8": 3}
    assert sorted(len(b) for b in batches) == [1, 2, 2, 2, 2, 2]
    for step in steps:
        indices = [index for b in step.batches for index in b.sample_indices]
        assert indices == list(range(step.global_size))


def test_batches_hold_one_bucket_and_matching_parts() -> None:
    data = loader()
    for n in range(12):
        (batch,) = data.step(n, "low", n).batches
        assert batch.latents.shape[2:] in {(2, 2, 2), (3, 2, 2)}
        assert batch.text.shape == (len(batch), 512, 8)
        for i, name in enumerate(batch.names):
            assert float(batch.latents[i, 0, 0, 0, 0]) == float(name)
            assert float(batch.text[i, 0, 0]) in {float(name), 100 + float(name)}
            assert batch.text[i, 3:].count_nonzero() == 0


def test_order_is_a_function_of_seed_expert_and_count() -> None:
    forward = [loader().step(n, "high", n).batches[0].names for n in range(20)]
    backward = [loader().step(n, "high", n).batches[0].names for n in reversed(range(20))]
    assert forward == backward[::-1]
    one = loader()  # going back and forth between passes changes nothing
    assert [one.step(n, "high", n).batches[0].names for n in (13, 2, 19)] == [
        forward[n] for n in (13, 2, 19)
    ]
    assert forward[:6] != forward[6:12]
    low = [loader().step(n, "low", n).batches[0].names for n in range(20)]
    assert low != forward
    # The expert's own count decides, not the step of the run.
    assert loader().step(99, "high", 4).batches[0].names == forward[4]


def test_all_captions_come() -> None:
    data = loader()
    heard = {
        float(batch.text[i, 0, 0])
        for n in range(60)
        for batch in data.step(n, "high", n).batches
        for i in range(len(batch))
    }
    assert heard == {float(n) for n in range(9)} | {100.0 + n for n in range(9)}


def test_reading_ahead_changes_nothing() -> None:
    def turn(step: int):
        return ("high", step // 2) if step % 2 == 0 else ("low", step // 2)

    plain = list(loader().steps(3, 11, turn))
    ahead = list(loader(source=InBackground()).steps(3, 11, turn))
    assert [s.number for s in ahead] == list(range(3, 11)) == [s.number for s in plain]
    for a, b in zip(plain, ahead, strict=True):
        assert a.expert == b.expert
        assert [x.names for x in a.batches] == [x.names for x in b.batches]
        assert all(torch.equal(x.text, y.text) for x, y in zip(a.batches, b.batches, strict=True))
    assert list(loader(source=InBackground()).steps(5, 5, turn)) == []


def test_fixed_batches() -> None:
    names = [b.names for b in loader().validation_batches(CLIPS, 4)]
    assert names == [("0",), ("2",), ("4",), ("6",)]
    assert (
        len(loader().validation_batches(CLIPS, 99)) == 9
        and loader().validation_batches(CLIPS, 0) == []
    )
    assert all(
        float(b.text[0, 0, 0]) < 100 for b in loader().validation_batches(CLIPS, 9)
    )  # first captions


def test_fixed_batches_are_the_same_each_time() -> None:
    """Of any clips, in the order given, whatever was drawn before and whatever else trains."""
    held_out = [clip(n, frames=9) for n in (20, 3, 11, 7, 15)]
    data = WanDataLoader(
        CLIPS, Numbers(), TEXT_ONLY, batch_size=2, accumulation=1, seed=7, caption_dropout=1.0
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


# --- What is said of clips ------------------------------------------------------------------------


def of(clips: Sequence[Clip], **settings: bool | float) -> Batch:
    """All of `clips` in one batch, sorted by name; checks that `to` keeps everything."""
    data = WanDataLoader(
        clips, Numbers(), TEXT_ONLY, batch_size=len(clips), accumulation=1, seed=7, **settings
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
    return replace(clip(number), mask=Mask(path=Path("mask.png"), start=0.0))


def test_masked_and_unmasked_clips_in_a_batch() -> None:
    batch = of([clip(1), masked(2), clip(3), masked(4)])
    assert batch.mask is not None and batch.mask.dtype == torch.float32
    assert batch.mask.shape == (4, 1, 2, 2, 2)
    expected = {"1": 1.0, "2": 2 / 16, "3": 1.0, "4": 4 / 16}
    for name, mask in zip(batch.names, batch.mask, strict=True):
        assert (mask == expected[name]).all(), name
    assert batch.to(torch.device("meta")).mask.is_meta
    assert of([clip(1), clip(3)]).mask is None


def test_weights_and_targets_reach_the_batch() -> None:
    clips = [replace(clip(n), loss_weight=n / 2, is_prior=n % 2 == 0) for n in range(1, 6)]
    batch = of(clips)
    assert batch.is_prior is not None and batch.is_prior.dtype == torch.bool
    assert batch.loss_weights == tuple(int(name) / 2 for name in batch.names)
    assert batch.is_prior.tolist() == [int(name) % 2 == 0 for name in batch.names]
    assert batch.to(torch.device("meta")).is_prior.is_meta
    plain = of([clip(1), clip(2)])
    assert plain.is_prior is None and plain.loss_weights == (1, 1)


# --- Captions -------------------------------------------------------------------------------------


def drawn(
    dropout: float,
    *,
    expert: ExpertName = "high",
    seed: int = 7,
    passes: int = 1,
    clips: Sequence[Clip] = tuple(clip(n) for n in range(50)),
    batch_size: int = 5,
) -> list[str]:
    """The captions of so many passes over `clips`, in the order in which they train."""
    data = WanDataLoader(
        clips,
        Numbers(),
        TEXT_ONLY,
        batch_size=batch_size,
        accumulation=1,
        seed=seed,
        caption_dropout=dropout,
    )
    out = []
    for n in range(passes * len(clips) // batch_size):
        for batch in data.step(n, expert, n).batches:
            out += batch.captions
            assert batch.text is not None
            values = [float(text[0, 0]) for text in batch.text]
            assert values == [float(caption or EMPTY) for caption in batch.captions]
    return out


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_dropped_captions(share: float) -> None:
    captions = drawn(share, passes=60)  # 3000 draws
    dropped = captions.count("") / len(captions)
    assert dropped == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5)
    assert drawn(0.0, passes=4).count("") == 0
    assert drawn(1.0, passes=4).count("") == 200


def test_dropped_captions_are_a_function_of_the_seed_and_the_place() -> None:
    one = drawn(0.5)
    assert one == drawn(0.5)
    empty = [caption == "" for caption in one]
    assert empty != [caption == "" for caption in drawn(0.5, seed=8)]
    assert empty != [caption == "" for caption in drawn(0.5, expert="low")]
    assert empty[:25] != empty[25:]
    # Clips of one batch are drawn each for itself.
    assert any(0 < sum(empty[i : i + 5]) < 5 for i in range(0, 50, 5))
    # Whoever keeps a caption gets the one that it gets without dropout.
    kept = [(a, b) for a, b in zip(one, drawn(0.0), strict=True) if a]
    assert kept and all(a == b for a, b in kept)


def test_captions_that_are_kept_come_equally_often() -> None:
    """Dropping one and choosing one are draws of their own."""
    clips = [replace(clip(n), captions=("1", "2", "3")) for n in range(50)]
    captions = [caption for caption in drawn(0.5, passes=60, clips=clips) if caption]
    for each in ("1", "2", "3"):
        assert captions.count(each) / len(captions) == pytest.approx(1 / 3, abs=0.06)


def test_live_text() -> None:
    """Whoever trains embeddings encodes the captions: the batch has them, and no text."""
    clips = [clip(n) for n in range(6)]
    batch = of(clips, encode_text_online=True, caption_dropout=0.5)
    assert batch.text is None
    usual = of(clips, caption_dropout=0.5)
    assert usual.text is not None and usual.captions == batch.captions
    assert "" in batch.captions and any(batch.captions)
