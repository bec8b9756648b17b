"""`WanDataLoader`: entries -> batches, in an order that is computed and never remembered.

Each expert goes through all clips on its own: its n-th micro-batch is a function of (seed, expert,
n). So there is no cursor to save, a resumed run goes on exactly where it was, and alternating
experts can't leave one of them with half the clips. Clips of one bucket (frames, size) share a
batch; what is left over at the end of a pass makes a smaller one, so each pass sees every clip.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onewan.data.encode import LatentSource
from onewan.data.index import Clip
from onewan.model.forward import first_frame_channels
from onewan.model.text import pad_text
from onewan.seeds import derive_seed
from onewan.variants import ExpertName


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Clips of one bucket, ready to be noised. Tensors are float32 where nothing else is said."""

    latents: Tensor
    """[B, C, F, h, w], normalised."""
    text: Tensor | None
    """[B, 512, dim], zero-padded, in the text encoder's dtype. None where the step encodes the
    captions itself, because embeddings train."""
    captions: tuple[str, ...]
    """What `text` is of."""
    condition: Tensor | None
    """[B, 20, F, h, w]: mask and latents of the first frame (I2V-A14B)."""
    mask: Tensor | None
    """[B, 1, F, h, w] from 0 to 1: how much of each place counts. Ones for a clip without a mask,
    None when none of the batch has one."""
    loss_weight: Tensor
    """[B]: what each clip's loss is multiplied with."""
    is_prior: Tensor | None
    """[B] bool: which clips teach what the untrained model makes of them. None if none does."""
    names: tuple[str, ...]
    offset: int
    """Index of its first clip within the step's global batch, which keys its randomness."""

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            latents=self.latents.to(device, non_blocking=True),
            text=moved(self.text),
            condition=moved(self.condition),
            mask=moved(self.mask),
            loss_weight=self.loss_weight.to(device, non_blocking=True),
            is_prior=moved(self.is_prior),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one optimizer step trains on."""

    number: int
    """Counted from 0 over the whole run; with a clip's index in the step it keys randomness."""
    expert: ExpertName
    batches: tuple[Batch, ...]

    @property
    def size(self) -> int:
        return sum(len(b) for b in self.batches)


class WanDataLoader:
    """Batches of `clips` from `source`."""

    def __init__(
        self,
        clips: Sequence[Clip],
        source: LatentSource,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        caption_dropout: float = 0.0,
        encode_text_online: bool = False,
    ) -> None:
        """`caption_dropout` is the share of samples that train with an empty caption. With
        `encode_text_online` batches have captions and no `text`."""
        self._source = source
        self._batch_size = batch_size
        self._accumulation = accumulation
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._live_text = encode_text_online
        self._buckets: dict[tuple[int, tuple[int, int]], list[Clip]] = defaultdict(list)
        for clip in clips:
            self._buckets[clip.frames, clip.size] += [clip] * clip.repeats
        self._per_pass = sum(-(-len(b) // batch_size) for b in self._buckets.values())
        self._order: tuple[tuple[str, int], list[list[Clip]]] | None = None

    def steps(
        self, start: int, stop: int, turn: Callable[[int], tuple[ExpertName, int]]
    ) -> Iterator[Step]:
        """Steps `start` to `stop`-1. `turn(step)` tells the expert and how many it had before.

        While one step trains, the next is read in the background if the source allows it.
        """
        if not self._source.prefetch:
            yield from (self.step(n, *turn(n)) for n in range(start, stop))
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="onewan-data") as pool:
            ahead = pool.submit(self.step, start, *turn(start)) if start < stop else None
            for number in range(start, stop):
                assert ahead is not None
                step = ahead.result()
                if number + 1 < stop:
                    ahead = pool.submit(self.step, number + 1, *turn(number + 1))
                yield step

    def step(self, number: int, expert: ExpertName, before: int) -> Step:
        """The step `number` of the run, which is step `before` (from 0) of `expert`."""
        batches, offset = [], 0
        for micro in range(before * self._accumulation, (before + 1) * self._accumulation):
            clips = self._pass(expert, micro // self._per_pass)[micro % self._per_pass]
            captions = [
                self._caption(clip, expert, micro, place) for place, clip in enumerate(clips)
            ]
            batches.append(self._batch(clips, captions, offset))
            offset += len(clips)
        return Step(number=number, expert=expert, batches=tuple(batches))

    def fixed(self, clips: Sequence[Clip], count: int) -> list[Batch]:
        """`count` of `clips` (or all, if fewer), spread over them, one a batch; first captions."""
        count = min(count, len(clips))
        chosen = [clips[i * len(clips) // count] for i in range(count)]
        return [self._batch([clip], [clip.captions[0]], i) for i, clip in enumerate(chosen)]

    def _pass(self, expert: ExpertName, number: int) -> list[list[Clip]]:
        """All batches of one pass over the clips, shuffled within and among buckets."""
        if self._order is None or self._order[0] != (expert, number):
            batches = []
            for bucket, members in self._buckets.items():
                shuffled = list(members)
                self._random("order", expert, number, str(bucket)).shuffle(shuffled)
                batches += [
                    shuffled[i : i + self._batch_size]
                    for i in range(0, len(shuffled), self._batch_size)
                ]
            self._random("batches", expert, number).shuffle(batches)
            self._order = ((expert, number), batches)
        return self._order[1]

    def _caption(self, clip: Clip, expert: ExpertName, micro: int, place: int) -> str:
        if self._random("caption dropout", expert, micro, place).random() < self._caption_dropout:
            return ""
        return self._random("caption", expert, micro, place).choice(clip.captions)

    def _random(self, purpose: str, *counters: int | str) -> random.Random:
        return random.Random(derive_seed(self._seed, purpose, *counters))

    def _batch(self, clips: Sequence[Clip], captions: Sequence[str], offset: int) -> Batch:
        entries = [self._source.video(clip) for clip in clips]
        latents = torch.stack([entry["latents"] for entry in entries])
        condition, mask = None, None
        if "condition" in entries[0]:
            condition = first_frame_channels(torch.stack([e["condition"] for e in entries]))
        if any("mask" in entry for entry in entries):
            whole = torch.ones(1, *latents.shape[2:])
            mask = torch.stack([entry.get("mask", whole) for entry in entries])
        base = [clip.is_prior for clip in clips]
        return Batch(
            latents=latents,
            text=None
            if self._live_text
            else pad_text([self._source.text(caption) for caption in captions]),
            captions=tuple(captions),
            condition=condition,
            mask=mask,
            loss_weight=torch.tensor([clip.loss_weight for clip in clips]),
            is_prior=torch.tensor(base) if any(base) else None,
            names=tuple(clip.name for clip in clips),
            offset=offset,
        )
