"""Wan 2.2 as OneTrainer's kind of model: components by name, on top of onewan's `WanModel`."""

from modules.model.BaseModel import BaseModel, BaseModelEmbedding
from modules.module.LoRAModule import LoRAModuleWrapper
from modules.util.enum.ModelType import ModelType

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn

from onewan.model import wan as engine
from onewan.model.embedding import WanModelEmbedding as TrainedEmbedding

from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

EXPERTS = ("transformer", "transformer_2")


class WanModelEmbedding:
    """An embedding in OneTrainer's form; onewan trains the vectors that it shares."""

    def __init__(
        self,
        uuid: str,
        text_encoder_vector: Tensor | None,
        placeholder: str,
        is_output_embedding: bool,
    ):
        """`text_encoder_vector` is [tokens, width], float32."""
        self.text_encoder_embedding = BaseModelEmbedding(
            uuid=uuid,
            placeholder=placeholder,
            vector=text_encoder_vector,
            is_output_embedding=is_output_embedding,
        )

    @classmethod
    def of(cls, trained: TrainedEmbedding) -> "WanModelEmbedding":
        """The form of `trained`, with the same tensor."""
        return cls(
            uuid=trained.uuid,
            text_encoder_vector=trained.vectors,
            placeholder=trained.placeholder,
            is_output_embedding=trained.is_output_embedding,
        )

    def trained(self) -> TrainedEmbedding:
        """What onewan trains and encodes prompts with, with the same tensor."""
        own = self.text_encoder_embedding
        vectors = own.output_vector if own.is_output_embedding else own.vector
        return TrainedEmbedding(
            placeholder=own.placeholder,
            name=own.placeholder.strip("<>") or "embedding",
            uuid=own.uuid,
            vectors=vectors if isinstance(vectors, nn.Parameter) else nn.Parameter(vectors),
            is_output_embedding=own.is_output_embedding,
        )


class WanModel(BaseModel):
    """The components are those of `wan`, onewan's model; one that was not loaded is None."""

    tokenizer: PreTrainedTokenizerBase | None
    text_encoder: UMT5EncoderModel | None
    vae: AutoencoderKLWan | None
    transformer: WanTransformer3DModel | None
    """The high-noise expert of the A14B variants, the only transformer of TI2V-5B."""
    transformer_2: WanTransformer3DModel | None
    """The low-noise expert."""
    noise_scheduler: UniPCMultistepScheduler | None
    """The official solver, for sampling; timesteps of training are drawn by the step adapter."""
    text_encoder_lora: LoRAModuleWrapper | None
    """Always None: the text encoder is not trained."""
    transformer_lora: LoRAModuleWrapper | None
    transformer_2_lora: LoRAModuleWrapper | None
    frame_count: int
    """The maximum frames of a training clip; before training, the variant's own."""
    temporal_compression: int
    """Frames per latent frame after the first; 0 before the model is loaded."""
    spatial_compression: int
    """Pixels per latent cell, along each side; 0 before the model is loaded."""

    def __init__(self, model_type: ModelType):
        super().__init__(model_type=model_type)
        self.ema = None  # OneTrainer's trainer expects it of every model
        self.wan: engine.WanModel | None = None
        self.wan_sources: dict[str, str] = {}
        self.lora_state_dict = None
        self.tokenizer = self.noise_scheduler = None
        for part in (*EXPERTS, "text_encoder", "vae"):
            setattr(self, part, None)
            setattr(self, f"{part}_offload_conductor", None)
        self.transformer_lora = self.transformer_2_lora = self.text_encoder_lora = None
        self.frame_count = self.temporal_compression = self.spatial_compression = 0

    def take(self, wan: engine.WanModel, sources: dict[str, str]) -> None:
        """Use the components of `wan`, which were loaded from `sources`."""
        self.wan, self.wan_sources = wan, sources
        for part in (*EXPERTS, "text_encoder", "vae", "tokenizer", "noise_scheduler"):
            setattr(self, part, getattr(wan, part))
        self.frame_count = wan.variant.frames
        self.temporal_compression = wan.variant.temporal_compression
        self.spatial_compression = wan.variant.spatial_compression

    def expert_parts(self) -> list[str]:
        """The transformers that were loaded."""
        return [part for part in EXPERTS if getattr(self, part) is not None]

    @property
    def embedding(self) -> WanModelEmbedding | None:
        """The one of the training method EMBEDDING."""
        found = self.trained_embedding()
        return None if found is None else WanModelEmbedding.of(found)

    @property
    def additional_embeddings(self) -> list[WanModelEmbedding]:
        found = [] if self.wan is None else self.wan.additional_embeddings
        return [WanModelEmbedding.of(trained) for trained in found]

    def all_embeddings(self) -> list[WanModelEmbedding]:
        """All embeddings whose placeholders prompts may contain."""
        return [WanModelEmbedding.of(trained) for trained in self.trained_embeddings()]

    def trained_embedding(self) -> TrainedEmbedding | None:
        """The one of the training method EMBEDDING, as onewan trains it."""
        return None if self.wan is None else self.wan.embedding

    def trained_embeddings(self) -> list[TrainedEmbedding]:
        """All embeddings, as onewan trains them."""
        return [] if self.wan is None else self.wan.all_embeddings()
