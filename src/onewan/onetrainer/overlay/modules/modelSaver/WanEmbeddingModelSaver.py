"""Wan 2.2; see `modules.modelSaver.wan.WanEmbeddingModelSaver`."""

from modules.util.wan_addon import join

join(__name__, "modules.modelSaver.wan.WanEmbeddingModelSaver")
