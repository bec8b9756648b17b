"""`WanDataLoader`: encoded clips -> batches, in an order that is computed and never stored.

Each expert iterates over its clips on its own: its n-th micro-batch is a function of (seed, expert,
n). So a checkpoint needs no data position, a resumed run continues with the very next batch, and
alternating experts can't leave one of them with half of the clips. A batch holds clips of one
bucket (frames, size); the last batch of a bucket may be smaller, so each epoch has every clip.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from onewan.arithmetic.clip_timesteps import ClipTimesteps
from onewan.arithmetic.condition_shares import Given
from onewan.data.ahead import results_ahead
from onewan.data.clip import Clip, alternatives
from onewan.data.encode import LatentSource
from onewan.data.expert_clips import batches_per_epoch
from onewan.model.conditioning import Conditioning, ConditionPart
from onewan.model.inputs import to_device
from onewan.model.text import pad_text
from onewan.parallel.division import WHOLE, Part
from onewan.seeds import derive_seed
from onewan.variants import ExpertName


@dataclass(frozen=True, slots=True, kw_only=True)
class PreservedTexts:
    """The texts of a batch for which the base model's prediction is kept: its captions with the
    class word in place of the trigger word."""

    text: Tensor
    """[B, 512, dim], as `Batch.text`."""
    weights: Tensor
    """[B] float32: 1 where there is such a text, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Clips of one bucket, before noise is added. Tensors are float32 unless stated otherwise."""

    latents: Tensor
    """[B, C, F, h, w], normalized."""
    text: Tensor | None
    """[B, 512, dim], zero-padded, in the text encoder's dtype. None if the training step encodes
    the captions itself, because embeddings are trained."""
    captions: tuple[str, ...]
    """The captions that `text` encodes."""
    condition: Tensor | None
    """[B, K, F, h, w]: further input channels (`Conditioning.channels`), None if there are none."""
    reference: Tensor | None = None
    """[B, C, h, w]: latents of the clips' reference images, zeros for a clip without one. None if
    no clip of the batch has one."""
    mask: Tensor | None
    """[B, 1, F, h, w]: the loss mask, from 0 to 1 per latent cell. Ones for a clip without a mask,
    None if no clip of the batch has one."""
    loss_weights: tuple[float, ...]
    """B factors of the clips' losses, float32 values. On the host, where they are combined with the
    weights of the timesteps without waiting for the device."""
    timesteps: tuple[ClipTimesteps, ...]
    """B: those that each clip is trained at."""
    is_prior: Tensor | None
    """[B] bool: the clips whose target is the base model's prediction. None if there are none."""
    names: tuple[str, ...]
    given: tuple[Given, ...]
    """The frames of its clip that each sample is given."""
    last_frame: Tensor | None
    """[B, C, h, w]: the last frames that are given, of variants whose latent frames may be clean;
    zeros for a sample that is not given it. None if no sample is."""
    preserved: PreservedTexts | None = None
    """None if there are none."""
    first_sample_index: int
    """Index of the first clip within the step's global batch; see `sample_indices`."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sample_indices(self) -> range:
        """Indices of the clips within the step's global batch, which key their random draws: a clip
        gets the same noise in any division of the global batch into micro-batches and ranks."""
        return range(self.first_sample_index, self.first_sample_index + len(self))

    def to(self, device: torch.device) -> Batch:
        """This batch with its tensors on `device`; the host does not wait for the copies."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else to_device(tensor, device)

        return replace(
            self,
            latents=to_device(self.latents, device),
            text=moved(self.text),
            condition=moved(self.condition),
            reference=moved(self.reference),
            last_frame=moved(self.last_frame),
            mask=moved(self.mask),
            is_prior=moved(self.is_prior),
            preserved=self.preserved
            and PreservedTexts(
                text=to_device(self.preserved.text, device),
                weights=to_device(self.preserved.weights, device),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatches:
    """The data of one optimizer step: this rank's part of the global batch.

    The global batch is what all micro-batches of all ranks hold together. A single process is rank
    0 of 1, and its `batches` are the global batch.
    """

    number: int
    """The optimizer step, counted from 0 over the whole run; it keys random draws."""
    expert: ExpertName
    batches: tuple[Batch, ...]
    """This rank's part of the micro-batches, or one of them if the caller passes them one at a
    time. Empty for a rank of a step that has fewer clips than ranks."""
    global_size: int
    """Number of clips in the global batch, over which the loss is a mean."""


_Bucket: TypeAlias = "tuple[int, tuple[int, int]]"
"""Frames and size of clips."""


class _Member(NamedTuple):
    """A place in each epoch."""

    clips: tuple[Clip, ...]
    """The alternatives for it."""
    repeat: int
    """Its number among the repeats of these alternatives."""


def _buckets(clips: Iterable[Clip]) -> dict[_Bucket, list[_Member]]:
    """The places in each epoch of `clips`, by bucket."""
    buckets: dict[_Bucket, list[_Member]] = defaultdict(list)
    for group in alternatives(clips):
        # By the exact shape, since the latents of a batch are stacked.
        bucket = buckets[group[0].frames, group[0].size]
        bucket += [_Member(group, repeat) for repeat in range(group[0].repeats)]
    return buckets


class WanDataLoader:
    """Batches of clips, whose encoded tensors come from `source`."""

    def __init__(
        self,
        clips: Mapping[ExpertName, Sequence[Clip]],
        source: LatentSource,
        conditioning: Conditioning,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        caption_dropout: float = 0.0,
        encode_text_online: bool = False,
    ) -> None:
        """`clips` are those of each trained expert. `accumulation` is the number of micro-batches
        of a step, `caption_dropout` the fraction of samples whose caption is replaced by an empty
        one, unless their clip has its own. With `encode_text_online` batches have captions and no
        `text`."""
        self._source = source
        self._conditioning = conditioning
        self._batch_size = batch_size
        self._accumulation = accumulation
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._encode_text_online = encode_text_online
        self._buckets = {expert: _buckets(own) for expert, own in clips.items()}
        self.batches_per_epoch = batches_per_epoch(clips, batch_size)
        """As the function of this name, for the clips and the batch size of this loader."""
        self.draws_captions = any(
            len(clip.captions) > 1 or self._dropout_of(clip) > 0
            for own in clips.values()
            for clip in own
        )
        """Whether the captions of training depend on random draws."""
        # The number and the order of each expert's current epoch. One for each expert, since their
        # steps may alternate; only one, so that memory does not grow with the epochs.
        self._epochs = dict[ExpertName, tuple[int, list[list[Clip]]]]()

    def steps(
        self,
        start: int,
        stop: int,
        expert_at: Callable[[int], tuple[ExpertName, int]],
        experts: Collection[ExpertName] | None = None,
        part: Part = WHOLE,
    ) -> Generator[StepBatches]:
        """Data of the steps `start` to `stop`-1, or of those among them that train one of
        `experts`; of each step's clips, `part`. `expert_at(step)` gives the expert and the number
        of steps that it has had before.

        While one step is trained, the next ones are read in the background, one by each of the
        source's workers.
        """

        def read(number: int) -> StepBatches:
            return self.step(number, *expert_at(number), part)

        numbers: Sequence[int] = range(start, stop)
        if experts is not None:
            numbers = [number for number in numbers if expert_at(number)[0] in experts]
        with closing(results_ahead(read, numbers, workers=self._source.workers)) as results:
            for _, result in results:
                yield result()

    def step(
        self, number: int, expert: ExpertName, expert_step: int, part: Part = WHOLE
    ) -> StepBatches:
        """Data of step `number` of the run, which is step `expert_step` (from 0) of `expert`; of
        its clips, `part`."""
        # A step may span the end of an epoch, so no clip is dropped or repeated to fill it.
        whole, first_samples, count = list[list[Clip]](), list[int](), 0
        first = expert_step * self._accumulation
        for micro_batch in range(first, first + self._accumulation):
            epoch, index = divmod(micro_batch, self.batches_per_epoch[expert])
            whole.append(self._epoch(expert, epoch)[index])
            first_samples.append(count)
            count += len(whole[-1])
        batches = list[Batch]()
        for index, within in part.of_batches([len(clips) for clips in whole]):
            clips = whole[index][within.start : within.stop]
            first_sample = first_samples[index] + within.start
            captions = [
                self._draw_caption(clip, expert, expert_step, sample)
                for sample, clip in enumerate(clips, start=first_sample)
            ]
            given: list[Given] = [
                self._conditioning.draw(clip.frames, seed=self._seed, step=number, index=sample)
                for sample, clip in enumerate(clips, start=first_sample)
            ]
            batches.append(self._load_batch(clips, captions, given, first_sample))
        return StepBatches(number=number, expert=expert, batches=tuple(batches), global_size=count)

    def validation_batches(self, clips: Sequence[Clip], count: int) -> list[Batch]:
        """`count` of `clips` (all if there are fewer), at equal distances in the sequence; a batch
        for each, with its first caption."""
        count = min(count, len(clips))
        # Neighbors in the sequence are often alike: clips of one folder, cuts of one film.
        chosen = [clips[i * len(clips) // count] for i in range(count)]
        return [
            replace(self.first_captions([clip]), first_sample_index=i)
            for i, clip in enumerate(chosen)
        ]

    def first_captions(self, clips: Sequence[Clip]) -> Batch:
        """A batch of `clips`, which share a bucket, each with its first caption, and given the
        frames that most samples are given."""
        captions = [clip.captions[0] for clip in clips]
        given: list[Given] = [self._conditioning.usual(clip.frames) for clip in clips]
        return self._load_batch(clips, captions, given, 0)

    def _epoch(self, expert: ExpertName, number: int) -> list[list[Clip]]:
        """The clips of all batches of one epoch, shuffled within and among buckets."""
        current = self._epochs.get(expert)
        if current is None or current[0] != number:
            current = self._epochs[expert] = (number, self._shuffled(expert, number))
        return current[1]

    def _shuffled(self, expert: ExpertName, epoch: int) -> list[list[Clip]]:
        batches = list[list[Clip]]()
        for bucket, members in self._buckets[expert].items():
            # By the bucket too, so that a new clip leaves the order within other buckets.
            shuffled = list(members)
            self._random("order", expert, epoch, str(bucket)).shuffle(shuffled)
            chosen, size = [self._choose(m, expert, epoch) for m in shuffled], self._batch_size
            batches += [chosen[i : i + size] for i in range(0, len(chosen), size)]
        self._random("batches", expert, epoch).shuffle(batches)
        return batches

    def _choose(self, member: _Member, expert: ExpertName, epoch: int) -> Clip:
        """The alternative that an epoch has; each comes once before any comes again."""
        if len(member.clips) == 1:
            return member.clips[0]
        first = member.clips[0]
        turn, index = divmod(epoch * first.repeats + member.repeat, len(member.clips))
        # By the name, so that other clips of the data set have no influence.
        order = list(member.clips)
        self._random("take", expert, turn, first.name).shuffle(order)
        return order[index]

    def _draw_caption(self, clip: Clip, expert: ExpertName, expert_step: int, index: int) -> str:
        """The caption of the sample `index` of the global batch."""
        # Two draws, so that a clip which keeps its caption has the one that it has without dropout.
        dropout = self._random("caption dropout", expert, expert_step, index)
        if dropout.random() < self._dropout_of(clip):
            return ""
        return self._random("caption", expert, expert_step, index).choice(clip.captions)

    def _dropout_of(self, clip: Clip) -> float:
        return self._caption_dropout if clip.caption_dropout is None else clip.caption_dropout

    def _random(self, purpose: str, *counters: int | str) -> random.Random:
        return random.Random(derive_seed(self._seed, purpose, *counters))

    def _load_batch(
        self,
        clips: Sequence[Clip],
        captions: Sequence[str],
        given: Sequence[Given],
        first_sample_index: int,
    ) -> Batch:
        entries = [self._source.video(*each) for each in zip(clips, given, strict=True)]
        latents = torch.stack([entry["latents"] for entry in entries])
        mask, text = None, None
        if any("mask" in entry for entry in entries):
            all_ones = torch.ones(1, *latents.shape[2:])
            mask = torch.stack([entry.get("mask", all_ones) for entry in entries])
        if not self._encode_text_online:
            text = pad_text([self._source.text(caption) for caption in captions])
        is_prior = [clip.is_prior for clip in clips]
        return Batch(
            latents=latents,
            text=text,
            captions=tuple(captions),
            condition=condition_channels(self._conditioning, entries, given),
            reference=_reference_images(entries),
            mask=mask,
            # By way of a tensor, since losses are multiplied with float32 values.
            loss_weights=tuple(torch.tensor([clip.loss_weight for clip in clips]).tolist()),
            timesteps=tuple(clip.timesteps for clip in clips),
            is_prior=torch.tensor(is_prior) if any(is_prior) else None,
            names=tuple(clip.name for clip in clips),
            given=tuple(given),
            last_frame=last_frames(entries, given),
            preserved=self._preserved(clips, captions),
            first_sample_index=first_sample_index,
        )

    def _preserved(self, clips: Sequence[Clip], captions: Sequence[str]) -> PreservedTexts | None:
        pairs = zip(clips, captions, strict=True)
        texts = [clip.class_caption(caption) for clip, caption in pairs]
        if not any(texts):
            return None
        # Of a clip without such a text its caption is a placeholder, with a weight of 0.
        used = [text or caption for text, caption in zip(texts, captions, strict=True)]
        return PreservedTexts(
            text=pad_text([self._source.text(text) for text in used]),
            weights=torch.tensor([float(text is not None) for text in texts]),
        )


def condition_channels(
    conditioning: Conditioning, entries: Sequence[Mapping[str, Tensor]], given: Sequence[Given]
) -> Tensor | None:
    """[B, K, F, h, w]: the further input channels of samples, made of the latents and the parts in
    `entries`, [C, F, h, w]; None if there are none."""
    channels = list[Tensor]()
    for entry, each in zip(entries, given, strict=True):
        parts: dict[ConditionPart, Tensor] = {
            name: entry[name][None] for name in conditioning.parts(each) if name in entry
        }
        latents_BCFHW = entry["latents"][None]
        if (of_sample := conditioning.channels(parts, each, latents_BCFHW)) is not None:
            channels.append(of_sample)
    return torch.cat(channels) if channels else None


def _reference_images(entries: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """As `Batch.reference`, from the parts in `entries`."""
    if not any("reference" in entry for entry in entries):
        return None
    return torch.stack(
        [
            entry.get("reference", torch.zeros_like(entry["latents"][:, :1]))[:, 0]
            for entry in entries
        ]
    )


def last_frames(entries: Sequence[Mapping[str, Tensor]], given: Sequence[Given]) -> Tensor | None:
    """As `Batch.last_frame`, from the parts in `entries`."""
    nothing = torch.zeros_like(entries[0]["latents"][:, :1])
    frames = [
        entry.get("last_frame", nothing) if each in ("both", "last") else nothing
        for entry, each in zip(entries, given, strict=True)
    ]
    if all(frame is nothing for frame in frames):
        return None
    return torch.stack([frame[:, 0] for frame in frames])
