"""Shared by all training methods: preparing the components, one training step, and its loss."""

from dataclasses import replace
from random import Random

import modules.util.multi_gpu_util as multi
from modules.model.WanModel import WanModel
from modules.modelSetup.BaseModelSetup import BaseModelSetup
from modules.modelSetup.mixin.ModelSetupText2ImageMixin import ModelSetupText2ImageMixin
from modules.util.checkpointing_util import enable_checkpointing
from modules.util.config.TrainConfig import TrainConfig
from modules.util.NamedParameterGroup import NamedParameterGroup, NamedParameterGroupCollection
from modules.util.optimizer_util import init_model_parameters
from modules.util.TrainProgress import TrainProgress

import torch
from torch import Tensor

from onewan.model.attention import attend_within_frames
from onewan.model.embedding import WanModelEmbedding
from onewan.model.forward import predict_velocity
from onewan.onetrainer import settings, step_adapter, weight_files
from onewan.onetrainer.layer_filter import check_layer_filter
from onewan.onetrainer.residency import ConductorResidency
from onewan.seeds import derive_seed
from onewan.train.objective import NoisedBatch
from onewan.variants import Expert

from transformers.models.umt5.modeling_umt5 import UMT5Block


class BaseWanSetup(BaseModelSetup, ModelSetupText2ImageMixin):
    LAYER_PRESETS = {
        "attn-mlp": ["attn1", "attn2", "ffn"],
        "attn-only": ["attn1", "attn2"],
        "blocks": ["blocks"],
        "full": [],
    }

    # ------------------------------------------------------------------------------- preparation

    def setup_optimizations(self, model: WanModel, config: TrainConfig):
        super().setup_optimizations(model, config)
        self.step_adapter = self._make_step_adapter(model, config)
        model.frame_count = settings.frames_of(config)
        for part in model.expert_parts():
            if getattr(config, part).train and (names := self._selectable(getattr(model, part))):
                check_layer_filter(config, names)
        if config.text_encoder.train and str(config.training_method) != "EMBEDDING":
            print("Wan 2.2: the text encoder can't be trained; text_encoder.train is turned off")
            config.text_encoder.train = False
        # OneTrainer has no default for the layers that Muon optimizes in an unknown model.
        optimizer = config.optimizer
        if str(optimizer.optimizer).startswith("MUON") and not optimizer.muon_hidden_layers:
            optimizer.muon_hidden_layers = "blocks"
        for part in model.expert_parts():
            own = getattr(config, part)
            self._setup_model_part(
                model, config, part, own, _checkpointed, disable_fp16_autocast=True
            )
            transformer = getattr(model, part)
            self._set_attention_backend(transformer, config.attention_mechanism, mask=False)
            if not config.wan_use_temporal_attention:
                attend_within_frames(transformer)
        self._setup_model_part(
            model, config, "text_encoder", config.text_encoder, _checkpointed_encoder
        )
        self._setup_model_part(model, config, "vae", config.vae)
        model.wan.dtype = _matmul_dtype(model, config)

    def _make_step_adapter(self, model: WanModel, config: TrainConfig) -> step_adapter.StepAdapter:
        variant = model.wan.variant
        loaded = [e for e in variant.experts if getattr(model, e.component) is not None]
        if len(loaded) < len(variant.experts):
            print(
                f"Wan 2.2: transformer_2.include is off, so of {variant.title} only the "
                "high-noise expert is loaded and trained"
            )
        trained = [e for e in loaded if getattr(config, e.component).train]
        if str(config.training_method) == "EMBEDDING":
            trained = trained or loaded
        if not trained:
            raise ValueError("Wan 2.2: neither transformer is trained; turn on Train for one")
        return step_adapter.step_adapter_of(config, variant, trained)

    def _expert(self, model: WanModel, step: int) -> Expert:
        """The expert that this step trains, among those whose training has not been stopped."""
        # "Stop training after" ends a component's training in the middle of OneTrainer's run.
        stopped = set()
        if model.parameters is not None:  # otherwise it is not set up yet
            for part in model.expert_parts():
                _, module = self._trained_module(model, part)
                if module is not None and not any(p.requires_grad for p in module.parameters()):
                    stopped.add(part)
        return self.step_adapter.expert_at(step, stopped)

    def _trained_module(self, model: WanModel, part: str) -> tuple[str, torch.nn.Module | None]:
        """What the method trains of the transformer `part`, and its name; None if nothing."""
        return part, None

    def _selectable(self, transformer: torch.nn.Module) -> list[str]:
        """Names that the layer filter selects from; none if no layer is trained."""
        return []

    def _weight_filters(self, config: TrainConfig) -> list | None:
        """Filters of the names of the weights to train; None for all."""
        return None

    def _bring(self, model: WanModel, config: TrainConfig, *parts: str):
        """Move to the device what a step with the transformers `parts` needs, and nothing else."""
        wanted = list(parts)
        if encodes_text_online(config) or not config.latent_caching:
            wanted.append("text_encoder")
        if not config.latent_caching:
            wanted.append("vae")
        # Moves the other expert off the device, since both rarely fit.
        residency = ConductorResidency(model, self.train_device)
        residency.bring(*(getattr(model, part) for part in wanted))

    def setup_model(self, model: WanModel, config: TrainConfig):
        self._setup_embeddings(model, config)
        groups = self.create_parameters(model, config)
        self._require_grad(model, config)
        init_model_parameters(model, groups, self.train_device)

    def create_parameters(
        self, model: WanModel, config: TrainConfig
    ) -> NamedParameterGroupCollection:
        groups = NamedParameterGroupCollection()
        for embedding in self._trained_embeddings(model, config):
            group = NamedParameterGroup(
                unique_name=f"embeddings/{embedding.uuid}",
                display_name=f"embeddings/{embedding.placeholder}",
                parameters=[embedding.vectors],
                learning_rate=config.embedding_learning_rate,
            )
            groups.add_group(group)
        filters = self._weight_filters(config)
        for part in model.expert_parts():
            name, module = self._trained_module(model, part)
            if module is not None:
                self._create_model_part_parameters(
                    groups, name, module, getattr(config, part), filters, config.debug_mode
                )
        return groups

    def _require_grad(self, model: WanModel, config: TrainConfig):
        """Enable gradients for what is trained at this point of the run, and for nothing else."""
        trained = self._trained_embeddings(model, config)
        own_configs = {own.uuid: own for own in config.all_embedding_configs()}
        for embedding in model.trained_embeddings():
            own = own_configs.get(embedding.uuid)
            elapsed = own and self.stop_embedding_training_elapsed(own, model.train_progress)
            embedding.vectors.requires_grad_(embedding in trained and not elapsed)
        for part in ("text_encoder", "vae", *model.expert_parts()):
            getattr(model, part).requires_grad_(False)
        for part in model.expert_parts():
            name, module = self._trained_module(model, part)
            self._setup_model_part_requires_grad(
                name, module, getattr(config, part), model.train_progress
            )

    def after_optimizer_step(
        self, model: WanModel, config: TrainConfig, train_progress: TrainProgress
    ):
        self._keep_norms(model, config)
        self._require_grad(model, config)  # the training of a component may have ended

    def setup_train_device(self, model: WanModel, config: TrainConfig):
        self._bring(model, config, self._expert(model, model.train_progress.global_step).component)
        for name in model.expert_parts():
            getattr(model, name).train()
        model.text_encoder.eval()
        model.vae.eval()

    def prepare_text_caching(self, model: WanModel, config: TrainConfig):
        model.materialize_only("text_encoder")
        model.eval()

    # --------------------------------------------------------------------------------- embeddings

    def _setup_embeddings(self, model: WanModel, config: TrainConfig):
        model.wan.embedding, model.wan.additional_embeddings = None, []
        for wanted in config.all_embedding_configs():
            held = model.embedding_state_dicts.get(wanted.uuid)
            if held is None:
                initial = WanModelEmbedding.initial(
                    model.wan,
                    placeholder=wanted.placeholder,
                    initial_text=wanted.initial_embedding_text,
                    token_count=wanted.token_count,
                    is_output_embedding=wanted.is_output_embedding,
                )
                embedding = replace(initial, uuid=wanted.uuid)
            else:
                embedding = weight_files.embedding_of(wanted.uuid, held, wanted.placeholder)
            embedding.to(self.train_device)
            if wanted.uuid == config.embedding.uuid and str(config.training_method) == "EMBEDDING":
                model.wan.embedding = embedding
            else:
                model.wan.additional_embeddings.append(embedding)
        self._norms = {e.uuid: _norm(e.vectors) for e in model.trained_embeddings()}

    def _trained_embeddings(self, model: WanModel, config: TrainConfig) -> list:
        trained = {e.uuid for e in config.additional_embeddings if e.train}
        if str(config.training_method) == "EMBEDDING":
            trained.add(config.embedding.uuid)
        return [e for e in model.trained_embeddings() if e.uuid in trained]

    def _keep_norms(self, model: WanModel, config: TrainConfig):
        if not config.preserve_embedding_norm:
            return
        with torch.no_grad():
            for embedding in model.trained_embeddings():
                if embedding.vectors.requires_grad:
                    embedding.vectors.mul_(self._norms[embedding.uuid] / _norm(embedding.vectors))

    # -------------------------------------------------------------------------------------- a step

    def predict(
        self,
        model: WanModel,
        batch: dict,
        config: TrainConfig,
        train_progress: TrainProgress,
        *,
        deterministic: bool = False,
    ) -> dict:
        step = train_progress.global_step
        clips = self._clips(model, batch, config, None if deterministic else step)
        if deterministic:
            return self._validate(model, config, clips)
        expert = self._expert(model, step)
        self._bring(model, config, expert.component)
        rank, ranks = _place(config)
        sample = self.step_adapter.add_noise(clips, step, expert, rank=rank, ranks=ranks)
        if config.dropout_probability:
            # A resumed run drops out the same activations as an uninterrupted one.
            torch.manual_seed(self.step_adapter.dropout_seed(step, rank))
        return _prediction([sample], [self._velocity(model, expert.component, clips, sample)])

    def _clips(self, model: WanModel, batch: dict, config: TrainConfig, step: int | None):
        captions = list(batch["prompt"])
        dropped = _dropped(config.text_encoder.dropout_probability, step, len(captions))
        if encodes_text_online(config):
            model.materialize("text_encoder")
            captions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
            text = model.wan.encode_text(captions)
        else:
            text = batch["text_padded"]
            for place, drop in enumerate(dropped):
                if drop:
                    text[place] = batch["text_empty_padded"][place]
        adapter, given = self.step_adapter, None
        if step is not None:
            latents = batch["latent_image"]
            frames = 1 + (latents.shape[2] - 1) * model.wan.temporal_compression
            rank, ranks = _place(config)
            given = adapter.draw_given(len(latents), frames, step, rank=rank, ranks=ranks)
        return step_adapter.batch_of(batch, text, captions, adapter.conditioning, given)

    def _velocity(self, model: WanModel, part: str, clips, sample: NoisedBatch) -> Tensor:
        return predict_velocity(
            getattr(model, part),
            sample.x,
            sample.t,
            clips.text,
            condition_BCFHW=clips.condition,
            clean_frames_BF=sample.clean_frames,
            dtype=model.wan.dtype,
        )

    def _validate(self, model: WanModel, config: TrainConfig, clips) -> dict:
        """The clip at several timesteps of every trained expert, without dropout."""
        samples, predicted = [], []
        for expert, sample in self.step_adapter.validation_batches(clips):
            self._bring(model, config, expert.component)
            transformer = getattr(model, expert.component)
            transformer.eval()
            samples.append(sample)
            predicted.append(self._velocity(model, expert.component, clips, sample))
            transformer.train()
        return _prediction(samples, predicted)

    def calculate_loss(
        self, model: WanModel, batch: dict, data: dict, config: TrainConfig
    ) -> Tensor:
        samples = data["samples"]
        size = len(data["predicted"]) // len(samples)
        prior = data.get("prior_target")
        losses = []
        for number, sample in enumerate(samples):
            part = slice(number * size, (number + 1) * size)
            # For prior concepts, the trainer has replaced the targets by the base model's
            # predictions.
            sample = replace(sample, target=data["target"][part].float())
            outside = None if prior is None else prior[part]
            losses.append(self.step_adapter.loss(sample, data["predicted"][part], outside))
        scale = config.loss_scaler.get_scale(config.batch_size, config.gradient_accumulation_steps)
        loss = torch.stack(losses).mean() * scale
        if torch.is_grad_enabled() and not loss.requires_grad:
            # Training of everything has been stopped, or no caption has a trained placeholder.
            # OneTrainer's backward pass must not fail in such a step.
            loss.requires_grad_()
        return loss


