"""The setup of each training method; registers them."""

import copy
import re

from modules.model.WanModel import WanModel
from modules.modelSetup.BaseModelSetup import BaseModelSetup
from modules.modelSetup.wan.BaseWanSetup import BaseWanSetup
from modules.module.LoRAModule import LoRAModuleWrapper
from modules.util import factory
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType
from modules.util.enum.TrainingMethod import TrainingMethod
from modules.util.ModuleFilter import ModuleFilter
from modules.util.torch_util import state_dict_has_prefix

import torch
from torch import nn

from onewan.arithmetic.layer_names import block_of
from onewan.onetrainer import settings
from onewan.seeds import derive_seed


WanModelSetup = BaseWanSetup
"""The design's name of the class that OneTrainer's convention names ``Base<Model>Setup``."""


@factory.register(BaseModelSetup, ModelType.WAN_2_2, TrainingMethod.EMBEDDING)
class WanEmbeddingSetup(BaseWanSetup):
    """Embeddings alone; the base class trains them beside the experts too."""


@factory.register(BaseModelSetup, ModelType.WAN_2_2, TrainingMethod.FINE_TUNE)
class WanFineTuneSetup(BaseWanSetup):
    """The experts' own weights."""

    def _trained_module(self, model: WanModel, part: str) -> tuple[str, nn.Module | None]:
        return part, getattr(model, part)

    def _selectable(self, transformer: nn.Module) -> list[str]:
        return [name for name, _ in transformer.named_parameters()]

    def _weight_filters(self, config: TrainConfig) -> list:
        return _filters(config)


@factory.register(BaseModelSetup, ModelType.WAN_2_2, TrainingMethod.LORA)
class WanLoRASetup(BaseWanSetup):
    """Adapters on the experts, by OneTrainer's own modules."""

    def _trained_module(self, model: WanModel, part: str) -> tuple[str, nn.Module | None]:
        return f"{part}_lora", getattr(model, f"{part}_lora")

    def _selectable(self, transformer: nn.Module) -> list[str]:
        return [n for n, module in transformer.named_modules() if isinstance(module, nn.Linear)]

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
        names = _adapted_layers(config, transformer)
        config = copy.copy(config)
        if names is not None:
            config.layer_filter_regex = True
            filters = [rf"^({'|'.join(map(re.escape, names))})$"]
        if part == "transformer_2" and config.wan_low_lora_rank:
            config.lora_rank = config.lokr_dim = config.wan_low_lora_rank
        if part == "transformer_2" and config.wan_low_lora_alpha:
            config.lora_alpha = config.wan_low_lora_alpha
        # OneTrainer draws initial weights from an unseeded generator, so two runs would differ.
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(settings.SEED, "onetrainer adapter", part))
            return LoRAModuleWrapper(transformer, part, config, filters)


class _InBlocks:
    """A layer filter that matches in some blocks only."""

    def __init__(self, inner: ModuleFilter, blocks: tuple[int, ...]):
        self._inner = inner
        self._blocks = blocks

    def matches(self, module_name: str) -> bool:
        return block_of(module_name) in self._blocks and self._inner.matches(module_name)

    def was_used(self) -> bool:
        return self._inner.was_used()


def _filters(config: TrainConfig) -> list:
    """OneTrainer's layer filter, within the selected blocks."""
    filters = ModuleFilter.create(config)
    blocks = settings.layers_of(config)
    return filters if blocks is None else [_InBlocks(f, blocks) for f in filters]


def _adapted_layers(config: TrainConfig, transformer: nn.Module) -> list[str] | None:
    """The linear layers that get an adapter; None if no blocks are selected."""
    if settings.layers_of(config) is None:
        return None
    filters = _filters(config)
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and any(f.matches(name) for f in filters)
    ]
