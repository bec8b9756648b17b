"""Wan 2.2; see `modules.modelLoader.wan.WanEmbeddingModelLoader`."""

from modules.util.wan_addon import join

join(__name__, "modules.modelLoader.wan.WanEmbeddingModelLoader")
