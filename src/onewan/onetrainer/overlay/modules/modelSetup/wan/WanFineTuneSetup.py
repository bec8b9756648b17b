"""Fine-tuning of the experts; registers itself."""

from modules.model.WanModel import WanModel
from modules.modelSetup.BaseModelSetup import BaseModelSetup
from modules.modelSetup.wan.BaseWanSetup import BaseWanSetup
from modules.modelSetup.wan.filters import filters_of
from modules.util import factory
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType
from modules.util.enum.TrainingMethod import TrainingMethod
from modules.util.NamedParameterGroup import NamedParameterGroupCollection


@factory.register(BaseModelSetup, ModelType.WAN_2_2, TrainingMethod.FINE_TUNE)
class WanFineTuneSetup(BaseWanSetup):
    def create_parameters(
        self, model: WanModel, config: TrainConfig
    ) -> NamedParameterGroupCollection:
        groups = NamedParameterGroupCollection()
        self._add_embedding_groups(model, config, groups)
        for part in model.expert_parts():
            self._create_model_part_parameters(
                groups,
                part,
                getattr(model, part),
                getattr(config, part),
                freeze=filters_of(config),
                debug=config.debug_mode,
            )
        return groups

    def _require_grad(self, model: WanModel, config: TrainConfig):
        self._embeddings_require_grad(model, config)
        model.text_encoder.requires_grad_(False)
        model.vae.requires_grad_(False)
        for part in model.expert_parts():
            self._setup_model_part_requires_grad(
                part, getattr(model, part), getattr(config, part), model.train_progress
            )

    def _has_stopped(self, model: WanModel, part: str) -> bool:
        if model.parameters is None:
            return False  # not set up yet
        return not any(p.requires_grad for p in getattr(model, part).parameters())
