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
from modules.util.optimizer_util import init_model_parameters
from modules.util.TrainProgress import TrainProgress


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

    def setup_model(self, model: WanModel, config: TrainConfig):
        self._setup_embeddings(model, config)
        groups = self.create_parameters(model, config)
        self._require_grad(model, config)
        init_model_parameters(model, groups, self.train_device)

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

    def after_optimizer_step(
        self, model: WanModel, config: TrainConfig, train_progress: TrainProgress
    ):
        self._keep_norms(model, config)
        self._require_grad(model, config)