def encodes_text_online(config: TrainConfig) -> bool:
    """Whether captions are encoded in each step, because embeddings are trained."""
    return config.train_any_embedding() or config.train_any_output_embedding()


def _place(config: TrainConfig) -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (multi.rank(), multi.world_size()) if config.multi_gpu else (0, 1)


def _checkpointed(module, config, part):
    lists = [(module.blocks, ["hidden_states"])]
    return enable_checkpointing(module, config, part, config.compile, lists)


def _checkpointed_encoder(module, config, part):
    return enable_checkpointing(module, config, part, config.compile, [(UMT5Block, [])])


def _matmul_dtype(model: WanModel, config: TrainConfig) -> torch.dtype:
    """Data type of matrix products: the train data type, not float32 for smaller weights."""
    parts = model.expert_parts()
    wanted = getattr(model, f"{parts[0]}_train_dtype").torch_dtype()
    weights = {getattr(config, part).weight_dtype.torch_dtype() for part in parts}
    if wanted != torch.float32 or weights == {torch.float32}:
        return wanted
    other = config.fallback_train_dtype.torch_dtype()
    return torch.bfloat16 if other in (None, torch.float32) else other


def _prediction(samples: list[NoisedBatch], predicted: list[Tensor]) -> dict:
    """What OneTrainer's trainer takes from `predict`, and the samples for the loss."""
    levels = torch.cat([sample.t for sample in samples])
    return {
        "loss_type": "target",
        "timestep": (levels * 1000).long().clamp(max=999),
        "predicted": torch.cat(predicted),
        "target": torch.cat([sample.target for sample in samples]),
        "samples": samples,
    }


def _dropped(probability: float, step: int | None, count: int) -> list[bool]:
    """Which captions are dropped; none in validation (`step` is None)."""
    if step is None or not probability:
        return [False] * count
    draw = Random(derive_seed(settings.SEED, "caption dropout", step, multi.rank()))
    return [draw.random() < probability for _ in range(count)]


def _norm(vectors: Tensor) -> Tensor:
    """OneTrainer's norm of an embedding: the mean over the tokens of their standard deviation."""
    return vectors.detach().std(dim=1).mean()
