"""Embeddings alone; registers itself."""

from modules.model.WanModel import WanModel
from modules.modelSetup.BaseModelSetup import BaseModelSetup
from modules.modelSetup.wan.BaseWanSetup import BaseWanSetup
from modules.util import factory
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType
from modules.util.enum.TrainingMethod import TrainingMethod
from modules.util.NamedParameterGroup import NamedParameterGroupCollection
from modules.util.optimizer_util import init_model_parameters
from modules.util.TrainProgress import TrainProgress


@factory.register(BaseModelSetup, ModelType.WAN_2_2, TrainingMethod.EMBEDDING)
class WanEmbeddingSetup(BaseWanSetup):
    def create_parameters(
        self, model: WanModel, config: TrainConfig
    ) -> NamedParameterGroupCollection:
        groups = NamedParameterGroupCollection()
        self._add_embedding_groups(model, config, groups)
        return groups

    def setup_model(self, model: WanModel, config: TrainConfig):
        self._setup_embeddings(model, config)
        groups = self.create_parameters(model, config)
        self._require_grad(model, config)
        init_model_parameters(model, groups, self.train_device)

    def _require_grad(self, model: WanModel, config: TrainConfig):
        for part in ("text_encoder", "vae", *model.expert_parts()):
            getattr(model, part).requires_grad_(False)
        self._embeddings_require_grad(model, config)

    def after_optimizer_step(
        self, model: WanModel, config: TrainConfig, train_progress: TrainProgress
    ):
        self._keep_norms(model, config)
        self._require_grad(model, config)
