"""Training of embeddings only; registers itself."""

from modules.model.WanModel import WanModel
from modules.modelSetup.BaseModelSetup import BaseModelSetup
from modules.modelSetup.wan.BaseWanSetup import BaseWanSetup
from modules.util import factory
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType
from modules.util.enum.TrainingMethod import TrainingMethod
from modules.util.NamedParameterGroup import NamedParameterGroupCollection


@factory.register(BaseModelSetup, ModelType.WAN_2_2, TrainingMethod.EMBEDDING)
class WanEmbeddingSetup(BaseWanSetup):
    def create_parameters(
        self, model: WanModel, config: TrainConfig
    ) -> NamedParameterGroupCollection:
        groups = NamedParameterGroupCollection()
        self._add_embedding_groups(model, config, groups)
        return groups

    def _require_grad(self, model: WanModel, config: TrainConfig):
        for part in ("text_encoder", "vae", *model.expert_parts()):
            getattr(model, part).requires_grad_(False)
        self._embeddings_require_grad(model, config)
