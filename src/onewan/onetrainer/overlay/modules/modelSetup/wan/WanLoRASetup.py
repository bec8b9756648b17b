"""Adapters on the experts, by OneTrainer's own modules; registers itself."""

import copy
import re

from modules.model.WanModel import WanModel
from modules.modelSetup.BaseModelSetup import BaseModelSetup
from modules.modelSetup.wan.BaseWanSetup import BaseWanSetup
from modules.modelSetup.wan.filters import names_of
from modules.module.LoRAModule import LoRAModuleWrapper
from modules.util import factory
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType
from modules.util.enum.TrainingMethod import TrainingMethod
from modules.util.NamedParameterGroup import NamedParameterGroupCollection
from modules.util.torch_util import state_dict_has_prefix

import torch

from onewan.onetrainer import settings
from onewan.seeds import derive_seed


@factory.register(BaseModelSetup, ModelType.WAN_2_2, TrainingMethod.LORA)
class WanLoRASetup(BaseWanSetup):
    def create_parameters(
        self, model: WanModel, config: TrainConfig
    ) -> NamedParameterGroupCollection:
        groups = NamedParameterGroupCollection()
        self._add_embedding_groups(model, config, groups)
        for part in model.expert_parts():
            adapter = getattr(model, f"{part}_lora")
            if adapter is not None:
                self._create_model_part_parameters(
                    groups, f"{part}_lora", adapter, getattr(config, part)
                )
        return groups

    def setup_model(self, model: WanModel, config: TrainConfig):
        loaded = model.lora_state_dict or {}
        for part in model.expert_parts():
            held = state_dict_has_prefix(loaded, part)
            if not held and not getattr(config, part).train:
                continue
            adapter = self._adapter(model, config, part)
            if held:
                adapter.load_state_dict(loaded)
            adapter.set_dropout(config.dropout_probability)
            adapter.to(dtype=config.lora_weight_dtype.torch_dtype())
            adapter.hook_to_module()
            setattr(model, f"{part}_lora", adapter)
        model.lora_state_dict = None
        super().setup_model(model, config)

    def _adapter(self, model: WanModel, config: TrainConfig, part: str) -> LoRAModuleWrapper:
        transformer = getattr(model, part)
        filters = config.layer_filter.split(",")
        names = names_of(config, transformer)
        config = copy.copy(config)
        if names is not None:
            config.layer_filter_regex = True
            filters = [rf"^({'|'.join(map(re.escape, names))})$"]
        if part == "transformer_2" and config.wan_low_lora_rank:
            config.lora_rank = config.wan_low_lora_rank
        if part == "transformer_2" and config.wan_low_lora_alpha:
            config.lora_alpha = config.wan_low_lora_alpha
        # OneTrainer draws initial weights from an unseeded generator, so two runs would differ.
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(settings.SEED, "onetrainer adapter", part))
            return LoRAModuleWrapper(transformer, part, config, filters)

    def _require_grad(self, model: WanModel, config: TrainConfig):
        self._embeddings_require_grad(model, config)
        for part in ("text_encoder", "vae", *model.expert_parts()):
            getattr(model, part).requires_grad_(False)
        for part in model.expert_parts():
            self._setup_model_part_requires_grad(
                f"{part}_lora",
                getattr(model, f"{part}_lora"),
                getattr(config, part),
                model.train_progress,
            )

    def _has_stopped(self, model: WanModel, part: str) -> bool:
        if model.parameters is None:
            return False  # not set up yet
        adapter = getattr(model, f"{part}_lora")
        return adapter is not None and not any(p.requires_grad for p in adapter.parameters())
