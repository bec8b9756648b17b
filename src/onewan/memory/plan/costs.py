"""`RunCosts`: the bytes of each phase of one run, as a function of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from onewan.config.method import FineTuneMethod
from onewan.config.resolve import trained_experts
from onewan.config.schema import ResolvedRun
from onewan.memory.plan.activations import (
    Activations,
    Batch,
    activations,
    exchange_bytes,
    smallest_peak,
)
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.disk import disk_bytes
from onewan.memory.plan.result import PhaseBytes
from onewan.memory.plan.settings import Settings
from onewan.memory.plan.shapes import CAPTION_BYTES_PER_HEAD
from onewan.memory.plan.sharded import rank_bytes
from onewan.memory.plan.sharded_parts import ShardedParts
from onewan.memory.plan.sharing import ALONE, Sharing
from onewan.memory.plan.stored import COMPUTED_TYPES, StoredModel, StoredTransformer
from onewan.memory.plan.trained import TrainedWeights, trained_embeddings, trained_weights
from onewan.memory.plan.work import RING
from onewan.variants import TEXT_LENGTH, ExpertName

_PROCESS = 1_500_000_000
"""Bytes of host memory that Python, PyTorch and the libraries take."""
_EXPANDED_AT_A_TIME = 1 << 23
"""Values of a packed matrix that are computed in float32 at a time."""


@dataclass(frozen=True, kw_only=True)
class RunCosts:
    """What a run has in memory, before settings are chosen."""

    config: ResolvedRun
    stored: StoredModel
    trained: Mapping[ExpertName, TrainedWeights | None]
    """By the experts that are trained."""
    embeddings: TrainedWeights | None
    loaded: tuple[ExpertName, ...]
    """Experts whose weights are loaded: those that are trained, or all if videos are sampled."""
    sharing: Sharing = ALONE
    """What a process has of the weights and of a clip."""

    @staticmethod
    def of(
        config: ResolvedRun,
        stored: StoredModel,
        before: RunCosts | None = None,
        sharing: Sharing = ALONE,
    ) -> RunCosts:
        """The costs of `config`. `before` are those of a run that differs in a few settings, whose
        trained weights are taken if they are the same; counting them takes longest."""
        experts = trained_experts(config)
        variant = config.model.facts()
        loaded = variant.experts if config.sample.prompts else experts
        trained: dict[ExpertName, TrainedWeights | None] = {}
        for expert in experts:
            if before is not None and _trains_the_same(config, before.config):
                trained[expert.name] = before.trained[expert.name]
            else:
                shape = stored.experts[expert.name].shape
                trained[expert.name] = trained_weights(config, shape, expert)
        return RunCosts(
            config=config,
            stored=stored,
            trained=trained,
            embeddings=trained_embeddings(config, stored.text_width),
            loaded=tuple(expert.name for expert in loaded),
            sharing=sharing,
        )

    @cached_property
    def transformer(self) -> StoredTransformer:
        """The largest of the loaded experts; they have the same shape but may be stored in
        different forms."""
        return max((self.stored.experts[n] for n in self.loaded), key=lambda s: s.all_bytes)

    @property
    def layers(self) -> int:
        return self.transformer.shape.layers

    @property
    def is_fine_tuning(self) -> bool:
        return isinstance(self.config.method, FineTuneMethod)

    @property
    def compute_bytes(self) -> int:
        return COMPUTED_TYPES[self.config.model.dtype]

    def batch(self, bucket: Bucket, clips: int | None = None, sequence: int = 1) -> Batch:
        """A batch of `clips` of `bucket`, of which `sequence` processes share the tokens."""
        return Batch(
            shape=self.transformer.shape,
            tokens=-(-bucket.tokens(self.config.model.facts()) // sequence),
            clips=self.config.train.batch_size if clips is None else clips,
            compute_bytes=self.compute_bytes,
        )

    def streamed(self, settings: Settings) -> int:
        """Blocks of an expert that are streamed from host memory."""
        return 0 if self.sharing.is_sharded else settings.streamed(self.layers)

    def copying(self, settings: Settings) -> Settings:
        """`settings` by what is copied from host memory: shards never are."""
        if not self.sharing.is_sharded:
            return settings
        return replace(settings, resident_blocks=self.layers)

    def activations(self, bucket: Bucket, settings: Settings, sequence: int = 1) -> Activations:
        gradients = self._gradients_of_a_block if self.streamed(settings) else 0
        if self.sharing.is_sharded:
            gradients = self.sharded.block_gradients
        batch = self.batch(bucket, sequence=sequence)
        return activations(batch, settings, self.config.method, gradients=gradients)

    @cached_property
    def sharded(self) -> ShardedParts:
        """What a process has where weights are sharded."""
        averages = self.config.train.ema
        return ShardedParts(
            loaded={
                name: rank_bytes(
                    self.config, self.stored.experts[name], self.trained.get(name), self.sharing
                )
                for name in self.loaded
            },
            trained=frozenset(self.trained),
            sharing=self.sharing,
            embeddings=self.embeddings,
            averages_on_device=averages is not None and not averages.offload,
        )

    # --------------------------------------------------------------------------- training

    def training(self, bucket: Bucket, settings: Settings) -> PhaseBytes:
        """A training step with clips of `bucket`, for the expert that needs more."""
        found = self._trainings.get((bucket, settings))
        if found is None:
            found = self._trainings[bucket, settings] = self._training(bucket, settings)
        return found

    @cached_property
    def _trainings(self) -> dict[tuple[Bucket, Settings], PhaseBytes]:
        return {}

    def _training(self, bucket: Bucket, settings: Settings) -> PhaseBytes:
        sequence = self.sharing.sequence
        acts, batch = self.activations(bucket, settings, sequence), self.batch(bucket)
        device = self._weights_on_device(settings)
        device |= self._trained_on_device(settings, training=True)
        device |= self._encoders_in_training()
        device["latents, text and rotary tables"] = self._inputs(bucket)
        # The cast at the beginning is gone when activations and gradients are there.
        later = acts.kept_on_device + device["gradients"]
        live = max(acts.live, smallest_peak(batch) - later)
        # Which `live` has, where they are.
        if self.sharing.is_sharded:
            live = max(0, live - self.sharded.block_gradients)
        elif self.streamed(settings):
            live = max(0, live - self._gradients_of_a_block)
        if sequence > 1:
            device["tokens that processes exchange"] = exchange_bytes(
                self.batch(bucket, sequence=sequence)
            )
        device["kept for the backward pass"] = acts.kept_on_device
        device["live block"] = live + self._expanded()
        pinned = self._weights_on_host(settings)
        pinned |= self._trained_on_host(settings)
        pinned["kept for the backward pass"] = acts.kept_on_host
        pageable = {
            **self._process,
            "a checkpoint being written": self._copied_for_a_checkpoint(settings),
        }
        return _phase("training", device, pinned, pageable)

    def _copied_for_a_checkpoint(self, settings: Settings) -> int:
        """What a checkpoint copies in host memory. Fine-tuned weights are written one at a time,
        and the state of streamed blocks from where it is (`onewan.train.state`)."""
        whole = sum(t.saved for t in self._whole)
        if self.is_fine_tuning and self.sharing.is_sharded:
            of_process = self.sharded.on_device(training=False)
            whole = of_process["optimizer state"] + self.sharded.averages
        elif self.is_fine_tuning:
            whole = sum(t.saved - t.stored for t in self._whole)
            whole -= self.streamed(settings) * self._per_block(whole)
        return whole + (0 if self.embeddings is None else self.embeddings.saved)

    def validation(self, bucket: Bucket, settings: Settings) -> PhaseBytes:
        """Loss of clips of `bucket` without gradients."""
        device = self._weights_on_device(settings)
        device |= self._trained_on_device(settings, training=False)
        device |= self._encoders_in_training()
        inputs = self._inputs(bucket, clips=1)
        if self.transformer.shape.in_channels > self.transformer.shape.out_channels:
            # The noisy latents with the condition's channels, during the whole forward pass. In
            # training they are gone at the peak, which is in the backward pass.
            cells = bucket.latent_cells(self.config.model.facts())
            inputs += 4 * self.transformer.shape.in_channels * cells
        device["latents, text and rotary tables"] = inputs
        live = self.activations(bucket, settings).forward_live
        device["live block"] = max(live, smallest_peak(self.batch(bucket))) + self._expanded()
        pinned = self._weights_on_host(settings) | self._trained_on_host(settings)
        return _phase("validation", device, pinned, self._process)

    def _weights_on_device(self, settings: Settings) -> dict[str, int]:
        if self.sharing.is_sharded:
            return self.sharded.weights
        model = self.transformer
        resident = min(settings.resident_blocks, model.shape.layers)
        streamed = settings.streamed(model.shape.layers)
        device = {
            "weights outside the blocks": model.outer_bytes,
            "resident blocks": resident * model.block_bytes,
            "ring for streamed blocks": min(RING, streamed) * self._bytes_in_the_ring(),
        }
        if not self.config.memory.offload_inactive_expert:
            others = [self.stored.experts[n].all_bytes for n in self.loaded]
            device["the other expert"] = sum(others) - max(others)
        return device

    def _bytes_in_the_ring(self) -> int:
        """Bytes of one buffer: a block's weights, and when they are trained their state too."""
        return self.transformer.block_bytes + self.streamed_state

    @cached_property
    def streamed_state(self) -> int:
        """Bytes of optimizer state and residuals that come with each streamed block if blocks are
        fine-tuned."""
        if not self.is_fine_tuning:
            return 0
        return max((self._per_block(t.state.device + t.weights) for t in self._whole), default=0)

    @cached_property
    def _gradients_of_a_block(self) -> int:
        """Bytes of the gradients of a streamed block that is fine-tuned: its weights are updated
        together."""
        if not self.is_fine_tuning:
            return 0
        return max((self._per_block(t.stored) for t in self._whole), default=0)

    @cached_property
    def _whole(self) -> list[TrainedWeights]:
        return [t for t in self.trained.values() if t is not None]

    @cached_property
    def _share_of_a_block(self) -> float:
        """Of one block among all weights of an expert."""
        shape = self.transformer.shape
        return (1 - shape.outer_weights / shape.weights) / shape.layers

    def _parks(self, settings: Settings) -> bool:
        """Whether what is trained of the idle expert is in host memory."""
        return settings.park_idle or self.is_fine_tuning

    @property
    def parked_bytes(self) -> int:
        """Bytes of the trained weights, state and averages of the expert that is parked: those of
        the smaller one, while the larger one trains."""
        return min(map(_all_bytes, self._whole), default=0)

    def _per_block(self, amount: int) -> int:
        """The share of one block in `amount` bytes that belong to all trained weights."""
        return round(amount * self._share_of_a_block)

    def _trained_on_device(self, settings: Settings, *, training: bool) -> dict[str, int]:
        """Trained weights, their gradients, optimizer state and averages."""
        if self.sharing.is_sharded:
            return self.sharded.on_device(training=training)
        parts = self._whole
        active = [max(parts, key=_all_bytes)] if parts and self._parks(settings) else parts
        embeddings = [self.embeddings] if self.embeddings is not None else []
        # With streamed fine-tuning, what belongs to streamed blocks comes and goes with them.
        streamed = settings.streamed(self.layers) if self.is_fine_tuning else 0

        def here(amounts: list[int]) -> int:
            if not streamed:
                return sum(amounts)
            return sum(amount - streamed * self._per_block(amount) for amount in amounts)

        device = {
            "trained weights": here([t.weights for t in active])
            + sum(t.weights for t in embeddings),
            "optimizer state": here([t.state.device for t in active])
            + sum(t.state.device for t in embeddings),
        }
        if self.config.train.ema is not None and not self.config.train.ema.offload:
            device["averages"] = sum(t.averages for t in (*active, *embeddings))
        if training:
            # The gradients of an expert are dropped after its step.
            gradients = max((t.gradients for t in parts), default=0)
            if streamed:
                gradients = max(gradients, self._gradients_of_a_block)
            device["gradients"] = gradients + sum(t.gradients for t in embeddings)
        return device

    def _inputs(self, bucket: Bucket, clips: int | None = None) -> int:
        """Bytes of float32 tensors that exist beside the blocks: clean and noisy latents, target
        and prediction; the condition; the reference image; the text; sine and cosine of the
        tokens' positions."""
        batch, shape = self.batch(bucket, clips), self.transformer.shape
        variant = self.config.model.facts()
        channels = 4 * shape.out_channels + shape.in_channels - shape.out_channels
        cells = bucket.latent_cells(variant)
        reference = shape.reference_channels * cells // bucket.latent_frames(variant)
        text = TEXT_LENGTH * shape.text_width
        rotary = 2 * batch.tokens * (shape.width // shape.heads)
        return 4 * (batch.clips * (channels * cells + reference + text) + rotary)

    def _encoders_in_training(self) -> dict[str, int]:
        """The text encoder and the VAE, where they run in every step."""
        device: dict[str, int] = {}
        cached = self.config.video_data.cache
        if self.config.embeddings or not cached:
            device["text encoder"] = self.stored.text_encoder + self._caption
        if not cached:
            # Encoded before the forward pass, so only its weights stand beside activations.
            device["VAE"] = 4 * self.stored.vae.weights
        return device

    def _expanded(self) -> int:
        """The largest packed matrix, expanded for its use, and a few rows of it in float32."""
        shape = self.transformer.shape
        if not self.transformer.expands:
            return 0
        values = shape.width * shape.feed_forward
        return self.compute_bytes * values + 8 * min(values, _EXPANDED_AT_A_TIME)

    @property
    def has_shared_masters(self) -> bool:
        """Whether the processes of a machine have streamed weights in its memory once: frozen ones,
        unless each process converts them while it loads."""
        return self.config.memory.weights == "as_stored" and not self.is_fine_tuning

    def _weights_on_host(self, settings: Settings) -> dict[str, int]:
        """Masters of the blocks, and what belongs to the expert that is not on the device."""
        if self.sharing.is_sharded:
            return {}
        models = [self.stored.experts[name] for name in self.loaded]
        layers = self.layers
        if settings.streamed(layers) or (
            len(models) > 1 and self.config.memory.offload_inactive_expert
        ):
            # The system's cache of a mapped file is not counted: it is given up when needed.
            in_memory = self.config.memory.host_weights != "mapped"
            blocks = in_memory * sum(m.shape.layers * m.block_bytes for m in models)
            if self.has_shared_masters:
                blocks = -(-blocks // self.sharing.machine)
            return {
                "weights of blocks": blocks,
                "weights outside the blocks": sum(m.outer_bytes for m in models[1:]),
            }
        return {}

    def _trained_on_host(self, settings: Settings) -> dict[str, int]:
        if self.sharing.is_sharded:
            return self.sharded.on_host
        parts = self._whole
        everything = [*parts, *([self.embeddings] if self.embeddings else [])]
        host = {"optimizer state": sum(t.state.host for t in everything)}
        if self.config.train.ema is not None and self.config.train.ema.offload:
            host["averages"] = sum(t.averages for t in everything)
        if self._parks(settings) and len(parts) > 1:
            host["the idle expert's trained weights and state"] = self.parked_bytes
        streamed = settings.streamed(self.layers) if self.is_fine_tuning else 0
        if streamed:
            host["optimizer state of streamed blocks"] = sum(
                streamed * self._per_block(t.state.device + t.weights) for t in parts
            )
        return host

    # --------------------------------------------------------------------------- other phases

    @property
    def _process(self) -> dict[str, int]:
        """What is in host memory from the first step to the last, beside the model."""
        return {
            "Python and libraries": _PROCESS,
            "distilled LoRAs": sum(self.stored.distilled.values()),
        }

    @property
    def _caption(self) -> int:
        """Bytes while a caption is encoded."""
        return CAPTION_BYTES_PER_HEAD * self.stored.text_heads

    def loading(self) -> PhaseBytes:
        """Loading weights that are then sharded: all of them are in host memory first."""
        models = [self.stored.experts[name] for name in self.loaded]
        added = max((t.weights for t in self._whole), default=0) if self.is_fine_tuning else 0
        host = {"whole weights": sum(model.all_bytes for model in models) + added}
        return _phase("loading", self.sharded.weights, {}, self._process | host)

    def encoding(self, bucket: Bucket, strips: int) -> tuple[PhaseBytes, ...]:
        """Encoding captions, and the clips of `bucket` in so many strips; they run one after the
        other."""
        host = {"Python and libraries": _PROCESS}
        text = {"text encoder": self.stored.text_encoder, "one caption": self._caption}
        name = f"a clip of {bucket}" + (f" in {strips} strips" if strips > 1 else "")
        clip = {
            "VAE": 4 * self.stored.vae.weights,
            name: self.stored.vae.encoding_bytes(bucket, strips),
        }
        pixels = {"the clip's pixels": 2 * 12 * bucket.pixels * bucket.frames}
        return (
            _phase("encoding captions", text, {}, host),
            _phase("encoding clips", clip, {}, host | pixels),
        )

    def sampling(self, bucket: Bucket, settings: Settings) -> tuple[PhaseBytes, ...]:
        """Denoising and decoding a sample video of the size `bucket`."""
        # Optimizer state and averages of experts are in host memory meanwhile, and what is trained
        # of the one that does not compute.
        parked = replace(settings, park_idle=True)
        trained = self._trained_on_device(parked, training=False)
        kept = 0 if self.embeddings is None else _all_bytes(self.embeddings)
        batch = self.batch(bucket, 1)
        live = activations(batch, settings, self.config.method).forward_live
        denoising = self._weights_on_device(settings)
        denoising["trained weights"] = trained["trained weights"]
        # Twice, for the negative prompt, and for what the solver keeps of earlier steps.
        denoising["latents, text and rotary tables"] = self._inputs(bucket, clips=2)
        denoising["live block"] = max(live, smallest_peak(batch)) + self._expanded()
        # That of the expert which computes.
        denoising["distilled LoRA"] = max(self.stored.distilled.values(), default=0)
        decoding = {
            "VAE": 4 * self.stored.vae.weights,
            f"a video of {bucket}": self.stored.vae.decoding_bytes(bucket.pixels, bucket.frames),
            "trained weights": kept,
        }
        pinned = self._weights_on_host(settings) | self._trained_on_host(parked)
        if self.sharing.is_sharded:  # which stay where they are
            decoding |= self.sharded.weights | {"trained weights": trained["trained weights"]}
        state = trained["optimizer state"] + trained.get("averages", 0)
        pinned["optimizer state"] = pinned.get("optimizer state", 0) + state
        host = {**self._process, "the video": 15 * bucket.pixels * bucket.frames}
        return (
            _phase("sampling: denoising", denoising, pinned, host),
            _phase("sampling: decoding", decoding, pinned, host),
        )

    # --------------------------------------------------------------------------- disk

    @property
    def trained_counts(self) -> dict[str, int]:
        """Numbers of trained weights by expert, and of "embeddings"."""
        parts = {**self.trained, "embeddings": self.embeddings}
        return {name: part.count for name, part in parts.items() if part is not None}

    def disk(self, clips: Mapping[Bucket, int]) -> dict[str, int]:
        """Bytes of the files that the run writes."""
        trained = [t for t in (*self.trained.values(), self.embeddings) if t is not None]
        return disk_bytes(self.config, trained, clips)


def _trains_the_same(one: ResolvedRun, other: ResolvedRun) -> bool:
    """Whether two runs, of the same model, have the same trained weights and optimizer state."""
    return (
        one.method is other.method
        and one.optimizer is other.optimizer
        and one.train.ema is other.train.ema
    )


def _all_bytes(trained: TrainedWeights) -> int:
    """What is moved when an expert is parked."""
    return trained.weights + trained.state.device + trained.averages


def _phase(
    name: str, device: Mapping[str, int], pinned: Mapping[str, int], pageable: Mapping[str, int]
) -> PhaseBytes:
    def given(items: Mapping[str, int]) -> dict[str, int]:
        return {item: amount for item, amount in items.items() if amount}

    return PhaseBytes(
        phase=name, device=given(device), pinned=given(pinned), pageable=given(pageable)
    )
