"""Batches: every clip once a pass, buckets apart, each expert on its own count, no memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from onewan.data.index import Clip
from onewan.data.loader import WanDataLoader


class Numbers:
    """Entries that tell where they come from."""

    prefetch = False

    def video(self, clip: Clip) -> dict[str, Tensor]:
        return {"latents": torch.full((4, (clip.frames - 1) // 4 + 1, 2, 2), float(clip.name))}

    def text(self, caption: str) -> Tensor:
        return torch.full((3, 8), float(caption))


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


def loader(
    batch_size: int = 2, accumulation: int = 1, source: Numbers | None = None
) -> WanDataLoader:
    return WanDataLoader(
        CLIPS, source or Numbers(), batch_size=batch_size, accumulation=accumulation, seed=7
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
        places = [b.offset + i for b in step.batches for i in range(len(b))]
        assert places == list(range(step.size))


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
    names = [b.names for b in loader().fixed(CLIPS, 4)]
    assert names == [("0",), ("2",), ("4",), ("6",)]
    assert len(loader().fixed(CLIPS, 99)) == 9 and loader().fixed(CLIPS, 0) == []
    assert all(float(b.text[0, 0, 0]) < 100 for b in loader().fixed(CLIPS, 9))  # first captions
