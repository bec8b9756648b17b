"""Wan 2.2; see `modules.modelSetup.wan.WanEmbeddingSetup`."""

from modules.util.wan_addon import join

join(__name__, "modules.modelSetup.wan.WanEmbeddingSetup")
