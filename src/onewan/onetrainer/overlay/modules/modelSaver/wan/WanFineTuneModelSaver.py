"""Saves fine-tuned models; registers itself."""

from modules.model.WanModel import WanModel
from modules.modelSaver.GenericFineTuneModelSaver import make_fine_tune_model_saver
from modules.modelSaver.wan.WanEmbeddingSaver import WanEmbeddingSaver
from modules.modelSaver.wan.WanModelSaver import WanModelSaver
from modules.util.enum.ModelType import ModelType

WanFineTuneModelSaver = make_fine_tune_model_saver(
    ModelType.WAN_2_2,
    model_class=WanModel,
    model_saver_class=WanModelSaver,
    embedding_saver_class=WanEmbeddingSaver,
)
