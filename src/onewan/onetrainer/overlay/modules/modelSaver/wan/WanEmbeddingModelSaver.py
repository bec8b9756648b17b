"""Saves embeddings; registers itself."""

from modules.model.WanModel import WanModel
from modules.modelSaver.GenericEmbeddingModelSaver import make_embedding_model_saver
from modules.modelSaver.wan.WanEmbeddingSaver import WanEmbeddingSaver
from modules.util.enum.ModelType import ModelType

WanEmbeddingModelSaver = make_embedding_model_saver(
    ModelType.WAN_2_2,
    model_class=WanModel,
    embedding_saver_class=WanEmbeddingSaver,
)
