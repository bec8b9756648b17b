"""Wan 2.2 as OneTrainer's kind of model: components by name, on top of onewan's `WanModel`."""

from modules.model.BaseModel import BaseModel
from modules.util.enum.ModelType import ModelType

from onewan.model import wan as engine
from onewan.model.embedding import WanModelEmbedding

EXPERTS = ("transformer", "transformer_2")


class WanModel(BaseModel):
    """The components are those of `wan`, onewan's model; one that was not loaded is None."""

    def __init__(self, model_type: ModelType):
        super().__init__(model_type=model_type)
        self.ema = None  # OneTrainer's trainer expects it of every model
        self.wan: engine.WanModel | None = None
        self.wan_sources: dict[str, str] = {}
        self.lora_state_dict = None
        for part in (*EXPERTS, "text_encoder", "vae"):
            setattr(self, part, None)
            setattr(self, f"{part}_offload_conductor", None)
        self.transformer_lora = self.transformer_2_lora = None

    def take(self, wan: engine.WanModel, sources: dict[str, str]) -> None:
        """Use the components of `wan`, which were loaded from `sources`."""
        self.wan, self.wan_sources = wan, sources
        for part in (*EXPERTS, "text_encoder", "vae"):
            setattr(self, part, getattr(wan, part))

    def expert_parts(self) -> list[str]:
        """The transformers that were loaded."""
        return [part for part in EXPERTS if getattr(self, part) is not None]

    @property
    def embedding(self) -> WanModelEmbedding | None:
        return None if self.wan is None else self.wan.embedding

    @property
    def additional_embeddings(self) -> list[WanModelEmbedding]:
        return [] if self.wan is None else self.wan.additional_embeddings

    def all_embeddings(self) -> list[WanModelEmbedding]:
        """All embeddings whose placeholders prompts may contain."""
        return [] if self.wan is None else self.wan.all_embeddings()
